"""Window attention by ``torch.nn.attention.flex_attention``: bias and mask as functions of indices.

Under ``torch.compile`` it becomes one fused kernel without a bias or a mask in memory; without, PyTorch computes it with
plain operations and says so. Needs PyTorch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swinscale.ops.dense import plain_dot_product
from swinscale.ops.position import PositionBias


def flex(
    qkv: Tensor, bias: PositionBias, regions: Tensor | None, scale: Tensor | float, cosine: bool, dropout: float
) -> Tensor:
    """The attention of ``window_attention``, without dropout."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    values, code, centre = bias.values, bias.code, (bias.values.shape[1] - 1) // 2
    if not torch.is_grad_enabled():  # it asks whether its inputs could learn, not whether they do now
        qkv, values = qkv.detach(), values.detach()
    q, k, v, factor = plain_dot_product(qkv, scale, cosine)
    B, W, N, A, d = q.shape

    def score(logit: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        logit = logit + values[head, code[query] - code[key] + centre]
        if regions is None:
            return logit
        region = regions[window % W]
        return torch.where(region[query] == region[key], logit, -torch.inf)

    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    out = flex_attention(q, k, v, score_mod=score, scale=factor)
    return out.transpose(1, 2).reshape(B, W, N, A * d)


def why_not(device: str, dtype: torch.dtype, tokens: int, head_dim: int, dropout: float) -> str | None:
    """The reason, in words, why it cannot run; None if it can."""
    if dropout:
        return f"flex_attention has no dropout, and attn_drop_rate is {dropout}"
    if device == "cpu" and torch.is_grad_enabled():
        return "on a CPU flex_attention has no gradients (use torch.inference_mode)"
    return None
