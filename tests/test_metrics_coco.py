"""COCO's measures: equal to the reference evaluator on random and on real data, in any order, over processes."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swinscale.errors import UsageError
from swinscale.heads.detections import Detections
from swinscale.metrics import CocoMetric, coco

pytest.importorskip("faster_coco_eval")
ANNOTATIONS = Path(__file__).parents[2] / "shared" / "data" / "coco" / "annotations" / "instances_val2017.json"
Images = list[tuple[Detections, int, tuple[int, int], list[dict[str, Any]]]]
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")


def measured(images: Images, classes: int, masks: bool = True, **kwargs: Any) -> dict[str, Any]:
    metric = CocoMetric([f"class {i}" for i in range(classes)], masks, **kwargs)
    for start in range(0, len(images), 3):
        metric.update(*zip(*images[start : start + 3], strict=True))
    return metric.to("cpu").compute()


def reference(images: Images, classes: int, kind: str) -> dict[str, float]:
    """What pycocotools says, from annotations as they are and masks that it encodes itself."""
    pytest.importorskip("pycocotools")
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, found = [], []
    for detections, image_id, size, mine in images:
        truths += [
            {**copy.deepcopy(a), "id": len(truths) + i + 1, "image_id": image_id, "category_id": a["label"]}
            for i, a in enumerate(mine)
        ]
        for i, full in enumerate(detections.full_masks(*size).numpy() if kind == "mask" else [None] * len(detections)):
            one = {
                "image_id": image_id,
                "category_id": detections.labels[i].item(),
                "score": detections.scores[i].item(),
            }
            x1, y1, x2, y2 = detections.boxes[i].tolist()
            shape = {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            if kind == "mask":
                shape = {"segmentation": mask.encode(np.asfortranarray(full.astype(np.uint8)))}
            found.append({**one, **shape})
    there = COCO()
    there.dataset = {
        "images": [{"id": image_id, "height": size[0], "width": size[1]} for _, image_id, size, _ in images],
        "annotations": truths,
        "categories": [{"id": i} for i in range(classes)],
    }
    there.createIndex()
    run = COCOeval(there, there.loadRes(found), "segm" if kind == "mask" else "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    values = {f"{kind}_{name}": value for name, value in zip(NAMES, run.stats, strict=False)}
    for i in range(classes):
        values[f"{kind}_ap of {i}"] = _known(run.eval["precision"][:, :, i, 0, -1])
    return values


def _known(values: np.ndarray) -> float:
    return values[values > -1].mean() if (values > -1).any() else -1.0


def compare(result: dict[str, Any], expected: dict[str, float], kind: str) -> None:
    ours = {**result, **{f"{kind}_ap of {i}": row[f"{kind}_ap"] for i, row in enumerate(result["per_class"])}}
    for name, value in expected.items():
        assert ours[name] == (None if value == -1 else pytest.approx(value, abs=1e-6)), name


def random_images(count: int = 14, classes: int = 7, seed: int = 0) -> Images:
    """Images of which some are empty and some only searched, with crowds, ties in the scores, and objects of all sizes."""
    draw = np.random.default_rng(seed)
    images: Images = []
    for index in range(count):
        size = (int(draw.integers(150, 260)), int(draw.integers(150, 260)))
        truths = []
        for _ in range(0 if index % 5 == 4 else int(draw.integers(1, 12))):
            side = draw.choice([14.0, 50.0, 120.0]) * draw.uniform(0.7, 1.3, 2)
            x, y = draw.uniform(0, 1, 2) * (np.array(size[::-1]) - side)
            width, height = side
            corners = [[x, y], [x + width, y + height * 0.04], [x + width * 0.97, y + height], [x, y + height * 0.95]]
            truth: dict[str, Any] = {
                "label": int(draw.integers(classes - 1)),  # the last class never occurs
                "bbox": [x, y, width, height],
                "area": float(width * height * 0.8),
                "segmentation": [np.array(corners).flatten().tolist()],
                "iscrowd": 0,
            }
            if draw.random() < 0.2:
                inside = np.zeros(size, np.uint8)
                inside[int(y) : int(y + height), int(x) : int(x + width)] = 1
                runs = np.flatnonzero(np.diff(np.concatenate([[0], inside.T.flatten(), [0]])))
                lengths = np.diff(np.concatenate([[0], runs, [inside.size]])).tolist()
                truth |= {"iscrowd": 1, "segmentation": {"size": list(size), "counts": lengths}}
            truths.append(truth)
        boxes, labels = [], []
        for truth in truths if index % 5 != 3 else []:
            for _ in range(int(draw.integers(0, 4))):
                x, y, width, height = (
                    np.array(truth["bbox"]) + draw.normal(0, 0.05, 4) * np.array(truth["bbox"])[2:].mean()
                )
                boxes.append([x, y, x + abs(width) + 1, y + abs(height) + 1])
                labels.append(truth["label"] if draw.random() < 0.8 else int(draw.integers(classes)))
        for _ in range(int(draw.integers(0, 5)) if index % 5 != 3 else 0):
            x, y = draw.uniform(0, 100, 2)
            boxes.append([x, y, x + 40, y + 60])
            labels.append(int(draw.integers(classes)))
        n = len(boxes)
        found = Detections(
            torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
            torch.tensor(draw.choice(np.linspace(0.1, 1, 12), n), dtype=torch.float32),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(draw.uniform(0.45, 1, (n, 14, 14)), dtype=torch.float32),
        )
        order = found.scores.argsort(descending=True, stable=True)
        images.append((found.take(order), 1000 - 7 * index, size, truths))
    return images


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_equal_to_pycocotools_on_random_detections(kind, seed):
    images = random_images(seed=seed)
    result = measured(images, 7, masks=kind == "mask")
    expected = reference(images, 7, kind)
    assert 0.1 < expected[f"{kind}_ap"] < 0.9
    assert expected[f"{kind}_ap of 6"] == -1
    compare(result, expected, kind)


def test_more_than_a_hundred_detections_of_a_class_count_as_in_pycocotools():
    images = random_images(3, classes=2)
    found, image_id, size, truths = images[0]
    many = Detections(*(torch.cat([x] * 40) for x in (found.boxes, found.scores, found.labels, found.masks)))
    assert len(many) > 250
    images[0] = (many.take(many.scores.argsort(descending=True, stable=True)), image_id, size, truths)
    compare(measured(images, 2, masks=False), reference(images, 2, "box"), "box")


def perturbed_coco() -> Images:
    """The annotations of real images, slightly moved, as what a detector found; a mask lies on a 28 × 28 grid in its box."""
    if not ANNOTATIONS.is_file():
        pytest.skip("shared/data/coco is absent")
    data = json.loads(ANNOTATIONS.read_text())
    label = {category["id"]: i for i, category in enumerate(data["categories"])}
    from faster_coco_eval.core import mask

    draw = np.random.default_rng(0)
    images: Images = []
    for image in data["images"]:
        size = (image["height"], image["width"])
        mine = [{**a, "label": label[a["category_id"]]} for a in data["annotations"] if a["image_id"] == image["id"]]
        boxes, labels, masks = [], [], []
        for truth in mine:
            x, y, w, h = truth["bbox"]
            full = torch.tensor(mask.decode(coco._rle(truth["segmentation"], size)), dtype=torch.float32)
            moved = np.array([x, y, x + w, y + h]) + draw.normal(0, 0.04, 4) * np.array([w, h, w, h])
            rows = ((np.arange(28) + 0.5) / 28 * h + y).clip(0, size[0] - 1).astype(int)
            columns = ((np.arange(28) + 0.5) / 28 * w + x).clip(0, size[1] - 1).astype(int)
            boxes.append(moved.tolist())
            labels.append(truth["label"] if draw.random() < 0.9 else int(draw.integers(80)))
            masks.append(full[rows][:, columns])
        n = len(boxes)
        scores = torch.tensor(draw.uniform(0.05, 1, n), dtype=torch.float32)
        found = Detections(
            torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
            scores,
            torch.tensor(labels, dtype=torch.int64),
            torch.stack(masks) if masks else torch.zeros(0, 28, 28),
        )
        images.append((found.take(scores.argsort(descending=True)), image["id"], size, mine))
    return images


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_equal_to_pycocotools_on_real_annotations(kind):
    """R-DOWN-2: the number is the one that tables of detectors print."""
    images = perturbed_coco()
    result = measured(images, 80, masks=kind == "mask")
    expected = reference(images, 80, kind)
    assert 0.2 < expected[f"{kind}_ap"] < 0.95
    compare(result, expected, kind)


def test_perfect_detections_have_precision_1():
    size, truths = (120, 160), []
    for label, (x, y, w, h) in enumerate([(10, 10, 20, 20), (40, 30, 64, 64), (0, 0, 150, 110)]):
        rectangle = [x, y, x + w, y, x + w, y + h, x, y + h]
        truths.append({"label": label, "bbox": [x, y, w, h], "segmentation": [rectangle]})
    boxes = torch.tensor([[10.0, 10, 30, 30], [40, 30, 104, 94], [0, 0, 150, 110]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.arange(3), torch.ones(3, 28, 28))
    result = measured([(found, 5, size, truths)], 4)
    for kind in ("box", "mask"):
        assert [result[f"{kind}_{name}"] for name in NAMES] == [1.0] * 9
        assert result["curves"][kind] == {"0.5": [1.0] * 101, "0.75": [1.0] * 101}
    assert result["curves"]["recall"][:3] == pytest.approx([0, 0.01, 0.02])
    assert [row["instances"] for row in result["per_class"]] == [1, 1, 1, 0]
    assert result["per_class"][1] == {"name": "class 1", "instances": 1, "box_ap": 1.0, "box_ap50": 1.0, "mask_ap": 1.0}
    assert result["per_class"][3]["box_ap"] is None


def test_the_order_of_the_images_does_not_matter():
    images = random_images()
    shuffled = [images[i] for i in np.random.default_rng(1).permutation(len(images))]
    assert repr(measured(images, 7)) == repr(measured(shuffled, 7))


def test_two_processes_measure_what_one_does_and_an_image_in_both_counts_once(monkeypatch):
    images = random_images()
    alone = measured(images, 7)
    halves = [CocoMetric([f"class {i}" for i in range(7)]) for _ in range(2)]
    halves[0].update(*zip(*images[:8], strict=True))
    halves[1].update(*zip(*images[6:], strict=True))
    halves[1].update(*zip(*images[6:], strict=True))
    monkeypatch.setattr(coco, "_gather", lambda seen: [halves[0]._seen, halves[1]._seen])
    assert repr(halves[0].compute()) == repr(halves[1].compute()) == repr(alone)


def test_curves_are_the_mean_precision_of_the_classes_that_occur():
    result = measured(random_images(), 7)
    for name, threshold in (("0.5", "ap50"), ("0.75", "ap75")):
        curve = result["curves"]["mask"][name]
        assert len(curve) == 101
        assert np.mean(curve) == pytest.approx(result[f"mask_{threshold}"])
        assert curve == sorted(curve, reverse=True)


def test_nothing_to_find_nothing_found_and_nothing_at_all():
    nothing = measured([], 3)
    assert all(nothing[f"{kind}_{name}"] is None for kind in ("box", "mask") for name in NAMES)
    assert nothing["curves"]["box"]["0.5"][0] is None
    images = random_images(3, classes=3)
    only_searched = [(found, image_id, size, []) for found, image_id, size, _ in images]
    assert repr(measured(only_searched, 3)) == repr(nothing)
    nothing_found = [(found.take(slice(0)), *rest) for found, *rest in images]
    missed = measured(nothing_found, 3)
    assert missed["box_ap"] == missed["mask_ap"] == missed["box_ar100"] == 0
    assert sum(row["instances"] for row in missed["per_class"]) == sum(not t["iscrowd"] for i in images for t in i[3])
    boxes_alone = measured([(Detections(f.boxes, f.scores, f.labels), *rest) for f, *rest in images], 3, masks=False)
    assert boxes_alone["box_ap"] > 0
    assert not any("mask" in name for name in [*boxes_alone, *boxes_alone["curves"], *boxes_alone["per_class"][0]])


def test_an_image_of_crowds_alone_has_nothing_to_find():
    truth = {"label": 0, "bbox": [0, 0, 9, 9], "iscrowd": 1, "segmentation": {"size": [9, 9], "counts": [0, 81]}}
    found = Detections(torch.tensor([[0.0, 0, 9, 9]]), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 4, 4))
    assert measured([(found, 1, (9, 9), [truth])], 1)["mask_ap"] is None


def test_an_area_that_is_not_given_is_that_of_the_segmentation_or_else_of_the_box():
    triangle = [0.0, 0, 40, 0, 0, 40]  # 800 pixels: small; its box has 1600: medium
    truth = {"label": 0, "bbox": [0, 0, 40, 40], "segmentation": [triangle]}
    found = Detections(torch.tensor([[0.0, 0, 40, 40]]), torch.ones(1), torch.zeros(1).long())
    given = measured([(found, 1, (50, 50), [truth])], 1, masks=False)
    assert given["box_ap_small"] == 1
    assert given["box_ap_medium"] is None
    given = measured([(found, 1, (50, 50), [{"label": 0, "bbox": [0, 0, 40, 40]}])], 1, masks=False)
    assert given["box_ap_medium"] == 1
    assert given["box_ap_small"] is None


def test_run_lengths_may_be_text():
    packed = {"size": [6, 5], "counts": "7240005"}
    truth = {"label": 0, "bbox": [1, 1, 3, 2], "segmentation": packed}
    found = Detections(torch.tensor([[1.0, 1, 4, 3]]), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 4, 4))
    assert measured([(found, 1, (6, 5), [truth])], 1)["mask_ap"] == 1


def test_large_images_are_pasted_in_portions(monkeypatch):
    images = random_images(4)
    whole = measured(images, 7)
    monkeypatch.setattr(coco, "_PASTED_AT_ONCE", 100_000)
    assert repr(measured(images, 7)) == repr(whole)


def test_what_is_not_a_number_matches_nothing():
    truth = {"label": 0, "bbox": [0, 0, 40, 40], "area": 1600}
    boxes = torch.tensor([[math.nan, 0, 40, 40], [0, 0, math.inf, 40]])
    found = Detections(boxes, torch.tensor([0.9, math.nan]), torch.zeros(2).long())
    assert measured([(found, 1, (50, 50), [truth])], 1, masks=False)["box_ap50"] == 0


def test_other_numbers_of_detections():
    result = measured(random_images(4), 7, masks=False, max_detections=5)
    assert "box_ar5" in result and "box_ar1" in result and "box_ar10" not in result


def test_what_cannot_be_measured_is_said(monkeypatch):
    found = Detections(torch.zeros(1, 4), torch.ones(1), torch.zeros(1).long())
    metric = CocoMetric(["cat"])
    with pytest.raises(UsageError, match="no masks: use a detector with a mask head"):
        metric.update([found], [1], [(9, 9)], [[]])
    with pytest.raises(UsageError, match="Image 1: annotation 3 has no segmentation"):
        metric.update([found.take(slice(0))], [1], [(9, 9)], [[{"label": 0, "bbox": [0, 0, 4, 4], "id": 3}]])
    with pytest.raises(UsageError, match="Image 1: label 1 of an annotation is none of 0 … 0"):
        metric.update([found.take(slice(0))], [1], [(9, 9)], [[{"label": 1, "bbox": [0, 0, 4, 4]}]])
    with pytest.raises(UsageError, match="0 classes"):
        CocoMetric([])
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'swinscale\[detect\]'"):
        CocoMetric(["cat"])
