"""What the training claims share: networks, budgets and recipes per scale. Nothing here is chosen by what a claim shows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from swinscale.claims.base import Scale
from swinscale.data import Source, open_source
from swinscale.errors import UsageError
from swinscale.models import ModelConfig, SwinConfig
from swinscale.optim import OptimConfig
from swinscale.recipes import DataConfig, Recipe, get_recipe
from swinscale.tasks import ClassifyConfig, SimMIMConfig
from swinscale.train import TrainConfig


@dataclass(frozen=True)
class Network:
    """A small Swin for ``img_size`` pixels, with windows of a ``img_size``/``window_size`` ratio like the published ones."""

    img_size: int = 32
    patch_size: int = 4
    window_size: int = 4
    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 4)
    num_heads: tuple[int, ...] = (3, 6)

    def __str__(self) -> str:
        patch, window = self.patch_size, self.window_size
        return f"{self.img_size} pixels, patch {patch}, window {window}, width {self.embed_dim}, depths {self.depths}"

    def config(self, **changes: Any) -> SwinConfig:
        """Of version 2, without stochastic depth, whose benefit needs more epochs than there are."""
        return SwinConfig(**{**vars(self), "num_classes": 0, "drop_path_rate": 0.0, **changes})

    def at(self, img_size: int) -> dict[str, int]:
        """Size and window when the window grows with the picture."""
        if img_size * self.window_size % self.img_size:
            raise UsageError(f"img_size={img_size} is no multiple of {self.img_size // self.window_size} pixels.")
        return {"img_size": img_size, "window_size": self.window_size * img_size // self.img_size}


DESK = Network()
GPU = Network(img_size=32, patch_size=2, embed_dim=64, depths=(2, 2, 6), num_heads=(2, 4, 8))
BATCH = {"desk": 64, "gpu": 256}
RATES = {"desk": 1e-3, "gpu": 2e-3}
"""From the desk recipes, and twice that for four times the batch."""

LOOKED_AT, TESTED = 500, {"desk": 3_000, "gpu": 0}
"""Test images of an evaluation from which nothing is concluded, and of one after a short fine-tuning; 0: all."""


def network(scale: Scale) -> Network:
    return DESK if scale == "desk" else GPU


@lru_cache(maxsize=8)
def count_images(data: str) -> tuple[int, int]:
    """How many training images a source has, and how many classes.

    Raises:
        UsageError: if it has no classes, or no part to test on.
    """
    source = open_source(data, "train")
    if source.classes is None or not {"val", "test"} & set(source.splits):
        raise UsageError(
            f"{data} cannot be used here: claims need train and test (or val) parts, each with one folder per class."
        )
    return len(source), len(source.classes)


def supervised(
    name: str,
    model: ModelConfig,
    data: str,
    scale: Scale,
    seed: int,
    images: int,
    *,
    labels_per_class: int = 0,
    rate: float = 1.0,
    batch: int | None = None,
    layer_decay: float = 1.0,
    diagnose_every: int = 0,
    tested: int = 0,
) -> Recipe:
    """Classification for a number of ``images`` in all, with a crop and a flip; evaluated once, at the end.

    Args:
        labels_per_class: labelled images per class; 0: all.
        rate: factor on the learning rate of the scale.
        tested: images of the evaluation; 0: all.
    """
    total, classes = count_images(data)
    here = min(total, labels_per_class * classes) if labels_per_class else total
    batch = min(batch or BATCH[scale], here)
    lr = rate * RATES[scale]
    return Recipe(
        name,
        model,
        ClassifyConfig(label_smoothing=0.0),
        DataConfig(
            data,
            eval_split="test",
            labels_per_class=labels_per_class,
            augment="light",
            crop_ratio=None,
            eval_limit=_tested(data, tested),
        ),
        _training(scale, seed, lr, images, here, batch, layer_decay, diagnose_every),
    )


def masked(
    name: str,
    model: SwinConfig,
    data: str,
    scale: Scale,
    seed: int,
    images: int,
    task: SimMIMConfig,
    *,
    rate: float = 2.0,
    batch: int | None = None,
    diagnose_every: int = 0,
) -> Recipe:
    """SimMIM for a number of ``images`` in all, at twice the rate of classification, as in the desk recipes."""
    total, _ = count_images(data)
    batch = min(batch or BATCH[scale], total)
    lr = rate * RATES[scale]
    return Recipe(
        name,
        model,
        task,
        DataConfig(data, eval_split="test", crop_ratio=None, eval_limit=_tested(data, LOOKED_AT)),
        _training(scale, seed, lr, images, total, batch, 1.0, diagnose_every),
    )


def test_images(data: str) -> Source:
    """The test part of a source; the validation part where there is none."""
    splits = open_source(data, "train").splits
    return open_source(data, "test" if "test" in splits else "val")


@lru_cache(maxsize=32)
def _tested(data: str, images: int) -> int:
    """``images``, or all where there are no more."""
    return 0 if images >= len(test_images(data)) else images


def _training(
    scale: Scale, seed: int, lr: float, images: int, total: int, batch: int, layer_decay: float, diagnose_every: int
) -> TrainConfig:
    """A tenth of the steps is warm-up; no more than a checkpoint at the end, for a run of minutes."""
    steps_per_epoch = total // batch
    epochs = max(1, round(images / batch)) / steps_per_epoch
    optim = OptimConfig(
        lr=lr,
        lr_scaling="none",
        warmup_lr=lr / 100,
        min_lr=lr / 100,
        warmup_epochs=epochs / 10,
        layer_decay=layer_decay,
    )
    return TrainConfig(
        epochs=epochs,
        batch_size=batch,
        optim=optim,
        num_workers=0 if scale == "desk" else 12,
        seed=seed,
        eval_every=0,
        checkpoint_every=0,
        keep_checkpoints=1,
        log_every=5,
        diagnose_every=diagnose_every,
    )


def published_recipe(recipe: str, data: str, seed: int, **changes: Any) -> Recipe:
    """The article's own recipe, for the paper scale: ``changes`` are fields of the model."""
    found = get_recipe(recipe)
    return dataclasses.replace(
        found,
        model=dataclasses.replace(found.model, **changes),
        data=dataclasses.replace(found.data, train=data),
        train=dataclasses.replace(found.train, seed=seed),
    )
