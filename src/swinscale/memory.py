"""How much memory a training step takes, before it runs, and what to switch on when it does not fit.

The parts of a task are rehearsed on tensors without memory (``rehearsal.py``). Here what they keep and what they need for a
moment is put together in the order of a real step, for any combination of the techniques in ``MemoryConfig``.

The step is a later one of a run: the optimiser's states exist. Not predicted: ``torch.compile``, under which less is kept, and
"flex" attention, which counts as "eager".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, build_model
from swinscale.models.config import Size
from swinscale.optim import OptimConfig, parameter_groups
from swinscale.parallel import MemoryConfig, Precision, is_sharded
from swinscale.rehearsal import Rehearsal
from swinscale.tasks.base import Batch, Task

WORKSPACE = 64 << 20
"""Bytes that cuBLAS keeps on a GPU: 32 MiB for each of two threads on an H100, less on older ones."""

CARDS = {"16GB": 16e9, "24GB": 24e9, "40GB": 40e9, "48GB": 48e9, "80GB": 80e9, "H200": 141e9, "B200": 180e9}
"""Bytes of common cards."""


def card_bytes(text: str) -> int:
    """Bytes of a card: a name in ``CARDS``, or an amount such as "80GB" (1e9 bytes) or "141GiB" (2**30).

    Raises:
        UsageError: for anything else.
    """
    if text in CARDS:
        return int(CARDS[text])
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", text)
    if not match:
        known = ", ".join(CARDS)
        raise UsageError(
            f"card={text!r} is not a card: give an amount such as 80GB or 74.5GiB, or one of {known}.{suggest(text, CARDS)}"
        )
    return int(float(match[1]) * (10**9 if match[2] == "GB" else 2**30))


def usable(card: int) -> int:
    """Bytes of a card that tensors can have: 1 GB is left to driver and libraries, and 3 % to gaps between tensors."""
    return int(0.97 * card - 1e9)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device in a training step. Not everything is there at the same time: ``peak`` is less than the sum."""

    parameters: int
    """At rest: in fp32, the share of this process."""
    gradients: int
    """When all are there; under DDP always, in the buckets in which they are exchanged."""
    optimizer: int
    """AdamW's two moments."""
    ema: int
    """The moving average of the parameters."""
    copies: int
    """Parameters in use besides those at rest: low-precision copies, or what is gathered from other processes."""
    activations: tuple[int, ...]
    """Kept from the forward for the backward pass, per stage, without ``copies``."""
    rest: int
    """The same outside the stages: patch embedding, head or decoder, loss; and the images of a step."""
    attention: tuple[int, ...]
    """The most that window attention of one block needs at once, per stage: what it keeps, and what it needs for a moment."""
    workspace: int
    """What libraries keep."""
    peak: int
    where: str
    """The part of the step that the peak is in."""
    processes: int
    backends: tuple[str, ...]
    """How attention is computed, per stage."""


@dataclass(frozen=True)
class Advice:
    """Whether a step fits a card, and what to switch on if it does not."""

    card: int
    plan: MemoryPlan
    overrides: tuple[str, ...] = ()
    """What to type after the recipe; empty if the step fits already, or if nothing helps."""
    then: MemoryPlan | None = None
    """The step with ``overrides``; if nothing helps, the smallest there is."""

    @property
    def fits(self) -> bool:
        """Whether the step fits as it is."""
        return self.plan.peak <= usable(self.card)

    def __str__(self) -> str:
        room = f"{usable(self.card) / 1e9:.1f} GB of {self.card / 1e9:.0f} GB are usable"
        if self.fits:
            return f"fits: the peak is {self.plan.peak / 1e9:.1f} GB, {room}"
        text = f"does not fit: the peak is {self.plan.peak / 1e9:.1f} GB, {room}"
        assert self.then is not None
        if self.overrides:
            return f"{text}; with {' '.join(self.overrides)} it is {self.then.peak / 1e9:.1f} GB"
        missing = self.then.peak - usable(self.card)
        return f"{text}; with everything switched on {missing / 1e9:.1f} GB are still missing"


