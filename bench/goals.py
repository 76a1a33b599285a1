"""What the project promises about speed and memory, and whether a run reached it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from bench.cases import ours_in, peers_in
from bench.contenders import OURS
from swinscale.timing import Spread

Result = dict[str, Any]


def goal(text: str, target: float, found: Spread | float | None, detail: str = "", at_most: bool = False) -> Result:
    """A row of the table of goals; ``found`` None: not measured, and ``detail`` says why."""
    row: Result = {"goal": text, "target": target, "at_most": at_most, "detail": detail, "reached": None, "found": None}
    if found is not None:
        spread = found if isinstance(found, Spread) else Spread(found, found, found)
        row["found"] = spread.as_dict()
        row["reached"] = spread.median <= target if at_most else spread.median >= target
    return row


def against_fastest(text: str, target: float, result: Result | None, compiled: bool) -> Result:
    """Our time against that of the fastest peer, both compiled or both eager."""
    if result is None:
        return goal(text, target, None, "not measured")
    ours, peers = ours_in(result, compiled), peers_in(result, compiled)
    if ours is None or not peers:
        whys = [
            f"{row['name']}: {row['reason']}"
            for row in result["contenders"]
            if row["compiled"] == compiled and "reason" in row
        ]
        return goal(text, target, None, "; ".join(whys) or "nobody to compare with was measured")
    return goal(text, target, Spread.ratio(peers[0]["rounds"], ours["rounds"]), f"fastest: {peers[0]['name']}")


def against(text: str, target: float, result: Result | None, peer: str, compiled: bool) -> Result:
    """Our time against that of one peer."""
    rows = (
        []
        if result is None
        else [row for row in result["contenders"] if row["project"] == peer and row["compiled"] == compiled]
    )
    ours = None if result is None else ours_in(result, compiled)
    if not rows or ours is None or rows[0]["status"] != "ok":
        return goal(text, target, None, rows[0].get("reason", "ours was not measured") if rows else "not measured")
    return goal(text, target, Spread.ratio(rows[0]["rounds"], ours["rounds"]))


def memory_against(text: str, target: float, result: Result | None, peer: str, compiled: bool) -> Result:
    """Our peak memory over that of one peer; at most ``target``."""
    rows = (
        []
        if result is None
        else [row for row in result["contenders"] if row["project"] == peer and row["compiled"] == compiled]
    )
    ours = None if result is None else ours_in(result, compiled)
    if not rows or ours is None or not rows[0].get("memory_bytes") or not ours.get("memory_bytes"):
        return goal(text, target, None, rows[0].get("reason", "") if rows else "not measured", at_most=True)
    return goal(text, target, ours["memory_bytes"] / rows[0]["memory_bytes"], at_most=True)


def openvino_goal(text: str, result: Result | None) -> Result:
    """Ours, eager or compiled, whichever is faster, against OpenVINO on timm's graph."""
    rows = [] if result is None else [row for row in result["contenders"] if row["project"] == "openvino"]
    if not rows or result is None:
        return goal(text, 1.0, None, "not measured")
    mine = [row for row in (ours_in(result, False), ours_in(result, True)) if row]
    if rows[0]["status"] != "ok" or not mine:
        return goal(text, 1.0, None, f"not measured ({rows[0].get('reason', 'ours was not measured')})")
    best = min(mine, key=lambda row: row["seconds"]["median"])
    return goal(text, 1.0, Spread.ratio(rows[0]["rounds"], best["rounds"]), f"ours: {best['name']}")


def cpu_goals(cases: Iterable[Result]) -> list[Result]:
    """The goals on a CPU, from the results of ``python -m bench cpu`` by name."""
    by = {case["name"]: case for case in cases}

    def fastest(text: str, target: float, name: str, compiled: bool = False) -> Result:
        return against_fastest(text, target, by.get(name), compiled)

    return [
        fastest("V2-T 256/8 inference, batch 8, all eager", 1.5, "v2t-256-8 batch 8"),
        fastest("V2-T 256/8 inference, batch 1, all eager", 1.5, "v2t-256-8 batch 1"),
        fastest("V2-T 256/8 inference, batch 8, all compiled", 1.1, "v2t-256-8 batch 8 compiled", True),
        fastest("V2-T 256/8 inference, batch 1, all compiled", 1.1, "v2t-256-8 batch 1 compiled", True),
        openvino_goal("V2-T 256/8 inference, batch 8, against OpenVINO", by.get("v2t-256-8 batch 8 compiled")),
        openvino_goal("V2-T 256/8 inference, batch 1, against OpenVINO", by.get("v2t-256-8 batch 1 compiled")),
        fastest("V2-T 256/8 training step, batch 8, all eager", 1.3, "v2t-256-8 training"),
        fastest("V2-T 256/16 inference, batch 8, all eager", 1.6, "v2t-256-16 batch 8"),
        fastest("V2-T 384/24 inference, batch 4, all eager", 1.6, "v2t-384-24 batch 4"),
    ]


