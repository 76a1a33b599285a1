"""The relative position bias of window attention: a table (V1) or a small network of the offset (V2); absolute positions."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.models.config import Size, SwinConfig
from swinscale.models.windows import position_code, relative_coords
from swinscale.ops.position import PositionBias


def absolute_positions(embedding: Tensor, grid: Size, size: Size) -> Tensor:
    """(1, L, D) learned for a map of ``grid`` tokens → (1, *size, D), resized where the sizes differ."""
    table = embedding.unflatten(1, grid)
    if torch.compiler.is_exporting() or grid != size:
        mode = "bicubic" if len(grid) == 2 else "trilinear"
        table = F.interpolate(table.movedim(-1, 1), size, mode=mode, align_corners=False).movedim(1, -1)
    return table


class RelativePositionBias(nn.Module):
    """What window attention inherits: the parameters of its position bias, under their published names.

    The bias depends on weights alone. With gradients it is computed once per forward pass. Without, it is kept until the
    weights change: in place, by ``load_state_dict``, ``to`` or replacement; ``train()`` and ``eval()`` forget it too. Only
    values written past autograd (``parameter.data.copy_``) between two calls of one evaluation go unnoticed.
    """

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        self.num_heads, self.position_bias = config.num_heads[stage], cast(str, config.position_bias)
        self.window, self.trained_window = config.stage_windows[stage], config.trained_windows[stage]
        self._kept: tuple[list[Any], PositionBias] | None = None
        if self.position_bias == "table":
            offsets = math.prod(2 * w - 1 for w in self.window)
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, self.num_heads))
        else:
            hidden = nn.Linear(config.rank, 512)
            self.cpb_mlp = nn.Sequential(hidden, nn.ReLU(), nn.Linear(512, self.num_heads, bias=False))

    def bias(self, window: Size) -> PositionBias:
        """Position bias of a window not larger than the model's own."""
        table = self.position_bias == "table"
        weights = [self.relative_position_bias_table] if table else list(self.cpb_mlp.parameters())
        learning = self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in weights))
        if learning or torch.compiler.is_compiling() or any(p.is_inference() for p in weights):
            return self._compute_bias(window)
        key = [window, *((p.data_ptr(), p._version, p.dtype, p.device) for p in weights)]
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                bias = self._compute_bias(window)
                self._kept = key, PositionBias(bias.values.detach(), bias.code)
        return self._kept[1]

    def _compute_bias(self, window: Size) -> PositionBias:
        """From the weights; the network in fp32 also under autocast."""
        if self.position_bias == "table":
            table = self.relative_position_bias_table
            return PositionBias(table.t(), position_code(window, self.window, table.device))
        first = cast(nn.Linear, self.cpb_mlp[0])
        device = first.weight.device
        coords = relative_coords(window, self.trained_window, self.position_bias, device)
        with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
            if first.weight.dtype in (torch.bfloat16, torch.float16):  # a sharded model in mixed precision
                values = self._in_fp32(coords)
            else:
                values = self.cpb_mlp(coords.to(first.weight.dtype))
        if self.position_bias != "paper":
            values = 16 * values.sigmoid()
        return PositionBias(values.t(), position_code(window, window, device))

    def _in_fp32(self, coords: Tensor) -> Tensor:
        """The network with its weights widened: rounding its hidden layer would show in every bias."""
        first, last = cast(nn.Linear, self.cpb_mlp[0]), cast(nn.Linear, self.cpb_mlp[2])
        hidden = F.linear(coords.float(), first.weight.float(), first.bias.float()).relu()
        return F.linear(hidden, last.weight.float())

    def train(self, mode: bool = True) -> RelativePositionBias:
        self._kept = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> RelativePositionBias:
        self._kept = None
        return super()._apply(*arguments, **options)