def predict(
    task: Task | SwinConfig,
    *,
    micro_batch: int,
    img_size: int | Size | None = None,
    precision: Precision = "bf16",
    memory: MemoryConfig | None = None,
    processes: int = 1,
    accumulate: int = 1,
    ema: bool = False,
    device: str = "cuda",
) -> MemoryPlan:
    """The memory of one device in a training step.

    Args:
        task: a task, on ``meta`` too; or a model's configuration, for the model alone.
        micro_batch: images per forward pass and process.
        img_size: pixels; None: the model's ``img_size``.
        precision: "fp32", or "bf16" or "fp16" under autocast.
        memory: the techniques. "auto" attention on "cuda" is that of a GPU which runs the fused kernels (``ops.fused``).
        accumulate: forward passes per step.
        ema: whether an average of the weights is kept.
        device: "cuda" or "cpu", whichever this machine has.

    Raises:
        UsageError: for settings that the model or the number of processes cannot follow.
    """
    predictor = Predictor(task, micro_batch=micro_batch, img_size=img_size, precision=precision, device=device)
    return predictor.plan(memory or MemoryConfig(), processes=processes, accumulate=accumulate, ema=ema)


def advise(
    task: Task | SwinConfig,
    card: int,
    *,
    micro_batch: int,
    img_size: int | Size | None = None,
    precision: Precision = "bf16",
    memory: MemoryConfig | None = None,
    processes: int = 1,
    accumulate: int = 1,
    ema: bool = False,
) -> Advice:
    """Whether a training step fits a GPU of ``card`` bytes, and the cheapest way to make it fit; else as ``predict``."""
    predictor = Predictor(task, micro_batch=micro_batch, img_size=img_size, precision=precision)
    return predictor.advise(card, memory or MemoryConfig(), processes=processes, accumulate=accumulate, ema=ema)


