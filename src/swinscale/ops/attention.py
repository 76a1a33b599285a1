"""Window attention: one signature, several back ends.

Shape letters: B batch, W windows, N tokens of a window, A heads, d channels of a head, D = A * d.

Queries attend to the keys of their own window. ``bias`` is added to the logits; tokens of different ``regions`` (after a
cyclic shift two regions of the image can meet in a window; padding is a region of its own) do not see each other.

"eager" is the reference: the formula, line by line. Every other back end is tested against it. Asking for a back end by
name never falls back in silence: one that cannot run says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.errors import UsageError

COSINE_EPS = 1e-3
"""Smallest norm that cosine attention divides by. The published code takes 1e-12, which is 0/0 in fp16 for a zero token
and a gradient of 1e12 in fp32; vectors longer than 1e-3 are normalised exactly as there."""


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    regions: Tensor | None,
    scale: Tensor | float,
    cosine: bool,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside windows.

    Args:
        q, k, v: (B, W, N, A, d), any strides with a contiguous last axis.
        bias: (A, N, N), added to the logits of every window.
        regions: (W, N) integers or None. Tokens attend only to tokens of the same region; None: to the whole window.
        scale: factor of the logits; a number, or a tensor (A,) with one per head.
        cosine: logits from cosine similarity (V2) instead of the dot product (V1).
        dropout: probability of dropping an attention weight.
        backend: "auto" or a name in ``BACKENDS``.

    Returns:
        (B, W, N, D)

    Raises:
        UsageError: for an unknown back end, or one that cannot run here.
    """
    if cosine:
        # Normalised queries carry the scale, so every back end sees a plain dot product.
        q, k, scale = _unit(q) * _per_head(scale), _unit(k), 1.0
        q, k = q.to(v.dtype), k.to(v.dtype)
    elif isinstance(scale, Tensor):
        q, scale = (q * _per_head(scale)).to(v.dtype), 1.0
    return BACKENDS[choose_backend(backend)].run(q, k, v, bias, regions, float(scale), dropout)


def _wide(x: Tensor) -> Tensor:
    """``x`` in at least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    x = _wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=COSINE_EPS**2))


def _per_head(scale: Tensor | float) -> Tensor | float:
    return scale[:, None] if isinstance(scale, Tensor) else scale


def _masked_bias(bias: Tensor, regions: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(1, A, N, N), or (W, A, N, N) with -inf where two tokens belong to different regions."""
    bias = bias.to(dtype)[None]
    if regions is None:
        return bias
    return bias.masked_fill((regions[:, :, None] != regions[:, None, :])[:, None], -torch.inf)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None, scale: float, dropout: float
) -> Tensor:
    logits = _wide(torch.einsum("bwnad,bwmad->bwanm", q if scale == 1 else q * scale, k))
    logits = logits + _masked_bias(bias, regions, logits.dtype)
    weights = F.dropout(logits.softmax(-1), dropout).to(v.dtype)
    return torch.einsum("bwanm,bwmad->bwnad", weights, v).flatten(-2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None, scale: float, dropout: float
) -> Tensor:
    # PyTorch's kernels take 4-D inputs (5-D falls back to the slow reference in silence). Without regions all windows
    # share one bias and (B, W) folds into the batch. With regions each window has its own, so W folds into the heads and
    # the mask broadcasts over the batch instead of being copied for it.
    B, W, N, A, d = q.shape
    mask = _masked_bias(bias, regions, q.dtype)
    if regions is None:
        q, k, v = (t.reshape(B * W, N, A, d).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return out.transpose(1, 2).reshape(B, W, N, A * d)
    q, k, v = (t.transpose(2, 3).reshape(B, W * A, N, d) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask.view(1, W * A, N, N), dropout, scale=scale)
    return out.view(B, W, A, N, d).transpose(2, 3).reshape(B, W, N, A * d)


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A way to compute window attention: ``run(q, k, v, bias, regions, scale, dropout)``.

    ``why_not()`` is None when the back end can run here, otherwise the reason in words.
    """

    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float, float], Tensor]
    why_not: Callable[[], str | None] = _always


BACKENDS = {"sdpa": Backend(_sdpa), "eager": Backend(_eager)}
"""In the order in which "auto" prefers them."""


def choose_backend(name: str = "auto") -> str:
    """The name of the back end that "auto" means here, or ``name`` itself if it can run.

    Raises:
        UsageError: if ``name`` is unknown or cannot run here; the message says why.
    """
    if name == "auto":
        return next(n for n, backend in BACKENDS.items() if backend.why_not() is None)
    if name not in BACKENDS:
        raise UsageError(f"Unknown attention back end '{name}'. Allowed: auto, {', '.join(BACKENDS)}.")
    if reason := BACKENDS[name].why_not():
        raise UsageError(f"Attention back end '{name}' cannot run here: {reason}")
    return name
