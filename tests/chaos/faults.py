"""Runs of the command line that a fault befalls, and what came of them.

A run is ``swinscale train …`` in a process of its own, with its own process group, standard output and standard error, as a
shell starts it. It is forked from a process that has imported PyTorch already, which saves eight seconds a run. A fault that
no outside event can bring about at the right moment (a kill while a file is half written, a GPU that is full) is a *patch*:
Python that the new process executes before the command line begins.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.chaos import ROOT

from swinscale.checkpoint import checkpoint_steps
from swinscale.config import to_dict
from swinscale.models import SwinConfig
from swinscale.optim import OptimConfig
from swinscale.recipes import DataConfig, Recipe
from swinscale.runlog import read_log
from swinscale.tasks import ClassifyConfig
from swinscale.train import TrainConfig

HANG = 120.0
"""Seconds after which a run that should have ended counts as hanging, on a slow machine as well."""

MODEL = SwinConfig(
    embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, img_size=32, patch_size=4, num_classes=0,
    drop_path_rate=0.2,
)  # fmt: skip


def recipe(photos: Path, data: Mapping[str, Any] | None = None, **how: Any) -> Recipe:
    """Three steps an epoch on 21 pictures, with everything that a resumed run must get right: averages, mixup, dropped paths."""
    optim = OptimConfig(lr=2e-3, lr_scaling="none", warmup_epochs=1)
    settings: dict[str, Any] = {
        "epochs": 4, "batch_size": 6, "num_workers": 0, "precision": "fp32", "log_every": 1, "device": "cpu",
        "ema_decay": 0.9, "optim": optim,
    }  # fmt: skip
    images = DataConfig(**{"train": str(photos), "augment": "light", **(data or {})})
    return Recipe("chaos", MODEL, ClassifyConfig(mixup=0.5, cutmix=1.0), images, TrainConfig(**settings | how))


class Run:
    """``swinscale`` with ``arguments`` in a process of its own.

    Args:
        folder: for what it prints.
        patch: Python to execute first.
        environment: variables to set.
    """

    def __init__(
        self, folder: Path, *arguments: object, patch: str = "", environment: Mapping[str, object] | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.err")))
        self._out, self._err = (folder / f"{number}.{kind}" for kind in ("out", "err"))
        self._err.touch()
        variables = {name: str(value) for name, value in (environment or {}).items()}
        words = [str(a) for a in arguments]
        self._process = _context().Process(
            target=_child, args=(words, str(self._out), str(self._err), patch, variables)
        )
        self.started = time.monotonic()
        self._process.start()
        self.pid: int = self._process.pid
        _started.append(self.pid)

    @property
    def output(self) -> str:
        return self._out.read_text()

    @property
    def errors(self) -> str:
        return self._err.read_text()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout: float = HANG) -> int:
        """The exit code; a run that does not end fails the test."""
        self._process.join(timeout)
        if self.running:
            os.kill(self.pid, signal.SIGUSR2)  # prints where it is
            time.sleep(1)
            self.kill()
            raise AssertionError(f"hang: no end after {timeout:.0f} s\n{self.output[-2000:]}\n{self.errors[-4000:]}")
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        """kill -9 of the run and its loader processes."""
        kill_group(self.pid)
        self._process.join()

    def kill_alone(self) -> None:
        """kill -9 of the one process; its loader processes have to find out for themselves."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Returns when ``condition`` holds while the run goes on."""
        wait_until(lambda: condition() or not self.running, what)
        assert self.running or condition(), f"the run ended before {what}: {self.output[-500:]}{self.errors[-2000:]}"


