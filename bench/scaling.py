"""Time and peak memory against the area of the picture and against the window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from bench.cases import Case, free, make_inputs, make_runner, peak_memory
from bench.contenders import Contender, Setting, reason
from bench.progress import say
from swinscale.timing import Spread, alternate


def curve(
    settings: Iterable[Setting],
    batches: Iterable[int],
    contender: Contender,
    device: str,
    dtype: str,
    mode: str = "inference",
    repeats: int = 3,
    min_seconds: float = 0.05,
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Seconds of a call and bytes of peak memory of one contender at each setting; the settings take turns in time."""
    rows, timed = [], []
    for setting, batch in zip(settings, batches, strict=True):
        case = Case(setting, batch, mode, dtype, device, (contender,))
        row: dict[str, Any] = {
            "name": str(contender), "size": setting.size, "window": setting.window, "batch": batch, "mode": mode,
        }  # fmt: skip
        rows.append(row)
        try:
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            runner = make_runner(case, contender, make_inputs(case, 1), None)
            start = time.perf_counter()
            runner(0)
            if device == "cuda":
                torch.cuda.synchronize()
            row["first_batch_s"] = round(time.perf_counter() - start, 3)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                runner(0)
                torch.cuda.synchronize()
                row["memory_bytes"] = torch.cuda.max_memory_allocated() - before
            timed.append((case, row, runner))
        except torch.OutOfMemoryError:
            row["reason"] = f"out of memory at batch {batch}"
        except Exception as error:
            row["reason"] = reason(error)
    rounds = alternate([runner for _, _, runner in timed], repeats, device, min_seconds)
    for (case, row, _), seconds in zip(timed, rounds, strict=True):
        spread = Spread.of(seconds)
        row |= {"seconds": spread.median, "q1": spread.q1, "q3": spread.q3, "rounds": seconds}
        if device == "cpu" and memory:
            plain = {"project": contender.project, "backend": contender.backend, "compiled": contender.compiled}
            row["memory_bytes"] = peak_memory(case, plain)
    timed.clear()
    torch._dynamo.reset()
    free(device)
    for row in rows:
        told = row.get("reason") or f"{1e3 * row['seconds']:.1f} ms per call of {row['batch']}"
        say(f"  {row['size']}/{row['window']} {mode}, {contender}: {told}")
    return rows


def area_curve(
    model: str,
    window: int,
    sizes: Sequence[int],
    pixels: int,
    contenders: Iterable[Contender],
    device: str,
    dtype: str,
    enough: Callable[[], bool] = lambda: False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Points at a fixed window. Each call has as many pictures as make up ``pixels``, so that none leaves the device idle."""
    points: list[dict[str, Any]] = []
    batches = [max(1, pixels // size**2) for size in sizes]
    for contender in contenders:
        if not enough():
            points += curve([Setting(model, window, size) for size in sizes], batches, contender, device, dtype, **how)
    return points


def window_curve(
    model: str,
    size: int,
    windows: Sequence[int],
    batch: int,
    contenders: Iterable[Contender],
    device: str,
    dtype: str,
    enough: Callable[[], bool] = lambda: False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Points at a fixed picture."""
    points: list[dict[str, Any]] = []
    settings = [Setting(model, window, size) for window in windows]
    for contender in contenders:
        if not enough():
            points += curve(settings, [batch] * len(settings), contender, device, dtype, **how)
    return points
