"""What a window attention looks at: its weights, written out per pair of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from swinscale.models.swin import MAX_LOGIT_SCALE, WindowAttention
from swinscale.models.windows import Layout
from swinscale.ops.dense import plain_dot_product
from swinscale.ops.position import PositionBias


@torch.no_grad()
def attention_weights(attn: WindowAttention, x: Tensor, layout: Layout, bias: PositionBias | None = None) -> Tensor:
    """The attention weights that ``attn`` computes for ``x``, by the formula, in fp32 whatever the precision of the run.

    Under sharding the weights of ``attn`` must be gathered: call it from a hook of ``attn``.

    Args:
        x: (B, W, N, D) what ``attn`` reads.
        layout: of these W windows; ``models.windows.layout_part`` takes some out of a map's.
        bias: ``attn.bias(layout.window)`` where the caller has it already.

    Returns:
        (B, W, A, N, N): how much query n of head a takes from key m; 0 between tokens that do not see each other. Rows sum
        to 1.
    """
    with torch.autocast(x.device.type, enabled=False):
        qkv = x.float() @ attn.qkv.weight.float().t()
        scale: Tensor | float = (x.shape[-1] // attn.num_heads) ** -0.5
        if attn.cosine:
            scale = logit_scales(attn)
            if attn.q_bias is not None and attn.v_bias is not None:
                qkv = qkv + torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias)).float()
        elif attn.qkv.bias is not None:
            qkv = qkv + attn.qkv.bias.float()
        q, k, _, scale = plain_dot_product(qkv.unflatten(-1, (3, attn.num_heads, -1)), scale, attn.cosine)
        logits = torch.einsum("bwnad,bwmad->bwanm", q * scale, k)
        bias = bias or attn.bias(layout.window)
        return (logits + bias.dense(torch.float32, layout.regions)).softmax(-1)


def logit_scales(attn: WindowAttention) -> Tensor:
    """(A,) by what each head of a V2 attention multiplies the cosine, in fp32."""
    return attn.logit_scale.detach().flatten().float().clamp(max=MAX_LOGIT_SCALE).exp()


def head_statistics(weights: Tensor, regions: Tensor | None) -> Tensor:
    """How concentrated each head is, over all queries that see more than one key; padding asks nothing.

    Args:
        weights: (W, A, N, N) of ``attention_weights``.
        regions: (W, N) of the windows' layout, or None.

    Returns:
        (4, A): the mean entropy over the logarithm of the number of visible keys, in 0…1; the share of each query's top key,
        the mean and the largest; and what the key that is attended to most gets of a mean query, a mean over windows.
        NaN where no query sees two keys.
    """
    W, _, N, _ = weights.shape
    if regions is None:
        visible = torch.full((W, N), N, device=weights.device)
        asks = visible > 1
    else:
        visible = (regions[:, :, None] == regions[:, None, :]).sum(-1)
        asks = (visible > 1) & (regions >= 0)
    queries = asks[:, None].float()
    entropy = torch.special.entr(weights).sum(-1) / visible.clamp(min=2).log()[:, None]
    top = weights.amax(-1)
    taken = (weights * queries[..., None]).sum(2) / queries.sum(-1, keepdim=True).clamp(min=1)
    windows = asks.any(1).float()[:, None]
    return torch.stack(
        [
            (entropy * queries).sum((0, 2)) / queries.sum(),
            (top * queries).sum((0, 2)) / queries.sum(),
            (top * queries).amax((0, 2)),
            (taken.amax(-1) * windows).sum(0) / windows.sum(),
        ]
    )
