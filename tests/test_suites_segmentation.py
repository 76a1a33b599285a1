"""The suite of segmenters: the published protocol, which number applies, and every reason not to compare (R-CKPT-7, R-DOWN-3)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from random_models import randomise
from segment_files import COLOURS, save
from swinscale.cli import main
from swinscale.data.class_lists import class_list
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import Segmenter
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.recipes import RECIPES, Recipe, get_recipe
from swinscale.recipes.segmentation import SegmentationDataConfig
from swinscale.segmentation import evaluate_segmenter
from swinscale.suites import ADE20K, SUITES, Options
from swinscale.suites import segmentation as suite
from swinscale.suites.dense import find_entry
from swinscale.suites.segmentation import PUBLISHED, RATIOS, PublishedSegmenter, SegmentationProtocol
from swinscale.tasks.segment import Segment
from swinscale.weights.segmenters import segmenter_to_mm

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "ade20k-sample" / "sampleData"
CPU = Options(device="cpu", published="mine")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
NAMES = ("ground", "rectangle", "disc")
FOUR: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "embed_dim": 8,
    "img_size": 64,
    "window_size": 4,
}
SIZES = [(40, 100), (48, 36), (20, 110)]
"""Height and width of the pictures; the last one is so long that its long side decides."""


def small_task(classes: int = 3, names: tuple[str, ...] = NAMES, **fields: Any) -> Segment:
    """A random segmenter of four stages of one block."""
    options = {"channels": 8, "aux_channels": 8, "test_short": 16, "test_long": 32, **fields.pop("options", {})}
    config = SwinConfig(**{**FOUR, "version": 1, "pad": "legacy", "small_map": "pad", "num_classes": 0, **fields})
    model = randomise(Segmenter(SwinTransformer(config), classes, SegmentConfig(**options)))
    labels = {"ignore_index": 255, "reduce_zero_label": True}
    return Segment(model, names, {**IMAGENET, "classes": list(names), "colours": None, "labels": labels})


def write_run(path: Path, preprocessing: dict[str, Any] | None = None, **fields: Any) -> Segment:
    """A random segmenter as a run writes it."""
    task = small_task(**fields)
    task.preprocessing |= preprocessing or {}
    task.save_pretrained(path)
    return task


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    """Pictures laid out and named like ADE20K; 0 in the maps is a pixel without class, 1 the first class."""
    root, random = tmp_path / "ade", np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES, start=1):
        labels = np.ones((height, width), dtype=np.uint8)
        labels[height // 4 : 3 * height // 4, : width // 2] = 2
        labels[:, -width // 4 :] = 3
        pixels = np.array(COLOURS)[labels - 1] + random.integers(-20, 20, (height, width, 3))
        labels[[0, -1]] = 0
        save(root / "images" / "validation" / f"ADE_val_{number:08d}.png", pixels.clip(0, 255).astype(np.uint8))
        save(root / "annotations" / "validation" / f"ADE_val_{number:08d}.png", labels)
    return root


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's segmenter; "mine" is published with its settings, at 32 pixels and, with windows of 8, at 64."""
    task = write_run(tmp_path / "mine")
    publish(
        monkeypatch,
        task,
        PublishedSegmenter("mine", "mine", "a page", 4, {(4, 32): (62.5, 14.0), (8, 64): (13.0, None)}),
    )
    return tmp_path / "mine"


def publish(monkeypatch: pytest.MonkeyPatch, task: Segment, entry: PublishedSegmenter) -> None:
    """Adds a segmenter to the published ones, and its recipe, which tests at 32 pixels."""
    tested = dataclasses.replace(task.config, test_short=32, test_long=128)
    recipe = Recipe(
        entry.recipe, task.backbone.config, tested, SegmentationDataConfig(), get_recipe("upernet_swin_tiny").train
    )
    monkeypatch.setitem(RECIPES, entry.recipe, lambda: recipe)
    monkeypatch.setattr(suite, "PUBLISHED", [*PUBLISHED, entry])


