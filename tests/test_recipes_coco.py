"""Recipes of detection: published hyper-parameters (SPEC 3.4–3.6), published sizes (SPEC 4.1, 4.2), and V2's position bias at the
larger windows that detectors have (R-DOWN-5)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coco_files import rectangles
from random_models import random_swin
from swinscale.cli import _options, _recipe, main
from swinscale.config import override, to_dict
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.optim import Schedule
from swinscale.recipes import RECIPES, Recipe, build, coco, get_recipe
from swinscale.recipes.base import recipe_from_dict
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.recipes.parts import dense_model
from swinscale.tasks.detect import Detect
from swinscale.train import TrainConfig
from swinscale.weights import save_pretrained

NAMES = sorted(name for name, function in RECIPES.items() if function.__module__ == coco.__name__)
PUBLISHED = [name for name in NAMES if not name.startswith("desk_")]
IMAGES = 118_287  # of COCO's training set

# Backbone, drop path, window, epochs and the epochs of the drops, as published.
RCNN: dict[str, tuple[str, float, int, int, tuple[int, int]]] = {
    "mask_rcnn_swin_tiny_1x": ("swin_tiny_patch4_window7_224", 0.1, 7, 12, (8, 11)),
    "mask_rcnn_swin_tiny_3x": ("swin_tiny_patch4_window7_224", 0.2, 7, 36, (27, 33)),
    "mask_rcnn_swin_small_3x": ("swin_small_patch4_window7_224", 0.2, 7, 36, (27, 33)),
    "mask_rcnn_swinv2_tiny": ("swinv2_tiny_window8_256", 0.2, 16, 36, (27, 33)),
    "cascade_swin_tiny_1x": ("swin_tiny_patch4_window7_224", 0.0, 7, 12, (8, 11)),
    "cascade_swin_tiny_3x": ("swin_tiny_patch4_window7_224", 0.2, 7, 36, (27, 33)),
    "cascade_swin_small_3x": ("swin_small_patch4_window7_224", 0.2, 7, 36, (27, 33)),
    "cascade_swin_base_3x": ("swin_base_patch4_window7_224", 0.3, 7, 36, (27, 33)),
    "cascade_swinv2_tiny_window16": ("swinv2_tiny_window8_256", 0.2, 16, 36, (27, 33)),
    "cascade_swinv2_tiny_window32": ("swinv2_tiny_window8_256", 0.2, 32, 36, (27, 33)),
    "cascade_swinv2_small_window16": ("swinv2_small_window8_256", 0.2, 16, 36, (27, 33)),
    "cascade_swinv2_base_window16": ("swinv2_base_window8_256", 0.2, 16, 36, (27, 33)),
}
HTC: dict[str, tuple[str, float, int, int, tuple[int, int]]] = {
    "htc_swin_base_6x": ("swin_base_patch4_window7_224", 0.2, 7, 72, (63, 69)),
    "htc_swin_large_3x": ("swin_large_patch4_window7_224", 0.2, 7, 36, (27, 33)),
    "htc_swinv2_large": ("swinv2_large_window12_192", 0.2, 32, 36, (27, 33)),
}
MASK_RCNN_TASK: dict[str, Any] = {
    "head": "mask_rcnn", "masks": True, "channels": 256, "fc_channels": 1024, "class_agnostic": False, "box_loss": "l1",
    "anchor_scale": 8, "anchor_ratios": (0.5, 1, 2), "anchors_inside": False, "rpn_box_loss": "l1", "proposals": (1000, 1000),
    "proposals_per_level": (2000, 1000), "regions": 512, "mask_size": 28, "score": 0.05, "limit": 100, "nms_iou": 0.5,
    "soft_nms": "none", "frozen_stages": 0, "test_short": (), "test_flip": False, "semantic": False, "global_attention": False,
}  # fmt: skip
CASCADE_TASK = MASK_RCNN_TASK | {
    "head": "cascade", "box_loss": "giou", "anchors_inside": True, "rpn_box_loss": "smooth_l1", "proposals": (2000, 1000),
}  # fmt: skip
HTC_TASK = CASCADE_TASK | {
    "head": "htc", "box_loss": "smooth_l1", "class_agnostic": True, "semantic": True, "global_attention": True,
    "soft_nms": "linear", "score": 0.001,
}  # fmt: skip


def fields(value: Any, names: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


@pytest.mark.parametrize("name", [*RCNN, *HTC])
def test_published_hyper_parameters(name: str):
    """AdamW, 500 steps of warm-up from a thousandth, a tenth after each milestone, no clipping (SPEC 3.5, 3.6)."""
    recipe = get_recipe(name)
    model, drop_path, window, epochs, milestones = (RCNN | HTC)[name]
    expected = model_config(model)
    assert fields(recipe.model, ("version", "embed_dim", "depths", "num_heads")) == fields(
        expected, ("version", "embed_dim", "depths", "num_heads")
    )
    assert recipe.model.drop_path_rate == drop_path and set(recipe.model.stage_windows) == {(window, window)}
    assert recipe.model.small_map == "pad" and recipe.model.num_classes == 0
    assert recipe.model.pad == ("legacy" if recipe.model.version == 1 else "exact")
    task = {"mask_rcnn": MASK_RCNN_TASK, "cascade": CASCADE_TASK, "htc": HTC_TASK}[name.split("_swin")[0]]
    assert fields(recipe.task, task) == task
    large = name == "htc_swinv2_large"
    batch, rate = (64, 4e-4) if large else (16, 1e-4)
    train = recipe.train
    assert (train.epochs, train.batch_size, train.optim.weight_decay, train.optim.clip_grad) == (epochs, batch, 0.05, 0)
    assert train.optim.betas == (0.9, 0.999) and train.optim.backbone_lr == (0.1 if large else 1)
    steps = IMAGES // batch
    schedule = Schedule(train.optim, batch, steps, epochs * steps)
    rates = [
        schedule.lr(step)
        for step in (0, 250, 500, milestones[0] * steps - 1, milestones[0] * steps, epochs * steps - 1)
    ]
    assert rates == pytest.approx([rate / 1000, rate * 0.5005, rate, rate, rate / 10, rate / 100])
    assert schedule.lr(499) < rate and schedule.lr(milestones[1] * steps - 1) == pytest.approx(rate / 10)


@pytest.mark.parametrize("name", RCNN)
def test_published_sizes_of_images(name: str):
    data = get_recipe(name).data
    ablation = name.startswith("cascade_swinv2")
    assert data.augment == ("multiscale" if ablation else "crop")
    assert data.short == tuple(range(480, 801, 32)) and data.long == 1333
    assert (data.test_short, data.test_long) == (800, 1333)
    assert ablation or data.crop == (384, 600)
    assert data.paste == 0


def test_published_sizes_of_images_of_htc():
    """InstaBoost, short sides 400 to 1400 for V1; crops of 1536 at scales 0.1 to 2 for V2 (SPEC 3.5, 8)."""
    for name in ("htc_swin_base_6x", "htc_swin_large_3x"):
        data = get_recipe(name).data
        assert (data.augment, data.paste, min(data.short), max(data.short), data.long) == (
            "multiscale",
            0.5,
            400,
            1400,
            1600,
        )
        assert (data.test_short, data.test_long) == (1400, 1600)
    for name in ("htc_swinv2_large", "htc_swinv2_giant"):
        data = get_recipe(name).data
        assert (data.augment, data.jitter_size, data.jitter, data.paste) == (
            "large-scale-jitter",
            (1536, 1536),
            (0.1, 2),
            0.5,
        )
        assert data.test_short == 1100


@pytest.mark.parametrize(
    ("name", "images", "steps", "rate"),
    [("htc_swinv2_giant_objects365", 1_742_289, 67_500, 1.2e-3), ("htc_swinv2_giant", IMAGES, 45_000, 6e-4)],
)
def test_published_steps_of_swin_v2_g(name: str, images: int, steps: int, rate: float):
    """SPEC 3.4: batches of 96; the first data set teaches boxes alone."""
    recipe = get_recipe(name)
    train, epoch = recipe.train, images // 96
    assert train.batch_size == 96 and round(train.epochs * epoch) == pytest.approx(steps, rel=2e-4)
    assert Schedule(train.optim, 96, epoch, steps).lr(501) == pytest.approx(rate)
    assert (train.optim.weight_decay, train.optim.clip_grad) == (0.05, 0)
    assert set(recipe.model.stage_windows) == {(32, 32)} and recipe.model.embed_dim == 512
    boxes_alone = name.endswith("365")
    assert (recipe.task.masks, recipe.task.semantic) == (not boxes_alone,) * 2 and recipe.task.soft_nms == "linear"
    if boxes_alone:
        assert (min(recipe.data.short), max(recipe.data.short)) == (800, 1024) and recipe.data.augment == "multiscale"


def on_meta(recipe: Recipe, classes: int = 80) -> Detect:
    with torch.device("meta"):
        return Detect(Detector(SwinTransformer(recipe.model), classes, recipe.task), [str(c) for c in range(classes)])


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds_without_memory_and_is_what_its_record_says(name: str):
    recipe = get_recipe(name)
    again = recipe_from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe and isinstance(again.data, DetectionDataConfig) and isinstance(again.task, DetectConfig)
    task = on_meta(recipe, 5)
    assert task.model.rpn.strides == (4, 8, 16, 32, 64) and millions(task) > 0.3
    assert len(task.backbone.layers) == 4


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mask_rcnn_swin_tiny_3x", 48), ("mask_rcnn_swin_small_3x", 69), ("cascade_swin_tiny_3x", 86),
        ("cascade_swin_small_3x", 107), ("cascade_swin_base_3x", 145), ("htc_swin_base_6x", 160), ("htc_swin_large_3x", 284),
    ],
)  # fmt: skip
def test_detectors_have_the_published_number_of_parameters(name: str, published: int):
    """In millions. Whether HTC's semantic map has the 183 classes of COCO-stuff makes a difference of 26 thousand."""
    recipe = get_recipe(name)
    assert round(millions(on_meta(recipe))) == published
    if recipe.task.semantic:
        stuff = dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, semantic_classes=183))
        assert millions(on_meta(stuff)) - millions(on_meta(recipe)) == pytest.approx(0.026, abs=0.001)
        assert round(millions(on_meta(stuff))) == published


