"""The suite of detectors: the published protocol, which number applies, and every reason not to compare (R-CKPT-7, R-DOWN-3)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coco_files import rectangles
from small_detectors import small_detector
from swinscale.cli import main
from swinscale.config import from_dict, to_dict
from swinscale.data.coco import open_coco
from swinscale.detection import detection_config
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.heads.detections import Detections
from swinscale.models import SwinConfig
from swinscale.recipes import RECIPES, Recipe, get_recipe
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.suites import COCO, SUITES, Options
from swinscale.suites import detection as suite
from swinscale.suites.dense import find_entry
from swinscale.suites.detection import PUBLISHED, DetectionProtocol, PublishedDetector, detection_protocol
from swinscale.tasks.detect import Detect
from swinscale.weights.detectors import detector_to_mm

REAL = Path(__file__).parents[2] / "shared" / "data" / "coco"
CPU = Options(device="cpu", published="mine")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def write_run(path: Path, version: int = 1, **changed: Any) -> Detect:
    """A random detector of dogs and cats, as a run writes it."""
    names = ["dog", "cat"]
    preprocessing = {"test_short": 32, "test_long": 64, **IMAGENET, "classes": names, **changed}
    task = Detect(small_detector(version=version, classes=2), names, preprocessing)
    task.save_pretrained(path)
    return task


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return rectangles(tmp_path / "coco", 6)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's detector; "mine" is published with these very settings, with 64 and 96 pixels."""
    task = write_run(tmp_path / "mine")
    data = DetectionDataConfig(test_short=64, test_long=96)
    tested = dataclasses.replace(task.config, score=0.01, limit=1, proposals=(9, 30))
    train = get_recipe("mask_rcnn_swin_tiny_1x").train
    recipe = Recipe("mine", task.backbone.config, tested, data, train)
    monkeypatch.setitem(RECIPES, "mine", lambda: recipe)
    monkeypatch.setattr(suite, "PUBLISHED", [*PUBLISHED, PublishedDetector("mine", "", "a page", {4: (12.5, None)})])
    return tmp_path / "mine"


