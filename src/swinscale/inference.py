"""Using a trained checkpoint: evaluation on a set, prediction on pictures, reconstruction of masked ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swinscale.config import from_dict
from swinscale.data import (
    CorruptImage,
    EpochLoader,
    ImageDataset,
    MaskConfig,
    Source,
    decode_image,
    eval_transform,
    mask_for_sample,
    normalisation,
    open_source,
)
from swinscale.data.sources import EXTENSIONS
from swinscale.diagnose.pictures import Panels, annotated, grid, reconstruction_panels, to_picture
from swinscale.errors import UsageError
from swinscale.evaluation import evaluate
from swinscale.models import SwinTransformer
from swinscale.models.config import format_size
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.recipes import Recipe, get_recipe
from swinscale.recipes.base import open_sources
from swinscale.runlog import measures
from swinscale.tasks import Classify, ClassifyConfig, SimMIM, SimMIMConfig, Task
from swinscale.weights import (
    from_pretrained,
    load_weights,
    read_config,
    read_metadata,
    read_state_dict,
    transfer_config,
)
from swinscale.weights.detectors import is_detector
from swinscale.weights.hub import resolve
from swinscale.weights.segmenters import is_segmenter

Read = TypeVar("Read")
DENSE = {"detect": "detector", "segment": "segmenter"}
"""Kinds of tasks that look at whole pictures, and what their models are called."""


@dataclass(frozen=True)
class Pipeline:
    """A trained task with the preprocessing it was trained with."""

    task: Task
    classes: list[str] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Any
    """Maps a decoded picture (C, H, W) to an input."""

    @property
    def backbone(self) -> SwinTransformer:
        """The Swin Transformer inside."""
        model = self.task.encoder if isinstance(self.task, SimMIM) else self.task.model
        assert isinstance(model, SwinTransformer)
        return model

    def read(self, path: Path) -> Tensor:
        """One picture as an input (C, H, W).

        Raises:
            CorruptImage: if it cannot be read with the model's channels.
        """
        return self.transform(decode_image(path.read_bytes(), path.name, self.backbone.config.in_chans))


def task_of(checkpoint: str | Path) -> str:
    """The kind of task that weights are for: "detect", "segment", "simmim", or "classify" where nothing says otherwise."""
    place = resolve(checkpoint)
    recorded = read_metadata(place).get("task", {}).get("name")
    if recorded is None and read_config(place) is None:  # of another project
        state = read_state_dict(place)[0]
        recorded = "detect" if is_detector(state) else "segment" if is_segmenter(state) else None
    return str(recorded or "classify")


def load_pipeline(checkpoint: str | Path, **overrides: Any) -> Pipeline:
    """Opens a run's ``best`` or ``last`` directory, or any weights that ``from_pretrained`` reads, from the Hub as well.

    Args:
        checkpoint: a path, or a repository ("owner/name"), see ``weights.hub.resolve``.
        overrides: fields of the model to change, for example ``img_size`` and ``window_size``: weights are transferred.

    Raises:
        UsageError: if there are no weights, or they are those of another kind of model.
    """
    checkpoint = resolve(checkpoint)
    record = read_metadata(checkpoint)
    options = dict(record.get("task", {"name": "classify"}))
    kind = options.pop("name", None)
    if kind in DENSE:
        raise UsageError(
            f"{checkpoint} is a {DENSE[kind]}: this works with classifiers and SimMIM models. It can predict and eval."
        )
    if kind not in ("classify", "simmim"):
        raise UsageError(f"{checkpoint} holds a task '{kind}' that this version does not know (classify, simmim).")
    preprocessing = record.get("preprocessing", {})
    task: Task
    if kind == "simmim":
        config = read_config(checkpoint)
        assert config is not None
        model = SwinTransformer(transfer_config(config, **overrides))
        task = SimMIM(model, from_dict(SimMIMConfig, options), preprocessing)
        load_weights(task, checkpoint)
    else:
        model = from_pretrained(checkpoint, **overrides)
        if model.num_classes < 2:
            raise UsageError(f"{checkpoint} has no classifier: it was not trained to classify. Fine-tune it first.")
        task = Classify(model, model.num_classes, from_dict(ClassifyConfig, options), preprocessing)
    mean, std = normalisation(model.config.in_chans, preprocessing.get("mean"), preprocessing.get("std"))
    if model.config.rank == 3:
        size = format_size(model.config.img_size)
        raise UsageError(f"{checkpoint} reads clips of {size}, not pictures: call the model with tensors instead.")
    crop = preprocessing.get("crop_ratio", 224 / 256)
    transform = eval_transform(model.config.img_size, mean, std, crop_ratio=crop)
    return Pipeline(task.eval(), preprocessing.get("classes"), mean, std, transform)


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    data: str | None = None,
    split: str = "test",
    img_size: int | None = None,
    window_size: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluates a checkpoint and prints the measures.

    Args:
        data: a source of images (``swinscale.data.open_source``); None: those that its run was evaluated on, also where
            they are a share of the training folder that the run held out.
        split: which part of ``data``, where it has parts.
    """
    overrides = {name: v for name, v in (("img_size", img_size), ("window_size", window_size)) if v is not None}
    pipeline = load_pipeline(checkpoint, **overrides)
    task, config = pipeline.task, pipeline.backbone.config
    seed = 0
    if data is None:
        _, source, data = held_out_sources(checkpoint, labelled=isinstance(task, Classify))
        seed = run_around(checkpoint)[0].train.seed
    else:
        source = open_source(data, split=split)
        data = f"the {split} part of {data}" if source.splits else data
    mask = None
    if isinstance(task, SimMIM):
        o = task.config
        mask = MaskConfig(config.img_size, o.mask_patch, config.patch_size, o.mask_ratio, o.mask_mode)
    else:
        check_labels(source, data, pipeline, checkpoint)
    with world(device) as here:
        dataset = ImageDataset(source, pipeline.transform, config.in_chans, seed, mask, replace_corrupt=False)
        loader = EpochLoader(dataset, batch_size, shuffle=False, drop_last=False)
        metrics = evaluate(task.to(here.device), loader, resolve_precision("auto", here.device), here.device)
    console = Console(highlight=False)
    console.print(
        f"{checkpoint} at {format_size(config.img_size)} on {data}: {len(source)} images", soft_wrap=True, markup=False
    )
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if isinstance(value, float) and (name != "unreadable" or value):
            table.add_row(name, f"{value:.4g}")
    console.print(table)
    return metrics


