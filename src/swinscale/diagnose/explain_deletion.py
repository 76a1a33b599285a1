"""Whether a map tells what a model needs: the model's probability while the image is deleted in the order of the map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swinscale.diagnose.explain_cam import classifier_of, mean_colour, targets
from swinscale.diagnose.explain_maps import evaluating
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.models.config import Size
from swinscale.seeding import derive_seed

BATCH = 32
"""Images that are run at a time; of clips fewer, so that there are as many tokens."""


@dataclass(frozen=True)
class Deletion:
    """Probabilities of a class while an image is deleted.

    Args:
        share: (K+1,) deleted share of the image, from 0 to 1.
        probability: (B, K+1) in the order of the map, the highest values first.
        random: (R, B, K+1) in random orders.
    """

    share: Tensor
    probability: Tensor
    random: Tensor

    @property
    def auc(self) -> Tensor:
        """(B,) area under ``probability``, from 0 to 1. A map that names what the model needs has a small one."""
        return torch.trapezoid(self.probability, self.share)

    @property
    def random_auc(self) -> Tensor:
        """(R, B) areas under ``random``: what a map that knows nothing gets."""
        return torch.trapezoid(self.random, self.share)


@torch.no_grad()
def deletion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    cell: int | None = None,
    steps: int = 16,
    repeats: int = 8,
    seed: int = 0,
) -> Deletion:
    """The deletion curve of a map (Petsiuk et al., arXiv 1806.07421), beside random orders.

    Square cells of the image are replaced by its mean colour, those with the highest mean value in the map first. All orders
    delete the same cells, so that a random one is not the worse for tearing the image into dust.

    Args:
        model, x, target: as in ``cam``.
        maps: (B, *size) one value per pixel, as ``cam`` and ``integrated_gradients`` return.
        cell: side of a cell in pixels (frames stay whole). Default: an eighth of the shorter side.
        steps: how many times a share of the cells is deleted.
        repeats: how many random orders.
        seed: of the random orders.
    """
    model = classifier_of(model)
    size = tuple(x.shape[2:])
    if tuple(maps.shape) != (len(x), *size):
        raise UsageError(f"maps of shape {tuple(maps.shape)}: give one value per pixel, {(len(x), *size)}.")
    cell = max(1, min(size[-2:]) // 8) if cell is None else cell
    if cell < 1 or steps < 1 or repeats < 1:
        raise UsageError(f"cell={cell}, steps={steps}, repeats={repeats} must be at least 1.")
    x = x.to(model.norm.weight.device)
    cells, count = _cells(size, cell)
    cells = cells.to(x.device)
    sums = torch.zeros(len(x), count, device=x.device).index_add_(1, cells, maps.to(x).float().flatten(1))
    value = sums / torch.bincount(cells, minlength=count)
    generator = torch.Generator().manual_seed(derive_seed("deletion", seed))
    noise = torch.rand(repeats, len(x), count, generator=generator)
    deleted = torch.arange(min(steps, count) + 1) * count // min(steps, count)
    with evaluating(model):
        classes = targets(model(x), target)
        curves = []
        for order in (value, *noise.to(x.device)):
            place = order.argsort(dim=1, descending=True, stable=True).argsort(1)  # when each cell is deleted
            place = place[:, cells].unflatten(1, size)[:, None]
            numbers = deleted.to(x.device).view(-1, *(1,) * x.ndim)
            partly = torch.where(place < numbers, mean_colour(x), x).flatten(0, 1)
            curves.append(_probabilities(model, partly, classes.repeat(len(deleted))).unflatten(0, (-1, len(x))).t())
    share = deleted / count
    return Deletion(share, curves[0], torch.stack(curves[1:]))


def _cells(size: Size, cell: int) -> tuple[Tensor, int]:
    """The cell of each pixel in raster order, and how many there are; time is not divided."""
    sides = [n if axis < len(size) - 2 else cell for axis, n in enumerate(size)]
    counts = [math.ceil(n / side) for n, side in zip(size, sides, strict=True)]
    index = torch.zeros(1, dtype=torch.int64)
    for n, side, count in zip(size, sides, counts, strict=True):
        index = index[..., None] * count + torch.arange(n) // side
    return index.flatten(), math.prod(counts)


def _probabilities(model: SwinTransformer, x: Tensor, classes: Tensor) -> Tensor:
    """(B,) of one class for each image."""
    at_once = max(1, BATCH // math.prod(model.config.stage_maps(tuple(x.shape[2:]))[0][:-2]))
    logits = torch.cat([model(part) for part in x.split(at_once)])
    return logits.float().softmax(1).gather(1, classes[:, None])[:, 0].cpu()
