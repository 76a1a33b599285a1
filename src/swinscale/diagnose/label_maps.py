"""Maps of labels as colours, over their picture and against the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swinscale.diagnose.colours import Colour

Labels = NDArray[np.int64]
"""(H, W), 0 … classes - 1; what is negative does not count."""
OPACITY = 0.55
WRONG, UNCOUNTED = (214, 39, 40), (150, 156, 164)


def coloured(labels: Labels, colours: Sequence[Colour]) -> Image.Image:
    """Each label as its colour; what does not count is black."""
    table = np.array([*colours, (0, 0, 0)], dtype=np.uint8)
    return Image.fromarray(table[np.maximum(labels, -1)])


def laid_over(image: Image.Image, labels: Labels, colours: Sequence[Colour], opacity: float = OPACITY) -> Image.Image:
    """Translucent colours over a picture, opaque at the borders of classes; what does not count is hatched."""
    full = coloured(labels, colours)
    drawn = Image.blend(image, full, opacity)
    drawn.paste(full, mask=_mask(_contours(labels)))
    drawn.paste(hatched(image), mask=_mask(labels < 0))
    return drawn


def _contours(labels: Labels) -> NDArray[np.bool_]:
    """Pixels at the border of two classes; the line grows with the picture."""
    edge = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    for step in range(max(1, round(max(labels.shape) / 800))):
        edge[:, step + 1 :] |= across[:, : across.shape[1] - step]
        edge[:, : across.shape[1] - step] |= across[:, step:]
        edge[step + 1 :] |= down[: down.shape[0] - step]
        edge[: down.shape[0] - step] |= down[step:]
    return edge


def hatched(image: Image.Image) -> Image.Image:
    """Dimmed, with diagonal lines."""
    period = max(8, max(image.size) // 60)
    rows, columns = np.ogrid[: image.height, : image.width]
    lines = (rows + columns) % period < max(1, period // 6)
    dim = Image.blend(image, Image.new("RGB", image.size, UNCOUNTED), 0.6)
    dim.paste(Image.new("RGB", image.size, (235, 238, 241)), mask=_mask(lines))
    return dim


def errors_on(image: Image.Image, predicted: Labels, truth: Labels) -> Image.Image:
    """Wrong pixels red on the pale picture."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.6)
    drawn = pale.copy()
    drawn.paste(Image.blend(pale, Image.new("RGB", image.size, WRONG), 0.85), mask=_mask(predicted != truth))
    drawn.paste(hatched(pale), mask=_mask(truth < 0))
    return drawn


def _mask(where: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(np.where(where, np.uint8(255), np.uint8(0)))
