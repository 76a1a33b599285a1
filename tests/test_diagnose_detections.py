"""Pictures of detections, tables of COCO's measures, precision over recall."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from swinscale.diagnose.colours import class_colour, ink_on
from swinscale.diagnose.detections import (
    draw_detections,
    precision_recall_plot,
    print_detection_table,
    tag_places,
)
from swinscale.heads.detections import Detections

NAMES = [f"class {i}" for i in range(80)]
VAL = Path(__file__).parents[2] / "shared" / "data" / "coco" / "val2017"


def one(box: list[float], score: float = 0.9, label: int = 2, masks: bool = True) -> Detections:
    mask = torch.zeros(1, 28, 28)
    mask[:, :, :14] = 1  # the left half
    return Detections(torch.tensor([box]), torch.tensor([score]), torch.tensor([label]), mask if masks else None)


def test_masks_are_translucent_and_the_rest_of_the_box_stays_as_it_is():
    picture = torch.full((3, 400, 500), 100, dtype=torch.uint8)
    before = picture.clone()
    drawn = np.asarray(draw_detections(picture, one([100, 100, 300, 300]), NAMES)).astype(int)
    assert drawn.shape == (400, 500, 3)
    assert torch.equal(picture, before)
    colour = np.array(class_colour(2))
    assert drawn[250, 150] == pytest.approx(0.58 * 100 + 0.42 * colour, abs=1)
    assert drawn[250, 250].tolist() == [100] * 3  # in the box, not in the mask
    assert np.abs(drawn[250, 199:202] - colour).min() < 10  # the contour
    for y, x in ((100, 280), (299, 280), (280, 100), (280, 299)):
        assert drawn[y, x].tolist() == colour.tolist()  # the box
    assert (drawn[310:] == 100).all()
    assert (drawn[:, 310:] == 100).all()


def test_only_good_detections_are_drawn_and_only_so_many():
    picture = torch.zeros(3, 400, 400, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 200, 110, 300], [150, 200, 250, 300], [290, 200, 390, 300]])
    found = Detections(boxes, torch.tensor([0.9, 0.6, 0.4]), torch.zeros(3).long())

    def drawn(**options: Any) -> list[bool]:
        pixels = np.asarray(draw_detections(picture, found, NAMES, **options))
        return [bool(pixels[250, x].any()) for x in (10, 150, 290)]

    assert drawn() == [True, True, False]
    assert drawn(min_score=0.1) == [True, True, True]
    assert drawn(min_score=0.1, limit=1) == [True, False, False]
    assert drawn(min_score=0.95) == [False, False, False]


def test_pictures_with_nothing_on_them_stay_as_they_are():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (330, 340, 3), dtype=np.uint8))
    for found in (one([5, 5, 9, 9]).take(slice(0)), one([400.0, 0, 500, 90]), one([math.nan] * 4)):
        assert np.array_equal(np.asarray(draw_detections(picture, found, NAMES)), np.asarray(picture))


@pytest.mark.parametrize(
    ("size", "drawn"), [((60, 45), (360, 270)), ((500, 320), (500, 320)), ((2000, 40), (2000, 40))]
)
def test_pictures_of_any_size_have_room_for_a_tag(size, drawn):
    width, height = size
    found = one([0.2 * width, 0.2 * height, 0.9 * width, 0.9 * height])
    picture = Image.new("RGB", size)
    with_tag = np.asarray(draw_detections(picture, found, [f"{'a rather long name ' * 30}{i}" for i in range(3)]))
    assert with_tag.shape[1::-1] == drawn
    ink = (with_tag == ink_on(class_colour(2))).all(-1)
    assert ink.sum() > 40


def test_detections_on_another_scale_and_outside_the_picture_are_cut():
    picture = torch.zeros(3, 320, 320, dtype=torch.uint8)
    pixels = np.asarray(draw_detections(picture, one([-500.0, -400, 700, 900]), NAMES))
    assert (pixels[160, 0] == class_colour(2)).all()
    assert (pixels[160, -1] == class_colour(2)).all()


def test_tags_stay_inside_and_apart_while_there_is_room():
    draw = np.random.default_rng(0)
    corners = draw.uniform(-20, 620, (30, 2))
    boxes = [
        tuple(row) for row in np.concatenate([corners, corners + draw.uniform(5, 90, (30, 2))], 1).clip(0, 640).tolist()
    ]
    places = tag_places(boxes, [90] * 30, 17, (640, 640))
    for left, top, right, bottom in places:
        assert left >= 0 and top >= 0 and right <= 640 and bottom <= 640
        assert (right - left, bottom - top) == (90, 17)
    assert tag_places([(100, 100, 300, 300)], [90], 17, (640, 640)) == [(100, 83, 190, 100)]
    twice = tag_places([(100, 100, 300, 300)] * 4, [90] * 4, 17, (640, 640))
    for a, b in combinations(twice, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert tag_places([(0, 0, 640, 640)], [90], 17, (640, 640)) == [(0, 0, 90, 17)]


def test_a_real_picture_can_be_drawn_on():
    files = sorted(VAL.glob("*.jpg"))
    if not files:
        pytest.skip("shared/data/coco is absent")
    with Image.open(files[0]) as file:
        picture = file.convert("RGB")
    width, height = picture.size
    drawn = draw_detections(picture, one([0.1 * width, 0.1 * height, 0.8 * width, 0.9 * height]), NAMES)
    assert drawn.size == picture.size
    different = (np.asarray(drawn) != np.asarray(picture)).any(-1).mean()
    assert 0.2 < different < 0.5  # the mask's half of the box, its edge, and the tag


def measures(masks: bool = True) -> dict[str, Any]:
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    kinds = ("box", "mask") if masks else ("box",)
    values: dict[str, Any] = {f"{k}_{n}": 0.1 * i + 0.0321 for k in kinds for i, n in enumerate(names)}
    values["box_ap_small"] = None
    rows = [("rare", 2), ("frequent [b]", 70), ("absent", 0)]
    values["per_class"] = [
        {"name": n, "instances": count, "box_ap": 0.4125, "box_ap50": 0.5, **({"mask_ap": 0.3} if masks else {})}
        for n, count in rows
    ]
    curve = {"0.5": np.linspace(1, 0.2, 101).tolist(), "0.75": np.linspace(0.9, 0, 101).tolist()}
    values["curves"] = {"recall": np.linspace(0, 1, 101).tolist(), **dict.fromkeys(kinds, curve)}
    return values


def printed(metrics: dict[str, Any]) -> str:
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_detection_table(console, metrics)
    return console.export_text()


def test_tables_show_sizes_and_the_most_frequent_class_first():
    text = printed(measures())
    box = next(line for line in text.splitlines() if " box " in line and "AP" not in line)
    assert [part.strip() for part in box.strip("│ ").split("│")] == [
        *("box", "3.2", "13.2", "23.2", "–", "43.2", "53.2", "63.2", "73.2", "83.2")
    ]
    assert text.index("frequent [b]") < text.index("rare")
    assert "absent" not in text
    assert "1 of 3 classes do not occur" in text
    assert "41.2" in text and "30.0" in text
    assert "mask" not in printed(measures(masks=False))


def test_precision_is_drawn_over_recall():
    drawing = precision_recall_plot(measures()["curves"])
    assert drawing.svg.startswith("<svg")
    for name in ("boxes, IoU 0.5", "masks, IoU 0.75", "recall", "precision, mean over classes"):
        assert name in drawing.svg
    assert "boxes, IoU 0.5: mean 0.600" in drawing.description
    assert "masks" not in precision_recall_plot(measures(masks=False)["curves"]).svg
    nothing = {"recall": [0.0, 0.5, 1.0], "box": {"0.5": [None] * 3, "0.75": [None] * 3}}
    assert precision_recall_plot(nothing).svg
