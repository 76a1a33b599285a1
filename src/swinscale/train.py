"""A whole training run, in the order in which it happens. One loop for every task, one process or many.

A run directory holds::

    config.json manifest.json   what ran: the resolved recipe; versions, machine, data, effective batch and rates
    log.jsonl  tensorboard/     what happened
    checkpoints/step-…/         from where to go on (exactly)
    best/  last/                config.json + model.safetensors, to use, fine-tune or publish
    result.json                 the final measures
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swinscale.checkpoint import (
    checkpoint_steps,
    claim_directory,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from swinscale.config import check_ranges, to_dict
from swinscale.data.loader import EpochLoader
from swinscale.diagnose.nonfinite import first_non_finite
from swinscale.errors import NonFiniteLoss, UsageError
from swinscale.evaluation import evaluate
from swinscale.manifest import environment, subject
from swinscale.optim import OptimConfig, Schedule, build_optimizer, decay_table, parameter_groups
from swinscale.parallel import Precision, World, autocast, no_sync, resolve_precision, split_batch, world, wrap
from swinscale.runlog import RunLog
from swinscale.seeding import derive_seed
from swinscale.signals import stop_signal
from swinscale.tasks.base import Batch, Task


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large and where a run trains.

    Args:
        epochs: passes over the training set; fractions are allowed.
        batch_size: images per optimiser step, over all processes and micro-batches: results do not depend on how many
            devices share them.
        micro_batch: images per forward pass and process; smaller needs less memory. None: batch_size / processes.
        precision: "auto" is bf16 where the hardware has units for it (fp16 on older GPUs), else fp32.
        num_workers: loader processes; 0 loads in the main process.
        ema_decay: keep an exponential moving average of the weights and evaluate that; 0: off.
        eval_every, checkpoint_every: in epochs; 0: only at the end.
        on_non_finite: when a loss or gradient is not finite: "raise", "skip" the step, or "rewind" to the last
            checkpoint and leave that step out.
    """

    epochs: float = 300
    batch_size: int = 1024
    micro_batch: int | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Precision = "auto"
    device: str = "auto"
    num_workers: int = 2
    seed: int = 0
    ema_decay: float = 0.0
    eval_every: float = 1
    checkpoint_every: float = 1
    keep_checkpoints: int = 2
    log_every: int = 10
    on_non_finite: Literal["raise", "skip", "rewind"] = "raise"
    compile: bool = False

    def __post_init__(self) -> None:
        at_least_1 = dict.fromkeys(("batch_size", "micro_batch", "keep_checkpoints", "log_every"), "[1, inf)")
        at_least_0 = dict.fromkeys(("num_workers", "eval_every", "checkpoint_every"), "[0, inf)")
        check_ranges(self, "train.", epochs="(0, inf)", ema_decay="[0, 1)", **at_least_1, **at_least_0)


