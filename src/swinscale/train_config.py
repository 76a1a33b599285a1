"""The settings of a training run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from swinscale.config import check_ranges
from swinscale.optim import OptimConfig
from swinscale.parallel import MemoryConfig, Precision


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large and where a run trains.

    Args:
        epochs: passes over the training set; fractions are allowed.
        batch_size: images per optimiser step, over all processes and micro-batches: results do not depend on how many
            devices share them.
        micro_batch: images per forward pass and process; smaller needs less memory. None: batch_size / processes. Where it
            does not divide a process's share, some passes may have one more.
        precision: "auto" is bf16 where the hardware has units for it (fp16 on older GPUs), else fp32.
        num_workers: loader processes; 0 loads in the main process.
        ema_decay: keep an exponential moving average of the weights and evaluate that; 0: off.
        eval_every, checkpoint_every: in epochs; 0: only at the end.
        diagnose_every: optimiser steps from one reading of the run's vital signs (amplitudes, attention, gradients) to the
            next; the first and the last step are read too; 0: none.
        on_non_finite: when a loss or gradient is not finite: "raise", "skip" the step, or "rewind" to the last
            checkpoint and leave that step out.
        compile: compile the model, block by block.
        memory: what to give up for less memory.
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
    diagnose_every: int = 100
    on_non_finite: Literal["raise", "skip", "rewind"] = "raise"
    compile: bool = False
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        at_least_1 = dict.fromkeys(("batch_size", "micro_batch", "keep_checkpoints", "log_every"), "[1, inf)")
        at_least_0 = dict.fromkeys(("num_workers", "eval_every", "checkpoint_every", "diagnose_every"), "[0, inf)")
        check_ranges(self, "train.", epochs="(0, inf)", ema_decay="[0, 1)", **at_least_1, **at_least_0)


# A resumed run may change these. (Another micro_batch, like another number of processes, draws mixup and drops anew.)
MAY_CHANGE = (
    *("micro_batch", "device", "num_workers", "compile", *(f.name for f in dataclasses.fields(MemoryConfig))),
    *("eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "diagnose_every"),
    *("probe_every", "probe_stage"),
    "past_windows",  # says where weights have been, and changes nothing
)
