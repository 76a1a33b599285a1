"""Disks that are full, folders that cannot be written, checkpoints that are not what they were."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.chaos import LONG
from tests.chaos.faults import Place, Run, differences, one_line, recipe

from swinscale.checkpoint import CHECKSUMS, _checksum

# A small file system of its own for the directory of the run, which only the run sees; what is on it at the end is copied out.
# Where the system allows no new mounts, files that would grow beyond a size cannot be written, which looks the same from here.
SMALL_DISK = """
import ctypes, os, resource, shutil, signal
from pathlib import Path
from swinscale import cli
libc = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_USER, PRIVATE = 0x20000, 0x10000000, 0x44000
run, size = Path(os.environ["CHAOS_RUN"]), os.environ["CHAOS_SIZE"]
run.mkdir(parents=True, exist_ok=True)
user, group = os.geteuid(), os.getegid()
alone = libc.unshare(NEW_MOUNTS | (NEW_USER if user else 0)) == 0
if alone and user:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
alone = alone and libc.mount(b"none", b"/", None, PRIVATE, None) == 0
alone = alone and libc.mount(b"tmpfs", bytes(run), b"tmpfs", 0, f"size={size}".encode()) == 0
print("mounted" if alone else "limited")
if not alone:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["CHAOS_LIMIT"]),) * 2)
def filled(path):
    left = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
    Path(path).write_bytes(bytes(left))
command_line = cli.main
def main(arguments):
    try:
        return command_line(arguments)
    finally:
        if alone:
            shutil.copytree(run, os.environ["CHAOS_KEEP"])
cli.main = main
"""
# After the first checkpoint is there, something else takes all that is left; and with FREE it is gone again after some steps.
FILL = """
from swinscale import train
inner = train._Run._optimizer_step
def step(self, batches):
    if self.step == 7:
        self.checkpoints.finish()
        filled(run / "other")
    if self.step == 10 and "CHAOS_FREE" in os.environ:
        self._written(self.checkpoints.finish(), False)  # the save of step 9 has met the full disk
        (run / "other").unlink()
    return inner(self, batches)
train._Run._optimizer_step = step
"""


def on_small_disk(place: Place, size: int, patch: str = "", **more: object) -> Run:
    keep = place.home / f"kept-{len(place.runs)}"
    room = {"CHAOS_RUN": place.run, "CHAOS_SIZE": size, "CHAOS_KEEP": keep, "CHAOS_LIMIT": 30_000, **more}
    run = place.start(patch=SMALL_DISK + patch, environment=room)
    run.wait()
    if "mounted" in run.output:
        shutil.rmtree(place.run)
        shutil.move(keep, place.run)
    return run


def test_a_disk_that_is_full_for_a_while(photos, tmp_path, whole, fault):
    row = fault("disk full during a periodic save, free again later")
    place = Place(tmp_path, recipe(photos))
    run = on_small_disk(place, 8 << 20, FILL, CHAOS_FREE=1)
    if "mounted" not in run.output:
        pytest.skip("the system allows no file system of one's own")
    assert run.wait() == 0, run.errors[-3000:]
    assert any("No space left on device" in text for text in place.events("checkpoint_failed"))
    # The save of step 9 failed, so that of step 6 is still there; everything else is as if nothing had happened.
    assert place.saved == [6, 12]
    assert [text for text in differences(whole, place.run) if "checkpoints" not in text] == []
    row.outcome("the run goes on, says so, and saves again when it can; log and weights are bit-identical")


def test_a_disk_that_stays_full(photos, tmp_path, whole, fault):
    row = fault("disk full from step 7 to the end")
    place = Place(tmp_path, recipe(photos))
    run = on_small_disk(place, 8 << 20, FILL)
    if "mounted" not in run.output:
        pytest.skip("the system allows no file system of one's own")
    one_line(run, "No space left on device")
    assert place.saved == [3, 6]
    (place.run / "other").unlink()
    place.finish()
    assert differences(whole, place.run) == []
    row.outcome("one line, exit code 2, the checkpoint before is intact; with room again it resumes, bit-identical")


def test_a_disk_too_small_for_one_checkpoint(photos, tmp_path, fault):
    row = fault("not enough room for one checkpoint (or a quota)")
    place = Place(tmp_path, recipe(photos, epochs=2))
    run = on_small_disk(place, 200_000)
    text = one_line(run)
    assert "No space left" in text or "File too large" in text
    assert place.saved == []
    row.outcome("one line, exit code 2")


def test_folders_that_cannot_be_written(photos, tmp_path, fault):
    row = fault("the output folder is read-only, or a file")
    place = Place(tmp_path, recipe(photos, epochs=1))
    place.run = Path("/proc/swinscale")  # nobody can make a folder there, root included
    one_line(Run(tmp_path / "said", "train", place.recipe, "--out", place.run), str(place.run))
    (tmp_path / "file").write_text("")
    one_line(Run(tmp_path / "said", "train", place.recipe, "--out", tmp_path / "file"), str(tmp_path / "file"))
    one_line(Run(tmp_path / "said", "train", place.recipe, "--out", tmp_path / "file/run"), str(tmp_path / "file"))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    # root writes anywhere: it becomes nobody first
    nobody = "import os\nif os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and folder.stat().st_mode & 0o5 != 0o5:
            folder.chmod(folder.stat().st_mode | 0o5)
    one_line(Run(tmp_path / "said", "train", place.recipe, "--out", closed / "run", patch=nobody), "Permission denied")
    row.outcome("one line that names the folder, exit code 2")


def test_two_runs_in_one_folder(photos, tmp_path, whole, fault):
    row = fault("a second run in the folder of one that is at work")
    place = Place(tmp_path, recipe(photos))
    pause = "import time\nfrom swinscale import train\ninner = train._Run._optimizer_step\ndef step(self, b):\n"
    pause += "    time.sleep(0.1)\n    return inner(self, b)\ntrain._Run._optimizer_step = step\n"
    first = place.start(patch=pause)
    first.until(lambda: place.steps >= 2, "step 2")
    one_line(place.start(), "Another run is writing to", "--out")
    assert first.wait() == 0
    assert differences(whole, place.run) == []
    row.outcome("one line, exit code 2; the first run is not disturbed")


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def shard(step: Path) -> Path:
    return next(step.glob("*.safetensors"))


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 16
    path.write_bytes(bytes(data))


def sign(step: Path) -> None:
    """Makes checksums fit: what an attacker would do, and no accident."""
    names = json.loads((step / CHECKSUMS).read_text())
    (step / CHECKSUMS).write_text(json.dumps({name: _checksum(step / name) for name in names}))


def header(path: Path, change) -> None:
    """Rewrites the head of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])


