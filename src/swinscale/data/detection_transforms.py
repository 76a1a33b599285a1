"""Augmentation and preprocessing for detection: image, boxes, masks and a semantic map move together.

A transform maps a sample, a dict of ``image`` (C, H, W) uint8 or float, ``boxes`` (n, 4) float32 x1, y1, x2, y2 in pixels,
``labels`` (n,), and where there are any ``masks`` (n, H, W) bool and ``semantic`` (H, W) int64, to one with a normalised
float32 image. Boxes are clipped to the image; instances with a side under one pixel are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from swinscale.config import suggest
from swinscale.data.instance_paste import move_instances, uniform
from swinscale.errors import UsageError
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.transforms import InterpolationMode, v2  # noqa: E402

Sample = dict[str, Any]
Augment = Literal["none", "flip", "multiscale", "crop", "large-scale-jitter"]
AUGMENT = ("none", "flip", "multiscale", "crop", "large-scale-jitter")
IGNORED = 255
"""The class of pixels that no semantic loss counts."""
CROP_SHORT = (400, 500, 600)  # short sides to crop from (SwinTransformer/Swin-Transformer-Object-Detection)
SHORT = tuple(range(480, 801, 32))


class DetectionTransform:
    """What ``detection_train_transform`` and ``detection_eval_transform`` return.

    Attributes:
        needs_masks: ``masks`` must be in the sample.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment,
        short: Sequence[int],
        long: int,
        crop: tuple[int, int],
        jitter_size: tuple[int, int],
        jitter: tuple[float, float],
        paste: float,
    ):
        self.augment, self.short, self.long, self.crop = augment, tuple(short), long, crop
        self.jitter_size, self.jitter, self.paste = jitter_size, jitter, paste
        self.needs_masks = paste > 0
        self._finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])

    def __call__(self, sample: Sample) -> Sample:
        if self.paste and uniform(0, 1) < self.paste:
            sample = move_instances(sample, IGNORED)
        if self.augment != "none" and uniform(0, 1) < 0.5:
            sample = flip(sample)
        if self.augment == "large-scale-jitter":
            sample = self._jitter(sample)
        else:
            if self.augment == "crop" and uniform(0, 1) < 0.5:
                sample = self._crop(sample)
            if self.short:
                chosen = _choice(self.short) if self.augment in ("multiscale", "crop") else self.short[-1]
                sample = resample(sample, fitted_size(_size(sample), chosen, self.long))
            else:
                sample = resample(sample, _size(sample))
        sample = dict(sample, image=self._finish(sample["image"]))
        return pad(sample, self.jitter_size) if self.augment == "large-scale-jitter" else sample

    def _crop(self, sample: Sample) -> Sample:
        """A part whose sides are drawn from ``crop``, of the image at a small scale."""
        height, width = fitted_size(_size(sample), _choice(CROP_SHORT), self.long)
        low, high = self.crop
        crop_height = _whole(min(height, low), min(height, high))
        crop_width = _whole(min(width, low), min(width, high))
        top, left = _whole(0, height - crop_height), _whole(0, width - crop_width)
        return resample(sample, (height, width), (top, left, crop_height, crop_width))

    def _jitter(self, sample: Sample) -> Sample:
        """The image at a random scale, cut to ``jitter_size``. Scale 1 just fits into it."""
        height, width = _size(sample)
        factor = uniform(*self.jitter) * min(self.jitter_size[0] / height, self.jitter_size[1] / width)
        size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        crop_height, crop_width = min(size[0], self.jitter_size[0]), min(size[1], self.jitter_size[1])
        top, left = _whole(0, size[0] - crop_height), _whole(0, size[1] - crop_width)
        return resample(sample, size, (top, left, crop_height, crop_width))


