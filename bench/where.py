"""``python -m bench where``: where our time goes on a CPU, by operation, and what single choices of ours buy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.cases import Case, alone, make_inputs, make_runner
from bench.contenders import Contender, Setting
from bench.progress import say
from swinscale.models.plan import plan
from swinscale.timing import Spread


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
    """Time and peak memory with a choice of ours changed; every measurement in a process of its own.

    In one process, memory that a larger portion took from the operating system would serve the others too.
    """
    tokens, through_onednn = "swinscale.models.chunks.TOKENS", "swinscale.ops.linear._ONEDNN"
    named: dict[str, dict[str, Any]] = {
        "as it is": {},
        "1,024 tokens at a time": {tokens: 1024},
        "8,192 tokens at a time": {tokens: 8192},
        "the whole map at a time": {tokens: 1 << 30},
        "linear layers and GELU as PyTorch computes them": {through_onednn: False},
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in named}
    who = dataclasses.asdict(case.contenders[0])
    for _ in range(repeats):
        for name, choice in named.items():
            result = alone(case, who, calls=6, choice=choice)
            assert result is not None, f"{case} failed with {choice}"
            found[name].append(result)
    seconds = {name: [r["seconds"] for r in results] for name, results in found.items()}
    rows = []
    for name, results in found.items():
        rows.append({
            "choice": name,
            "seconds": Spread.of(seconds[name]).as_dict(),
            "ratio": Spread.ratio(seconds[name], seconds["as it is"]).as_dict(),
            "memory_bytes": Spread.of([r["bytes"] for r in results]).median,
        })  # fmt: skip
        say(f"  {name}: {Spread.of(seconds[name]).median:.3f} s")
    return rows


def where(repeats: int, save: Callable[[dict[str, Any]], None], tiny: bool = False) -> None:
    """Profiles and choices of V2-T 256/8 in fp32, batch 8."""
    setting, batch = (Setting("swinv2_trial", 4, 32), 2) if tiny else (Setting("swinv2_tiny", 8, 256), 8)
    found: dict[str, Any] = {"profiles": {}}
    for mode in ("inference", "training"):
        found["profiles"][mode] = operations(Case(setting, batch, mode, "fp32", "cpu", (Contender(),)))
        save(found)
    found["choices"] = choices(Case(setting, batch, "inference", "fp32", "cpu", (Contender(),)), repeats)
    save(found)
