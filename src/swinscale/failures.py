"""Failures that no user's setting is to blame for alone, in words: memory that ran out, a process that was lost."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist

from swinscale.checkpoint import checkpoint_steps
from swinscale.errors import Stopped, UsageError
from swinscale.memory import advice_after_out_of_memory
from swinscale.parallel import World, resolve_precision, split_batch
from swinscale.tasks.base import Task
from swinscale.train_config import TrainConfig

LOST = ("closed by peer", "reset by peer", "remote process exited", "communicator was aborted", "broken pipe")
"""How gloo, NCCL and their store say that another process of the group is gone."""


def explain(error: RuntimeError, task: Task, config: TrainConfig, world: World, directory: Path) -> Exception | None:
    """What to raise in the place of ``error``: what happened and what to do; None for an error of another kind."""
    if isinstance(error, torch.OutOfMemoryError):
        return UsageError(f"{_out_of_memory(task, config, world)} A resumed run may change all of these.")
    lost = isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in LOST)
    if world.size == 1 or not lost:
        return None
    saved = checkpoint_steps(directory / "checkpoints")
    return Stopped(
        f"Another process of this run has ended, so this one stops too. Its own message says why; resume to go on from step "
        f"{saved[-1] if saved else 0}."
    )


def _out_of_memory(task: Task, config: TrainConfig, world: World) -> str:
    passes = split_batch(config.batch_size, config.micro_batch, world.size, config.batch_size)
    return advice_after_out_of_memory(
        task,
        img_size=None,
        micro_batch=math.ceil(config.batch_size / world.size / passes),
        precision=resolve_precision(config.precision, world.device),
        memory=config.memory,
        processes=world.size,
        accumulate=passes,
        ema=config.ema_decay > 0,
        device=world.device,
    )