def detection_train_transform(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    augment: Augment,
    short: Sequence[int] = SHORT,
    long: int = 1333,
    crop: tuple[int, int] = (384, 600),
    jitter_size: tuple[int, int] = (1536, 1536),
    jitter: tuple[float, float] = (0.1, 2.0),
    paste: float = 0.0,
) -> DetectionTransform:
    """Augmentation for detection. All that is random is drawn from torch's default generator.

    * "none": the short side to the last of ``short``, the long side at most ``long``; "flip": the same, and a flip of every
      second image;
    * "multiscale": a flip, and the short side one of ``short``;
    * "crop", the published recipe of Swin detectors: a flip; for every second image first the short side to 400, 500 or 600
      and a crop with sides drawn from ``crop`` (it may hold no instance); then as "multiscale";
    * "large-scale-jitter": a flip; the image at ``jitter`` times the size that fits into ``jitter_size``, cut at a random
      place or padded with zeros to exactly this size. Padding has class 255 (ignored) in a semantic map.

    Args:
        mean, std: one number per channel, for pixels in [0, 1].
        short, long, crop, jitter_size: pixels.
        paste: share of images in which instances are moved about first, see ``move_instances``; this needs masks.

    Raises:
        UsageError: for values that make no image.
    """
    if augment not in AUGMENT:
        raise UsageError(f"augment='{augment}' is unknown.{suggest(augment, AUGMENT)} Available: {', '.join(AUGMENT)}.")
    if not short or min(short) < 1 or long < max(short):
        raise UsageError(
            f"short={tuple(short)}, long={long}: give sides of at least 1, long not less than any of short."
        )
    if not 1 <= crop[0] <= crop[1]:
        raise UsageError(f"crop={crop}: give the smallest and the largest side, at least 1.")
    if min(jitter_size) < 1 or not 0 < jitter[0] <= jitter[1]:
        raise UsageError(f"jitter_size={jitter_size}, jitter={jitter}: give a size and a range of scales, above 0.")
    if not 0 <= paste <= 1:
        raise UsageError(f"paste={paste} is not allowed: it is a share of the images, from 0 to 1.")
    return DetectionTransform(mean, std, augment, short, long, crop, jitter_size, jitter, paste)


def detection_eval_transform(
    mean: Sequence[float], std: Sequence[float], short: int | None = 800, long: int = 1333
) -> DetectionTransform:
    """The short side to ``short`` pixels, the long side at most ``long``; None: the size as it is. And normalisation.

    Raises:
        UsageError: for sides under 1, or ``long`` under ``short``.
    """
    if short is None:
        return DetectionTransform(mean, std, "none", (), long, (1, 1), (1, 1), (1, 1), 0)
    return detection_train_transform(mean, std, augment="none", short=(short,), long=long)


def fitted_size(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """The size with this short side and the same shape, or smaller so that the long side is at most ``long``."""
    height, width = size
    factor = min(short / min(size), long / max(size))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resample(sample: Sample, size: tuple[int, int], window: tuple[int, int, int, int] | None = None) -> Sample:
    """Resizes to ``size`` (height, width), of which ``window`` (top, left, height, width) is kept.

    Images are resized with antialiased bilinear interpolation; masks and maps take the nearest pixel, and only inside the
    window: at twice the size, the masks of a crowded photo would fill gigabytes.
    """
    height, width = _size(sample)
    top, left, kept_height, kept_width = window or (0, 0, *size)
    image = sample["image"]
    if size != (height, width):
        image = v2.functional.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    image = image[:, top : top + kept_height, left : left + kept_width]
    corner, scale = torch.tensor([left, top] * 2), torch.tensor([size[1] / width, size[0] / height] * 2)
    limits = torch.tensor([kept_width, kept_height] * 2, dtype=torch.float32)
    boxes = torch.minimum((sample["boxes"] * scale - corner).clamp(min=0), limits)
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    made = dict(sample, image=image, boxes=boxes[keep], labels=sample["labels"][keep])
    rows = ((torch.arange(top, top + kept_height) + 0.5) * (height / size[0])).long().clamp(max=height - 1)
    columns = ((torch.arange(left, left + kept_width) + 0.5) * (width / size[1])).long().clamp(max=width - 1)
    if "masks" in sample:
        made["masks"] = sample["masks"][keep].index_select(1, rows).index_select(2, columns)
    if "semantic" in sample:
        made["semantic"] = sample["semantic"].index_select(0, rows).index_select(1, columns)
    return made


def flip(sample: Sample) -> Sample:
    """Mirrors left and right."""
    width = sample["image"].shape[-1]
    x1, y1, x2, y2 = sample["boxes"].unbind(1)
    made = dict(sample, image=sample["image"].flip(-1), boxes=torch.stack([width - x2, y1, width - x1, y2], 1))
    return made | {name: sample[name].flip(-1) for name in ("masks", "semantic") if name in sample}


def pad(sample: Sample, size: tuple[int, int]) -> Sample:
    """Zeros at the right and bottom up to ``size`` (height, width); in a semantic map class 255."""
    height, width = _size(sample)
    border = (0, size[1] - width, 0, size[0] - height)
    made = dict(sample, image=F.pad(sample["image"], border))
    if "masks" in sample:
        made["masks"] = F.pad(sample["masks"], border)
    if "semantic" in sample:
        made["semantic"] = F.pad(sample["semantic"], border, value=IGNORED)
    return made


def _size(sample: Sample) -> tuple[int, int]:
    """Height and width of the image."""
    height, width = sample["image"].shape[-2:]
    return height, width


def _whole(low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, ()))


def _choice(values: Sequence[int]) -> int:
    return values[int(torch.randint(len(values), ()))]
