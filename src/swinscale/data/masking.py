"""Which patches SimMIM hides in an image or a clip: a function of (seed, epoch, index), whatever the loader processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.seeding import derive_seed


@dataclass(frozen=True)
class MaskConfig:
    """Masks for inputs of ``img_size`` pixels: images (height, width), or clips (time, height, width).

    A cell is a square, in clips one token long: any number of frames is allowed, as to the model.

    Args:
        mask_patch: side of a masked cell, in pixels.
        patch_size: pixels per token: the resolution of the mask.
        ratio: share of cells that are masked; their number is rounded up (192 pixels with cells of 32: 22 of 36).
        mode: "random" cells; "block": rectangles of neighbouring cells, in clips boxes of them, until the number is reached;
            "tube", for clips alone: random squares that are hidden in all frames, those that "random" hides in an image of
            their size. Where little moves, the frames before and after would give a hidden square away.

    Raises:
        UsageError: for sizes that do not divide each other, with some that do, and for tubes in images.
    """

    img_size: tuple[int, ...]
    mask_patch: int
    patch_size: tuple[int, ...]
    ratio: float = 0.6
    mode: Literal["random", "block", "tube"] = "random"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"mask_ratio={self.ratio} must lie between 0 and 1.")
        if len(self.img_size) != len(self.patch_size):
            raise UsageError(
                f"img_size={self.img_size} and patch_size={self.patch_size} must have the same number of axes."
            )
        if self.mode == "tube" and not self._time:
            raise UsageError(
                f"mask_mode='tube' hides squares in all frames of a clip, and img_size={self.img_size} is an image: choose "
                f"'random' or 'block'."
            )
        for size, patch in zip(self.img_size[-2:], self.patch_size[-2:], strict=True):
            if self.mask_patch % patch or self.mask_patch < 1:
                raise UsageError(
                    f"mask_patch={self.mask_patch} is not a multiple of the model's patch_size={patch}. "
                    f"Set it to {max(1, round(self.mask_patch / patch)) * patch}."
                )
            if size % self.mask_patch:
                near = max(1, round(size / self.mask_patch)) * self.mask_patch
                fits = [m for m in range(patch, size + 1, patch) if size % m == 0]
                best = min(fits, key=lambda m: abs(m - self.mask_patch), default=None)
                advice = f" or mask_patch={best}" if best else ""
                raise UsageError(
                    f"img_size={size} is not a multiple of mask_patch={self.mask_patch}. Set img_size={near}{advice}."
                )

    @property
    def _time(self) -> tuple[int, ...]:
        """Tokens along time, for the one such axis of a clip; nothing for an image."""
        return tuple(math.ceil(n / p) for n, p in zip(self.img_size[:-2], self.patch_size[:-2], strict=True))

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells along each axis."""
        time = (1,) * len(self._time) if self.mode == "tube" else self._time
        return (*time, *(size // self.mask_patch for size in self.img_size[-2:]))

    @property
    def tokens_per_cell(self) -> tuple[int, ...]:
        """Tokens of a cell along each axis."""
        time = self._time if self.mode == "tube" else (1,) * len(self._time)
        return (*time, *(self.mask_patch // patch for patch in self.patch_size[-2:]))

    @property
    def masked_cells(self) -> int:
        """How many cells are masked."""
        return math.ceil(self.ratio * math.prod(self.cells))


def mask_for_sample(config: MaskConfig, seed: int, epoch: int, index: int) -> Tensor:
    """The mask of one sample in one epoch: bool, one entry per token, True = masked."""
    random = np.random.default_rng(derive_seed(seed, "mask", epoch, index))
    cells = (_block_cells if config.mode == "block" else _random_cells)(config, random)
    mask = torch.from_numpy(cells)
    for axis, tokens in enumerate(config.tokens_per_cell):
        mask = mask.repeat_interleave(tokens, axis)
    return mask


def _random_cells(config: MaskConfig, random: np.random.Generator) -> np.ndarray:
    cells = np.zeros(math.prod(config.cells), dtype=bool)
    cells[random.permutation(cells.size)[: config.masked_cells]] = True
    return cells.reshape(config.cells)


def _block_cells(config: MaskConfig, random: np.random.Generator) -> np.ndarray:
    cells = np.zeros(config.cells, dtype=bool)
    while (missing := config.masked_cells - int(cells.sum())) > 0:
        sides = [int(random.integers(1, max(min(2, n), n // 2) + 1)) for n in config.cells]
        corner = [int(random.integers(0, n - s + 1)) for n, s in zip(config.cells, sides, strict=True)]
        block = np.zeros_like(cells)
        block[tuple(slice(c, c + s) for c, s in zip(corner, sides, strict=True))] = True
        new = np.flatnonzero(block & ~cells)
        cells.flat[new[:missing]] = True  # the last block is cut so that the number is exact
    return cells
