"""Small data sets of images with label maps, written file by file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ((120, 120, 120), (220, 40, 40), (40, 80, 220))
"""Of the classes of ``shapes``, in the pictures: ground, rectangle, disc."""
CLASSES = "ground,120,120,120\nrectangle,220,40,40\ndisc,40,80,220\n"
"""The same as a list of classes."""


def save(path: Path, pixels: Any) -> Path:
    """Writes an array (H, W) or (H, W, 3) as a picture, or as an array for .npy; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(pixels)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


def pair(root: Path, image: str, label_map: str, labels: Any) -> None:
    """A grey picture ``image`` and ``label_map`` with ``labels`` (H, W), both below ``root``."""
    labels = np.asarray(labels, dtype=np.uint8)
    save(root / image, np.full((*labels.shape, 3), 90, dtype=np.uint8))
    save(root / label_map, labels)


def shapes(
    root: Path,
    counts: dict[str, int] | None = None,
    size: tuple[int, int] = (64, 72),
    seed: int = 0,
    layout: tuple[str, str] = ("images/{}", "annotations/{}"),
) -> Path:
    """``root`` with noisy pictures of ``size`` (height, width), each with a rectangle or a disc or both, and their maps.

    Labels are 0 ground, 1 rectangle, 2 disc, and 255 on a frame of one pixel. The colour tells the class; sizes differ by
    a few pixels.

    Args:
        counts: pictures per part; the default is 8 "training" and 4 "validation" ones.
        layout: folders of pictures and maps, with {} for the part.
    """
    random = np.random.default_rng(seed)
    for part, count in (counts or {"training": 8, "validation": 4}).items():
        for number in range(count):
            height, width = (int(side - random.integers(0, 9)) for side in size)
            labels = np.zeros((height, width), dtype=np.uint8)
            rows, columns = np.mgrid[:height, :width]
            if number % 3 != 1:
                top, left = int(random.integers(2, height // 3)), int(random.integers(2, width // 4))
                labels[top : top + height // 2, left : left + width // 3] = 1
            if number % 3 != 0:
                row, column = random.integers(height // 3, 2 * height // 3), random.integers(width // 2, 3 * width // 4)
                labels[(rows - row) ** 2 + (columns - column) ** 2 < (min(size) / 5) ** 2] = 2
            pixels = np.array(COLOURS)[labels] + random.integers(-20, 20, (height, width, 3))
            labels[[0, -1]], labels[:, [0, -1]] = 255, 255
            name = f"{number}.png"
            save(root / layout[0].format(part) / name, pixels.clip(0, 255).astype(np.uint8))
            save(root / layout[1].format(part) / name, labels)
    return root
