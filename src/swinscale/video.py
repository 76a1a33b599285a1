"""Using a trained video model: films in, classes and drawings out; evaluation over several clips and crops of each film.

    from swinscale.video import load_video

    video = load_video("runs/desk_video_swinv2/best")   # or a file of torchvision, of OpenMMLab's Video Swin
    probabilities = video("film.mp4")                   # (K,): the mean over all clips and crops
    print(video.classes[int(probabilities.argmax())])

A film is a file, or its frames in order (N, C, H, W), uint8 or float in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale import dense
from swinscale.config import from_dict
from swinscale.data import MaskConfig, Source, normalisation
from swinscale.data.clip_transforms import clip_eval_transform
from swinscale.data.clips import ClipDataset, Cover, Sampling
from swinscale.data.film_sources import open_films
from swinscale.data.frames import Timeline, read_frames
from swinscale.diagnose.clips import print_video_table
from swinscale.errors import UsageError
from swinscale.inference import check_classes, load_simmim, run_around
from swinscale.models import SwinTransformer
from swinscale.models.config import format_size
from swinscale.parallel import autocast, resolve_precision
from swinscale.recipes.video import open_video_sources
from swinscale.tasks import ClassifyVideo, SimMIM, VideoConfig
from swinscale.tasks.video import crop_corner
from swinscale.weights import from_pretrained, infer_config, read_config, read_metadata, read_state_dict
from swinscale.weights.hub import resolve
from swinscale.weights.load import naming


@dataclass(frozen=True)
class VideoPipeline:
    """A trained video model with the preprocessing it was trained with.

    Attributes:
        transform: frames (N, C, H, W) → normalised ones.
        sampling: which frames make a clip.
        fit: what frames are resized to: the smallest size of their shape that covers what the model looks at.
        clips: of a film, spread evenly over it; ``task.crops`` of each are looked at.
    """

    task: ClassifyVideo | SimMIM
    transform: Any
    sampling: Sampling
    fit: Cover
    clips: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def backbone(self) -> SwinTransformer:
        """The Swin Transformer inside."""
        model = self.task.encoder if isinstance(self.task, SimMIM) else self.task.model
        assert isinstance(model, SwinTransformer)
        return model

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the probabilities; "class 0" and so on for weights that record none."""
        known: list[str] | None = self.task.preprocessing.get("classes")
        return known or [f"class {index}" for index in range(self.backbone.num_classes)]

    @torch.no_grad()
    def __call__(self, film: str | Path | Tensor, rate: float = 25.0) -> Tensor:
        """The probability of each class, (K,) on the CPU: the mean over ``clips`` × ``task.crops`` views.

        Args:
            film: see the module.
            rate: frames per second of a film that is given as frames; it counts where a model was trained on so many per second.

        Raises:
            CorruptImage: for a film that cannot be read.
        """
        if not isinstance(self.task, ClassifyVideo):
            raise UsageError("A SimMIM model has no classes: fine-tune it on films first.")
        device = next(self.task.parameters()).device
        views = self.look(film, self.clips, rate)
        batch = {"image": views[None].to(device), "size": torch.tensor([views.shape[-2:]])}
        with autocast(resolve_precision("auto", device), device):
            return self.task.eval().probabilities(batch)[0].float().cpu()

    def look(self, film: str | Path | Tensor, clips: int, rate: float = 25.0) -> Tensor:
        """(clips, C, T, h, w): so many clips, spread evenly over a film, as the model reads them but for the crop.

        Raises:
            CorruptImage: as above.
            UsageError: for a tensor of another shape.
        """

        def choose(timeline: Timeline) -> list[int]:
            return self.sampling.choose(timeline, clips, None).flatten().tolist()

        channels = self.backbone.config.in_chans
        if isinstance(film, Tensor):
            if film.ndim != 4 or not len(film) or film.shape[1] != channels:
                raise UsageError(
                    f"A film of shape {tuple(film.shape)}: give at least one frame, (frames, {channels}, height, width)."
                )
            frames = film[choose(Timeline([number / rate for number in range(len(film))]))]
            frames = frames if frames.is_floating_point() else frames / 255
            size = self.fit(*frames.shape[-2:])
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True).clamp(0, 1)
        else:
            file = Path(film)
            frames = read_frames(file, file.name, choose, channels, self.fit)
        pixels: Tensor = self.transform(frames)
        return pixels.unflatten(0, (-1, self.sampling.frames)).movedim(1, 2)

    def read(self, film: Path) -> Tensor:
        """One input, (C, T, H, W): the centre of the clip in the middle of a film.

        Raises:
            CorruptImage: if it cannot be read.
        """
        clip = self.look(film, 1)[0]
        height, width = self.fit.size
        top, left = crop_corner((clip.shape[-2], clip.shape[-1]), (height, width), 0, 1)
        return clip[..., top : top + height, left : left + width]


