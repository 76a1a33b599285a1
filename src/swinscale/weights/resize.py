"""Fitting single tensors to another window, map, number of channels, or number of axes (image to video)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.models.config import Size, SwinConfig, format_size
from swinscale.models.position import RelativePositionBias
from swinscale.weights.files import State

ChannelRule = Literal["repeat", "mean", "copy-rgb", "random"]
ChannelInit = ChannelRule | Sequence[int | None]
"""What a new first layer gets: a rule, or for each new channel the old one whose filter it takes (None: zeros)."""

BiasMethod = Literal["log-extrapolate", "linear-extrapolate", "stretch", "bicubic", "geometric"]
"""How the position bias gets to another window; see ``bias_methods``."""

Inflate = Literal["repeat", "centre"]
"""How weights of images become weights of clips; see ``inflate_patches`` and ``inflate_bias_table``."""

FAR = -4.6
"""Bias between different times in a table inflated with "centre": attention to them begins about e^4.6 = 100 times weaker."""


def bias_methods(config: SwinConfig) -> tuple[BiasMethod, ...]:
    """The ways in which this model's position bias can get to another window, the default first.

    * "log-extrapolate", "linear-extrapolate": the network reads coordinates on the scale of the first window it was
      trained with, so every offset that existed keeps its bias. (The axis is linear in ``position_bias="linear"``; the
      coordinates of "paper" have no scale, so nothing needs to be kept.)
    * "stretch": the coordinates are scaled to the new window, as if it had been trained with that.
    * "bicubic", "geometric": a table is resized; that of a continuous bias is made first, and the model has one from then on.
    """
    resized: tuple[BiasMethod, ...] = ("bicubic", "geometric")
    if config.position_bias == "table":
        return resized
    if config.position_bias == "paper":
        return ("log-extrapolate", *resized)
    return ("log-extrapolate" if config.position_bias == "log" else "linear-extrapolate", "stretch", *resized)


def tabulate_bias(state: State, config: SwinConfig) -> State:
    """Published tensors with every continuous position bias evaluated to the table of its stage's window.

    The network ``attn.cpb_mlp`` of each block gives way to ``attn.relative_position_bias_table`` (offsets, heads).
    """
    out = {name: tensor for name, tensor in state.items() if ".cpb_mlp." not in name}
    marks = ".cpb_mlp.0.weight"
    for attn in (name.removesuffix(marks) for name in state if name.endswith(marks)):
        stage = int(attn.split(".")[1])
        with torch.device("meta"):  # no values are drawn: the tensors of the file take their places
            network = RelativePositionBias(config, stage)
        names = ("cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight")
        network.load_state_dict({name: state[f"{attn}.{name}"] for name in names}, assign=True)
        with torch.no_grad():
            out[f"{attn}.relative_position_bias_table"] = (
                network.bias(config.stage_windows[stage]).values.t().contiguous()
            )
    return out


def resize_bias_table(table: Tensor, old: Size, new: Size, how: BiasMethod = "bicubic") -> Tensor:
    """(prod(2·old-1), heads) → (prod(2·new-1), heads)

    "bicubic" (trilinear for video) as in microsoft/Swin-Transformer, utils.py: ``align_corners`` is off. "geometric" as
    in the fine-tuning code of SimMIM (microsoft/SimMIM, utils.py): the old offsets spread over the new range in
    geometrically growing steps, with a cubic spline through them, so that near offsets hardly change.

    Raises:
        UsageError: for "geometric" where a window shrinks, or is too small for a cubic spline.
    """
    if how != "geometric":
        return _interpolate(table, tuple(2 * w - 1 for w in old), tuple(2 * w - 1 for w in new))
    grid = table.t().unflatten(1, tuple(2 * w - 1 for w in old)).double()
    for axis, (a, b) in enumerate(zip(old, new, strict=True), start=1):
        if a == b:
            continue
        if a > b or a < 3:
            raise UsageError(
                f"geometric resizing is for windows that grow and have at least 3 tokens per axis, not {format_size(old)} "
                f"→ {format_size(new)}: choose bicubic."
            )
        matrix = spline_matrix(geometric_offsets(a, b), torch.arange(1 - b, b).double()).to(grid.device)
        grid = (grid.movedim(axis, -1) @ matrix.t()).movedim(-1, axis)
    return grid.flatten(1).t().to(table.dtype).contiguous()


def geometric_offsets(old: int, new: int) -> Tensor:
    """(2·old-1,) float64: where the offsets of a window of ``old`` tokens lie in one of ``new``: 0, ±1, ±(1+q), …, ±(new-1).

    The ratio q is found by bisection. The published search is bounded by 1.01 and 1.5; this one is not, and agrees there.
    """
    low, high = 1.0, float(new)
    for _ in range(60):
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**k for k in range(old - 1)) > new - 1 else (ratio, high)
    right = torch.cumsum(low ** torch.arange(old - 1).double(), 0)
    return torch.cat((-right.flip(0), torch.zeros(1).double(), right))


def spline_matrix(places: Tensor, at: Tensor) -> Tensor:
    """(A, P): the values at ``at`` (A,) of the cubic spline through values at ``places`` (P,), P ≥ 4, as a linear map.

    The spline has no knot at the second and the last but one place ("not a knot"), which is what FITPACK computes
    without smoothing.
    """
    first, last = places[:1], places[-1:]
    knots = torch.cat((first.expand(4), places[2:-2], last.expand(4)))
    at = at.clamp(first, last)  # the outermost ones may lie a rounding error outside
    return torch.linalg.solve(_cubic_basis(knots, places), _cubic_basis(knots, at), left=False)


def _cubic_basis(knots: Tensor, at: Tensor) -> Tensor:
    """(A, K - 4): the cubic B-splines on ``knots`` (K,) at ``at`` (A,), by the recursion of Cox and de Boor."""
    x = at[:, None]
    basis = ((knots[:-1] <= x) & (x < knots[1:])).double()
    basis[at == knots[-1], len(knots) - 5] = 1  # the last interval that is not empty is closed
    for degree in (1, 2, 3):
        width = knots[degree:] - knots[:-degree]
        share = torch.where(width > 0, (x - knots[:-degree]) / width, 0)
        falling = torch.where(width > 0, 1 - share, 0)
        basis = share[:, :-1] * basis[:, :-1] + falling[:, 1:] * basis[:, 1:]
    return basis


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
    and sets the others to zero. A sequence gives new channel n the filter of channel ``how[n]``, divided by its number of
    copies, or zeros for None: ``(2, 1, 0)`` reads blue first, ``(0, 1, 2, None)`` adds a channel that starts unread.
    """
    old = weight.shape[1]
    if not isinstance(how, str):
        if len(how) != channels or not all(c is None or (isinstance(c, int) and 0 <= c < old) for c in how):
            raise UsageError(
                f"in_chans_init={tuple(how)}: give one entry for each of the {channels} channels of the model, the number "
                f"of a channel in the file (0 to {old - 1}) or None."
            )
        zeros = torch.zeros_like(weight[:, 0])
        return torch.stack([zeros if c is None else weight[:, c] / list(how).count(c) for c in how], 1)
    if how == "mean":
        return (weight.sum(1, keepdim=True) / channels).repeat_interleave(channels, 1)
    if how == "copy-rgb":
        new = weight.new_zeros((weight.shape[0], channels, *weight.shape[2:]))
        new[:, : min(old, channels)] = weight[:, :channels]
        return new
    if how != "repeat":
        raise UsageError(
            f"in_chans_init={how!r} is not allowed: choose one of {', '.join(get_args(ChannelRule))}, or list for each "
            f"channel of the model the one of the file that it takes."
        )
    if channels < old:
        return torch.stack([weight[:, n::channels].sum(1) for n in range(channels)], 1)
    copies = [math.ceil((channels - n % old) / old) for n in range(channels)]
    return torch.stack([weight[:, n % old] / copies[n] for n in range(channels)], 1)


