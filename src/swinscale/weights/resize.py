"""Fitting single tensors to another window, map or number of channels."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.models.config import Size

ChannelInit = Literal["repeat", "mean", "copy-rgb", "random"]


def resize_bias_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """(prod(2·old-1), heads) → (prod(2·new-1), heads), bicubic over offsets (trilinear for video).

    As in microsoft/Swin-Transformer, utils.py: ``align_corners`` is off.
    """
    grids = tuple(2 * w - 1 for w in old), tuple(2 * w - 1 for w in new)
    return _interpolate(table, *grids)


def resize_position_embedding(table: Tensor, old: Size, new: Size) -> Tensor:
    """(1, prod(old), D) → (1, prod(new), D), bicubic over the map (trilinear for video)."""
    return _interpolate(table[0], old, new)[None]


def _interpolate(table: Tensor, old: Size, new: Size) -> Tensor:
    """(prod(old), D) → (prod(new), D)"""
    grid = table.t().unflatten(1, old)[None].float()
    mode = "bicubic" if len(old) == 2 else "trilinear"
    return F.interpolate(grid, new, mode=mode, align_corners=False)[0].flatten(1).t().to(table.dtype).contiguous()


def square_window(offsets: int, rank: int) -> Size | None:
    """The window of equal sides whose table has ``offsets`` rows, or None."""
    side = round(offsets ** (1 / rank))
    return ((side + 1) // 2,) * rank if side**rank == offsets and side % 2 else None


def square_map(tokens: int, rank: int) -> Size | None:
    """The map of equal sides with so many tokens, or None."""
    side = round(tokens ** (1 / rank))
    return (side,) * rank if side**rank == tokens else None


def adapt_channels(weight: Tensor, channels: int, how: ChannelInit) -> Tensor:
    """Filters (D, C, *patch) of the first layer for another number of input channels.

    "repeat" gives new channel n the filter of channel n mod C, divided by its number of copies (with fewer channels the
    surplus filters are added up); "mean" gives every channel the mean filter times C / channels; in both, an image whose
    channels are all equal gives the same output as before. "copy-rgb" keeps the filters of the channels that both have
    and sets the others to zero.
    """
    old = weight.shape[1]
    if how == "mean":
        return (weight.sum(1, keepdim=True) / channels).repeat_interleave(channels, 1)
    if how == "copy-rgb":
        new = weight.new_zeros((weight.shape[0], channels, *weight.shape[2:]))
        new[:, : min(old, channels)] = weight[:, :channels]
        return new
    if how != "repeat":
        raise UsageError(f"in_chans_init={how!r} is not allowed: choose one of {', '.join(get_args(ChannelInit))}.")
    if channels < old:
        return torch.stack([weight[:, n::channels].sum(1) for n in range(channels)], 1)
    copies = [math.ceil((channels - n % old) / old) for n in range(channels)]
    return torch.stack([weight[:, n % old] / copies[n] for n in range(channels)], 1)