def check_labels(source: Source, name: str, pipeline: Pipeline, checkpoint: Path) -> None:
    """Raises UsageError unless the images of ``source`` have labels of the classes that the checkpoint knows."""
    if source.classes is None:
        raise UsageError(
            f"{name} has no labels: evaluation needs one folder per class, or a list file with path,label."
        )
    if pipeline.classes is not None and source.classes != pipeline.classes:
        raise UsageError(
            f"{name} has the classes {_short(source.classes)}, but {checkpoint} was trained on {_short(pipeline.classes)}. "
            f"Evaluate on images of the same classes."
        )
    count = pipeline.backbone.config.num_classes
    if len(source.classes) != count:
        raise UsageError(f"{name} has {len(source.classes)} classes, but {checkpoint} has {count}.")


def held_out_sources(checkpoint: Path, labelled: bool) -> tuple[Source, Source, str]:
    """The images that the run around ``checkpoint`` was trained and evaluated on, and what to call the latter."""
    recipe, name = run_around(checkpoint)
    training, evaluated = open_sources(recipe.data, recipe.train.seed, labelled=labelled)
    return training, evaluated, name


def run_around(checkpoint: str | Path) -> tuple[Recipe, str]:
    """The recipe of the run that ``checkpoint`` is part of, and what to call its evaluation images.

    Raises:
        UsageError: if it is part of none.
    """
    record = resolve(checkpoint, verify=False).parent / "config.json"
    if not record.is_file():
        raise UsageError(f"{checkpoint} is not part of a run that says its images: add --data PATH.")
    recipe = get_recipe(str(record))
    return recipe, f"the evaluation images of its run ({recipe.data.eval or recipe.data.train})"


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "") + f" ({len(names)})"


