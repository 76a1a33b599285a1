"""Named models. ``create_model("swinv2_tiny_window8_256")`` builds one; names are timm's where timm has the model."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.swin import SwinTransformer

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

ALIASES = {
    "swinv2_huge": "swinv2_huge_window12_192",
    "swinv2_giant": "swinv2_giant_window12_192",
    # timm's names for the same architectures
    "swinv2_base_window12_192_22k": "swinv2_base_window12_192",
    "swinv2_large_window12_192_22k": "swinv2_large_window12_192",
}


def list_models(pattern: str = "") -> list[str]:
    """Names that ``create_model`` knows; ``pattern`` may hold wildcards (``"swinv2_*256"``) or be a part of the name."""
    names = [*VARIANTS, *ALIASES]
    return sorted(n for n in names if fnmatch.fnmatch(n, pattern if "*" in pattern else f"*{pattern}*"))


def model_config(name: str, **overrides: Any) -> SwinConfig:
    """The configuration of a named model with some fields changed.

    Raises:
        UsageError: for an unknown name or field, with the nearest known one.
    """
    key = ALIASES.get(name, name)
    if key not in VARIANTS:
        raise UsageError(f"Unknown model '{name}'.{suggest(name, list_models())} 'swinscale list' shows all names.")
    fields = [f.name for f in dataclasses.fields(SwinConfig)]
    for field in overrides:
        if field not in fields:
            raise UsageError(f"Unknown model setting '{field}'.{suggest(field, fields)} Allowed: {', '.join(fields)}.")
    return dataclasses.replace(VARIANTS[key], **overrides)


def create_model(name: str, **overrides: Any) -> SwinTransformer:
    """Builds a named model with fresh weights: ``create_model("swinv2_tiny_window8_256", num_classes=10, in_chans=4)``.

    Trained weights come from ``swinscale.from_pretrained`` or ``swinscale.load_weights``.

    Raises:
        UsageError: for an unknown name or field, with the nearest known one.
    """
    return SwinTransformer(model_config(name, **overrides))
