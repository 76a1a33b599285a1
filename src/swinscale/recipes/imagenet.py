"""ImageNet classification with the published hyper-parameters (microsoft/Swin-Transformer, microsoft/SimMIM).

Learning rates are per 512 images, as in the published configurations; ``swinscale show`` prints the scaled ones.
Accuracies are the published ones; none of these runs was done with this code.
"""

from __future__ import annotations

from dataclasses import replace

from swinscale.models import model_config
from swinscale.optim import OptimConfig
from swinscale.recipes.base import DataConfig, Recipe
from swinscale.recipes.simmim import GIANT_MEMORY, GIANT_OPTIM
from swinscale.tasks import ClassifyConfig
from swinscale.train import TrainConfig

FULL_MIX = ClassifyConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0)
SCRATCH = OptimConfig(lr=5e-4, warmup_lr=5e-7, min_lr=5e-6, warmup_epochs=20, weight_decay=0.05)


def _scratch(name: str, model: str, drop_path: float) -> Recipe:
    """300 epochs, batch 1024, rate 1e-3 after scaling."""
    train = TrainConfig(epochs=300, batch_size=1024, optim=SCRATCH, num_workers=8, checkpoint_every=1)
    return Recipe(name, model_config(model, num_classes=0, drop_path_rate=drop_path), FULL_MIX, DataConfig(), train)


def imagenet_swin_tiny() -> Recipe:
    """swinscale train imagenet_swin_tiny --data IMAGENET — 8 GPUs × 128 images; 81.2 top-1 (published)."""
    return _scratch("imagenet_swin_tiny", "swin_tiny_patch4_window7_224", 0.2)


def imagenet_swin_small() -> Recipe:
    """swinscale train imagenet_swin_small --data IMAGENET — 8 GPUs × 128 images; 83.2 top-1 (published)."""
    return _scratch("imagenet_swin_small", "swin_small_patch4_window7_224", 0.3)


def imagenet_swin_base() -> Recipe:
    """swinscale train imagenet_swin_base --data IMAGENET — 8 GPUs × 64 images × 2; 83.5 top-1 (published)."""
    return _scratch("imagenet_swin_base", "swin_base_patch4_window7_224", 0.5)


def imagenet_swinv2_tiny() -> Recipe:
    """swinscale train imagenet_swinv2_tiny --data IMAGENET — 256/8; 8 GPUs × 128 images; 81.8 top-1 (published)."""
    return _scratch("imagenet_swinv2_tiny", "swinv2_tiny_window8_256", 0.2)


def imagenet_swinv2_tiny_window16() -> Recipe:
    """swinscale train imagenet_swinv2_tiny_window16 --data IMAGENET — 256/16; 82.8 top-1 (published)."""
    return _scratch("imagenet_swinv2_tiny_window16", "swinv2_tiny_window16_256", 0.2)


def imagenet_swinv2_small() -> Recipe:
    """swinscale train imagenet_swinv2_small --data IMAGENET — 256/8; 8 GPUs × 128 images; 83.7 top-1 (published)."""
    return _scratch("imagenet_swinv2_small", "swinv2_small_window8_256", 0.3)


def imagenet_swinv2_base() -> Recipe:
    """swinscale train imagenet_swinv2_base --data IMAGENET — 256/8; 8 GPUs × 64 images × 2; 84.2 top-1 (published)."""
    return _scratch("imagenet_swinv2_base", "swinv2_base_window8_256", 0.5)


def _22k(name: str, model: str, drop_path: float, weight_decay: float) -> Recipe:
    """90 epochs on ImageNet-22K, batch 4096, rate 1e-3 after scaling."""
    optim = OptimConfig(lr=1.25e-4, warmup_lr=1.25e-7, min_lr=1.25e-6, warmup_epochs=5, weight_decay=weight_decay)
    train = TrainConfig(epochs=90, batch_size=4096, optim=optim, num_workers=8)
    return Recipe(name, model_config(model, num_classes=0, drop_path_rate=drop_path), FULL_MIX, DataConfig(), train)


def imagenet22k_swin_tiny() -> Recipe:
    """swinscale train imagenet22k_swin_tiny --data IMAGENET22K — 80.9 top-1 on 1K after fine-tuning (published)."""
    return _22k("imagenet22k_swin_tiny", "swin_tiny_patch4_window7_224", 0.1, 0.05)


def imagenet22k_swin_small() -> Recipe:
    """swinscale train imagenet22k_swin_small --data IMAGENET22K — 83.2 top-1 on 1K after fine-tuning (published)."""
    return _22k("imagenet22k_swin_small", "swin_small_patch4_window7_224", 0.2, 0.05)


