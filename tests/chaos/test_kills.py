"""kill -9 at any moment: the run that goes on ends like one that nobody killed, to the last bit."""

from __future__ import annotations

import collections
import json
import shutil
import signal
import time

import numpy as np
import pytest
from tests.chaos import LONG
from tests.chaos.faults import Place, differences, recipe

KILLS = 20 if LONG else 3
EPOCHS = 24 if LONG else 8


def moment(place: Place) -> str:
    """Where a run was when it was killed, from what it left."""
    if not (place.run / "log.jsonl").exists():
        return "before the first step"
    if any((place.run / "checkpoints").glob(".writing-*")):
        return "while a checkpoint was written"
    return "between two saves"


def test_random_moments(photos, tmp_path, fault):
    row = fault(f"kill -9 of the whole run at {KILLS} random moments")
    whole = Place(tmp_path, recipe(photos, epochs=EPOCHS), "whole")
    started = time.monotonic()
    whole.finish()
    duration = time.monotonic() - started
    random = np.random.default_rng(20)
    moments: collections.Counter[str] = collections.Counter()
    finished, place = 0, Place(tmp_path, recipe(photos, epochs=EPOCHS), "killed-0")
    while moments.total() < KILLS or place.run.exists():
        run = place.start()
        if moments.total() < KILLS:
            time.sleep(random.uniform(0.02, 0.5) * duration)
            if run.running:
                run.kill()
                moments[moment(place)] += 1
                continue
        assert run.wait() == 0, run.errors[-3000:]
        assert differences(whole.run, place.run) == []
        finished += 1
        place = Place(tmp_path, recipe(photos, epochs=EPOCHS), f"killed-{finished}")
    said = ", ".join(f"{count} {where}" for where, count in moments.most_common())
    row.outcome(f"{said}; resumed to the end, every loss and every weight is bit-identical", kills=dict(moments))


# What a run does at its second save, in the order in which it does it. ``die_when`` takes the arguments of the wrapped function.
KILLER = """
import os, signal, shutil
from pathlib import Path
from swinscale import checkpoint, runlog

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(owner, name, when=lambda *a: True, first=lambda *a: None, done=lambda *a: None):
    inner = getattr(owner, name)
    def wrapped(*arguments, **named):
        now = when(*arguments)
        if now:
            first(*arguments)
            if done is None:
                die()
        result = inner(*arguments, **named)
        if now:
            done(*arguments)
            die()
        return result
    setattr(owner, name, wrapped)
"""
WRITING = "lambda path, *a: Path(path).name.startswith('.writing-')"
MOMENTS = {
    "config.json is half written, at the very start": (
        "die_at(Path, 'replace', lambda p, *a: p.name == '.config.json.writing', done=None)"
    ),
    "best/ is about to be written": (
        "die_at(os, 'replace', lambda a, b, *_: 'best' in str(b) and str(b).endswith('.safetensors'), done=None)"
    ),
    "a tensor file is about to be written": "die_at(checkpoint._Writer, 'write_data', done=None)",
    "half of a tensor file is written": (
        "die_at(checkpoint._Writer, 'write_data', done=lambda self, *a: "
        "[os.truncate(f, f.stat().st_size // 2) for f in Path(self.path).glob('*.safetensors')])"
    ),
    "tensors are written, counters are not": (
        "die_at(Path, 'write_text', lambda p, *a: p.name == 'state.json', done=None)"
    ),
    "counters are written, checksums are not": (
        "die_at(Path, 'write_text', lambda p, *a: p.name == 'checksums.json', done=None)"
    ),
    "all is written but has no name yet": f"die_at(Path, 'rename', {WRITING}, done=None)",
    "it has its name, the oldest one is still there": f"die_at(Path, 'rename', {WRITING})",
    "half of the oldest one is removed": (
        "die_at(shutil, 'rmtree', lambda p, *a: Path(p).name.startswith('step-') and Path(p).exists(), "
        "first=lambda p, *a: (Path(p) / 'checksums.json').unlink(), done=None)"
    ),
    "one file of last/ is replaced, the other is not": (
        "die_at(os, 'replace', lambda a, b, *_: 'last' in str(b) and str(b).endswith('.safetensors'))"
    ),
    "half of a line of the log is written": (
        "die_at(runlog.RunLog, 'scalars', first=lambda self, *a: self.file.write(b'{\"kind\": \"tra'), done=None)"
    ),
    "result.json is about to be replaced": (
        "die_at(Path, 'replace', lambda p, *a: p.name == '.result.json.writing', done=None)"
    ),
}


