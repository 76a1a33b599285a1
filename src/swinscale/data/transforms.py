"""Augmentation and preprocessing as torchvision pipelines, for any number of channels and rectangular sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from swinscale.errors import UsageError
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.transforms import InterpolationMode, v2  # noqa: E402

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalisation(
    channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel for pixels in [0, 1]. Default: ImageNet's for three channels, else 0.5.

    Raises:
        UsageError: if their length is neither 1 nor ``channels``, or a deviation is not positive.
    """
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
    full = []
    for name, given, usual in (("mean", mean, default[0]), ("std", std, default[1])):
        values = tuple(usual if given is None else given)
        if len(values) not in (1, channels) or (name == "std" and min(values) <= 0):
            raise UsageError(
                f"data.{name}={values}: give 1 or {channels} numbers (one per channel), deviations above 0."
            )
        full.append(values * channels if len(values) == 1 else values)
    return full[0], full[1]


def _finish(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def simmim_transform(size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Any:
    """SimMIM's augmentation: a crop of 67 % to 100 % of the area, and a flip; nothing else (microsoft/SimMIM)."""
    crop = v2.RandomResizedCrop(tuple(size), scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *_finish(mean, std)])


def train_transform(
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    augment: Literal["imagenet", "light", "none"] = "imagenet",
) -> Any:
    """Augmentation for classification.

    "imagenet" is the published recipe: random resized crop (8 % to 100 %), flip, RandAugment (2 operations, magnitude 9 of
    31), random erasing (25 %). RandAugment's colour operations exist for 1 and 3 channels; other inputs go without it.
    "light": a crop of at least half the area and a flip. "none": resize.
    """
    bicubic = InterpolationMode.BICUBIC
    if augment == "none":
        return v2.Compose([v2.Resize(tuple(size), bicubic, antialias=True), *_finish(mean, std)])
    scale = (0.08, 1.0) if augment == "imagenet" else (0.5, 1.0)
    steps: list[Any] = [
        v2.RandomResizedCrop(tuple(size), scale=scale, ratio=(3 / 4, 4 / 3), interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if augment == "light":
        return v2.Compose([*steps, *_finish(mean, std)])
    if len(mean) in (1, 3):
        steps.append(v2.RandAugment(num_ops=2, magnitude=9))
    return v2.Compose([*steps, *_finish(mean, std), v2.RandomErasing(p=0.25)])


def eval_transform(
    size: Sequence[int], mean: Sequence[float], std: Sequence[float], crop_ratio: float | None = 224 / 256
) -> Any:
    """Resize so that the centre crop is ``crop_ratio`` of it, then crop; None: resize straight to ``size``."""
    height, width = size
    if crop_ratio is None:
        steps: list[Any] = [v2.Resize((height, width), InterpolationMode.BICUBIC, antialias=True)]
    else:
        steps = [
            _CoverResize(math.floor(height / crop_ratio), math.floor(width / crop_ratio)),
            v2.CenterCrop((height, width)),
        ]
    return v2.Compose([*steps, *_finish(mean, std)])


class _CoverResize(v2.Transform):
    """Resizes, keeping the aspect ratio, so that the result just covers ``height`` × ``width``."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        h, w = inpt.shape[-2:]
        factor = max(self.height / h, self.width / w)
        size = [max(self.height, round(h * factor)), max(self.width, round(w * factor))]
        return v2.functional.resize(inpt, size, InterpolationMode.BICUBIC, antialias=True)
