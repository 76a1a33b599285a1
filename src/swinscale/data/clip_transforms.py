"""Augmentation of clips: (frames, C, H, W) in, what is drawn is drawn once for all frames of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.transforms import InterpolationMode, v2  # noqa: E402


def clip_train_transform(
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    area: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    jitter: float = 0.0,
    randaugment: tuple[int, int] = (0, 0),
    erase: float = 0.0,
) -> Any:
    """Crop, flip and colours, the same for all frames of a clip: uint8 (T, C, h, w) → float32 (T, C, *size).

    Args:
        size: height and width.
        mean, std: one number per channel.
        area: share of the picture that a crop may have.
        flip: probability to mirror a clip; 0 where left and right mean something.
        jitter: largest change of brightness, contrast and saturation; 0: none.
        randaugment: operations per clip and their strength of 10; (0, 0): none. They exist for 1 and 3 channels.
        erase: probability that a rectangle is filled with noise.
    """
    crop = v2.RandomResizedCrop(
        tuple(size), scale=area, ratio=(3 / 4, 4 / 3), interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    steps: list[Any] = [crop]
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if jitter and len(mean) == 3:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    if randaugment[0] and len(mean) in (1, 3):
        count, strength = randaugment
        fill = [round(255 * value) for value in mean]
        steps.append(v2.RandAugment(count, magnitude=strength, num_magnitude_bins=11, fill=fill))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    if erase:
        steps.append(v2.RandomErasing(p=erase, value="random"))
    return v2.Compose(steps)


def clip_eval_transform(mean: Sequence[float], std: Sequence[float], size: Sequence[int] | None = None) -> Any:
    """Normalisation of frames, which decoding has resized: uint8 (T, C, H, W) → float32.

    Args:
        size: height and width of the centre that is cut out; None: frames stay whole.
    """
    centre: list[Any] = [] if size is None else [v2.CenterCrop(tuple(size))]
    return v2.Compose([*centre, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])
