"""Detections on their picture, COCO's measures as tables, and precision over recall."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from swinscale.diagnose import report
from swinscale.diagnose.colours import Colour, class_colour, ink_on
from swinscale.diagnose.pictures import cut_to_width
from swinscale.diagnose.plots import Drawing, Line, lines, style
from swinscale.diagnose.report import Block, Plot
from swinscale.heads.detections import Detections

Place = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""
SMALLEST = 320  # pixels of the longer side; a smaller picture has no room for names
OPAQUE = 0.42  # of masks


def draw_detections(
    picture: Tensor | Image.Image,
    detections: Detections,
    classes: Sequence[str],
    *,
    min_score: float = 0.5,
    limit: int = 40,
) -> Image.Image:
    """A picture with boxes, translucent masks where there are some, and the name and score of each object.

    Lines and letters grow with the picture. A picture whose longer side is below 320 pixels is enlarged by a whole number.

    Args:
        picture: (3, H, W) uint8, or RGB.
        detections: in pixels of ``picture``, best first.
        classes: names in the order of the labels.
        min_score: objects with less are left out.
        limit: the largest number of objects that are drawn.
    """
    if isinstance(picture, Tensor):
        picture = Image.fromarray(picture.movedim(0, -1).contiguous().cpu().numpy())
    factor = max(1, math.ceil(SMALLEST / max(picture.size)))
    width, height = (side * factor for side in picture.size)
    canvas = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    shown = detections.to("cpu").take(slice(None))
    shown = shown.take(shown.scores >= min_score).take(slice(limit)).scaled(factor, factor)
    limits = shown.boxes.new_tensor([width, height, width, height])
    corners = torch.minimum(shown.boxes.float().clamp(min=0), limits)
    there = (corners[:, 2:] > corners[:, :2]).all(1)  # not beside the picture, and a number
    shown, corners = shown.take(there), corners[there]
    boxes = [tuple(box) for box in corners.tolist()]
    colours = [class_colour(label) for label in shown.labels.tolist()]
    line = max(2, round(max(width, height) / 420))
    if shown.masks is not None:
        canvas = _with_masks(canvas, shown, boxes, colours, line)
    draw = ImageDraw.Draw(canvas)
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):  # the best comes to lie on top
        left, top, right, bottom = (round(side) for side in box)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
    names = [classes[label] if label < len(classes) else f"class {label}" for label in shown.labels.tolist()]
    texts = list(zip(names, (f"{score:.2f}" for score in shown.scores.tolist()), strict=True))
    _write_tags(draw, (width, height), boxes, texts, colours)
    return canvas


def _with_masks(
    canvas: Image.Image, shown: Detections, boxes: Sequence[tuple[float, ...]], colours: Sequence[Colour], line: int
) -> Image.Image:
    """Masks with a contour, the best on top; one at a time, because pictures may be large."""
    pixels: NDArray[np.uint8] = np.array(canvas)
    for index in reversed(range(len(shown))):
        left, top, right, bottom = (int(side) for side in boxes[index])
        right, bottom = min(right + 1, canvas.width), min(bottom + 1, canvas.height)
        one = shown.take(slice(index, index + 1))
        # The region alone: the box is moved instead of the picture cut.
        moved = Detections(one.boxes - one.boxes.new_tensor([left, top, left, top]), one.scores, one.labels, one.masks)
        mask = moved.full_masks(bottom - top, right - left)[0]
        outside = F.pad(~mask, (1, 1, 1, 1), value=True)[None].float()
        reach = 2 * max(1, line // 2) + 1
        near = F.max_pool2d(outside, reach, stride=1, padding=reach // 2)[0, 1:-1, 1:-1] > 0
        share = (OPAQUE * mask + (0.95 - OPAQUE) * (mask & near)).numpy()[..., None]
        region = pixels[top:bottom, left:right]
        pixels[top:bottom, left:right] = np.rint(region * (1 - share) + np.array(colours[index]) * share).astype(
            np.uint8
        )
    return Image.fromarray(pixels)


def _write_tags(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: Sequence[tuple[float, ...]],
    texts: Sequence[tuple[str, str]],
    colours: Sequence[Colour],
) -> None:
    letters = max(13, min(round(max(size) / 56), min(size) // 5))
    font = ImageFont.load_default(letters)
    pad = max(2, letters // 5)
    tall = letters + 2 * pad
    fitted = [
        f"{cut_to_width(name, font, size[0] - 2 * pad - font.getlength(f' {score}'))} {score}" for name, score in texts
    ]
    widths = [min(size[0], math.ceil(font.getlength(text)) + 2 * pad) for text in fitted]
    places = tag_places(boxes, widths, tall, size)
    for (x, y, end, low), text, colour in reversed(list(zip(places, fitted, colours, strict=True))):
        ink = ink_on(colour)
        draw.rectangle((x, y, end - 1, low - 1), fill=colour, outline=ink, width=max(1, letters // 24))
        # Letters are centred by the font's own height, so that names with and without descenders stand on one line.
        draw.text((x + pad, y + tall / 2), text, ink, font, anchor="lm")


def tag_places(
    boxes: Sequence[tuple[float, ...]], widths: Sequence[int], tall: int, size: tuple[int, int]
) -> list[Place]:
    """Where each box's tag goes: inside the picture, at the box, where it covers the least of tags placed before.

    Args:
        boxes: best first; the best choose first.
        widths, tall: of the tags.
        size: width and height of the picture.
    """
    taken: list[Place] = []
    for (left, top, right, bottom), wide in zip(boxes, widths, strict=True):
        best, least = (0, 0, 0, 0), math.inf
        for y in (top - tall, top, bottom, bottom - tall, (top + bottom - tall) / 2):
            for x in (left, right - wide, (left + right - wide) / 2):
                inside = (round(max(0, min(x, size[0] - wide))), round(max(0, min(y, size[1] - tall))))
                place = (*inside, inside[0] + wide, inside[1] + tall)
                covered = sum(_shared(place, other) for other in taken)
                if covered < least:  # so the first of equals
                    best, least = place, covered
        taken.append(best)
    return taken


def _shared(a: Place, b: Place) -> int:
    """Area that two rectangles share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def headline(names: Iterable[str]) -> list[str]:
    """Of the measures of detection those that a summary shows: average precision of all objects, and at two overlaps."""
    return [name for name in names if re.fullmatch(r"(box|mask)_ap(50|75)?", name)]