def imagenet22k_swin_base() -> Recipe:
    """swinscale train imagenet22k_swin_base --data IMAGENET22K — 85.2 top-1 on 1K after fine-tuning (published)."""
    return _22k("imagenet22k_swin_base", "swin_base_patch4_window7_224", 0.2, 0.05)


def imagenet22k_swin_large() -> Recipe:
    """swinscale train imagenet22k_swin_large --data IMAGENET22K — 86.3 top-1 on 1K after fine-tuning (published)."""
    return _22k("imagenet22k_swin_large", "swin_large_patch4_window7_224", 0.2, 0.05)


def imagenet22k_swinv2_base() -> Recipe:
    """swinscale train imagenet22k_swinv2_base --data IMAGENET22K — 192/12; 86.2 (256/16), 87.1 (384/24) on 1K (published)."""
    return _22k("imagenet22k_swinv2_base", "swinv2_base_window12_192", 0.2, 0.1)


def imagenet22k_swinv2_large() -> Recipe:
    """swinscale train imagenet22k_swinv2_large --data IMAGENET22K — 192/12; 86.9 (256/16), 87.6 (384/24) on 1K (published)."""
    return _22k("imagenet22k_swinv2_large", "swinv2_large_window12_192", 0.2, 0.1)


def _22k_to_1k(name: str, model: str, drop_path: float, crop_ratio: float | None) -> Recipe:
    """30 epochs, batch 1024, rate 4e-5 after scaling, hardly any weight decay. Give the 22K checkpoint with --init."""
    optim = OptimConfig(lr=2e-5, warmup_lr=2e-8, min_lr=2e-7, warmup_epochs=5, weight_decay=1e-8)
    train = TrainConfig(epochs=30, batch_size=1024, optim=optim, num_workers=8)
    data = DataConfig(crop_ratio=crop_ratio)
    return Recipe(name, model_config(model, num_classes=0, drop_path_rate=drop_path), FULL_MIX, data, train)


def imagenet_22kto1k_swin_base_224() -> Recipe:
    """swinscale train imagenet_22kto1k_swin_base_224 --data IMAGENET --init FILE — 85.2 top-1 (published)."""
    return _22k_to_1k("imagenet_22kto1k_swin_base_224", "swin_base_patch4_window7_224", 0.2, 224 / 256)


def imagenet_22kto1k_swin_base_384() -> Recipe:
    """swinscale train imagenet_22kto1k_swin_base_384 --data IMAGENET --init FILE — 86.4 top-1 (published)."""
    return _22k_to_1k("imagenet_22kto1k_swin_base_384", "swin_base_patch4_window12_384", 0.2, None)


def imagenet_22kto1k_swin_large_384() -> Recipe:
    """swinscale train imagenet_22kto1k_swin_large_384 --data IMAGENET --init FILE — 87.3 top-1 (published)."""
    return _22k_to_1k("imagenet_22kto1k_swin_large_384", "swin_large_patch4_window12_384", 0.2, None)


def imagenet_22kto1k_swinv2_base_256() -> Recipe:
    """swinscale train imagenet_22kto1k_swinv2_base_256 --data IMAGENET --init FILE — 86.2 top-1 (published)."""
    return _22k_to_1k("imagenet_22kto1k_swinv2_base_256", "swinv2_base_window12to16_192to256", 0.2, 224 / 256)


def imagenet_22kto1k_swinv2_base_384() -> Recipe:
    """swinscale train imagenet_22kto1k_swinv2_base_384 --data IMAGENET --init FILE — 87.1 top-1 (published)."""
    return _22k_to_1k("imagenet_22kto1k_swinv2_base_384", "swinv2_base_window12to24_192to384", 0.2, None)


def imagenet_22kto1k_swinv2_large_256() -> Recipe:
    """swinscale train imagenet_22kto1k_swinv2_large_256 --data IMAGENET --init FILE — 86.9 top-1 (published)."""
    return _22k_to_1k("imagenet_22kto1k_swinv2_large_256", "swinv2_large_window12to16_192to256", 0.2, 224 / 256)


def imagenet_22kto1k_swinv2_large_384() -> Recipe:
    """swinscale train imagenet_22kto1k_swinv2_large_384 --data IMAGENET --init FILE — 87.6 top-1 (published)."""
    return _22k_to_1k("imagenet_22kto1k_swinv2_large_384", "swinv2_large_window12to24_192to384", 0.2, None)


def imagenet_224to384_swin_base() -> Recipe:
    """swinscale train imagenet_224to384_swin_base --data IMAGENET --init FILE — 1K only, 84.5 top-1 (published)."""
    return _22k_to_1k("imagenet_224to384_swin_base", "swin_base_patch4_window12_384", 0.5, None)


