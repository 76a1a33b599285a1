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
from swinscale.ops.compilers import constant

F = TypeVar("F", bound=Callable[..., Any])


def _constant(function: F) -> F:
    """Caches ``function``. Its tensors are plain ones, also when it is first called in inference mode or in an export.

    To ``torch.compile`` the result is a constant.
    """

    @lru_cache(maxsize=512)
    def once(*arguments: Any) -> tuple[Any]:
        with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
            return (function(*arguments),)

    @constant
    def held(*arguments: Any) -> tuple[Any]:  # a tuple, because the compiler takes two bare tensors for the same one
        return once(*arguments)

    @wraps(function)
    def kept(*arguments: Any) -> Any:
        return held(*arguments)[0]

    return cast(F, kept)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a map sit when they are sorted into windows.

    Windows of several regions come last: the windows before them need no mask.
    """

    window: Size
    source: Tensor  # (W*N,) raster position of the token in each slot; padding slots hold a copy of some token
    slot: Tensor  # (L,) slot of each raster position: the way back
    regions: Tensor | None  # (W, N) attention stays within a region; None: the whole window is one region
    zero: Tensor | None  # (W, N, 1) slots that must enter attention as zeros (padding of pad="legacy")


def _rest(numbers: Tensor, divisor: int) -> Tensor:
    """``numbers % divisor``. With a symbolic divisor ONNX has no other way to say it."""
    return numbers - numbers // divisor * divisor


def sort_into_windows(
    size: Size, window: Size, shift: Size, exact: bool, shrink: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source (W*N,), slot (L,), regions (W, N) and zero (W, N) of a ``Layout``, by arithmetic alone.

    No value decides what is computed, so a compiler can trace it with sizes that it keeps symbolic. With ``shrink``, an
    axis shorter than its window counts as a window that ends with the map: what is beyond takes no part in any mode.
    """
    counts = tuple((n + w - 1) // w for n, w in zip(size, window, strict=True))
    tokens = math.prod(window)
    slots = torch.arange(math.prod(counts) * tokens, device=device)
    raster = torch.arange(math.prod(size), device=device)
    window_index, inside = slots // tokens, _rest(slots, tokens)
    source, region, zero, apart = slots * 0, slots * 0, slots < 0, slots < 0
    slot, tokens_before, windows_before, raster_before, regions_before = raster * 0, 1, 1, 1, 1
    axes = reversed(tuple(zip(size, window, shift, counts, strict=True)))  # the last axis varies fastest
    for n, w, s, count in axes:
        padded = count * w
        place = _rest(window_index, count) * w + _rest(inside, w)
        window_index, inside = window_index // count, inside // w
        position = _rest(place + s, padded)
        seam = (place >= padded - w).long() + (place >= padded - s).long()
        beyond = position >= n
        excluded = beyond if exact else beyond & (shrink & (slots * 0 + n < w))
        source, region = source + position.clamp(max=n - 1) * raster_before, region + seam * regions_before
        zero, apart = zero | (beyond & ~excluded), apart | excluded
        back = _rest(_rest(raster, n) - s + padded, padded)
        raster = raster // n
        slot = slot + back // w * (windows_before * tokens) + _rest(back, w) * tokens_before
        tokens_before, windows_before = tokens_before * w, windows_before * count
        raster_before, regions_before = raster_before * n, regions_before * 3
    region = region.masked_fill(apart, -1)
    return source, slot, region.view(-1, tokens), zero.view(-1, tokens)


@_constant
def window_layout(size: Size, window: Size, shift: Size, exact: bool, device: torch.device) -> Layout:
    """Sorts a map of ``size`` tokens into windows, shifted cyclically by ``shift``.

    The map is padded at its end to whole windows. Rows that wrap around the seam, and with ``exact`` the padding, are
    regions of their own.
    """
    source, slot, region, zero = sort_into_windows(size, window, shift, exact, False, torch.device("cpu"))
    several = (region != region[:, :1]).any(1)
    order = several.int().argsort(stable=True)
    tokens = math.prod(window)
    return Layout(
        window=window,
        source=source.view(-1, tokens)[order].flatten().to(device),
        slot=(order.argsort()[slot // tokens] * tokens + slot % tokens).to(device),
        regions=region[order].to(device) if bool(several.any()) else None,
        zero=zero[order, :, None].to(device) if bool(zero.any()) else None,
    )


@_constant
def _orders(
    size: Size, window: Size, shift: Size, exact: bool, device: torch.device
) -> tuple[Layout, Layout, Tensor, Tensor]:
    regular = window_layout(size, window, (0,) * len(size), exact, device)
    shifted = window_layout(size, window, shift, exact, device) if any(shift) else regular
    return regular, shifted, shifted.slot[regular.source], regular.slot[shifted.source]


def stage_layouts(
    config: SwinConfig, stage: int, size: Size, device: torch.device
) -> tuple[Layout, Layout, Tensor, Tensor]:
    """The regular and the shifted layout of a map of ``size`` tokens in a stage, and how to change from one to the other.

    The same layout twice if nothing is shifted. The last two say, for each slot of the regular layout, which slot of the
    shifted one holds its token, and the reverse.
    """
    window = config.stage_windows[stage]
    shift = tuple(w // 2 for w in window)
    if config.small_map != "pad":
        # A window that covers the map needs no shift. Without a comparison, so that a compiler need not tell sizes apart.
        shift = tuple(s * min(max(n - w, 0), 1) for n, w, s in zip(size, window, shift, strict=True))
    exact, shrink = config.pad == "exact", config.small_map == "shrink"
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import; a compiler has done so

        if not all(map(has_static_value, size)):
            return _symbolic_layouts(size, window, shift, exact, shrink, device)
    window = tuple(map(min, window, size)) if shrink else window
    return _orders(size, window, shift, exact, device)


def _symbolic_layouts(
    size: Size, window: Size, shift: Size, exact: bool, shrink: bool, device: torch.device
) -> tuple[Layout, Layout, Tensor, Tensor]:
    """As part of a graph for many sizes. The window keeps its size and a small map is padded, to the same effect."""
    layouts = []
    for shifts in ((0,) * len(size), shift):
        source, slot, region, zero = sort_into_windows(size, window, shifts, exact, shrink, device)
        layouts.append(Layout(window, source, slot, region, None if exact else zero[..., None]))
    regular, shifted = layouts
    return regular, shifted, shifted.slot[regular.source], regular.slot[shifted.source]


@_constant
def layout_part(layout: Layout, start: int, stop: int) -> Layout:
    """The windows ``start`` to ``stop`` of a layout, as far as attention within them is concerned."""
    tokens = math.prod(layout.window)
    regions = None if layout.regions is None else layout.regions[start:stop]
    if regions is not None and not bool((regions != regions[:, :1]).any()):
        regions = None
    zero = None if layout.zero is None else layout.zero[start:stop]
    source = layout.source[start * tokens : stop * tokens]
    return Layout(layout.window, source, layout.slot, regions, zero)


def repeat_layout(layout: Layout, times: int) -> Layout:
    """The windows of ``times`` images in a row, as far as attention within them is concerned."""
    regions = None if layout.regions is None else layout.regions.repeat(times, 1)
    zero = None if layout.zero is None else layout.zero.repeat(times, 1, 1)
    return Layout(layout.window, layout.source, layout.slot, regions, zero)


@_constant
def position_code(window: Size, table: Size, device: torch.device) -> Tensor:
    """(N,) the ``code`` of a ``PositionBias``: tokens of a ``window`` in a table made for windows of size ``table``."""
    code = torch.zeros(1, dtype=torch.int64)
    for n, t in zip(window, table, strict=True):
        code = code[..., None] * (2 * t - 1) + torch.arange(n)
    return code.flatten().to(device)


@_constant
def relative_position_index(window: Size, table: Size, device: torch.device) -> Tensor:
    """(N*N,) row of a bias table, made for windows of size ``table``, for each (query, key) pair of a ``window``."""
    code = position_code(window, table, device)
    return (code[:, None] - code + (math.prod(2 * t - 1 for t in table) - 1) // 2).flatten()


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
