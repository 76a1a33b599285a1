"""SwinMLP: a Swin V1 whose windows mix their tokens by a learned matrix per head instead of attention (arXiv 2103.14030).

In the published code shifted windows reach past the borders of the map, where there are zeros. Here they are those of Swin, and
regions have the same effect: windows that wrap around the seam hold tokens from several ends of the map, each in the slot that
it has in the padded map, and tokens of different regions give each other nothing, as zeros would. The matrix belongs to one
size of window; a smaller map takes its first rows and columns, as if it were padded with zeros.

Parameter names are those of the published code (microsoft/Swin-Transformer, MIT); ``load_state_dict`` reads its files as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.models.chunks import in_chunks
from swinscale.models.config import Size, SwinConfig
from swinscale.models.swin import SwinBlock, SwinTransformer
from swinscale.models.windows import Layout


@dataclass(frozen=True)
class SwinMLPConfig(SwinConfig):
    """A ``SwinConfig`` without attention: ``token_mixing`` is what tells records of the two apart; ``pad`` has no effect."""

    version: Literal[1, 2] = 1
    token_mixing: Literal["mlp"] = "mlp"

    def _check(self) -> None:
        super()._check()
        only = {"version": 1, "position_bias": "table", "similarity": "dot", "qkv_bias": True, "attn_drop_rate": 0}
        for name, value in {**only, "token_mixing": "mlp"}.items():
            if getattr(self, name) != value:
                raise UsageError(f"{name}={getattr(self, name)!r} is not allowed: SwinMLP has {value!r}. Leave it out.")


class SwinMLPBlock(SwinBlock):
    """A block in which each token of a window becomes a weighted sum of all, with other weights for each head."""

    def __init__(self, config: SwinConfig, stage: int, block: int):
        super().__init__(config, stage, block)
        del self.attn
        self.num_heads, self.window = config.num_heads[stage], config.stage_windows[stage]
        rows = self.num_heads * math.prod(self.window)
        self.spatial_mlp = nn.Conv1d(rows, rows, 1, groups=self.num_heads)
        self.initially_normal = {"spatial_mlp.weight": 0.02}

    def transform(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, W, N, D) → (B, W, N, D)"""
        matrix, bias = self.matrix(layout.window)

        def run(windows: Tensor, part: Layout) -> Tensor:
            windows = self.residual(windows, lambda tokens: mix_tokens(tokens, part, matrix, bias), "norm1")
            return self.enorm(self.residual(windows, self.mlp, "norm2"))

        return in_chunks(self, run, x, layout)

    def matrix(self, window: Size) -> tuple[Tensor, Tensor]:
        """Weights (A, N, N) and biases (A, N, 1) of a window not larger than the model's own."""
        weight, bias = (p.view(self.num_heads, math.prod(self.window), -1) for p in self.spatial_mlp.parameters())
        if window == self.window:
            return weight, bias
        slots = torch.arange(math.prod(self.window), device=weight.device).view(self.window)
        kept = slots[tuple(map(slice, window))].flatten()
        return weight[:, kept][:, :, kept], bias[:, kept]


def mix_tokens(x: Tensor, layout: Layout, matrix: Tensor, bias: Tensor) -> Tensor:
    """(B, W, N, D) → (B, W, N, D), within regions: ``matrix`` (A, N, N) and ``bias`` (A, N, 1) for each head's channels."""
    x = x if layout.zero is None else x.masked_fill(layout.zero, 0)
    heads = x.unflatten(-1, (len(matrix), -1))
    if layout.regions is None:
        out = torch.einsum("amn,...wnad->...wmad", matrix, heads)
    else:
        same = layout.regions[:, None, :, None] == layout.regions[:, None, None]
        out = torch.einsum("wamn,...wnad->...wmad", matrix * same, heads)
    return (out + bias.transpose(0, 1)).flatten(-2)


class SwinMLP(SwinTransformer):
    """SwinMLP, with all that a ``SwinTransformer`` offers but attention: images or clips of any size to class logits."""

    def __init__(self, config: SwinMLPConfig):
        device = torch.get_default_device()
        with torch.device("meta"):
            super().__init__(config)
            for index, stage in enumerate(self.layers):
                stage.blocks = nn.ModuleList(SwinMLPBlock(config, index, block) for block in range(len(stage.blocks)))
        if device.type != "meta":
            self.to_empty(device=device).init_weights()

    def set_attention_backend(self, name: str | Sequence[str]) -> None:
        """There is no attention to compute: only "auto" is allowed."""
        if set(self._per_stage("attention", name)) != {"auto"}:
            raise UsageError(f"attention={name!r}: SwinMLP has no attention, so only 'auto' is allowed. Leave it out.")
