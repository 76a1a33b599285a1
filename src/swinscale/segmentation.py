"""Using a trained segmenter: pictures and films in, maps of classes and drawings out; evaluation on images with label maps.

    segmenter = load_segmentation("runs/upernet_swinv2_tiny/best")
    [labels] = segmenter([picture])          # (H, W) int64, numbers of segmenter.classes

A picture is (C, H, W), uint8 or float in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from swinscale import dense
from swinscale.config import from_dict
from swinscale.data import CorruptImage, decode_image, normalisation
from swinscale.data.class_lists import ClassList, class_list, numbered_classes
from swinscale.data.segment_transforms import segment_eval_transform
from swinscale.data.segments import LabelRule, SegmentDataset, SegmentSource, decode_map, open_segments
from swinscale.data.video import VIDEOS, open_video, write_video
from swinscale.diagnose.pictures import drawable
from swinscale.diagnose.segmentation import (
    Example,
    class_colours,
    draw_segmentation,
    iou_plot,
    overlay,
    print_segmentation_table,
    segmentation_grid,
)
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import Segmenter
from swinscale.inference import drawing, picture_files, read_each, run_around, say_unread
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.recipes.segmentation import open_segmentation_sources
from swinscale.tasks.segment import Segment
from swinscale.weights import transfer_config
from swinscale.weights.hub import resolve
from swinscale.weights.segmenters import load_segmenter, read_segmenter_config

SHOWN_FRAMES = 6
"""Frames of a film that are shown beside each other, at most."""


@dataclass(frozen=True)
class SegmentationPipeline:
    """A trained segmenter with the preprocessing it was trained with."""

    task: Segment
    transform: Any

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the labels."""
        return self.task.classes

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """Of the classes, in drawings: those of the data, else our own."""
        given = self.task.preprocessing.get("colours")
        return class_colours(len(self.classes), given and [tuple(colour) for colour in given])

    @property
    def rule(self) -> LabelRule:
        """How the values of label maps become classes: as in training, for other weights 255 is ignored."""
        colours = self.task.preprocessing.get("colours")
        names = ClassList(tuple(self.classes), colours and tuple(tuple(colour) for colour in colours))
        return LabelRule(names, **self.task.preprocessing.get("labels", {}))

    @property
    def suffixes(self) -> tuple[str, str]:
        """Ends of the names of pictures and of label maps, before the extension, as in training."""
        image, label_map = self.task.preprocessing.get("suffixes", ("", ""))
        return image, label_map

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """The class of each pixel, (H, W) int64 on the CPU, of each picture (C, H, W), uint8 or float in [0, 1], of any size."""
        device = next(self.task.parameters()).device
        found: list[Tensor] = []
        for picture in pictures:  # one at a time, so that a picture's classes depend on it alone
            image = self.transform({"image": picture})["image"][None].to(device)
            batch = {"image": image, "size": torch.tensor([image.shape[-2:]])}
            with autocast(resolve_precision("auto", device), device):
                found += [labels.cpu() for labels in self.task.eval().segment(batch)]
        return found

    def read(self, path: Path) -> Tensor:
        """One picture, (C, H, W).

        Raises:
            CorruptImage: if it cannot be read with the model's channels.
        """
        return decode_image(path.read_bytes(), path.name, self.task.backbone.config.in_chans)


def load_segmentation(
    checkpoint: str | Path, *, window_size: int | None = None, short: int | None = None, **options: Any
) -> SegmentationPipeline:
    """Opens a run's ``best`` or ``last`` directory, one from the Hub, or a UPerNet of OpenMMLab or transformers.

    Args:
        window_size: side of the windows in use, larger than in training (Swin V2 keeps its position bias); None: as trained.
        short: the short side at which pictures are looked at; the longest side that is allowed grows with it. None: as trained.
        options: fields of ``SegmentConfig`` that change nothing in the weights: those whose names begin with ``test_``.

    Raises:
        UsageError: if there are no weights, or they are not those of a segmenter.
    """
    place = resolve(checkpoint)
    config, task_config, preprocessing = segmentation_config(place)
    if short is not None:
        longest = round(short * task_config.test_long / (task_config.test_short or short))
        task_config = dataclasses.replace(task_config, test_short=short, test_long=longest)
    task_config = dataclasses.replace(task_config, **options)
    if window_size is not None:
        config = transfer_config(config, window_size=window_size)
    with torch.device("meta"):
        model = Segmenter(SwinTransformer(config), len(preprocessing["classes"]), task_config)
        task = Segment(model, preprocessing["classes"], preprocessing)
    dense.fill(task, load_segmenter, place)
    mean, std = normalisation(config.in_chans, preprocessing["mean"], preprocessing["std"])
    return SegmentationPipeline(task.eval(), segment_eval_transform(mean, std))


