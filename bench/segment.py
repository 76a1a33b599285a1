"""``python -m bench segment``: speed and memory of UPerNet, ours beside transformers' with the same weights, and one without a Swin."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import segment_runs, tables
from bench.cases import DTYPES, TOLERANCE, distance, give_back_freed_memory, own_process, reset_peak, resident_peak
from bench.contenders import Cannot
from bench.progress import say
from bench.segmenters import CLASSES, CONTENDERS, OURS, SAME, build, heads
from bench.speed import Row, compared, speed_table

MODES = ("training", "inference")
BATCH = {"training": 2, "inference": 1}
"""Images per call by default. One alone has no batch statistics where a map is pooled to one cell: transformers refuses it."""
KEYS = ("device", "threads", "mode", "dtype", "size", "batch")
"""What a result is the result of."""
Found = tuple[Tensor, float | None]


@dataclass(frozen=True)
class Speed:
    """One measurement: ``CONTENDERS`` on one batch of random images. JSON-ready, for a process of its own.

    Args:
        mode: "training" (forward, backward, AdamW step) or "inference" (up to the class of each pixel).
        dtype: "fp32", or another of ``DTYPES`` under autocast.
        size: side of the images.
        tiny: small networks, to try the code.
    """

    mode: str
    dtype: str = "fp32"
    device: str = "cpu"
    size: int = 512
    batch: int = 2
    tiny: bool = False

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, size, size), and the class of each pixel."""
        draw = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=draw)
        target = torch.randint(CLASSES, (self.batch, self.size, self.size), generator=draw)
        return images.to(self.device), target.to(self.device)

    def build(self, name: str) -> nn.Module:
        """One of ``CONTENDERS`` in the mode that is measured."""
        return build(name, self.tiny).to(self.device).train(self.mode == "training")


class Runner:
    """A segmenter as something to call: one training step, or one look at the batch."""

    def __init__(self, speed: Speed, model: nn.Module):
        self.speed, self.model = speed, model
        self.images, self.target = speed.inputs()
        if speed.mode == "training":
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

    def __call__(self, index: int) -> Tensor:
        """Training: the loss. Inference: the class of each pixel (B, H, W)."""
        if self.speed.mode == "inference":
            with torch.inference_mode(), self._autocast():
                return self.model(self.images).argmax(1)
        loss = self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def check(self) -> Found:
        """What must be the same for the same weights: the logits; or the loss, with the norm of all gradients."""
        if self.speed.mode == "inference":
            with torch.inference_mode(), self._autocast():
                return self.model(self.images).float(), None
        loss = self._backward()
        norms = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return loss, torch.stack(norms).norm().item()

    def _backward(self) -> Tensor:
        with self._autocast():
            losses: dict[str, Tensor] = self.model.losses(self.images, self.target)
            loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.speed.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.speed.device, DTYPES[self.speed.dtype])


def measure(speed: Speed, repeats: int, memory: bool) -> Row:
    """Everybody on the same batch in alternation, after those with the same weights have given the same numbers."""
    threads = torch.get_num_threads()
    say(f"{speed.mode} {speed.dtype}, {speed.batch} × {speed.size}×{speed.size}, {threads} threads")
    expected: dict[str, Found] = {}
    rows = compared(
        CONTENDERS,
        lambda name: _prepared(speed, name, expected, memory),
        ours=OURS,
        device=speed.device,
        batch=speed.batch,
        repeats=repeats,
        warm_up=int(speed.mode == "training"),  # everybody has made a call, but no step
        memory=(lambda name: peak_memory(speed, name)) if memory and speed.device == "cpu" else None,
    )
    shape = {"threads": threads, "classes": CLASSES, "channels": heads(speed.tiny).channels}
    return {**dataclasses.asdict(speed), **shape, "contenders": rows}


def _prepared(speed: Speed, name: str, expected: dict[str, Found], memory: bool) -> tuple[Runner, Row]:
    """A contender after its first call, and what that showed; on a GPU also its memory while it runs alone.

    Args:
        expected: what the first of ours gave, which this fills in.
    """
    gpu = speed.device == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    model = speed.build(name)
    start = time.perf_counter()
    runner = Runner(speed, model)
    found = runner.check()
    if gpu:
        torch.cuda.synchronize()
    row: Row = {"first_batch_s": round(time.perf_counter() - start, 3)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    if name == OURS[0]:
        expected[name] = found
    elif name in SAME:
        if OURS[0] not in expected:
            raise Cannot(f"{OURS[0]} gave nothing to compare with")
        row["difference"] = float(f"{distance(found, expected[OURS[0]]):.3g}")
        if row["difference"] > TOLERANCE[speed.dtype]:
            raise Cannot(f"outputs differ by {row['difference']:.2g}")
    if gpu and memory:
        runner(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        runner(1)
        torch.cuda.synchronize()
        row["memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return runner, row


def peak_memory(speed: Speed, name: str) -> int | None:
    """Bytes by which one contender's peak rises above its built model, alone in a fresh process; None if that failed."""
    found = own_process({"segmenter": name, **dataclasses.asdict(speed)})
    return found["bytes"] if found else None


def run_alone(spec: dict[str, Any]) -> dict[str, Any]:
    """What ``peak_memory`` runs in its own process."""
    spec = dict(spec)
    torch.set_num_threads(spec.pop("threads"))
    name, speed = spec.pop("segmenter"), Speed(**spec)
    model = speed.build(name)
    gc.collect()
    give_back_freed_memory()
    before = reset_peak()
    runner = Runner(speed, model)
    for index in range(2 if speed.mode == "training" else 1):  # a second step has the optimizer's moments
        runner(index)
    return {"bytes": resident_peak() - before}


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
