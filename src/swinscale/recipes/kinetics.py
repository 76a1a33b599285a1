"""Video classification: Kinetics-400 and Something-Something V2 as published, and small models for two CPU cores.

Settings of V1 are those of Video Swin (SwinTransformer/Video-Swin-Transformer; arXiv 2106.13230), settings of V2-G those of the Swin V2
article. ``KINETICS400`` is a folder of films with a folder per class, or one with the published tables (docs/video.md). Accuracies are
the published ones; none of the runs on Kinetics or Something-Something was done with this code.
"""

from __future__ import annotations

from dataclasses import replace

from swinscale.models import model_config
from swinscale.optim import OptimConfig
from swinscale.parallel import MemoryConfig
from swinscale.recipes.base import Recipe
from swinscale.recipes.simmim import GIANT_MEMORY
from swinscale.recipes.video import VideoDataConfig
from swinscale.tasks import SimMIMConfig, VideoConfig
from swinscale.train import TrainConfig

_MEMORY = MemoryConfig(checkpointing="block")


def _optim(lr: float, weight_decay: float, warmup_epochs: float = 2.5) -> OptimConfig:
    """The classifier has the rate ``lr`` for 64 clips, the backbone a tenth of it; the cosine ends at 0."""
    return OptimConfig(
        lr=lr, lr_reference_batch=64, warmup_factor=0.1, min_lr=0.0, by_epoch=True, warmup_epochs=warmup_epochs,
        warmup_prefix=False, weight_decay=weight_decay, backbone_lr=0.1, clip_grad=0.0,
    )  # fmt: skip


def _kinetics(name: str, model: str, drop_path: float, lr: float, weight_decay: float, short: int = 256) -> Recipe:
    """30 epochs, batch 64; 32 frames of every second one, crops of 8 % to 100 %, mirrored half of the time."""
    train = TrainConfig(
        epochs=30, batch_size=64, optim=_optim(lr, weight_decay), num_workers=8, checkpoint_every=0.2, memory=_MEMORY
    )
    config = model_config(model, num_classes=0, drop_path_rate=drop_path)
    return Recipe(name, config, VideoConfig(), VideoDataConfig(short=short), train)


def kinetics400_swin_tiny() -> Recipe:
    """swinscale train kinetics400_swin_tiny --data KINETICS400 --init FILE — from ImageNet-1K; 78.8 top-1 (published)."""
    return _kinetics("kinetics400_swin_tiny", "swin3d_tiny_patch244_window877_224", 0.1, 1e-3, 0.02)


def kinetics400_swin_small() -> Recipe:
    """swinscale train kinetics400_swin_small --data KINETICS400 --init FILE — from ImageNet-1K; 80.6 top-1 (published)."""
    return _kinetics("kinetics400_swin_small", "swin3d_small_patch244_window877_224", 0.1, 1e-3, 0.02)


def kinetics400_swin_base() -> Recipe:
    """swinscale train kinetics400_swin_base --data KINETICS400 --init FILE — from ImageNet-1K; 80.6 top-1 (published)."""
    return _kinetics("kinetics400_swin_base", "swin3d_base_patch244_window877_224", 0.3, 1e-3, 0.05)


def kinetics400_swin_base_22k() -> Recipe:
    """swinscale train kinetics400_swin_base_22k --data KINETICS400 --init FILE — from ImageNet-22K; 82.7 top-1 (published)."""
    return _kinetics("kinetics400_swin_base_22k", "swin3d_base_patch244_window877_224", 0.2, 3e-4, 0.05)


def kinetics400_swin_large_22k() -> Recipe:
    """swinscale train kinetics400_swin_large_22k --data KINETICS400 --init FILE — from ImageNet-22K; 83.1 top-1 (published)."""
    return _kinetics("kinetics400_swin_large_22k", "swin3d_large_patch244_window877_224", 0.2, 3e-4, 0.05)


def kinetics400_swin_large_384() -> Recipe:
    """swinscale train kinetics400_swin_large_384 --data KINETICS400 --init FILE — at 384 with window 12; 84.9 top-1 of 10×5 views (published)."""
    short = 438  # as 256 to 224
    recipe = _kinetics("kinetics400_swin_large_384", "swin3d_large_patch244_window81212_384", 0.2, 3e-4, 0.05, short)
    return replace(recipe, task=VideoConfig(test_clips=10, test_crops=5))


def ssv2_swin_base() -> Recipe:
    """Something-Something V2 from a model of Kinetics-400: window 16 along time, clips of the whole film; 69.6 top-1 (published).

    swinscale train ssv2_swin_base --data SSV2 --init runs/kinetics400_swin_base/best — labels after paths in a list file.
    """
    data = VideoDataConfig(sample="segments", flip=0.0, randaugment=(4, 7), erase=0.25)
    train = TrainConfig(
        epochs=60, batch_size=64, optim=_optim(3e-4, 0.05), num_workers=8, checkpoint_every=0.2, memory=_MEMORY
    )
    model = model_config("swin3d_base_patch244_window1677_224", num_classes=0, drop_path_rate=0.4)
    task = VideoConfig(label_smoothing=0.1, test_clips=1, test_crops=3)
    return Recipe("ssv2_swin_base", model, task, data, train)