def small(coco: Path) -> Any:
    """The suite for the images in ``coco``."""
    source = open_coco(coco, "train")
    objects = sum(len(source.annotations[i]) for i in range(len(source)))
    return dataclasses.replace(COCO, images=6, objects=objects, classes=("dog", "cat"), split="train")


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Detectors find the objects, as many in a picture as their settings allow, in boxes that are two pixels too wide.

    Returns: the sizes of the pictures that they were shown.
    """
    shown: list[tuple[int, int]] = []

    def detect(self: Detect, batch: dict[str, Any]) -> list[Detections]:
        shown.extend(tuple(size) for size in batch["size"].tolist())
        found = []
        for truths in batch["annotations"]:
            boxes = torch.tensor([a["bbox"] for a in truths], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            boxes[:, 2] += 2
            labels = torch.tensor([a["label"] for a in truths], dtype=torch.int64)
            all_of_them = Detections(boxes, 0.9 - 0.1 * torch.arange(len(boxes)), labels, torch.ones(len(boxes), 4, 4))
            found.append(all_of_them.take(slice(0, self.config.limit)))
        return found

    monkeypatch.setattr(Detect, "detect", detect)
    return shown


def refused(outcome: Any, *words: str) -> None:
    """Measured, and compared with nothing, for exactly one reason."""
    assert [m.published for m in outcome.measures] == [None, None]
    assert all(0 <= m.ours <= 100 for m in outcome.measures)
    assert outcome.published is None and len(outcome.obstacles) == 1, outcome.obstacles
    for word in words:
        assert word in outcome.obstacles[0]


def test_both_numbers_are_printed_and_written(coco, mine, tmp_path, monkeypatch, capsys):
    """By the command line, with the published settings instead of those of the run."""
    monkeypatch.setitem(SUITES, "coco", small(coco))
    out = tmp_path / "results" / "coco.json"
    arguments = ["eval", "--suite", "coco", "--weights", str(mine), "--data", str(coco), "--device", "cpu"]
    assert main([*arguments, "--published", "mine", "--out", str(out)]) == 0
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["obstacles"] == [] and record["images"] == 6 and record["date"]
    assert record["protocol"].startswith(
        "short side 64, long side at most 96, one view, one picture at a time; 30 regions"
    )
    assert "score from 0.01, NMS at IoU 0.5, at most 1 boxes" in record["protocol"]
    box, mask = record["measures"]["box AP"], record["measures"]["mask AP"]
    assert box["published"] == 12.5 and box["difference"] == pytest.approx(box["ours"] - 12.5)
    assert mask["published"] is None and mask["interval"] is None
    assert record["metrics"]["box_ap"] == pytest.approx(box["ours"] / 100)
    assert record["model"]["task"]["limit"] == 1 and [c["name"] for c in record["per_class"]] == ["dog", "cat"]
    assert "a page, mine, as --published says" in printed and "95 %" not in printed and "12.5" in printed


def test_the_measure_is_that_of_the_published_settings(coco, mine, finds):
    """At the published size, with the published limit: half of the objects where there are two are missed."""
    from swinscale.detection import evaluate_detector

    outcome = small(coco).measure(mine, str(coco), CPU)
    assert len(finds) == 6 and all(min(size) == 64 or max(size) == 96 for size in finds)
    assert outcome.obstacles == () and outcome.measures[0].published == 12.5 and not outcome.measures[0].within
    expected = {
        limit: evaluate_detector(mine, data=str(coco), split="train", device="cpu", limit=limit) for limit in (1, 9)
    }
    assert [m.ours for m in outcome.measures] == [100 * expected[1]["box_ap"], 100 * expected[1]["mask_ap"]]
    assert 20 < outcome.measures[0].ours < 100 * expected[9]["box_ap"] - 10
    assert outcome.details["metrics"]["box_ap50"] == expected[1]["box_ap50"]
    near = dataclasses.replace(outcome.measures[0], published=outcome.measures[0].ours + 0.2)
    assert near.within and not dataclasses.replace(near, published=near.ours - 0.21).within


def test_a_published_file_is_known_by_its_name(coco, tmp_path, finds, monkeypatch):
    """And compared without a word; a name that denies --published is an obstacle, and a run's name says nothing."""
    model = small_detector(classes=2, mask_size=28, anchor_scale=8.0)
    path = tmp_path / "pico-rcnn.pth"
    names = {"meta": {"CLASSES": ("dog", "cat")}}
    torch.save({"state_dict": detector_to_mm(dict(model.state_dict())), **names}, path)
    config, task, _ = detection_config(path)
    recipe = Recipe("pico", config, task, DetectionDataConfig(), get_recipe("mask_rcnn_swin_tiny_1x").train)
    monkeypatch.setitem(RECIPES, "pico", lambda: recipe)
    entry = PublishedDetector("pico", "pico_rcnn", "a page", {4: (50.0, 40.0)})
    monkeypatch.setattr(suite, "PUBLISHED", [*PUBLISHED, entry])
    outcome = small(coco).measure(path, str(coco), Options(device="cpu"))
    assert outcome.obstacles == () and outcome.published == "a page, pico_rcnn, by the name of the weights"
    assert [m.published for m in outcome.measures] == [50.0, 40.0]
    assert all(min(size) == 800 or max(size) == 1333 for size in finds)
    other = Options(device="cpu", published="mask_rcnn_swin_tiny_1x")
    obstacles = small(coco).measure(path, str(coco), other).obstacles
    assert "weights: their name says pico_rcnn, not mask_rcnn_swin_tiny_patch4_window7_1x" in obstacles
    write_run(tmp_path / "pico_rcnn")
    refused(small(coco).measure(tmp_path / "pico_rcnn", str(coco), Options(device="cpu")), "add --published")


def test_no_comparison_with_other_images_or_classes(coco, mine, finds):
    like = small(coco)
    refused(dataclasses.replace(like, images=5).measure(mine, str(coco), CPU), "images: 6 instead of the 5")
    refused(dataclasses.replace(like, objects=1).measure(mine, str(coco), CPU), "objects instead of the 1")
    refused(dataclasses.replace(like, classes=("cat", "dog")).measure(mine, str(coco), CPU), "not in the order")
    refused(dataclasses.replace(like, classes=None).measure(mine, str(coco), CPU), "2 that are not the 80 of COCO's")
    (coco / "train2017" / "3.png").write_bytes(b"no picture")
    outcome = like.measure(mine, str(coco), CPU)
    refused(outcome, "1 of 6 images cannot be read")
    assert outcome.images == 5