def test_show_prints_what_a_detector_is(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "cascade_swin_tiny_3x", "--data", "somewhere"]) == 0
    out = capsys.readouterr().out
    assert "with pyramid and heads for 80 classes 85,6" in out
    assert 'task.head = "cascade"' in out and 'task.box_loss = "giou"' in out and "train.optim.lr = 0.0001" in out
    assert main(["list", "recipes", "cascade*"]) == 0
    assert "48.1 box, 41.7 mask AP" in " ".join(capsys.readouterr().out.split())


def test_another_model_stays_a_detectors_backbone():
    """``--model`` keeps what detection needs of a backbone: windows that never shrink, padding as the version wants it."""
    arguments = [
        "show",
        "mask_rcnn_swin_tiny_1x",
        "--model",
        "swinv2_small_window8_256",
        "--data",
        "x",
        "train.epochs=1",
    ]
    recipe = _recipe(_options(arguments))
    assert recipe.model == dense_model("swinv2_small_window8_256", 0.1)
    assert (recipe.model.small_map, recipe.model.pad, recipe.model.num_classes) == ("pad", "exact", 0)
    assert recipe.model.drop_path_rate == 0.1 and recipe.train.epochs == 1
    other = _recipe(_options(["show", "mask_rcnn_swinv2_tiny", "--model", "swin_small_patch4_window7_224"]))
    assert (other.model.small_map, other.model.pad) == ("pad", "legacy")


