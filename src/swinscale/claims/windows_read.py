"""What the measurements of the claim about shifted windows say: statements, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import linear_regression, median
from typing import Any

from swinscale.claims.base import Figure, Finding, Table, ahead, alike, ratio_to
from swinscale.claims.sliding import Method, Windows
from swinscale.claims.statistics import judge, judge_within
from swinscale.intervals import Interval

ARMS: tuple[Windows, ...] = ("not shifted", "shifted", "sliding")
SHIFTED, FIXED, NAIVE, FLEX = "shifted windows", "windows, not shifted", "sliding, naive", "sliding, flex attention"
LRNET = "LR-Net"
WAYS: dict[str, tuple[Windows, Method]] = {
    FIXED: ("not shifted", "gathered"),
    SHIFTED: ("shifted", "gathered"),
    NAIVE: ("sliding", "gathered"),
    FLEX: ("sliding", "flex"),
}
"""What is timed against each other; the method matters to sliding windows alone."""
LINEAR, QUADRATIC, ALIKE = 0.1, 1.7, 1.0
"""Our readings: an exponent of 1 ± 0.1 is linear, one above 1.7 is quadratic with the linear part of the projections, and a
point of accuracy is alike."""


def exponents(sides: Sequence[int], seconds: Sequence[Sequence[float]]) -> list[float]:
    """Of the tokens in the time, fitted to the larger half of the sizes, for each round."""
    kept = len(sides) // 2
    tokens = [math.log(side**2) for side in sides[kept:]]
    rounds = zip(*seconds[kept:], strict=True)
    return [linear_regression(tokens, [math.log(t) for t in times]).slope for times in rounds]


def of_area(area: Mapping[str, Any]) -> list[Finding]:
    linear, quadratic = (Interval.of(exponents(area["sides"], area[kind])) for kind in ("windows", "global"))
    beyond = Interval.of_difference(exponents(area["sides"], area["windows"]), [1.0] * linear.count)
    return [
        Finding(
            "the time of attention in windows grows in proportion to the area",
            "4hwC² + 2M²hwC operations: linear in the area hw",
            f"exponent {linear.text(signed=False)}",
            f"the interval of the exponent, over rounds, lies within 1 ± {LINEAR:g}",
            judge_within(beyond, LINEAR),
            linear,
        ),
        Finding(
            "the time of global attention grows with the square of the area",
            "4hwC² + 2(hw)²C operations",
            f"exponent {quadratic.text(signed=False)}",
            f"the interval of the exponent lies above {QUADRATIC:g}",
            judge(quadratic, "above", QUADRATIC),
            quadratic,
        ),
    ]


def of_speed(speed: Mapping[str, Any], name: str) -> list[Finding]:
    rule = "the interval of the ratio of times, over rounds in alternation, lies above 1"
    network, first = speed["network"], speed["stages"][0]

    def compare(times: Mapping[str, Sequence[float]], way: str, statement: str, published: str) -> Finding:
        missing = f"not measured: {speed['reasons'].get(way)}"
        ratio = Interval.of_ratio(times[way], times[SHIFTED]) if way in times else Interval.of([])
        return ratio_to(statement, published, ratio, "above", 1.0, rule, missing)

    # A kernel that cannot run decides nothing; else the better of the two counts.
    best = FLEX if FLEX not in network else min((NAIVE, FLEX), key=lambda way: median(network[way]))
    return [
        compare(
            first, NAIVE, "a naive sliding window takes longer than a shifted one, attention alone in the first stage",
            "122.5 against 3.0 ms: 41 times",
        ),
        compare(
            network, NAIVE, f"Swin-{name} with naive sliding windows takes longer than with shifted ones",
            "T 183 against 755 images/s: 4.1 times",
        ),
        compare(
            network, best, f"Swin-{name} with the best sliding kernel ({best.removeprefix('sliding, ')}) takes longer than with "
            "shifted windows", "T 488 against 755 images/s: 1.5 times",
        ),
    ]  # fmt: skip


def of_accuracy(top1: Mapping[Windows, Sequence[float]]) -> list[Finding]:
    shifted = top1["shifted"]
    better, same = (
        "shifting the windows makes the network more accurate",
        "shifted windows are about as accurate as sliding ones",
    )
    return [
        ahead(better, "80.2 → 81.3 top-1", shifted, top1["not shifted"]),
        alike(same, "81.3 and 81.4 top-1", shifted, top1["sliding"], ALIKE),
    ]


def of_lrnet(speed: Mapping[str, Any], shifted: Sequence[float], lrnet: Sequence[float]) -> list[Finding]:
    rule = "the interval of the ratio of times, over rounds in alternation, lies above 1"
    first, network, published = speed["stages"][0], speed["network"], "slower; of LR-Net itself no figure"
    return [
        ratio_to(
            "a local relation layer of LR-Net takes longer than attention in shifted windows, first stage", published,
            Interval.of_ratio(first[LRNET], first[SHIFTED]), "above", 1.0, rule,
        ),
        ratio_to(
            f"{_title(speed)} takes longer than Swin-T, which computes as much", published,
            Interval.of_ratio(network[LRNET], network[SHIFTED]), "above", 1.0, rule,
        ),
        ahead(
            "shifted windows are more accurate than LR-Net of the same cost, trained in the same way",
            "81.3 and 77.3 top-1 (Swin-T, LR-Net-50), trained in different ways", shifted, lrnet,
        ),
    ]  # fmt: skip


def _title(speed: Mapping[str, Any]) -> str:
    return speed["lrnet"].replace("lrnet", "LR-Net-")


def _milliseconds(times: Sequence[float]) -> Interval:
    return Interval.of([1000 * t for t in times])


def area_table(area: Mapping[str, Any]) -> Table:
    rows = [
        (f"{side}×{side}", side**2, _milliseconds(windows), _milliseconds(everywhere))
        for side, windows, everywhere in zip(area["sides"], area["windows"], area["global"], strict=True)
    ]
    return Table(
        "Milliseconds of attention on one map, with 95 % interval", ("map", "tokens", "windows", "global"), rows
    )


def speed_table(speeds: Mapping[str, Any]) -> Table:
    """Milliseconds per stage of the first network, and the images per second of all."""
    first = next(iter(speeds.values()))
    stages = range(len(first["stages"]))
    rows = []
    for way in WAYS:
        cells: list[Any] = []
        for times in (stage.get(way) for stage in first["stages"]):
            cells.append(None if times is None else _milliseconds(times))
        for speed in speeds.values():
            times = speed["network"].get(way)
            cells.append(None if times is None else Interval.of([speed["batch"] / t for t in times]))
        rows.append((way, *cells))
    header = ("way", *(f"stage {i + 1}, ms" for i in stages), *(f"{name}, images/s" for name in speeds))
    note = (
        f"Milliseconds of attention alone (projections, changes of order, attention) in one layer for {first['batch']} images, the "
        f"mean of two layers, of which the second shifts; whole networks at 224 pixels. Forward passes."
    )
    return Table("Speed of windows that shift, stay, or slide", header, rows, note)


def lrnet_table(speed: Mapping[str, Any]) -> Table:
    rows = []
    for way, network in ((SHIFTED, "Swin-T"), (LRNET, _title(speed))):
        stages = [_milliseconds(stage[way]) for stage in speed["stages"]]
        rows.append((f"{way}; {network}", *stages, Interval.of([speed["batch"] / t for t in speed["network"][way]])))
    header = ("way; network", *(f"stage {i + 1}, ms" for i in range(len(speed["stages"]))), "images/s")
    note = (
        f"Milliseconds of one layer for {speed['batch']} images, with its projections: local relation in neighbourhoods of 7×7, and "
        f"attention in windows of 7×7, on maps of the same channels. Forward passes, in alternation."
    )
    return Table("LR-Net beside shifted windows", header, rows, note)


def accuracy_table(top1: Mapping[Any, Sequence[float]]) -> Table:
    rows = [(arm, Interval.of(values)) for arm, values in top1.items()]
    return Table("Top-1 in percent, mean and 95 % interval over seeds", ("windows", "top-1"), rows)


def area_figure(area: Mapping[str, Any]) -> Figure:
    series = []
    for label, kind in (("windows of 8×8", "windows"), ("global", "global")):
        exponent = Interval.of(exponents(area["sides"], area[kind])).estimate
        made = [_milliseconds(times) for times in area[kind]]
        line = {"y": [i.estimate for i in made], "low": [i.low for i in made], "high": [i.high for i in made]}
        series.append({"label": f"{label}, exponent {exponent:.2f}", "x": [s**2 for s in area["sides"]], **line})
    options = {
        "title": "Time of attention against the size of the map", "series": series, "x": "tokens of the map",
        "y": "milliseconds", "log_x": True, "log_y": True,
    }  # fmt: skip
    return Figure("area", "lines", options, "One map, 96 channels. The exponents are of the larger half of the sizes.")


def speed_figure(speed: Mapping[str, Any], name: str, ancestor: Mapping[str, Any]) -> Figure:
    series = []
    for way in (way for way in (*WAYS, LRNET) if way != SHIFTED):
        timed = ancestor if way == LRNET else speed
        places = [*timed["stages"], timed["network"]]
        known = [(x, Interval.of_ratio(p[way], p[SHIFTED])) for x, p in enumerate(places) if way in p]
        bounds = {part: [getattr(ratio, part) for _, ratio in known] for part in ("low", "high")}
        series.append({"label": way, "x": [x for x, _ in known], "y": [ratio.estimate for _, ratio in known], **bounds})
    options = {
        "title": "Times relative to shifted windows", "series": series, "x": "attention alone, and the whole network",
        "y": "times as long", "log_y": True, "baselines": {"shifted windows": 1.0},
        "x_labels": [*(f"stage {i + 1}" for i in range(len(speed["stages"]))), f"Swin-{name}"],
    }  # fmt: skip
    return Figure("speed", "lines", options, "Ratios within rounds in alternation, with their 95 % intervals.")
