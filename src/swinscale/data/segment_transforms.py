"""Augmentation and preprocessing for semantic segmentation: image and label map move together.

A transform maps a sample, a dict of ``image`` (C, H, W) uint8 or float and ``target`` (H, W) int64, to one with a
normalised float32 image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.config import suggest
from swinscale.data.detection_transforms import fitted_size
from swinscale.data.instance_paste import uniform
from swinscale.data.label_maps import IGNORED
from swinscale.errors import UsageError
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.transforms import InterpolationMode, v2  # noqa: E402

Sample = dict[str, Any]
Size = tuple[int, int]
Augment = Literal["published", "light", "none"]
AUGMENT = ("published", "light", "none")
TRIES = 10
"""Crops that are looked at; the next one is taken as it is."""
BRIGHTNESS, HUE, FACTORS = 32 / 255, 18 / 180, (0.5, 1.5)


class SegmentTransform:
    """What ``segment_train_transform`` returns."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment,
        crop: Size,
        short: int,
        long: int,
        ratio: tuple[float, float],
        max_share: float,
    ):
        self.augment, self.crop, self.short, self.long = augment, crop, short, long
        self.ratio, self.max_share = ratio, max_share
        self._finish = normalise(mean, std)

    def __call__(self, sample: Sample) -> Sample:
        image, target = sample["image"], sample["target"]
        size = (int(target.shape[0]), int(target.shape[1]))
        if self.augment == "none":
            size = fitted_size(size, self.short, self.long)
            return dict(sample, image=self._finish(resize(image, size)), target=nearest(target, size))
        factor = uniform(*self.ratio)
        size = fitted_size(size, max(1, int(self.short * factor)), max(1, int(self.long * factor)))
        window, target = self._draw_crop(target, size)
        top, left, height, width = window
        image = resize(image, size)[:, top : top + height, left : left + width]
        if uniform(0, 1) < 0.5:
            image, target = image.flip(-1), target.flip(-1)
        if self.augment == "published":
            image = distort(image)
        border = (0, self.crop[1] - width, 0, self.crop[0] - height)
        padded = F.pad(self._finish(image), border), F.pad(target, border, value=IGNORED)
        return dict(sample, image=padded[0], target=padded[1])

    def _draw_crop(self, target: Tensor, size: Size) -> tuple[tuple[int, int, int, int], Tensor]:
        """A window (top, left, height, width) of the image at ``size``, and the target in it."""
        height, width = min(size[0], self.crop[0]), min(size[1], self.crop[1])
        spare = size[0] - height, size[1] - width
        for attempt in range(TRIES + 1):
            window = _whole(spare[0]), _whole(spare[1]), height, width
            kept = nearest(target, size, window)
            if attempt == TRIES or self.max_share == 1 or spare == (0, 0) or self._mixed(kept):
                break
        return window, kept

    def _mixed(self, target: Tensor) -> bool:
        """Whether there is more than one class, and none fills more than ``max_share`` of the pixels that count."""
        counts = torch.bincount(target.flatten() - IGNORED)[1:]
        return int((counts > 0).sum()) > 1 and int(counts.max()) <= self.max_share * int(counts.sum())


def segment_train_transform(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    augment: Augment,
    crop: Size = (512, 512),
    short: int = 512,
    long: int = 2048,
    ratio: tuple[float, float] = (0.5, 2.0),
    max_share: float = 0.75,
) -> SegmentTransform:
    """Augmentation for semantic segmentation. All that is random is drawn from torch's default generator.

    * "published", the recipe of Swin segmenters: the picture fitted, in its own shape, into ``short`` × ``long``
      pixels times a factor drawn from ``ratio``; a crop at a random place, drawn again up to 10 times while it holds
      a single class or one that fills more than ``max_share`` of the pixels that count; a flip of every second image;
      ``distort``; padding at the right and bottom to exactly ``crop``, with zeros after normalisation and with
      ``IGNORED``;
    * "light": the same without ``distort``;
    * "none": the picture fitted into ``short`` × ``long`` pixels, nothing random, no crop, no padding.

    Images are resized with antialiased bilinear interpolation, maps take the nearest pixel.

    Args:
        mean, std: one number per channel, for pixels in [0, 1].
        crop: height and width in pixels.
        short, long: pixels, for the shorter and the longer side.

    Raises:
        UsageError: for values that make no image.
    """
    if augment not in AUGMENT:
        raise UsageError(f"augment='{augment}' is unknown.{suggest(augment, AUGMENT)} Available: {', '.join(AUGMENT)}.")
    if len(crop) != 2 or min(crop) < 1:
        raise UsageError(f"crop={crop} is not allowed: give height and width, at least 1.")
    if not 1 <= short <= long:
        raise UsageError(f"short={short}, long={long}: give sides of at least 1, long not less than short.")
    if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
        raise UsageError(f"ratio={ratio} is not allowed: give the smallest and the largest factor, above 0.")
    if not 0 < max_share <= 1:
        raise UsageError(f"max_share={max_share} is not allowed: it is a share of the pixels, above 0 and at most 1.")
    return SegmentTransform(mean, std, augment, crop, short, long, ratio, max_share)


