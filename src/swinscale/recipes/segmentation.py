"""What recipes of semantic segmentation have of their own: images with label maps, and how they become inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from swinscale.config import check_ranges
from swinscale.data import normalisation
from swinscale.data.segment_transforms import segment_eval_transform, segment_train_transform
from swinscale.data.segments import SegmentDataset, SegmentSource, open_segments
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.models import SwinConfig
from swinscale.recipes.parts import training_and_held


@dataclass(frozen=True)
class SegmentationDataConfig:
    """Which images and label maps, and how they become inputs.

    Args:
        train: a folder with images and label maps beside each other, see ``data.segments.open_segments``, or of images alone.
        eval: the same for evaluation. None: the split of that name beside the training images, else a share
            ``eval_fraction`` of them.
        eval_split: which split of ``train`` is evaluated on when ``eval`` is None; the other one where it is missing.
        maps, eval_maps: folders of the label maps of ``train`` and ``eval``, where they are somewhere else.
        classes: "ade20k", "camvid", a file with a name (or name,r,g,b) per line, or a number of classes. "": ``classes.txt`` beside the
            images, else as many as the maps have.
        ignore_index: value in label maps of pixels that do not count.
        reduce_zero_label: 0 in label maps does not count either, and 1 is the first class.
        image_suffix, map_suffix: ends of the names, before the extension, without which an image and its map are called the same.
        augment: "published" (scale, crop, flip, photometric distortion), "light" (without the distortion) or "none".
        crop: height and width of the inputs in training.
        short, long: a picture is first fitted into ``short`` × ``long`` (upright or oblong), times a factor from ``ratio``.
        max_share: crops in which one class fills more than this are drawn again, up to ten times.
        mean, std: per channel, for pixels in [0, 1]. None: ImageNet's for three channels, 0.5 for others.
        eval_limit: evaluate on so many images, spread evenly; 0: on all.
        limit: train and evaluate on the same few images, so many and spread evenly over the training images, without
            augmentation; 0: on all.
    """

    train: str = ""
    eval: str | None = None
    eval_split: Literal["val", "test"] = "val"
    eval_fraction: float = 0.1
    maps: str = ""
    eval_maps: str = ""
    classes: str | int = ""
    ignore_index: int = 255
    reduce_zero_label: bool = False
    image_suffix: str = ""
    map_suffix: str = ""
    augment: Literal["published", "light", "none"] = "published"
    crop: tuple[int, int] = (512, 512)
    short: int = 512
    long: int = 2048
    ratio: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    eval_limit: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        sides = dict.fromkeys(("crop", "short", "long"), "[1, inf)")
        counts = dict.fromkeys(("eval_limit", "limit"), "[0, inf)")
        check_ranges(self, "data.", eval_fraction="(0, 1)", ratio="(0, inf)", max_share="(0, 1]", **sides, **counts)
        if self.ratio[0] > self.ratio[1]:
            raise UsageError(f"data.ratio={self.ratio}: the smaller number comes first.")
        if self.long < self.short:
            raise UsageError(
                f"data.long={self.long} is less than data.short={self.short}: the long side cannot be shorter."
            )


def open_segmentation_sources(data: Any, seed: int) -> tuple[SegmentSource, SegmentSource]:
    """Training and evaluation images with their label maps.

    Raises:
        UsageError: for data that is missing, maps that do not fit their images, or parts with different classes.
    """
    if not isinstance(data, SegmentationDataConfig):
        raise UsageError(f"A recipe that segments needs data=SegmentationDataConfig(…), not {type(data).__name__}.")
    if not data.train:
        raise UsageError("No images are named: add --data PATH, a folder with images and label maps.")

    def open_part(place: str, part: str) -> SegmentSource:
        maps = data.eval_maps if place == data.eval else data.maps
        names = ("ignore_index", "reduce_zero_label", "image_suffix", "map_suffix")
        rule = {name: getattr(data, name) for name in names}
        return open_segments(place, part, maps=maps, classes=str(data.classes), **rule)

    training, held = training_and_held(data, seed, open_part)
    if held.classes != training.classes:
        raise UsageError(
            f"The maps of the training images have {len(training.classes or ())} classes, those of the evaluation images "
            f"{len(held.classes or ())}: say which there are with data.classes (a file, or their number)."
        )
    return training, held


def segmentation_preprocessing(
    model: SwinConfig, data: SegmentationDataConfig, classes: list[str], colours: Any = None
) -> dict[str, Any]:
    """How pictures and label maps become inputs of this segmenter, and how their files are called, for the checkpoint."""
    mean, std = normalisation(model.in_chans, data.mean, data.std)
    labels = {"ignore_index": data.ignore_index, "reduce_zero_label": data.reduce_zero_label}
    found = {"mean": list(mean), "std": list(std), "classes": classes, "colours": colours, "labels": labels}
    ends = [data.image_suffix, data.map_suffix]
    return found | ({"suffixes": ends} if any(ends) else {})


def segmentation_datasets(
    model: SwinConfig,
    task: SegmentConfig,
    data: SegmentationDataConfig,
    sources: tuple[SegmentSource, SegmentSource],
    seed: int,
) -> tuple[SegmentDataset, SegmentDataset]:
    """Training and evaluation sets with their transforms. Evaluation has pictures as they are: the task resizes them."""
    mean, std = normalisation(model.in_chans, data.mean, data.std)
    plain = segment_eval_transform(mean, std)
    names = ("augment", "crop", "short", "long", "ratio", "max_share")
    settings: dict[str, Any] = {name: getattr(data, name) for name in names}
    if data.limit:
        settings |= {"augment": "none", "short": task.test_short, "long": task.test_long}
    augmented = plain if data.limit and not task.test_short else segment_train_transform(mean, std, **settings)
    return (
        SegmentDataset(sources[0], augmented, channels=model.in_chans, seed=seed),
        SegmentDataset(sources[1], plain, channels=model.in_chans, seed=seed, replace_corrupt=False),
    )
