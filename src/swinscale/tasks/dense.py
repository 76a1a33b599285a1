"""What tasks over whole pictures have in common: a model with a backbone inside, and classes with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from swinscale.config import to_dict
from swinscale.errors import UsageError
from swinscale.models.swin import SwinTransformer
from swinscale.tasks.base import Task
from swinscale.weights import save_pretrained

SMALL = 32
"""Side of the part of a picture that is enough for a forward pass whose result nobody needs."""


class DenseTask(Task):
    """A detector or a segmenter with its objective.

    Args:
        model: has ``body.backbone``, ``num_classes`` and ``config``.
        classes: their names.
    """

    higher_is_better = True
    name: str
    """Of the task, as a checkpoint records it."""
    model: Any
    config: Any

    def __init__(self, model: Any, classes: Sequence[str], preprocessing: dict[str, Any] | None = None):
        super().__init__()
        if len(classes) != model.num_classes:
            raise UsageError(f"{len(classes)} names of classes for a model of {model.num_classes}: give one for each.")
        self.classes, self.preprocessing = list(classes), preprocessing or {}

    @property
    def backbone(self) -> SwinTransformer:
        inside: SwinTransformer = self.model.backbone
        return inside

    @property
    def num_layers(self) -> int:
        return self.backbone.config.num_layers

    def layer_id(self, name: str) -> int:
        inside = name.startswith("model.body.backbone.")
        return self.backbone.config.layer_id(name.removeprefix("model.body.backbone.")) if inside else self.num_layers

    def no_weight_decay(self) -> set[str]:
        return {f"model.body.backbone.{name}" for name in self.backbone.no_weight_decay()}

    def save_pretrained(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        settings = to_dict(self.config)
        metadata = {"task": {"name": self.name, **settings}, "preprocessing": self.preprocessing}
        state = state and {name.removeprefix("model."): tensor for name, tensor in state.items()}
        save_pretrained(self.model, directory, metadata=metadata, state=state)


def sizes_of(sizes: Tensor) -> list[tuple[int, int]]:
    """(B, 2) → height and width of each image."""
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def fitted(images: Tensor, short: float, long: float, antialias: bool = True) -> Tensor:
    """(…, C, H, W) resized, bilinearly, to this short side, or less so that the long side is at most ``long``.

    Args:
        antialias: where pictures become smaller, average over all pixels; False: as OpenCV does it.
    """
    height, width = images.shape[-2:]
    factor = min(short / min(height, width), long / max(height, width))
    size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    if size == (height, width):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    small = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=antialias and factor < 1)
    return small.reshape(*images.shape[:-2], *size)