def load_video(
    checkpoint: str | Path,
    *,
    img_size: int | Sequence[int] | None = None,
    window_size: int | Sequence[int] | None = None,
    clips: int | None = None,
    crops: int | None = None,
) -> VideoPipeline:
    """Opens a run's ``best`` or ``last`` directory, one from the Hub, or a video model of torchvision or OpenMMLab.

    Args:
        img_size, window_size: other than in training: height and width as one number or two, or with frames, for windows tokens,
            in front. V2 keeps its position bias, tables of V1 are resized.
        clips, crops: of a film, and of each clip. None: as the run was to be tested; 4 × 3 for other weights.

    Raises:
        UsageError: if there are no weights, or they are not those of a video model.
    """
    place = resolve(checkpoint)
    record, config = read_metadata(place), read_config(place)
    options, preprocessing = dict(record.get("task", {})), record.get("preprocessing", {})
    kind = options.pop("name", "video")
    if config is None:  # of another project
        with naming(str(place)):
            config = infer_config(read_state_dict(place)[0], name=place)
    if kind not in ("video", "simmim") or config.rank != 3:
        raise UsageError(f"{checkpoint} is no video model: it reads pictures. Name a run of a video recipe.")
    size = config.img_size if img_size is None else _with_time(config.img_size[0], img_size)
    moved: dict[str, Any] = {"img_size": size}
    if window_size is not None:
        moved["window_size"] = tuple(_with_time(window[0], window_size) for window in config.window_size)
    task: ClassifyVideo | SimMIM
    if kind == "simmim":
        task = load_simmim(place, **moved)
    else:
        if config.num_classes < 2:
            raise UsageError(f"{checkpoint} has no classifier: it was not trained to classify. Fine-tune it first.")
        model = from_pretrained(place, **moved)
        settings = from_dict(VideoConfig, options)
        settings = dataclasses.replace(
            settings,
            test_clips=settings.test_clips if clips is None else clips,
            test_crops=settings.test_crops if crops is None else crops,
        )
        task = ClassifyVideo(model, model.num_classes, settings, preprocessing)
        task.crops, clips = settings.test_crops, settings.test_clips
    mean, std = normalisation(config.in_chans, preprocessing.get("mean"), preprocessing.get("std"))
    how = preprocessing.get("sampling", {})
    sampling = Sampling(size[0], how.get("sample", "stride"), how.get("stride", 2), how.get("rate", 0.0))
    transform = clip_eval_transform(mean, std)
    return VideoPipeline(task.eval(), transform, sampling, Cover((size[1], size[2])), clips or 1, mean, std)


def _with_time(time: int, sides: int | Sequence[int]) -> tuple[int, ...]:
    """(time, height, width) of one number, two, or all three of them."""
    sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
    return (time, *sides) if len(sides) == 2 else sides


def evaluate_videos(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    batch_size: int = 1,
    device: str = "auto",
    workers: int | None = None,
    out: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a video classifier, and prints accuracy, that of the five best guesses, and a table of the classes.

    Of a SimMIM model the reconstruction of one clip of each film is measured.

    Args:
        data: films (``data.film_sources.open_films``); None: those that the run around ``checkpoint`` was evaluated on.
        split: which part of ``data``, where it has parts.
        workers: processes that read films; None: up to 8 beside a GPU, else none.
        out: a JSON file for the measures, with machine and versions.
        options: see ``load_video``.

    Raises:
        UsageError: for films that are missing, have other classes than the model, or cannot be read, all of them.
    """
    pipeline = load_video(checkpoint, **options)
    task, config = pipeline.task, pipeline.backbone.config
    source, name, seed = _open_labelled(checkpoint, pipeline, data, split)
    how: dict[str, Any] = {"fit": pipeline.fit, "channels": config.in_chans, "seed": seed, "replace_corrupt": False}
    views = "one clip"
    if isinstance(task, SimMIM):
        centre = clip_eval_transform(pipeline.mean, pipeline.std, pipeline.fit.size)
        dataset = ClipDataset(source, centre, pipeline.sampling, mask=mask_of(task), **how)
    else:
        dataset = ClipDataset(source, pipeline.transform, pipeline.sampling, clips=pipeline.clips, **how)
        views = f"{pipeline.clips} × {task.crops} views"
    metrics = dense.measure(task, dataset, batch_size, device, workers)
    metrics |= {
        "absent": len(source.problems),
        "views": views,
        "size": format_size(config.img_size),
        "classes": source.classes,
    }
    dense.report(checkpoint, name, len(source), metrics, print_video_table, out, what="films")
    return metrics


def _open_labelled(
    checkpoint: str | Path, pipeline: VideoPipeline, data: str | None, split: str
) -> tuple[Source, str, int]:
    """The films to evaluate on, what to call them, and the seed of clips and masks."""
    labelled, seed = isinstance(pipeline.task, ClassifyVideo), 0
    if data is None:
        recipe, name = run_around(checkpoint)
        seed = recipe.train.seed
        source = open_video_sources(recipe.data, seed, labelled)[1]
    else:
        source = open_films(data, split)
        name = f"the {split} part of {data}" if source.splits else data
    if labelled:
        known = pipeline.task.preprocessing.get("classes")
        check_classes(source, name, known, pipeline.backbone.num_classes, checkpoint, "films")
    return source, name, seed


def mask_of(task: SimMIM) -> MaskConfig:
    """What a SimMIM model of clips hides."""
    config, o = task.encoder.config, task.config
    return MaskConfig(config.img_size, o.mask_patch, config.patch_size, o.mask_ratio, o.mask_mode)