def small(**changed: Any) -> Any:
    """The suite for the images in ``ade``."""
    return dataclasses.replace(ADE20K, **{"images": 3, "classes": NAMES, **changed})


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of what the network is shown."""
    shown: list[tuple[int, int]] = []
    forward = Segmenter.forward

    def see(self: Segmenter, images: Tensor) -> Tensor:
        shown.append((images.shape[-2], images.shape[-1]))
        return forward(self, images)

    monkeypatch.setattr(Segmenter, "forward", see)
    return shown


def refused(outcome: Any, *words: str) -> None:
    """Measured, and compared with nothing, for exactly one reason."""
    assert all(m.published is None and 0 <= m.ours <= 100 for m in outcome.measures)
    assert outcome.published is None and len(outcome.obstacles) == 1, outcome.obstacles
    for word in words:
        assert word in outcome.obstacles[0]


def test_both_numbers_are_printed_and_written(ade, mine, tmp_path, monkeypatch, capsys):
    """By the command line, at the published size instead of that of the run."""
    monkeypatch.setitem(SUITES, "ade20k", small())
    out = tmp_path / "results" / "ade.json"
    arguments = ["eval", "--suite", "ade20k", "--weights", str(mine), "--data", str(ade), "--device", "cpu"]
    assert main([*arguments, "--published", "mine", "--out", str(out)]) == 0
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["obstacles"] == [] and record["images"] == 3 and record["date"]
    assert record["protocol"] == (
        "whole picture, short side 32, long side at most 128, bilinear without antialiasing; one view; fp32"
    )
    miou = record["measures"]["mIoU"]
    assert miou["published"] == 62.5 and miou["difference"] == pytest.approx(miou["ours"] - 62.5)
    assert [record["measures"][name]["published"] for name in ("mAcc", "aAcc")] == [None, None]
    assert record["metrics"]["miou"] == pytest.approx(miou["ours"] / 100) and "confusion" not in record["metrics"]
    assert [row["name"] for row in record["per_class"]] == list(NAMES)
    assert record["model"]["task"]["test_antialias"] is False and len(record["sha256"]) == 64
    assert "a page, mine, as --published says" in printed and "62.5" in printed and "95 %" not in printed
    several = ["--scales", "1.75,0.5,0.75,1,1.25,1.5", "--flip"]
    assert main([*arguments, "--published", "mine", "--out", str(out), *several]) == 0
    record = json.loads(out.read_text())
    assert record["measures"]["mIoU"]["published"] == 14.0 and record["obstacles"] == []
    assert "at 1.75, 0.5, 0.75, 1, 1.25, 1.5 times that size and mirrored, mean of the prob" in record["protocol"]


def test_each_picture_is_seen_whole_at_the_published_sizes(ade, mine, views):
    """SPEC 3.7, 3.9: the short side, less where the long one would be more than four times that; six sizes, each mirrored."""
    outcome = small().measure(mine, str(ade), CPU)
    assert views == [(32, 80), (43, 32), (23, 128)]
    alike = {"short": 32, "test_long": 128, "test_antialias": False, "device": "cpu"}
    expected = evaluate_segmenter(mine, data=str(ade), **alike)
    assert [m.ours / 100 for m in outcome.measures] == [expected["miou"], expected["macc"], expected["aacc"]]
    assert outcome.measures[0].published == 62.5 and not outcome.measures[0].within
    views.clear()
    outcome = small().measure(mine, str(ade), dataclasses.replace(CPU, scales=RATIOS, flip=True))
    assert len(views) == 36 and views[:12:2] == views[1:12:2] == [
        (16, 40),
        (24, 60),
        (32, 80),
        (40, 100),
        (48, 120),
        (56, 140),
    ]
    expected = evaluate_segmenter(mine, data=str(ade), **alike, test_ratios=RATIOS, test_flip=True)
    assert outcome.measures[0].ours == 100 * expected["miou"] and outcome.measures[0].published == 14.0
    near = dataclasses.replace(outcome.measures[0], published=outcome.measures[0].ours + 0.2)
    assert near.within and not dataclasses.replace(near, published=near.ours - 0.21).within


def test_what_is_counted_are_pixels_with_a_class(ade, mine, monkeypatch):
    """The truth with its lower half taken for ground; 0 in the maps counts nowhere, whatever is predicted for it."""

    def lower_half(self: Segment, batch: dict[str, Any]) -> list[Tensor]:
        (height, width), target = batch["size"][0].tolist(), batch["target"].clone()
        target = target[0, :height, :width]
        target[target < 0] = 2
        target[height // 2 :] = 0
        return [target]

    monkeypatch.setattr(Segment, "segment", lower_half)
    found = small().measure(mine, str(ade), CPU).details
    right, truth, predicted = np.zeros(3), np.zeros(3), np.zeros(3)
    for height, width in SIZES:
        labels = np.zeros((height, width), dtype=int)
        labels[height // 4 : 3 * height // 4, : width // 2] = 1
        labels[:, -width // 4 :] = 2
        half = labels.copy()
        half[height // 2 :] = 0
        labels, half = labels[1:-1], half[1:-1]
        for label in range(3):
            right[label] += ((labels == label) & (half == label)).sum()
            truth[label] += (labels == label).sum()
            predicted[label] += (half == label).sum()
    ious = right / (truth + predicted - right)
    assert [row["iou"] for row in found["per_class"]] == pytest.approx(list(ious)) and 0.3 < ious.mean() < 0.9
    assert found["metrics"]["miou"] == pytest.approx(ious.mean())
    assert found["metrics"]["macc"] == pytest.approx((right / truth).mean())


def test_pictures_become_smaller_as_opencv_does_it():
    """At half the size each pixel is the mean of four; with antialiasing its neighbours take part."""
    picture = torch.arange(64.0).reshape(1, 1, 8, 8).square().expand(1, 3, 8, 8)
    views = {}
    for antialias in (False, True):
        task = small_task(options={"test_short": 4, "test_long": 16, "test_antialias": antialias})
        views[antialias] = next(task._views(picture))
    mean = picture.reshape(1, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(views[False], mean)
    assert (views[True] - mean).abs().max() > 1


def test_a_published_file_is_known_by_its_name(ade, tmp_path, monkeypatch):
    """And compared without a word; a name that denies --published is an obstacle, and a run's name says nothing."""
    task = small_task(window_size=7)
    path = tmp_path / "pico-upernet.pth"
    names = {"meta": {"CLASSES": NAMES}}
    torch.save({"state_dict": segmenter_to_mm(dict(task.model.state_dict())), **names}, path)
    publish(monkeypatch, task, PublishedSegmenter("pico_upernet", "pico", "a page", 7, {(7, 32): (50.0, None)}))
    outcome = small().measure(path, str(ade), Options(device="cpu"))
    assert outcome.obstacles == () and outcome.published == "a page, pico_upernet, by the name of the weights"
    assert [m.published for m in outcome.measures] == [50.0, None, None]
    other = Options(device="cpu", published="upernet_swin_tiny")
    obstacles = small().measure(path, str(ade), other).obstacles
    assert "weights: their name says pico_upernet, not upernet_swin_tiny_patch4_window7_512x512" in obstacles
    write_run(tmp_path / "pico_upernet")
    refused(small().measure(tmp_path / "pico_upernet", str(ade), Options(device="cpu")), "add --published with one of")


