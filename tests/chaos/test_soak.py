"""Many steps: memory and open files must not grow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.chaos import LONG
from tests.chaos.faults import Place, recipe

STEPS = 10_000 if LONG else 150
FLAT = 0.02 if LONG else 0.05


def sample(pid: int) -> tuple[float, int] | None:
    """Resident memory in MB and the number of open files; None when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except (OSError, IndexError):
        return None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_and_open_files_stay_flat(photos, tmp_path, fault, workers):
    """The first fifth is for what is allocated once. After it, medians of the first and the last part are compared."""
    if workers and not LONG:
        pytest.skip("part of make chaos")
    row = fault(f"{STEPS:,} steps with evaluations and checkpoints, {workers} loader processes")
    epochs = STEPS // 3
    every = STEPS // (3 * 50)  # 50 of them
    settings = {"eval_every": every, "checkpoint_every": every, "log_every": 10, "num_workers": workers}
    place = Place(tmp_path, recipe(photos, epochs=epochs, **settings))
    run = place.start()
    samples: list[tuple[int, float, int]] = []
    while run.running:
        if (found := sample(run.pid)) is not None:
            samples.append((place.steps, *found))
        time.sleep(1 if LONG else 0.05)
    assert run.wait() == 0, run.errors[-3000:]
    assert place.steps == epochs * 3
    later = [s for s in samples if s[0] >= 0.2 * STEPS][:-1]  # the last one may see the end
    assert len(later) >= 8, samples
    part = max(2, len(later) // 8)
    (memory, files), (memory_then, files_then) = (
        [sorted(s[i] for s in some)[len(some) // 2] for i in (1, 2)] for some in (later[:part], later[-part:])
    )
    growth = memory_then / memory - 1
    told = f"{memory:.0f} MB at a fifth, {memory_then:.0f} MB at the end ({growth:+.1%}), {files} and {files_then} open files"
    assert growth < FLAT, told
    assert files_then <= files + 1, told
    row.outcome(told, megabytes=[round(memory, 1), round(memory_then, 1)], growth=round(growth, 4), open_files=[files, files_then],
                samples=[(s, round(m, 1), f) for s, m, f in samples[:: max(1, len(samples) // 50)]])  # fmt: skip
