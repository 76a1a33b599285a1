"""``--overfit N``: a few images learned by heart, for both tasks; and a model that cannot learn is found out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinscale.cli import main
from swinscale.config import override, to_dict
from swinscale.errors import UsageError
from swinscale.models import SwinConfig
from swinscale.recipes import DataConfig, Recipe, build, run
from swinscale.recipes.overfit import overfit, overfit_verdict
from swinscale.tasks import ClassifyConfig, SimMIMConfig
from swinscale.train import TrainConfig

MODEL = SwinConfig(
    version=2, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4, img_size=16, patch_size=2, num_classes=0,
    drop_path_rate=0.3,
)  # fmt: skip


def recipe(photos: Path, task: SimMIMConfig | ClassifyConfig) -> Recipe:
    train = TrainConfig(epochs=300, batch_size=1024, device="cpu", ema_decay=0.9)
    return Recipe("tiny", MODEL, task, DataConfig(str(photos), labels_per_class=2), train)


@pytest.mark.parametrize("task", [SimMIMConfig(mask_patch=4), ClassifyConfig(mixup=0.8)], ids=["simmim", "classify"])
def test_every_step_and_the_evaluation_see_the_same(photos, task):
    built = build(overfit(recipe(photos, task), 6))
    assert len(built.train_data) == len(built.eval_data) == 6
    assert built.train_data.source.names == built.eval_data.source.names
    assert sorted(built.train_data.source.labels) == [0, 0, 1, 1, 2, 2], "of every class"
    for index in range(6):
        first, later, evaluated = built.train_data[0, index], built.train_data[7, index], built.eval_data[0, index]
        for name in ("image", "mask") if isinstance(task, SimMIMConfig) else ("image",):
            assert torch.equal(first[name], later[name]) and torch.equal(first[name], evaluated[name])
    assert built.recipe.model.drop_path_rate == 0 and built.recipe.train.optim.weight_decay == 0


def test_simmim_learns_images_by_heart(tmp_path):
    """R-MIM-6: tiles of random colours cannot be guessed from their neighbours, only be remembered."""
    random = np.random.default_rng(0)
    for index in range(4):
        tiles = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(tiles.repeat(4, 0).repeat(4, 1)).save(tmp_path / f"{index}.png")
    chosen = overfit(recipe(tmp_path, SimMIMConfig(mask_patch=4)), 4)
    chosen = override(chosen, "train.optim.lr=5e-3", "train.epochs=250", "data.crop_ratio=null")
    result = run(chosen, tmp_path / "run")
    assert result.metrics["loss"] < 0.05 < 0.1 * result.metrics["neighbour_loss"]
    text = overfit_verdict(chosen, result)
    assert "Learned by heart: loss 0.0" in text and "4 images after 250 steps" in text


def test_classification_learns_images_by_heart(photos, tmp_path, capsys):
    """On the command line; other settings may still be changed."""
    (tmp_path / "tiny.json").write_text(json.dumps(to_dict(recipe(photos, ClassifyConfig()))))
    arguments = ["--overfit", "6", "--out", str(tmp_path / "run"), "train.epochs=60"]
    assert main(["train", str(tmp_path / "tiny.json"), *arguments]) == 0
    assert "Learned by heart: top1 1.0000 on 6 images after 60 steps" in capsys.readouterr().out


def test_a_model_that_does_not_learn_is_found_out(photos, tmp_path):
    """With a learning rate of nearly nothing."""
    chosen = overfit(recipe(photos, SimMIMConfig(mask_patch=4)), 4)
    still = ("train.optim.lr=1e-9", "train.optim.warmup_lr=0", "train.optim.min_lr=0", "train.epochs=20")
    chosen = override(chosen, *still)
    with pytest.raises(
        UsageError, match=r"Not learned by heart: loss .* after 20 steps, wanted below 0.05.*train.optim.lr"
    ):
        overfit_verdict(chosen, run(chosen, tmp_path / "run"))


def test_more_images_than_there_are(photos):
    with pytest.raises(UsageError, match=r"data.limit=99, but there are 24"):
        build(overfit(recipe(photos, ClassifyConfig()), 99))
