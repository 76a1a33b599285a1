"""Launching: the guides of docs/clusters.md and the files in examples/, as far as one machine can try them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.test_train import equal, recipe, wait_for_steps, weights

from swinscale.checkpoint import checkpoint_steps
from swinscale.config import to_dict
from swinscale.runlog import read_log
from swinscale.signals import RESTARTABLE

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def recorded(photos: Path, folder: Path, **how: object) -> Path:
    """A recipe in a file, for ``swinscale train FILE``."""
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe(photos, **how))))
    return folder / "recipe.json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agent(arguments: list[object], *options: str) -> subprocess.Popen[str]:
    """``torchrun`` with one process, as on one of several machines, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=1",
        *options,
        "-m",
        "swinscale",
        "train",
    ]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process with its descendants at once, as a machine that loses power."""
    family = [process.pid]
    for pid in family:
        with contextlib.suppress(OSError):
            family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_two_machines_meet(photos, tmp_path):
    """Two agents of ``torchrun``, each with a process, train as one run."""
    file, meeting = recorded(photos, tmp_path, epochs=1), f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ("--nnodes=2", "--rdzv-backend=c10d", meeting, "--rdzv-id=two")
    agents = [agent([file, "--out", tmp_path / "run", "--resume"], *options) for _ in range(2)]
    try:
        for process in agents:
            _, error = process.communicate(timeout=180)
            assert process.returncode == 0, error[-2000:]
    finally:
        for process in agents:
            end(process)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_machines(photos, tmp_path):
    """Elastic: one of two agents is killed with its process; the other starts anew alone and finishes the run."""
    file = recorded(photos, tmp_path, epochs=60, eval_every=0, checkpoint_every=1)
    meeting = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ("--nnodes=1:2", "--rdzv-backend=c10d", meeting, "--rdzv-id=elastic", "--max-restarts=5",
               "--rdzv-conf=last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=2,heartbeat=1")  # fmt: skip
    first = agent([file, "--out", tmp_path / "run", "--resume"], *options)
    time.sleep(1)  # the first one holds the meeting point
    second = agent([file, "--out", tmp_path / "run", "--resume"], *options)
    try:
        deadline = time.monotonic() + 120
        while not checkpoint_steps(tmp_path / "run/checkpoints"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        end(second)
        output, error = first.communicate(timeout=240)
        assert first.returncode == 0, error[-2000:]
    finally:
        end(first)
        end(second)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 60 * 3
    both, alone = (output.index(f"accumulated × {n} processes") for n in (2, 1))
    assert both < alone
    assert "resumed at step" in output[alone:].splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_stops_a_run_and_starts_it_again(photos, tmp_path, number):
    """Saved, exit code 75, no traceback; started again it ends as if nothing had happened, to the last bit."""
    settings = {"epochs": 30, "checkpoint_every": 0, "eval_every": 0}
    file = recorded(photos, tmp_path, **settings)
    command = [sys.executable, "-m", "swinscale", "train", file, "--resume", "--out"]
    whole = subprocess.run([*command, tmp_path / "whole"], env=ENVIRONMENT, capture_output=True, timeout=180)
    assert whole.returncode == 0, whole.stderr
    stopped = subprocess.Popen([*command, tmp_path / "run"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run/log.jsonl")
    stopped.send_signal(getattr(signal, number))
    _, error = stopped.communicate(timeout=60)
    assert stopped.returncode == RESTARTABLE
    assert "resume to go on from there" in error and "Traceback" not in error
    assert subprocess.run([*command, tmp_path / "run"], env=ENVIRONMENT, capture_output=True).returncode == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    losses = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"] for d in ("whole", "run")]
    assert losses[0] == losses[1]


# Stand-ins for SLURM's commands: srun starts two tasks with the variables of a job step, sends them SIGUSR1 after a few steps
# of the first attempt, and returns the largest exit code, as SLURM does.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path
tasks = []
for rank in range(2):
    place = {{"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank)}}
    tasks.append(subprocess.Popen(sys.argv[2:], env={{**os.environ, **place}}))
log = Path({log!r})
if not Path("requeued").exists():
    while not (log.exists() and log.read_text().count("\\n") > 2):
        assert all(t.poll() is None for t in tasks)
        time.sleep(0.1)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!{python}
import sys
from pathlib import Path
if sys.argv[1] == "requeue":
    Path("requeued").write_text(sys.argv[2])
else:
    print("127.0.0.1\\nnode1")
"""


@pytest.mark.slow
def test_the_slurm_script(photos, tmp_path):
    """It stops at the signal, puts itself back into the queue, and its second start finishes the run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "run/log.jsonl"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text.format(python=sys.executable, log=str(log)))
        (folder / name).chmod(0o755)
    (folder / "swinscale").write_text(f'#!/bin/sh\nexec {sys.executable} -m swinscale "$@"\n')
    (folder / "swinscale").chmod(stat.S_IRWXU)
    file = recorded(photos, tmp_path, epochs=30, checkpoint_every=0, eval_every=0)
    variables = {"SLURM_JOB_ID": str(free_port() - 10000), "SLURM_JOB_NODELIST": "node[0-1]"}
    environment = {**ENVIRONMENT, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "examples/slurm.sbatch", file, "--out", tmp_path / "run"]
    stopped = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert stopped.returncode == RESTARTABLE, stopped.stderr
    assert (tmp_path / "requeued").read_text() == variables["SLURM_JOB_ID"]
    assert stopped.stderr.count("resume to go on from there") == 1  # one process speaks
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 90
    assert json.loads((tmp_path / "run/manifest.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_the_kubernetes_job(photos, tmp_path):
    """The command of its two pods, with this machine's address and one process each, trains a run."""
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    container = pod["containers"][0]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    file, port = recorded(photos, tmp_path, epochs=1), free_port()
    changes = {"--master-addr": "127.0.0.1", "--master-port": port, "--nproc-per-node": 1, "--out": tmp_path / "run"}
    pods = []
    for index in range(job["spec"]["completions"]):
        words = [w.replace("$(JOB_COMPLETION_INDEX)", str(index)) for w in container["command"]]
        words = [f"{w.split('=')[0]}={changes[w.split('=')[0]]}" if w.split("=")[0] in changes else w for w in words]
        words = [str(file) if w == "simmim_swinv2_giant" else w for w in words if not w.startswith("--data")]
        assert words[0] == "torchrun"
        pods.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words[1:]],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        ))  # fmt: skip
    try:
        for process in pods:
            _, error = process.communicate(timeout=180)
            assert process.returncode == 0, error[-2000:]
    finally:
        for process in pods:
            end(process)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["processes"] == 2