def test_no_comparison_with_other_images_or_classes(ade, mine):
    refused(small(images=5).measure(mine, str(ade), CPU), "images: 3 instead of the 5 of ADE20K's validation set")
    refused(small(stem="val_").measure(mine, str(ade), CPU), "not called val_00000001 to val_00000003")
    refused(small(classes=("rectangle", "ground", "disc")).measure(mine, str(ade), CPU), "classes: not in the order")
    refused(small(classes=None).measure(mine, str(ade), CPU), "classes: 3 that are not the 150 of ADE20K's")
    assert small(classes=("gro", "rect", "disc")).measure(mine, str(ade), CPU).obstacles == ()  # a name may say more
    (ade / "images" / "validation" / "ADE_val_00000002.png").write_bytes(b"no picture")
    outcome = small().measure(mine, str(ade), CPU)
    refused(outcome, "1 of 3 images cannot be read")
    assert outcome.images == 2


def test_no_comparison_with_another_protocol(ade, mine):
    like, change = small(), dataclasses.replace
    refused(
        like.measure(mine, str(ade), change(CPU, img_size=48)),
        "short side 48, long side at most 192; published with 32 and 128 with windows of 4×4",
    )
    refused(
        like.measure(mine, str(ade), change(CPU, flip=True)), "views: at 1 times that size and mirrored", "--scales"
    )
    refused(
        like.measure(mine, str(ade), change(CPU, scales=RATIOS)), "published in one view, or with --scales 0.5,0.75"
    )
    refused(like.measure(mine, str(ade), change(CPU, scales=(1.0, 1.5), flip=True)), "views: at 1, 1.5 times that size")
    assert like.measure(mine, str(ade), change(CPU, batch_size=2)).obstacles == ()


