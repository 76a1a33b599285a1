"""Running the steps of an experiment: each once, several at a time, going on after a kill where it stopped."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from swinscale.checkpoint import write_atomically
from swinscale.claims.base import Step
from swinscale.config import NOT_RECORDED, differences
from swinscale.errors import Stopped, UsageError, speaks
from swinscale.signals import STOPPING, stop_signal

RESULT, FAILURE, OUTPUT = "step.json", "failure.txt", "output.txt"


def run_steps(steps: Sequence[Step], directory: Path, jobs: int, console: Console) -> dict[str, Any]:
    """The results of all steps. What an earlier call has finished is read, not done again.

    Args:
        directory: of the claim; each step has one of its own inside.
        jobs: how many steps run at a time, each in a process with its share of the cores. 1: in this process, which may
            then be one of several that ``torchrun`` started.

    Raises:
        UsageError: if a step fails, with its reason; what others have done is kept.
        Stopped: after a signal; the steps that ran have saved what they had.
    """
    results = {step.name: kept for step in steps if (kept := _kept(step, directory)) is not None}
    if jobs == 1:
        for step in steps:
            if step.name not in results:
                results[step.name] = _run(step, directory / step.name)
                console.print(
                    f"  {len(results)}/{len(steps)} {step.name}: {_summary(results[step.name])}", markup=False
                )
        return results
    if len(results) < len(steps):
        _in_processes(steps, directory, jobs, console, results)
    return results


def _kept(step: Step, directory: Path) -> Any:
    """The result of a step that an earlier call finished, unless the step has changed since."""
    try:
        written = json.loads((directory / step.name / RESULT).read_text())
    except (OSError, ValueError):
        return None
    now = json.loads(json.dumps(step.described()))
    changed = [name for name, before, _ in differences(written["step"], now) if before is not NOT_RECORDED]
    if changed:
        raise UsageError(
            f"{directory / step.name} holds another version of this step ({', '.join(changed[:3])}). Delete {directory}, or choose another "
            f"directory with --runs."
        )
    return written["result"]


def _run(step: Step, directory: Path) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    result = step.run(directory, **step.arguments)
    result = json.loads(json.dumps(result))  # the same whether it was just made or is read again
    written = {"step": step.described(), "result": result, "seconds": round(time.monotonic() - started, 1)}
    if speaks():
        write_atomically(directory / RESULT, json.dumps(written))
    return result


def minutes_taken(steps: Sequence[Step], directory: Path) -> float:
    """Of the processes that ran the steps, added up; of a step that was stopped in between, only its last part."""
    return sum(json.loads((directory / step.name / RESULT).read_text())["seconds"] for step in steps) / 60


def _in_processes(steps: Sequence[Step], directory: Path, jobs: int, console: Console, results: dict[str, Any]) -> None:
    """Starts what can run while there is room, in the order of the steps."""
    context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["swinscale.claims.runner", "swinscale.recipes"])
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = [step for step in steps if step.name not in results]
    running: dict[str, tuple[Step, BaseProcess, float]] = {}
    with stop_signal() as asked:
        while waiting or running:
            if asked():
                _stop([process for _, process, _ in running.values()])
                raise Stopped("Stopped; the same command goes on from there.", asked())
            ready = [s for s in waiting if all(name in results for name in s.after)]
            for step in ready:
                if len(running) >= jobs or any(s.alone for s, *_ in running.values()) or (step.alone and running):
                    break  # in order, so that one which wants to be alone gets its turn
                alone = threads * jobs if step.alone else threads
                process = context.Process(target=_child, args=(step, directory / step.name, alone), daemon=True)
                process.start()
                running[step.name] = (step, process, time.monotonic())
                waiting.remove(step)
            for name, (step, process, started) in list(running.items()):
                if process.is_alive():
                    continue
                del running[name]
                process.join()
                result = _kept(step, directory)
                if process.exitcode or result is None:
                    _stop([other for _, other, _ in running.values()])
                    raise UsageError(_failure(step, directory, process.exitcode))
                results[name] = result
                done, seconds = f"{len(results)}/{len(steps)}", time.monotonic() - started
                console.print(f"  {done} {name}: {_summary(result)} ({seconds:.0f} s)", markup=False, soft_wrap=True)
            time.sleep(0.1)


def _child(step: Step, directory: Path, threads: int) -> None:
    """One step in a process of its own; what it says goes to a file."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(threads)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FAILURE).unlink(missing_ok=True)
    with (directory / OUTPUT).open("a") as output:
        for stream in (sys.stdout, sys.stderr):  # libraries write to them directly
            os.dup2(output.fileno(), stream.fileno())
        try:
            _run(step, directory)
        except (UsageError, OSError) as error:
            write_atomically(directory / FAILURE, str(error))
            sys.exit(2)
        except Stopped:
            sys.exit(1)


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Asks runs to save what they have, and waits for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(60)
        process.kill()


def _failure(step: Step, directory: Path, exitcode: int | None) -> str:
    place = directory / step.name
    with contextlib.suppress(OSError):
        return f"{step.name}: {(place / FAILURE).read_text()}"
    return f"{step.name} ended with exit code {exitcode}: its last words are in {place / OUTPUT}."


def _summary(result: Any) -> str:
    """The most telling value of a result."""
    if result.get("diverged"):
        return "diverged"
    metrics = result.get("metrics", {})
    shown = [f"{n} {metrics[n]:.4g}" for n in ("top1", "loss") if n in metrics]
    return ", ".join(shown) or "done"
