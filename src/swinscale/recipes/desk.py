"""Recipes for two CPU cores and minutes, on images that come with the package or on a folder of photos."""

from __future__ import annotations

import dataclasses

from swinscale.models import model_config
from swinscale.optim import OptimConfig
from swinscale.recipes.base import DataConfig, Recipe
from swinscale.tasks import ClassifyConfig, SimMIMConfig
from swinscale.train import TrainConfig

BUNDLED = "bundled:fashion-mnist"


def _adamw(lr: float, warmup_epochs: float, layer_decay: float = 1.0) -> OptimConfig:
    """Rates as used, whatever the batch: these recipes are not scaled to other machines."""
    low = lr / 100
    return OptimConfig(
        lr=lr, lr_scaling="none", warmup_lr=low, min_lr=low, warmup_epochs=warmup_epochs, layer_decay=layer_decay
    )


def desk_simmim() -> Recipe:
    """SimMIM on the bundled 28-pixel pictures, read at 32: a Swin V2 of 1 M parameters, window 4.

    swinscale train desk_simmim — about 2 minutes on 2 cores.
    """
    return Recipe(
        "desk_simmim",
        model_config("swinv2_pico_patch4_window4_32", in_chans=1, num_classes=0, drop_path_rate=0.0),
        SimMIMConfig(mask_patch=4, mask_ratio=0.6),
        DataConfig(BUNDLED, eval_split="test", crop_ratio=None),
        TrainConfig(
            epochs=11,
            batch_size=128,
            optim=_adamw(2e-3, 1),
            num_workers=0,
            eval_every=2,
            checkpoint_every=2,
            log_every=5,
        ),
    )


def desk_finetune() -> Recipe:
    """Classification from few labels, at 48 pixels and window 6 instead of 32 and 4; start it from ``desk_simmim``.

    swinscale train desk_finetune --init runs/desk_simmim/last — about 1 minute on 2 cores.
    """
    return Recipe(
        "desk_finetune",
        model_config(
            "swinv2_pico_patch4_window4_32", in_chans=1, num_classes=0, img_size=48, window_size=6, drop_path_rate=0.1
        ),
        ClassifyConfig(label_smoothing=0.1),
        DataConfig(BUNDLED, eval_split="test", labels_per_class=20, augment="light", crop_ratio=None),
        TrainConfig(
            epochs=40,
            batch_size=25,
            optim=_adamw(2e-3, 3, layer_decay=0.85),
            num_workers=0,
            eval_every=10,
            checkpoint_every=10,
        ),
    )


def desk_scratch() -> Recipe:
    """The same model, labels and budget as ``desk_finetune``, from random weights (and the smaller rate they need).

    swinscale train desk_scratch — about 1 minute on 2 cores.
    """
    recipe = desk_finetune()
    optim = _adamw(1e-3, 3)
    return dataclasses.replace(recipe, name="desk_scratch", train=dataclasses.replace(recipe.train, optim=optim))


def photos_simmim() -> Recipe:
    """SimMIM on a folder of photos at 112 pixels: a Swin V2 of 2.7 M parameters, window 7.

    swinscale train photos_simmim --data PHOTOS — about 3 minutes per 3,000 photos and 6 epochs on 2 cores.
    """
    return Recipe(
        "photos_simmim",
        model_config("swinv2_femto_window8_128", img_size=112, window_size=7, num_classes=0, drop_path_rate=0.0),
        SimMIMConfig(mask_patch=16, mask_ratio=0.6),
        DataConfig(),
        TrainConfig(epochs=6, batch_size=32, optim=_adamw(1e-3, 0.5), eval_every=0, checkpoint_every=1),
    )


def photos_finetune() -> Recipe:
    """Classification of photos at 128 pixels and window 8; start it from ``photos_simmim``.

    swinscale train photos_finetune --data PHOTOS --init runs/photos_simmim/last
    """
    return Recipe(
        "photos_finetune",
        model_config("swinv2_femto_window8_128", num_classes=0, drop_path_rate=0.0),
        ClassifyConfig(label_smoothing=0.1),
        DataConfig(augment="light"),
        TrainConfig(
            epochs=5, batch_size=32, optim=_adamw(1e-3, 0.5, layer_decay=0.9), eval_every=0, checkpoint_every=1
        ),
    )


def photos_scratch() -> Recipe:
    """The same model from random weights, for the time that ``photos_simmim`` and ``photos_finetune`` take together.

    swinscale train photos_scratch --data PHOTOS
    """
    recipe = photos_finetune()
    optim = dataclasses.replace(recipe.train.optim, layer_decay=1.0)
    return dataclasses.replace(
        recipe, name="photos_scratch", train=dataclasses.replace(recipe.train, epochs=10, optim=optim)
    )
