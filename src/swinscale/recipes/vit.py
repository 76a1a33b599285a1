"""SimMIM with timm's plain Vision Transformer, which the article has beside Swin: published settings, and a size for two CPU cores.

Where timm's network differs from the published one is said in ``swinscale.adapters.vit``. These recipes need timm.
"""

from __future__ import annotations

from dataclasses import replace

from swinscale.models.vit_config import ViTConfig
from swinscale.recipes.base import Recipe
from swinscale.recipes.desk import desk_finetune, desk_simmim
from swinscale.recipes.imagenet import imagenet_simmim_swin_base_800ep
from swinscale.recipes.simmim import simmim_swin_base_800ep

_BASE = ViTConfig(num_classes=0, init_values=0.1, drop_path_rate=0.1)
_DESK = ViTConfig(32, 4, 1, num_classes=0, embed_dim=128, depth=6, num_heads=4, init_values=0.1, drop_path_rate=0.0)


def simmim_vit_base_800ep() -> Recipe:
    """ViT-B/16 at 224, 800 epochs, with the settings of ``simmim_swin_base_800ep`` and stochastic depth 0.1.

    swinscale train simmim_vit_base_800ep --data IMAGENET — 16 GPUs × 128 images; 83.8 top-1 after fine-tuning (published, with
    a relative position bias; not run with this code).
    """
    return replace(simmim_swin_base_800ep(), name="simmim_vit_base_800ep", model=_BASE)


def imagenet_simmim_vit_base_800ep() -> Recipe:
    """swinscale train imagenet_simmim_vit_base_800ep --data IMAGENET --init FILE — ViT-B/16 at 224, 83.8 top-1 (published)."""
    recipe = imagenet_simmim_swin_base_800ep()
    train = replace(recipe.train, optim=replace(recipe.train.optim, layer_decay=0.65))
    return replace(recipe, name="imagenet_simmim_vit_base_800ep", model=_BASE, train=train)


def desk_simmim_vit() -> Recipe:
    """SimMIM on the bundled 28-pixel pictures, read at 32: a ViT of 1.2 M parameters, patch 4; else as ``desk_simmim``.

    swinscale train desk_simmim_vit train.precision=bf16 — 15 minutes on one core of a busy machine.
    """
    return replace(desk_simmim(), name="desk_simmim_vit", model=_DESK)


def desk_finetune_vit() -> Recipe:
    """Classification from few labels at 32 pixels, else as ``desk_finetune``; start it from ``desk_simmim_vit``.

    swinscale train desk_finetune_vit --init runs/desk_simmim_vit/last — 1.5 minutes on one core of a busy machine.
    """
    return replace(desk_finetune(), name="desk_finetune_vit", model=replace(_DESK, drop_path_rate=0.1))