def inflate_patches(weight: Tensor, time: int, how: Inflate) -> Tensor:
    """Filters of image patches (D, C, h, w) → of ``time`` frames (D, C, time, h, w).

    "repeat": every frame has the filter divided by ``time``; "centre": the middle frame has it, the others zeros. In
    both, frames that are all equal give the same output as the image.
    """
    if how == "repeat":
        return (weight / time)[:, :, None].repeat_interleave(time, 2)
    new = weight.new_zeros((*weight.shape[:2], time, *weight.shape[2:]))
    new[:, :, time // 2] = weight
    return new


def inflate_bias_table(table: Tensor, time: int, how: Inflate) -> Tensor:
    """(offsets, heads) → (offsets of ``time`` tokens along time · offsets, heads)

    "repeat": the bias does not depend on the distance in time; "centre": tokens of different times have ``FAR``.
    """
    new = table.repeat(2 * time - 1, 1).unflatten(0, (2 * time - 1, len(table)))
    if how == "centre":
        new[torch.arange(2 * time - 1) != time - 1] = FAR
    return new.flatten(0, 1)


def inflate_coordinates(weight: Tensor) -> Tensor:
    """First layer of a continuous position bias (512, 2) → (512, 3): the distance in time comes first and has no weight."""
    return torch.cat((torch.zeros_like(weight[:, :1]), weight), 1)
