"""Time and peak memory against the area of the picture and against the window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.cases import Case, free, make_inputs, make_runner, peak_memory
from bench.contenders import Contender, Setting, reason
from bench.progress import say
from bench.timing import Spread, alternate


def point(
    setting: Setting,
    batch: int,
    contender: Contender,
    device: str,
    dtype: str,
    mode: str = "inference",
    repeats: int = 3,
    min_seconds: float = 0.05,
    memory: bool = True,
) -> dict[str, Any]:
    """Seconds of a call and bytes of peak memory of one contender alone."""
    case = Case(setting, batch, mode, dtype, device, (contender,))
    row: dict[str, Any] = {
        "name": str(contender), "size": setting.size, "window": setting.window, "batch": batch, "mode": mode,
    }  # fmt: skip
    try:
        inputs = make_inputs(case, 1)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        runner = make_runner(case, contender, inputs, None)
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
        spread = Spread.of(alternate([runner], repeats, device, min_seconds)[0])
        row |= {"seconds": spread.median, "q1": spread.q1, "q3": spread.q3}
        del runner
        if device == "cpu" and memory:
            plain = {"library": contender.library, "backend": contender.backend, "compiled": contender.compiled}
            row["memory_bytes"] = peak_memory(case, plain)
    except torch.OutOfMemoryError:
        row["reason"] = f"out of memory at batch {batch}"
    except Exception as error:
        row["reason"] = reason(error)
    torch._dynamo.reset()
    free(device)
    told = row.get("reason") or f"{1e3 * row['seconds']:.1f} ms per call"
    say(f"  {setting} batch {batch} {mode}, {contender}: {told}")
    return row


def area_curve(
    model: str,
    window: int,
    sizes: Iterable[int],
    pixels: int,
    contenders: Iterable[Contender],
    device: str,
    dtype: str,
    enough: Callable[[], bool] = lambda: False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Points at a fixed window. Each call has as many pictures as make up ``pixels``, so that none leaves the device idle."""
    points = []
    for size in sizes:
        for contender in contenders:
            if not enough():
                batch = max(1, pixels // size**2)
                points.append(point(Setting(model, window, size), batch, contender, device, dtype, **how))
    return points


def window_curve(
    model: str,
    size: int,
    windows: Iterable[int],
    batch: int,
    contenders: Iterable[Contender],
    device: str,
    dtype: str,
    enough: Callable[[], bool] = lambda: False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Points at a fixed picture."""
    points = []
    for window in windows:
        for contender in contenders:
            if not enough():
                points.append(point(Setting(model, window, size), batch, contender, device, dtype, **how))
    return points
