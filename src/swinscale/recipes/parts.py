"""What recipes of several tasks share: which images train and which evaluate, networks, the backbone of dense tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

from swinscale.data import Source, split_source, subset_per_class
from swinscale.errors import UsageError
from swinscale.models import ModelConfig, SwinConfig, build_model, model_config
from swinscale.models.vit_config import ViTConfig
from swinscale.seeding import derive_seed

AnySource = TypeVar("AnySource", bound=Source)


def training_and_held(data: Any, seed: int, open_part: Callable[[str, str], AnySource]) -> tuple[AnySource, AnySource]:
    """Training and evaluation images, by the settings that all kinds of data have.

    Args:
        data: has ``train``, ``eval``, ``eval_split``, ``eval_fraction``, ``eval_limit`` and ``limit`` (see ``DataConfig``).
        seed: of the run; it decides which images are held out where there is no part for evaluation.
        open_part: opens a place and a part of it, "train", "val" or "test".

    Raises:
        UsageError: for images that are missing or too few.
    """
    training = open_part(data.train, "train")
    if data.limit:
        few = _spread(training, "limit", data.limit)
        return few, few
    if data.eval is not None:
        held = open_part(data.eval, data.eval_split)
    elif available := [s for s in (data.eval_split, "val", "test") if s in training.splits]:
        held = open_part(data.train, available[0])
    elif len(training) < 2:
        raise UsageError(f"{data.train} has {len(training)} images: too few to hold some out. Add data.eval=PATH.")
    else:
        both = split_source(training, data.eval_fraction, derive_seed(seed, "split"))
        training, held = cast(tuple[AnySource, AnySource], both)
    return training, _spread(held, "eval_limit", data.eval_limit) if data.eval_limit else held


def labelled_alike(
    training: AnySource, held: AnySource, data: Any, seed: int, what: str, layouts: str
) -> tuple[AnySource, AnySource]:
    """Both parts, where they have labels of the same classes; of the training part ``data.labels_per_class`` of each class.

    Args:
        what: "images" or "films".
        layouts: which give labels, for the message.

    Raises:
        UsageError: for a part without labels, or parts with different classes.
    """
    if training.labels is None or training.classes is None:
        raise UsageError(f"{data.train} has no labels: classification needs {layouts}.")
    if held.classes != training.classes:
        only = sorted(set(held.classes or ()) ^ set(training.classes))
        raise UsageError(
            f"Training and evaluation {what} have different classes (in one alone: {', '.join(only[:5])}). Give both the same."
        )
    if data.labels_per_class:
        few = subset_per_class(training, data.labels_per_class, derive_seed(seed, "labels"))
        training = cast(AnySource, few)
    return training, held


def _spread(source: AnySource, setting: str, count: int) -> AnySource:
    """``count`` images spread evenly, so that they are of several classes where each has a folder."""
    if count > len(source):
        raise UsageError(f"data.{setting}={count}, but there are {len(source)} images. Ask for fewer.")
    return cast(AnySource, source.take(index * len(source) // count for index in range(count)))


def build_network(config: ModelConfig) -> Any:
    """``build_model``, and for a ``ViTConfig`` the network of timm, which is needed for it alone."""
    if not isinstance(config, ViTConfig):
        return build_model(config)
    from swinscale.adapters.vit import ViT

    return ViT(config)


def dense_model(model: str, drop_path: float, window: int = 0, img_size: Any = 800) -> SwinConfig:
    """A named model as the backbone of a detector or a segmenter: without classifier, windows never shrink to the map.

    V1 attends to padding, as the published dense code does and its weights expect; V2 does not.

    Args:
        window: side of the windows; 0: the model's own. A V2 checkpoint of another window keeps its position bias.
        img_size: that windows are fitted to.

    Raises:
        UsageError: for a network that is no Swin.
    """
    named = model_config(model, num_classes=0)
    if not isinstance(named, SwinConfig):
        raise UsageError(f"{model} is no Swin Transformer, and detectors and segmenters need one. Name one.")
    config = dataclasses.replace(named, drop_path_rate=drop_path)
    pad: Literal["legacy", "exact"] = "legacy" if config.version == 1 else "exact"
    changed: dict[str, Any] = {"window_size": window} if window else {}
    return dataclasses.replace(config, img_size=img_size, small_map="pad", pad=pad, **changed)
