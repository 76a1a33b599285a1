"""Checkpoints that a kill at any moment cannot spoil, and from which a run goes on exactly.

``checkpoints/step-00000120`` appears by one rename once everything in it is on disk: it is there and whole, or not there::

    shard-00001-model-00001-of-00002.safetensors …   what each process held: parameters, averages, optimiser states
    state.json                                       counters and measures
    checksums.json                                   SHA-256 of every file; what has changed since is not read

Nothing in it is ever unpickled. Random states are not stored: every random choice of a run depends on counters alone
(``seeding.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from swinscale.config import NOT_RECORDED, differences
from swinscale.errors import UsageError
from swinscale.parallel import World, share_statistics

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# One process is what is meant, and needs no warning.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")

STATE, CHECKSUMS, NOTE = "state.json", "checksums.json", ".sha256"
FILE_BYTES = 2 << 30
PREFIX = "step-"

_locks: set[IO[str]] = set()
"""Locks that this process holds. Processes forked from it (loaders) may outlive it by seconds, and must not hold them too."""


def _leave_locks() -> None:
    for lock in _locks:
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


def claim_directory(
    directory: Path, record: dict[str, Any], resume: bool, write: bool, may_change: Collection[str] = ()
) -> bool:
    """Takes a run directory for the run described by ``record``; True if it holds a checkpoint to go on from.

    Args:
        write: give a new directory its ``config.json``; in one process only.
        may_change: names of settings that may differ from those the run was started with.

    Raises:
        UsageError: if it holds a run and ``resume`` is off, a run with other settings, or something that is no run.
    """
    steps = checkpoint_steps(directory / "checkpoints")
    if write:  # what a kill has left
        for half_written in (*directory.glob("best/.*.tmp"), *directory.glob("last/.*.tmp")):
            half_written.unlink(missing_ok=True)
    if not steps:
        if (directory / "config.json").exists() and not (directory / "checkpoints").exists():
            raise UsageError(f"{directory} holds a model, not a run. Choose another directory with --out.")
        if write:
            # A run that ended before its first checkpoint begins again, and what it said is no part of the new one.
            (directory / "log.jsonl").unlink(missing_ok=True)
            shutil.rmtree(directory / "tensorboard", ignore_errors=True)
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_atomically(directory / "config.json", json.dumps(record, indent=2))
        return False
    if not resume:
        raise UsageError(
            f"{directory} already holds a run (step {steps[-1]}). Resume it, or choose another directory with --out."
        )
    try:
        written = json.loads((directory / "config.json").read_text())
    except ValueError:
        raise UsageError(
            f"{directory / 'config.json'} is damaged. Replace it by the config.json that the run began with."
        ) from None
    changed = [
        f"{name}: {before} then, {now} now"
        for name, before, now in differences(written, json.loads(json.dumps(record)))
        if name.rpartition(".")[2] not in may_change and before is not NOT_RECORDED  # by an older version
    ]
    if changed:
        raise UsageError(
            f"{directory} was started with other settings ({'; '.join(changed[:3])}). "
            f"Resume it with the same ones, or choose another directory with --out."
        )
    return True


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in ``directory``, ascending."""
    names = (p.name.removeprefix(PREFIX) for p in directory.glob(PREFIX + "*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


@contextmanager
def alone_in(directory: Path, world: World) -> Iterator[None]:
    """Keeps other runs out of ``directory`` until the end; the operating system lifts the lock of a killed process.

    Raises:
        UsageError: in every process, if another run is at work there.
    """
    lock, taken = None, False
    if world.is_main and fcntl is not None:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
        _locks.add(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            pass
    try:
        if world.any(taken):
            raise UsageError(
                f"Another run is writing to {directory}. Wait until it ends, or choose another directory with --out."
            )
        yield
    finally:
        if lock is not None:
            _locks.discard(lock)
            lock.close()


class Checkpoints:
    """The checkpoints of a run: written by all processes while training goes on, readable by any number of processes.

    Tensors may be whole or spread over the processes (``DTensor``); PyTorch's distributed checkpointing divides the work and
    fits the shares together. Every method must be called by all processes.

    Args:
        directory: holds ``step-…`` directories.
        keep: how many checkpoints stay.
    """

    def __init__(self, directory: Path, world: World, keep: int = 2):
        self.directory, self.world, self.keep = directory, world, keep
        # Of its own, so that what the writing thread says does not meet what training says.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[None]] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], values: dict[str, Any], wait: bool = False) -> str | None:
        """Copies ``tensors`` and begins to write them; a directory appears once everything in it is on disk.

        Args:
            values: JSON-ready: counters, measures.
            wait: return when the checkpoint is there.

        Returns: in words, in all processes, what went wrong: with this checkpoint as far as it is known, or with the one
            before. Earlier checkpoints are untouched.
        """
        complaint = self.finish()
        temporary = self._path(step, ".writing-")
        if reason := self.in_main(lambda: _empty(temporary)):
            return self._complaint(step, reason)
        writer = _Writer(temporary, _files(tensors))
        alone = self.world.size == 1
        done = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self._group, no_dist=alone)
        assert isinstance(done, Future)
        self._writing = step, self._thread.submit(self._complete, done, step, {"step": step, **values})
        return (self.finish() if wait else None) or complaint

    def finish(self) -> str | None:
        """Waits for the checkpoint that is being written; returns what went wrong, as ``save`` does."""
        if self._writing is None:
            return None
        (step, writing), self._writing = self._writing, None
        reason = None
        try:
            writing.result()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            reason = _reason(error)
        if not self.world.any(reason is not None):
            return None
        self.in_main(lambda: shutil.rmtree(self._path(step, ".writing-"), ignore_errors=True))
        return self._complaint(step, reason or "another process failed")

    def _complaint(self, step: int, reason: str) -> str:
        return f"Could not write the checkpoint {self._path(step)}: {reason}. Earlier checkpoints are untouched."

    def _complete(self, written: Future[Any], step: int, values: dict[str, Any]) -> None:
        """In the main process, once all have written their files: adds values and checksums, and publishes by one rename."""
        written.result()
        if not self.world.is_main:
            return
        temporary, final = self._path(step, ".writing-"), self._path(step)
        (temporary / STATE).write_text(json.dumps(values))
        sums = {STATE: _checksum(temporary / STATE)}
        for note in temporary.glob("*" + NOTE):
            sums[note.name.removesuffix(NOTE)] = note.read_text()
            note.unlink()
        (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=2))
        for path in (temporary / STATE, temporary / CHECKSUMS, temporary):
            _to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _to_disk(self.directory)
        for old in checkpoint_steps(self.directory)[: -max(self.keep, 1)]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def load(
        self, tensors: Callable[[Collection[str]], Mapping[str, Tensor]], step: int | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """Fills tensors from the newest checkpoint that is intact (or from that of ``step``).

        Args:
            tensors: given the names in the file, returns those to fill, by name.

        Returns: the values stored beside them, and what is wrong with each newer checkpoint that was passed over.

        Raises:
            UsageError: if there is none, none is intact, or it belongs to another model.
        """
        steps = checkpoint_steps(self.directory)
        if not steps or (step is not None and step not in steps):
            asked = "" if step is None else f"of step {step} "
            raise UsageError(f"No checkpoint {asked}in {self.directory}; found steps: {steps}.")
        problems: list[str] = []
        for candidate in [step] if step is not None else reversed(steps):
            path = self._path(candidate)
            damage = self._damage(path, candidate)
            if damage is None:
                self._read(path, tensors)
                return json.loads((path / STATE).read_text()), problems
            problems.append(f"{path} is damaged: {damage}")
        raise UsageError(
            f"{'; '.join(problems)}. No intact checkpoint is left: restore one, or begin again in another directory."
        )

    def _read(self, path: Path, tensors: Callable[[Collection[str]], Mapping[str, Tensor]]) -> None:
        reader, stored = HuggingFaceStorageReader(str(path)), _stored(path)
        wanted = dict(tensors(stored))
        wrong = [f"{n} has shape {stored.get(n, 'none')}, not {tuple(t.shape)}" for n, t in wanted.items()
                 if stored.get(n) != tuple(t.shape)]  # fmt: skip
        if wrong:
            raise UsageError(
                f"{path} was written by another model or recipe ({'; '.join(wrong[:2])}). Choose another --out."
            )
        into = {name: tensor.detach() for name, tensor in wanted.items()}
        dcp.load(into, storage_reader=reader, process_group=self._group, no_dist=self.world.size == 1)

    def _damage(self, path: Path, step: int) -> str | None:
        """What is wrong with a checkpoint; all processes get an answer if one finds something. Each reads its share."""
        reason = None
        try:
            sums: dict[str, str] = json.loads((path / CHECKSUMS).read_text())
            names = sorted(sums)
            if missing := [n for n in names if Path(n).name != n or not (path / n).is_file()]:
                reason = f"{missing[0]} is missing"
            for name in names[self.world.rank :: self.world.size] if reason is None else ():
                if _checksum(path / name) != sums[name]:
                    reason = f"{name} has changed since it was written"
                    break
            if reason is None and (found := json.loads((path / STATE).read_text())["step"]) != step:
                reason = f"it holds step {found}"
            if reason is None and (extra := [p.name for p in path.glob("*.safetensors") if p.name not in sums]):
                reason = f"{extra[0]} does not belong to it"
            if reason is None:
                _stored(path)
        except FileNotFoundError as error:
            reason = f"{Path(error.filename).name} is missing"
        except Exception as error:  # files may hold anything
            reason = _reason(error)
        return (reason or "another process found damage") if self.world.any(reason is not None) else None

    def in_main(self, act: Callable[[], None]) -> str | None:
        """Runs ``act`` in the main process; all processes get the reason if it fails."""
        reason = None
        if self.world.is_main:
            try:
                act()
            except OSError as error:
                reason = _reason(error)
        return (reason or "the main process failed") if self.world.any(reason is not None) else None

    def _path(self, step: int, prefix: str = "") -> Path:
        return self.directory / f"{prefix}{PREFIX}{step:08d}"


class _Writer(HuggingFaceStorageWriter):
    """Writes this process's shares as safetensors files, each with a note of its checksum."""

    def __init__(self, path: Path, files: dict[str, int]):
        super().__init__(str(path), fqn_to_index_mapping=files, save_distributed=True)

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        for result in written.wait():
            path = Path(self.path) / result.storage_data.relative_path
            note = path.with_name(path.name + NOTE)
            if not note.exists():
                note.write_text(_checksum(path))
        return written


def _stored(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a checkpoint, from the heads of its files."""
    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in found.items()}  # type: ignore[union-attr]


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers of the files that tensors go to, so that none needs much memory while it is put together."""
    files, size, number = {}, 0, 1
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            size, number = 0, number + 1
        size += tensor.nbytes
        files[name] = number
    return files


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _reason(error: BaseException) -> str:
    """The cause of a failure in one line, whatever the distributed writer wrapped it in."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def training_state(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """What a run continues from, by name, and for compressed optimiser states the pairs (state, its fp32 copy).

    Names: ``task.<parameter>``, ``ema.<parameter>``, ``optimizer.<parameter>.exp_avg``. Compressed states are stored in
    fp32, so that a run may go on with another number of bits, or of processes; ``compress_again`` makes the run that saved
    them go on from the same values as one that loads them.
    """
    for module in modules.values():
        share_statistics(module)
    state = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
    copies = []
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                value = torch.as_tensor(value)
                plain = _expanded(value)
                copies += [(value, plain)] if plain is not value else []
                state[f"optimizer.{name}.{key}"] = plain
    return state, copies


def restore_training(
    checkpoints: Checkpoints,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    step: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Fills modules and optimiser from a checkpoint; see ``Checkpoints.load``."""
    _begin(optimizer)
    copies: list[tuple[Tensor, Tensor]] = []

    def wanted(stored: Collection[str]) -> dict[str, Tensor]:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if f"optimizer.{name}.step" not in stored:  # it never had a gradient
                    optimizer.state[parameter].clear()
        tensors, found = training_state(modules, optimizer)
        copies.extend(found)
        return tensors

    values, problems = checkpoints.load(wanted, step)
    compress_again(copies)
    return values, problems


def compress_again(copies: list[tuple[Tensor, Tensor]]) -> None:
    """Writes the fp32 copies of ``training_state`` into the compressed states; doing so once more changes nothing."""
    for state, plain in copies:
        _local(state).copy_(_local(plain))


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimiser the state it has after a first step, by one that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _expanded(value: Tensor) -> Tensor:
    """An optimiser state in fp32 where a library keeps it compressed, else the tensor itself."""
    local = _local(value)
    if type(local) is Tensor or not hasattr(local, "dequantize"):
        return value
    plain = local.dequantize()
    if not isinstance(value, DTensor):
        return plain
    return DTensor.from_local(
        plain, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file in one step."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    _to_disk(temporary)
    temporary.replace(path)


def _to_disk(path: Path) -> None:
    """Waits until the file or directory entry is on disk; systems that cannot sync directories are left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
