"""COCO's validation images: the published protocol of Swin detectors, and which published number applies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swinscale.data import normalisation
from swinscale.data.coco import CocoSource
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import detection_eval_transform
from swinscale.detection import coco_names, detection_config, load_detection, open_annotated
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.models import SwinConfig
from swinscale.recipes import get_recipe
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.suites.base import Measure, Options, Outcome, measured, not_read, one_view, other_normalisation
from swinscale.suites.dense import BACKBONE, details, differences, identify, other_windows
from swinscale.weights.hub import resolve

HEADS = (
    *("head", "masks", "channels", "fc_channels", "class_agnostic", "anchor_scale", "anchor_ratios", "mask_size"),
    *("semantic", "global_attention"),
)
"""Fields of ``DetectConfig`` that a published detector is compared by."""


@dataclass(frozen=True)
class PublishedDetector:
    """A published detector.

    Args:
        recipe: the recipe that trains it here, which says its architecture and how it is tested.
        file: the name of its published file without extension; "" where none was published.
        source: where its numbers come from.
        numbers: side of the windows in use → AP of boxes and of masks in per cent; None where it was not published.
    """

    recipe: str
    file: str
    source: str
    numbers: dict[int, tuple[float, float | None]]

    @property
    def name(self) -> str:
        """What it is called here."""
        return self.file or self.recipe


def _published() -> list[PublishedDetector]:
    code, v1, v2 = "SwinTransformer/Swin-Transformer-Object-Detection", "arXiv 2103.14030", "arXiv 2111.09883"
    mask, cascade = "mask_rcnn_swin_{}_patch4_window7{}", "cascade_mask_rcnn_swin_{}_patch4_window7{}"
    rows: list[tuple[str, str, str, dict[int, tuple[float, float | None]]]] = [
        ("mask_rcnn_swin_tiny_1x", mask.format("tiny", "_1x"), code, {7: (43.7, 39.8)}),
        ("mask_rcnn_swin_tiny_3x", mask.format("tiny", ""), code, {7: (46.0, 41.6)}),
        ("mask_rcnn_swin_small_3x", mask.format("small", ""), code, {7: (48.5, 43.3)}),
        ("cascade_swin_tiny_1x", cascade.format("tiny", "_1x"), code, {7: (48.1, 41.7)}),
        ("cascade_swin_tiny_3x", cascade.format("tiny", ""), code, {7: (50.4, 43.7)}),
        ("cascade_swin_small_3x", cascade.format("small", ""), code, {7: (51.9, 45.0)}),
        ("cascade_swin_base_3x", cascade.format("base", ""), code, {7: (51.9, 45.0)}),
        ("htc_swin_base_6x", "", v1, {7: (56.4, 49.1)}),
        ("htc_swin_large_3x", "", v1, {7: (57.1, 49.5)}),
        ("cascade_swinv2_tiny_window16", "", v2, {16: (51.1, None)}),
        ("cascade_swinv2_tiny_window32", "", v2, {32: (51.8, None)}),
        ("htc_swinv2_large", "", v2, {32: (58.8, 51.1), 48: (58.9, 51.2)}),
        ("htc_swinv2_giant", "", v2, {32: (61.7, 53.3), 48: (61.9, 53.4)}),
    ]
    return [PublishedDetector(*row) for row in rows]


PUBLISHED = _published()


@dataclass(frozen=True)
class DetectionProtocol:
    """How a picture is looked at: once, as it is, and what counts as found.

    Args:
        short, long: the short side in pixels; less where the long side would be longer than ``long``.
        settings: fields of ``DetectConfig`` that decide which boxes are found.
    """

    short: int
    long: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        s = self.settings
        suppression = "NMS" if s["soft_nms"] == "none" else f"{s['soft_nms']} soft-NMS"
        return (
            f"short side {self.short}, long side at most {self.long}, one view, one picture at a time; "
            f"{s['proposals'][1]} regions, score from {s['score']:g}, {suppression} at IoU {s['nms_iou']:g}, at most "
            f"{s['limit']} boxes; fp32"
        )


def detection_protocol(config: SwinConfig, task: DetectConfig, entry: PublishedDetector | None) -> DetectionProtocol:
    """The published protocol of ``entry``, or of detectors of this kind where it is None."""
    names = ("score", "limit", "nms_iou", "soft_nms", "proposals", "proposals_per_level")
    like = "mask_rcnn_swin_tiny_3x" if task.head == "mask_rcnn" else "cascade_swin_tiny_3x"
    if task.global_attention:
        like = "htc_swin_large_3x" if config.version == 1 else "htc_swinv2_large"
    recipe = get_recipe(like if entry is None else entry.recipe)
    assert isinstance(recipe.data, DetectionDataConfig)
    settings = {name: getattr(recipe.task, name) for name in names}
    return DetectionProtocol(recipe.data.test_short, recipe.data.test_long, settings)


@dataclass(frozen=True)
class DetectionSuite:
    """Annotated images with published average precisions.

    Args:
        images, objects: how many there are; crowds are no objects.
        classes: their names in the order of the labels; None: COCO's 80.
        tolerance: points of AP.
    """

    name: str
    title: str
    images: int
    objects: int
    classes: tuple[str, ...] | None
    split: str
    tolerance: float

    def measure(self, weights: str | Path, data: str, options: Options) -> Outcome:
        """Evaluates a detector on the images; see ``base.Suite``.

        Raises:
            UsageError: for weights that are no detector's, annotations of other classes than the detector knows, and
                images without a single object.
        """
        if options.resize is not None:
            raise UsageError(f"--resize belongs to classifiers: the short side of --suite {self.name} is --img-size.")
        one_view(options)
        place = resolve(weights)
        config, task_config, preprocessing = detection_config(place)
        entry, known_by, obstacles = identify(weights, options.published, PUBLISHED, "detector")
        protocol = detection_protocol(config, task_config, entry)
        if options.img_size is not None and options.img_size != protocol.short:
            long = round(protocol.long * options.img_size / protocol.short)
            obstacles.append(
                f"image size: short side {options.img_size}, long side at most {long}; published with {protocol.short} and "
                f"{protocol.long}"
            )
            protocol = replace(protocol, short=options.img_size, long=long)
        if (batch := options.batch_size or 1) > 1:
            obstacles.append(f"batch: {batch} pictures padded to one size; published with one at a time")
        mean, std = normalisation(config.in_chans, preprocessing["mean"], preprocessing["std"])
        obstacles += other_normalisation(mean, std)
        once: dict[str, Any] = {"test_short": (), "test_ranges": (), "test_flip": False}
        task = load_detection(place, window_size=options.window_size, **once, **protocol.settings).task
        config = task.backbone.config
        if entry is not None:
            obstacles += [f"weights: {line} of {entry.name}" for line in _departures(config, task_config, entry)]
        source, _ = open_annotated(weights, task, data, options.split or self.split)
        obstacles += self._check_images(source)
        transform = detection_eval_transform(mean, std, protocol.short, protocol.long)
        dataset = DetectionDataset(source, transform, config.in_chans, masks=False, replace_corrupt=False)
        found = measured(task, dataset, options, batch, each=True)
        obstacles += not_read(found.unreadable, len(source))
        kinds = ("box", "mask") if task_config.masks else ("box",)
        values = {f"{kind} AP": found.metrics[f"{kind}_ap"] for kind in kinds}
        if None in values.values():
            raise UsageError(
                f"{data} has no annotated object in the images that can be read: there is nothing to measure."
            )
        numbers: tuple[float | None, float | None] = (None, None)
        beside = None
        if entry is not None and not obstacles:
            numbers, beside = entry.numbers[config.stage_windows[0][0]], f"{entry.source}, {entry.name}, {known_by}"
        return Outcome(
            suite=self.name,
            weights=str(weights),
            data=data,
            images=len(source) - found.unreadable,
            protocol=str(protocol),
            measures=tuple(
                Measure(name, 100 * value, None, number, self.tolerance)
                for (name, value), number in zip(values.items(), numbers, strict=False)
            ),
            published=beside,
            obstacles=tuple(obstacles),
            details=details(self.title, place, task, source, found),
            main=found.main,
        )

    def _check_images(self, source: CocoSource) -> list[str]:
        """In what images and annotations differ from those of the published numbers."""
        names = list(self.classes) if self.classes is not None else coco_names(80)
        if source.classes != names:
            if set(source.classes) == set(names):
                return [f"classes: not in the order of {self.title}"]
            return [f"classes: {len(source.classes)} that are not the {len(names)} of {self.title}"]
        if len(source) != self.images:
            return [f"images: {len(source):,} instead of the {self.images:,} of {self.title}"]
        objects = sum(not a["iscrowd"] for index in range(len(source)) for a in source.annotations[index])
        if objects != self.objects:
            return [f"annotations: {objects:,} objects instead of the {self.objects:,} of {self.title}"]
        return []


def _departures(config: SwinConfig, task: DetectConfig, entry: PublishedDetector) -> list[str]:
    """In what a detector differs from the published one, a line each."""
    recipe = get_recipe(entry.recipe)
    lines = differences(config, recipe.model, BACKBONE) + differences(task, recipe.task, HEADS)
    return lines + other_windows(config, entry.numbers)


COCO = DetectionSuite(
    name="coco",
    title="COCO's val2017",
    images=5_000,
    objects=36_335,
    classes=None,
    split="val",
    tolerance=0.2,
)