GPU_SETTINGS = {  # V2-B: (training at least, memory at most, inference at least) against timm
    "v2b-256-8": (1.3, 0.7, 1.5),
    "v2b-256-16": (2.0, 0.45, 2.0),
    "v2b-384-24": (3.0, 0.3, 3.0),
}
VITS = {"v2t-256-8": "small", "v2t-256-16": "small", "v2b-256-8": "base", "v2b-256-16": "base"}


def gpu_goals(sections: dict[str, Any]) -> list[Result]:
    """The goals on a GPU, from the sections of ``python -m bench gpu``."""
    by = {case["name"]: case for case in sections.get("models", {}).get("cases", [])}
    rows = []
    for name, (training, memory, inference) in GPU_SETTINGS.items():
        title = f"V2-B {name[4:].replace('-', '/')} bf16, compiled, against timm:"
        case = by.get(f"{name} training")
        rows.append(against(f"{title} training", training, case, "timm", True))
        rows.append(memory_against(f"{title} peak memory of training", memory, case, "timm", True))
        rows.append(against(f"{title} inference", inference, by.get(f"{name} inference"), "timm", True))
    for name, size in VITS.items():
        found = sections.get("vit", {}).get("rates", {}).get(size)
        case = by.get(f"{name} inference")
        ours = ours_in(case, True) if case else None
        text = f"V2-{name[2].upper()} {name[4:].replace('-', '/')} inference: multiply-accumulates per second over ViT-{size[0].upper()}/16's"
        share = ours["images_per_s"] * case["macs_per_image"] / found if case and ours and found else None
        rows.append(goal(text, 0.8, share, "" if share else "not measured"))
    blocks, ceilings = sections.get("giant"), sections.get("ceilings")
    share = (
        blocks["flops_per_s"] / ceilings["matmul_flops_per_s"]
        if blocks and ceilings and "flops_per_s" in blocks
        else None
    )
    rows.append(
        goal(
            "G's blocks at 192/12, training: share of the measured bf16 matrix product",
            0.45,
            share,
            "" if share else "not measured",
        )
    )
    rows.append(linearity_goal(sections.get("scaling")))
    return rows


def linearity_goal(scaling: Result | None) -> Result:
    """How far the time per pixel strays from its mean between the smallest and the largest picture."""
    text = "Time against image area at a fixed window: largest deviation from a line through zero"
    points = [point for point in (scaling or {}).get("area", []) if "seconds" in point and point["mode"] == "inference"]
    curve = [point for point in points if point["name"].startswith(OURS)]
    if len(curve) < 2:
        return goal(text, 0.05, None, "not measured", at_most=True)
    sizes = f"{curve[0]['size']}² to {curve[-1]['size']}², the same number of pixels per call"
    rounds = list(zip(*(point["rounds"] for point in curve), strict=True))  # in each round all sizes had their turn
    pixels = [point["size"] ** 2 * point["batch"] for point in curve]
    return goal(text, 0.05, linearity(pixels, rounds), sizes, at_most=True)


def linearity(pixels: Sequence[int], rounds: Sequence[Sequence[float]]) -> Spread:
    """Deviation from a line of the median times, each taken as a share of its round, so that drift cancels.

    The deviation within single rounds would count the noise of each of their times. Quartiles are those of 1,000 draws of
    rounds with replacement; they may lie above the value, since noise only adds to a largest deviation.
    """
    shares = [[seconds / statistics.mean(one) for seconds in one] for one in rounds]

    def of(chosen: Sequence[Sequence[float]]) -> float:
        return deviation(list(zip(pixels, map(statistics.median, zip(*chosen, strict=True)), strict=True)))

    random = Random(0)
    draws = Spread.of([of(random.choices(shares, k=len(shares))) for _ in range(1000)])
    return Spread(of(shares), draws.q1, draws.q3)


def deviation(points: list[tuple[float, float]]) -> float:
    """Largest relative distance of the points (x, y) from the best line through zero, best in the same sense."""
    slopes = [y / x for x, y in points]
    return (max(slopes) - min(slopes)) / (max(slopes) + min(slopes))