TINY = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "embed_dim": 8}
NARROW = DetectConfig(channels=16, fc_channels=32, regions=16, proposals=(30, 30), proposals_per_level=(40, 40))


def tiny_recipe(tmp_path: Path, model: SwinConfig, init: Path | None = None, **task: Any) -> Recipe:
    data = DetectionDataConfig(str(rectangles(tmp_path / "coco", 4)), limit=4)
    model = dataclasses.replace(model, **TINY)
    init_place = str(init) if init else None
    return Recipe("tiny", model, dataclasses.replace(NARROW, **task), data, TrainConfig(batch_size=2), init_place)


def biases(model: SwinTransformer) -> list[torch.Tensor]:
    """For each stage (A, 2 · height - 1, 2 · width - 1): the bias of every offset in its windows."""
    found = []
    for stage, layer in enumerate(model.layers):
        height, width = model.config.stage_windows[stage]
        values = layer.blocks[0].attn.bias((height, width)).values
        found.append(values.detach().unflatten(1, (2 * height - 1, 2 * width - 1)))
    return found


@pytest.mark.parametrize("img_size", [512, 1024])
@pytest.mark.parametrize(("size", "window", "larger"), [(256, 8, 16), (192, 12, 32)])
def test_a_larger_window_keeps_the_bias_of_every_offset(
    tmp_path: Path, size: int, window: int, larger: int, img_size: int
):
    """R-DOWN-5: through ``--init``; also the last stage, whose window was as small as its map when the weights were trained."""
    trained = random_swin(version=2, img_size=size, window_size=window, **TINY)
    save_pretrained(trained, tmp_path / "trained")
    name = {8: "swinv2_tiny_window8_256", 12: "swinv2_large_window12_192"}[window]
    recipe = tiny_recipe(tmp_path, dense_model(name, 0.2, larger, img_size), tmp_path / "trained")
    built = build(recipe)
    assert set(built.recipe.model.stage_windows) == {(larger, larger)}
    old, new = biases(trained), biases(built.task.backbone)
    assert [len(b[0]) for b in old] == [2 * window - 1] * 3 + [2 * min(window, size // 32) - 1]
    for before, after in zip(old, new, strict=True):
        edge = (after.shape[1] - before.shape[1]) // 2
        assert edge > 0
        kept = after[:, edge:-edge, edge:-edge]
        assert (kept - before).abs().max() <= 1e-6
        assert (after[:, :edge] - before[:, :1].mean()).abs().max() > 1e-3  # and those beyond go on
    assert built.loaded is not None and not built.loaded.mismatched
    forgotten = dataclasses.replace(built.recipe.model, pretrained_window_sizes=0, past_windows=())
    without = biases(_loaded(forgotten, built.task.backbone))
    edge = (without[0].shape[1] - old[0].shape[1]) // 2
    assert (without[0][:, edge:-edge, edge:-edge] - old[0]).abs().max() > 1e-3  # so it is not kept by itself


def _loaded(config: SwinConfig, like: SwinTransformer) -> SwinTransformer:
    model = SwinTransformer(dataclasses.replace(config, num_classes=0))
    model.load_state_dict(like.state_dict(), strict=False)
    return model.eval()


def test_a_larger_window_is_recorded_and_survives_a_second_start(tmp_path: Path):
    """A run that starts from a detector's weights keeps the window of the first training, too."""
    trained = random_swin(version=2, img_size=256, window_size=8, **TINY)
    save_pretrained(trained, tmp_path / "trained")
    first = build(tiny_recipe(tmp_path, dense_model("swinv2_tiny_window8_256", 0.2, 16), tmp_path / "trained"))
    first.task.save_pretrained(tmp_path / "detector")
    assert set(first.recipe.model.pretrained_window_sizes) == {(8, 8)}
    again = tiny_recipe(tmp_path / "again", dense_model("swinv2_tiny_window8_256", 0.2, 32), tmp_path / "detector")
    second = build(again)
    assert set(second.recipe.model.pretrained_window_sizes) == {(8, 8)}
    for before, after in zip(biases(trained), biases(second.task.backbone), strict=True):
        edge = (after.shape[1] - before.shape[1]) // 2
        assert (after[:, edge:-edge, edge:-edge] - before).abs().max() <= 1e-6
    assert torch.equal(first.task.model.rpn.head.conv[0][0].weight, second.task.model.rpn.head.conv[0][0].weight)


def test_a_first_version_starts_from_a_classifier(tmp_path: Path):
    """The published way: ImageNet weights into the backbone, all else fresh; the stage norms are the detector's own."""
    trained = random_swin(version=1, img_size=224, window_size=7, **TINY)
    save_pretrained(trained, tmp_path / "trained")
    built = build(tiny_recipe(tmp_path, dense_model("swin_tiny_patch4_window7_224", 0.2), tmp_path / "trained"))
    inside, before = built.task.backbone.state_dict(), trained.state_dict()
    assert inside.keys() == {name for name in before if not name.startswith("head.")}
    assert all(torch.equal(inside[name], before[name]) for name in inside)
    assert (built.task.model.body.norms["0"].weight == 1).all()
    assert built.task.classes == ["dog", "cat"]  # in the order of the ids of the categories


def test_settings_of_a_recipe_can_be_changed_by_name(tmp_path: Path):
    recipe = override(
        get_recipe("htc_swin_large_3x"), "task.test_short=(600,800)", "task.test_long=3000", "task.test_flip=true",
        "task.test_ranges=((96,10000),(0,10000))", "data.short=(400,500)", "train.batch_size=8",
    )  # fmt: skip
    assert recipe.task.test_short == (600, 800) and recipe.task.test_flip
    assert recipe.task.test_ranges == ((96, 10000), (0, 10000))
    assert recipe.data.short == (400, 500) and recipe.train.batch_size == 8
    again = recipe_from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe
