"""Models of a task as something to call, a training step or one look; checked, timed side by side, and alone for their memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.cases import DTYPES, TOLERANCE, distance, give_back_freed_memory, own_process, reset_peak, resident_peak
from bench.contenders import Cannot
from bench.progress import say
from bench.speed import Row, compared

Found = tuple[Tensor, float | None]


@dataclass(frozen=True)
class Speed:
    """One measurement: contenders on one batch of random inputs. JSON-ready, for a process of its own.

    Args:
        mode: "training" (forward, backward, AdamW step) or "inference" (up to the class).
        dtype: "fp32", or another of ``DTYPES`` under autocast.
        size: side of the images.
        tiny: small networks, to try the code.

    Attributes:
        kind: a word for these models, by which ``alone`` knows them.
        contenders: who is compared.
        ours: whose times everybody's are divided by; the first has the weights.
        same: who has the weights of the first of ours, and must give the same numbers.
    """

    kind: ClassVar[str]
    contenders: ClassVar[tuple[str, ...]]
    ours: ClassVar[tuple[str, ...]]
    same: ClassVar[tuple[str, ...]]

    mode: str
    dtype: str = "fp32"
    device: str = "cpu"
    size: int = 224
    batch: int = 2
    tiny: bool = False

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the model reads, and what it should find."""
        raise NotImplementedError

    def build(self, name: str) -> nn.Module:
        """One of ``contenders``: ``model(inputs)`` gives logits (B, K, …), ``model.losses(inputs, target)`` losses by name.

        Raises:
            Cannot: with the reason.
        """
        raise NotImplementedError

    def ready(self, name: str) -> nn.Module:
        """``build`` on the device, in the mode that is measured."""
        return self.build(name).to(self.device).train(self.mode == "training")

    @property
    def shape(self) -> str:
        """Of a batch, for the line that says what is measured."""
        return f"{self.batch} × {self.size}×{self.size}"


class Runner:
    """A model as something to call: one training step, or one look at the batch."""

    def __init__(self, speed: Speed, model: nn.Module):
        self.speed, self.model = speed, model
        self.images, self.target = speed.inputs()
        if speed.mode == "training":
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

    def __call__(self, index: int) -> Tensor:
        """Training: the loss. Inference: the class of each image, pixel or clip."""
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


class Classifier(nn.Module):
    """A classifier as ``Runner`` calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, …) → logits (B, K)."""
        logits: Tensor = self.model(images)
        return logits

    def losses(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy."""
        return {"loss": nn.functional.cross_entropy(self(images).float(), target)}


def measure(speed: Speed, repeats: int, memory: bool) -> Row:
    """Everybody on the same batch in alternation, after those with the same weights have given the same numbers."""
    threads = torch.get_num_threads()
    say(f"{speed.mode} {speed.dtype}, {speed.shape}, {threads} threads")
    expected: dict[str, Found] = {}
    rows = compared(
        speed.contenders,
        lambda name: _prepared(speed, name, expected, memory),
        ours=speed.ours,
        device=speed.device,
        batch=speed.batch,
        repeats=repeats,
        warm_up=int(speed.mode == "training"),  # everybody has made a call, but no step
        memory=(lambda name: peak_memory(speed, name)) if memory and speed.device == "cpu" else None,
    )
    return {**dataclasses.asdict(speed), "threads": threads, "contenders": rows}


def _prepared(speed: Speed, name: str, expected: dict[str, Found], memory: bool) -> tuple[Runner, Row]:
    """A contender after its first call, and what that showed; on a GPU also its memory while it runs alone.

    Args:
        expected: what the first of ours gave, which this fills in.
    """
    gpu, first = speed.device == "cuda", speed.ours[0]
    before = torch.cuda.memory_allocated() if gpu else 0
    model = speed.ready(name)
    start = time.perf_counter()
    runner = Runner(speed, model)
    found = runner.check()
    if gpu:
        torch.cuda.synchronize()
    row: Row = {"first_batch_s": round(time.perf_counter() - start, 3)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    if name == first:
        expected[name] = found
    elif name in speed.same:
        if first not in expected:
            raise Cannot(f"{first} gave nothing to compare with")
        row["difference"] = float(f"{distance(found, expected[first]):.3g}")
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
    found = own_process({speed.kind: name, **dataclasses.asdict(speed)})
    return found["bytes"] if found else None


def run_alone(kind: type[Speed], spec: dict[str, Any]) -> dict[str, Any]:
    """What ``peak_memory`` runs in its own process."""
    spec = dict(spec)
    torch.set_num_threads(spec.pop("threads"))
    name, speed = spec.pop(kind.kind), kind(**spec)
    model = speed.ready(name)
    gc.collect()
    give_back_freed_memory()
    before = reset_peak()
    runner = Runner(speed, model)
    for index in range(2 if speed.mode == "training" else 1):  # a second step has the optimizer's moments
        runner(index)
    return {"bytes": resident_peak() - before}
