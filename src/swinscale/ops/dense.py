"""Window attention with plain PyTorch operations: the reference, and PyTorch's own fused attention.

Both add a bias that is written out per pair of tokens. Shape letters as in ``attention.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.ops.position import PositionBias

COSINE_EPS = 1e-3
"""Smallest norm that cosine attention divides by. The published code takes 1e-12, which is 0/0 in fp16 for a zero token
and a gradient of 1e12 in fp32; vectors longer than 1e-3 are normalised exactly as there."""


def plain_dot_product(qkv: Tensor, scale: Tensor | float, cosine: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys, values (B, W, N, A, d) and a number: the logits are the plain dot products times the number.

    Under cosine attention, and wherever each head has its own scale, the queries carry the scale and the number is 1.
    """
    q, k, v = qkv.unbind(3)
    if not cosine and not isinstance(scale, Tensor):
        return q, k, v, scale
    factor = scale[:, None] if isinstance(scale, Tensor) else scale
    if cosine:  # in at least single precision: 400² overflows in fp16
        wide = torch.promote_types(qkv.dtype, torch.float32)
        norms = torch.linalg.vector_norm(qkv[:, :, :, :2], dim=-1, keepdim=True, dtype=wide).clamp(min=COSINE_EPS)
        to_unit = norms.reciprocal()
        factor, k = factor * to_unit[:, :, :, 0], (k * to_unit[:, :, :, 1]).to(v.dtype)
    return (q * factor).to(v.dtype), k, v, 1.0


def eager(
    qkv: Tensor, bias: PositionBias, regions: Tensor | None, scale: Tensor | float, cosine: bool, dropout: float
) -> Tensor:
    q, k, v, scale = plain_dot_product(qkv, scale, cosine)
    logits = torch.einsum("bwnad,bwmad->bwanm", q if scale == 1 else q * scale, k)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits + bias.dense(logits.dtype, regions)
    weights = F.dropout(logits.softmax(-1), dropout).to(v.dtype)
    return torch.einsum("bwanm,bwmad->bwnad", weights, v).flatten(-2)


def sdpa(
    qkv: Tensor, bias: PositionBias, regions: Tensor | None, scale: Tensor | float, cosine: bool, dropout: float
) -> Tensor:
    # PyTorch's kernels take 4-D inputs (5-D falls back to the slow reference in silence). Windows that share one bias, and
    # those of a single image, fold into the batch without a copy. Otherwise W folds into the heads, so that the mask
    # broadcasts over the batch instead of being copied for it.
    q, k, v, scale = plain_dot_product(qkv, scale, cosine)
    B, W, N, A, d = q.shape
    mask = bias.dense(q.dtype, regions)
    if regions is None or B == 1:
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return out.transpose(1, 2).reshape(B, W, N, A * d)
    q, k, v = (t.transpose(2, 3).reshape(B, W * A, N, d) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask.view(1, W * A, N, N), dropout, scale=scale)
    return out.view(B, W, A, N, d).transpose(2, 3).reshape(B, W, N, A * d)


def portable(qkv: Tensor, bias: PositionBias, regions: Tensor | None, scale: Tensor | float, cosine: bool) -> Tensor:
    """``eager`` for exported graphs, by plain products: (W, N, 3D) → (W, N, D), the windows of all images in a row.

    No tensor has more than four axes. Some runtimes take no more than five, and some have no kernel for attention as one
    operation, or a slower one.
    """
    D = qkv.shape[-1] // 3
    parts = (qkv[..., part * D : (part + 1) * D] for part in range(3))  # what chunk becomes in ONNX is a sequence
    q, k, v = (t.unflatten(-1, (bias.heads, -1)).transpose(1, 2) for t in parts)  # (W, A, N, d)
    if cosine:
        q, k = (t / torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp(min=COSINE_EPS) for t in (q, k))
    logits = (q * (scale[:, None, None] if isinstance(scale, Tensor) else scale)) @ k.transpose(-2, -1)
    logits = logits + bias.rows().to(q.dtype)
    if regions is not None:
        logits = logits.masked_fill((regions[:, :, None] != regions[:, None, :])[:, None], -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
