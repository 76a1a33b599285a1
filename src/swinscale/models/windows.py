"""Window order: where the tokens of a map sit when they are sorted into windows, and their relative positions.

Everything here depends on sizes alone, is computed once and cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from swinscale.models.config import Size, SwinConfig

F = TypeVar("F", bound=Callable[..., Any])


def _constant(function: F) -> F:
    """Caches ``function``. Its tensors are plain ones, also when it is first called in inference mode or in an export."""

    @lru_cache(maxsize=512)
    @wraps(function)
    def once(*arguments: Any) -> Any:
        with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
            return function(*arguments)

    return cast(F, once)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a map sit when they are sorted into windows."""

    window: Size
    source: Tensor  # (W*N,) raster position of the token in each slot; padding slots hold a copy of some token
    slot: Tensor  # (L,) slot of each raster position: the way back
    regions: Tensor | None  # (W, N) attention stays within a region; None: the whole window is one region
    zero: Tensor | None  # (W, N, 1) slots that must enter attention as zeros (padding of pad="legacy")


@_constant
def window_layout(size: Size, window: Size, shift: Size, exact: bool, device: torch.device) -> Layout:
    """Sorts a map of ``size`` tokens into windows, shifted cyclically by ``shift``.

    The map is padded at its end to whole windows. Rows that wrap around the seam, and with ``exact`` the padding, are
    regions of their own.
    """
    rank = len(size)
    source, region = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    padding = torch.zeros(1, dtype=torch.bool)
    for axis, (n, w, s) in enumerate(zip(size, window, shift, strict=True)):
        padded = math.ceil(n / w) * w
        place = torch.arange(padded)
        position = (place + s) % padded
        seam = (place >= padded - w).long() + (place >= padded - s).long() if s else torch.zeros_like(place)
        shape = [1] * (2 * rank)  # (windows along each axis..., tokens along each axis...)
        shape[axis], shape[rank + axis] = padded // w, w
        source = source * n + position.clamp(max=n - 1).view(shape)
        region = region * 3 + seam.view(shape)
        padding = padding | (position >= n).view(shape)
    tokens = math.prod(window)
    source, region, padding = (t.reshape(-1, tokens) for t in (source, region, padding))
    slot = torch.empty(math.prod(size), dtype=torch.long)
    slot[source[~padding]] = torch.arange(source.numel()).view_as(source)[~padding]
    padded_somewhere = bool(padding.any())
    if padded_somewhere and exact:
        region = region.masked_fill(padding, -1)
    return Layout(
        window=window,
        source=source.flatten().to(device),
        slot=slot.to(device),
        regions=region.to(device) if bool((region != region[:, :1]).any()) else None,
        zero=padding[..., None].to(device) if padded_somewhere and not exact else None,
    )


def stage_layout(config: SwinConfig, stage: int, size: Size, shifted: bool, device: torch.device) -> Layout:
    """The layout of a map of ``size`` tokens in a stage: its window, shrunk to the map or not, and its shift."""
    window = config.stage_windows[stage]
    shift = tuple(w // 2 for w in window) if shifted else (0,) * len(size)
    if config.small_map != "pad":  # a window that covers the map needs no shift
        shift = tuple(s if n > w else 0 for n, w, s in zip(size, window, shift, strict=True))
    if config.small_map == "shrink":
        window = tuple(map(min, window, size))
    return window_layout(size, window, shift, config.pad == "exact", device)


@_constant
def _gather_index(before: Layout | None, after: Layout | None) -> Tensor:
    """For each slot of ``after``, the slot of ``before`` that holds its token (None: raster order)."""
    if before is None:
        return cast(Layout, after).source
    return before.slot if after is None else before.slot[after.source]


def reorder(x: Tensor, before: Layout | None, after: Layout | None) -> Tensor:
    """(B, slots of ``before``, D) → (B, slots of ``after``, D); None stands for raster order."""
    return x if before is after else x.index_select(1, _gather_index(before, after))


@_constant
def relative_position_index(window: Size, table: Size, device: torch.device) -> Tensor:
    """(N*N,) row of a bias table, made for windows of size ``table``, for each (query, key) pair of a ``window``."""
    grid = torch.stack(torch.meshgrid(*map(torch.arange, window), indexing="ij")).flatten(1)
    index = torch.zeros(1, dtype=torch.long)
    for offset, t in zip(grid[:, :, None] - grid[:, None, :], table, strict=True):
        index = index * (2 * t - 1) + offset + t - 1
    return index.flatten().to(device)


@_constant
def relative_coords(window: Size, trained: Size, kind: str, device: torch.device) -> Tensor:
    """(prod(2w-1), rank) coordinates of all offsets in a window, as the continuous position bias reads them.

    "log": 8 times the offset over the trained window's largest one, on a logarithmic scale where 7 maps to 1 (published
    code). "linear": the plain ratio. "paper": sign(x) ln(1+|x|) of the offset itself.
    """
    axes = [torch.arange(-(w - 1), w, dtype=torch.float32) for w in window]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    if kind != "paper":
        coords = coords / torch.tensor([max(t - 1, 1) for t in trained])  # a window of 1 has offset 0 only
    if kind == "log":
        coords = coords * 8
    if kind != "linear":
        coords = coords.sign() * coords.abs().log1p() / (math.log(8) if kind == "log" else 1)
    return coords.to(device)
