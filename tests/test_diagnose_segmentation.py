"""Pictures of label maps and their legends, tables and bars of the measures, and a run's page that shows them (R-DOWN-2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from swinscale.diagnose import sheets
from swinscale.diagnose.colours import class_colours
from swinscale.diagnose.label_maps import WRONG, errors_on
from swinscale.diagnose.run_report import run_report
from swinscale.diagnose.segmentation import (
    Example,
    class_rows,
    colour_map,
    draw_segmentation,
    headline,
    iou_plot,
    overlay,
    print_segmentation_table,
    segmentation_blocks,
    segmentation_grid,
)
from swinscale.diagnose.sheets import Entry, Row
from swinscale.errors import UsageError
from swinscale.metrics import SegmentationMetric

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"
NAMES = ["sky", "road", "car", "tree"]
COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10)]


def halves(height: int, width: int, ignored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A grey picture, and labels: class 0 in the left half, 2 in the right one, or there nothing that counts."""
    labels = torch.zeros(height, width).long()
    labels[:, width // 2 :] = -1 if ignored else 2
    return torch.full((3, height, width), 100, dtype=torch.uint8), labels


def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is handed to ``sheets.sheet`` from now on."""
    seen: list[tuple[Any, ...]] = []

    def spy(*arguments: Any) -> Image.Image:
        seen.append(arguments)
        return sheets.sheet(*arguments)

    monkeypatch.setattr("swinscale.diagnose.segmentation.sheet", spy)
    return seen


def test_colours_are_translucent_with_opaque_contours_and_what_does_not_count_has_none():
    picture, labels = halves(60, 80)
    before = picture.clone()
    drawn = np.asarray(overlay(picture, labels, COLOURS)).astype(int)
    assert drawn[30, 10] == pytest.approx(0.45 * 100 + 0.55 * np.array(COLOURS[0]), abs=1)
    assert drawn[30, 70] == pytest.approx(0.45 * 100 + 0.55 * np.array(COLOURS[2]), abs=1)
    assert (drawn[:, 39] == COLOURS[0]).all() and (drawn[:, 40] == COLOURS[2]).all()
    assert (drawn[:, 38] == drawn[:, 10]).all() and (drawn[:, 41] == drawn[:, 70]).all()  # thin
    assert torch.equal(picture, before)
    assert np.asarray(overlay(picture, labels, COLOURS, opacity=0.0))[30, 10].tolist() == [100] * 3
    hatched = np.asarray(overlay(picture, halves(60, 80, ignored=True)[1], COLOURS)).astype(int)[:, 40:]
    assert np.ptp(hatched, axis=2).max() < 15  # greyish everywhere
    assert len(np.unique(hatched[..., 0])) == 2  # ground and lines


def test_contours_grow_with_the_picture():
    picture, labels = halves(8, 3200)
    drawn = np.asarray(overlay(picture, labels, COLOURS))
    assert [(drawn[4] == COLOURS[label]).all(-1).sum() for label in (0, 2)] == [4, 4]


def test_a_map_of_colours_is_exact():
    labels = torch.tensor([[0, 3], [-1, 1]])
    pixels = np.asarray(colour_map(labels, COLOURS))
    assert pixels.tolist() == [[list(COLOURS[0]), list(COLOURS[3])], [[0, 0, 0], list(COLOURS[1])]]


def test_errors_are_red_where_they_count():
    image = Image.new("RGB", (6, 4), (90, 90, 90))
    truth = np.zeros((4, 6), dtype=np.int64)
    truth[0] = -1
    predicted = truth.clip(0)
    predicted[:2, :3] = 1
    red = np.asarray(errors_on(image, predicted, truth)).astype(int)
    assert np.abs(red[1, :3] - WRONG).max() < 35
    assert np.ptp(red[2:], axis=2).max() == 0  # grey
    assert np.ptp(red[0], axis=1).max() < 15


@pytest.mark.parametrize(
    ("size", "panel", "columns"),
    [
        ((30, 20), (330, 220), 4),  # enlarged by 11
        ((480, 360), (480, 360), 4),
        ((20, 30), (220, 330), 4),
        ((900, 300), (900, 300), 2),
        ((1000, 60), (1000, 60), 1),
        ((4000, 3000), (1600, 1200), 4),
        ((1, 1), (320, 320), 4),
    ],
)
def test_panels_have_a_size_that_can_be_read_and_wide_ones_stand_below_each_other(size, panel, columns, monkeypatch):
    seen = said(monkeypatch)
    width, height = size
    picture, labels = halves(height, width)
    drawn = draw_segmentation(picture, labels, NAMES, truth=labels)
    rows = seen[0][0]
    assert [len(row.pictures) for row in rows] == [columns] * (4 // columns)
    assert {p.size for row in rows for p in row.pictures} == {panel}
    assert [t.split(":")[0] for row in rows for t in row.titles] == ["picture", "prediction", "truth", "errors"]
    assert drawn.width < columns * (panel[0] + 200) + 40
    assert drawn.height > panel[1] * 4 // columns


def test_large_pictures_keep_their_size_when_asked():
    picture, labels = halves(100, 2000)
    kept = draw_segmentation(picture, labels, NAMES, largest=None)
    assert kept.width > 2000 > draw_segmentation(picture, labels, NAMES).width


def test_the_legend_says_what_is_there_largest_first(monkeypatch):
    seen = said(monkeypatch)
    picture, truth = halves(10, 100, ignored=True)
    predicted = torch.zeros(10, 100).long()
    predicted[:, :10] = 3
    predicted[0, 0] = 1
    draw_segmentation(picture, predicted, NAMES, colours=COLOURS, truth=truth, iou=[0.5, None, 1.0, 0.0])
    rows, entries, header, more = seen[0]
    assert header == ["predicted", "true", "IoU"]
    assert [(entry.name, *entry.numbers) for entry in entries] == [
        ("sky", "90.0 %", "50.0 %", "50.0 %"),
        ("tree", "9.9 %", "0.0 %", "0.0 %"),
        ("road", "0.1 %", "0.0 %", "-"),
        ("not counted", "", "50.0 %", ""),
        ("wrong", "", "", ""),
    ]
    assert [entry.colour for entry in entries[:3]] == [COLOURS[0], COLOURS[3], COLOURS[1]]
    assert more == ""
    assert rows[-1].titles[-1] == "errors: 20.0 % of the pixels"


def test_of_many_classes_the_largest_forty_are_named(monkeypatch):
    seen = said(monkeypatch)
    labels = torch.arange(150).repeat_interleave(torch.arange(1, 151))[None].repeat(4, 1)
    picture = torch.zeros(3, *labels.shape, dtype=torch.uint8)
    drawn = draw_segmentation(picture, labels, [f"class {i} {'of a long name' * 4}" for i in range(150)])
    _, entries, _, more = seen[0]
    assert [entry.name.split()[1] for entry in entries] == [str(i) for i in range(149, 109, -1)]
    assert more == "and 110 more classes"
    assert drawn.width < 1700


def test_a_legend_has_as_many_columns_as_there_is_room_for_and_shows_each_colour():
    entries = [Entry(colour, f"class {i}", ["12.3 %"]) for i, colour in enumerate(class_colours(12))]
    narrow, wide = (np.asarray(sheets.legend(entries, ["share"], width, 16)) for width in (10, 900))
    assert narrow.shape[0] > 3 * wide.shape[0]
    assert wide.shape[1] <= 900
    for drawn in (narrow, wide):
        for colour in class_colours(12):
            assert (drawn == colour).all(-1).sum() > 100


def test_names_that_are_too_long_stay_inside():
    short, long = (
        sheets.sheet(
            [Row([Image.new("RGB", (300, 200))], ["picture"], note=["98 %", name])], [Entry((9, 9, 9), name, [])]
        )
        for name in ("a", "a long name " * 30)
    )
    assert short.width < long.width < 700


def test_a_grid_has_a_row_for_each_picture_with_what_was_right(monkeypatch):
    seen = said(monkeypatch)
    picture, labels = halves(40, 60)
    wrong = labels.clone()
    wrong[:10] = 3
    portrait, nothing = halves(900, 300, ignored=True)
    examples = [
        Example(picture, labels),
        Example(picture, wrong, labels, "b.png"),
        Example(portrait, nothing.clamp(min=0), torch.full_like(nothing, -1)),
    ]
    drawn = segmentation_grid(examples, NAMES)
    rows, entries, header, _ = seen[0]
    assert [len(row.pictures) for row in rows] == [2, 4, 4]
    assert [list(row.titles) for row in rows] == [["picture", "prediction", "truth", "errors"], [], []]
    assert [list(row.note) for row in rows] == [[], ["75.0 % right", "b.png"], []]
    assert rows[2].pictures[0].size == (160, 480)
    assert header == ["predicted", "true"]
    assert {entry.name for entry in entries} == {"sky", "car", "tree", "not counted", "wrong"}
    assert drawn.height > 240 * 2 + 480 - 160
    with pytest.raises(UsageError, match="at least one"):
        segmentation_grid([], NAMES)


def test_what_cannot_be_drawn_is_said():
    picture, labels = halves(40, 60)
    with pytest.raises(UsageError, match=r"label map is \(60, 40\), the picture \(3, 40, 60\)"):
        overlay(picture, labels.T, COLOURS)
    with pytest.raises(UsageError, match="Label 2 has no class: there are 2, so give at most 1"):
        colour_map(labels, COLOURS[:2])
    with pytest.raises(UsageError, match="Label 2 has no class"):
        draw_segmentation(picture, labels, NAMES[:2])
    with pytest.raises(UsageError, match="4 colours for 3 classes"):
        draw_segmentation(picture, labels, NAMES[:3], colours=COLOURS)
    with pytest.raises(UsageError, match="1 values of IoU for 4 classes"):
        draw_segmentation(picture, labels, NAMES, iou=[0.5])


def test_a_real_street_can_be_drawn():
    files = sorted((CAMVID / "test").glob("*.jpg"))
    if not files:
        pytest.skip("shared/data/camvid is absent")
    picture = torch.tensor(np.asarray(Image.open(files[0]))).movedim(-1, 0)
    truth = torch.tensor(np.asarray(Image.open(CAMVID / "testannot" / f"{files[0].stem}.png")).astype(np.int64))
    truth[truth == 11] = -1
    drawn = draw_segmentation(picture, truth.clamp(min=0), [f"class {i}" for i in range(11)], truth=truth)
    assert 4 * 480 < drawn.width < 2000
    coloured = np.asarray(overlay(picture, truth, class_colours(11)))
    assert (coloured != picture.movedim(0, -1).numpy()).any(-1).mean() > 0.95


def measures(classes: int = 4) -> dict[str, Any]:
    """Of a map of which a fifth is taken for the class before."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, classes - 1, (40, 50))  # the last class never occurs
    truth[:, :10] = 0
    predicted = np.where(draw.random(truth.shape) < 0.2, (truth - 1).clip(0), truth)
    metric = SegmentationMetric([f"class [{i}]" for i in range(classes)])
    metric.update(torch.tensor(predicted), torch.tensor(truth))
    return metric.compute()


def printed(metrics: dict[str, Any]) -> str:
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_segmentation_table(console, metrics)
    return console.export_text()


def test_tables_show_the_largest_class_first_and_the_means():
    metrics = measures()
    header, rows = class_rows(metrics)
    assert header == ["class", "share of pixels", "IoU", "accuracy"]
    assert rows[0][0] == "class [0]" and len(rows) == 3
    first = metrics["per_class"][0]
    assert rows[0][1:] == [f"{100 * v:.1f}" for v in (first["pixels"] / 2000, first["iou"], first["acc"])]
    text = printed(metrics)
    assert text.index("class [0]") < text.index("class [1]")
    assert f"mean IoU {100 * metrics['miou']:.1f}, mean accuracy of the classes" in text
    assert "1 of 4 classes are neither there nor predicted" in text
    assert headline(["loss", "miou", "aacc", "macc", "box_ap"]) == ["miou", "aacc", "macc"]


def test_nothing_that_counts_gives_tables_without_numbers():
    nothing = SegmentationMetric(NAMES)
    nothing.update(torch.zeros(2, 2).long(), torch.full((2, 2), -1))
    assert "mean IoU –" in printed(nothing.compute())
    assert len(segmentation_blocks(nothing.compute())) == 1


def test_bars_are_sorted_and_the_ends_of_many_classes_are_shown():
    drawing = iou_plot(measures()["per_class"])
    told = drawing.description
    values = [float(part.split()[-1].rstrip(".")) for part in told.split(". ", 2)[-1].split("; ")]
    assert values == sorted(values, reverse=True) and len(values) == 3
    assert "class [3]" not in drawing.svg and "mean IoU (" in drawing.svg and drawing.svg.startswith("<svg")
    many = [{"name": f"c{i}", "iou": i / 150, "acc": None, "pixels": 1} for i in range(150)]
    told = iou_plot(many).description
    assert all(f"c{i} " in told for i in (149, 120, 29, 0)) and "c119 " not in told and "c30 " not in told
    assert "90 classes between" in iou_plot(many).svg
    assert iou_plot([{"name": "a", "iou": None, "acc": None, "pixels": 0}]).svg


def test_blocks_of_a_report_hold_bars_table_confusion_and_pictures():
    metrics = measures()
    kinds = [block.kind for block in segmentation_blocks(metrics, Image.new("RGB", (9, 9)))]
    assert kinds == ["table", "picture", "plot", "plot", "table"]
    confusion = segmentation_blocks(metrics)[2]
    shares = [round(100 * row[i] / sum(row)) for i, row in enumerate(metrics["confusion"][:3])]
    assert all(f">{share}</text>" in confusion.svg for share in shares)
    assert "2000 pixels are on the diagonal" in confusion.svg
    del metrics["confusion"]
    assert [block.kind for block in segmentation_blocks(metrics)] == ["table", "plot", "table"]


def test_the_page_of_a_run_shows_the_measures_of_segmentation(tmp_path):
    metrics = measures()
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    log = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "eval", "step": 2, "extra": 1.0, **numbers}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (tmp_path / "result.json").write_text(json.dumps({"steps": 2, "metrics": metrics}))
    html = run_report(tmp_path).read_text(encoding="utf-8")
    assert "held-out miou, last" in html
    for text in (
        "Intersection over union of the classes",
        "True against predicted class",
        "mean accuracy of the classes",
    ):
        assert text in html
    assert f"{metrics['miou']:.4g}" in html and "extra" not in html
