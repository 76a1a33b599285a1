"""Clocks, alternating repetitions, and the statistics of what they give."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

Call = Callable[[int], object]
"""Something to time; its argument counts the calls, so that inputs can take turns."""


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, q1, q3)

    @staticmethod
    def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
        """Of the quotients within the same round, so that a slow moment of the machine falls on both."""
        return Spread.of([a / b for a, b in zip(over, under, strict=True)])

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}


class Clock:
    """Seconds of some calls in a row: by events on a GPU, by the processor's clock elsewhere."""

    def __init__(self, device: str):
        self.gpu = device == "cuda"

    def __call__(self, call: Call, first: int, calls: int) -> float:
        """Seconds per call."""
        if not self.gpu:
            start = time.perf_counter()
            for index in range(calls):
                call(first + index)
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for index in range(calls):
            call(first + index)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / calls


def alternate(
    calls: Sequence[Call],
    repeats: int,
    device: str,
    min_seconds: float = 0.1,
    enough: Callable[[], bool] = lambda: False,
    warm_up: int = 1,
) -> list[list[float]]:
    """Seconds per call for each of ``calls`` in each round.

    Everybody takes one turn in a round; each round begins with another one. A turn is as many calls in a row as take
    ``min_seconds``. Ends after ``repeats`` rounds, or when ``enough()`` says so and there are three.
    """
    clock = Clock(device)
    counts = []
    for call in calls:
        for index in range(warm_up):
            clock(call, index, 1)
        once = clock(call, 0, 1)
        counts.append(max(1, min(1000, math.ceil(min_seconds / max(once, 1e-9)))))
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        for place in range(len(calls)):
            who = (place + turn) % len(calls)
            times[who].append(clock(calls[who], turn * counts[who], counts[who]))
        if turn >= 2 and enough():
            break
    return times


def seconds_per_call(call: Call, device: str, repeats: int = 5, min_seconds: float = 0.02) -> Spread:
    """Of one call alone, after a warm-up."""
    return Spread.of(alternate([call], repeats, device, min_seconds)[0])


class Budget:
    """Wall-clock seconds that are left of a total."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when the time is over."""
        return self.end - time.monotonic()

    def part(self, seconds: float) -> Budget:
        """At most ``seconds`` of what is left."""
        return Budget(min(seconds, self.left))
