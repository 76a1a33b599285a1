"""One process or many: where a run executes and how its processes work together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swinscale.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process among the processes of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, value: float) -> float:
        """The sum of ``value`` over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(
            value, dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device
        )
        dist.all_reduce(total)
        return total.item()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in at least one process; all of them get the same answer."""
        return self.sum(float(flag)) > 0


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Joins the process group when started by ``torchrun``; a plain process needs none.

    Args:
        device: "auto" (the first of cuda, mps, cpu that exists), or a name such as "cpu" or "cuda:1".
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = _device(device)
    if size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"Unknown device '{name}'. Use auto, cpu, cuda, cuda:0 or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"Device '{name}' is not available: this PyTorch sees no CUDA GPU. Use device=cpu or auto.")
    return device


def wrap(module: nn.Module, world: World) -> nn.Module:
    """The module whose gradients are averaged over all processes."""
    if world.size == 1:
        return module
    return DistributedDataParallel(module, device_ids=[world.device] if world.device.type == "cuda" else None)


def no_sync(module: nn.Module, skip: bool) -> Any:
    """Context in which gradients stay local, for all but the last micro-batch of a step."""
    return module.no_sync() if skip and isinstance(module, DistributedDataParallel) else nullcontext()


Precision = Literal["auto", "fp32", "bf16", "fp16"]


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What "auto" means on ``device``: bf16 where the hardware multiplies bf16 matrices, fp32 elsewhere.

    Raises:
        UsageError: for fp16 on a device that cannot train in it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("precision=fp16 is not available on cpu: use fp32, or bf16 on a processor with bf16 units.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # bf16 without such units is 3-4x slower
        return "bf16" if has_amx() else "fp32"
    return "fp32"


def autocast(precision: Precision, device: torch.device) -> Any:
    """Context for forward passes in ``precision``; parameters stay fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def split_batch(batch_size: int, micro_batch: int | None, processes: int, images: int) -> tuple[int, int]:
    """Images per forward pass and process, and the number of such passes per step."""
    if batch_size > images:
        raise UsageError(
            f"train.batch_size={batch_size} is larger than the training set ({images} images). "
            f"Set train.batch_size={images} or less."
        )
    micro = micro_batch or max(1, batch_size // processes)
    accumulate, rest = divmod(batch_size, micro * processes)
    if rest or not accumulate:
        raise UsageError(
            f"train.batch_size={batch_size} is not a multiple of micro_batch={micro} × {processes} processes. "
            f"Change one of them."
        )
    return micro, accumulate
