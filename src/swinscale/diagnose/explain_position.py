"""What the weights of a Swin say of place alone: the position bias of each head, and the temperatures of cosine attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swinscale.diagnose.attention import logit_scales
from swinscale.diagnose.explain_maps import block_of, swin_of
from swinscale.errors import UsageError
from swinscale.models.windows import relative_coords


@torch.no_grad()
def position_bias(model: nn.Module, stage: int, block: int) -> Tensor:
    """The relative position bias of each head, from the table (V1) or the network (V2).

    Returns:
        (A, 2h-1, 2w-1) for a window of h × w tokens (with 2t-1 before these for clips), in fp32. The middle is a token's bias
        with itself; the entry one row further down is that with the key one row below the query.
    """
    attn = block_of(swin_of(model), stage, block).attn
    values = attn.bias(attn.window).values.detach().float()
    # The table is in the order of query minus key.
    return values.flip(1).unflatten(1, tuple(2 * n - 1 for n in attn.window))


def log_offsets(model: nn.Module, stage: int) -> list[Tensor]:
    """The log-spaced coordinate of the offsets along each axis of a stage's window, as the published V2 network reads them.

    Returns:
        for each axis (2w-1,): sign(Δ) · log2(1 + 8 |Δ| / (w - 1)) / 3, with w the window of the first training; the network
        puts the sign of query minus key, here it is that of key minus query.
    """
    attn = block_of(swin_of(model), stage, 0).attn
    coords = relative_coords(attn.window, attn.trained_window, "log", torch.device("cpu"))
    coords = coords.unflatten(0, tuple(2 * n - 1 for n in attn.window))
    middle = [n - 1 for n in attn.window]
    return [coords[(*middle[:axis], slice(None), *middle[axis + 1 :], axis)] for axis in range(len(middle))]


def temperatures(model: nn.Module) -> dict[str, Tensor]:
    """By what each head multiplies the cosine of query and key (its logit scale), above 0 and at most 100.

    Returns:
        for each "layers.S.blocks.B", in forward order, (A,) in fp32.

    Raises:
        UsageError: for a model with the plain dot product (V1), which has none.
    """
    model = swin_of(model)
    if model.config.similarity != "cosine":
        raise UsageError(
            "This model's attention is the plain dot product (V1): temperatures belong to cosine attention."
        )
    return {
        f"layers.{s}.blocks.{b}": logit_scales(block.attn)
        for s, stage in enumerate(model.layers)
        for b, block in enumerate(stage.blocks)
    }