class _Normalise:
    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._finish = normalise(mean, std)

    def __call__(self, sample: Sample) -> Sample:
        return dict(sample, image=self._finish(sample["image"]))


def segment_eval_transform(mean: Sequence[float], std: Sequence[float]) -> Any:
    """Normalisation alone: image and map keep the size they have."""
    return _Normalise(mean, std)


def normalise(mean: Sequence[float], std: Sequence[float]) -> Any:
    """uint8 or float pixels to float32 with this mean and deviation per channel (for pixels in [0, 1]) taken off."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def resize(image: Tensor, size: Size) -> Tensor:
    """(C, H, W) to (C, *size), with antialiased bilinear interpolation."""
    if tuple(image.shape[-2:]) == size:
        return image
    resized: Tensor = v2.functional.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized


def nearest(target: Tensor, size: Size, window: tuple[int, int, int, int] | None = None) -> Tensor:
    """(H, W) to ``size``, of which ``window`` (top, left, height, width) is kept: the pixel whose centre is nearest."""
    top, left, height, width = window or (0, 0, *size)
    rows = _sources(top, height, size[0], target.shape[0])
    columns = _sources(left, width, size[1], target.shape[1])
    return target.index_select(0, rows).index_select(1, columns)


def _sources(start: int, count: int, resized: int, original: int) -> Tensor:
    places = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * (original / resized)
    return places.long().clamp(max=original - 1)


def distort(image: Tensor) -> Tensor:
    """Photometric distortion (C, H, W): each of the following with probability one half.

    Brightness plus or minus up to 32/255; contrast, a factor from 0.5 to 1.5, either here or at the end; for uint8
    images of three channels saturation, a factor from 0.5 to 1.5, and hue, up to a tenth of the circle either way.
    uint8 images are clipped after each step. For others brightness changes relative to the range of their values, and
    nothing is clipped.

    Returns:
        float32: uint8 pixels become 0 … 1, others keep their scale.
    """
    eight_bits = image.dtype == torch.uint8
    pixels = image.float() / 255 if eight_bits else image.float()

    def clip(changed: Tensor) -> Tensor:
        return changed.clamp_(0, 1) if eight_bits else changed

    if uniform(0, 1) < 0.5:
        scale = 1.0 if eight_bits else float(pixels.max() - pixels.min())
        pixels = clip(pixels + uniform(-BRIGHTNESS, BRIGHTNESS) * scale)
    first, contrast = uniform(0, 1) < 0.5, uniform(0, 1) < 0.5
    if contrast and first:
        pixels = clip(pixels * uniform(*FACTORS))
    if eight_bits and len(pixels) == 3:
        if uniform(0, 1) < 0.5:
            pixels = saturate(pixels, uniform(*FACTORS))
        if uniform(0, 1) < 0.5:
            pixels = v2.functional.adjust_hue(pixels, uniform(-HUE, HUE))
    if contrast and not first:
        pixels = clip(pixels * uniform(*FACTORS))
    return pixels


def saturate(image: Tensor, factor: float) -> Tensor:
    """Saturation of RGB pixels in [0, 1], (3, H, W), times ``factor``, at most 1; hue and the largest channel stay."""
    value = image.amax(0)
    chroma = value - image.amin(0)
    return value - (value - image) * torch.minimum(torch.full_like(value, factor), value / chroma.clamp(min=1e-6))


def _whole(high: int) -> int:
    """A whole number from 0 to ``high``."""
    return int(torch.randint(high + 1, ()))
