"""Named models. ``create_model("swinv2_tiny_window8_256")`` builds one; names are timm's where timm has the model."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.lrnet import LRNet
from swinscale.models.lrnet_config import LRNetConfig
from swinscale.models.swin import SwinTransformer
from swinscale.models.swin_mlp import SwinMLP, SwinMLPConfig
from swinscale.models.vit_config import ViTConfig

ModelConfig = SwinConfig | SwinMLPConfig | LRNetConfig | ViTConfig
"""What describes a network. ``build_model`` makes one of it; a ``ViTConfig`` is for ``swinscale.adapters.vit.ViT``."""

# Sizes of both articles: width, depths, heads. Heads of Huge and Giant are not stated there; all other models have 32
# channels per head, and so have these.
TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
HUGE = {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (11, 22, 44, 88), "main_norm_interval": 6}
GIANT = {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128), "main_norm_interval": 6}

# For images of 28 to 64 pixels: fewer stages and small patches, so that the last map is not a single token.
MICRO = {"embed_dim": 32, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "patch_size": 2}
MINI = {"embed_dim": 64, "depths": (2, 4, 2), "num_heads": (2, 4, 8), "patch_size": 2}
PICO = {"embed_dim": 64, "depths": (4, 4), "num_heads": (2, 4), "patch_size": 4}
# For photos on a laptop: the four stages of the article at a third or half of Tiny's width.
FEMTO = {"embed_dim": 32, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8)}
NANO = {"embed_dim": 48, "depths": (2, 2, 4, 2), "num_heads": (2, 4, 8, 16)}


def _v1(size: dict[str, Any], window: int, image: int, drop_path: float, **more: Any) -> SwinConfig:
    return SwinConfig(version=1, window_size=window, img_size=image, drop_path_rate=drop_path, **{**size, **more})


def _v2(size: dict[str, Any], window: int, image: int, drop_path: float, **more: Any) -> SwinConfig:
    return SwinConfig(version=2, window_size=window, img_size=image, drop_path_rate=drop_path, **{**size, **more})


def _clips(config: SwinConfig, frames: int, window: tuple[int, int, int], **more: Any) -> SwinConfig:
    """The same network for clips of so many frames of its pictures, two frames to a token; 400 classes are those of Kinetics."""
    sides, patch = config.img_size, (2, *config.patch_size)
    clip: dict[str, Any] = {
        "img_size": (frames, *sides),
        "patch_size": patch,
        "window_size": window,
        "num_classes": 400,
    }
    return dataclasses.replace(config, pretrained_window_sizes=0, **{**clip, **more})


FROM_192 = (12, 12, 12, 6)  # windows of a model trained at 192 pixels with window 12: the last map is 6x6

VARIANTS: dict[str, SwinConfig] = {
    # Swin V1
    "swin_tiny_patch4_window7_224": _v1(TINY, 7, 224, 0.2),
    "swin_small_patch4_window7_224": _v1(SMALL, 7, 224, 0.3),
    "swin_base_patch4_window7_224": _v1(BASE, 7, 224, 0.5),
    "swin_base_patch4_window12_384": _v1(BASE, 12, 384, 0.5),
    "swin_large_patch4_window7_224": _v1(LARGE, 7, 224, 0.2),
    "swin_large_patch4_window12_384": _v1(LARGE, 12, 384, 0.2),
    "swin_tiny_c24_patch4_window8_256": _v1({**TINY, "num_heads": (4, 8, 16, 32)}, 8, 256, 0.2),
    # SimMIM's Swin V1 models: pre-trained at 192, fine-tuned at 224
    "swin_base_patch4_window6_192": _v1(BASE, 6, 192, 0.0),
    "swin_large_patch4_window12_192": _v1(LARGE, 12, 192, 0.0),
    "swin_large_patch4_window14_224": _v1(LARGE, 14, 224, 0.2),
    # Swin V2
    "swinv2_tiny_window8_256": _v2(TINY, 8, 256, 0.2),
    "swinv2_tiny_window16_256": _v2(TINY, 16, 256, 0.2),
    "swinv2_small_window8_256": _v2(SMALL, 8, 256, 0.3),
    "swinv2_small_window16_256": _v2(SMALL, 16, 256, 0.3),
    "swinv2_base_window8_256": _v2(BASE, 8, 256, 0.5),
    "swinv2_base_window16_256": _v2(BASE, 16, 256, 0.5),
    "swinv2_base_window12_192": _v2(BASE, 12, 192, 0.2),
    "swinv2_base_window12to14_192to224": _v2(BASE, 14, 224, 0.1, pretrained_window_sizes=FROM_192),
    "swinv2_base_window12to16_192to256": _v2(BASE, 16, 256, 0.2, pretrained_window_sizes=FROM_192),
    "swinv2_base_window12to24_192to384": _v2(BASE, 24, 384, 0.2, pretrained_window_sizes=FROM_192),
    "swinv2_large_window12_192": _v2(LARGE, 12, 192, 0.2),
    "swinv2_large_window12to16_192to256": _v2(LARGE, 16, 256, 0.2, pretrained_window_sizes=FROM_192),
    "swinv2_large_window12to24_192to384": _v2(LARGE, 24, 384, 0.2, pretrained_window_sizes=FROM_192),
    "swinv2_huge_window12_192": _v2(HUGE, 12, 192, 0.3),
    "swinv2_huge_window12to14_192to224": _v2(HUGE, 14, 224, 0.3, pretrained_window_sizes=FROM_192),
    "swinv2_huge_window12to32_192to512": _v2(HUGE, 32, 512, 0.3, pretrained_window_sizes=FROM_192),
    "swinv2_giant_window12_192": _v2(GIANT, 12, 192, 0.3),
    "swinv2_giant_window12to40_192to640": _v2(GIANT, 40, 640, 0.5, pretrained_window_sizes=FROM_192),
    # The "giant" of the data-scaling study of masked image modelling (arXiv 2206.04664): 1.06 B parameters
    "swinv2_giant_c448_window12_192": _v2({**LARGE, "embed_dim": 448, "num_heads": (14, 28, 56, 112)}, 12, 192, 0.3),
    # Clips: Video Swin (arXiv 2106.13230), and Swin V2 built in the same way
    "swin3d_tiny_patch244_window877_224": _clips(_v1(TINY, 7, 224, 0.1), 32, (8, 7, 7)),
    "swin3d_small_patch244_window877_224": _clips(_v1(SMALL, 7, 224, 0.1), 32, (8, 7, 7)),
    "swin3d_base_patch244_window877_224": _clips(_v1(BASE, 7, 224, 0.3), 32, (8, 7, 7)),
    "swin3d_base_patch244_window1677_224": _clips(_v1(BASE, 7, 224, 0.4), 32, (16, 7, 7), num_classes=174),
    "swin3d_large_patch244_window877_224": _clips(_v1(LARGE, 7, 224, 0.2), 32, (8, 7, 7)),
    "swin3d_large_patch244_window81212_384": _clips(_v1(LARGE, 12, 384, 0.2), 32, (8, 12, 12)),
    "swin3dv2_tiny_window888_256": _clips(_v2(TINY, 8, 256, 0.1), 32, (8, 8, 8)),
    "swin3dv2_small_window888_256": _clips(_v2(SMALL, 8, 256, 0.1), 32, (8, 8, 8)),
    "swin3dv2_base_window888_256": _clips(_v2(BASE, 8, 256, 0.3), 32, (8, 8, 8)),
    "swin3dv2_giant_window81616_256": _clips(_v2(GIANT, 16, 256, 0.3), 16, (8, 16, 16)),
    "swin3dv2_giant_window82020_320": _clips(_v2(GIANT, 20, 320, 0.3), 16, (8, 20, 20)),
    "swin3dv2_giant_window82424_384": _clips(_v2(GIANT, 24, 384, 0.3), 16, (8, 24, 24)),
    "swin3d_pico_patch244_window844_64": _clips(_v1(PICO, 4, 64, 0.1), 16, (8, 4, 4)),
    "swin3dv2_pico_window844_64": _clips(_v2(PICO, 4, 64, 0.1), 16, (8, 4, 4)),
    # Small images and small machines
    "swin_pico_patch4_window4_32": _v1(PICO, 4, 32, 0.1),
    "swinv2_pico_patch4_window4_32": _v2(PICO, 4, 32, 0.1),
    "swin_micro_patch2_window4_32": _v1(MICRO, 4, 32, 0.1),
    "swinv2_micro_patch2_window4_32": _v2(MICRO, 4, 32, 0.1),
    "swin_mini_patch2_window4_32": _v1(MINI, 4, 32, 0.1),
    "swinv2_mini_patch2_window4_32": _v2(MINI, 4, 32, 0.1),
    "swinv2_mini_patch2_window8_64": _v2(MINI, 8, 64, 0.1),
    "swinv2_femto_window8_128": _v2(FEMTO, 8, 128, 0.1),
    "swin_nano_patch4_window7_112": _v1(NANO, 7, 112, 0.1),
    "swinv2_nano_window8_128": _v2(NANO, 8, 128, 0.1),
}

LRNETS: dict[str, LRNetConfig] = {
    # arXiv 1904.11491, beside ResNets of as many layers
    "lrnet26": LRNetConfig(depths=(2, 2, 2, 2)),
    "lrnet50": LRNetConfig(),
    "lrnet101": LRNetConfig(depths=(3, 4, 23, 3)),
    # Small images and small machines: what a "micro" and a "femto" Swin compute, at 32 and 128 pixels
    "lrnet_micro": LRNetConfig(
        32, depths=(2, 2, 2), widths=(32, 64, 128), stage_dims=(96, 192, 384), stem_width=32, stem_stride=2
    ),
    "lrnet_femto": LRNetConfig(
        128, depths=(2, 2, 2, 2), widths=(48, 96, 192, 384), stage_dims=(96, 192, 384, 768), stem_width=32
    ),
}


def _mixer(size: dict[str, Any], window: int, image: int, drop_path: float) -> SwinMLPConfig:
    return SwinMLPConfig(window_size=window, img_size=image, drop_path_rate=drop_path, **size)


MIXERS: dict[str, SwinMLPConfig] = {  # by channels per head; published: 79.4, 79.6, 79.7 and 81.3 % on ImageNet
    "swin_mixer_tiny_c24_patch4_window8_256": _mixer({**TINY, "num_heads": (4, 8, 16, 32)}, 8, 256, 0.2),
    "swin_mixer_tiny_c12_patch4_window8_256": _mixer({**TINY, "num_heads": (8, 16, 32, 64)}, 8, 256, 0.2),
    "swin_mixer_tiny_c6_patch4_window8_256": _mixer({**TINY, "num_heads": (16, 32, 64, 128)}, 8, 256, 0.2),
    "swin_mixer_base_patch4_window7_224": _mixer(BASE, 7, 224, 0.5),
}

ALIASES = {
    "swinv2_huge": "swinv2_huge_window12_192",
    "swinv2_giant": "swinv2_giant_window12_192",
    # torchvision's names for the same architectures
    "swin3d_t": "swin3d_tiny_patch244_window877_224",
    "swin3d_s": "swin3d_small_patch244_window877_224",
    "swin3d_b": "swin3d_base_patch244_window877_224",
    # timm's
    "swinv2_base_window12_192_22k": "swinv2_base_window12_192",
    "swinv2_large_window12_192_22k": "swinv2_large_window12_192",
}


def list_models(pattern: str = "") -> list[str]:
    """Names that ``create_model`` knows; ``pattern`` may hold wildcards (``"swinv2_*256"``) or be a part of the name."""
    names = [*VARIANTS, *MIXERS, *LRNETS, *ALIASES]
    return sorted(n for n in names if fnmatch.fnmatch(n, pattern if "*" in pattern else f"*{pattern}*"))


def model_config(name: str, **overrides: Any) -> Any:
    """The configuration of a named model with some fields changed: a ``SwinConfig``, or for an LR-Net an ``LRNetConfig``.

    Raises:
        UsageError: for an unknown name or field, with the nearest known one.
    """
    known: dict[str, Any] = {**VARIANTS, **MIXERS, **LRNETS}
    key = ALIASES.get(name, name)
    if key not in known:
        raise UsageError(f"Unknown model '{name}'.{suggest(name, list_models())} 'swinscale list' shows all names.")
    check_fields(known[key], overrides)
    return dataclasses.replace(known[key], **overrides)


def config_class(values: Mapping[str, Any]) -> type[ModelConfig]:
    """Which kind of configuration the fields in ``values`` are of."""
    if "token_mixing" in values:
        return SwinMLPConfig
    if "init_values" in values:
        return ViTConfig
    return LRNetConfig if "widths" in values else SwinConfig


def is_network(module: Any) -> bool:
    """Whether ``module`` is what a ``ModelConfig`` describes: a ``SwinTransformer``, an ``LRNet``, or the ViT of ``adapters``."""
    return isinstance(module, (SwinTransformer, LRNet)) or isinstance(getattr(module, "config", None), ViTConfig)


def check_fields(config: Any, settings: Iterable[str]) -> None:
    """Raises UsageError for a setting that is no field of ``config`` (a configuration, or the class of one)."""
    fields = [f.name for f in dataclasses.fields(config)]
    for field in settings:
        if field not in fields:
            raise UsageError(f"Unknown model setting '{field}'.{suggest(field, fields)} Allowed: {', '.join(fields)}.")


def build_model(config: ModelConfig) -> Any:
    """The network that ``config`` describes, with fresh weights: a ``SwinTransformer``, ``SwinMLP`` or ``LRNet``."""
    if isinstance(config, ViTConfig):
        raise UsageError("timm makes the network of a ViTConfig: swinscale.adapters.vit.ViT(config).")
    if isinstance(config, LRNetConfig):
        return LRNet(config)
    return SwinMLP(config) if isinstance(config, SwinMLPConfig) else SwinTransformer(config)


def create_model(name: str, **overrides: Any) -> Any:
    """Builds a named model with fresh weights: ``create_model("swinv2_tiny_window8_256", num_classes=10, in_chans=4)``.

    Trained weights come from ``swinscale.from_pretrained`` or ``swinscale.load_weights``.

    Returns: a ``SwinTransformer``, or for the name of an LR-Net an ``LRNet``.

    Raises:
        UsageError: for an unknown name or field, with the nearest known one.
    """
    return build_model(model_config(name, **overrides))
