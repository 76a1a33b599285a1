"""What recipes of object detection have of their own: data in COCO format, and how it becomes inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swinscale.config import check_ranges
from swinscale.data import normalisation
from swinscale.data.coco import CocoSource, open_coco
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import detection_eval_transform, detection_train_transform
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.models import SwinConfig
from swinscale.recipes.parts import training_and_held


@dataclass(frozen=True)
class DetectionDataConfig:
    """Which images and annotations, and how they become inputs.

    Args:
        train: a folder in COCO's layout (``annotations/instances_train2017.json``, ``train2017/``), or an annotation file.
        eval: the same for evaluation. None: the split of that name beside the training images, else a share
            ``eval_fraction`` of them.
        eval_split: which split of ``train`` is evaluated on when ``eval`` is None; the other one where it is missing.
        augment: "none", "flip", "multiscale" (flip, and a short side of ``short``), "crop" (the same, or half of the time a crop
            before it), or "large-scale-jitter" (scale, flip, and a crop or padding to ``jitter_size``).
        short: short sides in training, at most ``long`` for the long side. Without "multiscale" the last one counts.
        crop: smallest and largest side of a crop.
        jitter: smallest and largest scale, relative to ``jitter_size``.
        paste: how often the objects of a picture are moved, turned and rescaled a little (InstaBoost).
        semantic: a folder of semantic maps, PNG files named like the pictures, for a semantic branch with classes of its own.
        test_short, test_long: size in evaluation and use.
        mean, std: per channel, for pixels in [0, 1]. None: ImageNet's for three channels, 0.5 for others.
        eval_limit: evaluate on so many images, spread evenly; 0: on all.
        limit: train and evaluate on the same few images, so many and spread evenly over the training images, without
            augmentation; 0: on all.
    """

    train: str = ""
    eval: str | None = None
    eval_split: Literal["val", "test"] = "val"
    eval_fraction: float = 0.1
    augment: Literal["none", "flip", "multiscale", "crop", "large-scale-jitter"] = "crop"
    short: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    long: int = 1333
    crop: tuple[int, int] = (384, 600)
    jitter_size: tuple[int, int] = (1536, 1536)
    jitter: tuple[float, float] = (0.1, 2.0)
    paste: float = 0.0
    semantic: str = ""
    test_short: int = 800
    test_long: int = 1333
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    eval_limit: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        sides = dict.fromkeys(("short", "long", "crop", "jitter_size", "test_short", "test_long"), "[1, inf)")
        counts = dict.fromkeys(("eval_limit", "limit"), "[0, inf)")
        check_ranges(self, "data.", eval_fraction="(0, 1)", jitter="(0, inf)", paste="[0, 1]", **sides, **counts)
        if not self.short:
            raise UsageError("data.short=() is not allowed: name at least one short side.")
        for name in ("crop", "jitter"):
            if getattr(self, name)[0] > getattr(self, name)[1]:
                raise UsageError(f"data.{name}={getattr(self, name)}: the smaller number comes first.")


def open_detection_sources(data: Any, task: DetectConfig, seed: int) -> tuple[CocoSource, CocoSource]:
    """Training and evaluation images with their annotations.

    Raises:
        UsageError: for data that is missing, is not in COCO's format, or whose parts have different classes.
    """
    if not isinstance(data, DetectionDataConfig):
        raise UsageError(f"A recipe that detects objects needs data=DetectionDataConfig(…), not {type(data).__name__}.")
    if not data.train:
        raise UsageError("No images are named: add --data PATH, a folder in COCO's layout or an annotation file.")
    training, held = training_and_held(data, seed, lambda place, part: open_coco(place, part, masks=task.masks))
    if held.classes != training.classes:
        only = sorted(set(held.classes) ^ set(training.classes))
        raise UsageError(
            f"Training and evaluation annotations have different categories (in one alone: {', '.join(only[:5])}). "
            f"Give both the same list."
        )
    for part, source in (("training", training), ("evaluation", held)):
        if all(a["iscrowd"] for index in range(len(source)) for a in source.annotations[index]):
            raise UsageError(f"Not one of the {len(source)} {part} images of {data.train} has an annotated object.")
    return training, held


def detection_preprocessing(model: SwinConfig, data: DetectionDataConfig, classes: list[str]) -> dict[str, Any]:
    """How pictures become inputs of this detector, for the checkpoint."""
    mean, std = normalisation(model.in_chans, data.mean, data.std)
    sides = {"test_short": data.test_short, "test_long": data.test_long}
    return {**sides, "mean": list(mean), "std": list(std), "classes": classes}


def detection_datasets(
    model: SwinConfig,
    task: DetectConfig,
    data: Any,
    sources: tuple[CocoSource, CocoSource],
    seed: int,
) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and evaluation sets with their transforms."""
    mean, std = normalisation(model.in_chans, data.mean, data.std)
    plain = detection_eval_transform(mean, std, short=data.test_short, long=data.test_long)
    as_is = detection_eval_transform(mean, std, short=None)  # the task makes several sizes of it
    names = ("augment", "short", "long", "crop", "jitter_size", "jitter", "paste")
    augmented = detection_train_transform(mean, std, **{name: getattr(data, name) for name in names})
    semantic: Path | Literal["instances"] | None = None
    if task.semantic:
        if bool(data.semantic) != bool(task.semantic_classes):
            raise UsageError(
                f"data.semantic='{data.semantic}' and task.semantic_classes={task.semantic_classes} belong together: give a folder of "
                f"maps and their number of classes, or neither (the map is then drawn from the objects)."
            )
        semantic = Path(data.semantic) if data.semantic else "instances"
    options: dict[str, Any] = {"channels": model.in_chans, "seed": seed}
    return (
        DetectionDataset(
            sources[0], plain if data.limit else augmented, masks=task.masks, semantic=semantic, **options
        ),
        DetectionDataset(
            sources[1], as_is if task.test_short else plain, masks=False, replace_corrupt=False, **options
        ),
    )