def test_no_comparison_with_another_model(ade, mine, monkeypatch):
    like, folder = small(), mine.parent
    refused(like.measure(mine, str(ade), dataclasses.replace(CPU, published=None)), "add --published with one of")
    wide = dataclasses.replace(CPU, window_size=2)
    refused(like.measure(mine, str(ade), wide), "windows 2×2 2×2 2×2 2×2 instead of 4×4 or 8×8 in every stage of mine")
    for name, fields, words in (
        ("exact", {"pad": "exact"}, "pad exact instead of legacy of mine"),
        ("shrink", {"small_map": "shrink", "img_size": 128}, "small map shrink instead of pad of mine"),
        ("deep", {"depths": (1, 1, 2, 1)}, "depths 1 1 2 1 instead of 1 1 1 1 of mine"),
        ("narrow", {"options": {"channels": 4}}, "channels 4 instead of 8 of mine"),
        ("pools", {"options": {"pool_scales": (1, 2)}}, "pool scales 1 2 instead of 1 2 3 6 of mine"),
    ):
        write_run(folder / name, **fields)
        refused(like.measure(folder / name, str(ade), CPU), f"weights: {words}")
    write_run(folder / "auxiliary", options={"aux_channels": 4})
    assert like.measure(folder / "auxiliary", str(ade), CPU).obstacles == ()
    write_run(folder / "half", {"mean": [0.5] * 3, "std": [0.5] * 3})
    refused(like.measure(folder / "half", str(ade), CPU), "mean (0.5, 0.5, 0.5)", "not ImageNet's")


