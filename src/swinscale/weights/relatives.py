"""Models that resemble a Swin Transformer and compute something else: each is refused with its reason.

Loaded by name they would give noise, or lose a part in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from swinscale.errors import UsageError

RELATIVES = {
    r"\._moe_layer\.": "a Swin-MoE, whose blocks choose among expert MLPs",
    r"\.spatial_mlp\.": "a SwinMLP, which has no attention",
    r"\.attn\.meta_mlp\.": "timm's swinv2_cr, whose position bias, normalisation and merging differ from Swin V2",
    r"(^|\.)window_attention\.(mapping_qkv|meta_network|tau)\b": (
        "Christoph Reich's Swin V2, whose position bias, normalisation and temperature differ from the published V2"
    ),
    r"^(\w+\.)*layers\.0\.0\.blocks\.|^(\w+\.)*layers1\.0\.blocks\.": (
        "a MONAI SwinViT or SwinUNETR, whose stages and patch merging differ"
    ),
    r"blocks\.\d+\.mlp\.norm\.": "a Feature-Distillation model with a norm inside the MLP, for which Swin V2 has no place",
    r"layers\.\d+\.rel_pos_bias\.": (
        "a Feature-Distillation model whose blocks share one position bias network per stage"
    ),
}
"""A pattern of names → what has them."""


def refuse_relatives(names: Iterable[str]) -> None:
    """Raises ``UsageError`` with the reason if the names are those of a relative."""
    names = list(names)
    for pattern, what in RELATIVES.items():
        if any(re.search(pattern, name) for name in names):
            raise UsageError(f"These weights look like {what}; they cannot be used in a Swin Transformer here.")