def far(head: dict) -> dict:
    name = next(n for n in head if n.startswith("task."))
    begin, end = head[name]["data_offsets"]
    return head | {name: head[name] | {"data_offsets": [begin + 10**9, end + 10**9]}}


def swap(new: Path, old: Path) -> None:
    new.rename(new.with_name("x"))
    old.rename(new)
    new.with_name("x").rename(old)


DAMAGE = {
    "cut short": lambda new, old, mark: os.truncate(shard(new), shard(new).stat().st_size // 2),
    "one bit in its head": lambda new, old, mark: flip(shard(new), 0.001),
    "one bit in its middle": lambda new, old, mark: flip(shard(new), 0.5),
    "one bit in its counters": lambda new, old, mark: flip(new / "state.json", 0.5),
    "tensors of an older one": lambda new, old, mark: shutil.copy(shard(old), shard(new)),
    "all of an older one": lambda new, old, mark: (shutil.rmtree(new), shutil.copytree(old, new)),
    "a file is missing": lambda new, old, mark: shard(new).unlink(),
    "empty": lambda new, old, mark: (shutil.rmtree(new), new.mkdir()),
    "tensors of another project": lambda new, old, mark: save_file({"a": torch.ones(9)}, shard(new)),
    "a pickle that runs a command": lambda new, old, mark: shard(new).write_bytes(pickle.dumps(Hostile(mark))),
    "such a pickle with fitting checksums": lambda new, old, mark: (
        shard(new).write_bytes(pickle.dumps(Hostile(mark))),
        sign(new),
    ),
    "a head of an exabyte, fitting checksums": lambda new, old, mark: (
        shard(new).write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
        sign(new),
    ),
    "tensors outside of the file, fitting checksums": lambda new, old, mark: (header(shard(new), far), sign(new)),
    "checksums that point outside": lambda new, old, mark: (new / CHECKSUMS).write_text('{"../../config.json": "0"}'),
    "10,000 nested brackets": lambda new, old, mark: (new / CHECKSUMS).write_text("[" * 10_000),
}


IN_SHORT = ("cut short", "one bit in its middle", "tensors of an older one", "all of an older one", "empty",
            "such a pickle with fitting checksums", "tensors outside of the file, fitting checksums")  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE if LONG else IN_SHORT)
def test_a_damaged_checkpoint(photos, tmp_path, whole, fault, kind):
    """It is passed over for the one before, and the run that goes on from there ends the same."""
    row = fault(f"newest checkpoint: {kind}")
    place = Place(tmp_path, recipe(photos))
    shutil.copytree(whole, place.run)
    old, new = (place.run / f"checkpoints/step-{step:08d}" for step in place.saved)
    DAMAGE[kind](new, old, tmp_path / "mark")
    place.finish()
    assert len(place.events("damaged_checkpoint")) == 1
    assert not (tmp_path / "mark").exists()
    assert differences(whole, place.run) == []
    row.outcome("said; the one before is used; bit-identical")


def test_no_intact_checkpoint(photos, tmp_path, whole, fault):
    row = fault("every checkpoint is damaged")
    place = Place(tmp_path, recipe(photos))
    shutil.copytree(whole, place.run)
    for file in place.run.glob("checkpoints/step-*/*.safetensors"):
        flip(file, 0.5)
    before = sorted(place.run.rglob("*"))
    one_line(place.start(), "is damaged", "No intact checkpoint is left")
    assert sorted(place.run.rglob("*")) == before
    row.outcome("one line, exit code 2; nothing is overwritten")


def test_a_damaged_record(photos, tmp_path, whole, fault):
    row = fault("config.json of the run is cut short, or gone")
    place = Place(tmp_path, recipe(photos))
    shutil.copytree(whole, place.run)
    record = place.run / "config.json"
    record.write_text(record.read_text()[:100])
    one_line(place.start(), "config.json is damaged")
    record.unlink()
    one_line(place.start(), "config.json")
    shutil.copy(whole / "config.json", record)
    place.finish()
    assert differences(whole, place.run) == []
    row.outcome("one line that names it, exit code 2; nothing is overwritten")


def test_a_checkpoint_of_another_model(photos, tmp_path, whole, fault):
    row = fault("checkpoint of another model, intact")
    place = Place(tmp_path, recipe(photos))
    shutil.copytree(whole, place.run)
    new = place.run / f"checkpoints/step-{place.saved[-1]:08d}"
    tensors = load_file(shard(new))
    save_file({n: t.repeat(2) if t.ndim == 1 else t for n, t in tensors.items()}, shard(new))
    sign(new)
    one_line(place.start(), "another model or recipe")
    row.outcome("one line, exit code 2")
