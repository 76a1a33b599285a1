"""Models of a dense task in alternation on the same inputs, each alone in a process of its own for memory, and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench import tables
from bench.cases import free
from bench.contenders import reason
from bench.progress import say
from swinscale.timing import Call, Spread, alternate

Row = dict[str, Any]


def compared(
    names: Sequence[str],
    prepare: Callable[[str], tuple[Call, Row]],
    *,
    ours: Sequence[str],
    device: str,
    batch: int,
    repeats: int,
    min_seconds: float = 0.1,
    warm_up: int = 1,
    memory: Callable[[str], int | None] | None = None,
) -> list[Row]:
    """Everybody prepared one after the other, then timed in alternation; a row each, whatever became of it.

    Args:
        prepare: a contender after its first call, and what that showed ("first_batch_s" at least).
        ours: names that everybody's times are divided by.
        memory: bytes of peak memory of one, measured afterwards.
    """
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    for name in names:
        row: Row = {"name": name}
        try:
            calls[name], found = prepare(name)
            row |= {"status": "ok", **found}
        except Exception as error:  # whatever goes wrong in somebody's code is a line in the table
            row |= {"status": "cannot", "reason": reason(error)}
        free(device)
        say(f"  {name}: {row.get('reason') or 'ready after {:.1f} s'.format(row['first_batch_s'])}")
        rows.append(row)
    times = alternate(list(calls.values()), repeats, device, min_seconds, warm_up=warm_up) if calls else []
    by_name = {row["name"]: row for row in rows}
    for name, seconds in zip(calls, times, strict=True):
        spread = Spread.of(seconds)
        by_name[name] |= {
            "seconds": spread.as_dict(),
            "images_per_s": float(f"{batch / spread.median:.6g}"),
            "rounds": [float(f"{s:.6g}") for s in seconds],
        }
    add_ratios(rows, ours)
    calls.clear()
    free(device)
    for row in rows:
        if row["status"] == "ok":
            if memory is not None:
                row["memory_bytes"] = memory(row["name"])
            say(f"  {row['name']}: {row['images_per_s']:.4g} images/s")
    return rows


def add_ratios(rows: Sequence[Row], ours: Sequence[str]) -> None:
    """How many times as long as each of ours everybody took, in the same rounds."""
    timed = {row["name"]: row for row in rows if row["status"] == "ok"}
    for row in timed.values():
        row["ratios"] = {
            name: Spread.ratio(row["rounds"], timed[name]["rounds"]).as_dict() for name in ours if name in timed
        }


def speed_table(cases: Sequence[Row], ours: Sequence[str], title: Callable[[Row], str]) -> str:
    """A row per contender of each case; "difference" where outputs were compared.

    Args:
        title: what a case is called.
    """
    checked = any("difference" in row for case in cases for row in case["contenders"])
    heads = ("case", "who", "parameters", "images/s", "time per call (quartiles)",
             *(f"times {name.removeprefix('swinscale ')} of ours" for name in ours), "peak MB",
             *(["difference"] if checked else []))  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for case in cases:
        name = title(case)
        for row in case["contenders"]:
            if row["status"] != "ok":
                why = (row["name"], "–", "–", row["reason"])
                lines.append((name, *why, *["–"] * (len(heads) - 1 - len(why))))
            else:
                time = row["seconds"]
                quartiles = (
                    f"{tables.duration(time['median'])} ({tables.duration(time['q1'])}–{tables.duration(time['q3'])})"
                )
                ratios = [tables.spread(row["ratios"][one]) if one in row["ratios"] else "–" for one in ours]
                difference = [f"{row['difference']:.1e}" if "difference" in row else "–"] if checked else []
                lines.append((
                    name, row["name"], f"{row['parameters'] / 1e6:.1f} M", f"{row['images_per_s']:.3g}", quartiles, *ratios,
                    tables.size(row.get("memory_bytes")), *difference,
                ))  # fmt: skip
            name = ""
    return tables.table(heads, lines)
