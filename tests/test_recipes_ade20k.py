"""Recipes of semantic segmentation: published hyper-parameters (SPEC 3.4, 3.5, 3.7), and the weights that they start from (R-DOWN-5)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from random_models import random_swin, randomise
from segment_files import CLASSES, shapes
from small_segmenters import NARROW, small_segmenter
from swinscale.cli import _options, _recipe, main
from swinscale.config import override, to_dict
from swinscale.heads.config import SegmentConfig
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.optim import Schedule
from swinscale.recipes import RECIPES, Recipe, ade20k, build, get_recipe
from swinscale.recipes.base import recipe_from_dict
from swinscale.recipes.parts import dense_model
from swinscale.recipes.segmentation import SegmentationDataConfig
from swinscale.tasks import SimMIM, SimMIMConfig
from swinscale.tasks.segment import Segment
from swinscale.train import TrainConfig
from swinscale.weights import save_pretrained

NAMES = sorted(name for name, function in RECIPES.items() if function.__module__ == ade20k.__name__)
IMAGES = 20_210  # of ADE20K's training set

# Backbone, window, side, drop path, steps, batch, rate, steps of warm-up, weight decay, layer decay: as published.
PUBLISHED: dict[str, tuple[str, int, int, float, int, int, float, int, float, float]] = {
    "upernet_swin_tiny": ("swin_tiny_patch4_window7_224", 7, 512, 0.3, 160_000, 16, 6e-5, 1500, 0.01, 1.0),
    "upernet_swin_small": ("swin_small_patch4_window7_224", 7, 512, 0.3, 160_000, 16, 6e-5, 1500, 0.01, 1.0),
    "upernet_swin_base": ("swin_base_patch4_window7_224", 7, 512, 0.3, 160_000, 16, 6e-5, 1500, 0.01, 1.0),
    "upernet_swin_base_640": ("swin_base_patch4_window7_224", 7, 640, 0.3, 160_000, 16, 6e-5, 1500, 0.01, 1.0),
    "upernet_swin_large_640": ("swin_large_patch4_window7_224", 7, 640, 0.3, 160_000, 16, 6e-5, 1500, 0.01, 1.0),
    "upernet_swinv2_tiny": ("swinv2_tiny_window8_256", 16, 512, 0.3, 160_000, 16, 4e-5, 1500, 0.05, 0.95),
    "upernet_swinv2_small": ("swinv2_small_window8_256", 16, 512, 0.3, 160_000, 16, 4e-5, 1500, 0.05, 0.95),
    "upernet_swinv2_base": ("swinv2_base_window8_256", 16, 512, 0.3, 160_000, 16, 4e-5, 1500, 0.05, 0.95),
    "upernet_swinv2_base_640": ("swinv2_base_window12_192", 40, 640, 0.3, 40_000, 64, 6e-5, 375, 0.05, 1.0),
    "upernet_swinv2_large_640": ("swinv2_large_window12_192", 40, 640, 0.3, 40_000, 64, 6e-5, 375, 0.05, 1.0),
    "upernet_swinv2_giant_640": ("swinv2_giant_window12_192", 40, 640, 0.4, 80_000, 32, 4e-5, 750, 0.05, 1.0),
}
HEADS: dict[str, Any] = {
    "channels": 512, "pool_scales": (1, 2, 3, 6), "dropout": 0.1, "aux_channels": 256, "aux_stage": 2, "aux_weight": 0.4,
    "class_weights": (), "frozen_stages": 0, "test_ratios": (1.0,), "test_flip": False, "test_crop": 0,
}  # fmt: skip
DATA: dict[str, Any] = {
    "classes": "ade20k", "ignore_index": 255, "reduce_zero_label": True, "augment": "published", "ratio": (0.5, 2.0),
    "max_share": 0.75, "mean": None, "std": None, "limit": 0, "eval_limit": 0,
}  # fmt: skip


def fields(value: Any, names: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def test_every_recipe_is_in_the_table():
    assert sorted(PUBLISHED) == NAMES


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyper_parameters(name: str):
    model, window, side, drop_path, steps, batch, rate, warmup, decay, layer_decay = PUBLISHED[name]
    recipe = get_recipe(name)
    assert isinstance(recipe.data, SegmentationDataConfig)
    size = ("version", "embed_dim", "depths", "num_heads")
    assert fields(recipe.model, size) == fields(model_config(model), size)
    assert recipe.model.drop_path_rate == drop_path and set(recipe.model.stage_windows) == {(window, window)}
    assert (recipe.model.small_map, recipe.model.num_classes, recipe.model.img_size) == ("pad", 0, (side, side))
    assert recipe.model.pad == ("legacy" if recipe.model.version == 1 else "exact")
    assert fields(recipe.task, HEADS) == HEADS and fields(recipe.data, DATA) == DATA
    assert (recipe.data.crop, recipe.data.short, recipe.data.long) == ((side, side), side, 4 * side)
    assert (recipe.task.test_short, recipe.task.test_long) == (side, 4 * side)
    train, epoch = recipe.train, IMAGES // batch
    assert train.batch_size == batch and round(train.epochs * epoch) == steps
    assert (train.optim.weight_decay, train.optim.layer_decay, train.optim.clip_grad) == (decay, layer_decay, 0)
    assert train.optim.betas == (0.9, 0.999) and train.ema_decay == 0
    schedule = Schedule(train.optim, batch, epoch, steps)
    half = steps // 2
    rates = [schedule.lr(step) for step in (0, warmup // 2, half, steps)]
    assert rates == pytest.approx([rate * 1e-6, rate * (warmup // 2) / warmup, rate / 2, 0], rel=1e-5, abs=1e-9 * rate)
    assert schedule.lr(warmup) == pytest.approx(rate * (1 - warmup / steps))  # the line starts at the first step
    again = recipe_from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe


def test_another_model_stays_a_segmenters_backbone():
    arguments = ["show", "upernet_swin_tiny", "--model", "swinv2_small_window8_256", "--data", "x", "train.epochs=1"]
    recipe = _recipe(_options(arguments))
    assert recipe.model == dense_model("swinv2_small_window8_256", 0.3, img_size=512)
    assert isinstance(recipe.task, SegmentConfig) and recipe.train.epochs == 1


def test_settings_of_a_recipe_can_be_changed_by_name():
    recipe = override(
        get_recipe("upernet_swin_tiny"), "task.test_ratios=(0.5,1.0)", "task.test_flip=true", "data.classes=7",
        "task.class_weights=(1,2)", "data.crop=(300,400)", "model.window_size=12",
    )  # fmt: skip
    assert recipe.task.test_ratios == (0.5, 1.0) and recipe.data.classes == 7 and recipe.data.crop == (300, 400)
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_show_says_what_a_segmenter_is(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "upernet_swin_tiny", "--data", "somewhere"]) == 0
    out = capsys.readouterr().out
    assert "with pyramid and heads for 150 classes 59,94" in out and "task.channels = 512" in out
    assert "data.reduce_zero_label = true" in out and "learning rate 6e-05" in out


@pytest.mark.slow
def test_show_predicts_the_memory_of_swin_v2_g(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "upernet_swinv2_giant_640", "--gpus", "8", "--card", "80GB", "--data", "somewhere"]) == 0
    out = capsys.readouterr().out
    assert "4 × 1 images per GPU" in out and "for 150 classes" in out and "80GB: this recipe" in out
    assert "images of" not in out  # every input has the size of the crop
    rows = {cells[0]: cells for line in out.splitlines() if (cells := [c.strip() for c in line.split("│")[1:-1]])}
    own, plain = rows["this recipe"], rows["no technique"]
    assert float(plain[1]) == pytest.approx(4 * 3.05, rel=0.03)  # GB of three billion parameters in fp32
    assert float(own[8]) < float(plain[8])


TINY = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "embed_dim": 8}


def tiny_recipe(tmp_path: Path, model: SwinConfig, init: Path | None = None, classes: str = CLASSES) -> Recipe:
    folder = shapes(tmp_path / "data", {"training": 2, "validation": 1})
    (folder / "classes.txt").write_text(classes)
    data = SegmentationDataConfig(str(folder), crop=(64, 64))
    model = dataclasses.replace(model, **TINY)
    return Recipe("tiny", model, SegmentConfig(**NARROW), data, TrainConfig(batch_size=2), str(init) if init else None)


def biases(model: SwinTransformer) -> list[torch.Tensor]:
    """For each stage (A, 2 · height - 1, 2 · width - 1): the bias of every offset in its windows."""
    found = []
    for layer, (height, width) in zip(model.layers, model.config.stage_windows, strict=True):
        values = layer.blocks[0].attn.bias((height, width)).values
        found.append(values.detach().unflatten(1, (2 * height - 1, 2 * width - 1)))
    return found


@pytest.mark.parametrize(("size", "window", "larger", "side"), [(256, 8, 16, 512), (192, 12, 40, 640)])
def test_a_larger_window_keeps_the_bias_of_every_offset(tmp_path: Path, size: int, window: int, larger: int, side: int):
    """R-DOWN-5: through ``--init``, as the recipes for V2 go from classifiers; and again, from a segmenter to a larger one."""
    trained = random_swin(version=2, img_size=size, window_size=window, **TINY)
    save_pretrained(trained, tmp_path / "trained")
    name = {8: "swinv2_tiny_window8_256", 12: "swinv2_large_window12_192"}[window]
    built = build(tiny_recipe(tmp_path, dense_model(name, 0.3, larger, side), tmp_path / "trained"))
    built.task.save_pretrained(tmp_path / "segmenter")
    twice = build(tiny_recipe(tmp_path, dense_model(name, 0.3, larger + 8, side), tmp_path / "segmenter"))
    for new in (built, twice):
        for before, after in zip(biases(trained), biases(new.task.backbone), strict=True):
            edge = (after.shape[1] - before.shape[1]) // 2
            assert edge > 0 and (after[:, edge:-edge, edge:-edge] - before).abs().max() <= 1e-6
    assert torch.equal(twice.task.model.decode.fuse[0].weight, built.task.model.decode.fuse[0].weight)


def test_a_first_version_starts_from_a_classifier(tmp_path: Path):
    """The published way: ImageNet weights into the backbone, all else fresh."""
    trained = random_swin(version=1, img_size=224, window_size=7, **TINY)
    save_pretrained(trained, tmp_path / "trained")
    recipe = tiny_recipe(tmp_path, dense_model("swin_tiny_patch4_window7_224", 0.3, img_size=512), tmp_path / "trained")
    built = build(recipe)
    inside, before = built.task.backbone.state_dict(), trained.state_dict()
    assert inside.keys() == {name for name in before if not name.startswith("head.")}
    assert all(torch.equal(inside[name], before[name]) for name in inside)
    assert (built.task.model.body.norms["0"].weight == 1).all()
    assert built.task.classes == ["ground", "rectangle", "disc"] and built.loaded is not None


@pytest.mark.parametrize("version", [1, 2])
def test_a_segmenter_starts_from_masked_image_modelling(tmp_path: Path, version: int):
    """R-MIM-8: the encoder is taken over, mask token and decoder are left out."""
    model = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}[version]
    window, size = {1: (7, 224), 2: (8, 256)}[version]
    encoder = SwinTransformer(SwinConfig(version=version, img_size=size, window_size=window, num_classes=0, **TINY))
    mim = randomise(SimMIM(encoder, SimMIMConfig(), {"mean": None, "std": None, "classes": None}))
    mim.save_pretrained(tmp_path / "mim")
    built = build(tiny_recipe(tmp_path, dense_model(model, 0.3, img_size=512), tmp_path / "mim"))
    inside = built.task.backbone.state_dict()
    assert all(torch.equal(inside[name], value) for name, value in mim.encoder.state_dict().items() if name in inside)
    assert len(inside) > 60 and not any(word in name for name in inside for word in ("mask_token", "decoder"))


def test_a_segmenter_of_other_classes_gives_all_but_its_last_layers(tmp_path: Path):
    before = small_segmenter(classes=7, backbone={"img_size": 64})
    names = [str(number) for number in range(7)]
    Segment(before, names, {"mean": None, "std": None, "classes": names}).save_pretrained(tmp_path / "seven")
    recipe = tiny_recipe(tmp_path, before.backbone.config, tmp_path / "seven")
    built = build(recipe)
    state, old = built.task.model.state_dict(), before.state_dict()
    fresh = {name for name in state if not torch.equal(state[name], old[name])} if state.keys() == old.keys() else None
    assert fresh == {f"{part}.predict.{kind}" for part in ("decode", "auxiliary") for kind in ("weight", "bias")}
    assert built.loaded is not None and "predict" in str(built.loaded)
