"""``python -m bench giant --data PHOTOS``: three billion parameters in training on one GPU, within ten minutes.

SimMIM on real photographs: some tens of steps at 192 pixels with window 12, then a few under each technique of the memory
recipe, there and at 1536 pixels with window 32. Every step is a real one: loss, backward pass, clipping, AdamW. Without a GPU
the same command trains a model of Huge's shape (depths, extra norms) and small width at small sizes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from bench.cases import free, give_back_freed_memory, reset_peak, resident_peak
from bench.gpu import ceilings, shapes
from bench.progress import say
from swinscale.data.loader import EpochLoader
from swinscale.models import SwinConfig, SwinTransformer, plan
from swinscale.models.variants import GIANT, HUGE
from swinscale.optim import OptimConfig, Schedule, build_optimizer, parameter_groups
from swinscale.parallel import MemoryConfig, World, arrange, autocast, prepare, resolve_precision
from swinscale.recipes import DataConfig, Recipe
from swinscale.recipes.base import datasets, open_sources
from swinscale.tasks import SimMIM, SimMIMConfig
from swinscale.timing import Budget, Spread
from swinscale.weights import transfer_config

TECHNIQUES = {
    "none": MemoryConfig(attention="eager"),
    "checkpointing": MemoryConfig(attention="eager", checkpointing="block"),
    "checkpointing, sequential": MemoryConfig(("sequential", "sequential", "eager", "eager"), "block"),
    "checkpointing, fused": MemoryConfig(checkpointing="block"),
}
"""Attention is the plain one, sequential in the first two stages as in the article, or the fastest that runs here ("fused":
Triton's kernels on a GPU, PyTorch's on a CPU)."""

PUBLISHED_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOP/s of NVIDIA's data sheets, by a part of the device's name."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    model: SwinConfig
    task: SimMIMConfig
    steps: int
    """Steps of training before techniques are compared."""
    places: tuple[tuple[int, int, int, int], ...]
    """(size, window, images per step, timed steps) at which they are."""


def scale(device: str) -> Scale:
    """Giant on a GPU; elsewhere a narrow model of Huge's shape."""
    if device == "cuda":
        config = SwinConfig(**GIANT, window_size=12, img_size=192, num_classes=0, drop_path_rate=0.1)
        return Scale(config, SimMIMConfig(norm_target=47), 40, ((192, 12, 16, 5), (1536, 32, 1, 3)))
    narrow = {**HUGE, "embed_dim": 32, "num_heads": (1, 2, 4, 8)}
    config = SwinConfig(**narrow, window_size=6, img_size=96, num_classes=0, drop_path_rate=0.1)
    return Scale(config, SimMIMConfig(mask_patch=16, norm_target=47), 30, ((96, 6, 16, 3), (384, 24, 2, 3)))


class Run:
    """One model in training, at more than one size and under changing techniques."""

    def __init__(self, data: str, device: str, seconds: float):
        self.scale, self.device, self.data, self.budget = scale(device), device, data, Budget(seconds)
        self.world = World(0, 1, torch.device(device))
        self.precision = resolve_precision("auto", self.world.device)
        with torch.device("meta"):
            encoder = SwinTransformer(self.scale.model)
        self.task = SimMIM(encoder, self.scale.task)
        say(f"{sum(p.numel() for p in self.task.parameters()):,} parameters, {self.precision} on {device}")
        prepare(self.task, TECHNIQUES["checkpointing, fused"], self.world, self.precision)
        optim = OptimConfig(lr=2e-4, lr_scaling="none", warmup_epochs=5, schedule="constant", weight_decay=0.05)
        self.optimizer = build_optimizer(parameter_groups(self.task, optim), optim)
        self.schedule, self.clip, self.step = Schedule(optim, 1, 1, 10_000), optim.clip_grad, 0
        self.losses: list[float] = []

    def at(self, size: int, window: int) -> SimMIM:
        """The same parameters in a model for another size and window; the position bias keeps its trained scale."""
        if size == self.scale.model.img_size[0]:
            return self.task
        with torch.device("meta"):
            encoder = SwinTransformer(transfer_config(self.scale.model, img_size=size, window_size=window))
        task = SimMIM(encoder, self.scale.task)
        task.load_state_dict(dict(self.task.named_parameters()), assign=True)
        return task

    def batches(self, task: SimMIM, batch_size: int) -> Iterator[dict[str, Any]]:
        """Photographs without end, cropped and masked as in pre-training."""
        recipe = Recipe("giant", task.encoder.config, self.scale.task, DataConfig(self.data, augment="light"))
        images, _ = datasets(recipe, *open_sources(recipe.data, 0, labelled=False))
        loader = EpochLoader(images, batch_size, num_workers=8 if self.device == "cuda" else 0)
        for epoch in itertools.count():
            for batch in loader.batches(epoch):
                yield {n: batch[n].to(self.device, non_blocking=True) for n in ("image", "mask")}

    def train_step(self, task: SimMIM, batch: dict[str, Any]) -> None:
        """Forward and backward pass, clipping, update."""
        self.schedule.apply(self.optimizer, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        task.train()
        with autocast(self.precision, self.world.device):
            loss, _ = task(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), self.clip)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device
        self.step += 1

    def measure(self, place: tuple[int, int, int, int], name: str) -> dict[str, Any]:
        """A few steps under one technique: seconds, peak memory, share of the device's arithmetic, losses."""
        size, window, batch_size, count = place
        task = self.at(size, window)
        arrange(task, TECHNIQUES[name])
        batches, seconds, first = self.batches(task, batch_size), list[float](), len(self.losses)
        row: dict[str, Any] = {"name": name}
        self.optimizer.zero_grad(set_to_none=True)
        free(self.device)
        self._reset_peak()
        try:
            for index in range(count + 1):  # the first one warms up
                batch, start = next(batches), time.perf_counter()
                self.train_step(task, batch)
                seconds += [time.perf_counter() - start] if index else []
        except torch.OutOfMemoryError:
            return row | {"reason": "out of memory"}
        flops = (
            3 * plan(task.encoder.config).flops * batch_size
        )  # a backward pass is two forward passes; recomputing is not work
        return row | {
            "seconds": Spread.of(seconds).as_dict(),
            "flops_per_s": flops / Spread.of(seconds).median,
            "peak_bytes": self._peak(),
            "losses": self.losses[first:],
        }

    def _reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_freed_memory()
            self.before = reset_peak()

    def _peak(self) -> int:
        """On a GPU all that is allocated; on a CPU what a step needs beyond model and optimiser."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else resident_peak() - self.before


def giant(data: str, device: str, seconds: float = 600) -> dict[str, Any]:
    """Trains and measures; returns the section of the results file."""
    run = Run(data, device, seconds)
    size, window, batch_size, _ = run.scale.places[0]
    say(f"training at {size}/{window}, {run.scale.steps} steps of {batch_size} photographs")
    times, batches = [], run.batches(run.task, batch_size)
    for _ in range(run.scale.steps):
        start = time.perf_counter()
        run.train_step(run.task, next(batches))
        times.append(time.perf_counter() - start)
        if len(times) % 10 == 0:
            say(f"step {len(times)}: loss {run.losses[-1]:.4f}")
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in run.task.parameters()),
        "depths": run.scale.model.depths,
        "width": run.scale.model.embed_dim,
        "precision": run.precision,
        "peak": _peak_rate(device),
        "training": {"size": size, "window": window, "batch": batch_size, "losses": list(run.losses), "seconds": times},
        "places": [],
    }
    for place in run.scale.places:
        rows = []
        for name in TECHNIQUES:
            say(f"{place[0]}/{place[1]}, {place[2]} images per step: {name}")
            late = run.budget.left < 20
            rows.append({"name": name, "reason": "no time left"} if late else run.measure(place, name))
            say(str(rows[-1].get("reason") or f"{rows[-1]['seconds']['median']:.3g} s per step"))
        found["places"].append({"size": place[0], "window": place[1], "batch": place[2], "rows": rows})
    losses = found["training"]["losses"] + [v for p in found["places"] for r in p["rows"] for v in r.get("losses", ())]
    found["finite"] = all(map(math.isfinite, losses))
    return found


def _peak_rate(device: str) -> dict[str, Any]:
    """What utilisation is measured against: the data sheet of a GPU that is known, else the fastest matrix product here."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for part, rate in PUBLISHED_PEAKS.items():
            if part in name:
                return {"flops_per_s": rate, "source": f"published for {part}"}
        measured = cast(dict[str, Any], ceilings(shapes("cuda", False), Budget(30)))
        return {"flops_per_s": measured["matmul_flops_per_s"], "source": f"matrix product {measured['matmul_shape']}"}
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(5):
        torch.mm(a, b)
    return {"flops_per_s": 5 * 2 * 2048**3 / (time.perf_counter() - start), "source": "matrix product 2048³ in fp32"}
