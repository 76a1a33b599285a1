"""Kinetics-400's validation films: the published protocol of video models, and which published number applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from swinscale.data import Source
from swinscale.data.clip_transforms import clip_eval_transform
from swinscale.data.clips import ClipDataset, Sampling, ShortSide
from swinscale.data.film_sources import open_films
from swinscale.errors import UsageError
from swinscale.intervals import wilson_interval
from swinscale.models import SwinConfig
from swinscale.models.config import Size, format_size
from swinscale.recipes import get_recipe
from swinscale.recipes.video import VideoDataConfig
from swinscale.suites.base import Measure, Measured, Options, Outcome, measured, other_normalisation
from swinscale.suites.classification import ARCHITECTURE, hash_of_classes
from swinscale.suites.dense import differences, identify
from swinscale.tasks import ClassifyVideo, VideoConfig
from swinscale.video import VideoPipeline, load_video
from swinscale.weights import read_config, transfer_config
from swinscale.weights.files import find_weights
from swinscale.weights.hashes import sha256
from swinscale.weights.hub import resolve
from swinscale.weights.published import K400, MMACTION, VIDEO_SWIN
from swinscale.weights.published import PUBLISHED as FILES

KINETICS_CLASSES = "a8dafb93a1204d4ecfa904f943ce5ee0c62ddeeb1df71aa1f96983fca17d777e"
"""SHA-256 of the names of Kinetics-400's classes, with spaces, in the alphabet's order, one a line without a last line feed."""
ARTICLE, V2 = "arXiv 2106.13230", "arXiv 2111.09883"
Numbers = dict[tuple[int, int, int, int], tuple[float | None, float | None]]
CUT = "how its five crops of a clip were cut is not; here they lie evenly along the longer side"


@dataclass(frozen=True)
class PublishedVideo:
    """A published video classifier.

    Args:
        name: of its published file, without extension and hash; where none was published that of its recipe.
        recipe: the recipe that trains it here, which says its architecture, its clips and how it is tested.
        source: where its numbers come from.
        numbers: (side of the windows, side of pictures, clips, crops of each) → top-1 and top-5 in per cent.
        unclear: what of its protocol is not published.
    """

    name: str
    recipe: str
    source: str
    numbers: Numbers
    unclear: str = ""


def _published() -> list[PublishedVideo]:
    usual = (7, 224, 4, 3)
    large = "kinetics400_swin_large_22k"
    found = [PublishedVideo(large, large, ARTICLE, {usual: (83.1, 95.9)})]  # before mmaction2's of the same recipe
    for source in (VIDEO_SWIN, MMACTION):
        for file in FILES:
            if file.source == source and file.data.endswith(K400) and file.top1 is not None:
                size = file.model.split("_")[1]
                recipe = f"kinetics400_swin_{size}" + "_22k" * ("22K" in file.data)
                found.append(PublishedVideo(file.name, recipe, source, {usual: (file.top1, file.top5)}))
    first = {entry.recipe: entry for entry in reversed(found)}
    # torchvision's files hold the weights of Video-Swin; its own numbers are of another protocol.
    for name, recipe in (("t", "tiny"), ("s", "small"), ("b_1k", "base"), ("b_22k", "base_22k")):
        theirs = first[f"kinetics400_swin_{recipe}"]
        found.append(PublishedVideo(f"swin3d_{name}", theirs.recipe, theirs.source, theirs.numbers))
    larger, giant = "kinetics400_swin_large_384", "kinetics400_swinv2_giant_320"
    giants: Numbers = {(20, 320, 1, 1): (83.2, None), (24, 384, 1, 1): (83.4, None), (24, 384, 4, 5): (86.8, None)}
    found.append(PublishedVideo(larger, larger, ARTICLE, {(12, 384, 10, 5): (84.9, 96.7)}, CUT))
    return [*found, PublishedVideo(giant, giant, V2, giants, CUT)]


PUBLISHED = _published()


@dataclass(frozen=True)
class VideoProtocol:
    """How a film is looked at: crops of clips that are spread evenly over it.

    Args:
        side: of a crop, and the short side of the frames that it is cut from.
    """

    side: int
    sampling: Sampling
    clips: int
    crops: int

    def __str__(self) -> str:
        return (
            f"{self.clips}×{self.crops} views (clips × crops) of {_frames(self.sampling)}; short side {self.side}, bilinear without "
            f"antialiasing, crops of {self.side}×{self.side}; mean of the probabilities; fp32"
        )


@dataclass(frozen=True)
class VideoSuite:
    """Films with published accuracies.

    Args:
        films: the smallest and the largest number of them in a complete copy. Copies differ, since films vanish from the site
            that they come from.
        class_list: SHA-256 of the names of the classes in their order (``KINETICS_CLASSES``).
        tolerance: percentage points.
    """

    name: str
    title: str
    films: tuple[int, int]
    classes: int
    class_list: str
    split: str
    tolerance: float

    def measure(self, weights: str | Path, data: str, options: Options) -> Outcome:
        """Evaluates a video classifier on the films; see ``base.Suite``.

        Raises:
            UsageError: for weights that are no video classifier's, films with other classes, or if none can be read.
        """
        _check_options(options, self.name)
        entry, known_by, obstacles = identify(weights, options.published, PUBLISHED, "video classifier")
        pipeline, protocol = _open(weights, entry, options)
        config = pipeline.backbone.config
        self._check_classifier(config, weights)
        numbers: tuple[float | None, float | None] | None = None
        if entry is not None:
            obstacles += [f"weights: {line} of {entry.name}" for line in _departures(weights, pipeline, entry)]
            numbers, unlike = _numbers(entry, config, protocol)
            obstacles += unlike
        obstacles += other_normalisation(pipeline.mean, pipeline.std)
        source = open_films(data, options.split or self.split)
        obstacles += self._check_classes(source, data, pipeline.task.preprocessing.get("classes"))
        resize = _Resized(protocol.side, clip_eval_transform(pipeline.mean, pipeline.std))
        dataset = ClipDataset(source, resize, protocol.sampling, clips=protocol.clips, replace_corrupt=False)
        found = measured(pipeline.task, dataset, options, options.batch_size or 1, each=True)
        seen = sum(map(sum, found.metrics["confusion"]))
        obstacles += self._check_films(source, seen, found.unreadable)
        beside = None
        if entry is not None and not obstacles:
            beside = f"{entry.source}, {entry.name}, {known_by}" + (f" ({entry.unclear})" if entry.unclear else "")
        values = zip(("top1", "top5"), numbers if beside and numbers else (None, None), strict=True)
        return Outcome(
            suite=self.name,
            weights=str(weights),
            data=data,
            images=seen,
            protocol=str(protocol),
            measures=tuple(self._measure(name, found.metrics[name], seen, number) for name, number in values),
            published=beside,
            obstacles=tuple(obstacles),
            details=self._details(weights, config, protocol, source, found),
            main=found.main,
            what="films",
        )

    def _measure(self, name: str, share: float, seen: int, number: float | None) -> Measure:
        correct = round(share * seen)
        low, high = wilson_interval(correct, seen)
        return Measure(name, 100 * correct / seen, (100 * low, 100 * high), number, self.tolerance)

    def _details(
        self, weights: str | Path, config: SwinConfig, protocol: VideoProtocol, source: Source, found: Measured
    ) -> dict[str, Any]:
        return {
            "title": self.title,
            "model": {"img_size": list(config.img_size), "windows": [list(w) for w in config.stage_windows]},
            "views": {"clips": protocol.clips, "crops": protocol.crops},
            "sha256": sha256(find_weights(resolve(weights))),
            "films_fingerprint": source.fingerprint(),
            "absent": len(source.problems),
            "unreadable": found.unreadable,
            "device": found.device,
        }

    def _check_classifier(self, config: SwinConfig, weights: str | Path) -> None:
        if config.num_classes != self.classes:
            raise UsageError(
                f"{weights} has {config.num_classes:,} classes, {self.title} has {self.classes:,}: fine-tune it first."
            )
        if config.in_chans != 3:
            raise UsageError(f"{weights} reads {config.in_chans} channels; the protocol has films in 3.")

    def _check_classes(self, source: Source, data: str, recorded: Sequence[str] | None) -> list[str]:
        """In what the classes differ from the published ones.

        Args:
            recorded: the classes that the weights record in the order of their outputs; None if they record none.
        """
        layout = "a table with the column label, a folder per class, or a list file with a number from 0 for each film"
        names = source.classes
        if names is None or source.labels is None:
            raise UsageError(f"{data} has no labels: {self.title} is {layout}.")
        if len(names) != self.classes:
            raise UsageError(f"{data} has {len(names):,} classes, {self.title} has {self.classes:,}: it is {layout}.")
        numbered, plain = _numbered(names), _plain(names)
        if recorded is not None and not numbered and _plain(recorded) != plain:
            output = next((i for i, (a, b) in enumerate(zip(_plain(recorded), plain, strict=False)) if a != b), 0)
            raise UsageError(
                f"The weights know other classes, or another order: output {output} is '{recorded[output]}', in {data} it is "
                f"'{names[output]}'. Evaluate on the classes that they were trained on."
            )
        official = hash_of_classes(plain) == self.class_list or (
            numbered and (recorded is None or hash_of_classes(_plain(recorded)) == self.class_list)
        )
        return [] if official else [f"classes: not those of {self.title} in the published order"]

    def _check_films(self, source: Source, seen: int, unreadable: int) -> list[str]:
        """Whether the films that were seen are too few, or too many."""
        if self.films[0] <= seen <= self.films[1]:
            return []
        most = " to ".join(f"{count:,}" for count in dict.fromkeys(self.films))
        lost = [f"{unreadable:,} cannot be read"] if unreadable else []
        lost += [f"{len(source.problems):,} are not there"] if source.problems else []
        return [f"films: {seen:,} instead of the {most} of {self.title}" + (f"; {' and '.join(lost)}" if lost else "")]


def _check_options(options: Options, name: str) -> None:
    if options.resize is not None:
        raise UsageError(f"--resize belongs to classifiers of images: the short side of --suite {name} is --img-size.")
    if options.scales or options.flip:
        raise UsageError(
            f"--scales and --flip: the views of --suite {name} are clips and crops, --clips and --crops. Leave them out."
        )


@dataclass(frozen=True)
class _Resized:
    """Frames (T, C, H, W) uint8 brought to a short side as OpenCV does it, then to inputs."""

    side: int
    transform: Any

    def __call__(self, frames: Tensor) -> Tensor:
        size = ShortSide(self.side)(*frames.shape[-2:])
        pixels: Tensor = self.transform(F.interpolate(frames, size, mode="bilinear", align_corners=False))
        return pixels


def _open(weights: str | Path, entry: PublishedVideo | None, options: Options) -> tuple[VideoPipeline, VideoProtocol]:
    """The weights with the clips of the published model: its frames and its size, unless the options say another."""
    size: Any = options.img_size
    clips, crops = options.clips, options.crops
    if entry is not None:
        recipe = get_recipe(entry.recipe)
        assert isinstance(recipe.task, VideoConfig)
        time, side, _ = recipe.model.img_size
        size = (time, size or side, size or side)
        clips, crops = clips or recipe.task.test_clips, crops or recipe.task.test_crops
    pipeline = load_video(weights, img_size=size, window_size=options.window_size, clips=clips, crops=crops)
    if not isinstance(pipeline.task, ClassifyVideo):
        raise UsageError(f"{weights} is a SimMIM model without a classifier: fine-tune it first.")
    frames, *sides = pipeline.backbone.config.img_size
    if sides[0] != sides[1]:
        raise UsageError(f"{weights} takes frames of {format_size(sides)}; the protocol has squares: add --img-size.")
    sampling = pipeline.sampling if entry is None else _sampling(entry, frames)
    return pipeline, VideoProtocol(sides[0], sampling, pipeline.clips, pipeline.task.crops)


def _sampling(entry: PublishedVideo, frames: int) -> Sampling:
    data = get_recipe(entry.recipe).data
    assert isinstance(data, VideoDataConfig)
    return Sampling(frames, data.sample, data.stride, data.rate)


def _departures(weights: str | Path, pipeline: VideoPipeline, entry: PublishedVideo) -> list[str]:
    """In what a classifier differs from the published one, a line each."""
    model, config, trained = get_recipe(entry.recipe).model, pipeline.backbone.config, read_config(resolve(weights))
    published = [transfer_config(model, img_size=size, window_size=side) for side, size, *_ in entry.numbers]
    lines = differences(config, model, ARCHITECTURE)
    lines += _other_windows(config.stage_windows, list(dict.fromkeys(one.stage_windows for one in published)))
    if trained is None:  # a file of another project, perhaps with windows that were changed just now
        before = config.past_windows[-1] if config.past_windows else config.stage_windows
    else:
        before = trained.stage_windows
        theirs, clips = replace(pipeline.sampling, frames=trained.img_size[0]), _sampling(entry, model.img_size[0])
        lines += [f"trained with clips of {_frames(theirs)} instead of {_frames(clips)}"] * (theirs != clips)
    return lines or [f"trained with {line}" for line in _other_windows(before, [model.stage_windows])]


def _other_windows(windows: Sequence[Size], published: Sequence[Sequence[Size]]) -> list[str]:
    """A line where the windows of the stages are none of those published."""
    if tuple(windows) in published:
        return []
    wanted = " or ".join(" ".join(map(format_size, one)) for one in published)
    return [f"windows {' '.join(map(format_size, windows))} instead of {wanted}"]


def _numbers(
    entry: PublishedVideo, config: SwinConfig, protocol: VideoProtocol
) -> tuple[tuple[float | None, float | None] | None, list[str]]:
    """The published numbers for these windows and this protocol, or why there are none."""
    window = config.stage_windows[0][1]
    here = [key for key in entry.numbers if key[0] == window]
    sized = [key for key in here if key[1] == protocol.side]
    if here and not sized:
        sides = " or ".join(str(side) for side in sorted({key[1] for key in here}))
        return None, [f"image size: {protocol.side}; published with {sides}"]
    views = (protocol.clips, protocol.crops)
    if sized and views not in [key[2:] for key in sized]:
        known = " or ".join(format_size(key[2:]) for key in sized)
        return None, [f"views: {format_size(views)} (clips × crops); published with {known}"]
    return entry.numbers.get((window, protocol.side, *views)), []


def _frames(sampling: Sampling) -> str:
    which = "one of each of as many equal parts" if sampling.kind == "segments" else f"one in {sampling.stride}"
    return f"{sampling.frames} frames, {which}" + (f" at {sampling.rate:g} per second" if sampling.rate else "")


def _numbered(names: Sequence[str]) -> bool:
    """Whether these are the names that a list of numbers gets."""
    return [name.removeprefix("class ") for name in names] == [str(index) for index in range(len(names))]


def _plain(names: Sequence[str]) -> list[str]:
    """Folders have underscores where tables have spaces."""
    return [name.replace("_", " ") for name in names]


KINETICS400 = VideoSuite(
    name="kinetics400",
    title="Kinetics-400's validation set",
    films=(19_700, 20_000),
    classes=400,
    class_list=KINETICS_CLASSES,
    split="val",
    tolerance=0.3,
)