class Predictor:
    """``predict`` and ``advise`` for many settings of one task, size and precision: what they share is measured once."""

    def __init__(
        self,
        task: Task | SwinConfig,
        *,
        micro_batch: int,
        img_size: int | Size | None = None,
        precision: Precision = "bf16",
        device: str = "cuda",
    ):
        if precision not in ("fp32", "bf16", "fp16"):
            raise UsageError(f"precision={precision!r}: memory is predicted for fp32, bf16 and fp16. Name one of them.")
        if device not in ("cuda", "cpu"):
            raise UsageError(f"device={device!r}: memory is predicted for cuda and cpu. Name one of them.")
        if isinstance(task, SwinConfig):
            with torch.device("meta"):
                task = _Alone(build_model(task))
        self.task, self.micro_batch, self.precision, self.device = task, micro_batch, precision, device
        self._others: dict[int, Predictor] = {}
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        size = (img_size,) * cast(Any, task.backbone).config.rank if isinstance(img_size, int) else img_size
        self.rehearsal = Rehearsal(task, size, micro_batch, dtype, device)

    @cached_property
    def sizes(self) -> list[int]:
        """Parameters of each unit, and last of everything else."""
        units = [sum(p.numel() for p in u.parameters()) for u in self.rehearsal.units]
        return [*units, sum(p.numel() for p in self.task.parameters()) - sum(units)]

    @cached_property
    def learned(self) -> list[int]:
        """The same without what is frozen."""
        units = [sum(p.numel() for p in u.parameters() if p.requires_grad) for u in self.rehearsal.units]
        return [*units, sum(p.numel() for p in self.task.parameters() if p.requires_grad) - sum(units)]

    @cached_property
    def updated_at_once(self) -> tuple[int, int]:
        """Values in the largest parameter, and in the largest of the groups that AdamW updates together."""
        groups = [[p.numel() for p in g["params"]] for g in parameter_groups(self.task, OptimConfig())]
        return max(map(max, groups)), max(map(sum, groups))

    def plan(self, memory: MemoryConfig, *, processes: int = 1, accumulate: int = 1, ema: bool = False) -> MemoryPlan:
        """The memory of a step with ``memory``; else as ``predict``."""
        return _Step(self, memory, processes, accumulate, ema).plan()

    def advise(
        self, card: int, memory: MemoryConfig, *, processes: int = 1, accumulate: int = 1, ema: bool = False
    ) -> Advice:
        """Whether a step fits ``card`` bytes, and if not, the settings that cost least speed and make it fit.

        A smaller micro-batch is tried where all techniques on the GPU together do not suffice, and the CPU's memory last.
        """
        now = self.plan(memory, processes=processes, accumulate=accumulate, ema=ema)
        room, images = usable(card), accumulate * self.micro_batch
        if now.peak <= room:
            return Advice(card, now)

        def peak_of(micro: int, changed: MemoryConfig) -> MemoryPlan:
            return self.at(micro).plan(changed, processes=processes, accumulate=-(-images // micro), ema=ema)

        least = now
        for offload in (False, True):
            ways = [w for w in _cheapest_first(memory, now, processes) if w[0].offload == (offload or memory.offload)]
            if not ways:
                continue
            micro, most = self.micro_batch, ways[-1][0]
            whole, single = (peak_of(m, most) for m in (micro, 1))
            least = min(least, whole, single, key=lambda plan: plan.peak)
            if single.peak > room:
                continue
            # Activations grow with the micro-batch in proportion; what the line promises is then checked.
            slope = (whole.peak - single.peak) / max(micro - 1, 1)
            while micro > 1 and (single.peak + slope * (micro - 1) > room or peak_of(micro, most).peak > room):
                micro //= 2
            for changed, overrides in ways:
                then = peak_of(micro, changed)
                if then.peak <= room:
                    smaller = [f"train.micro_batch={micro}"] if micro < self.micro_batch else []
                    return Advice(card, now, (*overrides, *smaller), then)
        return Advice(card, now, (), least)

    def at(self, micro_batch: int) -> Predictor:
        """The same for another micro-batch."""
        if micro_batch == self.micro_batch:
            return self
        if micro_batch not in self._others:
            size = self.rehearsal.size
            more = {"img_size": size, "precision": self.precision, "device": self.device}
            self._others[micro_batch] = Predictor(self.task, micro_batch=micro_batch, **cast(Any, more))
        return self._others[micro_batch]


class _Alone(Task):
    """A model without an objective: something to differentiate at its output."""

    def __init__(self, model: SwinTransformer):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(batch["image"]).float().mean(), {}

    @property
    def backbone(self) -> nn.Module:
        return self.model

    @property
    def num_layers(self) -> int:
        return self.model.config.num_layers

    def layer_id(self, name: str) -> int:
        return self.model.config.layer_id(name.removeprefix("model."))


class _Step:
    """Walks through one step and notes where the sum of everything is largest."""

    def __init__(self, of: Predictor, memory: MemoryConfig, processes: int, accumulate: int, ema: bool):
        group, rest = divmod(processes, memory.replicas)
        if rest:
            raise UsageError(f"train.memory.replicas={memory.replicas} does not divide the {processes} processes.")
        self.of, self.memory, self.processes, self.accumulate = of, memory, processes, accumulate
        self.sharded = memory.shard != "none"
        stages = len(of.rehearsal.config.depths)
        attention = _per_stage("attention", memory.attention, stages)
        self.backends = tuple(of.rehearsal.backend(name, stage) for stage, name in enumerate(attention))
        self.modes = _per_stage("checkpointing", memory.checkpointing, stages)

        def share(size: float) -> int:
            """Bytes here of what is spread over processes, or moved to the CPU."""
            return 0 if memory.offload else int(size / (group if self.sharded else 1))

        total, learned, cuda = sum(of.sizes), sum(of.learned), of.device == "cuda"
        largest, at_once = of.updated_at_once
        eight = memory.optimizer_bits == 8  # a byte per value, and a scale in fp32 for each block of 256
        self.parameters, self.gradients = share(4 * total), share(4 * learned)
        self.ema = self.parameters if ema else 0
        self.optimizer = share(2 * learned * (1 + 4 / 256) if eight else 8 * learned)
        # AdamW's temporary: on GPUs the square roots for a group, else two tensors for one parameter.
        self.update = share(4 * at_once if cuda and not eight else 8 * largest)
        # Gradients that are there from the beginning: under DDP they live in its buckets, which stay; else those of earlier
        # passes, which zero1 exchanges, and so cuts up, at the last pass only.
        self.waiting = self.gradients if processes > 1 and not self.sharded else 0
        if accumulate > 1:
            self.waiting = 4 * learned if memory.shard == "zero1" else self.gradients
        self.workspace = WORKSPACE if cuda else 0
        self.width = 4 if of.precision == "fp32" else 2
        self.peak, self.where = 0, ""

    def note(self, amount: int, where: str) -> None:
        if amount > self.peak:
            self.peak, self.where = amount, where

    def gathered(self, index: int | None, forward: bool) -> int:
        """Bytes of whole parameters while a unit runs; those of the next one are under way."""
        if not self.sharded:
            return 0
        *units, rest = self.of.sizes
        index = len(units) - 1 if index is None else index
        following = index + 1 if forward else index - 1
        coming = units[following] if 0 <= following < len(units) else 0
        if self.memory.shard == "zero3":
            return self.width * (rest + units[index] + coming)
        if self.memory.shard == "zero1" and self.accumulate > 1:
            return self.width * (rest + sum(units))
        return self.width * (rest + sum(units[: index + 1]) + (coming if forward else 0))

    def plan(self) -> MemoryPlan:
        run, learned = self.of.rehearsal, self.of.learned
        frame = run.frame(self.sharded)
        units = [run.unit(i, self.modes[s], self.backends[s], self.sharded) for i, s in enumerate(run.stages)]
        batches = (self.accumulate - 1) * frame.batch  # all of a step are on the device from its beginning
        always = self.parameters + self.optimizer + self.ema + self.workspace + batches + frame.constants

        held = cached = copies = 0
        for moment in frame.forward:
            whole = self.gathered(moment.unit, True)
            now = always + self.waiting + held + cached + whole
            copies = max(copies, whole)
            if moment.unit is None:
                self.note(now + moment.peak, "forward pass, head and loss")
                break
            unit = units[moment.unit]
            self.note(now + moment.peak, "forward pass, between blocks")
            self.note(now + moment.live + unit.forward, f"forward pass, {run.names[moment.unit]}")
            held, cached = held + unit.saved, cached + unit.cached
        copies = copies or cached + sum(u.copies for u in units)

        made = exchanged = 0
        waiting, late = self.waiting, self.memory.shard == "zero1"
        for moment in frame.backward:
            apart = not self.waiting or late  # gradients are not added to those that are there
            now = always + waiting + held + exchanged + self.gathered(moment.unit, False) + (made if apart else 0)
            peak = moment.peak_with_grads if apart else moment.peak
            if moment.unit is None:
                self.note(now + peak, "backward pass, patch embedding")
                break
            part = "between blocks" if made else "head and loss"
            self.note(now + peak, f"backward pass, {part}")
            now += moment.grads if apart else 0
            unit, count = units[moment.unit], learned[moment.unit]
            added = not self.waiting or self.sharded  # else gradients are added to those that are there
            peak = unit.backward_with_grads if added else unit.backward
            self.note(now + moment.live + peak, f"backward pass, {run.names[moment.unit]}")
            share = self.gradients * count // max(sum(learned), 1)
            held -= unit.saved
            if self.sharded:  # for a moment the gradients are there as they were made, and in fp32 to be exchanged
                as_made = 0 if self.waiting and late else self.width * count
                sums = share if self.waiting and not late else 0  # before they are added to those of earlier passes
                now = now - unit.saved + moment.live + as_made + 4 * count + sums
                self.note(now, f"exchange of gradients, {run.names[moment.unit]}")
                exchanged = 4 * count
            if late and self.waiting:
                waiting -= 4 * count
            made += share

        gradients = max(self.gradients, self.waiting)
        self.note(always + gradients + self.update, "optimiser step")
        stages = range(len(self.modes))
        return MemoryPlan(
            parameters=self.parameters,
            gradients=gradients,
            optimizer=self.optimizer,
            ema=self.ema,
            copies=copies,
            activations=tuple(
                sum(u.saved - u.copies for u, s in zip(units, run.stages, strict=True) if s == t) for t in stages
            ),
            rest=frame.saved + batches,
            attention=tuple(max(u.attention for u, s in zip(units, run.stages, strict=True) if s == t) for t in stages),
            workspace=self.workspace,
            peak=self.peak,
            where=self.where,
            processes=self.processes,
            backends=self.backends,
        )


def _per_stage(setting: str, value: str | tuple[str, ...], stages: int) -> list[str]:
    values = [value] * stages if isinstance(value, str) else list(value)
    if len(values) != stages:
        raise UsageError(f"train.memory.{setting}={value}: give one value, or {stages}, one per stage.")
    return values


def _cheapest_first(
    memory: MemoryConfig, plan: MemoryPlan, processes: int
) -> Iterator[tuple[MemoryConfig, tuple[str, ...]]]:
    """All combinations of techniques that ``memory`` does not use yet, those that cost least speed first, as overrides too.

    The costs rank: selective and whole checkpointing, sequential attention where logits dominate and no fused kernel runs,
    sharding, 8-bit moments, offloading.
    """
    stages = len(plan.backends)
    modes = ["none", "selective", "block"]
    given = _per_stage("checkpointing", memory.checkpointing, stages)
    checkpointing: list[tuple[int, dict[str, Any]]] = [(0, {})] + [
        (cost, {"checkpointing": mode})
        for cost, mode in enumerate(modes)
        if cost and any(modes.index(g) < cost for g in given) and all(modes.index(g) <= cost for g in given)
    ]
    logits = [
        backend in ("sdpa", "eager") and 4 * size > max(plan.attention)
        for backend, size in zip(plan.backends, plan.attention, strict=True)
    ]
    names = _per_stage("attention", memory.attention, stages)
    sequential = tuple("sequential" if heavy else name for heavy, name in zip(logits, names, strict=True))
    attention = [(0, {}), *([(3, {"attention": sequential})] if any(logits) else [])]
    levels = ["none", "zero1", "zero2", "zero3"]
    stronger = levels[levels.index(memory.shard) + 1 :]
    sharding = [(0, {}), *((levels.index(level) + 3, {"shard": level}) for level in stronger)]
    bits = [(0, {}), *([(7, {"optimizer_bits": 8})] if memory.optimizer_bits == 32 else [])]
    offload = [(0, {}), *([(24, {"offload": True})] if not memory.offload else [])]
    combinations = []
    for choice in product(checkpointing, attention, sharding, bits, offload):
        changes: dict[str, Any] = {name: value for _, change in choice for name, value in change.items()}
        shard = changes.get("shard", memory.shard)
        if changes.get("offload") and shard == "none":
            continue
        if "shard" in changes and processes == 1 and not (changes.get("offload") or memory.offload):
            continue
        if changes:
            combinations.append((sum(cost for cost, _ in choice), changes))
    for _, changes in sorted(combinations, key=lambda c: c[0]):
        yield replace(memory, **changes), tuple(_override(name, value) for name, value in changes.items())


def _override(name: str, value: Any) -> str:
    """As typed in a shell."""
    if isinstance(value, tuple):
        return f'train.memory.{name}="{value}"'.replace(" ", "")
    return f"train.memory.{name}={value}"


def advice_after_out_of_memory(
    task: Task,
    *,
    img_size: int | Size | None,
    micro_batch: int,
    precision: Precision,
    memory: MemoryConfig,
    processes: int = 1,
    accumulate: int = 1,
    ema: bool = False,
    device: torch.device | None = None,
) -> str:
    """What to say when a GPU's memory did not suffice: one or two sentences with settings to type. Never raises.

    Args:
        device: the GPU (default: the current one); else as ``predict``. A task whose parameters are spread over processes
            counts without its head or decoder.
    """
    general = (
        "Out of memory. Set train.memory.checkpointing=block or a smaller train.micro_batch; "
        "'swinscale show RECIPE --gpus N' predicts what each setting saves."
    )
    try:
        card = int(torch.cuda.get_device_properties(device or "cuda").total_memory)
        of = cast(Any, task.backbone).config if is_sharded(task) else task
        predictor = Predictor(of, micro_batch=micro_batch, img_size=img_size, precision=precision)
        settings = {"processes": processes, "accumulate": accumulate, "ema": ema}
        now = predictor.plan(memory, **cast(Any, settings))
        # It did not fit, whatever was predicted: something else may be on the card.
        advice = predictor.advise(min(card, int(0.9 * now.peak)), memory, **cast(Any, settings))
    except Exception:  # the user must see that memory ran out, not why a prediction failed
        return general
    assert advice.then is not None
    peak = f"Out of memory: the predicted peak is {now.peak / 1e9:.1f} GB of {card / 1e9:.1f} GB."
    if not advice.overrides:
        return f"{peak} No setting makes it much smaller (least: {advice.then.peak / 1e9:.1f} GB): use more or larger GPUs."
    return f"{peak} With {' '.join(advice.overrides)} it is {advice.then.peak / 1e9:.1f} GB."
