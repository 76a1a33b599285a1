"""What a plain Vision Transformer is: one frozen dataclass. The network itself is timm's (``swinscale.adapters.vit``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from swinscale.config import check_ranges
from swinscale.errors import UsageError
from swinscale.models.config import Size, _per_axis

TIMM_NAME = "vit_base_patch16_224"
"""A model of timm that becomes any of ours with the arguments that ``ViTConfig.timm_arguments`` gives."""


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a Vision Transformer (arXiv 2010.11929): by default ViT-B/16, the one of the SimMIM article.

    Args:
        img_size: height and width that the position embedding is made for; at other sizes it is resized.
        patch_size: pixels per token.
        num_classes: outputs of the classifier, which reads the mean of the tokens; 0 for none.
        embed_dim: channels of a token; ``num_heads`` divides it.
        depth: number of blocks.
        mlp_ratio: hidden channels of the MLP over channels.
        init_values: first value of the gain of each branch; 0: branches have none.
        drop_rate: dropout of the positions and inside blocks.
        drop_path_rate: of the last block; it grows with depth.
    """

    img_size: Any = 224
    patch_size: Any = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    init_values: float = 0.0
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size"):
            object.__setattr__(self, name, _per_axis(name, getattr(self, name), 2))
        counts = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
        rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")
        intervals = {**dict.fromkeys(counts, "[1, inf)"), **dict.fromkeys(rates, "[0, 1)")}
        intervals |= {"num_classes": "[0, inf)", "mlp_ratio": "(0, inf)", "init_values": "[0, inf)"}
        check_ranges(self, "model.", **intervals)
        if self.embed_dim % self.num_heads:
            raise UsageError(
                f"embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}: choose widths and heads that fit."
            )

    @property
    def rank(self) -> int:
        """Number of axes of the input."""
        return 2

    def stage_strides(self) -> list[Size]:
        """Pixels per token of the one stage that there is."""
        return [self.patch_size]

    def stage_maps(self, size: Size | None = None) -> list[Size]:
        """The map of tokens for an input of ``size`` pixels (default: ``img_size``), as the one stage that there is."""
        pairs = zip(size or self.img_size, self.patch_size, strict=True)
        return [tuple(math.ceil(pixels / patch) for pixels, patch in pairs)]

    @property
    def num_layers(self) -> int:
        """The largest layer id of ``layer_id``: number of blocks + 1."""
        return self.depth + 1

    def layer_id(self, name: str) -> int:
        """Depth of the parameter ``name`` for layer-wise decay: 0 for embeddings, 1… for blocks, ``num_layers`` for the rest."""
        parts = name.split(".")
        if parts[0] == "blocks":
            return int(parts[1]) + 1
        return 0 if parts[0] in ("patch_embed", "cls_token", "pos_embed") else self.num_layers

    def macs(self, size: Size | None = None) -> int:
        """Multiply–accumulates for one input of ``size`` pixels (default: ``img_size``), without norms and softmax."""
        patches, width = math.prod(self.stage_maps(size)[0]), self.embed_dim
        tokens, hidden = patches + 1, int(self.mlp_ratio * width)
        block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
        return (
            patches * self.in_chans * math.prod(self.patch_size) * width + self.depth * block + width * self.num_classes
        )

    def timm_arguments(self) -> dict[str, Any]:
        """What ``timm.create_model(TIMM_NAME, …)`` needs for this network."""
        return {
            "img_size": self.img_size,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "num_classes": self.num_classes,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "init_values": self.init_values or None,
            "pos_drop_rate": self.drop_rate,
            "proj_drop_rate": self.drop_rate,
            "attn_drop_rate": self.attn_drop_rate,
            "drop_path_rate": self.drop_path_rate,
            "global_pool": "avg",
            "fc_norm": False,
            "dynamic_img_size": True,
            "dynamic_img_pad": True,
        }