class Place:
    """A recipe and the directory of its run."""

    def __init__(self, home: Path, recipe: Recipe, name: str = "run"):
        self.home, self.run = home, home / name
        self.recipe = home / f"{name}.json"
        home.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(json.dumps(to_dict(recipe)))
        self.runs: list[Run] = []

    def start(self, *more: object, patch: str = "", environment: Mapping[str, object] | None = None) -> Run:
        """Begins ``swinscale train RECIPE --out RUN --resume``, or goes on with it."""
        words = ("train", self.recipe, "--out", self.run, "--resume", *more)
        self.runs.append(Run(self.home / f"{self.run.name}-said", *words, patch=patch, environment=environment))
        return self.runs[-1]

    def finish(self, *more: object, **how: Any) -> Run:
        """Runs to the end, which must be a good one."""
        run = self.start(*more, **how)
        code = run.wait()
        assert code == 0, f"exit code {code}: {run.output[-1000:]}{run.errors[-3000:]}"
        return run

    def start_group(self, count: int = 2, *more: object, patches: Mapping[int, str] | None = None) -> list[Run]:
        """The same in ``count`` processes joined by gloo, as ``srun`` starts them."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count}
        return [
            self.start(
                *more, patch=(patches or {}).get(rank, ""), environment={**place, "RANK": rank, "LOCAL_RANK": rank}
            )
            for rank in range(count)
        ]

    def finish_group(self, count: int = 2) -> None:
        codes = [run.wait() for run in self.start_group(count)]
        assert codes == [0] * count, "".join(run.errors[-3000:] for run in self.runs[-count:])

    @property
    def steps(self) -> int:
        """Steps that the log knows of."""
        return max((e["step"] for e in read_log(self.run) if e["kind"] == "train"), default=0)

    @property
    def saved(self) -> list[int]:
        return checkpoint_steps(self.run / "checkpoints")

    def events(self, kind: str) -> list[str]:
        return [e["text"] for e in read_log(self.run) if e["kind"] == kind]


def differences(a: Path, b: Path) -> list[str]:
    """What distinguishes two finished runs: log of every step, measures, exported weights and checkpoints, to the last bit."""
    found = []
    for kind, names in (("train", ("loss", "lr", "grad_norm")), ("eval", ("loss", "top1"))):
        logs = [{e["step"]: [e[n] for n in names] for e in read_log(d) if e["kind"] == kind} for d in (a, b)]
        found += [f"{kind} log"] if logs[0] != logs[1] or not logs[0] else []
    results = [json.loads((d / "result.json").read_text()) for d in (a, b)]
    found += [name for name in ("steps", "metrics", "best") if results[0][name] != results[1][name]]
    newest = checkpoint_steps(a / "checkpoints")
    found += ["checkpoints"] if newest != checkpoint_steps(b / "checkpoints") else []
    shards = [p.relative_to(a) for p in a.glob("checkpoints/step-*/*.safetensors")]
    for file in (Path("best/model.safetensors"), Path("last/model.safetensors"), *shards):
        if not (b / file).exists():
            found.append(f"{file} is missing")
            continue
        one, other = load_file(a / file), load_file(b / file)
        same = one.keys() == other.keys() and all(_same(one[n], other[n]) for n in one)
        found += [] if same else [str(file)]
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def one_line(run: Run, *words: str) -> str:
    """The complaint of a run that ended with exit code 2: at most two lines, with ``words``, and no traceback."""
    code, text = run.wait(), run.errors.strip()
    assert code == 2, f"exit code {code}: {text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    assert text.startswith("swinscale: ") and len(text.splitlines()) <= 2, text[-3000:]
    for word in words:
        assert word in text, text
    return text.removeprefix("swinscale: ")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = HANG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"hang: {what} did not happen within {seconds:.0f} s"
        time.sleep(0.005)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_group(pid: int) -> None:
    """kill -9 of a process and of those in its group that outlived it."""
    for end in (os.killpg, os.kill):
        try:
            end(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone, or not yet a group of its own
            continue


def kill_all() -> None:
    """Ends what a test that failed has left."""
    while _started:
        kill_group(_started.pop())


_server: Any = None
_started: list[int] = []


def _context() -> Any:
    global _server
    if _server is None:
        _server = multiprocessing.get_context("forkserver")
        _server.set_forkserver_preload(["tests.chaos.preload"])
        before = dict(os.environ)
        os.environ |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        try:  # the server inherits the environment of the moment it starts
            from multiprocessing import forkserver

            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ |= before
        ready = _server.Process(target=int)  # waits for the imports, so that no run's time contains them
        ready.start()
        ready.join()
    return _server


def _child(arguments: list[str], out: str, err: str, patch: str, environment: dict[str, str]) -> None:
    os.setsid()
    if sys.version_info < (3, 14) and sys.platform == "linux":
        multiprocessing.set_start_method(
            "fork", force=True
        )  # what a program that a shell starts has; here it is inherited
    os.environ |= environment
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    faulthandler.register(signal.SIGUSR2)
    from swinscale import cli

    if patch:
        exec(compile(patch, "patch", "exec"), {"__name__": "patch"})
    sys.argv = ["swinscale", *arguments]
    sys.exit(cli.main(arguments))
