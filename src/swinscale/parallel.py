"""One process or many: where a run executes, how its processes work together, and the memory recipe.

The recipe, in this order (``prepare``): how attention is computed → what is recomputed in the backward pass → compilation,
block by block → which share of parameters, gradients and optimiser states each process holds. PyTorch does the distributing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from swinscale.config import check_ranges
from swinscale.errors import UsageError
from swinscale.models.init import initial_values, reset_statistics
from swinscale.models.recompute import Checkpointing
from swinscale.tasks.base import Task


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
        return self.sums(value)[0]

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over all processes, in one exchange."""
        if self.size == 1:
            return list(values)
        dtype = torch.float64 if self.device.type != "mps" else torch.float32
        totals = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(totals)
        return cast(list[float], totals.tolist())

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in at least one process; all of them get the same answer."""
        return self.sum(float(flag)) > 0

    def first(self, text: str | None) -> str | None:
        """The text of the first process that has one."""
        texts = [text] * self.size
        if self.size > 1:
            dist.all_gather_object(texts, text)
        return next(filter(None, texts), None)


_ENDED: list[dist.ProcessGroup | None] = []
"""Groups that were left. Were the last reference to one that of a DistributedDataParallel, which a traceback may keep until late,
its release would wait for gloo's thread and hold the GIL that this thread needs to end."""


@contextmanager
def world(device: str = "auto", alone_in_group: bool = False) -> Iterator[World]:
    """Joins the process group when started by ``torchrun`` or ``srun``; a plain process needs none.

    Args:
        device: "auto" (the first of cuda, mps, cpu that exists), or a name such as "cpu" or "cuda:1".
        alone_in_group: a plain process forms a group of one, as sharding needs.
    """
    _adopt_slurm()
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = _device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1 or alone_in_group:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = dist.HashStore() if size == 1 else _store_of_this_attempt()
        dist.init_process_group(backend, rank=rank, world_size=size, store=store)
    try:
        yield World(rank, size, chosen)
    finally:
        if dist.is_initialized():
            _ENDED.append(dist.group.WORLD)
            dist.destroy_process_group()