def segmentation_config(place: Path) -> tuple[SwinConfig, SegmentConfig, dict[str, Any]]:
    """Backbone, segmenter and preprocessing of weights: as recorded with them, else as far as the tensors tell.

    Raises:
        UsageError: if they are not those of a segmenter.
    """
    recorded = dense.recorded(place, "segment", SegmentConfig)
    if recorded is not None:
        return recorded
    config, options, preprocessing = read_segmenter_config(place)
    ade = class_list("ade20k")
    count = preprocessing.pop("count")
    usual = ade if len(ade) == count else numbered_classes(count)
    labels = {"ignore_index": 255, "reduce_zero_label": usual is ade}  # 0 in ADE20K's maps is what has no class
    preprocessing |= {"classes": preprocessing["classes"] or list(usual.names), "labels": labels}
    return config, from_dict(SegmentConfig, options), preprocessing


def evaluate_segmenter(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    batch_size: int = 1,
    device: str = "auto",
    out: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a segmenter, and prints mIoU, mAcc, aAcc and a table of the classes.

    Args:
        data: a folder of images and label maps (``data.segments.open_segments``); None: what the run was evaluated on.
        split: which part of ``data``, where it has parts.
        out: a JSON file for the measures, with machine and versions; the classes are drawn beside it (.svg, .png).
        options: see ``load_segmentation``.
    """
    pipeline = load_segmentation(checkpoint, **options)
    task = pipeline.task
    source, name = open_labelled(checkpoint, pipeline, data, split)
    dataset = SegmentDataset(source, pipeline.transform, task.backbone.config.in_chans, replace_corrupt=False)
    metrics = dense.measure(task, dataset, batch_size, device)
    dense.report(
        checkpoint,
        name,
        len(source),
        metrics,
        print_segmentation_table,
        out,
        lambda found: iou_plot(found["per_class"]),
    )
    return metrics


def open_labelled(
    checkpoint: str | Path, pipeline: SegmentationPipeline, data: str | None, split: str
) -> tuple[SegmentSource, str]:
    """The images to evaluate on, with labels as the segmenter counts them, and what to call them.

    Raises:
        UsageError: for images that are missing, and for maps with other classes.
    """
    if data is not None:
        rule, suffixes = pipeline.rule, pipeline.suffixes
        source = open_segments(
            data,
            split,
            classes=rule.classes,
            ignore_index=rule.ignore_index,
            reduce_zero_label=rule.reduce_zero_label,
            image_suffix=suffixes[0],
            map_suffix=suffixes[1],
        )
        return source, f"the {split} part of {data}" if source.splits else data
    recipe, name = run_around(checkpoint)
    return open_segmentation_sources(recipe.data, recipe.train.seed)[1], name


def segment_files(
    checkpoint: str | Path,
    images: Sequence[Path],
    *,
    out: Path | None = None,
    truth: Path | None = None,
    save_maps: bool = False,
    bands: Sequence[int] | None = None,
    device: str = "auto",
    **options: Any,
) -> list[Path]:
    """Draws what is in each picture into ``out`` (default: ``predictions``): picture, classes, and the truth where it is given.

    Args:
        images: picture files, folders of them, and films, which become films.
        truth: a label map, or a folder of them with the names of the pictures.
        bands: the channels that are shown, see ``diagnose.pictures.to_picture``.
        save_maps: also write the classes as PNG files, whose pixels are labels.
        options: see ``load_segmentation``.

    Returns:
        The drawings.
    """
    pipeline = load_segmentation(checkpoint, **options)
    console, out = Console(highlight=False), out or Path("predictions")
    films = [path for path in images if path.suffix.lower() in VIDEOS]
    others = [path for path in images if path not in films]
    written: list[Path] = []
    unread: list[str] = []
    drawn: set[Path] = set()
    out.mkdir(parents=True, exist_ok=True)

    def read(path: Path) -> tuple[Tensor, Tensor | None]:
        picture = pipeline.read(path)
        return picture, _truth_of(path, truth, pipeline, picture)

    with world(device) as here:
        pipeline.task.to(here.device)
        for path, (picture, expected) in read_each(picture_files(others), read, unread):
            [labels] = pipeline([picture])
            console.print(f"{path}: {_shares(labels, pipeline.classes)}", soft_wrap=True, markup=False)
            place = drawing(out, path, "segmented", drawn)
            panels = draw_segmentation(
                drawable(picture, bands), labels, pipeline.classes, colours=pipeline.colours, truth=expected
            )
            panels.save(place)
            written.append(place)
            if save_maps:
                kind = np.uint8 if len(pipeline.classes) <= 256 else np.uint16
                Image.fromarray(labels.numpy().astype(kind)).save(drawing(out, path, "labels", drawn))
            console.print(f"  wrote {place}", soft_wrap=True, markup=False)
        for path in films:
            place = drawing(out, path, "segmented", drawn).with_suffix(".mp4")
            frames = segment_video(pipeline, path, place)
            written.append(place)
            console.print(f"{path}: {frames} frames\n  wrote {place}", soft_wrap=True, markup=False)
    say_unread(console, unread, any_read=bool(written))
    return written


def segment_video(pipeline: SegmentationPipeline, film: Path, out: Path) -> int:
    """Writes a film again with its classes laid over it, and some of its frames with a legend as a PNG file of the same name.

    Returns: the number of frames.

    Raises:
        UsageError: for a segmenter of pictures that have other channels than films, and a film that cannot be read.
    """
    channels = pipeline.task.backbone.config.in_chans
    if channels != 3:
        raise UsageError(f"{film}: a film has 3 channels, this segmenter reads {channels}. Give it pictures.")
    video = open_video(film)
    colours = pipeline.colours
    count, every, examples = 0, 1, list[Example]()

    def drawn() -> Iterator[Image.Image]:
        nonlocal count, every
        for frame in video.frames:
            [labels] = pipeline([frame])
            if count % every == 0:
                examples.append(Example(frame, labels))
                if len(examples) > SHOWN_FRAMES:
                    del examples[1::2]
                    every *= 2
            count += 1
            yield overlay(frame, labels, colours)

    write_video(out, drawn(), video.rate)
    segmentation_grid(examples, pipeline.classes, colours=colours).save(out.with_suffix(".png"))
    return count


def _truth_of(path: Path, truth: Path | None, pipeline: SegmentationPipeline, picture: Tensor) -> Tensor | None:
    """The label map of a picture (H, W), or None where no truth is given."""
    if truth is None:
        return None
    file = truth
    if truth.is_dir():
        of_image, of_map = pipeline.suffixes
        name = path.stem.removesuffix(of_image) + of_map
        found = sorted(candidate for candidate in truth.iterdir() if candidate.stem == name)
        if not found:
            raise UsageError(f"{truth} has no label map for {path.name}: it needs a file called {name}.png.")
        file = found[0]
    labels = pipeline.rule.to_labels(decode_map(file.read_bytes(), file.name), file.name)
    if labels.shape != picture.shape[-2:]:
        height, width = labels.shape
        raise CorruptImage(
            str(file), f"has {height}×{width} pixels, its picture {picture.shape[-2]}×{picture.shape[-1]}"
        )
    return labels


def _shares(labels: Tensor, classes: Sequence[str]) -> str:
    """The classes of a map by their share of it, for a line of text."""
    shares = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
    ranked = sorted(
        ((share, name) for share, name in zip(shares.tolist(), classes, strict=True) if share), reverse=True
    )
    text = ", ".join(f"{name} {100 * share:.1f} %" for share, name in ranked[:6])
    return text + (f" and {len(ranked) - 6} more" if len(ranked) > 6 else "")
