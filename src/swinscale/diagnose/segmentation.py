"""Label maps over their picture, beside the truth and their errors; measures of segmentation as tables and bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from swinscale.diagnose import report
from swinscale.diagnose.colours import Colour, class_colours
from swinscale.diagnose.label_maps import OPACITY, WRONG, Labels, coloured, errors_on, hatched, laid_over
from swinscale.diagnose.plots import COLOURS, Drawing, confusion_matrix, style
from swinscale.diagnose.plots import INK as LINES
from swinscale.diagnose.report import Block, Picture, Plot
from swinscale.diagnose.sheets import Entry, Row, sheet
from swinscale.errors import UsageError

SMALLEST, LARGEST = 320, 1600
"""Pixels of a panel's longer side: smaller pictures are enlarged by whole numbers, larger ones shrunk."""
IN_GRID = 480  # the same in a grid of several pictures
NAMED = 40  # classes in a legend
BARS = 60  # in a plot
TITLES = ("picture", "prediction", "truth", "errors")
MEASURES = {"miou": "mean IoU", "macc": "mean accuracy of the classes", "aacc": "accuracy of all pixels"}


class Example(NamedTuple):
    """A picture (3, H, W) uint8, its predicted labels (H, W) int64, where known the true ones, and what it is called."""

    picture: Tensor
    predicted: Tensor
    truth: Tensor | None = None
    name: str = ""


def overlay(picture: Tensor, labels: Tensor, colours: Sequence[Colour], opacity: float = OPACITY) -> Image.Image:
    """A picture under the colours of its classes, with thin contours between them; what does not count is hatched.

    Args:
        picture: (3, H, W) uint8.
        labels: (H, W) int64, 0 … classes - 1; negative: does not count.
        colours: of the classes.
        opacity: of the colours, 0…1.

    Raises:
        UsageError: for maps of another size than the picture, and labels without a colour.
    """
    return laid_over(_image(picture), _array(labels, picture, len(colours)), colours, opacity)


def colour_map(labels: Tensor, colours: Sequence[Colour]) -> Image.Image:
    """Labels (H, W) int64 as their colours; what is negative, and does not count, is black.

    Raises:
        UsageError: for labels without a colour.
    """
    return coloured(_array(labels, labels, len(colours)), colours)


def draw_segmentation(
    picture: Tensor,
    predicted: Tensor,
    classes: Sequence[str],
    *,
    colours: Sequence[Colour] | None = None,
    truth: Tensor | None = None,
    iou: Sequence[float | None] | None = None,
    largest: int | None = LARGEST,
) -> Image.Image:
    """A picture and its classes side by side, where the truth is known also that and the errors; below what is what.

    A picture whose longer side is below 320 pixels is enlarged by a whole number. Panels of wide pictures stand in fewer
    columns. The legend has the 40 classes with the largest shares.

    Args:
        picture: (3, H, W) uint8.
        predicted, truth: (H, W) int64, 0 … classes - 1; negative: does not count.
        colours: of the classes; None: ours.
        iou: of each class, 0…1, for the legend.
        largest: pixels of a panel's longer side, to which larger pictures are shrunk; None: they keep their size.

    Raises:
        UsageError: for maps of another size than the picture, and labels that no class has.
    """
    example = Example(picture, predicted, truth)
    colours = class_colours(len(classes), colours)
    panels = _panels(example, colours, SMALLEST, largest)
    titles = list(TITLES[: len(panels)])
    if truth is not None:
        titles[-1] += f": {_percent(_wrong(example))} of the pixels"
    ratio = panels[0].width / panels[0].height
    columns = len(panels) if ratio <= 2 else len(panels) // 2 if ratio <= 4 else 1
    starts = range(0, len(panels), columns)
    rows = [Row(panels[start : start + columns], titles[start : start + columns]) for start in starts]
    return _with_legend(rows, [example], classes, colours, iou)


