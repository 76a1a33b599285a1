"""The memory that a training step takes, as PyTorch's allocators count it: what ``memory.py`` predicts, measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from swinscale.optim import OptimConfig, build_optimizer, parameter_groups
from swinscale.parallel import MemoryConfig, Precision, World, autocast, micro_batch, prepare
from swinscale.tasks.base import Task


class TrainingStep:
    """Training steps of a task on random square images: loss, backward pass, clipping, AdamW. Call it to take one.

    Args:
        count: images per forward pass.
        passes: forward passes per step.
        here: this process among those of the run; None: alone on the CPU.
    """

    def __init__(
        self,
        task: Task,
        size: int,
        count: int,
        memory: MemoryConfig,
        precision: Precision = "fp32",
        passes: int = 1,
        here: World | None = None,
    ):
        self.task, self.memory, self.precision = task, memory, precision
        self.here = here or World(0, 1, torch.device("cpu"))
        self.model = prepare(task, memory, self.here, precision).train()
        self.optimizer = build_optimizer(parameter_groups(task, OptimConfig()), OptimConfig())
        self.batches = [_random_batch(size, count, self.here.device) for _ in range(passes)]

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(self.batches):
            with micro_batch(self.model, self.memory, last=index + 1 == len(self.batches)):
                with autocast(self.precision, self.here.device):
                    loss = self.model(batch)[0]
                (loss / len(self.batches)).backward()
                del loss
        torch.nn.utils.clip_grad_norm_([p for p in self.task.parameters() if p.requires_grad], 5.0)
        self.optimizer.step()

    def held(self) -> int:
        """Bytes between two steps, once the optimiser has its states: parameters, moments and images."""
        states = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        tensors = [*self.task.parameters(), *states, *(t for b in self.batches for t in b.values())]
        held = sum(_here(t).untyped_storage().nbytes() for t in tensors)
        if isinstance(self.model, DistributedDataParallel):  # its buckets, which it does not show
            held += sum(4 * p.numel() for p in self.task.parameters() if p.requires_grad)
        return held


def measure(
    task: Task,
    size: int,
    count: int,
    memory: MemoryConfig,
    precision: Precision = "fp32",
    passes: int = 1,
    here: World | None = None,
) -> tuple[int, int]:
    """Bytes at the peak of a later training step, and those between two steps; arguments as ``TrainingStep``."""
    step = TrainingStep(task, size, count, memory, precision, passes, here)
    for _ in range(2):  # after the first, DDP makes its buckets anew
        step()
    step.optimizer.zero_grad(set_to_none=True)
    held = step.held()
    gc.collect()  # what came before is not to be freed while the allocator is watched
    if step.here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated(), held
    return held + peak_on_cpu(step), held


def peak_on_cpu(run: Callable[[], None]) -> int:
    """The most that ``run`` has allocated at once, from the events of the CPU's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _here(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _random_batch(size: int, count: int, device: torch.device) -> dict[str, Any]:
    batch = {
        "image": torch.randn(count, 3, size, size),
        "label": torch.randint(10, (count,)),
        "mask": torch.rand(count, size // 4, size // 4) < 0.6,
        "index": torch.arange(count),
    }
    return {name: value.to(device) for name, value in batch.items()}
