"""SimMIM pre-training with the published hyper-parameters (microsoft/SimMIM, and its merge in microsoft/Swin-Transformer).

Top-1 accuracies are the published ones after fine-tuning on ImageNet-1K; none of these runs was done with this code.
"""

from __future__ import annotations

from dataclasses import replace

from swinscale.models import model_config
from swinscale.optim import OptimConfig
from swinscale.parallel import MemoryConfig
from swinscale.recipes.base import DataConfig, Recipe
from swinscale.tasks import SimMIMConfig
from swinscale.train import TrainConfig

_DATA = DataConfig(augment="light")
GIANT_OPTIM = OptimConfig(
    lr=1.4e-3, lr_reference_batch=9216, warmup_lr=1e-6, min_lr=1e-6, weight_decay=0.1, clip_grad=100.0
)
"""Stages 1 and 2 of the article's largest model; rates of warm-up and end are not stated."""
GIANT_MEMORY = MemoryConfig(checkpointing="block", shard="zero1")
"""The article's recipe for three billion parameters, but for sequential attention in the first two stages: where the fused
kernels run there are no logits to save. On other devices add ``train.memory.attention`` (docs/memory.md)."""


def _long(name: str, model: str, task: SimMIMConfig, drop_path: float) -> Recipe:
    """800 epochs, learning rate 1e-4 per 512 images (4e-4 at batch 2048), a tenth of it from epoch 700."""
    optim = OptimConfig(
        lr=1e-4,
        warmup_lr=5e-7,
        min_lr=5e-7,
        schedule="multistep",
        milestones=(700.0,),
        warmup_epochs=10,
        warmup_prefix=False,
    )
    train = TrainConfig(epochs=800, batch_size=2048, optim=optim, num_workers=8, eval_every=10, checkpoint_every=5)
    return Recipe(name, model_config(model, num_classes=0, drop_path_rate=drop_path), task, _DATA, train)


def simmim_swin_base_100ep() -> Recipe:
    """Swin-B, 192/6, 100 epochs.

    swinscale train simmim_swin_base_100ep --data IMAGENET — 16 GPUs × 128 images in the publication; 82.8 top-1 after
    fine-tuning at 192, 83.5 at 224 (published).
    """
    recipe = _long("simmim_swin_base_100ep", "swin_base_patch4_window6_192", SimMIMConfig(), 0.0)
    optim = OptimConfig(lr=2e-4, warmup_lr=1e-6, min_lr=1e-5, warmup_epochs=10, warmup_prefix=False)
    return replace(recipe, train=replace(recipe.train, epochs=100, optim=optim))


def simmim_swin_base_800ep() -> Recipe:
    """Swin-B, 192/6, 800 epochs.

    swinscale train simmim_swin_base_800ep --data IMAGENET — 16 GPUs × 128 images; 84.0 top-1 after fine-tuning at 224
    (published).
    """
    return _long("simmim_swin_base_800ep", "swin_base_patch4_window6_192", SimMIMConfig(), 0.0)


def simmim_swin_large_800ep() -> Recipe:
    """Swin-L, 192/12, 800 epochs.

    swinscale train simmim_swin_large_800ep --data IMAGENET — 16 GPUs × 128 images; 85.4 top-1 after fine-tuning at 224/14
    (published).
    """
    return _long("simmim_swin_large_800ep", "swin_large_patch4_window12_192", SimMIMConfig(), 0.0)


def simmim_swinv2_base_800ep() -> Recipe:
    """Swin V2-B, 192/12, 800 epochs, targets normalised over 47×47 pixels.

    swinscale train simmim_swinv2_base_800ep --data IMAGENET — 16 GPUs × 128 images; no accuracy was published for this
    configuration alone.
    """
    return _long("simmim_swinv2_base_800ep", "swinv2_base_window12_192", SimMIMConfig(norm_target=47), 0.1)


def simmim_swinv2_large_800ep() -> Recipe:
    """Swin V2-L with the settings of V2-B; a larger sibling, not a published configuration."""
    return _long("simmim_swinv2_large_800ep", "swinv2_large_window12_192", SimMIMConfig(norm_target=47), 0.1)


def simmim_swinv2_huge_800ep() -> Recipe:
    """Swin V2-H, 192/12, 800 epochs.

    swinscale train simmim_swinv2_huge_800ep --data IMAGENET — 85.7 top-1 after fine-tuning at 224/14, 87.1 at 512/32
    (published; hyper-parameters beyond those of V2-B were not).
    """
    return _long("simmim_swinv2_huge_800ep", "swinv2_huge_window12_192", SimMIMConfig(norm_target=47), 0.1)


def simmim_swinv2_giant() -> Recipe:
    """Swin V2-G, stage 1 of the article: 20 epochs over 70 M private images (any folder here), batch 9216, rate 1.4e-3.

    torchrun … -m swinscale train simmim_swinv2_giant --data IMAGES — the window at 192 pixels is not stated; 12 as for V2-B
    and V2-L. Memory: docs/memory.md. Not run with this code at full length.
    """
    recipe = _long("simmim_swinv2_giant", "swinv2_giant_window12_192", SimMIMConfig(norm_target=47), 0.1)
    optim = replace(GIANT_OPTIM, warmup_epochs=30_000 * 9216 / 70e6)
    train = replace(
        recipe.train, epochs=20, batch_size=9216, micro_batch=32, optim=optim, eval_every=1, checkpoint_every=0.05
    )
    return replace(recipe, train=replace(train, memory=GIANT_MEMORY))