def size_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, in per cent: precision and recall of boxes and masks, of all objects and by size.

    Args:
        metrics: what ``metrics.CocoMetric.compute`` returns.
    """
    recalls = [name.removeprefix("box_") for name in metrics if name.startswith("box_ar")]
    columns = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"}
    columns |= {size: f"ap_{size}" for size in ("small", "medium", "large")} | {name.upper(): name for name in recalls}
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in metrics]
    rows = [[kind, *(_percent(metrics.get(f"{kind}_{name}")) for name in columns.values())] for kind in kinds]
    return ["", *columns], rows


def class_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The same for each class that occurs, most frequent first."""
    shown = {"box AP": "box_ap", "box AP50": "box_ap50", "mask AP": "mask_ap"}
    shown = {column: name for column, name in shown.items() if name.removesuffix("50") in metrics}
    rows = sorted((row for row in metrics["per_class"] if row["instances"]), key=lambda row: -row["instances"])
    cells = [[row["name"], str(row["instances"]), *(_percent(row[name]) for name in shown.values())] for row in rows]
    return ["class", "objects", *shown], cells


def print_detection_table(console: Console, metrics: Mapping[str, Any]) -> None:
    """Precision and recall by size of the objects, and of each class that occurs; in per cent."""
    titles = "COCO average precision and recall, %", "Average precision of the classes, %"
    for title, (header, rows) in zip(titles, (size_rows(metrics), class_rows(metrics)), strict=True):
        table = Table(header[0], title=title)
        for column in header[1:]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*map(escape, row))
        if rows:
            console.print(table)
    total, present = len(metrics["per_class"]), len(class_rows(metrics)[1])
    if total > present:
        console.print(f"{total - present} of {total} classes do not occur.")


def detection_blocks(metrics: Mapping[str, Any]) -> list[Block]:
    """Tables by size and by class, and precision over recall, for a report."""
    blocks: list[Block] = [
        report.Table(
            *size_rows(metrics), "Average precision and recall, per cent; small: below 32² pixels, large: from 96²."
        ),
        Plot(precision_recall_plot(metrics["curves"]).svg),
        report.Table(*class_rows(metrics), "The classes that occur, per cent."),
    ]
    return blocks


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def precision_recall_plot(curves: Mapping[str, Any], title: str = "Precision over recall") -> Drawing:
    """Mean precision of the classes at each recall, of boxes and masks at two IoU thresholds.

    Args:
        curves: the ``curves`` of ``metrics.CocoMetric.compute``.
    """
    kinds = {"box": "boxes", "mask": "masks"}

    def known(values: list[float | None]) -> list[float]:
        return [math.nan if value is None else value for value in values]

    series = [
        Line(
            f"{kinds[kind]}, IoU {name}", curves["recall"], known(curves[kind][name]), dashed=name != "0.5", group=group
        )
        for group, kind in enumerate(kind for kind in kinds if kind in curves)
        for name in curves[kind]
    ]
    drawing = lines(title, series, x="recall", y="precision, mean over classes")
    with style():
        drawing.figure.axes[0].set(xlim=(0, 1.01), ylim=(0, 1.02))
    areas = [f"{line.label}: mean {np.mean(line.y):.3f}" for line in series]
    return Drawing(drawing.figure, f"{title}. {'; '.join(areas)}.")