def segmentation_grid(
    examples: Sequence[Example],
    classes: Sequence[str],
    *,
    colours: Sequence[Colour] | None = None,
    iou: Sequence[float | None] | None = None,
) -> Image.Image:
    """The same for several pictures, each in a row, its share of right pixels at the left, and one legend for all.

    Args:
        colours, iou: as in ``draw_segmentation``.

    Raises:
        UsageError: as there, and without pictures.
    """
    if not examples:
        raise UsageError("No pictures: a grid needs at least one.")
    colours = class_colours(len(classes), colours)
    drawn = [_panels(example, colours, IN_GRID // 2, IN_GRID) for example in examples]
    rows = list[Row]()
    for example, panels in zip(examples, drawn, strict=True):
        wrong = _wrong(example)
        note = ["" if wrong is None else f"{_percent(1 - wrong)} right", example.name]
        titles = [] if rows else TITLES[: max(map(len, drawn))]
        rows.append(Row(panels, titles, [text for text in note if text]))
    return _with_legend(rows, examples, classes, colours, iou)


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.movedim(0, -1).contiguous().cpu().numpy())


def _array(labels: Tensor, picture: Tensor, classes: int) -> Labels:
    """The labels, looked through."""
    if labels.shape != picture.shape[-2:]:
        sizes = [f"{tuple(t.shape)}" for t in (labels, picture)]
        raise UsageError(f"The label map is {sizes[0]}, the picture {sizes[1]}: both need the same height and width.")
    array: Labels = labels.cpu().numpy()
    if array.size and array.max() >= classes:
        raise UsageError(f"Label {array.max()} has no class: there are {classes}, so give at most {classes - 1}.")
    return array


def _panels(example: Example, colours: Sequence[Colour], smallest: int, largest: int | None) -> list[Image.Image]:
    """Picture, prediction, and with the truth that and the errors, on one scale."""
    image = _image(example.picture)
    maps = [_array(m, example.picture, len(colours)) for m in (example.predicted, example.truth) if m is not None]
    longest = max(image.size)
    scale = float(max(1, math.ceil(smallest / longest)))
    if largest is not None and longest > largest:
        scale = largest / longest
    if scale != 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in ((height, image.height), (width, image.width))
        )
        maps = [labels[rows[:, None], columns] for labels in maps]
        image = image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    panels = [image, *(laid_over(image, labels, colours) for labels in maps)]
    return [*panels, errors_on(image, *maps)] if len(maps) > 1 else panels


def _wrong(example: Example) -> float | None:
    """Share of the pixels that count; None where the truth is unknown or no pixel counts."""
    if example.truth is None:
        return None
    counts = example.truth >= 0
    return float((example.predicted != example.truth)[counts].float().mean()) if counts.any() else None


def _with_legend(
    rows: Sequence[Row],
    examples: Sequence[Example],
    classes: Sequence[str],
    colours: Sequence[Colour],
    iou: Sequence[float | None] | None,
) -> Image.Image:
    if iou is not None and len(iou) != len(classes):
        raise UsageError(f"{len(iou)} values of IoU for {len(classes)} classes: give one to each.")
    known = [example.truth for example in examples if example.truth is not None]
    columns = {"predicted": _shares([example.predicted for example in examples], len(classes))}
    columns |= {"true": _shares(known, len(classes))} if known else {}
    table = np.stack(list(columns.values()), 1)  # classes, and last what does not count
    largest = table[:-1].max(1)
    order = [int(label) for label in np.argsort(-largest, kind="stable") if largest[label] > 0]
    header = [*columns, *(["IoU"] if iou is not None else [])]
    entries = [
        Entry(
            colours[label],
            classes[label],
            [*map(_percent, table[label]), *([_percent(iou[label])] if iou is not None else [])],
        )
        for label in order[:NAMED]
    ]
    if table[-1].any():
        numbers = [_percent(share) if share else "" for share in table[-1]]
        swatch = hatched(Image.new("RGB", (36, 24), "white"))
        entries.append(Entry(swatch, "not counted", [*numbers, *([""] if iou is not None else [])]))
    if known:
        entries.append(Entry(WRONG, "wrong", [""] * len(header)))
    more = f"and {len(order) - NAMED} more classes" if len(order) > NAMED else ""
    return sheet(rows, entries, header, more)


def _shares(maps: Sequence[Tensor], classes: int) -> NDArray[np.float64]:
    """Of all pixels each class has, and last those that do not count."""
    counts = sum(np.bincount(m.cpu().numpy().ravel().clip(-1) + 1, minlength=classes + 1) for m in maps)
    shares: NDArray[np.float64] = np.roll(counts / np.sum(counts), -1)
    return shares


def headline(names: Iterable[str]) -> list[str]:
    """Of the measures of segmentation those that a summary shows: mean IoU, mean accuracy, accuracy of all pixels."""
    return [name for name in names if name in MEASURES]


