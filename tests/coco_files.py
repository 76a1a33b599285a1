"""Small COCO data sets, written file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = [[10, 10, 30, 10, 30, 26, 10, 26]]
"""A polygon of 20×16 pixels, which fills the box [10, 10, 20, 16]."""


def content(sizes: list[tuple[int, int]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """A COCO file with images 1, 2, … called "1.png", … and the categories 7 "cat" and 3 "dog"."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
        for i, (height, width) in enumerate(sizes, 1)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def entry(number: int, image_id: int = 1, **changes: Any) -> dict[str, Any]:
    """An annotation; ``changes`` of None take the key away."""
    made = {
        "id": number,
        "image_id": image_id,
        "category_id": 7,
        "bbox": [10, 10, 20, 16],
        "segmentation": SQUARE,
        "area": 320,
        "iscrowd": 0,
    }
    made |= changes
    return {key: value for key, value in made.items() if value is not None}


def write(root: Path, annotations: list[dict[str, Any]], sizes: list[tuple[int, int]] | None = None) -> Path:
    """``root`` with annotations/instances_train2017.json and pictures in train2017; returns ``root``."""
    sizes = sizes or [(40, 48), (40, 48)]
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    random = np.random.default_rng(0)
    made = content(sizes, annotations)
    for image in made["images"]:
        pixels = random.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train2017" / image["file_name"])
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(made))
    return root


COLOURS = {"dog": (220, 40, 40), "cat": (40, 80, 220)}
"""Of the rectangles below, by category."""


def rectangles(root: Path, count: int = 12, size: tuple[int, int] = (64, 72), seed: int = 0) -> Path:
    """``root`` with ``count`` noisy pictures of ``size`` (height, width), each with one or two coloured rectangles.

    The colour tells the category. Every fifth picture is empty; the sizes of others differ by a few pixels.
    """
    random = np.random.default_rng(seed)
    sizes, annotations = [], []
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for image_id in range(1, count + 1):
        height, width = (int(side - random.integers(0, 9)) for side in size)
        pixels = random.integers(90, 150, (height, width, 3))
        for place in range(0 if image_id % 5 == 0 else 1 + image_id % 2):  # one in the left half, one in the right
            name = ("cat", "dog")[int(random.integers(2))]
            w, h = (int(side) for side in random.integers(12, 26, 2))
            x = int(random.integers(0, width // 2 - w + 1)) + place * (width // 2)
            y = int(random.integers(0, height - h + 1))
            pixels[y : y + h, x : x + w] = np.array(COLOURS[name]) + random.integers(-20, 20, (h, w, 3))
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            number = len(annotations) + 1
            made = entry(number, image_id, bbox=[x, y, w, h], segmentation=[corners], area=w * h)
            annotations.append(made | {"category_id": {"cat": 7, "dog": 3}[name]})
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "train2017" / f"{image_id}.png")
        sizes.append((height, width))
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content(sizes, annotations)))
    return root
