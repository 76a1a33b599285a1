"""One HTML page about any run, finished, running or killed, from the files in its directory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swinscale.diagnose import detections, segmentation
from swinscale.diagnose.plots import Drawing, Line, confusion_matrix, heat_maps, lines, loss_curves, run_curves
from swinscale.diagnose.report import Block, Details, Picture, Plot, Report, Section, Table, write_report
from swinscale.errors import UsageError
from swinscale.runlog import read_log

Entry = Mapping[str, Any]
POINTS = 2000
"""Of a series in a plot; more cannot be told apart."""
SERIES = 12
"""In a plot of blocks over time; of deeper models some blocks are shown."""
ROWS = 12  # evaluations in the table
MAPS = 16  # heads whose position bias is drawn, per stage
CLASSES = 40  # of a confusion matrix that still fits a page
BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)")
BLOCKS = "block (stage.block, counted from 0 as in parameter names)"
STEPS = "optimiser step"
NAMES = {"mim": "Masked image modelling"}
"""Headings of instruments whose names do not say enough."""


def run_report(directory: Path, out: Path | None = None) -> Path:
    """Writes the page and returns its path.

    Args:
        directory: of a run; what it does not hold is left out.
        out: None: ``report.html`` in the directory.

    Raises:
        UsageError: for a directory that has no log, or an empty one.
    """
    if not (directory / "log.jsonl").is_file():
        raise UsageError(
            f"{directory} has no log.jsonl: name the directory of a run, which is --out of 'swinscale train'."
        )
    log = sorted(read_log(directory), key=lambda entry: entry["step"])
    if not log:
        raise UsageError(f"{directory}/log.jsonl has no entries yet: wait until the run has logged a step.")
    manifest, config, result = (_json(directory / f"{name}.json") for name in ("manifest", "config", "result"))
    readings = [entry for entry in log if entry["kind"] == "vitals"]
    sections = [
        _training(log, manifest),
        _measures(log, result, _classes(directory)),
        _section("Amplitudes", _AMPLITUDES, amplitude_drawings(readings)),
        _section("Attention", _ATTENTION, attention_drawings(readings)),
        _section("Position bias", _BIAS, bias_drawings(readings)),
        _section("Gradients and updates", _GRADIENTS, gradient_drawings(readings)),
        *(
            _section(NAMES.get(kind, kind.replace("_", " ").capitalize()), "", other_drawings(log, kind))
            for kind in dict.fromkeys(entry["kind"] for entry in log)
            if kind not in ("train", "eval", "vitals")
        ),
        _pictures(directory / "reconstructions", "Reconstructions", "The same images with the same masks each time."),
        _pictures(directory / "examples", "Examples", "The same held-out pictures each time."),
        _events(log),
        _record(manifest, config),
    ]
    path = out or directory / "report.html"
    lead, highlights = _summary(directory, log, manifest, config, result)
    title = f"Run {directory.resolve().name}"
    write_report(path, Report(title, lead, [s for s in sections if s is not None], highlights))
    return path


_AMPLITUDES = (
    "The mean of |x| over a few training images. In a V1 model, which normalises the input of each branch, the residual "
    "stream grows with depth, and the Swin V2 article found that differences of 1e4 between layers precede collapse of a "
    "large model. A V2 model normalises the output of each branch, and its stream stays level."
)
_ATTENTION = (
    "Entropy is that of a query's attention over the logarithm of the number of keys it sees: 1 is even attention, 0 is one "
    "key alone. The top key's share is what the key with the largest weight gets. In a large V1 model a few pixels come to "
    "dominate some heads; cosine attention (V2) makes this milder. Logit scales are by what V2 multiplies the cosine, at most "
    "100."
)
_BIAS = (
    "What is added to the logit of a query and a key by their offset, less each head's mean, which the softmax does not see. "
    "Of the last block of each stage."
)
_GRADIENTS = (
    "Gradient norms are those before clipping. The update ratio is the size of one step over that of the weights it changes "
    "(root mean squares): about 1e-3 is usual, and more than 0.1 after the warm-up is a bad sign."
)


def amplitude_drawings(readings: Sequence[Entry]) -> list[Drawing]:
    """Of the residual stream over depth and over time, and of the branches."""
    readings = [r for r in readings if r.get("amplitudes")]
    if not readings:
        return []
    stages = list(dict.fromkeys((0, len(readings) // 2, len(readings) - 1)))
    last = readings[-1]
    names = _blocks(last["amplitudes"])
    labels = [_name(block) for block in names]

    def over_depth(label: str, reading: Entry, place: str, **how: Any) -> Line:
        values = [_number(reading["amplitudes"].get(block, {}).get(place, [None])[0]) for block in names]
        return Line(label, range(len(names)), values, **how)

    depth = [over_depth(f"step {readings[i]['step']}", readings[i], "stream", group=n) for n, i in enumerate(stages)]
    places = [p for p in dict.fromkeys(p for block in names for p in last["amplitudes"][block]) if p != "stream"]
    branches = [over_depth(place, last, place, group=n) for n, place in enumerate(places)]
    largest = {block: [(r["step"], r.get(f"largest/{block}")) for r in readings] for block in names}
    means = {block: [(r["step"], r.get(f"amplitude/{block}")) for r in readings] for block in names}
    axes: Any = {"x": BLOCKS, "x_labels": labels, "log_y": True}
    return [
        lines("Residual stream after each block", depth, y="mean |x|", **axes),
        lines(f"What the branches add, at step {last['step']}", branches, y="mean |x|", **axes),
        _over_time("Residual stream over time", means, "mean |x|", log_y=True),
        _over_time("Largest value in the residual stream", largest, "largest |x|", log_y=True),
    ]


def attention_drawings(readings: Sequence[Entry]) -> list[Drawing]:
    """Entropy and top keys over time and per head, and the logit scales of a V2 model."""
    readings = [r for r in readings if r.get("heads")]
    if not readings:
        return []
    last = readings[-1]
    names = _blocks(last["heads"])
    note = f"Rows: blocks {_name(names[0])} to {_name(names[-1])} from the top. Columns: heads."
    told = {"entropy": "entropy", "top_key": "top key's share", "received": "most attended key gets"}
    maps = [(label, _by_head([last["heads"][block][what] for block in names])) for what, label in told.items()]
    drawn = [
        _over_time(title, {b: [(r["step"], r.get(f"{what}/{b}")) for r in readings] for b in names}, y)
        for what, title, y in (
            ("entropy", "Attention entropy, mean over heads", "share of the possible"),
            ("top_key", "Share of the top key, mean over heads", "share of attention"),
        )
    ]
    drawn.append(heat_maps(f"Heads at step {last['step']}", maps, unit="share", columns=3, note=note))
    if last.get("logit_scales"):
        places = list(dict.fromkeys((0, len(readings) - 1)))
        scaled = [b for b in names if b in last["logit_scales"]]
        series = [
            _spread(f"step {readings[i]['step']}", [readings[i]["logit_scales"].get(b, []) for b in scaled])
            for i in places
        ]
        drawn.append(
            lines(
                "Logit scales, mean over heads",
                series,
                x=BLOCKS,
                y="factor of the cosine",
                x_labels=[_name(b) for b in scaled],
                baselines={"limit": 100.0},
                log_y=True,
                note="Band or bars: least and largest of the heads.",
            )
        )
    return drawn


def bias_drawings(readings: Sequence[Entry]) -> list[Drawing]:
    """Curves along each axis, by stage, and a map for each head, from the last reading that has them."""
    recorded = [r for r in readings if r.get("position_bias")]
    if not recorded:
        return []
    last = recorded[-1]
    maps = {block: _bias_maps(**found) for block, found in last["position_bias"].items()}
    drawn = []
    for axis, title in ((1, "along the height"), (2, "along the width")):
        series = []
        for block, values in maps.items():
            curve = values.take(values.shape[3 - axis] // 2, axis=3 - axis)
            reach = values.shape[axis] // 2
            series.append(_spread(f"block {_name(block)}", curve.T.tolist(), first=-reach))
        note = "Mean over heads; bands or bars: least and largest of the heads."
        drawn.append(lines(f"Position bias {title}", series, x="offset of query from key, tokens", y="bias", note=note))
    for block, values in maps.items():
        shown = [(f"head {head}", values[head]) for head in range(min(MAPS, len(values)))]
        more = f" The first {MAPS} of {len(values)} heads." if len(values) > MAPS else ""
        note = f"No offset in the centre.{more}"
        title = f"Position bias of block {_name(block)} at step {last['step']}"
        drawn.append(heat_maps(title, shown, unit="bias, less the head's mean", diverging=True, note=note))
    return drawn


def gradient_drawings(readings: Sequence[Entry]) -> list[Drawing]:
    """Gradient norms and update ratios of each part of the model, over time."""
    drawn = []
    for what, title, y in (
        ("gradient", "Gradient norms", "norm, before clipping"),
        ("update_ratio", "Update over weight", "ratio of root mean squares"),
    ):
        parts = dict.fromkeys(key.partition("/")[2] for r in readings for key in r if key.startswith(f"{what}/"))
        series = {part: [(r["step"], r.get(f"{what}/{part}")) for r in readings] for part in parts}
        if series:
            drawn.append(_over_time(title, series, y, log_y=True))
    return drawn


def other_drawings(log: Sequence[Entry], kind: str) -> list[Drawing]:
    """The scalars of an instrument that this page knows nothing else of; those with the same first name share a plot."""
    entries = [entry for entry in log if entry["kind"] == kind]
    families: dict[str, dict[str, list[tuple[int, Any]]]] = {}
    for name in dict.fromkeys(key for entry in entries for key, value in entry.items() if isinstance(value, float)):
        family, _, member = name.partition("/")
        families.setdefault(family, {})[member or name] = [(e["step"], e.get(name)) for e in entries]
    return [_over_time(name.replace("_", " ").capitalize(), members, name) for name, members in families.items()]


def _training(log: Sequence[Entry], manifest: Entry) -> Section | None:
    entries = _thinned([entry for entry in log if entry["kind"] == "train"])
    if not entries:
        return None
    held = [entry for entry in log if entry["kind"] == "eval"]
    guesses = [e["mean_predictor_loss"] for e in held if "mean_predictor_loss" in e]
    baselines = {"mean visible colour": guesses[-1]} if guesses else {}
    loss = loss_curves("Loss", run_curves("run", [*entries, *held]), baselines=baselines)
    blocks: list[Block] = [Plot(loss)]
    for key, title, y in (
        ("lr", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm of the whole model", "norm, before clipping"),
        ("images_per_second", "Speed", "images per second"),
        ("waiting_for_data", "Waiting for data", "share of the time so far"),
    ):
        values = [(e["step"], e[key]) for e in entries if key in e]
        if values:
            steps, shown = zip(*values, strict=True)
            blocks.append(Plot(lines(title, [Line("", steps, shown)], x=STEPS, y=y).svg))
    batch = manifest.get("effective_batch")
    text = f"Each step averages {batch} images." if batch else ""
    return Section("Training", text, blocks)


def _measures(log: Sequence[Entry], result: Entry, classes: Sequence[str]) -> Section | None:
    held = [entry for entry in log if entry["kind"] == "eval"]
    if not held:
        return None
    names = [n for n in dict.fromkeys(n for e in held for n in e) if n not in ("kind", "step")]
    names = [n for n in names if n != "unreadable" or any(e.get(n) for e in held)]
    found = result.get("metrics", {})
    known = segmentation if "miou" in found else detections if "per_class" in found else None
    names = known.headline(names) if known else names
    shown = [held[i] for i in sorted({round(i) for i in np.linspace(0, len(held) - 1, min(ROWS, len(held)))})]
    rows = [[e["step"], *(f"{e[n]:.4g}" if n in e else "" for n in names)] for e in shown]
    caption = "" if len(shown) == len(held) else f"{len(shown)} of {len(held)} evaluations."
    blocks: list[Block] = [Table(["step", *names], rows, caption)]
    counts = found.get("confusion")
    if known is segmentation:
        blocks += segmentation.segmentation_blocks(found)
    elif known is detections:
        blocks += detections.detection_blocks(found)
    elif counts and len(counts) == len(classes) <= CLASSES:
        blocks.append(Plot(confusion_matrix("True against predicted class", counts, classes)))
    return Section("Measures on held-out images", "", blocks)


def _pictures(folder: Path, title: str, text: str) -> Section | None:
    """Pictures that a run left in a folder: the first, the last and one between."""
    found = sorted(folder.glob("step-*.png"))
    shown = [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})] if found else []
    blocks = []
    for path in shown:
        step = int(path.stem.removeprefix("step-"))
        with Image.open(path) as image:
            blocks.append(Picture(image.convert("RGB"), f"{title} at step {step}", f"Step {step}."))
    return Section(title, text, blocks) if blocks else None


def _events(log: Sequence[Entry]) -> Section:
    rows = [[e["step"], e["kind"].replace("_", " "), e["text"]] for e in log if "text" in e]
    if not rows:
        return Section("Warnings and events", "None.")
    return Section("Warnings and events", "", [Table(["step", "what", "said"], rows)])


def _record(manifest: Entry, config: Entry) -> Section | None:
    found = {"machine, versions, data": manifest, "settings": config}
    blocks = [Details(name[0].upper() + name[1:], content) for name, content in found.items() if content]
    return Section("What ran", "Everything that is needed to repeat the run.", blocks) if blocks else None


def _summary(
    directory: Path, log: Sequence[Entry], manifest: Entry, config: Entry, result: Entry
) -> tuple[str, list[tuple[str, str]]]:
    """The lead and the figures to see first."""
    step, total = max(entry["step"] for entry in log), manifest.get("total_steps")
    if result:
        state = f"It finished after {result['steps']} steps."
    else:
        state = f"It has not finished: its log ends at step {step}{f' of {total}' if total else ''}."
    what = f"Recipe {config['name']}. " if "name" in config else ""
    highlights = []
    trained = [e for e in log if e["kind"] == "train"]
    if trained:
        highlights.append((f"{trained[-1]['loss']:.4g}", "training loss, last"))
    held = [e for e in log if e["kind"] == "eval"]
    for name in ("loss", "top1", "miou"):
        if held and name in held[-1]:
            highlights.append((f"{held[-1][name]:.4g}", f"held-out {name}, last"))
    if "parameters" in manifest:
        highlights.append((f"{manifest['parameters'] / 1e6:.1f} M", "parameters"))
    warned = len([e for e in log if "text" in e])
    highlights.append((str(warned), "warning or event" if warned == 1 else "warnings and events"))
    return what + state, highlights


def _section(heading: str, text: str, drawn: Sequence[Drawing]) -> Section | None:
    return Section(heading, text, [Plot(drawing.svg) for drawing in drawn]) if drawn else None


def _over_time(title: str, series: Mapping[str, Sequence[tuple[int, Any]]], y: str, **how: Any) -> Drawing:
    """A line for each block or part; in a deep model of some, spread evenly."""
    names, note = list(series), ""
    if len(names) > SERIES:
        names = [names[i] for i in sorted({round(i) for i in np.linspace(0, len(names) - 1, SERIES)})]
        note = f"{SERIES} of {len(series)}, spread evenly."
    drawn = []
    for name in names:
        points = [(step, value) for step, value in _thinned(series[name]) if value is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        drawn.append(Line(_name(name), steps, values))
    return lines(title, drawn, x=STEPS, y=y, note=note, **how)


def _spread(label: str, values: Sequence[Sequence[Any]], first: int = 0) -> Line:
    """Mean, least and largest of the numbers at each place; places count from ``first``."""
    numbers = [[_number(v) for v in place] or [math.nan] for place in values]
    summaries: list[Callable[[list[float]], Any]] = [np.mean, np.min, np.max]
    mean, low, high = ([float(of(place)) for place in numbers] for of in summaries)
    return Line(label, range(first, first + len(numbers)), mean, low, high)


def _by_head(rows: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
    """(blocks, most heads), empty where a block has fewer."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = [_number(value) for value in row]
    return table


def _bias_maps(window: Sequence[int], values: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
    """(A, 2h-1, 2w-1), less the mean of each head; at offset 0 of time for a video."""
    table = np.array([[_number(v) for v in row] for row in values])
    table = (table - table.mean(1, keepdims=True)).reshape(len(table), *(2 * w - 1 for w in window))
    while table.ndim > 3:
        table = table[:, table.shape[1] // 2]
    return table


def _blocks(found: Mapping[str, Any]) -> list[str]:
    return [name for name in found if BLOCK.fullmatch(name)]


def _name(part: str) -> str:
    """ "2.3" for the block layers.2.blocks.3; other parts keep their name."""
    match = BLOCK.fullmatch(part)
    return f"{match[1]}.{match[2]}" if match else part


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _thinned(entries: Sequence[Any]) -> list[Any]:
    """At most about ``POINTS`` of them, evenly, with the last."""
    every = max(1, len(entries) // POINTS)
    return [*entries[:-1:every], *entries[-1:]]


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is missing or cut short, as a kill leaves it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _classes(directory: Path) -> list[str]:
    for name in ("best", "last"):
        classes: list[str] | None = _json(directory / name / "config.json").get("preprocessing", {}).get("classes")
        if classes:
            return classes
    return []
