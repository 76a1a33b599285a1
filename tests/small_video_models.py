"""Small video models with random values, saved as a run would save them, and films of moving squares for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from random_models import CLIP, random_swin
from swinscale.tasks import ClassifyVideo, SimMIM, SimMIMConfig, VideoConfig

NAMES = ["left", "right", "still"]
MEAN, STD = 0.45, 0.25


def preprocessing(channels: int = 3, classes: list[str] | None = None, **sampling: Any) -> dict[str, Any]:
    how = {"sample": "stride", "stride": 2, "rate": 0.0, **sampling}
    scale = {"mean": [MEAN] * channels, "std": [STD] * channels}
    return {"img_size": [4, 32, 32], "sampling": how, **scale, "classes": classes}


def save_classifier(
    folder: Path,
    version: int = 2,
    *,
    classes: list[str] | None = None,
    options: VideoConfig | None = None,
    sampling: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """A classifier of clips of 4 frames, two apart, of 32×32 pixels: 2 clips × 3 crops of a film; returns ``folder``."""
    classes = classes or NAMES
    model = random_swin(version, **{**CLIP, "num_classes": len(classes), **fields})
    options = options or VideoConfig(test_clips=2, test_crops=3)
    how = preprocessing(model.config.in_chans, classes, **(sampling or {}))
    ClassifyVideo(model, len(classes), options, how).save_pretrained(folder)
    return folder


def save_simmim(folder: Path) -> Path:
    """SimMIM on such clips."""
    model = random_swin(**{**CLIP, "num_classes": 0})
    options = SimMIMConfig(mask_patch=8, mask_mode="tube")
    SimMIM(model, options, preprocessing()).save_pretrained(folder)
    return folder


def moving(count: int = 20, size: tuple[int, int] = (40, 56), step: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Pictures (height, width, 3) uint8 of a bright square that wanders over noise."""
    random = np.random.default_rng(seed)
    top, left = (int(random.integers(0, side)) for side in size)
    pictures = []
    for number in range(count):
        picture = random.integers(20, 90, (*size, 3), dtype=np.uint8)
        rows, columns = (top + np.arange(12)) % size[0], (left + step * number + np.arange(12)) % size[1]
        picture[np.ix_(rows, columns)] = (230, 200, 60)
        pictures.append(picture)
    return pictures
