"""What a run says while it runs: JSON lines for machines, TensorBoard, and a progress bar for people."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MEASURES = 12
"""More than so many are not put on one line."""


def peak_memory_gib() -> float:
    """Largest memory use of this process so far: of the GPU when there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``log.jsonl``. Where a resumed run repeated a step, the later entry counts."""
    path = directory / "log.jsonl"
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run may be cut
        entries[entry["kind"], entry["step"]] = entry
    return list(entries.values())


def _cut_short(path: Path) -> bool:
    """Whether a text file ends within a line."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read() not in (b"", b"\n")


def measures(values: Mapping[str, Any]) -> str:
    """Measures in one line, the first of many, without matrices and without a count of unreadable images that is zero."""
    shown = [f"{n} {v:.4g}" for n, v in values.items() if isinstance(v, float) and (v or n != "unreadable")]
    return ", ".join(shown) if len(shown) <= MEASURES else ", ".join([*shown[: MEASURES // 2], "…"])


class RunLog:
    """Writes ``log.jsonl`` and TensorBoard files and shows progress; silent in all but the main process."""

    def __init__(self, directory: Path, is_main: bool, step: int, total_steps: int):
        self.is_main, self.total = is_main, total_steps
        self.unreadable: dict[str, str] = {}
        """Images that could not be read, with the reason."""
        self.warned: dict[str, set[str]] = {}  # by instrument, the kinds of its last reading
        if not is_main:
            return
        self.console = Console(highlight=False)
        self.file = (directory / "log.jsonl").open("ab", buffering=0)
        # After half a line, the next entry is not to be lost with it.
        self.unwritten = b"\n" if _cut_short(directory / "log.jsonl") else b""
        self.tensorboard: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)
        except ImportError:
            self.console.print("TensorBoard is not installed; log.jsonl has everything.")
        except OSError as error:
            self._without_tensorboard(error)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        text = [TextColumn(c) if isinstance(c, str) else c for c in columns]
        self.bar = Progress(*text, *times, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("training", total=total_steps, completed=step, state="")
        self.shown = time.monotonic()

    def __enter__(self) -> Self:
        if self.is_main:
            self.bar.start()
            threading.excepthook, self.excepthook = self._thread_failed, threading.excepthook
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            self.bar.stop()
            self._write(b"")
            self.file.close()
            self._to_tensorboard("close")
            threading.excepthook = self.excepthook

    def scalars(
        self, step: int, kind: str, values: Mapping[str, float], record: Mapping[str, Any] | None = None
    ) -> None:
        """One entry of ``kind`` ("train", "eval") at ``step``; ``record`` is for ``log.jsonl`` alone."""
        if not self.is_main:
            return
        self._write(json.dumps({"kind": kind, "step": step, **values, **(record or {})}).encode() + b"\n")
        for name, value in values.items():
            self._to_tensorboard("add_scalar", f"{kind}/{name}", value, step)
        if kind == "eval":
            self.message(f"step {step}: {measures(values)}")

    def reading(self, step: int, name: str, reading: Any) -> None:
        """What an instrument saw (``diagnose.instrument.Reading``). It warns of each kind once until it has been absent."""
        if reading.scalars or reading.record:
            self.scalars(step, name, reading.scalars, reading.record)
        before = self.warned.get(name, set())
        for kind, text in reading.warnings:
            if kind not in before:
                self.event(kind, step, text)
        self.warned[name] = {kind for kind, _ in reading.warnings}

    def skipped(self, step: int, images: Iterable[tuple[str, str]]) -> None:
        """Images that cannot be read, with the reason; each is counted once, and the first ones are named."""
        for name, reason in images:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                count = len(self.unreadable)
                if count <= 10 or count % 1000 == 0:
                    self.event("unreadable", step, f"{count} unreadable so far: {name} ({reason})")

    def event(self, kind: str, step: int, text: str) -> None:
        """Something out of the ordinary."""
        if self.is_main:
            self._write(json.dumps({"kind": kind, "step": step, "text": text}).encode() + b"\n")
            self.message(text)

    def _write(self, line: bytes) -> None:
        """Adds to the log; what a full disk does not take is kept, and tried again with the next line."""
        waiting, self.unwritten = bool(self.unwritten), self.unwritten + line
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not waiting:
                self.message(f"log.jsonl cannot be written ({error.strerror}); its entries are kept until it can.")

    def _to_tensorboard(self, method: str, *arguments: Any) -> None:
        if self.tensorboard is not None:
            try:
                getattr(self.tensorboard, method)(*arguments)
            except OSError as error:
                self._without_tensorboard(error)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread would print a traceback for a full disk; the next entry says so in a line."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            self.excepthook(failure)

    def _without_tensorboard(self, error: OSError) -> None:
        self.tensorboard = None
        self.message(f"TensorBoard's files cannot be written ({error.strerror}); log.jsonl has everything.")

    def announce(self, manifest: dict[str, Any], step: int) -> None:
        """What is about to run, from its manifest: size, data, effective batch, scaled learning rate."""
        m = manifest
        self.message(
            f"{m['parameters'] / 1e6:.2f} M parameters, {m['precision']} on {m['device']}; "
            f"{m['train_images']} training and {m['eval_images']} evaluation images"
        )
        self.message(
            f"effective batch {m['effective_batch']} = {m['micro_batch']} × {m['accumulation']} accumulated × "
            f"{m['processes']} processes; learning rate {m['scaled_lr']:.3g} after {m['warmup_steps']} warm-up steps; "
            f"{m['total_steps']} steps" + (f", resumed at step {step}" if step else "")
        )

    def message(self, text: str) -> None:
        """A line for people only."""
        if self.is_main:
            self.console.print(f"  {text}", markup=False, soft_wrap=True)

    def progress(self, step: int, loss: float, images_per_second: float, waiting: float) -> None:
        """Moves the bar; without a terminal, a line every half minute.

        Args:
            waiting: share of the time so far in which training waited for data.
        """
        if not self.is_main:
            return
        state = f"loss {loss:.4f} · {images_per_second:.0f} images/s · {waiting:.0%} waiting for data · {peak_memory_gib():.1f} GiB"
        self.bar.update(self.task, completed=step, state=state)
        if not self.console.is_terminal and time.monotonic() - self.shown > 30:
            self.shown = time.monotonic()
            self.message(f"step {step}/{self.total}: {state}")