# A resumed run may change these. (Another micro_batch, like another number of processes, draws mixup and drops anew.)
MAY_CHANGE = ("micro_batch", "device", "num_workers", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reached."""

    directory: Path
    steps: int
    metrics: dict[str, Any]
    best: float
    seconds: float


def train(
    task: Task,
    train_data: Any,
    eval_data: Any,
    config: TrainConfig,
    directory: Path,
    *,
    record: dict[str, Any] | None = None,
    resume: bool = False,
) -> TrainResult:
    """Trains ``task`` on ``train_data``, evaluates it on ``eval_data`` and leaves everything in ``directory``.

    Args:
        train_data, eval_data: data sets whose items are requested by (epoch, index); see ``swinscale.data``.
        record: the whole recipe, for ``config.json``; a resumed run must have the same but for ``MAY_CHANGE``.
        resume: go on from the newest checkpoint in ``directory``, if there is one.

    Raises:
        UsageError: for settings that cannot work, a directory that holds another run, or a loss that is not finite.
    """
    with world(config.device) as here:
        return _Run(task, train_data, eval_data, config, Path(directory), record or to_dict(config), resume, here).run()


class _Run:
    """The state of one run. ``run`` is the story; the other methods are its steps."""

    def __init__(
        self,
        task: Task,
        train_data: Any,
        eval_data: Any,
        config: TrainConfig,
        directory: Path,
        record: dict[str, Any],
        resume: bool,
        here: World,
    ):
        self.config, self.directory, self.world = config, directory, here
        self.precision = resolve_precision(config.precision, here.device)
        split = split_batch(config.batch_size, config.micro_batch, here.size, len(train_data))
        self.micro_batch, self.accumulate = split
        loader = {"seed": config.seed, "rank": here.rank, "world_size": here.size, "num_workers": config.num_workers}
        self.train_loader = EpochLoader(train_data, self.micro_batch, shuffle=True, drop_last=True, **loader)
        self.eval_loader = EpochLoader(eval_data, self.micro_batch, shuffle=False, drop_last=False, **loader)
        self.steps_per_epoch = len(self.train_loader) // self.accumulate
        self.total_steps = round(config.epochs * self.steps_per_epoch)
        if self.total_steps < 1:
            steps = self.steps_per_epoch
            raise UsageError(f"train.epochs={config.epochs} is less than one step ({steps} make an epoch).")

        self.task = task.to(here.device)
        self.groups = parameter_groups(task, config.optim)
        self.optimizer = build_optimizer(self.groups, config.optim)
        self.schedule = Schedule(config.optim, config.batch_size, self.steps_per_epoch, self.total_steps)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.precision == "fp16")
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.ema = AveragedModel(task, multi_avg_fn=average, use_buffers=True) if config.ema_decay else None
        self.model = wrap(cast(nn.Module, torch.compile(task)) if config.compile else task, here)

        self.step, self.best, self.metrics, self.seconds = 0, math.nan, dict[str, Any](), 0.0
        self.left_out: list[int] = []  # steps whose batch made a non-finite loss
        self.unreadable: dict[str, str] = {}
        if claim_directory(directory, record, resume, here.is_main, MAY_CHANGE):
            self._restore()
        elif here.is_main:
            write_atomically(directory / "manifest.json", json.dumps(self._manifest(), indent=2))
        here.barrier()

    def run(self) -> TrainResult:
        with RunLog(self.directory, self.world.is_main, self.step, self.total_steps) as log, stop_signal() as stopped:
            self.log = log
            log.announce(self._manifest(), self.step)
            batches = self._batches()
            while self.step < self.total_steps:
                started = time.perf_counter()
                finite = self._optimizer_step(batches)
                self.seconds += time.perf_counter() - started
                if not finite and self.config.on_non_finite == "rewind" and self._rewind():
                    batches = self._batches()
                    continue
                self.step += 1
                if self._due(self.config.eval_every):
                    self._evaluate()
                if self._due(self.config.checkpoint_every):
                    self._save()
                if self.world.any(stopped()):
                    self._save()
                    raise KeyboardInterrupt(f"Stopped at step {self.step}; resume to go on from there.")
                if self.step % self.steps_per_epoch == 0:
                    batches = self._batches()
            return self._finish()

    def _batches(self) -> Iterator[Batch]:
        """Micro-batches from the current step to the end of its epoch."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        return iter(self.train_loader.batches(epoch, start_batch=done * self.accumulate))

    def _optimizer_step(self, batches: Iterator[Batch]) -> bool:
        """One update from ``accumulate`` micro-batches. False if loss or gradient was not finite (nothing changed)."""
        micro = [self._to_device(next(batches)) for _ in range(self.accumulate)]
        if self.step in self.left_out:
            return True
        self.model.train()
        rate = self.schedule.apply(self.optimizer, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        started, total, logs = time.perf_counter(), torch.zeros((), device=self.world.device), dict[str, Tensor]()
        for index, batch in enumerate(micro):
            self._seed(index)
            with no_sync(self.model, skip=index + 1 < self.accumulate):
                with autocast(self.precision, self.world.device):
                    loss, logs = self.model(batch)
                self.scaler.scale(loss / self.accumulate).backward()
            total += loss.detach() / self.accumulate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._trainable(), self.config.optim.clip_grad or math.inf)
        mean_loss = self.world.sum(total.item()) / self.world.size
        overflow = self.scaler.is_enabled() and not norm.isfinite()  # the scaler skips this step and lowers its scale
        if not math.isfinite(mean_loss) or not (norm.isfinite() or overflow):
            self._non_finite(micro)
            return False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.task)
        seconds = time.perf_counter() - started
        if (self.step + 1) % self.config.log_every == 0 or self.step + 1 == self.total_steps:
            values = {"loss": mean_loss, "lr": rate, "grad_norm": norm.item(), **{k: v.item() for k, v in logs.items()}}
            values["images_per_second"] = self.config.batch_size / seconds
            values["waiting_for_data"] = self.train_loader.wait_seconds / max(self.seconds, 1e-9)
            values["epoch"] = (self.step + 1) / self.steps_per_epoch
            self.log.scalars(self.step + 1, "train", values)
        self.log.progress(self.step + 1, mean_loss, self.config.batch_size / seconds)
        return True

    def _finish(self) -> TrainResult:
        if not self.metrics:
            self._evaluate()
        if self.step not in checkpoint_steps(self.directory / "checkpoints"):
            self._save()
        self._export("last")  # a kill may have come between the checkpoint and its export
        result = TrainResult(self.directory, self.step, self.metrics, self.best, self.seconds)
        if self.world.is_main:
            plain = {**dataclasses.asdict(result), "directory": str(self.directory), "unreadable": self.unreadable}
            write_atomically(self.directory / "result.json", json.dumps(plain, indent=2))
        self.world.barrier()
        return result

    def _evaluate(self) -> None:
        self.metrics = evaluate(self._averaged(), self.eval_loader, self.precision, self.world.device)
        value = self.metrics[self.task.metric]
        better = value > self.best if self.task.higher_is_better else value < self.best
        self.log.scalars(self.step, "eval", {k: v for k, v in self.metrics.items() if isinstance(v, float)})
        if math.isnan(self.best) or better:
            self.best = value
            self._export("best")

    def _save(self) -> None:
        """Writes a checkpoint and the newest weights. Every process calls it; the main one writes."""
        if self.world.is_main:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "metrics": self.metrics,
                "seconds": self.seconds,
                "left_out": self.left_out,
            }
            home = self.directory / "checkpoints"
            save_checkpoint(home, self.step, self._modules(), state, self.config.keep_checkpoints)
        self._export("last")
        self.world.barrier()

    def _modules(self) -> dict[str, nn.Module]:
        return {"task": self.task} | ({"ema": self.ema} if self.ema is not None else {})

    def _averaged(self) -> Task:
        """The weights that are evaluated and exported."""
        return cast(Task, self.ema.module) if self.ema is not None else self.task

    def _export(self, name: str) -> None:
        if self.world.is_main:
            self._averaged().save_pretrained(self.directory / name)

    def _restore(self) -> None:
        state = load_checkpoint(self.directory / "checkpoints", self._modules(), self.world.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.metrics = state["step"], state["best"], state["metrics"]
        self.seconds, self.left_out = state["seconds"], sorted({*self.left_out, *state["left_out"]})

    def _manifest(self) -> dict[str, Any]:
        return {
            **environment(),
            **subject(self.task, train=self.train_loader.dataset, eval=self.eval_loader.dataset),
            **self.config.optim.in_steps(self.config.batch_size, self.steps_per_epoch),
            "seed": self.config.seed,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulate,
            "processes": self.world.size,
            "total_steps": self.total_steps,
            "precision": self.precision,
            "device": str(self.world.device),
            "parameter_groups": decay_table(self.groups),
        }

    def _non_finite(self, micro: list[Batch]) -> None:
        """States what made the loss non-finite, and follows the policy."""
        cause = None
        for index, batch in enumerate(micro):
            self._seed(index)
            with autocast(self.precision, self.world.device):
                cause = cause or first_non_finite(self.task, partial(self.task, batch))
        text = f"Step {self.step}: the loss or gradient is not finite; {cause or 'every output is finite, a gradient is not'}."
        self.log.event("non_finite", self.step, text)
        self.left_out.append(self.step)
        if self.config.on_non_finite == "raise":
            raise NonFiniteLoss(
                f"{text} The newest checkpoint is intact. Lower train.optim.lr, or set train.on_non_finite=skip or rewind."
            )

    def _seed(self, micro_batch: int) -> None:
        """Stochastic depth and mixup of a micro-batch depend on its place in the run alone."""
        torch.manual_seed(derive_seed(self.config.seed, "step", self.step, micro_batch, self.world.rank))

    def _rewind(self) -> bool:
        """Goes back to the newest checkpoint, if there is one; the step that failed will be left out."""
        if not checkpoint_steps(self.directory / "checkpoints"):
            return False
        self._restore()
        self.log.event("rewound", self.step, f"Back to step {self.step}; step {self.left_out[-1]} will be left out.")
        return True

    def _to_device(self, batch: Batch) -> Batch:
        for name, reason in batch.pop("skipped", ()):
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.log.event("unreadable", self.step, f"{len(self.unreadable)} unreadable so far: {name} ({reason})")
        device = self.world.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.task.parameters() if p.requires_grad]

    def _due(self, every: float) -> bool:
        """Whether something that happens every so many epochs happens after this step."""
        period = max(1, round(every * self.steps_per_epoch)) if every else self.total_steps
        return self.step % period == 0 or self.step == self.total_steps
