"""Using a trained detector: pictures in, boxes, masks and drawings out; evaluation on annotated images.

    detector = load_detection("runs/mask_rcnn_swinv2_tiny/best")
    [found] = detector([picture])
    found.boxes, found.scores, found.labels, found.full_masks(*picture.shape[1:])

A picture is (3, H, W), uint8 or float in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from swinscale import dense
from swinscale.data import decode_image, normalisation
from swinscale.data.coco import CocoSource, open_coco
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import DetectionTransform, detection_eval_transform
from swinscale.diagnose.detections import draw_detections, precision_recall_plot, print_detection_table
from swinscale.diagnose.pictures import drawable
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.heads.detections import Detections
from swinscale.heads.detector import Detector
from swinscale.inference import drawing, read_each, run_around, say_unread
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.recipes import coco
from swinscale.recipes.detection import DetectionDataConfig, open_detection_sources
from swinscale.tasks.detect import Detect, padded
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import infer_config, read_state_dict, transfer_config
from swinscale.weights.detector_parts import open_detector, parts_of
from swinscale.weights.detectors import is_detector, load_detector
from swinscale.weights.hub import resolve


@dataclass(frozen=True)
class DetectionPipeline:
    """A trained detector with the preprocessing it was trained with."""

    task: Detect
    transform: DetectionTransform

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the labels."""
        return self.task.classes

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor]) -> list[Detections]:
        """What is in each picture (C, H, W), uint8 or float in [0, 1], of any size; best first, in pixels of the picture."""
        device = next(self.task.parameters()).device
        found: list[Detections] = []
        for picture in pictures:  # one at a time, so that a picture's detections depend on it alone
            sample = self.transform({"image": picture, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()})
            image = sample["image"]
            height, width = image.shape[-2:]
            sizes = {"size": [[height, width]], "original_size": [list(picture.shape[-2:])]}
            batch = {"image": padded(image).to(device), **{name: torch.tensor(value) for name, value in sizes.items()}}
            with autocast(resolve_precision("auto", device), device):
                found += self.task.eval().detect(batch)
        return found

    def read(self, path: Path) -> Tensor:
        """One picture, (C, H, W).

        Raises:
            CorruptImage: if it cannot be read with the model's channels.
        """
        return decode_image(path.read_bytes(), path.name, self.task.backbone.config.in_chans)


def load_detection(checkpoint: str | Path, *, window_size: int | None = None, **options: Any) -> DetectionPipeline:
    """Opens a run's ``best`` or ``last`` directory, one from the Hub, or a detector's file of OpenMMLab or the published code.

    Args:
        window_size: side of the windows in use, larger than in training (Swin V2 keeps its position bias); None: as trained.
        options: fields of ``DetectConfig`` that change nothing in the weights, for example ``score``, ``limit``, ``soft_nms``,
            ``test_short``, ``test_flip``.

    Raises:
        UsageError: if there are no weights, or they are not those of a detector.
    """
    place = resolve(checkpoint)
    config, task_config, preprocessing = detection_config(place)
    task_config = dataclasses.replace(task_config, **options)
    if window_size is not None:
        config = transfer_config(config, window_size=window_size)
    with torch.device("meta"):
        model = Detector(SwinTransformer(config), len(preprocessing["classes"]), task_config)
        task = Detect(model, preprocessing["classes"], preprocessing)
    dense.fill(task, load_detector, place)
    mean, std = normalisation(config.in_chans, preprocessing["mean"], preprocessing["std"])
    short = None if task_config.test_short else preprocessing["test_short"]
    return DetectionPipeline(task.eval(), detection_eval_transform(mean, std, short, preprocessing["test_long"]))


def detection_config(place: Path) -> tuple[SwinConfig, DetectConfig, dict[str, Any]]:
    """Backbone, detector and preprocessing of weights: as recorded with them, else as far as the tensors tell.

    Raises:
        UsageError: if they are not those of a detector.
    """
    return dense.recorded(place, "detect", DetectConfig) or _read_off(place)


def _read_off(place: Path) -> tuple[SwinConfig, DetectConfig, dict[str, Any]]:
    """The same from the tensors of another project's detector, with the settings that the published ones are tested with."""
    state, beside = read_state_dict(place)
    if not is_detector(state):
        raise UsageError(
            f"{place} holds no detector: name a run of a detection recipe, or a detector's file of OpenMMLab."
        )
    file = open_detector(state)
    parts, heads = parts_of(file.heads), file.heads
    swin = dataclasses.replace(infer_config(file.backbone, name=place), img_size=800, small_map="pad", num_classes=0)
    swin = dataclasses.replace(swin, pad="legacy" if swin.version == 1 else "exact")
    like = {"Mask R-CNN": coco.MASK_RCNN, "Faster R-CNN": coco.MASK_RCNN, "HTC": coco.HTC}.get(parts.kind, coco.CASCADE)
    semantic = heads.get("roi.semantic.predict.weight")
    config = dataclasses.replace(
        like,
        masks=parts.masks > 0,
        channels=parts.channels,
        fc_channels=heads["roi.box_heads.0.fcs.0.weight"].shape[0],
        class_agnostic=parts.regress == "class-agnostic",
        semantic=semantic is not None,
        semantic_classes=0 if semantic is None else semantic.shape[0],
    )
    data = DetectionDataConfig()
    sides = {"test_short": data.test_short, "test_long": data.test_long}
    classes = beside.get("classes")
    if not isinstance(classes, list) or len(classes) != parts.classes:
        classes = coco_names(parts.classes)
    return swin, config, {**sides, "mean": None, "std": None, "classes": classes}


