"""Checkpoints are whole or not there, say when they are damaged, and fit any number of processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.processes import launch

from swinscale import checkpoint
from swinscale.checkpoint import CHECKSUMS, Checkpoints, alone_in, checkpoint_steps, write_atomically
from swinscale.errors import UsageError
from swinscale.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"task.weight": torch.full((2, 2), value), "task.scale": torch.tensor(value), "n": torch.tensor(int(value))}


def save(directory: Path, step: int, keep: int = 2) -> str | None:
    return Checkpoints(directory, ALONE, keep).save(step, tensors(step), {"seconds": 1.5 * step}, wait=True)


def load(directory: Path, step: int | None = None) -> tuple[dict, list[str], float]:
    into = tensors(0)
    values, problems = Checkpoints(directory, ALONE).load(lambda _: into, step)
    assert into["task.scale"] == into["n"] == into["task.weight"][0, 0]
    return values, problems, into["n"].item()


def shard(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}/shard-00001-model-00001-of-00001.safetensors"


def test_round_trip_and_retention(tmp_path):
    for step in (1, 2, 3):
        assert save(tmp_path, step) is None
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert load(tmp_path) == ({"step": 3, "seconds": 4.5}, [], 3)
    assert load(tmp_path, step=2)[2] == 2
    names = {p.name for p in (tmp_path / "step-00000003").iterdir()}
    assert names == {"state.json", CHECKSUMS, shard(tmp_path, 3).name}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What changes after ``save`` has returned is not in the checkpoint, and the checkpoint appears in the end alone."""
    may_write = threading.Event()
    write = checkpoint._Writer.write_data
    monkeypatch.setattr(checkpoint._Writer, "write_data", lambda *a: (may_write.wait(20), write(*a))[1])
    checkpoints, values = Checkpoints(tmp_path, ALONE), tensors(1)
    assert checkpoints.save(1, values, {}) is None
    for value in values.values():
        value.fill_(9)
    assert checkpoint_steps(tmp_path) == []
    may_write.set()
    assert checkpoints.finish() is None
    assert load(tmp_path)[2] == 1


@pytest.mark.parametrize("moment", ["write_data", "_checksum", "write_text", "rename"])
def test_a_failure_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    """Also a disk that is full: said in words, nothing half-written stays, and the next save works."""
    save(tmp_path, 1, keep=1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        place = {"write_data": (checkpoint._Writer, "write_data"), "_checksum": (checkpoint, "_checksum")}
        patch.setattr(*place.get(moment, (Path, moment)), fail)
        complaint = save(tmp_path, 2, keep=1)
    assert complaint is not None
    assert "No space left on device. Earlier checkpoints are untouched" in complaint
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load(tmp_path)[2] == 1
    assert save(tmp_path, 2, keep=1) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / ".writing-step-00000002"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert load(tmp_path)[2] == 1
    save(tmp_path, 2)
    assert load(tmp_path)[2] == 2
    assert not half.exists()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "truncated": (lambda d: os.truncate(shard(d, 2), 100), "has changed since it was written"),
    "one bit": (lambda d: _flip(shard(d, 2)), "has changed since it was written"),
    "swapped": (lambda d: shutil.copy(shard(d, 1), shard(d, 2)), "has changed since it was written"),
    "state": (lambda d: (d / "step-00000002/state.json").write_text('{"step": 2}'), "state.json has changed"),
    "another step": (
        lambda d: (shutil.rmtree(d / "step-00000002"), shutil.copytree(d / "step-00000001", d / "step-00000002")),
        "it holds step 1",
    ),
    "missing": (lambda d: shard(d, 2).unlink(), "is missing"),
    "no checksums": (lambda d: (d / "step-00000002" / CHECKSUMS).unlink(), "checksums.json is missing"),
    "foreign": (
        lambda d: (shutil.rmtree(d / "step-00000002"), (d / "step-00000002").mkdir(),
                   save_file({"a": torch.ones(3)}, d / "step-00000002/model.safetensors")),
        "checksums.json is missing",
    ),
    "added": (lambda d: save_file({"a": torch.ones(1)}, d / "step-00000002/x.safetensors"), "does not belong to it"),
    "hostile": (lambda d: shard(d, 2).write_bytes(pickle.dumps(Hostile())), "has changed since it was written"),
    "hostile, own checksum": (
        lambda d: (shard(d, 2).write_bytes(pickle.dumps(Hostile())), _sign(d / "step-00000002")), None),
}  # fmt: skip


