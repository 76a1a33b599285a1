"""Measures as SVG text: loss curves, accuracies with intervals, confusion matrices.

Text stays text and takes the colour of the page (``currentColor``), the ground is transparent, so that a plot is readable
on light and dark pages. Series have the colours of Okabe and Ito, distinct for colour-blind readers.
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
from statistics import NormalDist
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from swinscale.errors import UsageError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK = "#1b1f24"  # becomes currentColor
SHARES = LinearSegmentedColormap.from_list("shares", [(0.0, 0.35, 0.58, 0.0), (0.0, 0.35, 0.58, 1.0)])
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


def run_curves(run: str, log: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The training and the held-out loss in a run's log (``runlog.read_log``)."""
    curves = []
    for kind in ("train", "eval"):
        entries = sorted((e["step"], e["loss"]) for e in log if e["kind"] == kind and "loss" in e)
        if entries:
            steps, losses = zip(*entries, strict=True)
            curves.append(Curve(run, steps, losses, held_out=kind == "eval"))
    return curves


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Journal of the American Statistical Association 22, 1927), in 0…1.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and at ``total`` of ``total``.
    """
    if not 0 <= correct <= total or total < 1:
        raise UsageError(
            f"{correct} of {total} is not a proportion: give 0 to total correct ones, and a positive total."
        )
    z2, share = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2, correct / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * share * (1 - share) / total + (z2 / (2 * total)) ** 2) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


@contextmanager
def _style() -> Iterator[None]:
    """Our settings for the time of one drawing; the caller's stay as they are."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has fonts for other scripts
        yield


@_style()
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


@_style()
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


@_style()
def confusion_matrix(title: str, counts: ArrayLike, classes: Sequence[str]) -> str:
    """True classes in rows, predicted ones in columns: counts as numbers, shares of each true class as colour; SVG.

    Args:
        counts: (N, N) images of true class i that were taken for class j.
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
    digits = len(str(matrix.max(initial=0)))
    _write_counts(axes, matrix, shares, min(11 if number <= 12 else 8, cell * 72 * 1.45 / max(digits, 2)))
    bar = figure.colorbar(image, orientation="horizontal", fraction=0.12 / side, aspect=side * 8, pad=0.02)
    bar.set_label("share of the true class, %", fontsize=10)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"], fontsize=10)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=True)  # translucent neighbours drawn as shapes would show seams
    correct, total = int(matrix.trace()), int(matrix.sum())
    return _svg(figure, f"{title}. {correct} of {total} images are on the diagonal.")


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
