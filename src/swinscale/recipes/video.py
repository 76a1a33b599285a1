"""What recipes over films have of their own: which films, and how they become clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from swinscale.config import check_ranges
from swinscale.data import MaskConfig, Source, normalisation
from swinscale.data.clip_transforms import clip_eval_transform, clip_train_transform
from swinscale.data.clips import ClipDataset, Cover, Sampling, ShortSide
from swinscale.data.film_sources import open_films
from swinscale.errors import UsageError
from swinscale.models import SwinConfig
from swinscale.recipes.parts import labelled_alike, training_and_held
from swinscale.tasks import SimMIMConfig


@dataclass(frozen=True)
class VideoDataConfig:
    """Which films, and how they become clips. Frames, height and width come from the model.

    Args:
        train: a folder, zip file, list file or table of Kinetics, see ``data.film_sources.open_films``.
        eval: the same for evaluation. None: the split of that name beside the training films, else a share ``eval_fraction``
            of them.
        eval_split: which split of ``train`` is evaluated on when ``eval`` is None; the other one where it is missing.
        labels_per_class: train on so many films of each class; 0: on all.
        sample: "stride", every ``stride``-th frame from a random point on; "segments", a frame of each of equal parts of the film.
        stride: from a frame to the next.
        rate: frames per second that ``stride`` counts; 0: the frames of each film, whatever its rate.
        short: short side that frames are resized to before they are cropped in training; 0: they stay as they are.
        area: share of the picture that a crop has in training.
        flip: probability to mirror a clip in training; 0 where left and right mean something.
        jitter: largest change of brightness, contrast and saturation in training.
        randaugment: operations per clip and their strength out of 10; (0, 0): none.
        erase: probability that a rectangle is filled with noise in training.
        mean, std: per channel, for pixels in [0, 1]. None: ImageNet's for three channels, 0.5 for others.
        eval_limit: evaluate on so many films, spread evenly; 0: on all.
        limit: train and evaluate on the same few films, so many and spread evenly over the training films, without
            augmentation and with the same frames in each epoch; 0: on all.
    """

    train: str = ""
    eval: str | None = None
    eval_split: Literal["val", "test"] = "val"
    eval_fraction: float = 0.1
    labels_per_class: int = 0
    sample: Literal["stride", "segments"] = "stride"
    stride: int = 2
    rate: float = 0.0
    short: int = 256
    area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.0
    randaugment: tuple[int, int] = (0, 0)
    erase: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    eval_limit: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("flip", "erase"), "[0, 1]")
        counts = dict.fromkeys(("short", "rate", "jitter", "labels_per_class", "eval_limit", "limit"), "[0, inf)")
        check_ranges(self, "data.", eval_fraction="(0, 1)", area="(0, 1]", stride="[1, inf)", **shares, **counts)
        check_ranges(self, "data.", randaugment="[0, 10]")
        if self.area[0] > self.area[1]:
            raise UsageError(f"data.area={self.area}: the smaller share comes first.")


def open_video_sources(data: Any, seed: int, labelled: bool) -> tuple[Source, Source]:
    """Training and evaluation films.

    Raises:
        UsageError: for films that are missing or, where classes are needed, have no labels or different ones.
    """
    if not isinstance(data, VideoDataConfig):
        raise UsageError(f"A recipe over films needs data=VideoDataConfig(…), not {type(data).__name__}.")
    if not data.train:
        raise UsageError("No films are named: add --data PATH, a folder, list, zip file or table of Kinetics.")
    training, held = training_and_held(data, seed, open_films)
    if not labelled:
        return training, held
    layouts = (
        "one folder per class with no films beside them, a table of Kinetics, or a list file with path,label lines"
    )
    return labelled_alike(training, held, data, seed, "films", layouts)


def video_preprocessing(model: SwinConfig, data: VideoDataConfig, classes: list[str] | None) -> dict[str, Any]:
    """How films become inputs of this model, for the checkpoint."""
    mean, std = normalisation(model.in_chans, data.mean, data.std)
    sampling = {"sample": data.sample, "stride": data.stride, "rate": data.rate}
    return {
        "img_size": list(model.img_size),
        "sampling": sampling,
        "mean": list(mean),
        "std": list(std),
        "classes": classes,
    }


class _AlwaysTheSame(ClipDataset):
    """Serves in every epoch the same clip of each film, from its middle, with the mask of the first epoch."""

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return super().__getitem__((0, item[1]))

    def decode(self, index: int, random: np.random.Generator | None) -> Tensor:
        return super().decode(index, None)


def video_datasets(
    model: SwinConfig, task: Any, data: VideoDataConfig, sources: tuple[Source, Source], seed: int
) -> tuple[ClipDataset, ClipDataset]:
    """Training and evaluation sets with their transforms; evaluation has one clip, from the middle of each film."""
    mean, std = normalisation(model.in_chans, data.mean, data.std)
    frames, *side = model.img_size
    size = (side[0], side[1])
    sampling = Sampling(frames, data.sample, data.stride, data.rate)
    names = ("area", "flip", "jitter", "randaugment", "erase")
    augmented = clip_train_transform(size, mean, std, **{name: getattr(data, name) for name in names})
    fit: Any = ShortSide(data.short) if data.short else None
    plain, mask, clips = clip_eval_transform(mean, std), None, 1
    if isinstance(task, SimMIMConfig):
        mask = MaskConfig(model.img_size, task.mask_patch, model.patch_size, task.mask_ratio, task.mask_mode)
        plain, clips = clip_eval_transform(mean, std, size), 0
    kind = ClipDataset
    if data.limit:
        kind, augmented, fit = _AlwaysTheSame, clip_eval_transform(mean, std, size), Cover(size)
    common: dict[str, Any] = {"channels": model.in_chans, "seed": seed, "mask": mask}
    held = ClipDataset(sources[1], plain, sampling, fit=Cover(size), clips=clips, replace_corrupt=False, **common)
    return kind(sources[0], augmented, sampling, fit=fit, **common), held
