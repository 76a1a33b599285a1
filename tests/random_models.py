"""Tiny models in which no parameter has a trivial value: a fresh V2 block is the identity, so it would prove nothing. And a variety."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.swin_mlp import SwinMLP, SwinMLPConfig


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Gives every parameter random values, norm gains around 1, and returns the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)
            if name.endswith("logit_scale"):
                parameter.add_(2)
    return model.eval()


def random_swin(version: int = 2, seed: int = 0, **fields: Any) -> SwinTransformer:
    """A Swin of two stages for 32-pixel images, 24 channels wide, with five classes."""
    small = {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
    return randomise(SwinTransformer(SwinConfig(version=version, **{**small, **fields})), seed)


SMALL_MLP: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 3, 2), "num_heads": (2, 3, 6), "window_size": 4,
}  # fmt: skip


def random_mlp(**fields: Any) -> SwinMLP:
    """A SwinMLP of three stages for 32-pixel images with five classes."""
    model = randomise(SwinMLP(SwinMLPConfig(**{**SMALL_MLP, "num_classes": 5, **fields})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "spatial_mlp.bias" in name:
                parameter.mul_(5)  # a bias in the wrong slot shall show
    return model


CLIP = {"img_size": (4, 32, 32), "patch_size": (2, 4, 4), "window_size": (2, 4, 4)}
VARIETY: dict[str, dict[str, Any]] = {
    "V1": {"version": 1},
    "V2": {"version": 2},
    "padded to small maps": {"version": 2, "small_map": "pad", "window_size": 7},
    "sandwich": {"version": 1, "norm_placement": "sandwich"},
    "clips": {"version": 2, **CLIP},
}


def model_and_input(name: str) -> tuple[SwinTransformer, Tensor]:
    """37×22 pixels: 10×6 and 5×3 tokens, padded to windows of 4, and in the second stage smaller than one."""
    model = random_swin(**VARIETY[name])
    size = (37, 22) if model.config.rank == 2 else (4, 37, 22)
    return model, torch.randn(2, 3, *size)
