"""Measures of segmentation: as torchmetrics and a plain count have them, in any grouping, over processes (R-DOWN-2)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.processes import launch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from swinscale.errors import UsageError
from swinscale.metrics import SegmentationMetric, segmentation

ADE = Path(__file__).parents[2] / "shared" / "data" / "ade20k-sample" / "sampleData"


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def random_maps(count: int = 6, classes: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true maps. Class 1 is never there, class 2 never predicted, class 3 neither."""
    draw = np.random.default_rng(seed)
    truth = draw.choice([0, 2, *range(4, classes)], (count, 31, 23))
    predicted = np.where(draw.random(truth.shape) < 0.6, truth, draw.integers(0, classes, truth.shape))
    predicted[np.isin(predicted, (2, 3))] = 1
    truth[draw.random(truth.shape) < 0.2] = -1
    return torch.tensor(predicted), torch.tensor(truth)


def measured(predicted: torch.Tensor, truth: torch.Tensor, classes: int, **options: Any) -> dict[str, Any]:
    metric = SegmentationMetric(names(classes), **options).to("cpu")
    metric.update(predicted, truth)
    return metric.compute()


def counted(predicted: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, Any]:
    """The definitions, one class after the other."""
    predicted, truth = predicted[truth >= 0], truth[truth >= 0]
    ious, accuracies = [], []
    for label in range(classes):
        there, found = truth == label, predicted == label
        union = (there | found).sum()
        ious.append((there & found).sum() / union if union else math.nan)
        accuracies.append((there & found).sum() / there.sum() if there.any() else math.nan)
    return {"iou": ious, "acc": accuracies, "miou": np.nanmean(ious), "macc": np.nanmean(accuracies),
            "aacc": (predicted == truth).mean()}  # fmt: skip


