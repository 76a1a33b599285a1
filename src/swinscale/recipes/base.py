"""A recipe is a frozen dataclass that says everything about a run; this module builds and runs one."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from swinscale.config import check_ranges, from_dict, to_dict
from swinscale.data import (
    ImageDataset,
    MaskConfig,
    Source,
    eval_transform,
    normalisation,
    open_source,
    simmim_transform,
    train_transform,
)
from swinscale.errors import UsageError, speaks
from swinscale.heads.config import DetectConfig, SegmentConfig
from swinscale.heads.detector import Detector
from swinscale.heads.upernet import Segmenter
from swinscale.models import LRNet, ModelConfig, SwinConfig
from swinscale.models.config import format_size
from swinscale.models.vit_config import ViTConfig
from swinscale.recipes.detection import (
    DetectionDataConfig,
    detection_datasets,
    detection_preprocessing,
    open_detection_sources,
)
from swinscale.recipes.instruments import instruments
from swinscale.recipes.parts import build_network, labelled_alike, training_and_held
from swinscale.recipes.segmentation import (
    SegmentationDataConfig,
    open_segmentation_sources,
    segmentation_datasets,
    segmentation_preprocessing,
)
from swinscale.recipes.video import VideoDataConfig, open_video_sources, video_datasets, video_preprocessing
from swinscale.seeding import derive_seed
from swinscale.tasks import Classify, ClassifyConfig, ClassifyVideo, SimMIM, SimMIMConfig, Task, VideoConfig
from swinscale.tasks.detect import Detect
from swinscale.tasks.segment import Segment
from swinscale.train import TrainConfig, TrainResult, train
from swinscale.weights import LoadReport, load_weights, read_config, transfer_config
from swinscale.weights.detectors import load_detector
from swinscale.weights.hub import resolve
from swinscale.weights.lrnet import load_lrnet
from swinscale.weights.segmenters import load_segmenter
from swinscale.weights.vit import load_vit

log = logging.getLogger(__name__)
if TYPE_CHECKING:
    _Model = Any  # what reads fields that Swins alone have is given recipes of Swins
else:
    _Model = ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become inputs. Size and channels come from the model.

    Args:
        train: a folder (with a folder per class for classification; with ``train`` and ``val`` or ``test`` inside, these
            are used), a list file, a zip file, tar shards (a folder of them, ``train-{000000..000146}.tar``, a glob),
            or "bundled:fashion-mnist".
        eval: the same for evaluation. None: the split of that name beside the training images, else a share
            ``eval_fraction`` of them.
        eval_split: which split of ``train`` is evaluated on when ``eval`` is None: "val" or "test"; the other one where it
            is missing.
        labels_per_class: train on so many images of each class; 0: on all.
        augment: "imagenet" (the published recipe), "light" (crop and flip) or "none". SimMIM has its own.
        mean, std: per channel, for pixels in [0, 1]. None: ImageNet's for three channels, 0.5 for others.
        crop_ratio: side of the evaluation crop over the side the image is resized to; None: resize straight to the size.
        eval_limit: evaluate on so many images, spread evenly; 0: on all.
        limit: train and evaluate on the same few images, so many and spread evenly over the training images, without
            augmentation and with one mask each (see ``overfit``); 0: on all.
        on_broken_shard: when a tar shard is cut short or damaged, or holds samples without a label while others have
            one: "raise", or "skip" what cannot be read.
    """

    train: str = ""
    eval: str | None = None
    eval_split: Literal["val", "test"] = "val"
    eval_fraction: float = 0.1
    labels_per_class: int = 0
    augment: Literal["imagenet", "light", "none"] = "imagenet"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_ratio: float | None = 224 / 256
    eval_limit: int = 0
    limit: int = 0
    on_broken_shard: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        at_least_0 = dict.fromkeys(("labels_per_class", "eval_limit", "limit"), "[0, inf)")
        check_ranges(self, "data.", eval_fraction="(0, 1)", crop_ratio="(0, 1]", **at_least_0)