def test_every_moment_of_a_save(photos, tmp_path, fault):
    """One run, killed at each of them and resumed after each."""
    row = fault(f"kill -9 at {len(MOMENTS)} moments of writing, one after the other in one run")
    settings = {"epochs": 12, "keep_checkpoints": 1}
    whole = Place(tmp_path, recipe(photos, **settings), "whole")
    whole.finish()
    place = Place(tmp_path, recipe(photos, **settings), "killed")
    for what, patch in MOMENTS.items():
        run = place.start(patch=KILLER + patch)
        assert run.wait() == -signal.SIGKILL, f"{what}: {run.output[-500:]}{run.errors[-3000:]}"
        assert not (place.run / "result.json").exists()
    place.finish()
    assert differences(whole.run, place.run) == []
    assert not [*place.run.rglob("*.writing*"), *place.run.rglob("*.tmp")]
    row.outcome("each time an intact checkpoint is there; resumed to the end, bit-identical", moments=list(MOMENTS))


def test_half_a_line_of_the_log(photos, tmp_path, whole, fault):
    """What a full disk or a kill may leave; the line that comes next must not be lost with it."""
    row = fault("the log ends in half a line")
    place = Place(tmp_path, recipe(photos))
    shutil.copytree(whole, place.run)
    shutil.rmtree(place.run / f"checkpoints/step-{place.saved[-1]:08d}")
    newest, log = place.saved[-1], place.run / "log.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= newest]
    log.write_text("\n".join(lines) + '\n{"kind": "train", "ste')
    place.finish()
    assert differences(whole, place.run) == []
    row.outcome("that line is left out, nothing else")


def test_the_main_process_alone(photos, tmp_path, whole, fault):
    """Its loader processes live on for a few seconds; they must not keep the directory from the run that goes on."""
    row = fault("kill -9 of the training process alone, its loader processes live on; restarted at once")
    place = Place(tmp_path, recipe(photos, num_workers=2))
    run = place.start()
    run.until(lambda: place.steps >= 4, "step 4")
    run.kill_alone()
    place.finish()
    assert differences(whole, place.run) == []
    row.outcome("resumes at once, bit-identical")


@pytest.mark.skipif(not LONG, reason="part of make chaos")
def test_random_moments_of_two_processes(photos, tmp_path, fault):
    kills = 5
    row = fault(f"kill -9 of both of two processes at {kills} random moments")
    whole = Place(tmp_path, recipe(photos, epochs=8), "whole")
    started = time.monotonic()
    whole.finish_group()
    duration = time.monotonic() - started
    random = np.random.default_rng(5)
    place, done = Place(tmp_path, recipe(photos, epochs=8), "killed"), 0
    moments: collections.Counter[str] = collections.Counter()
    while done < kills:
        group = place.start_group()
        time.sleep(random.uniform(0.1, 0.9) * duration)
        if not all(run.running for run in group):
            for run in group:
                run.kill()
            if place.run.exists():
                shutil.rmtree(place.run)
            continue
        for run in group:
            run.kill()
        done, moments[moment(place)] = done + 1, moments[moment(place)] + 1
    place.finish_group()
    assert differences(whole.run, place.run) == []
    said = ", ".join(f"{count} {where}" for where, count in moments.most_common())
    row.outcome(f"{said}; resumed to the end, bit-identical", kills=dict(moments))