def coco_names(count: int) -> list[str]:
    """COCO's 80 names, which torchvision knows; numbers for any other count."""
    ensure_torchvision()
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    known = [name for name in names if name not in ("__background__", "N/A")]
    return known if len(known) == count else [f"class {index}" for index in range(count)]


def evaluate_detector(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    batch_size: int = 1,
    device: str = "auto",
    out: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a detector by COCO's measures, and prints them with a table of the classes.

    Args:
        data: a folder in COCO's layout, or an annotation file; None: what the run around ``checkpoint`` was evaluated on.
        split: which part of ``data``, where it has parts.
        out: a JSON file for the measures, with machine and versions; precision over recall is drawn beside it (.svg, .png).
        options: see ``load_detection``.
    """
    pipeline = load_detection(checkpoint, **options)
    task = pipeline.task
    source, name = open_annotated(checkpoint, task, data, split)
    channels = task.backbone.config.in_chans
    dataset = DetectionDataset(source, pipeline.transform, channels, masks=False, replace_corrupt=False)
    metrics = dense.measure(task, dataset, batch_size, device)
    dense.report(
        checkpoint,
        name,
        len(source),
        metrics,
        print_detection_table,
        out,
        lambda found: precision_recall_plot(found["curves"]),
    )
    return metrics


def open_annotated(checkpoint: str | Path, task: Detect, data: str | None, split: str) -> tuple[CocoSource, str]:
    """The images to evaluate on, with the classes that the detector knows, and what to call them.

    Args:
        data: see ``evaluate_detector``.

    Raises:
        UsageError: for images that are missing, or whose categories are not the detector's classes in their order.
    """
    if data is None:
        recipe, name = run_around(checkpoint)
        source = open_detection_sources(recipe.data, task.config, recipe.train.seed)[1]
    else:
        source = open_coco(data, split, masks=task.config.masks)
        name = f"the {split} part of {data}" if source.splits else data
    if source.classes != task.classes:
        only = sorted(set(source.classes) ^ set(task.classes))
        raise UsageError(
            f"{name} has {len(source.classes)} categories, {checkpoint} knows {len(task.classes)} classes (in one alone: "
            f"{', '.join(only[:5])}{', …' if len(only) > 5 else ''}). Evaluate on annotations with the same list."
        )
    return source, name


def detect_files(
    checkpoint: str | Path,
    images: Sequence[Path],
    *,
    out: Path | None = None,
    score: float = 0.5,
    bands: Sequence[int] | None = None,
    device: str = "auto",
    **options: Any,
) -> list[tuple[Path, Detections]]:
    """Prints what is in each picture, and draws it into ``out`` (default: ``predictions``).

    Args:
        images: picture files.
        score: detections below it are neither printed nor drawn.
        bands: the channels that are shown, see ``diagnose.pictures.to_picture``.
        options: see ``load_detection``.
    """
    pipeline = load_detection(checkpoint, **{"score": score, **options})  # it may be less than that of evaluation
    console = Console(highlight=False)
    results: list[tuple[Path, Detections]] = []
    unread: list[str] = []
    drawn: set[Path] = set()
    with world(device) as here:
        pipeline.task.to(here.device)
        for path, picture in read_each(images, pipeline.read, unread):
            found = pipeline([picture])[0].to("cpu")
            found = found.take(found.scores >= score)
            names = [f"{pipeline.classes[label]} {value:.2f}" for label, value in _pairs(found)]
            said = ", ".join(names) or f"nothing with a score of at least {score:g}"
            console.print(f"{path}: {said}", soft_wrap=True, markup=False)
            place = drawing(out or Path("predictions"), path, "detected", drawn)
            place.parent.mkdir(parents=True, exist_ok=True)
            draw_detections(drawable(picture, bands), found, pipeline.classes, min_score=0.0).save(place)
            console.print(f"  wrote {place}", soft_wrap=True, markup=False)
            results.append((path, found))
    say_unread(console, unread, any_read=bool(results))
    return results


def _pairs(found: Detections) -> list[tuple[int, float]]:
    return list(zip(found.labels.tolist(), found.scores.tolist(), strict=True))
