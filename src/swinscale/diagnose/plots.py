"""Measures as drawings: loss curves, accuracies with intervals, confusion matrices; lines, dots and maps of anything.

On a page text stays text and takes the colour of the page (``currentColor``), the ground is transparent, so that a plot is
readable on light and dark pages. Series have the colours of Okabe and Ito, distinct for colour-blind readers.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from swinscale.errors import UsageError
from swinscale.intervals import wilson_interval

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK = "#1b1f24"  # becomes currentColor
SHARES = LinearSegmentedColormap.from_list("shares", [(0.0, 0.35, 0.58, 0.0), (0.0, 0.35, 0.58, 1.0)])
SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, "#b34a00"), (0.5, "#b34a0000"), (0.5, "#00598f00"), (1.0, "#00598f")]
)
ORDERED = matplotlib.colormaps["viridis"].resampled(256)
"""For more series than there are distinct colours; without its ends, which a page's ground would swallow."""
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called "$5 note$"
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 11,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Curve:
    """A loss over optimiser steps. Curves of one run share a colour; held-out ones are dashed, with points."""

    run: str
    steps: Sequence[float]
    losses: Sequence[float]
    held_out: bool = False


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` images."""

    label: str
    correct: int
    total: int


@dataclass(frozen=True)
class Line:
    """A series over x.

    Args:
        low, high: an interval about each y, drawn as a band, or as error bars where there are few points.
        group: lines of one group share a colour; None: a colour of its own.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    group: int | None = None


@dataclass(frozen=True)
class Dot:
    """A value with its interval; dots of one group share a colour."""

    label: str
    value: float
    low: float
    high: float
    group: int = 0


class Drawing:
    """A plot, for a page or for a file."""

    def __init__(self, figure: Figure, description: str):
        self.figure, self.description = figure, description

    @property
    def svg(self) -> str:
        """The element for a page (``report.Plot``)."""
        with style():
            return _svg(self.figure, self.description)

    def save(self, stem: Path) -> None:
        """Writes ``stem`` with .svg and .png added, on white, 144 dots per inch, and the folders above it."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        with style():
            matplotlib.rcParams["svg.hashsalt"] = self.description
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                path = stem.with_name(f"{stem.name}.{kind}")
                self.figure.savefig(path, facecolor="white", dpi=144, metadata=metadata)


def run_curves(run: str, log: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The training and the held-out loss in a run's log (``runlog.read_log``)."""
    curves = []
    for kind in ("train", "eval"):
        entries = sorted((e["step"], e["loss"]) for e in log if e["kind"] == kind and "loss" in e)
        if entries:
            steps, losses = zip(*entries, strict=True)
            curves.append(Curve(run, steps, losses, held_out=kind == "eval"))
    return curves


@contextmanager
def style() -> Iterator[None]:
    """Our settings for the time of one drawing; the caller's stay as they are."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has fonts for other scripts
        yield


@style()
def loss_curves(
    title: str, curves: Sequence[Curve], *, loss: str = "loss", baselines: Mapping[str, float] | None = None
) -> str:
    """Losses over optimiser steps, as SVG.

    A training loss of more than 40 points is drawn as a running mean over its faint single values.

    Args:
        loss: name and unit of the loss, for the axis.
        baselines: horizontal lines to compare with, such as the loss of predicting the mean colour.
    """
    figure = Figure(figsize=(5.4, 3.7), layout="constrained")
    axes = figure.add_subplot()
    runs = list(dict.fromkeys(curve.run for curve in curves))
    for curve in curves:
        index = runs.index(curve.run)
        colour = COLOURS[index % len(COLOURS)]
        points = np.array([curve.steps, curve.losses], dtype=float)
        steps, losses = points[:, np.isfinite(points).all(0)]
        label = f"{curve.run}, {'held-out' if curve.held_out else 'training'}"
        if curve.held_out:
            axes.plot(steps, losses, "--o", color=colour, markersize=4.5, linewidth=1.6, label=label, zorder=3)
            continue
        if len(losses) > 40:
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
            losses = _running_mean(losses, len(losses) // 20 | 1)
        axes.plot(steps, losses, "-" if len(losses) > 1 else ".", color=colour, linewidth=2, label=label)
    for index, (name, value) in enumerate((baselines or {}).items()):
        axes.axhline(
            value, color=INK, linewidth=1.3, linestyle=("dotted", "dashdot")[index % 2], label=f"{name} ({value:.3g})"
        )
    axes.set(title=title, xlabel="optimiser step", ylabel=loss)
    axes.margins(x=0.02)
    axes.grid(True)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=2 if len(curves) > 2 else 1, fontsize=10)
    ends = [f"{c.run} {'held-out' if c.held_out else 'training'} {c.losses[-1]:.3g}" for c in curves if len(c.losses)]
    return _svg(figure, f"{title}. Last values: {', '.join(ends)}." if ends else title)


@style()
def lines(
    title: str,
    series: Sequence[Line],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    baselines: Mapping[str, float] | None = None,
    note: str = "",
    x_labels: Sequence[str] | None = None,
) -> Drawing:
    """Series over a common x. Values that are not finite are left out; on a logarithmic axis also those that are not positive.

    Args:
        x, y: what the axes show, with units.
        baselines: horizontal lines to compare with.
        note: a line or two under the plot.
        x_labels: names of the places 0, 1, 2 … where x is a category.
    """
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.add_subplot()
    colours = colours_of([index if line.group is None else -1 - line.group for index, line in enumerate(series)])
    longest = max((len(line.label) for line in series), default=0)
    for index, (line, colour) in enumerate(zip(series, colours, strict=True)):
        # Error bars at one place would hide each other.
        beside = 0.08 * (index - (len(series) - 1) / 2) / max(1, len(series) / 6) if x_labels else 0.0
        low, high = (line.y if bound is None else bound for bound in (line.low, line.high))
        points = np.array([line.x, line.y, low, high], dtype=float)
        kept = np.isfinite(points[:2]).all(0) & ((points[0] > 0) | (not log_x)) & ((points[1] > 0) | (not log_y))
        places, values, lows, highs = points[:, kept]
        places = places + beside
        few = len(places) <= 12
        style: Any = {"color": colour, "linewidth": 1.8, "linestyle": "--" if line.dashed else "-"}
        axes.plot(places, values, marker="o" if few else "", markersize=4.5, label=line.label, zorder=3, **style)
        if line.low is not None or line.high is not None:
            if few:
                error = np.nan_to_num(np.stack([values - lows, highs - values]).clip(min=0))
                axes.errorbar(places, values, error, fmt="none", ecolor=colour, capsize=3, linewidth=1.3, zorder=3)
            else:
                axes.fill_between(places, lows, highs, color=colour, alpha=0.16, linewidth=0)
    for index, (name, value) in enumerate((baselines or {}).items()):
        shape = ("dotted", "dashdot", (0, (6, 2)))[index % 3]
        axes.axhline(value, color=INK, linewidth=1.3, linestyle=shape, label=f"{name} ({value:.3g})")
    axes.set(xlabel=x, ylabel=y)
    for axis, logarithmic in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if logarithmic:
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            start, end = axis.get_view_interval()
            digits = (1.0,) if end > 30 * start else (1.0, 2.0, 5.0) if end > 5 * start else tuple(range(1, 10))
            axis.set_major_locator(LogLocator(subs=digits))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the default one writes mathematics
            axis.set_minor_formatter(NullFormatter())
    if x_labels:
        upright = sum(map(len, x_labels)) > 60
        axes.set_xticks(range(len(x_labels)), x_labels, rotation=90 if upright else 0)
    axes.margins(x=0.03)
    axes.grid(True)
    columns = 1 if longest > 34 else 2 if longest > 16 or len(series) <= 4 else 3 if longest > 5 else 6
    shown = axes.get_legend_handles_labels()[0]
    if shown:  # the title of the legend, because constrained layout would set a text over it
        size = 10 if len(shown) <= 6 else 9
        figure.legend(
            loc="outside lower left",
            ncols=columns,
            fontsize=size,
            title=_wrapped(note),
            title_fontsize=9,
            alignment="left",
        )
    _frame(figure, title, "" if shown else note, 0.21 * math.ceil(len(shown) / columns) + 0.17 * bool(note and shown))
    ends = [f"{line.label} {line.y[-1]:.3g}" for line in series if len(line.y)]
    return Drawing(figure, f"{title}. Last values: {', '.join(ends)}." if ends else title)


@style()
def dots(title: str, rows: Sequence[Dot], *, x: str, reference: float | None = None, note: str = "") -> Drawing:
    """A value with its interval in each row, from the top.

    Args:
        x: what the values are, and their unit.
        reference: a line to compare with, such as 0 for differences.
    """
    figure = Figure(figsize=(5.6, 1.3 + 0.34 * max(1, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    colours = colours_of([-1 - row.group for row in rows])
    for index, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        error = [[max(row.value - row.low, 0)], [max(row.high - row.value, 0)]]
        axes.errorbar(
            row.value, index, xerr=error, fmt="o", color=colour, markersize=6, capsize=4, linewidth=1.7, zorder=3
        )
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
    longest = min(30, max((len(row.label) for row in rows), default=0))
    axes.set(xlabel=fill(x, 56 - longest), ylim=(len(rows) - 0.4, -0.6))  # beside labels there is room for so much
    axes.set_yticks(range(len(rows)), [fill(row.label, 30) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    axes.grid(True)
    _frame(figure, title, note)
    told = [f"{row.label} {row.value:.4g} ({row.low:.4g} to {row.high:.4g})" for row in rows]
    return Drawing(figure, f"{title}. {'; '.join(told)}.")


@style()
def heat_maps(
    title: str,
    maps: Sequence[tuple[str, ArrayLike]],
    *,
    unit: str,
    diverging: bool = False,
    columns: int = 4,
    x: str = "",
    y: str = "",
    note: str = "",
) -> Drawing:
    """Maps side by side, on one scale of colours. What is not finite stays empty.

    Args:
        maps: (title, (rows, columns) values), all drawn with square cells.
        unit: what the colours say.
        diverging: two colours that meet at 0, instead of one from 0 (or the least value, if negative) upwards.
        x, y: what the columns and rows of each map are; named rows and columns make ticks unnecessary.
    """
    arrays = [np.ma.masked_invalid(np.asarray(values, dtype=float)) for _, values in maps]
    for (name, _), array in zip(maps, arrays, strict=True):
        if array.ndim != 2 or not array.size:
            raise UsageError(f"The map '{name}' has shape {array.shape}: give rows and columns of values.")
    columns = max(1, min(columns, len(maps)))
    lines_of = math.ceil(len(maps) / columns)
    cell = (5.6 - 0.3) / columns
    ratio = max((array.shape[0] / array.shape[1] for array in arrays), default=1.0)
    height = min(max(cell * ratio, 0.25), max(2.2, 0.12 * max((len(array) for array in arrays), default=1)))
    figure = Figure(figsize=(5.6, lines_of * (height + 0.32 + 0.25 * bool(x)) + 1.15), layout="constrained")
    grid = figure.subplots(lines_of, columns, squeeze=False) if maps else np.empty((0, 0))
    known = np.concatenate([array.compressed() for array in arrays]) if arrays else np.zeros(0)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    bound = max(abs(low), abs(high)) or 1.0
    limits = (-bound, bound) if diverging else (min(low, 0.0), high if high > min(low, 0.0) else low + 1.0)
    image: Any = None
    for place, axes in enumerate(grid.flat):
        if place >= len(maps):
            axes.set_visible(False)
            continue
        colours = SIGNED if diverging else SHARES
        image = axes.imshow(arrays[place], cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="none")
        axes.set_title(fill(maps[place][0], max(8, 44 // columns)), fontsize=10, fontweight="normal", pad=4)
        axes.set(xticks=[], yticks=[], xlabel=x, ylabel=y if place % columns == 0 else "")
        axes.spines[:].set_visible(True)
        axes.spines[:].set_alpha(0.35)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, orientation="horizontal", shrink=0.7, aspect=36, pad=0.04)
        bar.set_label(unit, fontsize=10)
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set(rasterized=True)  # as in ``confusion_matrix``
    _frame(figure, title, note)
    return Drawing(figure, f"{title}. {len(maps)} maps from {low:.3g} to {high:.3g}.")


def colours_of(groups: Sequence[int]) -> list[Any]:
    """A colour for each entry, the same for the same group; in order from dark to light when there are many groups."""
    known = list(dict.fromkeys(groups))
    if len(known) <= len(COLOURS):
        return [COLOURS[known.index(group)] for group in groups]
    return [ORDERED(0.12 + 0.76 * known.index(group) / (len(known) - 1)) for group in groups]


def _frame(figure: Figure, title: str, note: str, inches: float = 0.0) -> None:
    """Writes the title over a figure and the note under it, and makes room for them and for ``inches`` more."""
    heading = fill(title, 52)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    if note:
        figure.supxlabel(_wrapped(note), x=0.015, ha="left", fontsize=9)
        inches += 0.05 + 0.16 * (1 + _wrapped(note).count("\n"))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + inches + 0.2 * heading.count("\n"))


def _wrapped(note: str) -> str:
    return fill(note, 86)


@style()
def accuracy_bars(title: str, accuracies: Sequence[Accuracy], *, chance: float | None = None) -> str:
    """Accuracies with 95 % Wilson intervals, as SVG.

    Args:
        chance: accuracy of guessing, in 0…1, drawn as a line.
    """
    figure = Figure(figsize=(5.4, 1.45 + 0.72 * len(accuracies)), layout="constrained")
    axes = figure.add_subplot()
    told = []
    for index, accuracy in enumerate(accuracies):
        share, (low, high) = accuracy.correct / accuracy.total, wilson_interval(accuracy.correct, accuracy.total)
        axes.barh(index, 100 * share, 0.4, color=COLOURS[index % len(COLOURS)])
        error = [[100 * max(share - low, 0)], [100 * max(high - share, 0)]]
        axes.errorbar(100 * share, index, xerr=error, color=INK, capsize=5, linewidth=1.6, capthick=1.6)
        axes.text(0, index - 0.3, accuracy.label, ha="left", va="bottom")
        value = f"{100 * share:.1f} %"
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        axes.text(100, index - 0.3, f"{value}  ({interval})", ha="right", va="bottom", fontsize=10)
        told.append(f"{accuracy.label} {value}, interval {interval}, of {accuracy.total} images")
    if chance is not None:
        places = np.arange(len(accuracies))
        axes.vlines(
            np.full(len(accuracies), 100 * chance),
            places - 0.27,
            places + 0.27,
            color=INK,
            linewidth=1.6,
            linestyle=(0, (2, 1)),
            label=f"chance ({100 * chance:.3g} %)",
        )
        figure.legend(loc="outside lower left", fontsize=10)
    axes.set(title=title, xlim=(0, 100), ylim=(len(accuracies) - 0.65, -0.75), yticks=[])
    axes.set_xlabel("correct, % of held-out images; whisker: 95 % Wilson interval")
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    return _svg(figure, f"{title}. {'; '.join(told)}.")


@style()
def confusion_matrix(title: str, counts: ArrayLike, classes: Sequence[str], *, pixels: bool = False) -> str:
    """True classes in rows, predicted ones in columns: counts as numbers, shares of each true class as colour; SVG.

    Args:
        counts: (N, N) images of true class i that were taken for class j.
        pixels: they are pixels, of which there are many: the numbers are the shares, in per cent.
    """
    matrix = np.asarray(counts).round().astype(int)
    number = len(classes)
    if matrix.shape != (number, number):
        raise UsageError(
            f"The matrix has shape {matrix.shape}, but there are {number} classes: give one row and column each."
        )
    shares = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    names = [name if len(name) <= 26 else name[:25] + "…" for name in classes]
    cell = 0.8 if number <= 4 else 0.4 if number <= 12 else 0.33 if number <= 25 else 0.27  # inches
    longest = 0.09 * max(map(len, names))  # inches, about
    upright, side = longest > cell, number * cell
    size = (max(3.6, side + longest + 0.65), side + (longest if upright else 0.2) + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=SHARES, vmin=0, vmax=1, interpolation="none")
    ticks = range(number)
    axes.set_xticks(ticks, names, rotation=90 if upright else 0, fontsize=11 if number <= 12 else 9)
    axes.set_yticks(ticks, names, fontsize=11 if number <= 12 else 9)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(True, which="minor")
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    written = (100 * shares).round().astype(int) if pixels else matrix
    digits = len(str(written.max(initial=0)))
    _write_counts(axes, written, shares, min(11 if number <= 12 else 8, cell * 72 * 1.45 / max(digits, 2)))
    bar = figure.colorbar(image, orientation="horizontal", fraction=0.12 / side, aspect=side * 8, pad=0.02)
    bar.set_label("share of the true class, %", fontsize=10)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"], fontsize=10)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=True)  # translucent neighbours drawn as shapes would show seams
    correct, total = int(matrix.trace()), int(matrix.sum())
    return _svg(figure, f"{title}. {correct} of {total} {'pixels' if pixels else 'images'} are on the diagonal.")


def _write_counts(axes: Axes, matrix: NDArray[np.int_], shares: NDArray[np.float64], size: float) -> None:
    """The numbers that are not zero, in a colour that is readable on their cell."""
    for row, column in zip(*matrix.nonzero(), strict=True):
        colour = "#ffffff" if shares[row, column] > 0.65 else INK
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=size)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over ``window`` (odd) values, over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page, down to where its text is still readable."""
    matplotlib.rcParams["svg.hashsalt"] = description  # ids are reproducible, and differ between plots on one page
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))

    def drop_unused_id(tag: re.Match[str]) -> str:
        return re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", tag[0])

    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<[^<>]*>", lambda tag: drop_unused_id(tag).replace(INK, "currentColor"), body)
    width, height = (72 * inches for inches in figure.get_size_inches())
    pixels = width * 96 / 72
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" width="{pixels:.0f}" height="{pixels * height / width:.0f}" role="img" '
        f'aria-label="{escape(description)}" '
        f'style="width: 100%; max-width: {1.15 * pixels:.0f}px; min-width: {0.58 * pixels:.0f}px; height: auto">{body.strip()}'
    )