def test_no_comparison_with_another_protocol_or_model(coco, mine, finds):
    like = small(coco)
    sized = dataclasses.replace(CPU, img_size=96)
    refused(like.measure(mine, str(coco), sized), "short side 96, long side at most 144; published with 64 and 96")
    assert like.measure(mine, str(coco), sized).protocol.startswith("short side 96, long side at most 144")
    refused(like.measure(mine, str(coco), dataclasses.replace(CPU, batch_size=2)), "batch: 2 pictures")
    wide = dataclasses.replace(CPU, window_size=8)
    refused(like.measure(mine, str(coco), wide), "windows 8×8 8×8 8×8 8×8 instead of 4×4 in every stage of mine")
    refused(like.measure(mine, str(coco), dataclasses.replace(CPU, published=None)), "add --published with one of")
    write_run(mine.parent / "half", mean=[0.5] * 3, std=[0.5] * 3)
    refused(like.measure(mine.parent / "half", str(coco), CPU), "mean (0.5, 0.5, 0.5)", "not ImageNet's")
    write_run(mine.parent / "v2", version=2)
    obstacles = like.measure(mine.parent / "v2", str(coco), CPU).obstacles
    assert "weights: version 2 instead of 1 of mine" in obstacles and all("weights: " in line for line in obstacles)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resize", "232"], "--resize belongs to classifiers"),
        (["--scales", "64,96"], "this suite looks at each picture once"),
        (["--flip"], "this suite looks at each picture once"),
        (["--published", "mask_rcnn_swin_tinny_1x"], "Did you mean 'mask_rcnn_swin_tiny_patch4_window7_1x'"),
    ],
)
def test_mistakes_end_in_one_line(arguments, words, coco, mine, capsys):
    assert (
        main(["eval", "--suite", "coco", "--weights", str(mine), "--data", str(coco), "--split", "train", *arguments])
        == 2
    )
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_classes_and_objects_that_cannot_be_measured(coco, mine, capsys, finds):
    file = coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UsageError, match="no annotated object"):
        small(coco).measure(mine, str(coco), CPU)
    renamed = [{**category, "name": category["name"] + "s"} for category in content["categories"]]
    file.write_text(json.dumps({**content, "categories": renamed}))
    with pytest.raises(UsageError, match=r"has 2 categories, .* knows 2 classes"):
        small(coco).measure(mine, str(coco), CPU)
    assert main(["eval", "--suite", "imagenet", "--weights", str(mine), "--data", str(coco)]) == 2
    assert "is a detector" in capsys.readouterr().err


def test_the_published_table():
    """Every number of SPEC 4.1 to 4.3 that a recipe exists for, as its docstring says it; and each is found by its names."""
    assert len(PUBLISHED) == len({entry.name for entry in PUBLISHED}) == 13
    for entry in PUBLISHED:
        recipe, text = get_recipe(entry.recipe), str(RECIPES[entry.recipe].__doc__)
        assert isinstance(recipe.task, DetectConfig)
        box, mask = entry.numbers[recipe.model.stage_windows[0][0]]
        assert f"{box} box" in text and (mask is None or f"{mask} mask AP" in text), entry
        assert find_entry(entry.name, PUBLISHED) is entry and find_entry(entry.recipe, PUBLISHED) is entry
        assert suite._departures(recipe.model, recipe.task, entry) == []
    assert find_entry("mask-rcnn-swin-tiny-patch4-window7", PUBLISHED).numbers == {7: (46.0, 41.6)}
    assert find_entry("", PUBLISHED) is find_entry("swin_tiny_patch4_window7_224", PUBLISHED) is None
    wider = dataclasses.replace(get_recipe("htc_swinv2_large").model, window_size=48)
    entry = find_entry("htc_swinv2_large", PUBLISHED)
    assert suite._departures(wider, get_recipe("htc_swinv2_large").task, entry) == []
    assert entry.numbers[wider.stage_windows[0][0]] == (58.9, 51.2)


@pytest.mark.parametrize(
    ("task", "version", "expected"),
    [
        (
            {},
            1,
            "800, long side at most 1333, one view, one picture at a time; 1000 regions, score from 0.05, NMS at IoU 0.5",
        ),
        ({"head": "cascade"}, 2, "800, long side at most 1333"),
        ({"head": "htc"}, 1, "800, long side at most 1333"),
        ({"head": "htc", "global_attention": True}, 1, "1400, long side at most 1600"),
        ({"head": "htc", "global_attention": True}, 2, "1100, long side at most 1830"),
    ],
)
def test_the_protocol_of_each_kind(task, version, expected):
    """SPEC 3.6 and 3.9; HTC++ with soft-NMS."""
    protocol = detection_protocol(SwinConfig(version=version), DetectConfig(**task), None)
    assert f"short side {expected}" in str(protocol) and protocol.settings["limit"] == 100
    assert ("linear soft-NMS" in str(protocol)) == ("global_attention" in task)
    assert isinstance(protocol, DetectionProtocol) and set(protocol.settings) <= set(
        to_dict(from_dict(DetectConfig, task))
    )


@pytest.mark.slow
def test_real_photos_are_not_val2017(tmp_path, monkeypatch):
    """A file under a published name, on some of COCO's photos: measured by the suite, and what is missing is said."""
    if not REAL.is_dir():
        pytest.skip("shared/data/coco is absent")
    model = small_detector(classes=80, backbone={"window_size": 7}, mask_size=28)
    path = tmp_path / "mask_rcnn_swin_tiny_patch4_window7.pth"
    torch.save({"state_dict": detector_to_mm(dict(model.state_dict()))}, path)
    outcome = COCO.measure(path, str(REAL), Options(device="cpu", img_size=64))
    assert outcome.images == 49 and [m.published for m in outcome.measures] == [None, None]
    assert "images: 49 instead of the 5,000 of COCO's val2017" in outcome.obstacles
    assert any("embed dim 8 instead of 96 of mask_rcnn_swin_tiny_patch4_window7" in line for line in outcome.obstacles)
