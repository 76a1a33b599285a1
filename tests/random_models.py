"""Tiny models in which no parameter has a trivial value: a fresh V2 block is the identity, so it would prove nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swinscale.models import SwinConfig, SwinTransformer


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