def compare(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("miou", "macc", "aacc"):
        assert result[name] == pytest.approx(expected[name], abs=1e-12)
    for name in ("iou", "acc"):
        values = [math.nan if row[name] is None else row[name] for row in result["per_class"]]
        assert values == pytest.approx(expected[name], abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_a_plain_count_with_ignored_pixels_and_absent_classes(seed):
    predicted, truth = random_maps(seed=seed)
    result = measured(predicted, truth, 9)
    compare(result, counted(predicted.numpy(), truth.numpy(), 9))
    rows = result["per_class"]
    assert (rows[1]["iou"], rows[1]["acc"], rows[1]["pixels"]) == (0.0, None, 0)  # predicted, but not there
    assert (rows[2]["iou"], rows[2]["acc"]) == (0.0, 0.0) and rows[2]["pixels"] > 0  # there, but not predicted
    assert (rows[3]["iou"], rows[3]["acc"]) == (None, None)
    assert sum(row["pixels"] for row in rows) == (truth >= 0).sum() == np.sum(result["confusion"])
    assert [row["name"] for row in rows] == names(9)


def test_equal_to_torchmetrics_which_takes_absent_classes_for_zero_class_by_class():
    """Its lists hold 0 where there is no number; its means, like ours, leave out classes that never occur, and its mean
    accuracy takes for 0 a class that is predicted but not there, which the published one leaves out."""
    predicted, truth = random_maps(seed=2)
    result = measured(predicted, truth, 9)
    options: Any = {"num_classes": 9, "ignore_index": -1}
    iou = MulticlassJaccardIndex(average="none", **options)(predicted, truth)
    accuracy = MulticlassAccuracy(average="none", **options)(predicted, truth)
    assert [row["iou"] or 0.0 for row in result["per_class"]] == pytest.approx(iou.tolist(), abs=1e-6)
    assert [row["acc"] or 0.0 for row in result["per_class"]] == pytest.approx(accuracy.tolist(), abs=1e-6)
    assert result["aacc"] == pytest.approx(
        MulticlassAccuracy(average="micro", **options)(predicted, truth).item(), abs=1e-6
    )
    # Eight classes are there or predicted, seven are there.
    assert result["miou"] == pytest.approx(iou.sum().item() / 8, abs=1e-6)
    assert result["miou"] == pytest.approx(MulticlassJaccardIndex(**options)(predicted, truth).item(), abs=1e-6)
    assert result["macc"] == pytest.approx(accuracy.sum().item() / 7, abs=1e-6)
    macro = MulticlassAccuracy(average="macro", **options)(predicted, truth).item()
    assert macro == pytest.approx(accuracy.sum().item() / 8, abs=1e-6)


def test_batches_in_any_grouping_and_order_give_the_same(monkeypatch):
    predicted, truth = random_maps()
    whole = measured(predicted, truth, 9)
    one_by_one = SegmentationMetric(names(9))
    for index in (4, 0, 1, 5, 3, 2):
        one_by_one.update(predicted[index], truth[index])
    assert one_by_one.compute() == whole
    pairs = SegmentationMetric(names(9))
    for start in (0, 2, 4):
        pairs.update(predicted[start : start + 2], truth[start : start + 2])
        assert pairs.compute() != whole or start == 4  # more can be added after a look
    assert pairs.compute() == whole
    monkeypatch.setattr(segmentation, "_COUNTED_AT_ONCE", 100)
    assert measured(predicted, truth, 9) == whole


@pytest.mark.slow
def test_two_processes_measure_what_one_does():
    predicted, truth = random_maps()
    code = """
import json, sys, torch
from torch import distributed
from swinscale.metrics import SegmentationMetric
from tests.test_metrics_segmentation import names, random_maps
distributed.init_process_group("gloo")
predicted, truth = random_maps()
metric = SegmentationMetric(names(9))
share = slice(0, 1) if distributed.get_rank() == 0 else slice(1, None)  # of different sizes
metric.update(predicted[share], truth[share])
print(json.dumps(metric.compute()))
distributed.destroy_process_group()
"""
    alone = measured(predicted, truth, 9)
    assert [json.loads(out) for out in launch(2, code)] == [alone, alone]


def test_more_pixels_than_32_bits_count():
    metric = SegmentationMetric(names(2))
    metric._matrix.confmat += torch.tensor([[3 * 2**31, 0], [0, 0]])  # stands for many images
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    result = metric.compute()
    assert result["confusion"] == [[3 * 2**31 + 1, 1], [0, 0]]
    assert result["per_class"][0]["pixels"] == 3 * 2**31 + 2
    assert 1 - result["aacc"] == pytest.approx(1 / (3 * 2**31), rel=1e-6)


def test_a_large_image_of_many_classes_is_counted_in_the_deterministic_mode_too():
    """There torchmetrics alone would ask for 169 GiB."""
    draw = torch.Generator().manual_seed(0)
    predicted, truth = (
        torch.randint(150, (1000, 1000), generator=draw),
        torch.randint(150, (1000, 1000), generator=draw),
    )
    plain = measured(predicted, truth, 150)
    assert plain["aacc"] == pytest.approx((predicted == truth).float().mean().item())
    assert "confusion" not in plain
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert measured(predicted, truth, 150) == plain
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_where_nothing_counts_there_is_no_number():
    nothing = measured(torch.zeros(4, 5).long(), torch.full((4, 5), -1), 3)
    assert (nothing["miou"], nothing["macc"], nothing["aacc"]) == (None, None, None)
    assert nothing["per_class"][2] == {"name": "class 2", "iou": None, "acc": None, "pixels": 0}
    assert json.loads(json.dumps(nothing)) == nothing
    assert measured(torch.zeros(0, 4, 5).long(), torch.zeros(0, 4, 5).long(), 3) == nothing


def test_a_single_class_small_integers_and_another_ignored_label():
    assert measured(torch.zeros(2, 2).long(), torch.zeros(2, 2).long(), 1)["miou"] == 1.0
    truth = torch.tensor([[0, 255], [1, 1]], dtype=torch.uint8)
    result = measured(torch.tensor([[0, 0], [1, 0]], dtype=torch.uint8), truth, 2, ignored=255)
    assert result["confusion"] == [[1, 0], [1, 1]]
    assert result["miou"] == pytest.approx(0.5)


def test_real_maps_are_measured_as_a_plain_count_has_them():
    files = sorted((ADE / "annotations").glob("*.png"))
    if not files:
        pytest.skip("shared/data/ade20k-sample is absent")
    metric, maps = SegmentationMetric(names(150)), []
    for file in files:
        truth = np.asarray(Image.open(file)).astype(np.int64) - 1
        predicted = np.roll(truth, 6, axis=1).clip(0)  # as if each border were off
        metric.update(torch.tensor(predicted), torch.tensor(truth))
        maps.append((predicted.ravel(), truth.ravel()))
    predicted, truth = (np.concatenate(parts) for parts in zip(*maps, strict=True))
    result = metric.compute()
    compare(result, counted(predicted, truth, 150))
    assert 0.5 < result["miou"] < 0.95


def test_what_cannot_be_measured_is_said():
    metric = SegmentationMetric(names(3))
    maps = torch.zeros(2, 2).long()
    with pytest.raises(UsageError, match=r"Predicted labels are \(2, 2\) int64, true ones \(4,\) int64: both must be"):
        metric.update(maps, maps.flatten())
    with pytest.raises(UsageError, match=r"\(2, 2\) float32"):
        metric.update(maps.float(), maps)
    with pytest.raises(UsageError, match=r"Label 3 of a prediction is none of the 3 classes: give 0 … 2\."):
        metric.update(maps + 3, maps)
    with pytest.raises(UsageError, match="Label -1 of a prediction"):
        metric.update(maps - 1, maps - 1)
    with pytest.raises(UsageError, match="Label -2 of a truth is none of the 3 classes: give 0 … 2 or -1, ignored"):
        metric.update(maps, maps - 2)
    with pytest.raises(UsageError, match="0 classes"):
        SegmentationMetric([])
    with pytest.raises(UsageError, match="ignored=2: give at least one class, and a label that is none of theirs"):
        SegmentationMetric(names(3), ignored=2)
