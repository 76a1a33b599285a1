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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swinscale.checkpoint import (
    Checkpoints,
    alone_in,
    checkpoint_steps,
    claim_directory,
    compress_again,
    restore_training,
    training_state,
    write_atomically,
)
from swinscale.config import to_dict
from swinscale.data.loader import EpochLoader
from swinscale.diagnose.instrument import Instrument, View, watch_evaluation, watched_update
from swinscale.diagnose.nonfinite import first_non_finite
from swinscale.errors import NonFiniteLoss, Stopped, UsageError
from swinscale.evaluation import evaluate, to_device
from swinscale.failures import explain
from swinscale.manifest import broken_data, changed_data, describe_run
from swinscale.optim import Schedule, build_optimizer, parameter_groups
from swinscale.parallel import (
    World,
    autocast,
    gather,
    is_sharded,
    micro_batch,
    prepare,
    release,
    resolve_precision,
    split_batch,
    whole,
    world,
)
from swinscale.runlog import RunLog
from swinscale.seeding import derive_seed
from swinscale.signals import STOPPING, stop_signal
from swinscale.tasks.base import Batch, Task
from swinscale.train_config import MAY_CHANGE, TrainConfig


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
    instruments: Sequence[Instrument] = (),
) -> TrainResult:
    """Trains ``task`` on ``train_data``, evaluates it on ``eval_data`` and leaves everything in ``directory``.

    Args:
        train_data, eval_data: data sets whose items are requested by (epoch, index); see ``swinscale.data``.
        record: the whole recipe, for ``config.json``; a resumed run must have the same but for ``MAY_CHANGE``.
        resume: go on from the newest checkpoint in ``directory``, if there is one.
        instruments: what watches the run and changes nothing in it; see ``swinscale.diagnose.instrument``.

    Raises:
        UsageError: for settings that cannot work, a directory that holds another run, or a loss that is not finite.
        Stopped: after a signal; the run can be resumed.
    """
    directory = Path(directory)
    with world(config.device, config.memory.shard != "none") as here, alone_in(directory, here):
        try:
            return _Run(task, train_data, eval_data, config, directory, record, resume, instruments, here).run()
        except RuntimeError as error:
            explained = explain(error, task, config, here, directory)
            if explained is None:
                raise
            raise explained from error


