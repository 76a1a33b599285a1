"""Pictures and shards that are broken, missing or gone, and loader processes that die."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from tests.chaos import LONG
from tests.chaos.faults import Place, Run, differences, one_line, recipe

# A step takes a tenth of a second more, so that something can happen meanwhile.
SLOW = """
import time
from swinscale import train
inner = train._Run._optimizer_step
def step(self, batches):
    time.sleep(0.1)
    return inner(self, batches)
train._Run._optimizer_step = step
"""


def test_corrupt_pictures(own_photos, tmp_path, fault):
    row = fault("pictures that are empty, cut short, text, or of another kind than their name says")
    (own_photos / "blue/0.png").write_bytes(b"")
    (own_photos / "green/1.png").write_bytes((own_photos / "green/1.png").read_bytes()[:300])
    (own_photos / "red/2.png").write_text("not a picture")
    (own_photos / "red/3.png").write_bytes(b"\x93NUMPY" + bytes(200))
    place = Place(tmp_path, recipe(own_photos, {"eval_fraction": 0.2}, epochs=3))
    place.finish()
    result = json.loads((place.run / "result.json").read_text())
    told = {*result["unreadable"]}
    assert told and told <= {"blue/0.png", "green/1.png", "red/2.png", "red/3.png"}
    assert len(told) + result["metrics"]["unreadable"] == 4
    row.outcome("each is named once and replaced in training, left out of evaluation; the run ends well")


def test_only_corrupt_pictures(own_photos, tmp_path, fault):
    row = fault("not one picture can be read")
    for file in own_photos.rglob("*.png"):
        file.write_bytes(b"broken")
    for workers in (0, 1):
        place = Place(tmp_path, recipe(own_photos, num_workers=workers), f"run{workers}")
        one_line(place.start(), "None of the 21 images can be read", "not an image")
    row.outcome("one line, exit code 2")


def test_pictures_that_disappear(own_photos, tmp_path, fault):
    row = fault("pictures disappear while the run reads them")
    place = Place(tmp_path, recipe(own_photos, epochs=6))
    run = place.start(patch=SLOW)
    run.until(lambda: place.steps >= 4, "step 4")
    for name in ("blue/1.png", "green/2.png", "red/0.png", "red/1.png"):
        (own_photos / name).unlink()
    assert run.wait() == 0, run.errors[-3000:]
    told = place.events("unreadable")
    assert any("No such file" in text for text in told)
    row.outcome("each is named once and replaced; the run ends well")


@pytest.mark.parametrize("workers", [0, 2])
def test_all_pictures_disappear(own_photos, tmp_path, fault, workers):
    row = fault(f"the folder of pictures disappears during the run, {workers} loader processes")
    place = Place(tmp_path, recipe(own_photos, epochs=40, eval_every=0, num_workers=workers))
    run = place.start(patch=SLOW)
    run.until(lambda: place.steps >= 4, "step 4")
    shutil.rmtree(own_photos)
    one_line(run, "can be read", "No such file")
    assert place.saved
    row.outcome("one line, exit code 2, the newest checkpoint is there")


def test_an_empty_class(own_photos, tmp_path, fault):
    row = fault("a class without pictures, and one with a single picture")
    (own_photos / "white").mkdir()
    (own_photos / "black").mkdir()
    shutil.copy(own_photos / "red/0.png", own_photos / "black/0.png")
    place = Place(tmp_path, recipe(own_photos, epochs=1))
    place.finish()
    known = json.loads((place.run / "best/config.json").read_text())["preprocessing"]["classes"]
    assert known == ["black", "blue", "green", "red"]
    row.outcome("the empty folder is no class; the single picture is trained on")


def test_an_evaluation_set_without_a_class(own_photos, tmp_path, fault):
    row = fault("a class is missing from the evaluation set")
    shutil.copytree(own_photos, tmp_path / "split/train")
    shutil.copytree(own_photos, tmp_path / "split/val")
    shutil.rmtree(tmp_path / "split/val/green")
    one_line(Place(tmp_path, recipe(tmp_path / "split")).start(), "different classes", "green")
    row.outcome("one line that names the class, exit code 2")


@pytest.fixture
def shards(photos, tmp_path):
    folder = tmp_path / "shards"
    packed = Run(tmp_path / "said", "pack", photos, "--out", folder, "--samples-per-shard", 6)
    assert packed.wait() == 0, packed.errors
    return folder


def test_a_shard_cut_short(shards, tmp_path, fault):
    row = fault("a tar shard is cut short")
    broken = sorted(shards.glob("*.tar"))[1]
    os.truncate(broken, broken.stat().st_size // 2)
    place = Place(tmp_path, recipe(shards, epochs=1))
    one_line(place.start(), broken.name, "data.on_broken_shard=skip")
    place = Place(tmp_path, recipe(shards, {"on_broken_shard": "skip"}, epochs=1), "skip")
    place.finish()
    assert any(broken.name in text for text in place.events("broken_train_data"))
    row.outcome("one line, exit code 2; with data.on_broken_shard=skip the rest of it is used, and said")


def test_a_shard_with_changed_bytes(shards, tmp_path, fault):
    row = fault("bytes within a tar shard have changed")
    broken = sorted(shards.glob("*.tar"))[1]
    data = bytearray(broken.read_bytes())
    data[1500:2100] = bytes(600)
    broken.write_bytes(bytes(data))
    place = Place(tmp_path, recipe(shards, {"on_broken_shard": "skip"}, epochs=2))
    run = place.start()
    assert run.wait() == 0, run.errors[-3000:]
    told = place.events("unreadable") + place.events("broken_train_data")
    lost = json.loads((place.run / "result.json").read_text())["metrics"]["unreadable"]
    assert told or lost
    row.outcome("what it hits is named and replaced; the run ends well")


def test_a_shard_that_disappears(shards, tmp_path, fault):
    """It is opened before, so on most systems it can be read on; one that is replaced is noticed."""
    row = fault("a tar shard is replaced by another file during the run")
    place = Place(tmp_path, recipe(shards, epochs=6))
    run = place.start(patch=SLOW)
    run.until(lambda: place.steps >= 4, "step 4")
    one, other = sorted(shards.glob("*.tar"))[:2]
    data = other.read_bytes()
    one.write_bytes(data[: len(data) // 2])
    assert run.wait() == 0, run.errors[-3000:]
    assert any("has changed since it was opened" in text for text in place.events("unreadable"))
    row.outcome("its pictures are named and replaced by those of other shards; the run ends well")


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def test_a_loader_process_is_killed(photos, tmp_path, whole, fault):
    row = fault("kill -9 of all loader processes, " + ("twice" if LONG else "once"))
    place = Place(tmp_path, recipe(photos, num_workers=2))
    run = place.start(patch=SLOW)
    for step in (2, 8) if LONG else (4,):
        run.until(lambda step=step: place.steps >= step, f"step {step}")
        victims = children(run.pid)
        assert victims
        for victim in victims:
            os.kill(victim, 9)
    assert run.wait() == 0, run.errors[-3000:]
    assert differences(whole, place.run) == []
    assert "Traceback" not in run.errors
    assert all("all began again" in text for text in place.events("loader_restarted"))
    assert len(place.events("loader_restarted")) == (2 if LONG else 1)
    row.outcome("said, and they are started again; nothing is lost or read twice; bit-identical")


DEADLY = """
import os
from torch.utils.data import get_worker_info
from swinscale.data import dataset
inner = dataset.ImageDataset.__getitem__
def get(self, item):
    if get_worker_info() is not None and item[0] == 1:
        os.kill(os.getpid(), 9)
    return inner(self, item)
dataset.ImageDataset.__getitem__ = get
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as workers
workers._try_get_data.__defaults__ = (0.1,)  # looks after its processes ten times a second instead of every 5 seconds
"""


def test_loader_processes_that_always_die(photos, tmp_path, whole, fault):
    """As when each takes more memory than there is."""
    row = fault("loader processes are killed again and again (out of memory)")
    place = Place(tmp_path, recipe(photos, num_workers=1))
    one_line(place.start(patch=DEADLY), "killed 4 times in a row", "train.num_workers")
    assert place.saved == [3]
    place.finish("train.num_workers=0")
    assert differences(whole, place.run) == []
    row.outcome("one line with advice, exit code 2; resumed with train.num_workers=0, bit-identical")
