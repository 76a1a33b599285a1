"""Measuring a task on a set, in one process or many."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swinscale.data.dataset import collate
from swinscale.data.loader import EpochLoader
from swinscale.errors import UsageError
from swinscale.parallel import Precision, autocast, is_sharded, release, share_statistics
from swinscale.tasks.base import Batch, Task


@torch.no_grad()
def evaluate(task: Task, loader: EpochLoader, precision: Precision, device: torch.device) -> dict[str, Any]:
    """The task's measures over all of ``loader``, summed over processes: floats, and lists for matrices and tables."""
    was_training = task.training
    task.eval()
    share_statistics(task)
    metrics = _nothing(task, device)
    unreadable = 0
    rounds, batch = 0, dict[str, Any]()
    for rounds, read in enumerate(loader.batches(0), start=1):  # noqa: B007
        unreadable += len(read.pop("skipped", ()))
        empty = len(read["image"]) == 0
        batch = batch if empty else to_device(read, device)
        if not empty or is_sharded(task):
            with autocast(precision, device):
                _update(task, _nothing(task, device) if empty else metrics, batch or _filler(loader, device))
    # A process whose share has run out takes part in the others' forward passes.
    for _ in range(rounds, len(loader) if is_sharded(task) else 0):
        with autocast(precision, device):
            _update(task, _nothing(task, device), batch or _filler(loader, device))
    release(task)
    task.train(was_training)
    values: dict[str, Any] = {}
    for name, metric in metrics.items():
        value = metric.compute()
        values |= value if isinstance(value, dict) else {name: value.tolist()}
    return {**values, "unreadable": float(unreadable)}


def _update(task: Task, metrics: dict[str, Any], batch: Batch) -> None:
    """Measures a batch; under sharding with as many forward passes as the process that needs most of them."""
    if not is_sharded(task):
        task.update_metrics(metrics, batch)
        return
    most = torch.tensor(task.passes(batch), device=batch["image"].device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    task.take_part(metrics, batch, int(most))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``, those of ``targets`` too."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if "targets" in batch:
        moved["targets"] = [to_device(target, device) for target in batch["targets"]]
    return moved


def _nothing(task: Task, device: torch.device) -> dict[str, Any]:
    return {name: metric.to(device) for name, metric in task.new_metrics().items()}


def _filler(loader: EpochLoader, device: torch.device) -> Batch:
    """A batch of one image, for a process that has none of its own."""
    for index in range(len(loader.dataset)):
        sample = loader.dataset[0, index]
        if "image" in sample:
            return to_device(getattr(loader.dataset, "collate", collate)([sample]), device)
    raise UsageError("None of the evaluation images can be read.")
