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


class Augmentation(v2.Compose):
    """Random transforms that begin with a crop.

    Attributes:
        decode_size: (height, width) from which the smallest crop still has twice the pixels it is resized to, so that
            large JPEG files may be decoded at a smaller scale; None: decode in full.
    """

    def __init__(self, steps: Sequence[Any], decode_size: tuple[int, int] | None = None):
        super().__init__(list(steps))
        self.decode_size = decode_size


def _crop_and_flip(
    size: Sequence[int], smallest: float, interpolation: InterpolationMode
) -> tuple[list[Any], tuple[int, int]]:
    """A random resized crop of at least the share ``smallest`` of the area and a flip, with the size to decode at."""
    height, width = size
    ratio = (3 / 4, 4 / 3)
    crop = v2.RandomResizedCrop(
        (height, width), scale=(smallest, 1.0), ratio=ratio, interpolation=interpolation, antialias=True
    )
    side = math.sqrt(smallest * ratio[0])  # shortest side of a crop over the side of a square picture
    return [crop, v2.RandomHorizontalFlip()], (math.ceil(2 * height / side), math.ceil(2 * width / side))


def _finish(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def simmim_transform(size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Augmentation:
    """SimMIM's augmentation: a crop of 67 % to 100 % of the area, and a flip; nothing else (microsoft/SimMIM)."""
    steps, decode_size = _crop_and_flip(size, 0.67, InterpolationMode.BILINEAR)
    return Augmentation([*steps, *_finish(mean, std)], decode_size)


def train_transform(
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    augment: Literal["imagenet", "light", "none"] = "imagenet",
) -> Augmentation:
    """Augmentation for classification.

    * "imagenet", the published recipe (microsoft/Swin-Transformer, data/build.py): random resized crop (8 % to 100 %),
      flip, RandAugment of 2 operations, each at 9/10 of its strength and applied to every second image (timm's rand-m9;
      its jitter of the strength and its operations Invert and SolarizeAdd are left out), erasing of a rectangle with noise
      (25 %). RandAugment's colour operations exist for 1 and 3 channels and clip to [0, 1]; other inputs go without it.
    * "light": a crop of at least half the area and a flip.
    * "none": resize.

    Args:
        mean, std: one number per channel.
    """
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    if augment == "none":
        return Augmentation([v2.Resize(tuple(size), bicubic, antialias=True), *_finish(mean, std)])
    steps, decode_size = _crop_and_flip(size, 0.08 if augment == "imagenet" else 0.5, bicubic)
    to_float, normalise = _finish(mean, std)
    steps.append(to_float)
    if augment == "imagenet" and len(mean) in (1, 3):
        operation = v2.RandAugment(1, magnitude=9, num_magnitude_bins=11, interpolation=bilinear, fill=list(mean))
        steps += [v2.RandomApply([operation], p=0.5)] * 2
    steps.append(normalise)
    if augment == "imagenet":
        steps.append(v2.RandomErasing(p=0.25, value="random"))
    return Augmentation(steps, decode_size)


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


def published_transform(size: int, resize: int | None, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Evaluation as published, on Pillow's pictures: short side to ``resize``, centre crop; None: straight to ``size``.

    ``eval_transform`` differs from it by the rounding of the long side and of Pillow's filter.

    Args:
        size: height and width of the result.

    Returns:
        A map from uint8 (3, H, W) to float32 (3, size, size).
    """
    bicubic = InterpolationMode.BICUBIC
    if resize is None:
        steps: list[Any] = [v2.Resize((size, size), bicubic)]
    else:
        steps = [v2.Resize(resize, bicubic), v2.CenterCrop(size)]
    return v2.Compose([v2.ToPILImage(), *steps, v2.ToImage(), *_finish(mean, std)])


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