def _store_of_this_attempt() -> dist.Store | None:
    """``torchrun`` keeps one store for all its restarts, in which gloo would find the addresses of processes that are gone.

    Several machines do not count restarts alike; for them TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has the same effect.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return None
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"attempt-{attempt}", store)


def _adopt_slurm() -> None:
    """Processes that ``srun`` started take their places from its variables; MASTER_ADDR says that they belong together."""
    place = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and all(v in os.environ for v in place.values()):
        os.environ.update({name: os.environ[variable] for name, variable in place.items()})
        os.environ.setdefault("MASTER_PORT", "29500")


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


@dataclass(frozen=True)
class MemoryConfig:
    """What a run gives up to need less memory. ``swinscale show RECIPE --gpus N`` predicts what each setting saves.

    Args:
        attention: back end of window attention (``swinscale.ops.BACKENDS``); one for the model or one per stage. The
            article computes it sequentially in the first two stages: ("sequential", "sequential", "auto", "auto").
        checkpointing: what is computed again in the backward pass: "none"; "selective", all but the results of linear
            layers and fused attention; "block", all but the inputs of blocks. One for the model or one per stage.
        shard: what is spread over the processes. "none": nothing, each has everything. "zero1": optimiser states and
            parameters at rest; gradients once per step. "zero2": gradients too, after each micro-batch. "zero3": also the
            parameters in use, which are gathered block by block, in the forward and again in the backward pass.
        replicas: with sharding, groups of processes that each hold everything together (hybrid sharding; usually the number
            of nodes).
        offload: with sharding, parameters at rest, gradients and optimiser states are in the memory of the CPU, which also
            does the update.
        optimizer_bits: 8 keeps AdamW's moments in blocks of 8-bit numbers (the package torchao).
    """

    attention: str | tuple[str, ...] = "auto"
    checkpointing: Checkpointing | tuple[Checkpointing, ...] = "none"
    shard: Literal["none", "zero1", "zero2", "zero3"] = "none"
    replicas: int = 1
    offload: bool = False
    optimizer_bits: Literal[32, 8] = 32

    def __post_init__(self) -> None:
        check_ranges(self, "train.memory.", replicas="[1, inf)")
        for name, unset in (("replicas", 1), ("offload", False)):
            value = getattr(self, name)
            if self.shard == "none" and value != unset:
                raise UsageError(f"train.memory.{name}={value} needs train.memory.shard to be zero1, zero2 or zero3.")


def prepare(
    task: Task,
    memory: MemoryConfig,
    world: World,
    precision: Precision,
    compile_blocks: bool = False,
    seed: int = 0,
    average: bool = False,
) -> nn.Module:
    """Puts ``task`` on this process's device, following ``memory``; returns the module to call in training.

    On GPUs the batch norms of the heads share their statistics over processes.

    With ``average``, ``task`` holds averaged weights, which are only evaluated: in fp32, neither compiled nor wrapped.

    Parameters on ``meta`` get their initial values; with sharding no process ever holds more than its share and one whole
    tensor. Values are the same however many processes there are.

    Raises:
        UsageError: for settings that this backbone, or this number of processes, cannot follow.
    """
    if world.size > 1 and world.device.type == "cuda":  # elsewhere PyTorch has none that is synchronised
        nn.SyncBatchNorm.convert_sync_batchnorm(task)
    arrange(task, memory)
    if compile_blocks and not average:
        _compile(task)
    if memory.shard != "none":
        shard(task, memory, world, "fp32" if average else precision, seed, keep_gathered=not average)
        return task
    if any(p.is_meta for p in task.parameters()):
        _materialise(task, world.device, seed, lambda: None)
    task.to(world.device)
    if world.size == 1 or average:
        return task
    # Gradients live in the buckets in which they are exchanged, not beside them: 12 GB less for three billion parameters.
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(task, device_ids=devices, gradient_as_bucket_view=True)


def arrange(task: Task, memory: MemoryConfig) -> None:
    """Sets how attention is computed and what is recomputed in the backward pass."""
    for setting, method in (("attention", "set_attention_backend"), ("checkpointing", "set_grad_checkpointing")):
        value = getattr(memory, setting)
        if hasattr(task.backbone, method):
            getattr(task.backbone, method)(value)
        elif value not in ("auto", "none"):
            name = type(task.backbone).__name__
            raise UsageError(f"train.memory.{setting}={value}: {name} has no method {method}. Leave this setting out.")


def _units(task: Task) -> list[nn.Module]:
    """The parts of the backbone that are compiled and sharded one by one; the rest belongs to the task as a whole."""
    units = getattr(task.backbone, "units", list)
    return cast(list[nn.Module], units())


def _compile(task: Task) -> None:
    units = _units(task) or [task.backbone]
    # All blocks run the same code, and each kind of block (width, shift, rate of stochastic depth) needs a graph of its own.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(units))
    for unit in units:
        unit.compile()


def shard(
    task: Task, memory: MemoryConfig, world: World, precision: Precision, seed: int = 0, keep_gathered: bool = True
) -> None:
    """Spreads the parameters of ``task`` over the processes, block by block, in place.

    The task itself is the root, so that whatever its ``forward`` and ``take_part`` touch is gathered in time.

    Args:
        keep_gathered: keep parameters between forward and backward pass, where ``memory`` says so.
    """
    groups, rest = divmod(world.size, memory.replicas)
    if rest:
        raise UsageError(
            f"train.memory.replicas={memory.replicas} does not divide the {world.size} processes of this run."
        )
    kind, axes = world.device.type, ("replicate", "shard")
    mesh = (
        init_device_mesh(kind, (world.size,), mesh_dim_names=axes[1:])
        if memory.replicas == 1
        else init_device_mesh(kind, (memory.replicas, groups), mesh_dim_names=axes)
    )
    dtype = _dtype(precision)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False),
        "reshard_after_forward": memory.shard == "zero3" or not keep_gathered,
    }
    if memory.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")

    def spread() -> None:
        for unit in _units(task):
            fully_shard(unit, **options)
        fully_shard(task, **options)

    _materialise(task, torch.device("cpu") if memory.offload else world.device, seed, spread)
    register_fsdp_forward_method(task, "take_part")


@torch.no_grad()
def _materialise(task: Task, device: torch.device, seed: int, spread: Callable[[], None]) -> None:
    """Gives parameters memory after ``spread`` has cut them up: the values they had, or initial ones where on ``meta``."""
    given = {name: p.detach() for name, p in task.named_parameters() if not p.is_meta}
    buffers = {name: b.clone() for name, b in task.named_buffers() if not b.is_meta}
    task.to("meta")
    spread()
    task.to_empty(device=device)
    for parameter in task.parameters():
        _local(parameter).fill_(math.nan)  # what is forgotten below shows
    reset_statistics(task)
    for name, buffer in task.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    fresh = initial_values(task, seed) if len(given) < len(list(task.parameters())) else ()
    for name, value in (*((n, v) for n, v in fresh if n not in given), *given.items()):
        _assign(task.get_parameter(name), value)


def _assign(parameter: Tensor, value: Tensor) -> None:
    """Writes the share of a whole tensor that this process holds of ``parameter``."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    _local(parameter).copy_(value)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def release(task: nn.Module) -> None:
    """Drops parameters gathered for a forward pass that no backward pass followed, lest they outlive an update."""
    for module in task.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(task: nn.Module) -> bool:
    """Whether every process must take part in each forward pass of ``task``."""
    return isinstance(task, FSDPModule)


@contextmanager
def micro_batch(module: nn.Module, memory: MemoryConfig, last: bool) -> Iterator[None]:
    """Forward and backward pass of one micro-batch; gradients that need not be exchanged before the last one are not."""
    if isinstance(module, FSDPModule) and memory.shard == "zero1":
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
        yield


@torch.no_grad()
def share_statistics(task: nn.Module) -> None:
    """Running means and variances of batch norms become their mean over the processes, each of which saw other images.

    For those that do not share them while they train (``prepare``); every process must call it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            for buffer in (module.running_mean, module.running_var):
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def gather(task: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, on the CPU, in the main process; the others, which must call it too, keep nothing."""
    state = {}
    for name, value in task.state_dict().items():
        value = whole(value).detach().cpu()
        if not dist.is_initialized() or dist.get_rank() == 0:
            state[name] = value
    return state


def whole(value: Tensor) -> Tensor:
    """The value of a tensor that may be spread over the processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


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
    dtype = _dtype(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _dtype(precision: Precision) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def split_batch(batch_size: int, micro_batch: int | None, processes: int, images: int) -> int:
    """Forward passes per step and process: as few as keep each within ``micro_batch`` images.

    Raises:
        UsageError: if there are not enough images for a batch, or for each process and pass to get one.
    """
    if batch_size > images:
        raise UsageError(
            f"train.batch_size={batch_size} is larger than the training set ({images} images). "
            f"Set train.batch_size={images} or less."
        )
    if batch_size < processes:
        raise UsageError(
            f"train.batch_size={batch_size} is less than the number of processes ({processes}). "
            f"Set train.batch_size={processes} or more."
        )
    passes = math.ceil(batch_size / processes / (micro_batch or batch_size))
    return min(passes, batch_size // processes)
