"""What passes through a Swin: amplitudes of the residual stream and its branches, attention heads, position biases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swinscale.diagnose.attention import attention_weights, head_statistics, logit_scales
from swinscale.models import SwinTransformer
from swinscale.models.swin import SwinBlock, WindowAttention
from swinscale.models.windows import Layout
from swinscale.ops.position import PositionBias

SAMPLE = 1 << 14
"""Values that percentiles are taken from."""
WINDOWS, PAIRS = 16, 1 << 22
"""Attention is written out for at most so many windows and pairs of tokens per block (16 MiB)."""
AMPLITUDES = ("mean", "rms", "p50", "p99", "max")
HEADS = ("entropy", "top_key", "top_key_max", "received")


def sample(values: Tensor, count: int = SAMPLE) -> Tensor:
    """(at most ``count``,) of the values, spread evenly over all positions of every axis."""
    stride = max(1, math.ceil(values.numel() / count))
    while math.gcd(stride, values.shape[-1] if values.ndim else 1) > 1:  # else some channels would never be seen
        stride += 1
    return values.reshape(-1)[::stride]


def amplitude(x: Tensor) -> Tensor:
    """(5,) in fp32: mean, root mean square, median, 99th percentile and maximum of |x|. Percentiles are of a sample."""
    mean, root, largest = (torch.linalg.vector_norm(x, order, dtype=torch.float32) for order in (1, 2, torch.inf))
    middle = sample(x).float().abs().quantile(torch.tensor([0.5, 0.99], device=x.device))
    return torch.stack([mean / x.numel(), root / math.sqrt(x.numel()), *middle, largest])


class Activations:
    """What ``watched`` saw, on the device; keys are in the order of the forward pass.

    Attributes:
        amplitudes: (module, place) → (5,) ``AMPLITUDES``. Places of a block: "stream", its output; "attention" and "mlp",
            what is added to the stream; with norms after the sum also "attention sum" and "mlp sum", before the norm.
        heads: block → (4, A) ``HEADS``.
        keys: block → tokens of a window.
        scales: block → (A,) by what the cosine of V2 is multiplied.
        biases: last block of each stage → window and (A, O) position bias.
    """

    def __init__(self) -> None:
        self.amplitudes: dict[tuple[str, str], Tensor] = {}
        self.heads: dict[str, Tensor] = {}
        self.keys: dict[str, int] = {}
        self.scales: dict[str, Tensor] = {}
        self.biases: dict[str, tuple[tuple[int, ...], Tensor]] = {}


@contextmanager
def watched(swin: SwinTransformer) -> Iterator[Activations]:
    """Within it, a forward pass of ``swin`` fills the ``Activations``. For evaluation mode without gradients."""
    seen, handles = Activations(), []

    def amplitude_of(name: str, place: str, module: nn.Module, inputs: Any, output: Any = None) -> None:
        value = inputs[0] if output is None else output
        seen.amplitudes[name, place] = amplitude(value.detach())

    def heads_of(name: str, last: bool, attn: WindowAttention, inputs: Any, output: Any) -> None:
        x, layout, bias = inputs
        _read_heads(seen, name, attn, x, layout, bias)
        if last:
            window = attn.window if attn.position_bias == "table" else layout.window
            seen.biases[name] = window, bias.values.detach().float()

    def output(module: nn.Module, name: str, place: str) -> None:
        handles.append(module.register_forward_hook(partial(amplitude_of, name, place)))

    try:
        for name, module in (("patch_embed", swin.patch_embed), ("norm", swin.norm)):
            output(module, name, "stream")
        for index, stage in enumerate(swin.layers):
            for number, block in enumerate(stage.blocks):
                name, last = f"layers.{index}.blocks.{number}", number + 1 == len(stage.blocks)
                handles.append(block.attn.register_forward_hook(partial(heads_of, name, last)))
                for place, branch, norm in _branches(block):
                    output(branch, name, place)
                    if block.norm_placement == "post":
                        handles.append(norm.register_forward_pre_hook(partial(amplitude_of, name, f"{place} sum")))
                output(block, name, "stream")
            if index + 1 < len(swin.layers):
                output(stage.downsample, f"layers.{index}.downsample", "stream")
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _branches(block: SwinBlock) -> list[tuple[str, nn.Module, nn.Module]]:
    """Name, the module whose output is added to the stream, and the norm."""
    added: tuple[nn.Module, nn.Module] = (block.attn, block.mlp)
    if block.norm_placement == "res-post":
        added = block.norm1, block.norm2
    elif block.norm_placement == "sandwich":
        added = block.branch_norm1, block.branch_norm2
    return list(zip(("attention", "mlp"), added, (block.norm1, block.norm2), strict=True))


def _read_heads(
    seen: Activations, name: str, attn: WindowAttention, x: Tensor, layout: Layout, bias: PositionBias
) -> None:
    """Statistics of the heads in some windows of the first image."""
    count, tokens = x.shape[1:3]
    windows = max(1, min(count, WINDOWS, PAIRS // (attn.num_heads * tokens**2)))
    chosen = torch.linspace(0, count - 1, windows, device=x.device).round().long()
    regions = None if layout.regions is None else layout.regions[chosen]
    part = Layout(layout.window, layout.source, layout.slot, regions, None)
    own = PositionBias(bias.values.detach(), bias.code)  # the block's would keep what is made for these windows
    weights = attention_weights(attn, x[:1, chosen], part, own)
    seen.heads[name], seen.keys[name] = head_statistics(weights[0], regions), tokens
    if attn.cosine:
        seen.scales[name] = logit_scales(attn)