@torch.no_grad()
def predict_files(
    checkpoint: Path,
    images: Sequence[Path],
    *,
    out: Path | None = None,
    top: int = 5,
    device: str = "auto",
    bands: Sequence[int] | None = None,
) -> list[tuple[Path, list[tuple[str, float]]]]:
    """Prints the most likely classes of each picture; with a SimMIM checkpoint, writes reconstructions and measures instead.

    Args:
        images: picture files, or folders of them.
        out: folder for annotated pictures (reconstructions go to ``predictions`` by default).
        bands: the channels that are shown, see ``diagnose.pictures.to_picture``.

    Returns:
        For each picture its classes with probabilities, best first; for SimMIM its measures (``SimMIM.update_metrics``).
    """
    pipeline = load_pipeline(checkpoint)
    results: list[tuple[Path, list[tuple[str, float]]]] = []
    unread: list[str] = []
    drawn: set[Path] = set()
    console = Console(highlight=False)
    with world(device) as here:
        task, precision = pipeline.task.to(here.device), resolve_precision("auto", here.device)
        for path, image in read_each(picture_files(images), pipeline.read, unread):
            with autocast(precision, here.device):
                if isinstance(task, SimMIM):
                    place = drawing(out or Path("predictions"), path, "reconstructed", drawn)
                    picture, values = _reconstruct(task, pipeline, image.to(here.device), bands)
                    console.print(f"{path}: {measures(values)}", soft_wrap=True, markup=False)
                    _write(picture, place, console)
                    results.append((path, list(values.items())))
                    continue
                logits = pipeline.backbone(image[None].to(here.device))[0]
            probabilities = logits.float().softmax(-1).cpu()
            names = pipeline.classes or [f"class {i}" for i in range(len(probabilities))]
            values, indices = probabilities.topk(min(top, len(probabilities)))
            ranked = [(names[i], p) for p, i in zip(values.tolist(), indices.tolist(), strict=True)]
            results.append((path, ranked))
            console.print(
                f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in ranked), soft_wrap=True, markup=False
            )
            if out is not None:
                picture = annotated(to_picture(image, pipeline.mean, pipeline.std, bands), ranked)
                _write(picture, drawing(out, path, "predicted", drawn), console)
    say_unread(console, unread, any_read=bool(results))
    return results


def _reconstruct(
    task: SimMIM, pipeline: Pipeline, image: Tensor, bands: Sequence[int] | None
) -> tuple[Image.Image, dict[str, float]]:
    """The panels of one image (C, H, W) side by side, and its measures."""
    config, options = pipeline.backbone.config, task.config
    cells = MaskConfig(config.img_size, options.mask_patch, config.patch_size, options.mask_ratio, options.mask_mode)
    mask = mask_for_sample(cells, 0, 0, 0).to(image.device)
    metrics = {name: metric.to(image.device) for name, metric in task.new_metrics().items()}
    task.update_metrics(metrics, {"image": image[None], "mask": mask[None]})
    picture = grid(reconstruction_panels(task, image[None], mask[None], bands), Panels._fields)
    return picture, {name: metric.compute().item() for name, metric in metrics.items()}


def read_each(paths: Sequence[Path], read: Callable[[Path], Read], unread: list[str]) -> Iterator[tuple[Path, Read]]:
    """Each picture that can be read; why the others cannot is added to ``unread``."""
    for path in paths:
        try:
            found = read(path)
        except CorruptImage as error:
            unread.append(str(error))
            continue
        yield path, found


def say_unread(console: Console, unread: Sequence[str], any_read: bool) -> None:
    """Prints which pictures were left out.

    Raises:
        UsageError: if all of them were.
    """
    for line in unread:
        console.print(f"skipped {line}", soft_wrap=True, markup=False)
    if not any_read:
        raise UsageError(f"None of the {len(unread)} pictures can be read; the first: {unread[0]}.")


def drawing(out: Path, picture: Path, what: str, drawn: set[Path]) -> Path:
    """Where the drawing of a picture goes: a name of its own among those ``drawn``, to which it is added."""
    names = (f"{picture.stem}_{what}{f'_{n}' if n > 1 else ''}.png" for n in itertools.count(1))
    place = next(out / name for name in names if out / name not in drawn)
    drawn.add(place)
    return place


def _write(picture: Any, path: Path, console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    console.print(f"  wrote {path}", soft_wrap=True, markup=False)


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The pictures that are named, and those inside the folders that are named."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower().removeprefix(".") in EXTENSIONS)
            if not inside:
                raise UsageError(f"No images in {path}: looked for {', '.join(sorted(EXTENSIONS))}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"No such picture: {path}.")
    return found