class _Run:
    """The state of one run. ``run`` is the story; the other methods are its steps."""

    def __init__(
        self,
        task: Task,
        train_data: Any,
        eval_data: Any,
        config: TrainConfig,
        directory: Path,
        record: dict[str, Any] | None,
        resume: bool,
        instruments: Sequence[Instrument],
        here: World,
    ):
        self.config, self.directory, self.instruments, self.world = config, directory, instruments, here
        self.precision = resolve_precision(config.precision, here.device)
        self.accumulate = split_batch(config.batch_size, config.micro_batch, here.size, len(train_data))
        loader = {"seed": config.seed, "rank": here.rank, "world_size": here.size, "num_workers": config.num_workers}
        whole_batch = {"batch_size": config.batch_size, "micro_batches": self.accumulate}
        self.train_loader = EpochLoader(train_data, **whole_batch, shuffle=True, drop_last=True, **loader)
        at_once = math.ceil(config.batch_size / self.accumulate)
        self.eval_loader = EpochLoader(eval_data, at_once, shuffle=False, drop_last=False, **loader)
        self.steps_per_epoch = len(self.train_loader)
        self.total_steps = round(config.epochs * self.steps_per_epoch)
        if self.total_steps < 1:
            steps = self.steps_per_epoch
            raise UsageError(f"train.epochs={config.epochs} is less than one step ({steps} make an epoch).")

        average = get_ema_multi_avg_fn(config.ema_decay)
        self.ema = AveragedModel(task, multi_avg_fn=average, use_buffers=True) if config.ema_decay else None
        place = (config.memory, here, self.precision, config.compile, derive_seed(config.seed, "weights"))
        self.task, self.model = task, prepare(task, *place)
        if self.ema is not None:
            prepare(cast(Task, self.ema.module), *place, average=True)
        self.groups = parameter_groups(task, config.optim)
        self.optimizer = build_optimizer(self.groups, config.optim, config.memory.optimizer_bits)
        self.schedule = Schedule(config.optim, config.batch_size, self.steps_per_epoch, self.total_steps)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.precision == "fp16")
        self.checkpoints = Checkpoints(directory / "checkpoints", here, config.keep_checkpoints)

        self.step, self.stop, self.best, self.metrics, self.seconds = 0, 0, math.nan, dict[str, Any](), 0.0
        self.left_out: list[int] = []  # steps whose batch made a non-finite loss
        self.warnings: list[tuple[str, str]] = []  # from before there is a log
        self.asked_to_stop: Callable[[], int] = int  # the number of the signal that asked, or 0
        if claim_directory(directory, record or to_dict(config), resume, here.is_main, MAY_CHANGE):
            self._restore()
            self.warnings += changed_data(self)
        elif here.is_main:
            write_atomically(directory / "manifest.json", json.dumps(describe_run(self), indent=2))
        self.warnings += broken_data(train=train_data, eval=eval_data)
        here.barrier()

    def run(self) -> TrainResult:
        with RunLog(self.directory, self.world.is_main, self.step, self.total_steps) as log, stop_signal() as asked:
            self.log, self.asked_to_stop = log, asked
            log.announce(describe_run(self), self.step)
            for kind, text in self.warnings:
                log.event(kind, self.step, text)
            batches = self._batches()
            while self.step < self.total_steps:
                self.began = time.perf_counter()
                finite = self._optimizer_step(batches)
                self.seconds += time.perf_counter() - self.began
                if not finite and self.config.on_non_finite == "rewind" and self._rewind():
                    batches = self._batches()
                    continue
                self.step += 1
                if self._due(self.config.eval_every):
                    self._evaluate()
                if self.stop or self._due(self.config.checkpoint_every):
                    self._save(final=self.stop > 0)
                if self.stop:
                    raise Stopped(f"Stopped at step {self.step}; resume to go on from there.", self.stop)
                if self.step % self.steps_per_epoch == 0:
                    batches = self._batches()
            return self._finish()

    def _batches(self) -> Iterator[Batch]:
        """Micro-batches from the current step to the end of its epoch."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        return iter(self.train_loader.batches(epoch, start_batch=done))

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
            share = len(batch["index"]) / self.config.batch_size
            with micro_batch(self.model, self.config.memory, last=index + 1 == self.accumulate):
                with autocast(self.precision, self.world.device):
                    loss, logs = self.model(batch)
                # Gradients are averaged over processes: the factor makes a sum of it.
                self.scaler.scale(loss * (share * self.world.size)).backward()
            total += loss.detach() * share
        self.scaler.unscale_(self.optimizer)
        trainable = [p for p in self.task.parameters() if p.requires_grad]
        norm = whole(nn.utils.clip_grad_norm_(trainable, self.config.optim.clip_grad or math.inf))
        mean_loss, self.stop = self._agree(total.item())
        overflow = self.scaler.is_enabled() and not norm.isfinite()  # the scaler skips this step and lowers its scale
        if not math.isfinite(mean_loss) or not (norm.isfinite() or overflow):
            self._non_finite(micro)
            return False
        clip = min(1.0, (self.config.optim.clip_grad or math.inf) / (norm.item() + 1e-6))  # as clip_grad_norm_ does
        with watched_update(() if overflow else self.instruments, self._view(micro[-1], rate, clip), self.log.reading):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.task)
        done, speed = self.step + 1, self.config.batch_size / (time.perf_counter() - started)
        waiting = self.train_loader.wait_seconds / (self.seconds + time.perf_counter() - self.began)
        if done % self.config.log_every == 0 or done == self.total_steps:
            values = {"loss": mean_loss, "lr": rate, "grad_norm": norm.item(), **{k: v.item() for k, v in logs.items()}}
            values |= {"images_per_second": speed, "waiting_for_data": waiting, "epoch": done / self.steps_per_epoch}
            self.log.scalars(done, "train", values)
        self.log.progress(done, mean_loss, speed, waiting)
        return True

    def _agree(self, loss: float) -> tuple[float, int]:
        """The mean loss, and the largest number of a signal that asked any process to stop, in one exchange."""
        asked = self.asked_to_stop()
        mean, *counts = self.world.sums(loss, *(float(asked == s) for s in STOPPING))
        return mean, max((int(s) for s, count in zip(STOPPING, counts, strict=True) if count), default=0)

    def _finish(self) -> TrainResult:
        if not self.metrics:
            self._evaluate()
        self._written(self.checkpoints.finish(), final=False)  # only now do all processes see the same directories
        if self.world.any(self.step not in checkpoint_steps(self.directory / "checkpoints")):
            self._save(final=True)
        self._export("last", final=True)  # a kill may have come between the checkpoint and its export
        result = TrainResult(self.directory, self.step, self.metrics, self.best, self.seconds)
        if self.world.is_main:
            plain = {**dataclasses.asdict(result), "directory": str(self.directory), "unreadable": self.log.unreadable}
            write_atomically(self.directory / "result.json", json.dumps(plain, indent=2))
        self.world.barrier()
        return result

    def _evaluate(self) -> None:
        self.metrics = evaluate(self._averaged(), self.eval_loader, self.precision, self.world.device)
        value = self.metrics[self.task.metric]
        better = value > self.best if self.task.higher_is_better else value < self.best
        self.log.scalars(self.step, "eval", {k: v for k, v in self.metrics.items() if isinstance(v, float)})
        watch_evaluation(self.instruments, self._view(), self.metrics, self.log.reading)
        if (math.isnan(self.best) or better) and self._export("best"):
            self.best = value

    def _view(self, batch: Batch | None = None, rate: float = 0.0, clipped: float = 1.0) -> View:
        warmup = round(self.config.optim.warmup_epochs * self.steps_per_epoch)
        steps = (self.step, self.step / self.steps_per_epoch, self.total_steps, warmup)
        return View(self.task if batch else self._averaged(), *steps, self.precision, self.world, batch, rate, clipped)

    def _save(self, final: bool = False) -> None:
        """Begins to write a checkpoint, and exports the newest weights; ``final`` waits until they are there."""
        values = {n: getattr(self, n) for n in ("step", "best", "metrics", "seconds", "left_out")}
        values |= {"preprocessing": self.task.preprocessing, "scaler": self.scaler.state_dict()}
        values["waited"] = self.train_loader.wait_seconds
        tensors, copies = training_state(self._modules(), self.optimizer)
        compress_again(copies)
        self._written(self.checkpoints.save(self.step, tensors, values, wait=final), final)
        if not is_sharded(self.task):  # gathering takes a while; ``swinscale export`` does it from any checkpoint
            self._export("last", final)

    def _written(self, complaint: str | None, final: bool) -> None:
        """What could not be written does not end a run that may still write it the next time."""
        if complaint and final:
            raise UsageError(complaint)
        if complaint:
            self.log.event("checkpoint_failed", self.step, complaint)

    def _modules(self) -> dict[str, nn.Module]:
        return {"task": self.task} | ({"ema": self.ema} if self.ema is not None else {})

    def _averaged(self) -> Task:
        """The weights that are evaluated and exported."""
        return cast(Task, self.ema.module) if self.ema is not None else self.task

    def _export(self, name: str, final: bool = False) -> bool:
        state, place = gather(self._averaged()), self.directory / name
        reason = self.checkpoints.in_main(lambda: self._averaged().save_pretrained(place, state))
        self._written(reason and f"Could not write {place}: {reason}. Checkpoints are untouched.", final)
        return not reason

    def _restore(self) -> None:
        state, damaged = restore_training(self.checkpoints, self._modules(), self.optimizer)
        self.warnings += [("damaged_checkpoint", f"{'; '.join(damaged)}. An older one is used.")] if damaged else []
        release(self.task)
        if lacking := {"scaler", "best", "metrics", "seconds", "left_out", "waited"} - state.keys():
            raise UsageError(f"The checkpoint of step {state['step']} is of another version: it has no {min(lacking)}.")
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.metrics, self.seconds = (state[n] for n in ("step", "best", "metrics", "seconds"))
        self.left_out, self.train_loader.wait_seconds = sorted({*self.left_out, *state["left_out"]}), state["waited"]

    def _non_finite(self, micro: list[Batch]) -> None:
        """States what made the loss non-finite, and follows the policy."""
        causes = []
        for index, batch in enumerate(micro):
            self._seed(index)
            with autocast(self.precision, self.world.device):
                causes.append(first_non_finite(self.task, partial(self.task, batch)))
        release(self.task)
        cause = self.world.first(next(filter(None, causes), None))
        text = f"Step {self.step}: the loss or gradient is not finite; {cause or 'every output is finite, a gradient is not'}."
        self.log.event("non_finite", self.step, text)
        self.left_out.append(self.step)
        hopeless = {self.step - n for n in range(10)} <= {*self.left_out}  # nothing finite comes from the weights
        if hopeless or self.config.on_non_finite == "raise":
            more = ": ten steps in a row were left out" if hopeless else ", or set train.on_non_finite=skip or rewind"
            raise NonFiniteLoss(f"{text} The newest checkpoint is intact. Lower train.optim.lr{more}.")

    def _seed(self, micro_batch: int) -> None:
        """Stochastic depth and mixup of a micro-batch depend on its place in the run alone."""
        torch.manual_seed(derive_seed(self.config.seed, "step", self.step, micro_batch, self.world.rank))

    def _rewind(self) -> bool:
        """Goes back to the newest checkpoint, if there is one; the step that failed will be left out."""
        self._written(self.checkpoints.finish(), final=False)
        if not checkpoint_steps(self.directory / "checkpoints"):
            return False
        self._restore()
        self.log.event("rewound", self.step, f"Back to step {self.step}; step {self.left_out[-1]} will be left out.")
        return True

    def _to_device(self, batch: Batch) -> Batch:
        while self.train_loader.restarts:
            self.log.event("loader_restarted", self.step, f"{self.train_loader.restarts.pop(0)}; all began again.")
        self.log.skipped(self.step, batch.pop("skipped", ()))
        return to_device(batch, self.world.device)

    def _due(self, every: float) -> bool:
        """Whether something that happens every so many epochs happens after this step."""
        period = max(1, round(every * self.steps_per_epoch)) if every else self.total_steps
        return self.step % period == 0 or self.step == self.total_steps
