"""What watches a run from inside: the interface between the training loop and the instruments in this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from swinscale.parallel import Precision, World, autocast, release
from swinscale.tasks.base import Batch, Task


@dataclass(frozen=True)
class View:
    """A run at one moment, as an instrument sees it. To be read, never changed.

    Args:
        task: in training; after an evaluation the one that was evaluated, which with ``ema_decay`` is the average.
        step: optimiser steps that are done, before ``Instrument.before_update`` and after the others.
        epoch: passes over the training images that are done, as a number with a fraction.
        batch: the last micro-batch of the step, on the device; None where there is none (after an evaluation).
        rate: the learning rate of the step.
        clipped: by what the gradients were multiplied to keep their norm within ``optim.clip_grad``; 1: not at all.
    """

    task: Task
    step: int
    epoch: float
    total_steps: int
    warmup_steps: int
    precision: Precision
    world: World
    batch: Batch | None = None
    rate: float = 0.0
    clipped: float = 1.0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.world.device


@dataclass
class Reading:
    """What an instrument saw.

    Args:
        scalars: for ``log.jsonl``, TensorBoard and the report.
        record: lists and nested values for ``log.jsonl`` and the report alone.
        warnings: (kind, a sentence in plain words); the run says each kind once until it has been absent.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[tuple[str, str]] = field(default_factory=list)


class Instrument:
    """Watches a run at the steps it asks for. It changes nothing: a run with and without it is the same to the last bit.

    Every process of a run has the instrument and is asked at the same moments, so that readings may be exchanged between
    processes. What it returns in the main process is what the run says.

    Class attributes:
        name: the ``kind`` of its entries in ``log.jsonl`` and the prefix of its TensorBoard tags.
    """

    name: str

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the update that leads to ``step`` is read."""
        return False

    def before_update(self, view: View) -> None:
        """Gradients are there, unscaled and clipped; parameters are still the old ones."""

    def after_update(self, view: View) -> Reading | None:
        """Parameters are the new ones."""
        return None

    def after_evaluation(self, view: View, measures: Mapping[str, Any]) -> Reading | None:
        """The task was evaluated; ``measures`` is what came out."""
        return None


Say = Callable[[int, str, Reading], None]
"""Takes the step, the name of the instrument and what it saw."""


@contextmanager
def watched_update(instruments: Sequence[Instrument], view: View, say: Say) -> Iterator[None]:
    """Around the update from ``view.step`` to the next step: the instruments that are due read it."""
    due = [each for each in instruments if each.due(view.step + 1, view.total_steps)]
    for instrument in due:
        instrument.before_update(view)
    yield
    view = replace(view, step=view.step + 1)
    for instrument in due:
        if reading := instrument.after_update(view):
            say(view.step, instrument.name, reading)


def watch_evaluation(instruments: Sequence[Instrument], view: View, measures: Mapping[str, Any], say: Say) -> None:
    """After an evaluation of the weights at ``view.step``."""
    for instrument in instruments:
        if reading := instrument.after_evaluation(view, measures):
            say(view.step, instrument.name, reading)


@contextmanager
def inspection(view: View) -> Iterator[None]:
    """Forward passes of parts of the task: without gradients, in evaluation mode, with the parameters of the whole there."""
    task, was_training = view.task, view.task.training
    task.eval()
    if isinstance(task, FSDPModule):
        task.unshard()  # parts are not called through the root, which would gather its own
    try:
        with torch.no_grad(), autocast(view.precision, view.device):
            yield
    finally:
        release(task)
        task.train(was_training)


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices, evenly over ``length``."""
    count = min(count, length)
    return [index * length // count for index in range(count)]