def _sign(path: Path) -> None:
    names = json.loads((path / CHECKSUMS).read_text())
    (path / CHECKSUMS).write_text(json.dumps({name: checkpoint._checksum(path / name) for name in names}))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, kind):
    """The one before is read instead, and the damage is told; nothing in a file is executed."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage, message = DAMAGE[kind]
    damage(tmp_path)
    values, problems, value = load(tmp_path)
    assert (values["step"], value) == (1, 1)
    assert len(problems) == 1 and "step-00000002 is damaged" in problems[0]
    assert message is None or message in problems[0]
    assert not Path("hostile").exists()
    with pytest.raises(UsageError, match="No intact checkpoint is left"):
        load(tmp_path, step=2)


def test_missing_and_foreign_checkpoints(tmp_path):
    with pytest.raises(UsageError, match="No checkpoint in"):
        load(tmp_path)
    Checkpoints(tmp_path, ALONE).save(1, {**tensors(1), "task.weight": torch.zeros(3, 2)}, {}, wait=True)
    with pytest.raises(UsageError, match=r"another model or recipe \(task.weight has shape \(3, 2\), not \(2, 2\)\)"):
        load(tmp_path)


def test_large_checkpoints_are_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 20)
    save(tmp_path, 4)
    assert len(list((tmp_path / "step-00000004").glob("*.safetensors"))) == 2
    assert load(tmp_path)[2] == 4


def test_two_runs_do_not_share_a_directory(tmp_path):
    with alone_in(tmp_path, ALONE), pytest.raises(UsageError, match="Another run is writing to"), \
            alone_in(tmp_path, ALONE):  # fmt: skip
        pass
    with alone_in(tmp_path, ALONE):
        pass


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


# Trains a tiny Giant with averaging for some steps, each under its own number of processes and memory recipe; the state that
# a part of a run ends with must be the one that the next part begins with, to the last bit.
RESHARD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from swinscale.checkpoint import Checkpoints, restore_training, training_state
from swinscale.config import from_dict
from swinscale.optim import OptimConfig, build_optimizer, parameter_groups
from swinscale.parallel import MemoryConfig, prepare, whole, world
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tests.test_parallel import batch, build
torch.set_num_threads(1)
folder, first, last, memory = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
memory = from_dict(MemoryConfig, memory)
with world("cpu", alone_in_group=memory.shard != "none") as here:
    torch.manual_seed(0)
    task = build()
    ema = AveragedModel(task, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    model = prepare(task, memory, here, "fp32")
    prepare(ema.module, memory, here, "fp32", average=True)
    optimizer = build_optimizer(parameter_groups(task, OptimConfig()), OptimConfig(), memory.optimizer_bits)
    checkpoints = Checkpoints(folder / "checkpoints", here)

    def state():
        tensors, _ = training_state({"task": task, "ema": ema}, optimizer)
        return tensors, {k: whole(v).detach().clone() for k, v in tensors.items()}

    if first:
        values, problems = restore_training(checkpoints, {"task": task, "ema": ema}, optimizer)
        assert values["step"] == first and not problems
        if here.is_main:
            print("restored")
    restored = state()[1]
    for step in range(first, last):
        for group in optimizer.param_groups:
            rate = 1e-3 * (step + 1)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        share = 8 // here.size
        part = {k: v[here.rank * share : (here.rank + 1) * share] for k, v in batch().items()}
        optimizer.zero_grad()
        model(part)[0].backward()
        optimizer.step()
        ema.update_parameters(task)
    tensors, full = state()
    assert checkpoints.save(last, tensors, {}, wait=True) is None
    if here.is_main:
        save_file(restored, folder / f"{last}-begin.safetensors")
        save_file(full, folder / f"{last}-end.safetensors")
"""


@pytest.mark.slow
def test_saved_by_some_processes_and_read_by_others(tmp_path):
    """R-BIG-3: 1 → 2 → 4 → 2 → 1 processes and other recipes; parameters, averages and optimiser states stay as they are."""
    parts = [(1, {}), (2, {"shard": "zero3"}), (4, {"shard": "zero2", "replicas": 2}), (2, {}), (1, {"shard": "zero1"})]
    for number, (processes, memory) in enumerate(parts):
        launch(processes, RESHARD, tmp_path, 2 * number, 2 * number + 2, json.dumps(memory))
        begin = load_file(tmp_path / f"{2 * number + 2}-begin.safetensors")
        if number:
            end = load_file(tmp_path / f"{2 * number}-end.safetensors")
            assert begin.keys() == end.keys()
            assert all(torch.equal(begin[name], end[name]) for name in end)
    # The same ten steps in one process. AdamW divides by the root of tiny second moments, so the bound is not that of one
    # gradient; without restored moments or averages it would be missed by far.
    alone = tmp_path / "alone"
    alone.mkdir()
    launch(1, RESHARD, alone, 0, 10, "{}")
    one, many = load_file(alone / "10-end.safetensors"), load_file(tmp_path / "10-end.safetensors")
    for name in one:
        if not name.startswith("optimizer"):
            assert (one[name] - many[name]).abs().max() <= 1e-4, name
    assert one["ema.n_averaged"] == 10