@dataclass(frozen=True)
class Recipe:
    """A whole run: model, task, data and training.

    ``init`` is a checkpoint to start from: a run's ``best`` directory, any file that ``swinscale.load_weights`` reads, or a
    repository of the Hub ("hf-hub:owner/name").
    The trained window of a V2 checkpoint is carried over, so that its position bias keeps its values.
    """

    name: str
    model: _Model
    task: SimMIMConfig | ClassifyConfig | VideoConfig | DetectConfig | SegmentConfig
    data: DataConfig | DetectionDataConfig | SegmentationDataConfig | VideoDataConfig = field(
        default_factory=DataConfig
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str | None = None


@dataclass
class Built:
    """What a recipe becomes."""

    recipe: Recipe
    """With everything filled in that depends on data or checkpoint."""
    task: Task
    train_data: Any
    """A data set as ``swinscale.data`` has them, whose items are asked for as [epoch, index]."""
    eval_data: Any
    loaded: LoadReport | None


def run(recipe: Recipe, directory: Path, *, resume: bool = False) -> TrainResult:
    """Builds ``recipe`` and trains it into ``directory``. What was loaded is logged, as ``from_pretrained`` does."""
    built = build(recipe)
    if built.loaded is not None and speaks() and not resume:
        log.log(logging.INFO if built.loaded.plain else logging.WARNING, "%s", built.loaded)
    return train(
        built.task,
        built.train_data,
        built.eval_data,
        recipe.train,
        directory,
        record=to_dict(built.recipe),
        resume=resume,
        instruments=instruments(built, directory),
    )


def build(recipe: Recipe) -> Built:
    """Opens the data, builds the model and its task, and loads the initial weights.

    Raises:
        UsageError: for data that is missing or does not fit the task, or a checkpoint of another model.
    """
    options, data, seed = recipe.task, recipe.data, recipe.train.seed
    _check_axes(recipe)
    if isinstance(options, DetectConfig):
        found = open_detection_sources(data, options, seed)
        recipe = dataclasses.replace(recipe, model=_fit_model(recipe, found[0].classes))
        task, report = build_task(recipe, found[0].classes)
        return Built(recipe, task, *detection_datasets(recipe.model, options, data, found, seed), report)
    if isinstance(options, SegmentConfig):
        pair = open_segmentation_sources(data, seed)
        recipe = dataclasses.replace(recipe, model=_fit_model(recipe, pair[0].classes))
        task, report = build_task(recipe, pair[0].classes, pair[0].rule.classes.colours)
        assert isinstance(data, SegmentationDataConfig)
        return Built(recipe, task, *segmentation_datasets(recipe.model, options, data, pair, seed), report)
    if isinstance(data, VideoDataConfig):
        films = open_video_sources(data, seed, labelled=isinstance(options, VideoConfig))
        recipe = dataclasses.replace(recipe, model=_fit_model(recipe, films[0].classes))
        task, report = build_task(recipe, films[0].classes)
        return Built(recipe, task, *video_datasets(recipe.model, options, data, films, seed), report)
    train_source, eval_source = open_sources(data, seed, labelled=isinstance(options, ClassifyConfig))
    recipe = dataclasses.replace(recipe, model=_fit_model(recipe, train_source.classes))
    task, report = build_task(recipe, train_source.classes)
    return Built(recipe, task, *datasets(recipe, train_source, eval_source), report)


def _check_axes(recipe: Recipe) -> None:
    """Raises UsageError for images and a model of clips, or the reverse."""
    axes, films = len(recipe.model.img_size), isinstance(recipe.data, VideoDataConfig)
    if films != (axes == 3):
        reads = "clips (time, height, width)" if axes == 3 else "images"
        raise UsageError(
            f"The model reads {reads} of {format_size(recipe.model.img_size)}, but {recipe.name} has "
            f"{'films' if films else 'images'}: choose a model or a recipe of the other kind (swinscale list models)."
        )
    wrong = isinstance(recipe.task, ClassifyConfig) and isinstance(recipe.task, VideoConfig) != films
    if wrong:
        kinds = ("VideoConfig", "VideoDataConfig") if films else ("ClassifyConfig", "DataConfig")
        raise UsageError(
            f"A recipe that classifies {'films' if films else 'images'} has task={kinds[0]}(…), data={kinds[1]}(…)."
        )


def build_task(recipe: Recipe, classes: list[str] | None, colours: Any = None) -> tuple[Task, LoadReport | None]:
    """The model and its objective, initialised from the seed or the checkpoint that the recipe names.

    If parameters will be spread over processes, they stay on ``meta`` but for those of the checkpoint, which are mapped from
    its file: ``train`` gives each process its share, and none ever holds the whole model.
    """
    later = recipe.train.memory.shard != "none"
    seed = derive_seed(recipe.train.seed, "weights")
    preprocessing = describe_preprocessing(recipe, classes, colours)
    task: Task
    with torch.device("meta"):
        model = build_network(recipe.model)
    if isinstance(model, LRNet) and not isinstance(recipe.task, ClassifyConfig):
        raise UsageError(
            f"{recipe.name} needs a Swin Transformer: an LR-Net can be trained to classify pictures alone."
        )
    if isinstance(recipe.model, ViTConfig) and isinstance(recipe.task, (DetectConfig, SegmentConfig)):
        raise UsageError(f"{recipe.name} needs a Swin Transformer: a ViT can be pre-trained, and classify pictures.")
    if isinstance(recipe.task, SimMIMConfig):
        task = SimMIM(model, recipe.task, preprocessing)
    elif isinstance(recipe.task, DetectConfig):
        assert classes is not None, "annotations have categories"
        with torch.device("meta"):
            task = Detect(Detector(model, len(classes), recipe.task), classes, preprocessing)
    elif isinstance(recipe.task, SegmentConfig):
        assert classes is not None, "label maps have classes"
        with torch.device("meta"):
            task = Segment(Segmenter(model, len(classes), recipe.task), classes, preprocessing)
    elif isinstance(recipe.task, VideoConfig):
        task = ClassifyVideo(model, recipe.model.num_classes, recipe.task, preprocessing)
    else:
        task = Classify(model, recipe.model.num_classes, recipe.task, preprocessing)
    if not later:
        task.to_empty(device="cpu")
        task.init_weights(seed)
    report = None
    if recipe.init and isinstance(task, Detect):
        report = load_detector(task.model, resolve(recipe.init), keep_meta=later)
    elif recipe.init and isinstance(task, Segment):
        report = load_segmenter(task.model, resolve(recipe.init), keep_meta=later)
    elif recipe.init and isinstance(recipe.model, ViTConfig):
        target = task if isinstance(task, SimMIM) else model
        report = load_vit(target, resolve(recipe.init), keep_meta=later)
    elif recipe.init and isinstance(model, LRNet):
        report = load_lrnet(model, resolve(recipe.init), keep_meta=later)
    elif recipe.init:
        target = task if isinstance(task, SimMIM) else model
        inflate = recipe.task.inflate if isinstance(recipe.task, VideoConfig) else "repeat"
        report = load_weights(target, resolve(recipe.init), inflate=inflate, keep_meta=later)
    return task, report


def open_sources(data: Any, seed: int, labelled: bool) -> tuple[Source, Source]:
    """Training and evaluation images."""
    if not isinstance(data, DataConfig):
        raise UsageError(f"A recipe that classifies or pre-trains needs data=DataConfig(…), not {type(data).__name__}.")
    if not data.train:
        raise UsageError("No images are named: add --data PATH, a folder, list or zip file (or bundled:fashion-mnist).")
    training, held = training_and_held(data, seed, lambda place, part: open_source(place, part, data.on_broken_shard))
    if not labelled:
        return training, held
    layouts = "one folder per class with no images beside them, or a list file with path,label lines"
    return labelled_alike(training, held, data, seed, "images", layouts)


class _AlwaysTheSame(ImageDataset):
    """Serves in every epoch the samples of the first one."""

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return super().__getitem__((0, item[1]))


def _fit_model(recipe: Recipe, classes: list[str] | None) -> Any:
    """The model with the classes of the data, and the trained windows of the checkpoint it starts from."""
    model: Any = recipe.model
    if not isinstance(recipe.task, ClassifyConfig):
        model = dataclasses.replace(model, num_classes=0)
    else:
        found = len(classes or ())
        if model.num_classes not in (0, found):
            raise UsageError(
                f"model.num_classes={model.num_classes}, but {recipe.data.train} has {found} classes. "
                f"Leave model.num_classes out, or set it to {found}."
            )
        model = dataclasses.replace(model, num_classes=found)
    if not isinstance(model, SwinConfig):
        return model
    known = read_config(resolve(recipe.init, verify=False)) if recipe.init else None
    if known is not None and known.depths == model.depths and known.rank <= model.rank:  # others: loading says so
        time = model.patch_size[0] if known.rank < model.rank else None
        trained = transfer_config(known, img_size=model.img_size, window_size=model.window_size, patch_time=time)
        model = dataclasses.replace(model, past_windows=trained.past_windows)
        if model.position_bias != "table" and not any(map(any, model.pretrained_window_sizes)):
            model = dataclasses.replace(model, pretrained_window_sizes=trained.pretrained_window_sizes)
    return model


def describe_preprocessing(recipe: Recipe, classes: list[str] | None, colours: Any = None) -> dict[str, Any]:
    """How images become inputs of this model, for the checkpoint."""
    if isinstance(recipe.data, DetectionDataConfig):
        return detection_preprocessing(recipe.model, recipe.data, classes or [])
    if isinstance(recipe.data, SegmentationDataConfig):
        return segmentation_preprocessing(recipe.model, recipe.data, classes or [], colours)
    if isinstance(recipe.data, VideoDataConfig):
        return video_preprocessing(recipe.model, recipe.data, classes)
    mean, std = normalisation(recipe.model.in_chans, recipe.data.mean, recipe.data.std)
    size = {"img_size": list(recipe.model.img_size), "crop_ratio": recipe.data.crop_ratio}
    return {**size, "mean": list(mean), "std": list(std), "classes": classes}


def datasets(recipe: Recipe, train_source: Source, eval_source: Source) -> tuple[ImageDataset, ImageDataset]:
    """Training and evaluation sets with the transforms of the task."""
    model, data, seed = recipe.model, recipe.data, recipe.train.seed
    assert isinstance(data, DataConfig), "other data have data sets of their own"
    mean, std = normalisation(model.in_chans, data.mean, data.std)
    held = eval_transform(model.img_size, mean, std, crop_ratio=data.crop_ratio)
    if isinstance(recipe.task, SimMIMConfig):
        t = recipe.task
        mask = MaskConfig(model.img_size, t.mask_patch, model.patch_size, t.mask_ratio, t.mask_mode)
        augmented = simmim_transform(model.img_size, mean, std)
    else:
        mask, augmented = None, train_transform(model.img_size, mean, std, augment=data.augment)
    kind, augmented = (_AlwaysTheSame, held) if data.limit else (ImageDataset, augmented)
    return (
        kind(train_source, augmented, channels=model.in_chans, seed=seed, mask=mask),
        ImageDataset(eval_source, held, channels=model.in_chans, seed=seed, mask=mask, replace_corrupt=False),
    )


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that a run recorded in its ``config.json``."""
    return from_dict(Recipe, values)
