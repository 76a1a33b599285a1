"""Swin V1 with windows that do not shift, or that slide: the same parameters under the same names.

With sliding windows (arXiv 1904.11491; compared with in arXiv 2103.14030) every query attends to the tokens around it, in a
window that has its centre there and is cut off at the borders of the map. Tokens stay in raster order.

Shape letters: B batch, L tokens of the map, K tokens of a window, A heads, d channels of a head, D = A * d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.chunks import in_chunks
from swinscale.models.config import Size
from swinscale.models.swin import SwinBlock, SwinStage, WindowAttention
from swinscale.models.windows import Layout, position_code, stage_layouts
from swinscale.ops.linear import linear
from swinscale.ops.position import PositionBias
from swinscale.tasks import Classify

Windows = Literal["shifted", "not shifted", "sliding"]
Method = Literal["gathered", "masked", "flex"]


@dataclass(frozen=True, eq=False)
class Surroundings(Layout):
    """A map in raster order, and the window around each of its tokens."""

    size: Size
    neighbours: Tensor  # (L, K) raster positions; beyond the border that of some token
    beyond: Tensor  # (L, K) True: there is no such token
    offsets: Tensor  # (K,) indices into the values of a position bias
    blocks: Any  # of flex attention: which blocks of queries and keys it visits


@lru_cache(maxsize=64)
def surroundings(size: Size, window: Size, method: Method, device: torch.device) -> Surroundings:
    """Of each token of a map of ``size``.

    Raises:
        UsageError: for a window that has no token in its centre.
    """
    if not all(w % 2 for w in window):
        raise UsageError(
            f"A sliding window has a token in its centre: {window} is not odd on each side. Choose a window that is."
        )
    with _disable_current_modes(), torch.inference_mode(False):
        tokens = torch.arange(math.prod(size), device=device)
        neighbours, beyond, offsets = tokens[:, None] * 0, tokens[:, None] < 0, tokens[:1] * 0
        stride = len(tokens)
        for n, w in zip(size, window, strict=True):
            stride //= n
            step = torch.arange(w, device=device) - w // 2
            place = (tokens // stride % n)[:, None] + step
            outside = (place < 0) | (place >= n)
            neighbours = (neighbours[:, :, None] + (place.clamp(0, n - 1) * stride)[:, None]).flatten(1)
            beyond = (beyond[:, :, None] | outside[:, None]).flatten(1)
            offsets = (offsets[:, None] * (2 * w - 1) + w - 1 - step).flatten()  # of the query from the key
        blocks = _blocks(size, window, device) if method == "flex" else None
        return Surroundings(window, tokens, tokens, None, None, size, neighbours, beyond, offsets, blocks)


def _blocks(size: Size, window: Size, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask  # slow to import

    strides = [math.prod(size[axis + 1 :]) for axis in range(len(size))]

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = query >= 0
        for n, w, stride in zip(size, window, strides, strict=True):
            found = found & ((query // stride % n - key // stride % n).abs() <= w // 2)
        return found

    return create_block_mask(near, None, None, math.prod(size), math.prod(size), device=device.type)


def sliding_attention(
    qkv: Tensor, bias: PositionBias, around: Surroundings, scale: float, method: Method = "gathered"
) -> Tensor:
    """Softmax attention of every token to the window around it.

    Args:
        qkv: (B, L, 3D), queries, keys and values in raster order.
        bias: of a window as large as those of ``around``.
        scale: factor of the logits.
        method: "gathered" copies the neighbours of each token together, as plain implementations do; "masked" computes all
            pairs of the map and leaves out those that are too far apart, which is faster on small maps; "flex" is PyTorch's
            flex attention, compiled, which visits only blocks with pairs that are near.

    Returns:
        (B, L, D)

    Raises:
        UsageError: for "flex" with gradients on a CPU.
    """
    q, k, v = qkv.unflatten(-1, (3, bias.heads, -1)).unbind(2)  # (B, L, A, d)
    if method == "gathered":
        (B, L, A, d), K = q.shape, len(around.offsets)
        near_k, near_v = (t.index_select(1, around.neighbours.flatten()).view(B, L, K, A, d) for t in (k, v))
        logits = torch.einsum("blad,blkad->blak", q * scale, near_k)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) + bias.values[:, around.offsets]
        weights = logits.masked_fill(around.beyond[:, None], -torch.inf).softmax(-1).to(v.dtype)
        return torch.einsum("blak,blkad->blad", weights, near_v).flatten(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attend = _masked if method == "masked" else _flex
    return attend(q, k, v, bias, around, scale).transpose(1, 2).flatten(2)


def _masked(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias, around: Surroundings, scale: float) -> Tensor:
    A, L = q.shape[1:3]
    places = around.neighbours.masked_fill(around.beyond, L)  # a last column takes what is beyond the border
    near = bias.values[:, around.offsets][:, None].expand(A, L, -1)
    mask = near.new_full((A, L, L + 1), -torch.inf).scatter(2, places.expand(A, -1, -1), near)[..., :L]
    return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), scale=scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias, around: Surroundings, scale: float) -> Tensor:
    values, code = bias.values, position_code(around.size, around.window, q.device)
    centre, last = (values.shape[1] - 1) // 2, values.shape[1] - 1
    if torch.is_grad_enabled():
        if q.device.type == "cpu":
            raise UsageError(
                "On a CPU flex attention has no gradients: choose another method, or torch.inference_mode."
            )
    else:  # it asks whether its inputs could learn, not whether they do now
        q, k, v, values = (t.detach() for t in (q, k, v, values))

    def score(logit: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Pairs that are too far apart have a score too, until they are masked.
        return logit + values[head, (code[query] - code[key] + centre).clamp(0, last)]

    return cast(Tensor, _compiled_flex()(q, k, v, score_mod=score, block_mask=around.blocks, scale=scale))


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class SlidingAttention(WindowAttention):
    """Attention of each token to the window around it. Reads (B, 1, L, D): the whole map as one window."""

    def __init__(self, config: SwinConfig, stage: int, method: Method):
        super().__init__(config, stage)
        if self.cosine or self.dropout:
            raise UsageError("Sliding windows are compared in Swin V1: set similarity='dot' and attn_drop_rate=0.")
        self.method: Method = method

    def forward(self, x: Tensor, layout: Layout, bias: PositionBias | None = None) -> Tensor:
        bias, scale = bias or self.bias(layout.window), (x.shape[-1] // self.num_heads) ** -0.5
        x = sliding_attention(linear(self.qkv, x)[:, 0], bias, cast(Surroundings, layout), scale, self.method)
        return self.proj_drop(linear(self.proj, x[:, None]))


class SlidingStage(SwinStage):
    """A stage whose windows slide."""

    def __init__(self, config: SwinConfig, stage: int, method: Method):
        super().__init__(config, stage)
        self.method: Method = method
        for block in self.blocks:
            block.attn = SlidingAttention(config, stage, method)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *map, D) → (B, *map, D)"""
        size = tuple(x.shape[1:-1])
        around = surroundings(size, self.config.stage_windows[self.stage], self.method, x.device)
        x = x.flatten(1, -2)[:, None]
        for block in self.blocks:
            x = block(x, around)
        return x[:, 0].unflatten(1, size)


