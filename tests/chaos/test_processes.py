"""Several processes, one of which dies."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.chaos import LONG, ROOT
from tests.chaos.faults import HANG, Place, differences, kill_group, recipe, wait_until

EPOCHS = 8
SLOW = """
import time
from swinscale import train
inner = train._Run._optimizer_step
def step(self, batches):
    time.sleep(0.1)
    return inner(self, batches)
train._Run._optimizer_step = step
"""
DIES_IN_A_SAVE = """
import os, signal
from swinscale import checkpoint
inner = checkpoint._Writer.write_data
def write(self, *a):
    if "00000006" in str(self.path):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(self, *a)
checkpoint._Writer.write_data = write
"""


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The run of two processes, which nothing interrupted."""
    place = Place(tmp_path_factory.mktemp("whole2"), recipe(photos, epochs=EPOCHS))
    place.finish_group()
    return place.run


def stopped(run, place: Place, within: float) -> None:
    """The processes that are left end by themselves, say why, and can be told apart from a mistake by their exit code."""
    assert run.wait(within) == 75, run.errors[-3000:]
    assert "Traceback" not in run.errors, run.errors[-3000:]
    assert "resume" in run.errors, run.errors


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_of_two_is_killed(photos, tmp_path, whole, fault, victim):
    row = fault(f"kill -9 of process {victim} of 2")
    place = Place(tmp_path, recipe(photos, epochs=EPOCHS))
    group = place.start_group(patches={0: SLOW, 1: SLOW})
    group[0].until(lambda: place.steps >= 5, "step 5")
    group[victim].kill()
    died = time.monotonic()
    stopped(group[1 - victim], place, 60)
    seconds = time.monotonic() - died
    place.finish_group()
    assert differences(whole, place.run) == []
    row.outcome(
        f"the other one ends within {math.ceil(seconds)} s, with a line and exit code 75; restarted, bit-identical",
        seconds=round(seconds, 1),
    )


@pytest.mark.parametrize("victim", [0, 1] if LONG else [1])
def test_one_process_of_two_is_killed_in_a_save(photos, tmp_path, whole, fault, victim):
    row = fault(f"kill -9 of process {victim} of 2 while both write a checkpoint")
    place = Place(tmp_path, recipe(photos, epochs=EPOCHS))
    group = place.start_group(patches={victim: DIES_IN_A_SAVE})
    assert group[victim].wait() == -signal.SIGKILL
    died = time.monotonic()
    stopped(group[1 - victim], place, 60)
    seconds = time.monotonic() - died
    assert place.saved == [3]
    place.finish_group()
    assert differences(whole, place.run) == []
    row.outcome(
        f"the other one ends within {math.ceil(seconds)} s, with a line and exit code 75; restarted, bit-identical",
        seconds=round(seconds, 1),
    )


class Torchrun:
    """``torchrun … -m swinscale train …`` as a user starts it."""

    def __init__(self, place: Place, *options: str):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
        command += ["-m", "swinscale", "train", str(place.recipe), "--out", str(place.run), "--resume"]
        self.place, self.said = place, (place.home / "torchrun.txt").open("a+")
        self.process = subprocess.Popen(
            command, stdout=self.said, stderr=self.said, start_new_session=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def workers(self) -> list[int]:
        """Their numbers, that of rank 0 first."""
        found = {}
        for pid in subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True
        ).stdout.split():
            try:
                rank = re.search(rb"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())
            except OSError:
                continue
            if rank:
                found[int(rank[1])] = int(pid)
        return [found[rank] for rank in sorted(found)]

    def kill_at(self, step: int, rank: int) -> None:
        wait_until(lambda: self.place.steps >= step or self.process.poll() is not None, f"step {step}", 2 * HANG)
        assert self.process.poll() is None, self.text()[-3000:]
        os.kill(self.workers()[rank], signal.SIGKILL)

    def wait(self, timeout: float = 2 * HANG) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            kill_group(self.process.pid)

    def text(self) -> str:
        self.said.seek(0)
        return self.said.read()


# Long enough that a process can be killed before the end; each step is some 20 ms.
MANY = 60


@pytest.fixture(scope="module")
def long_whole(photos, tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("whole2"), recipe(photos, epochs=MANY))
    place.finish_group()
    return place.run


@pytest.mark.skipif(not LONG, reason="part of make chaos")
def test_torchrun_without_restarts(photos, tmp_path, long_whole, fault):
    row = fault("torchrun, kill -9 of one process of 2, no restarts allowed")
    place = Place(tmp_path, recipe(photos, epochs=MANY))
    first = Torchrun(place, "--max-restarts=0")
    first.kill_at(20, rank=1)
    died = time.monotonic()
    assert first.wait(60) not in (0, None)
    seconds = time.monotonic() - died
    second = Torchrun(place, "--max-restarts=0")
    assert second.wait() == 0, second.text()[-3000:]
    assert differences(long_whole, place.run) == []
    row.outcome(
        f"all end within {math.ceil(seconds)} s; the same command again goes on, bit-identical",
        seconds=round(seconds, 1),
    )


@pytest.mark.skipif(not LONG, reason="part of make chaos")
def test_torchrun_that_restarts(photos, tmp_path, long_whole, fault):
    row = fault("torchrun --max-restarts=1, kill -9 of one process of 2")
    place = Place(tmp_path, recipe(photos, epochs=MANY))
    run = Torchrun(place, "--max-restarts=1")
    run.kill_at(20, rank=0)
    assert run.wait() == 0, run.text()[-3000:]
    assert "resumed at step" in run.text()
    assert differences(long_whole, place.run) == []
    row.outcome("torchrun starts both again, they go on by themselves; bit-identical")
