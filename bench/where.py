"""``python -m bench where``: where our time goes on a CPU, by operation, and what single choices of ours buy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import Case, make_inputs, make_runner
from bench.contenders import Contender, Setting
from bench.progress import say
from bench.timing import Spread, alternate
from swinscale.models import chunks
from swinscale.models.plan import plan
from swinscale.ops import linear

CHUNKS = (512, 1024, 2048, 4096, 8192, 1 << 30)


def operations(case: Case, least: float = 0.01) -> dict[str, Any]:
    """Seconds of one call and the share of each operation in it, those above ``least``; the operations of one of ours."""
    runner = make_runner(case, case.contenders[0], make_inputs(case, 1), None)
    for _ in range(2):
        runner(0)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            runner(0)
    events = [(e.key, e.self_cpu_time_total / 3e6) for e in seen.key_averages()]
    total = sum(seconds for _, seconds in events)
    rows = [{"operation": name, "seconds": s, "share": s / total} for name, s in events if s >= least * total]
    rows.sort(key=lambda row: -row["seconds"])
    say(f"  {case}: {total:.3f} s, {rows[0]['operation']} {100 * rows[0]['share']:.0f} %")
    passes = 3 if case.mode == "training" else 1
    return {
        "title": str(case),
        "seconds": total,
        "rows": rows,
        "flops": passes * plan(case.setting.config, case.setting.size).flops * case.batch,
    }


def choices(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Time of one call with a choice of ours undone, alternating with the call as it is."""
    runner = make_runner(case, case.contenders[0], make_inputs(case, 2), None)
    chunk, onednn = chunks.TOKENS, linear._ONEDNN

    def with_choice(tokens: int, through_onednn: bool) -> Callable[[int], object]:
        def call(index: int) -> object:
            chunks.TOKENS, linear._ONEDNN = tokens, through_onednn
            try:
                return runner(index)
            finally:
                chunks.TOKENS, linear._ONEDNN = chunk, onednn

        return call

    named = {"as it is": with_choice(chunk, onednn)}
    for tokens in CHUNKS:
        text = f"{tokens:,} tokens at a time" if tokens < 1 << 30 else "the whole map at a time"
        named[text] = with_choice(tokens, onednn)
    named["linear layers and GELU as PyTorch computes them"] = with_choice(chunk, False)
    times = alternate(list(named.values()), repeats, case.device, case.min_seconds)
    rows = []
    for name, seconds in zip(named, times, strict=True):
        ratio = Spread.ratio(seconds, times[0])
        rows.append({"choice": name, "seconds": Spread.of(seconds).as_dict(), "ratio": ratio.as_dict()})
        say(f"  {name}: {Spread.of(seconds).median:.3f} s")
    return rows


def where(repeats: int, save: Callable[[dict[str, Any]], None], tiny: bool = False) -> None:
    """Profiles and choices of V2-T 256/8 in fp32, batch 8."""
    setting, batch = (Setting("swinv2_trial", 4, 32), 2) if tiny else (Setting("swinv2_tiny", 8, 256), 8)
    found: dict[str, Any] = {"profiles": {}}
    for mode in ("inference", "training"):
        case = Case(setting, batch, mode, "fp32", "cpu", (Contender(),))
        found["profiles"][mode] = operations(case)
        save(found)
    for images in (batch, 1):
        case = Case(setting, images, "inference", "fp32", "cpu", (Contender(),))
        found.setdefault("choices", {})[f"batch {images}"] = choices(case, repeats)
        save(found)
    if not tiny:
        torch._dynamo.reset()
