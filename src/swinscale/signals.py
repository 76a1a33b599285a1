"""Stopping a run from outside without losing anything."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C; what schedulers, ``torchrun`` and Kubernetes send; what SLURM is usually told to send before the time is up."""

RESTARTABLE = 75
"""Exit code of a run that a scheduler stopped and that can be resumed ("temporary failure", sysexits.h)."""


@contextmanager
def stop_signal() -> Iterator[Callable[[], int]]:
    """Turns a signal into a wish to stop after the current step; a second Ctrl-C stops at once.

    Yields: a function that returns the number of the signal that came, or 0.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield int
        return

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