def test_windows_that_grew_after_training_are_compared_where_that_was_published(ade, mine, views):
    """As the giant one: trained with one window, measured with another at a larger size; not the other way round."""
    grown = dataclasses.replace(CPU, window_size=8, img_size=64)
    outcome = small().measure(mine, str(ade), grown)
    assert outcome.obstacles == () and outcome.measures[0].published == 13.0 and (64, 160) in views
    refused(
        small().measure(mine, str(ade), dataclasses.replace(CPU, window_size=8)),
        "published with 64 and 256 with windows",
    )
    several = dataclasses.replace(grown, scales=RATIOS, flip=True)
    refused(small().measure(mine, str(ade), several), "no number for several scales", "13 is published for one view")
    write_run(mine.parent / "eight", window_size=8)
    sized = dataclasses.replace(CPU, img_size=64)
    refused(
        small().measure(mine.parent / "eight", str(ade), sized),
        "weights: trained with windows 8×8 8×8 8×8 8×8 instead of 4×4 in every stage of mine",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resize", "232"], "--resize belongs to classifiers"),
        (["--slide", "64"], "--slide: a suite looks at whole pictures"),
        (["--published", "upernet_swin_tinny"], "Did you mean 'upernet_swin"),
        (["--split", "test"], "test"),
    ],
)
def test_mistakes_end_in_one_line(arguments, words, ade, mine, capsys):
    assert main(["eval", "--suite", "ade20k", "--weights", str(mine), "--data", str(ade), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_labels_and_pictures_that_cannot_be_measured(ade, mine, capsys):
    path = ade / "annotations" / "validation" / "ADE_val_00000003.png"
    kept = path.read_bytes()
    save(path, np.full(SIZES[2], 4, dtype=np.uint8))
    with pytest.raises(UsageError, match="ADE_val_00000003"):
        small().measure(mine, str(ade), CPU)
    path.write_bytes(kept)
    (ade / "images" / "validation" / "ADE_val_00000003.png").write_bytes(b"no picture")
    for number, size in enumerate(SIZES[:2], start=1):
        save(path.with_name(f"ADE_val_{number:08d}.png"), np.zeros(size, dtype=np.uint8))
    with pytest.raises(UsageError, match="no pixel with a class in the images that can be read"):
        small().measure(mine, str(ade), CPU)
    assert main(["eval", "--suite", "imagenet", "--weights", str(mine), "--data", str(ade)]) == 2
    assert "is a segmenter" in capsys.readouterr().err
    for name in ("imagenet", "coco"):
        assert main(["eval", "--suite", name, "--weights", str(mine), "--data", str(ade), "--flip"]) == 2
        assert "this suite looks at each picture once" in capsys.readouterr().err


def test_the_published_table():
    """Every number of SPEC 4.2 and 4.3 that a recipe exists for, as its docstring says it; and each is found by its names."""
    assert len(PUBLISHED) == len({entry.name for entry in PUBLISHED}) == 10
    for entry in PUBLISHED:
        recipe, text = get_recipe(entry.recipe), str(RECIPES[entry.recipe].__doc__)
        assert isinstance(recipe.task, SegmentConfig) and recipe.task.test_long == 4 * recipe.task.test_short
        assert (entry.window, recipe.task.test_short) in entry.numbers
        assert find_entry(entry.name, PUBLISHED) is entry
        assert find_entry(entry.recipe, PUBLISHED).recipe == entry.recipe
        for (side, _), numbers in entry.numbers.items():
            assert all(number is None or str(number) in text for number in numbers), entry
            model = dataclasses.replace(recipe.model, window_size=side)
            trained = dataclasses.replace(recipe.model, window_size=entry.window)
            assert suite._departures(trained, model, recipe.task, entry) == []
    assert find_entry("upernet-swin-tiny-patch4-window7-512x512", PUBLISHED).numbers == {(7, 512): (44.51, 45.81)}
    assert find_entry("upernet_swinv2_tiny", PUBLISHED).window == 16
    assert find_entry("swin_tiny_patch4_window7_224", PUBLISHED) is find_entry("", PUBLISHED) is None


@pytest.mark.parametrize(
    ("name", "window", "short", "several", "expected"),
    [
        ("upernet_swin_base_640", 7, 640, False, 50.04),
        ("upernet_swin_base_640", 7, 640, True, 51.66),
        ("upernet_swinv2_tiny", 16, 512, True, "47 is published for one view"),
        ("upernet_swinv2_large_640", 40, 640, True, 55.9),
        ("upernet_swinv2_large_640", 40, 640, False, "55.9 is published for several scales (--scales 0.5,0.75"),
        ("upernet_swinv2_giant_640", 40, 640, False, 59.1),
        ("upernet_swinv2_giant_640", 56, 896, False, 59.3),
        ("upernet_swinv2_giant_640", 56, 896, True, "59.9 at several scales is published without the size"),
        ("upernet_swinv2_giant_640", 56, 640, False, "published with 896 and 3584 with windows of 56×56"),
    ],
)
def test_which_number_applies(name, window, short, several, expected):
    protocol = SegmentationProtocol(short, RATIOS if several else (1.0,), several)
    number, obstacles = suite._number(find_entry(name, PUBLISHED), window, protocol)
    if isinstance(expected, str):
        assert number is None and len(obstacles) == 1 and expected in obstacles[0]
    else:
        assert number == expected and obstacles == []


@pytest.mark.filterwarnings("ignore:.*the name says 'tiny'")
def test_real_photos_are_not_the_whole_set(tmp_path, monkeypatch):
    """A file under a published name, on three photos of ADE20K: measured by the suite, and what is missing is said."""
    if not SAMPLE.is_dir():
        pytest.skip("shared/data/ade20k-sample is absent")
    for kind in ("images", "annotations"):
        shutil.copytree(SAMPLE / kind, tmp_path / "ade" / kind / "validation")
    path = tmp_path / "upernet_swin_tiny_patch4_window7_512x512.pth"
    names = (*class_list("ade20k").names[:89], "television receiver", *class_list("ade20k").names[90:])
    task = small_task(150, names, window_size=7)
    meta = {"CLASSES": [f"{name} " for name in names]}
    torch.save({"state_dict": segmenter_to_mm(dict(task.model.state_dict())), "meta": meta}, path)
    how = Options(device="cpu", img_size=64)
    outcome = ADE20K.measure(path, str(tmp_path / "ade"), how)
    assert outcome.images == 3 and all(m.published is None for m in outcome.measures)
    assert "images: 3 instead of the 2,000 of ADE20K's validation set" in outcome.obstacles
    assert not any(line.startswith("classes") for line in outcome.obstacles)
    assert any("embed dim 8 instead of 96 of upernet_swin_tiny_patch4" in line for line in outcome.obstacles)
    alike = dataclasses.replace(ADE20K, images=3)
    monkeypatch.setattr(Segment, "segment", lambda self, batch: [batch["target"][0].clamp(min=0)])
    outcome = alike.measure(path, str(tmp_path / "ade"), how)
    assert not any(line.startswith("images") for line in outcome.obstacles)
    assert [m.ours for m in outcome.measures] == [100, 100, 100]
