"""Where the tokens of a Swin look: attention maps of a pixel, rollout through all blocks, and attention distance.

Weights are written out per pair of tokens for the blocks that are asked for, from what their attention reads
(``attention.attention_weights``); the model itself runs with whatever back end it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from swinscale.diagnose.attention import attention_weights
from swinscale.diagnose.explain_maps import block_of, check_attention, check_pixel, evaluating, swin_of
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.models.config import Size, SwinConfig
from swinscale.models.swin import WindowAttention
from swinscale.models.windows import Layout, layout_part
from swinscale.ops.position import PositionBias

T = TypeVar("T")

ENTRIES = 1 << 24
"""Attention weights that are written out at a time: 64 MiB."""


@torch.no_grad()
def attention(model: nn.Module, x: Tensor, stage: int, block: int, query: Sequence[int]) -> Tensor:
    """How much the token at a pixel takes from every token of the map, for each head of a block.

    Args:
        model: a SwinTransformer, or a task around one.
        x: (B, C, H, W) or (B, C, T, H, W) of any size.
        stage, block: which attention; negative numbers count from the end.
        query: (row, column) of a pixel of ``x``; (frame, row, column) for clips.

    Returns:
        (B, A, *map) in fp32, a value per token of the stage. Each map sums to 1 and is exactly 0 outside what the token can
        see: its window, less padding and what the shift brought there from the other side of the image. Under
        ``pad="legacy"``, where padding takes part, what it takes is missing from the sum.

    Raises:
        UsageError: for a stage, block or pixel that does not exist; the message says which do.
    """
    model, size = swin_of(model), tuple(x.shape[2:])
    wanted = block_of(model, stage, block)
    stage %= len(model.layers)
    token = _token(model.config, stage, query, size)

    def read(attn: WindowAttention, tokens: Tensor, layout: Layout, bias: PositionBias) -> Tensor:
        window, place = layout.slot // tokens.shape[2], layout.slot % tokens.shape[2]
        w = int(window[token])
        weights = attention_weights(attn, tokens[:, w : w + 1], layout_part(layout, w, w + 1), bias)
        return torch.where(window == w, weights[:, 0, :, place[token]][..., place], 0.0)

    (maps,) = _read(model, x, [wanted.attn], read)
    return maps.unflatten(-1, model.config.stage_maps(size)[stage])


@torch.no_grad()
def rollout(model: nn.Module, x: Tensor, query: Sequence[int] | None = None, residual: float = 0.5) -> Tensor:
    """How much of each first token reaches the output, when every block hands on what it attends to.

    Attention rollout (Abnar and Zuidema, arXiv 2005.00928) multiplies the matrices ``residual`` · identity +
    (1 - ``residual``) · attention, the mean of the heads, of all blocks. Here a map of shares goes back through the blocks
    instead, window by window, and through patch merging in equal parts, so that nothing is larger than the attention of one
    block. Norms, values and MLPs are no part of it: it says where information can come from, not what decides a class.

    Args:
        model, x: as in ``attention``.
        query: a pixel whose last token is followed back; None: the mean of all, which a classifier reads.
        residual: share of each token that passes by the attention.

    Returns:
        (B, *map of the first stage) in fp32; sums to 1, less what padding takes under ``pad="legacy"``.
    """
    if not 0 <= residual <= 1:
        raise UsageError(f"residual={residual} is not a share: give a number from 0 to 1.")
    model, size = swin_of(model), tuple(x.shape[2:])
    check_attention(model)
    maps = model.config.stage_maps(size)

    def read(attn: WindowAttention, tokens: Tensor, layout: Layout, bias: PositionBias) -> tuple[Tensor, Layout]:
        return torch.cat([part.mean(2) for part in _in_parts(attn, tokens, layout, bias)], 1), layout

    read_weights = _read(model, x, [block.attn for stage in model.layers for block in stage.blocks], read)
    last = math.prod(maps[-1])
    shares = torch.full((len(x), last), 1 / last, device=read_weights[-1][0].device)
    if query is not None:
        shares.zero_()[:, _token(model.config, len(maps) - 1, query, size)] = 1.0
    for stage in reversed(range(len(maps))):
        for _ in model.layers[stage].blocks:
            shares = _back_through(shares, *read_weights.pop(), residual)
        if stage:
            shares = _split(shares.unflatten(1, maps[stage]), maps[stage - 1]).flatten(1)
    return shares.unflatten(1, maps[0])


@torch.no_grad()
def attention_distance(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """How far away each head looks on average, in pixels of the input.

    The mean over images and tokens of the distance between the centres of query and key, weighted by attention (Dosovitskiy
    et al., arXiv 2010.11929, figure 7). For clips it is the distance within the picture, whatever the frame.

    Args:
        model, x: as in ``attention``.

    Returns:
        for each "layers.S.blocks.B", in forward order, (A,) in fp32.
    """
    model = swin_of(model)
    check_attention(model)
    strides = {
        block.attn: model.config.stage_strides()[s] for s, stage in enumerate(model.layers) for block in stage.blocks
    }

    def read(attn: WindowAttention, tokens: Tensor, layout: Layout, bias: PositionBias) -> Tensor:
        axes = [
            torch.arange(n, device=tokens.device) * float(s) for n, s in zip(layout.window, strides[attn], strict=True)
        ]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)[:, -2:]
        distances = torch.cdist(places, places)
        real = torch.zeros(layout.source.numel(), device=tokens.device).index_fill_(0, layout.slot, 1.0)
        real, start = real.unflatten(0, tokens.shape[1:3]), 0
        total = torch.zeros(attn.num_heads, device=tokens.device)
        for part in _in_parts(attn, tokens, layout, bias):
            here = real[start : start + part.shape[1]]
            start += part.shape[1]
            seen = part * here[:, None, None]  # without the padding that takes part in the legacy mode
            mean = (seen * distances).sum(-1) / seen.sum(-1).clamp(min=torch.finfo(seen.dtype).tiny)
            total += (mean * here[:, None]).sum((0, 1, 3))
        return total / (len(tokens) * layout.slot.numel())

    names = [f"layers.{s}.blocks.{b}" for s, stage in enumerate(model.layers) for b in range(len(stage.blocks))]
    return dict(zip(names, _read(model, x, list(strides), read), strict=True))


def _read(
    model: SwinTransformer,
    x: Tensor,
    wanted: Sequence[WindowAttention],
    read: Callable[[WindowAttention, Tensor, Layout, PositionBias], T],
) -> list[T]:
    """What ``read`` makes of the inputs of some attentions, in forward order."""
    found: list[T] = []

    def hook(attn: nn.Module, inputs: tuple[Tensor, Layout, PositionBias]) -> None:
        found.append(read(cast(WindowAttention, attn), *inputs))

    hooks = [attn.register_forward_pre_hook(hook) for attn in wanted]
    try:
        with evaluating(model):
            model.forward_features(x.to(model.norm.weight.device))
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _in_parts(attn: WindowAttention, tokens: Tensor, layout: Layout, bias: PositionBias) -> Iterator[Tensor]:
    """The attention weights of some windows after the others, (B, some, A, N, N)."""
    B, W, N, _ = tokens.shape
    windows = max(1, ENTRIES // (B * attn.num_heads * N * N))
    for start in range(0, W, windows):
        stop = min(start + windows, W)
        part = layout if stop - start == W else layout_part(layout, start, stop)
        yield attention_weights(attn, tokens[:, start:stop], part, bias)


def _back_through(shares: Tensor, weights: Tensor, layout: Layout, residual: float) -> Tensor:
    """(B, L) shares of what a block gives → shares of what it reads; ``weights`` (B, W, N, N)."""
    windows = shares.new_zeros(len(shares), layout.source.numel()).index_copy_(1, layout.slot, shares)
    windows = windows.unflatten(1, weights.shape[1:3])
    taken = torch.einsum("bwn,bwnm->bwm", windows, weights)
    return (residual * windows + (1 - residual) * taken).flatten(1).index_select(1, layout.slot)


def _split(shares: Tensor, size: Size) -> Tensor:
    """(B, *merged map) → (B, *size): a token's share goes to those it was merged from, padding left out."""
    for axis in (-2, -1):
        parts = torch.full((shares.shape[axis],), 2.0, device=shares.device)
        parts[-1] -= size[axis] % 2
        shares = shares / (parts[:, None] if axis == -2 else parts)
        shares = shares.repeat_interleave(2, axis).narrow(axis, 0, size[axis])
    return shares


def _token(config: SwinConfig, stage: int, pixel: Sequence[int], size: Size) -> int:
    """Raster position of the token of a stage that holds a pixel of an input of ``size``."""
    raster, pixel = 0, check_pixel(pixel, size)
    for n, p, stride in zip(config.stage_maps(size)[stage], pixel, config.stage_strides()[stage], strict=True):
        raster = raster * n + p // stride
    return raster