def _v2(name: str, model: str) -> Recipe:
    """The settings of V1's models of that size at 256 pixels with window 8; no result was published."""
    return _kinetics(name, model, 0.1, 1e-3, 0.02, short=292)  # as 256 to 224


def kinetics400_swinv2_tiny() -> Recipe:
    """swinscale train kinetics400_swinv2_tiny --data KINETICS400 --init FILE — from 256/8; no result of this size was published."""
    return _v2("kinetics400_swinv2_tiny", "swin3dv2_tiny_window888_256")


def kinetics400_swinv2_small() -> Recipe:
    """swinscale train kinetics400_swinv2_small --data KINETICS400 --init FILE — from 256/8; no result of this size was published."""
    return _v2("kinetics400_swinv2_small", "swin3dv2_small_window888_256")


def kinetics400_swinv2_base() -> Recipe:
    """swinscale train kinetics400_swinv2_base --data KINETICS400 --init FILE — from 256/8; no result of this size was published."""
    recipe = _v2("kinetics400_swinv2_base", "swin3dv2_base_window888_256")
    optim = replace(recipe.train.optim, weight_decay=0.05)
    model = replace(recipe.model, drop_path_rate=0.3)
    return replace(recipe, model=model, train=replace(recipe.train, optim=optim))


def _giant(name: str, model: str, epochs: int, batch: int, lr: float, warmup_epochs: float, short: int) -> Recipe:
    optim = OptimConfig(
        lr=lr, lr_reference_batch=batch, warmup_lr=lr / 100, min_lr=0.0, warmup_epochs=warmup_epochs, weight_decay=0.1,
        clip_grad=100.0,
    )  # fmt: skip
    train = TrainConfig(epochs, batch, 1, optim, num_workers=8, checkpoint_every=0.05, memory=GIANT_MEMORY)
    config = model_config(model, num_classes=0, drop_path_rate=0.3)
    return Recipe(name, config, VideoConfig(test_clips=4, test_crops=5), VideoDataConfig(short=short), train)


def kinetics400_swinv2_giant_256() -> Recipe:
    """Swin V2-G on Kinetics-400, first part: 256 pixels, windows 8 × 16 × 16, 20 epochs, batch 80.

    torchrun … -m swinscale train kinetics400_swinv2_giant_256 --data KINETICS400 --init runs/imagenet22k_swinv2_giant/last — the
    article writes 256²×8 and does not say whether 8 are frames or tokens; here 16 frames, two to a token. What it does not state
    (stochastic depth, rate of the backbone, clipping) is as in the image recipes. Not run with this code.
    """
    return _giant("kinetics400_swinv2_giant_256", "swin3dv2_giant_window81616_256", 20, 80, 3.6e-4, 2.5, 292)


def kinetics400_swinv2_giant_320() -> Recipe:
    """Swin V2-G on Kinetics-400, second part: 320 pixels, windows 8 × 20 × 20, 5 epochs, batch 64; 86.8 top-1 (published).

    torchrun … -m swinscale train kinetics400_swinv2_giant_320 --data KINETICS400 --init runs/kinetics400_swinv2_giant_256/last — then
    ``swinscale eval RUN --img-size 384 --window 24``: 83.2 at 320, 83.4 at 384 of one view, 86.8 of 4×5 (published). Not run with this
    code.
    """
    return _giant("kinetics400_swinv2_giant_320", "swin3dv2_giant_window82020_320", 5, 64, 5e-5, 1, 366)


def _desk_optim(lr: float, warmup_epochs: float) -> OptimConfig:
    low = lr / 100
    return OptimConfig(lr=lr, lr_scaling="none", warmup_lr=low, min_lr=low, warmup_epochs=warmup_epochs)


def _desk(name: str, model: str) -> Recipe:
    """16 frames of 64 pixels: crops of half the picture or more, mirrored half of the time."""
    train = TrainConfig(
        epochs=60, batch_size=8, optim=_desk_optim(1e-3, 5), num_workers=1, eval_every=0, checkpoint_every=10
    )
    task = VideoConfig(label_smoothing=0.1, head_dropout=0.2, test_clips=4, test_crops=1)
    data = VideoDataConfig(short=0, area=(0.5, 1.0), eval_split="test", stride=2)
    return Recipe(name, model_config(model, num_classes=0), task, data, train)


def desk_video_swin() -> Recipe:
    """swinscale train desk_video_swin --data FILMS [--init FILE] — a small V1 on any short films with few classes, for two CPU cores."""
    return _desk("desk_video_swin", "swin3d_pico_patch244_window844_64")


def desk_video_swinv2() -> Recipe:
    """swinscale train desk_video_swinv2 --data FILMS [--init FILE] — a small V2 on any short films with few classes, for two CPU cores."""
    return _desk("desk_video_swinv2", "swin3dv2_pico_window844_64")


def desk_video_simmim() -> Recipe:
    """SimMIM on clips: the same squares are hidden in all frames; the start of ``desk_video_swinv2``.

    swinscale train desk_video_simmim --data FILMS — labels are not needed.
    """
    recipe = desk_video_swinv2()
    task = SimMIMConfig(mask_patch=16, mask_mode="tube")
    model = replace(recipe.model, drop_path_rate=0.0)
    return replace(recipe, name="desk_video_simmim", model=model, task=task)