def _after_simmim(name: str, model: str, layer_decay: float, drop_path: float) -> Recipe:
    """100 epochs, batch 2048, rate 5e-3 after scaling, layer-wise decay. Give the SimMIM checkpoint with --init."""
    optim = OptimConfig(lr=1.25e-3, warmup_lr=2.5e-7, min_lr=2.5e-7, warmup_epochs=20, layer_decay=layer_decay)
    train = TrainConfig(epochs=100, batch_size=2048, optim=optim, num_workers=8)
    return Recipe(name, model_config(model, num_classes=0, drop_path_rate=drop_path), FULL_MIX, DataConfig(), train)


def imagenet_simmim_swin_base_100ep() -> Recipe:
    """swinscale train imagenet_simmim_swin_base_100ep --data IMAGENET --init FILE — 83.5 top-1 at 224/7 (published)."""
    return _after_simmim("imagenet_simmim_swin_base_100ep", "swin_base_patch4_window7_224", 0.9, 0.1)


def imagenet_simmim_swin_base_800ep() -> Recipe:
    """swinscale train imagenet_simmim_swin_base_800ep --data IMAGENET --init FILE — 84.0 top-1 at 224/7 (published)."""
    return _after_simmim("imagenet_simmim_swin_base_800ep", "swin_base_patch4_window7_224", 0.8, 0.1)


def imagenet_simmim_swin_large() -> Recipe:
    """swinscale train imagenet_simmim_swin_large --data IMAGENET --init FILE — 85.4 top-1 at 224/14 (published)."""
    return _after_simmim("imagenet_simmim_swin_large", "swin_large_patch4_window14_224", 0.7, 0.2)


def imagenet_simmim_swinv2_base() -> Recipe:
    """swinscale train imagenet_simmim_swinv2_base --data IMAGENET --init FILE — 224/14; accuracy not published alone."""
    return _after_simmim("imagenet_simmim_swinv2_base", "swinv2_base_window12to14_192to224", 0.75, 0.1)


def imagenet_simmim_swinv2_huge_224() -> Recipe:
    """swinscale train imagenet_simmim_swinv2_huge_224 --data IMAGENET --init FILE — 85.7 top-1 (published)."""
    return _after_simmim("imagenet_simmim_swinv2_huge_224", "swinv2_huge_window12to14_192to224", 0.7, 0.3)


def imagenet_simmim_swinv2_huge_512() -> Recipe:
    """swinscale train imagenet_simmim_swinv2_huge_512 --data IMAGENET --init FILE — 87.1 top-1 (published)."""
    return _after_simmim("imagenet_simmim_swinv2_huge_512", "swinv2_huge_window12to32_192to512", 0.7, 0.3)


def imagenet22k_swinv2_giant() -> Recipe:
    """Swin V2-G, stage 2 of the article: supervised at 192/12 after SimMIM, 30 epochs over 70 M images, batch 9216.

    torchrun … -m swinscale train imagenet22k_swinv2_giant --data IMAGES --init runs/simmim_swinv2_giant/last — layer decay
    0.87, RandAugment and Random Erasing, stochastic depth 0.3. Not run with this code at full length.
    """
    optim = replace(GIANT_OPTIM, warmup_epochs=20_000 * 9216 / 70e6, layer_decay=0.87)
    train = TrainConfig(30, 9216, 32, optim, num_workers=8, checkpoint_every=0.05, memory=GIANT_MEMORY)
    model = model_config("swinv2_giant_window12_192", num_classes=0, drop_path_rate=0.3)
    return Recipe("imagenet22k_swinv2_giant", model, ClassifyConfig(), DataConfig(), train)


def imagenet_swinv2_giant_640() -> Recipe:
    """Swin V2-G fine-tuned on ImageNet-1K at 640/40: 10 epochs, batch 576; 90.17 top-1 (published).

    torchrun … -m swinscale train imagenet_swinv2_giant_640 --data IMAGENET --init runs/imagenet22k_swinv2_giant/last — the
    window at 640 pixels is not stated; 40, as the article has it for ADE20K. Not run with this code at full length.
    """
    optim = replace(GIANT_OPTIM, lr=2.1e-5, lr_reference_batch=576, warmup_lr=2.1e-8, min_lr=2.1e-7, warmup_epochs=2)
    train = TrainConfig(10, 576, 4, optim, num_workers=8, checkpoint_every=0.2, memory=GIANT_MEMORY)
    model = model_config("swinv2_giant_window12to40_192to640", num_classes=0, drop_path_rate=0.5)
    return Recipe("imagenet_swinv2_giant_640", model, ClassifyConfig(), DataConfig(crop_ratio=None), train)
