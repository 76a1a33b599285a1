"""LR-Net in minutes on one core: small pictures, and photos. For processors with bf16 units add train.precision=bf16."""

from __future__ import annotations

from swinscale.models import model_config
from swinscale.optim import OptimConfig
from swinscale.recipes.base import DataConfig, Recipe
from swinscale.tasks import ClassifyConfig
from swinscale.train import TrainConfig


def _training(epochs: float, batch: int, lr: float) -> TrainConfig:
    """AdamW at a rate as used, whatever the batch; a tenth is warm-up."""
    optim = OptimConfig(lr=lr, lr_scaling="none", warmup_lr=lr / 100, min_lr=lr / 100, warmup_epochs=epochs / 10)
    return TrainConfig(epochs=epochs, batch_size=batch, optim=optim, eval_every=0, checkpoint_every=1)


def desk_lrnet_cifar10() -> Recipe:
    """Classification of 32-pixel pictures with an LR-Net of 0.4 M parameters.

    swinscale train desk_lrnet_cifar10 --data CIFAR10 — about 12 minutes of one core in bf16; top-1 55 % on the test part.
    """
    return Recipe(
        "desk_lrnet_cifar10",
        model_config("lrnet_micro", num_classes=0),
        ClassifyConfig(label_smoothing=0.1),
        DataConfig(eval_split="test", augment="light", crop_ratio=None),
        _training(2, 64, 2e-3),
    )


def photos_lrnet() -> Recipe:
    """Classification of photos at 64 pixels with an LR-Net of 2.3 M parameters.

    swinscale train photos_lrnet --data PHOTOS — about 7 minutes of one core per 3,000 photos in bf16.
    """
    return Recipe(
        "photos_lrnet",
        model_config("lrnet_femto", num_classes=0, img_size=64),
        ClassifyConfig(label_smoothing=0.1),
        DataConfig(augment="light"),
        _training(10, 32, 1e-3),
    )
