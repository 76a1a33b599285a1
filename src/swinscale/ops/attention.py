"""Window attention: one signature, several back ends.

Shape letters: B batch, W windows, N tokens of a window, A heads, d channels of a head, D = A * d, O offsets in a window.

Queries attend to the keys of their own window. A position bias is added to the logits; tokens of different ``regions``
(after a cyclic shift two regions of the image can meet in a window; padding is a region of its own) do not see each other.

"eager" is the reference: the formula, line by line. Every other back end is tested against it. Asking for a back end by
name never falls back in silence: one that cannot run says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.ops import flex, fused
from swinscale.ops.dense import eager, portable, sdpa
from swinscale.ops.position import PositionBias
from swinscale.ops.sequential import sequential


def window_attention(
    qkv: Tensor,
    bias: PositionBias,
    regions: Tensor | None,
    scale: Tensor | float,
    cosine: bool,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside windows of any rank.

    Args:
        qkv: (B, W, N, 3D), queries, keys and values as one projection gives them; or (W, N, 3D).
        bias: added to the logits of every window.
        regions: (W, N) integers or None. Tokens attend only to tokens of the same region; None: to the whole window.
        scale: factor of the logits; a number, or a tensor (A,) with one per head.
        cosine: logits from cosine similarity (V2) instead of the dot product (V1).
        dropout: probability of dropping an attention weight.
        backend: "auto" or a name in ``BACKENDS``; "sequential:8" computes in eight parts.

    Returns:
        (B, W, N, D), or (W, N, D)

    Raises:
        UsageError: for an unknown back end, or one that cannot run here.
    """
    if qkv.ndim == 3:  # an exported graph has the windows of all images in a row
        if backend == "auto":
            return portable(qkv, bias, regions, scale, cosine)
        return window_attention(qkv[None], bias, regions, scale, cosine, dropout, backend)[0]
    qkv = qkv.unflatten(-1, (3, bias.heads, -1))
    name = choose_backend(backend, qkv.device.type, qkv.dtype, qkv.shape[2], qkv.shape[-1], dropout)
    name, _, parts = name.partition(":")
    run = partial(sequential, parts=int(parts)) if parts else BACKENDS[name].run
    return run(qkv, bias, regions, scale, cosine, dropout)


def _always(device: str, dtype: torch.dtype, tokens: int, head_dim: int, dropout: float) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A way to compute window attention.

    Args:
        run: takes the arguments of ``window_attention`` without the last; the projection as (B, W, N, 3, A, d).
        why_not: from device type, dtype, tokens of a window, channels of a head and dropout, the reason in words why the
            back end cannot run, or None.
    """

    run: Callable[[Tensor, PositionBias, Tensor | None, Tensor | float, bool, float], Tensor]
    why_not: Callable[[str, torch.dtype, int, int, float], str | None] = _always


def _triton(
    qkv: Tensor, bias: PositionBias, regions: Tensor | None, scale: Tensor | float, cosine: bool, dropout: float
) -> Tensor:
    return fused.fused_window_attention(qkv, bias.values, bias.code, regions, scale, cosine)


BACKENDS = {
    "triton": Backend(_triton, fused.why_not),
    "sdpa": Backend(sdpa),
    "flex": Backend(flex.flex, flex.why_not),
    "sequential": Backend(sequential),
    "eager": Backend(eager),
}
"""In the order in which "auto" prefers them."""


def choose_backend(
    name: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int = 64,
    head_dim: int = 32,
    dropout: float = 0.0,
) -> str:
    """The name of the back end that "auto" means for such a window, or ``name`` itself if it can run.

    Raises:
        UsageError: if ``name`` is unknown or cannot run; the message says why.
    """
    case = (device, dtype, tokens, head_dim, dropout)
    if name == "auto":
        return next(n for n, backend in BACKENDS.items() if backend.why_not(*case) is None)
    known, _, parts = name.partition(":")
    if known not in BACKENDS or (parts and not (known == "sequential" and parts.isdecimal() and int(parts))):
        raise UsageError(
            f"Unknown attention back end '{name}'. Allowed: auto, {', '.join(BACKENDS)}; sequential:8 computes in 8 parts."
        )
    if reason := BACKENDS[known].why_not(*case):
        raise UsageError(f"Attention back end '{known}' cannot run here: {reason}.")
    return name
