"""Hidden pixels painted from the visible ones around them: what a model of images or clips should do better than."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FINEST, MOST = 2, 32
"""Relaxations at full resolution; each coarser level, with a quarter of the cells, has four times as many, up to a limit."""


def paint_from_neighbours(images: Tensor, hidden: Tensor) -> Tensor:
    """Fills hidden pixels by diffusion from the visible ones, coarse to fine.

    Each level of a pyramid halves the one before; a cell's value is the mean of its visible pixels. A cell without any
    takes an interpolation of the coarser level and then, a few times over, the mean of its four neighbours. That comes
    close to the harmonic function through the visible pixels (the heat equation at rest): exact where the image is
    constant, close where it is smooth. Nothing is learned, and a channel knows nothing of the others.

    Args:
        images: (B, C, H, W), or clips (B, C, T, H, W), of which each frame is painted from itself.
        hidden: (B, 1, H, W) or (B, 1, T, H, W), bool, True where a pixel must not be looked at.

    Returns:
        Like ``images``, and equal to them where they are visible. An image or frame without a visible pixel becomes 0.
    """
    if images.ndim == 5:
        frames, hidden_frames = (x.movedim(2, 1).flatten(0, 1) for x in (images, hidden))
        return paint_from_neighbours(frames, hidden_frames).unflatten(0, (len(images), -1)).movedim(1, 2)
    weights = (~hidden).to(images.dtype)
    means = images.masked_fill(hidden, 0)
    levels = [(means, hidden)]
    while max(means.shape[-2:]) > 2:
        total = F.avg_pool2d(means * weights, 2, ceil_mode=True)
        weights = F.avg_pool2d(weights, 2, ceil_mode=True)
        empty = weights == 0
        means = total / weights.masked_fill(empty, 1)
        levels.append((means, empty))
    means, empty = levels[-1]
    known = (~empty).to(means.dtype)
    filled = (means * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    for level, (means, empty) in reversed(list(enumerate(levels))):
        guess = F.interpolate(filled, means.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(empty, guess, means)
        for _ in range(min(FINEST * 4**level, MOST)):
            filled = torch.where(empty, _mean_of_four(filled), means)
    return filled


def _mean_of_four(x: Tensor) -> Tensor:
    """Of each pixel's neighbours above, below and beside it; at the border the pixel stands in for those that are missing."""
    wide, high = F.pad(x, (1, 1, 0, 0), mode="replicate"), F.pad(x, (0, 0, 1, 1), mode="replicate")
    return (wide[..., :-2] + wide[..., 2:] + high[..., :-2, :] + high[..., 2:, :]) / 4
