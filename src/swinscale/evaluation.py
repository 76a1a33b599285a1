"""Measuring a task on a set, in one process or many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swinscale.data.loader import EpochLoader
from swinscale.parallel import Precision, autocast
from swinscale.tasks.base import Task


@torch.no_grad()
def evaluate(task: Task, loader: EpochLoader, precision: Precision, device: torch.device) -> dict[str, Any]:
    """The task's measures over all of ``loader``, summed over processes: floats, and lists for matrices."""
    was_training = task.training
    task.eval()
    metrics = {name: metric.to(device) for name, metric in task.new_metrics().items()}
    unreadable = 0
    for batch in loader.batches(0):
        unreadable += len(batch.pop("skipped", ()))
        if len(batch["image"]) == 0:
            continue
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with autocast(precision, device):
            task.update_metrics(metrics, batch)
    task.train(was_training)
    values: dict[str, Any] = {name: metric.compute().tolist() for name, metric in metrics.items()}
    return {**values, "unreadable": float(unreadable)}