def class_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row for each class that is there or predicted, in per cent, most pixels first.

    Args:
        metrics: what ``metrics.SegmentationMetric.compute`` returns.
    """
    total = max(1, sum(row["pixels"] for row in metrics["per_class"]))
    shown = sorted((row for row in metrics["per_class"] if row["iou"] is not None), key=lambda row: -row["pixels"])
    cells = [[r["name"], *map(_number, (r["pixels"] / total, r["iou"], r["acc"]))] for r in shown]
    return ["class", "share of pixels", "IoU", "accuracy"], cells


def print_segmentation_table(console: Console, metrics: Mapping[str, Any]) -> None:
    """Mean IoU and accuracies, and those of each class that is there or predicted; in per cent."""
    header, rows = class_rows(metrics)
    table = Table(header[0], title="Segmentation, %")
    for column in header[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    if rows:
        console.print(table)
    console.print(", ".join(f"{title} {_number(metrics[name])}" for name, title in MEASURES.items()))
    if len(metrics["per_class"]) > len(rows):
        total = len(metrics["per_class"])
        console.print(f"{total - len(rows)} of {total} classes are neither there nor predicted.")


def segmentation_blocks(metrics: Mapping[str, Any], pictures: Image.Image | None = None) -> list[Block]:
    """For a report: the means, IoU of the classes as bars and as a table, who is taken for whom, and pictures.

    Args:
        metrics: what ``metrics.SegmentationMetric.compute`` returns.
        pictures: a ``segmentation_grid``.
    """
    header, rows = class_rows(metrics)
    means = [[title, _number(metrics[name])] for name, title in MEASURES.items()]
    blocks: list[Block] = [report.Table(["", "%"], means)]
    if pictures is not None:
        blocks.append(Picture(pictures, "Pictures with their predicted classes", "Pictures and what was predicted."))
    if not rows:
        return blocks
    blocks.append(Plot(iou_plot(metrics["per_class"]).svg))
    if "confusion" in metrics:
        names = [row["name"] for row in metrics["per_class"]]
        blocks.append(Plot(confusion_matrix("True against predicted class", metrics["confusion"], names, pixels=True)))
    blocks.append(report.Table(header, rows, "The classes that are there or predicted, per cent."))
    return blocks


@style()
def iou_plot(per_class: Sequence[Mapping[str, Any]], title: str = "Intersection over union of the classes") -> Drawing:
    """A bar for each class that has an IoU, best first, with a mark at its accuracy; of more than 60 the ends.

    Args:
        per_class: that of ``metrics.SegmentationMetric.compute``.
    """
    known = sorted((row for row in per_class if row["iou"] is not None), key=lambda row: -row["iou"])
    best = BARS // 2 if len(known) > BARS else len(known)
    shown = [*known[:best], *(known[best - BARS :] if best < len(known) else [])]
    # A gap stands for the classes between.
    places = [index + (index >= best) for index in range(len(shown))]
    figure = Figure(figsize=(5.6, 1.5 + 0.23 * (len(shown) + (best < len(known)))), layout="constrained")
    axes = figure.add_subplot()
    ious = [100 * row["iou"] for row in shown]
    axes.barh(places, ious, 0.68, color=COLOURS[0])
    for place, value in zip(places, ious, strict=True):
        axes.text(109, place, f"{value:.1f}", ha="right", va="center", fontsize=9)
    marked = np.array([(100 * row["acc"], y) for row, y in zip(shown, places, strict=True) if row["acc"] is not None])
    if len(marked):
        axes.plot(*marked.T, "|", color=COLOURS[1], markersize=8, markeredgewidth=1.6, label="accuracy (recall)")
    mean = float(np.mean([row["iou"] for row in known])) if known else math.nan
    if known:
        axes.axvline(
            100 * mean, color=LINES, linewidth=1.2, linestyle=(0, (3, 2)), label=f"mean IoU ({100 * mean:.1f})"
        )
        figure.legend(loc="outside lower left", ncols=2, fontsize=10)
    names = [row["name"] if len(row["name"]) <= 26 else row["name"][:25] + "…" for row in shown]
    axes.set_yticks(places, names, fontsize=9)
    if best < len(known):
        axes.text(0, best, f"{len(known) - BARS} classes between", va="center", fontsize=9, style="italic")
    axes.set(xlim=(0, 110), ylim=(max(places, default=0) + 0.7, -0.7), xlabel="IoU, %", xticks=range(0, 101, 20))
    axes.spines["bottom"].set_bounds(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    told = [f"{row['name']} {100 * row['iou']:.1f}" for row in shown]
    return Drawing(figure, f"{title}, per cent. Mean {100 * mean:.1f}. {'; '.join(told)}.")


def _number(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _percent(share: float | None) -> str:
    """For pictures, whose font has no dash."""
    if share is None:
        return "-"
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
