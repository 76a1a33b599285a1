"""ADE20K semantic segmentation with the published hyper-parameters.

Sources: SwinTransformer/Swin-Transformer-Semantic-Segmentation (V1 T, S, B), the Swin repository and the V1 article (22K weights at 640),
the V2 article (its ablation; B, L and G). Measures are the published ones, on the validation images, the picture at one scale and at
six scales with its mirror image; none of these runs was done with this code. ``ADE20K`` is a folder with ``images/training`` and
``annotations/training``, and ``FILE`` a classifier pre-trained on ImageNet, or another segmenter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from swinscale.heads.config import SegmentConfig
from swinscale.optim import OptimConfig
from swinscale.recipes.base import Recipe
from swinscale.recipes.parts import dense_model
from swinscale.recipes.segmentation import SegmentationDataConfig
from swinscale.recipes.simmim import GIANT_MEMORY
from swinscale.train import TrainConfig

IMAGES = 20_210
"""Of ADE20K's training set."""
DATA = SegmentationDataConfig(classes="ade20k", reduce_zero_label=True)


def _train(steps: int, batch: int, lr: float, warmup: int, weight_decay: float, **optim: Any) -> TrainConfig:
    """AdamW, a linear warm-up from a millionth of the rate, then linearly to 0 at the end; no clipping."""
    per_epoch = IMAGES // batch
    adamw = OptimConfig(
        lr=lr, lr_reference_batch=batch, lr_scaling="linear", warmup_lr=lr * 1e-6, min_lr=0.0, schedule="linear",
        warmup_epochs=warmup / per_epoch, warmup_prefix=False, weight_decay=weight_decay, clip_grad=0.0, **optim,
    )  # fmt: skip
    return TrainConfig(steps / per_epoch, batch, optim=adamw, num_workers=4, eval_every=16_000 / per_epoch)


def _v1(name: str, model: str, side: int = 512) -> Recipe:
    """160,000 steps of 16 crops; the long side of a picture is at most four times the short one."""
    data = replace(DATA, crop=(side, side), short=side, long=4 * side)
    task = SegmentConfig(test_short=side, test_long=4 * side)
    return Recipe(name, dense_model(model, 0.3, img_size=side), task, data, _train(160_000, 16, 6e-5, 1500, 0.01))


def upernet_swin_tiny() -> Recipe:
    """swinscale train upernet_swin_tiny --data ADE20K --init FILE — 8 GPUs × 2; 44.51 mIoU, at several scales 45.81 (published)."""
    return _v1("upernet_swin_tiny", "swin_tiny_patch4_window7_224")


def upernet_swin_small() -> Recipe:
    """swinscale train upernet_swin_small --data ADE20K --init FILE — 8 GPUs × 2; 47.64 mIoU, at several scales 49.47 (published)."""
    return _v1("upernet_swin_small", "swin_small_patch4_window7_224")


def upernet_swin_base() -> Recipe:
    """swinscale train upernet_swin_base --data ADE20K --init FILE — 8 GPUs × 2; 48.13 mIoU, at several scales 49.72 (published)."""
    return _v1("upernet_swin_base", "swin_base_patch4_window7_224")


def upernet_swin_base_640() -> Recipe:
    """swinscale train upernet_swin_base_640 --data ADE20K --init FILE — from ImageNet-22K; 50.04 mIoU, at several scales 51.66 (published).

    Window 7; the published size of pictures, 2560 × 640, is inferred from the reported cost.
    """
    return _v1("upernet_swin_base_640", "swin_base_patch4_window7_224", 640)


def upernet_swin_large_640() -> Recipe:
    """swinscale train upernet_swin_large_640 --data ADE20K --init FILE — from ImageNet-22K; 52.05 mIoU, at several scales 53.53 (published).

    As ``upernet_swin_base_640``.
    """
    return _v1("upernet_swin_large_640", "swin_large_patch4_window7_224", 640)


def _v2(name: str, model: str) -> Recipe:
    """The ablation of the V2 article: window 16, pre-trained at 256 with window 8, layer-wise decay of the rate."""
    train = _train(160_000, 16, 4e-5, 1500, 0.05, layer_decay=0.95)
    return Recipe(name, dense_model(model, 0.3, window=16, img_size=512), SegmentConfig(), DATA, train)


def upernet_swinv2_tiny() -> Recipe:
    """swinscale train upernet_swinv2_tiny --data ADE20K --init FILE — from 256/8; 47.0 mIoU (published).

    With model.window_size=20 47.7, with 32 47.8 (published).
    """
    return _v2("upernet_swinv2_tiny", "swinv2_tiny_window8_256")


def upernet_swinv2_small() -> Recipe:
    """swinscale train upernet_swinv2_small --data ADE20K --init FILE — from 256/8; no result of this size was published."""
    return _v2("upernet_swinv2_small", "swinv2_small_window8_256")


def upernet_swinv2_base() -> Recipe:
    """swinscale train upernet_swinv2_base --data ADE20K --init FILE — from 256/8; no result of this size was published."""
    return _v2("upernet_swinv2_base", "swinv2_base_window8_256")


def _v2_640(name: str, model: str, drop_path: float, train: TrainConfig) -> Recipe:
    """Crops of 640 with window 40, from weights of 192 and window 12."""
    data = replace(DATA, crop=(640, 640), short=640, long=2560)
    task = SegmentConfig(test_short=640, test_long=2560)
    return Recipe(name, dense_model(model, drop_path, window=40, img_size=640), task, data, train)


def upernet_swinv2_base_640() -> Recipe:
    """swinscale train upernet_swinv2_base_640 --data ADE20K --init FILE — from 22K at 192/12; no result of this size was published."""
    return _v2_640("upernet_swinv2_base_640", "swinv2_base_window12_192", 0.3, _train(40_000, 64, 6e-5, 375, 0.05))


def upernet_swinv2_large_640() -> Recipe:
    """swinscale train upernet_swinv2_large_640 --data ADE20K --init FILE — from 22K at 192/12; 55.9 mIoU at several scales (published)."""
    return _v2_640("upernet_swinv2_large_640", "swinv2_large_window12_192", 0.3, _train(40_000, 64, 6e-5, 375, 0.05))


def upernet_swinv2_giant_640() -> Recipe:
    """torchrun … -m swinscale train upernet_swinv2_giant_640 --data ADE20K --init DIRECTORY — 59.1 mIoU (published).

    With window 56 at 896 (``swinscale eval --window 56 --img-size 896``) 59.3, at several scales 59.9 (published). Memory:
    docs/memory.md. Not run with this code.
    """
    train = _train(80_000, 32, 4e-5, 750, 0.05)
    train = replace(train, micro_batch=1, eval_every=0, memory=GIANT_MEMORY)
    return _v2_640("upernet_swinv2_giant_640", "swinv2_giant_window12_192", 0.4, train)
