"""What is going on, on standard error: a line per step, and a bar over the steps where there is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_start = time.monotonic()
_console = None


def say(text: str) -> None:
    """One line, with the seconds since the start."""
    line = f"{time.monotonic() - _start:6.0f} s  {text}"
    if _console is not None:
        _console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        print(line, file=sys.stderr, flush=True)


def steps(items: Iterable[T], title: str) -> Iterator[T]:
    """``items``, with a bar below the lines of ``say`` on a terminal."""
    global _console
    items = list(items)
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(items))
        _console = console
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            _console = None
