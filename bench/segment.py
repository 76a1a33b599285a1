"""``python -m bench segment``: speed and memory of UPerNet, ours beside transformers' with the same weights, and one without a Swin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench import runner, segment_runs, tables
from bench.segmenters import CLASSES, CONTENDERS, OURS, SAME, build, heads
from bench.speed import Row, speed_table

MODES = ("training", "inference")
BATCH = {"training": 2, "inference": 1}
"""Images per call by default. One alone has no batch statistics where a map is pooled to one cell: transformers refuses it."""
KEYS = ("device", "threads", "mode", "dtype", "size", "batch")
"""What a result is the result of."""


@dataclass(frozen=True)
class Speed(runner.Speed):
    """One measurement of UPerNets: one batch of random images, up to the class of each pixel; see ``runner.Speed``."""

    kind: ClassVar[str] = "segmenter"
    contenders: ClassVar[tuple[str, ...]] = CONTENDERS
    ours: ClassVar[tuple[str, ...]] = OURS
    same: ClassVar[tuple[str, ...]] = SAME

    size: int = 512

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, size, size), and the class of each pixel."""
        draw = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=draw)
        target = torch.randint(CLASSES, (self.batch, self.size, self.size), generator=draw)
        return images.to(self.device), target.to(self.device)

    def build(self, name: str) -> nn.Module:
        """One of ``CONTENDERS``."""
        return build(name, self.tiny)


def measure(speed: Speed, repeats: int, memory: bool) -> Row:
    """See ``runner.measure``."""
    found = runner.measure(speed, repeats, memory)
    return {**found, "classes": CLASSES, "channels": heads(speed.tiny).channels}


def parts(content: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """What a page can show: ``speed`` and ``speed-gpu``, and where that was measured; ``heart`` and ``scenes``, finished runs."""
    made: dict[str, Callable[[], str]] = {}
    for name, device in (("speed", "cpu"), ("speed-gpu", "cuda")):
        cases = [case for case in content.get("speed", []) if case["device"] == device]
        if cases:
            made[name] = lambda cases=cases: table(cases)  # type: ignore[misc]
    if runs := content.get("runs"):
        made["heart"] = lambda: segment_runs.heart_table(runs)
        made["scenes"] = lambda: segment_runs.scenes_table(runs)
    rows = content.get("speed", [])
    made["machine"] = lambda: "\n\n".join(dict.fromkeys(tables.machine(row["environment"]) for row in rows))
    return made


def table(cases: Sequence[Row]) -> str:
    """A row per contender, and below what is the same for all of them."""
    first = cases[0]
    found = speed_table(cases, OURS, title)
    return (
        f"{found}\n\nUPerNet from random weights on random images, {first['classes']} classes, heads of {first['channels']} channels. "
        f"Training is forward with the auxiliary head, cross entropy, backward and an AdamW step, without dropout and stochastic "
        f"depth; inference ends with the class of each pixel. `{'`, `'.join(SAME)}` have the weights of `{OURS[0]}`; "
        f'"difference" is that of their logits, or of loss and gradients, from its own. transformers computes the auxiliary head in '
        f"inference, too; `{CONTENDERS[-1]}` has none, and is there to show what a UPerNet costs without a Swin Transformer."
    )


def title(case: Row) -> str:
    """Mode, precision, images and threads of a measurement."""
    where = f", {case['threads']} thread{'s' * (case['threads'] > 1)}" if case["device"] == "cpu" else ""
    return f"{case['mode']} {case['dtype']}, {case['batch']} × {case['size']}²{where}"
