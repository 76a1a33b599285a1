"""Sequential window attention: one part after the other, so that the logits of one part alone are ever in memory.

The memory recipe of the Swin V2 article (arXiv 2111.09883, section 3.4) for large windows. Each part is recomputed in the
backward pass. Parts are groups of windows; if there are more parts than windows, also of heads; and then of query tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinscale.ops.dense import plain_dot_product
from swinscale.ops.position import PositionBias

LOGITS = 1 << 22
"""Logits of one part, unless the number of parts is given: 16 MiB in single precision."""


def sequential(
    qkv: Tensor,
    bias: PositionBias,
    regions: Tensor | None,
    scale: Tensor | float,
    cosine: bool,
    dropout: float,
    parts: int = 0,
) -> Tensor:
    """The attention of ``window_attention``, in at least ``parts`` parts (0: as many as keep their logits small)."""
    q, k, v, factor = plain_dot_product(qkv, scale, cosine)
    B, W, N, A, _ = q.shape
    parts = parts or math.ceil(B * W * A * N * N / LOGITS)
    of_images, of_windows = _pieces(B, parts), _pieces(W, math.ceil(parts / B))
    of_heads = _pieces(A, math.ceil(parts / (B * W)))
    of_queries = _pieces(N, math.ceil(parts / (B * W * A)))
    recompute = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias.values))

    def part(q: Tensor, k: Tensor, v: Tensor, values: Tensor, regions: Tensor | None, start: int) -> Tensor:
        """(B, W, n, A, d) queries from ``start`` on, all keys of their windows → (B, W, n, A, d)"""
        queries = slice(start, start + q.shape[2])
        logits = torch.einsum("bwnad,bwmad->bwanm", q if factor == 1 else q * factor, k)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits + PositionBias(values, bias.code).rows(queries=queries).to(logits.dtype)
        if regions is not None:
            logits = logits.masked_fill((regions[:, queries, None] != regions[:, None])[:, None], -torch.inf)
        return torch.einsum("bwanm,bwmad->bwnad", F.dropout(logits.softmax(-1), dropout).to(v.dtype), v)

    # Split along one axis after the other: the gradient of a split is one concatenation, that of a slice a whole tensor.
    images = []
    for qi, ki, vi in zip(*(t.split(of_images) for t in (q, k, v)), strict=True):
        windows = []
        masks = [None] * len(of_windows) if regions is None else regions.split(of_windows)
        for qw, kw, vw, mask in zip(*(t.split(of_windows, 1) for t in (qi, ki, vi)), masks, strict=True):
            heads = []
            tables = bias.values.split(of_heads)
            for qh, kh, vh, table in zip(*(t.split(of_heads, 3) for t in (qw, kw, vw)), tables, strict=True):
                rows, start = [], 0
                for qn in qh.split(of_queries, 2):
                    inputs = (qn, kh, vh, table, mask, start)
                    if recompute:
                        rows.append(checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0))
                    else:
                        rows.append(part(*inputs))
                    start += qn.shape[2]
                heads.append(_join(rows, 2))
            windows.append(_join(heads, 3))
        images.append(_join(windows, 1))
    return _join(images, 0).flatten(-2)


def _pieces(length: int, parts: int) -> list[int]:
    """Lengths of at most ``parts`` nearly equal pieces."""
    parts = max(1, min(parts, length))
    return [length * (i + 1) // parts - length * i // parts for i in range(parts)]


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
