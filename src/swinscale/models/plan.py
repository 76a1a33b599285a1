"""What a model does at an input size, before it runs: maps, windows, padding, and how much it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from swinscale.errors import UsageError
from swinscale.models.config import Size, SwinConfig, format_size
from swinscale.models.swin_mlp import SwinMLPConfig
from swinscale.models.variants import build_model
from swinscale.models.windows import stage_layouts

MUCH_PADDING = 0.25
COLUMNS = ("stage", "map", "window", "shift", "windows", "padding %", "attention GMAC", "GMAC")


@dataclass(frozen=True)
class StagePlan:
    """One stage at one input size. Costs are multiply–accumulates for one input."""

    map: Size
    """Tokens along each axis."""
    window: Size
    shift: Size
    windows: int
    padding: float
    """Share of the slots in the (regular) windows that hold no token."""
    attention_macs: int
    """Logits and weighted sums of the values: the part that grows with the window."""
    macs: int
    """All of the stage, with its merging layer."""


@dataclass(frozen=True)
class SizePlan:
    """A model at one input size."""

    size: Size
    stages: tuple[StagePlan, ...]
    macs: int
    """Multiply–accumulates of one forward pass: convolution, linear layers and attention, padding included; without
    softmax, norms and position bias, as is usual for this family."""
    position_bias_macs: int
    """Multiply–accumulates of the continuous position bias: once per call, whatever the batch."""
    parameters: int
    warnings: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply–accumulate."""
        return 2 * self.macs

    def rows(self) -> list[list[str]]:
        """A row of text cells per stage, under the headings ``COLUMNS``."""
        return [
            [
                str(index),
                format_size(s.map),
                format_size(s.window),
                format_size(s.shift) if any(s.shift) else "–",
                str(s.windows),
                f"{100 * s.padding:.1f}",
                f"{s.attention_macs / 1e9:.3f}",
                f"{s.macs / 1e9:.3f}",
            ]
            for index, s in enumerate(self.stages)
        ]

    def __str__(self) -> str:
        table = [list(COLUMNS), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            [
                f"{self.parameters:,} parameters; one forward pass at {format_size(self.size)}: {self.macs / 1e9:.2f} GMAC = "
                f"{self.flops / 1e9:.2f} GFLOP, and {self.position_bias_macs / 1e9:.3f} GMAC of position bias per call",
                *("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in table),
                *self.warnings,
            ]
        )


def plan(config: SwinConfig, size: int | Size | None = None) -> SizePlan:
    """Maps, windows, padding and cost of ``config`` for one input of ``size`` pixels (default: its ``img_size``).

    Raises:
        UsageError: if ``size`` has another number of axes than the model.
    """
    pixels = config.img_size if size is None else (size,) * config.rank if isinstance(size, int) else tuple(size)
    if len(pixels) != config.rank or min(pixels) < 1:
        raise UsageError(f"size={size} is not a size for this model: give {config.rank} positive integers.")
    with torch.device("meta"):
        model = build_model(config)
    # SwinMLP multiplies by a matrix of its own: no queries, keys and values, and one product in place of two
    projections, products = (0, 1) if isinstance(config, SwinMLPConfig) else (4, 2)
    stages, bias_macs = [], 0
    maps = config.stage_maps(pixels)
    for stage, (tokens_map, dim) in enumerate(zip(maps, config.stage_dims, strict=True)):
        block_macs = attention_macs = 0
        cpu = torch.device("cpu")
        layouts = stage_layouts(config, stage, tokens_map, cpu)[:2]
        for block in range(config.depths[stage]):
            layout = layouts[block % 2]
            slots, tokens = layout.source.numel(), math.prod(layout.window)
            block_macs += slots * (projections * dim**2 + 2 * dim * int(dim * config.mlp_ratio))
            attention_macs += products * slots * tokens * dim
            if config.position_bias != "table":
                offsets = math.prod(2 * w - 1 for w in layout.window)
                bias_macs += offsets * 512 * (config.rank + config.num_heads[stage])
        merging = math.prod(maps[stage + 1]) * 8 * dim**2 if stage + 1 < len(maps) else 0
        layout = layouts[0]
        shift = tuple(
            w // 2 if n > w or config.small_map == "pad" else 0 for n, w in zip(tokens_map, layout.window, strict=True)
        )
        slots = layout.source.numel()
        stages.append(
            StagePlan(
                map=tokens_map,
                window=layout.window,
                shift=shift if config.depths[stage] > 1 else (0,) * config.rank,
                windows=slots // math.prod(layout.window),
                padding=1 - math.prod(tokens_map) / slots,
                attention_macs=attention_macs,
                macs=block_macs + attention_macs + merging,
            )
        )
    embed = math.prod(maps[0]) * config.embed_dim * config.in_chans * math.prod(config.patch_size)
    total = embed + sum(s.macs for s in stages) + config.num_features * config.num_classes
    parameters = sum(p.numel() for p in model.parameters())
    return SizePlan(pixels, tuple(stages), total, bias_macs, parameters, tuple(_warnings(config, pixels, stages)))


def _warnings(config: SwinConfig, pixels: Size, stages: list[StagePlan]) -> list[str]:
    """A line per stage that computes much padding, with the nearest size and window that are cheaper."""
    found = []
    for index, (stage, strides) in enumerate(zip(stages, config.stage_strides(), strict=True)):
        if stage.padding <= MUCH_PADDING:
            continue
        cheaper = []
        if all(n >= w for n, w in zip(stage.map, stage.window, strict=True)):
            sides = zip(pixels, stage.map, stage.window, strides, strict=True)
            whole = tuple(side if n % w == 0 else n // w * w * stride for side, n, w, stride in sides)
            cheaper.append(f"an input of {format_size(whole)}")
        window = tuple(math.ceil(n / math.ceil(n / w)) for n, w in zip(stage.map, stage.window, strict=True))
        if window != stage.window:
            cheaper.append(f"a window of {format_size(window)} there")
        found.append(
            f"stage {index}: {100 * stage.padding:.0f} % of its slots are padding (map {format_size(stage.map)}, window "
            f"{format_size(stage.window)}); {' or '.join(cheaper)} is cheaper"
        )
    return found
