"""Using a trained checkpoint: evaluation on a set, prediction on pictures, reconstruction of masked ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
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
from swinscale.data.video import VIDEOS
from swinscale.diagnose.pictures import Panels, annotated, grid, reconstruction_panels, to_picture
from swinscale.errors import UsageError
from swinscale.evaluation import evaluate
from swinscale.models import SwinTransformer, build_model
from swinscale.models.config import format_size
from swinscale.models.variants import check_fields
from swinscale.models.vit_config import ViTConfig
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.recipes import Recipe, get_recipe
from swinscale.recipes.base import open_sources
from swinscale.recipes.parts import build_network
from swinscale.recipes.video import VideoDataConfig
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
from swinscale.weights.records import read_model_config
from swinscale.weights.segmenters import is_segmenter
from swinscale.weights.vit import load_vit

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
    def model(self) -> Any:
        """The network inside: a ``SwinTransformer``, an ``LRNet`` or the ViT of ``adapters``."""
        return self.task.encoder if isinstance(self.task, SimMIM) else self.task.model

    @property
    def backbone(self) -> SwinTransformer:
        """The Swin Transformer inside.

        Raises:
            UsageError: if it is another network.
        """
        if not isinstance(self.model, SwinTransformer):
            raise UsageError(f"{type(self.model).__name__} is no Swin Transformer, and this works with one alone.")
        return self.model

    def read(self, path: Path) -> Tensor:
        """One picture as an input (C, H, W).

        Raises:
            CorruptImage: if it cannot be read with the model's channels.
        """
        return self.transform(decode_image(path.read_bytes(), path.name, self.model.config.in_chans))


def task_of(checkpoint: str | Path) -> str:
    """The kind of task that weights are for: "detect", "segment", "video", "simmim", or "classify" where nothing says otherwise."""
    place = resolve(checkpoint)
    recorded, config = read_metadata(place).get("task", {}).get("name"), read_model_config(place)
    if recorded is not None:
        return str(recorded)
    if config is not None:
        return "video" if config.rank == 3 else "classify"
    state = read_state_dict(place)[0]  # of another project
    if any(name.endswith("patch_embed.proj.weight") and value.ndim == 5 for name, value in state.items()):
        return "video"
    return "detect" if is_detector(state) else "segment" if is_segmenter(state) else "classify"


def reads_films(checkpoint: str | Path) -> bool:
    """Whether weights are those of a model of clips: a video classifier, or SimMIM on clips."""
    config = read_model_config(resolve(checkpoint, verify=False))
    return config.rank == 3 if config is not None else task_of(checkpoint) == "video"


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
    if kind == "video":
        raise UsageError(
            f"{checkpoint} reads films: this works with models of pictures. It can predict, eval and explain."
        )
    if kind not in ("classify", "simmim"):
        raise UsageError(f"{checkpoint} holds a task '{kind}' that this version does not know (classify, simmim).")
    preprocessing = record.get("preprocessing", {})
    task: Task
    if kind == "simmim":
        task = load_simmim(checkpoint, **overrides)
        model = task.encoder
    else:
        model = _classifier(checkpoint, overrides)
        if model.num_classes < 2:
            raise UsageError(f"{checkpoint} has no classifier: it was not trained to classify. Fine-tune it first.")
        task = Classify(model, model.num_classes, from_dict(ClassifyConfig, options), preprocessing)
    mean, std = normalisation(model.config.in_chans, preprocessing.get("mean"), preprocessing.get("std"))
    if model.config.rank == 3:
        size = format_size(model.config.img_size)
        raise UsageError(
            f"{checkpoint} reads clips of {size}: this works with models of pictures. It can predict and eval."
        )
    crop = preprocessing.get("crop_ratio", 224 / 256)
    transform = eval_transform(model.config.img_size, mean, std, crop_ratio=crop)
    return Pipeline(task.eval(), preprocessing.get("classes"), mean, std, transform)


def load_simmim(place: Path, **overrides: Any) -> SimMIM:
    """A SimMIM model of images or clips from the directory ``place``; ``overrides`` as in ``load_pipeline``."""
    record, config = read_metadata(place), read_model_config(place)
    options = {name: value for name, value in record["task"].items() if name != "name"}
    described = from_dict(SimMIMConfig, options), record.get("preprocessing", {})
    if isinstance(config, ViTConfig):
        check_fields(config, overrides)
        task = SimMIM(build_network(dataclasses.replace(config, **overrides)), *described)
        load_vit(task, place)
        return task
    config = read_config(place)
    assert config is not None
    task = SimMIM(build_model(transfer_config(config, **overrides)), *described)
    load_weights(task, place)
    return task


def _classifier(place: Path, overrides: dict[str, Any]) -> Any:
    if not isinstance(read_model_config(place), ViTConfig):
        return from_pretrained(place, **overrides)
    from swinscale.adapters import vit  # it needs timm

    return vit.from_pretrained(place, **overrides)


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
    task, config = pipeline.task, pipeline.model.config
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
    check_classes(source, name, pipeline.classes, pipeline.model.num_classes, checkpoint)


def check_classes(
    source: Source, name: str, known: Sequence[str] | None, count: int, checkpoint: str | Path, what: str = "images"
) -> None:
    """Raises UsageError unless ``source`` has labels of the ``count`` classes of a checkpoint, whose names are perhaps ``known``."""
    if source.classes is None:
        raise UsageError(
            f"{name} has no labels: evaluation needs one folder per class, or a list file with path,label."
        )
    if known is not None and source.classes != known:
        raise UsageError(
            f"{name} has the classes {_short(source.classes)}, but {checkpoint} was trained on {_short(known)}. "
            f"Evaluate on {what} of the same classes."
        )
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
    what = "films" if isinstance(recipe.data, VideoDataConfig) else "images"
    return recipe, f"the evaluation {what} of its run ({recipe.data.eval or recipe.data.train})"


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
                logits = pipeline.model(image[None].to(here.device))[0]
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
    config, options = pipeline.model.config, task.config
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


def say_unread(console: Console, unread: Sequence[str], any_read: bool, what: str = "pictures") -> None:
    """Prints which pictures, or ``what`` they are, were left out.

    Raises:
        UsageError: if all of them were.
    """
    for line in unread:
        console.print(f"skipped {line}", soft_wrap=True, markup=False)
    if not any_read:
        raise UsageError(f"None of the {len(unread)} {what} can be read; the first: {unread[0]}.")


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
    """The pictures that are named, and those inside the folders that are named.

    Raises:
        UsageError: for what does not exist, a folder without pictures, or a film.
    """
    for path in paths:
        if path.suffix.lower() in VIDEOS:
            raise UsageError(
                f"{path} is a film, and this model reads pictures: films need a video model, such as a run of "
                f"desk_video_swinv2, or a segmenter."
            )
    return _files(paths, EXTENSIONS, "picture", "images")


def film_files(paths: Sequence[Path]) -> list[Path]:
    """The films that are named, and those inside the folders that are named.

    Raises:
        UsageError: for what does not exist, a folder without films, or a picture.
    """
    for path in paths:
        if path.suffix.lower().removeprefix(".") in EXTENSIONS:
            raise UsageError(
                f"{path} is a picture, and this model reads films ({', '.join(sorted(VIDEOS))}): give it one, or a model of "
                f"pictures."
            )
    return _files(paths, {end.removeprefix(".") for end in VIDEOS}, "film", "films")


def _files(paths: Sequence[Path], ends: Collection[str], one: str, many: str) -> list[Path]:
    """The files that are named, and those inside the folders that are named with one of ``ends`` (without a dot)."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower().removeprefix(".") in ends)
            if not inside:
                raise UsageError(f"No {many} in {path}: looked for {', '.join(sorted(ends))}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"No such {one}: {path}.")
    return found
