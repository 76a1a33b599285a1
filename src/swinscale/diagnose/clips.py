"""Films as a video model sees them: the class and the attention on each frame, some frames as one picture, measures as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from swinscale.diagnose.pictures import cut_to_width
from swinscale.diagnose.sheets import Row, sheet
from swinscale.errors import UsageError
from swinscale.runlog import measures

SMALLEST = 320
"""Pixels of the longer side of a frame: smaller ones are enlarged by whole numbers, so that their class can be read."""
IN_SHEET = 320  # the same in a picture of several frames, which is also the largest
NAMED = 40  # classes in a table
HIDDEN = 0.8  # of the frame by the strongest attention
COLOURS = "inferno"
"""Of the attention: light is much, and what gets none keeps the colours of the film."""


class FilmExample(NamedTuple):
    """A frame (3, H, W) uint8, how it was drawn, and when it is shown, in seconds."""

    frame: Tensor
    drawn: Image.Image
    seconds: float


def draw_attention(frame: Tensor, attention: NDArray[np.floating], label: str, probability: float) -> Image.Image:
    """A frame under its attention, and below it on the frame what the film is taken for.

    Args:
        frame: (3, H, W) uint8; if its longer side is below 320 pixels, it is enlarged by a whole number.
        attention: (h, w) of any size; from 0, which leaves the frame as it is, to 1 and more, the lightest colour.
        label, probability: the class of the film, 0…1.
    """
    image = _enlarged(Image.fromarray(frame.movedim(0, -1).contiguous().cpu().numpy()), SMALLEST)
    strength = Image.fromarray(np.asarray(attention, dtype=np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    shares = np.asarray(strength).clip(0, 1)[..., None]
    over = 255 * colormaps[COLOURS](0.3 + 0.7 * shares[..., 0])[..., :3]
    pixels = np.asarray(image, dtype=np.float32)
    drawn = Image.fromarray((pixels + HIDDEN * shares * (over - pixels)).round().astype(np.uint8))
    return _labelled(drawn, label, f"{100 * probability:.0f} %")


def _labelled(picture: Image.Image, label: str, percent: str) -> Image.Image:
    """The picture with a dark strip at its lower edge, and a line of text in it."""
    letters = max(11, min(picture.height // 14, picture.width // 16))
    font, pad = ImageFont.load_default(letters), letters // 2
    top = picture.height - round(letters * 1.7)
    strip = Image.new("RGB", (picture.width, picture.height - top), "black")
    picture.paste(Image.blend(picture.crop((0, top, picture.width, picture.height)), strip, 0.72), (0, top))
    draw, middle = ImageDraw.Draw(picture), (top + picture.height) / 2
    end = picture.width - pad
    draw.text((end, middle), percent, "white", font, anchor="rm")
    room = end - font.getlength(percent) - 2 * pad
    draw.text((pad, middle), cut_to_width(label, font, room), "white", font, anchor="lm")
    return picture


def film_sheet(examples: Sequence[FilmExample], ranked: Sequence[tuple[str, float]], high: float) -> Image.Image:
    """Frames of a film beside each other, below them the same with their attention, and what the film is taken for.

    Args:
        ranked: classes and probabilities, best first.
        high: the multiple of an equal share of the attention that has the lightest colour.

    Raises:
        UsageError: without frames.
    """
    if not examples:
        raise UsageError("No frames: a picture of a film needs at least one.")
    frames = [Image.fromarray(e.frame.movedim(0, -1).contiguous().cpu().numpy()) for e in examples]
    rows = [
        Row([_enlarged(frame, IN_SHEET, IN_SHEET) for frame in frames], [f"{e.seconds:.1f} s" for e in examples]),
        Row([_enlarged(e.drawn, IN_SHEET, IN_SHEET) for e in examples]),
    ]
    said = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in ranked)
    return sheet(rows, more=f"{said}. Lightest: {high:.1f} times an equal share of the attention.")


def _enlarged(image: Image.Image, smallest: int, largest: int | None = None) -> Image.Image:
    factor: float = max(1, math.ceil(smallest / max(image.size)))
    resample = Image.Resampling.NEAREST
    if largest is not None and max(image.size) * factor > largest:
        factor, resample = largest / max(image.size), Image.Resampling.LANCZOS
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), resample)


def print_video_table(console: Console, metrics: Mapping[str, Any]) -> None:
    """How films were looked at, the measures, and of up to 40 classes how many of their films were recognised.

    Args:
        metrics: what ``video.evaluate_videos`` returns.
    """
    console.print(f"{metrics['views']} of {metrics['size']}")
    if "confusion" not in metrics:
        console.print(measures(metrics), soft_wrap=True)
        return
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    counts = np.asarray(metrics["confusion"])
    for name, title in (("top1", "top-1, %"), ("top5", "top-5, %"))[: 2 if len(counts) > 5 else 1]:
        table.add_row(title, f"{100 * metrics[name]:.1f}")
    table.add_row("loss", f"{metrics['loss']:.4g}")
    for name, title in (("unreadable", "films that cannot be read"), ("absent", "films that are not there")):
        if metrics[name]:
            table.add_row(title, f"{metrics[name]:.0f}")
    console.print(table)
    if len(counts) <= NAMED:
        table = Table("class")
        for title in ("films", "recognised, %"):
            table.add_column(title, justify="right")
        for name, row, right in zip(metrics["classes"], counts.sum(1), counts.diagonal(), strict=True):
            table.add_row(escape(name), f"{row:.0f}", f"{100 * right / row:.1f}" if row else "–")
        console.print(table)