class FixedStage(SwinStage):
    """A stage whose windows never shift."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, *map, D) → (B, *map, D)"""
        size = tuple(x.shape[1:-1])
        regular = stage_layouts(self.config, self.stage, size, x.device)[0]
        x = x.flatten(1, -2).index_select(1, regular.source).unflatten(1, (-1, math.prod(regular.window)))
        for block in self.blocks:
            x = block(x, regular)
        return x.flatten(1, 2).index_select(1, regular.slot).unflatten(1, size)


def make_stage(config: SwinConfig, stage: int, windows: Windows, method: Method = "gathered") -> SwinStage:
    """A stage of one of the kinds of ``Windows``; ``method`` is of the sliding ones."""
    if windows == "sliding":
        return SlidingStage(config, stage, method)
    return (FixedStage if windows == "not shifted" else SwinStage)(config, stage)


class SwinVariant(SwinTransformer):
    """A Swin Transformer with other windows, but the same parameters."""

    def __init__(self, config: SwinConfig, windows: Windows, method: Method = "gathered"):
        super().__init__(config)
        self.layers = nn.ModuleList(make_stage(config, i, windows, method) for i in range(len(config.depths)))
        if self.norm.weight.device.type != "meta":
            self.init_weights()


class ClassifyVariant(Classify):
    """Classification by a ``SwinVariant``. Its weights look like those of a Swin and are none: no ``config.json`` says so."""

    def save_pretrained(self, directory: Path, state: Any = None) -> None:
        from safetensors.torch import save_file

        weights = self.model.state_dict() if state is None else {n.removeprefix("model."): t for n, t in state.items()}
        directory.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in weights.items()}, directory / "variant.safetensors")


class AttentionAlone(nn.Module):
    """The attention of a block without norms and MLP, to take its time."""

    def __init__(self, block: SwinBlock):
        super().__init__()
        self.attn = block.attn

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, W, N, D) → (B, W, N, D)"""
        bias = self.attn.bias(layout.window)
        return in_chunks(self, lambda windows, part: self.attn(windows, part, bias), x, layout)


def attention_alone(stage: SwinStage) -> SwinStage:
    """``stage`` with attention as all that its blocks do; the changes of order between blocks stay."""
    stage.blocks = nn.ModuleList(AttentionAlone(cast(SwinBlock, block)) for block in stage.blocks)
    return stage
