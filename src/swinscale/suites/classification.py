"""ImageNet and ImageNet-V2: preprocessing, images and class order as published, and which published number applies."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swinscale.config import suggest
from swinscale.data import ImageDataset, Source, open_source
from swinscale.data.transforms import published_transform
from swinscale.errors import UsageError
from swinscale.inference import Pipeline, load_pipeline
from swinscale.intervals import wilson_interval
from swinscale.models import SwinConfig, model_config
from swinscale.models.config import format_size
from swinscale.suites.base import Measure, Options, Outcome, measured, not_read, one_view, other_normalisation
from swinscale.tasks import SimMIM
from swinscale.weights import read_metadata
from swinscale.weights.files import find_weights
from swinscale.weights.hashes import sha256
from swinscale.weights.hub import resolve
from swinscale.weights.published import IN1K, PUBLISHED, Published, published

Numbers = tuple[float | None, float | None]
"""Published top-1 and top-5 in per cent; None where none is."""

IMAGENET_CLASSES = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
"""SHA-256 of the 1,000 WordNet ids of ImageNet-1K, sorted, one a line without a last line feed."""

RESIZE = {"swin_t": 232, "swin_s": 246, "swin_b": 238, "swin_v2_t": 260, "swin_v2_s": 260, "swin_v2_b": 272}
"""Short side before the centre crop in torchvision's evaluation."""

ARCHITECTURE = (
    *("version", "embed_dim", "depths", "num_heads", "mlp_ratio", "patch_size", "qkv_bias", "patch_norm", "ape"),
    *("position_bias", "norm_placement", "similarity", "main_norm_interval"),
)
TRANSFERRED = ("img_size", "stage_windows", "trained_windows", "past_windows")
"""Fields that a transfer changes."""


@dataclass(frozen=True)
class ImageProtocol:
    """From a picture to a square of ``size`` pixels, with Pillow's bicubic filter as published.

    Args:
        resize: pixels of the short side before the centre crop; None: both sides are resized to ``size``.
    """

    size: int
    resize: int | None

    def __str__(self) -> str:
        if self.resize is None:
            return f"resized to {self.size}×{self.size} (bicubic), fp32"
        return f"short side {self.resize} (bicubic), centre crop {self.size}, fp32"


def published_protocol(size: int, entry: Published | None = None) -> ImageProtocol:
    """microsoft/Swin-Transformer resizes to int(256/224·size) and crops, from 384 pixels on it resizes directly;
    torchvision's weights have a resize each (``RESIZE``).

    Args:
        entry: the published weights; None: the protocol of microsoft/Swin-Transformer.
    """
    if entry is not None and entry.name in RESIZE and entry.img_size == size:
        return ImageProtocol(size, RESIZE[entry.name])
    return ImageProtocol(size, int(256 / 224 * size) if size < 384 else None)


@dataclass(frozen=True)
class ClassificationSuite:
    """A set of labelled images with published accuracies.

    Args:
        images: how many there are, the same number of each class.
        class_list: SHA-256 of the sorted WordNet ids (``hash_of_classes``).
        split: the part to take of a folder that has parts.
        layout: what the folder looks like, in words.
        not_these: words in a path that name other sets of the same layout.
        tolerance: percentage points.
        numbers: the published values (top-1, top-5) of an entry on these images.
    """

    name: str
    title: str
    images: int
    classes: int
    class_list: str
    split: str
    layout: str
    not_these: tuple[str, ...]
    tolerance: float
    numbers: Callable[[Published], Numbers]

    def measure(self, weights: str | Path, data: str, options: Options) -> Outcome:
        """Evaluates weights on the images; see ``base.Suite``.

        Raises:
            UsageError: before any forward pass, if the images are not laid out as this set is, if it cannot be known
                which output means which class, or if the weights are no classifier of so many classes.
        """
        one_view(options)
        overrides = {n: v for n in ("img_size", "window_size") if (v := getattr(options, n)) is not None}
        pipeline = load_pipeline(weights, **overrides)
        config = self._check_model(pipeline, weights)
        source = open_source(data, split=options.split or self.split)
        obstacles = self._check_images(source, data, pipeline.classes)
        entry, known_by, unknown = self._identify(weights, config, options.published)
        obstacles += unknown
        protocol = published_protocol(config.img_size[0], entry)
        if options.resize is not None and options.resize != protocol.resize:
            if options.resize < protocol.size:
                raise UsageError(
                    f"--resize {options.resize} is less than the crop of {protocol.size}: give at least that."
                )
            changed = replace(protocol, resize=options.resize)
            obstacles.append(f"preprocessing: {changed}; published with {protocol}")
            protocol = changed
        obstacles += other_normalisation(pipeline.mean, pipeline.std)
        transform = published_transform(protocol.size, protocol.resize, pipeline.mean, pipeline.std)
        dataset = ImageDataset(source, transform, replace_corrupt=False, orient=False)
        found = measured(pipeline.task, dataset, options, options.batch_size or 64)
        metrics = found.metrics
        seen = sum(map(sum, metrics["confusion"]))
        obstacles += not_read(len(source) - seen, len(source))
        values: Numbers = (None, None)
        beside = None
        if entry is not None and not obstacles:
            values, beside = self.numbers(entry), f"{entry.source}, {entry.name} ({entry.data}), {known_by}"
        return Outcome(
            suite=self.name,
            weights=str(weights),
            data=data,
            images=seen,
            protocol=str(protocol),
            measures=tuple(
                self._measure(n, metrics[n], seen, v) for n, v in zip(("top1", "top5"), values, strict=True)
            ),
            published=beside,
            obstacles=tuple(obstacles),
            details={
                "title": self.title,
                "model": {"img_size": list(config.img_size), "windows": [list(w) for w in config.stage_windows]},
                "sha256": sha256(find_weights(resolve(weights))),
                "images_fingerprint": source.fingerprint(),
                "device": found.device,
            },
            main=found.main,
        )

    def _measure(self, name: str, share: float, seen: int, value: float | None) -> Measure:
        correct = round(share * seen)
        low, high = wilson_interval(correct, seen)
        return Measure(name, 100 * correct / seen, (100 * low, 100 * high), value, self.tolerance)

    def _check_model(self, pipeline: Pipeline, weights: str | Path) -> SwinConfig:
        config = pipeline.backbone.config
        if isinstance(pipeline.task, SimMIM):
            raise UsageError(f"{weights} is a SimMIM model without a classifier: fine-tune it first.")
        if config.num_classes != self.classes:
            raise UsageError(
                f"{weights} has {config.num_classes:,} classes, {self.title} has {self.classes:,}: fine-tune it first."
            )
        if pipeline.classes is not None and len(pipeline.classes) != self.classes:
            raise UsageError(
                f"{weights} records {len(pipeline.classes):,} names for {self.classes:,} classes: correct them."
            )
        if len(set(config.img_size)) > 1 or config.in_chans != 3:
            size = format_size(config.img_size)
            raise UsageError(
                f"{weights} takes {size} pixels in {config.in_chans} channels; the protocol has squares in 3."
            )
        return config

    def _check_images(self, source: Source, data: str, recorded: Sequence[str] | None) -> list[str]:
        """In what the images differ from those of the published number.

        Args:
            recorded: the classes that the weights record in the order of their outputs; None if they record none.
        """
        names, count = source.classes, self.classes
        if names is None or source.labels is None:
            raise UsageError(f"{data} has no labels: {self.title} is {self.layout}, or a list file with path,class.")
        if len(names) != count:
            raise UsageError(
                f"{data} has {len(names):,} classes, {self.title} has {count:,}: {self.layout}.{_absent(names, count)}"
            )
        obstacles = self._check_order(names, data, recorded)
        if word := next((w for w in self.not_these if w in data.lower()), None):
            obstacles.append(f"images: '{word}' in {data} names another set than {self.title}")
        per_class = Counter(source.labels)
        uneven = [label for label in range(count) if per_class[label] != self.images // count]
        if len(source) != self.images:
            obstacles.append(f"images: {len(source):,} instead of {self.images:,}")
        elif uneven:
            label = uneven[0]
            obstacles.append(f"images: class {names[label]} has {per_class[label]} instead of {self.images // count}")
        return obstacles

    def _check_order(self, names: Sequence[str], data: str, recorded: Sequence[str] | None) -> list[str]:
        """Sources sort by the numbers in names: 10 follows 9, and indices and WordNet ids are in the published order."""
        kind = _naming(names)
        if recorded is not None and list(recorded) != list(names):
            if _naming(recorded) == kind or set(recorded) == set(names):
                output = next(i for i, (a, b) in enumerate(zip(recorded, names, strict=True)) if a != b)
                raise UsageError(
                    f"The weights know other classes, or another order: output {output} is '{recorded[output]}', in "
                    f"{data} it is '{names[output]}'. Evaluate on the classes that they were trained on, in that order."
                )
            if _naming(recorded) != "words" and not self._official(recorded):
                raise UsageError(
                    f"The weights record classes that are not those of {self.title} in the published order, so it cannot "
                    f"be told which output means '{names[0]}' of {data}: name its folders as the weights do."
                )
        if self._official(names):
            return []
        if kind == "indices":
            raise UsageError(
                f"{data} has folders named by numbers, but not 0 to {self.classes - 1}: {self.title} is {self.layout}."
                f"{_absent(names, self.classes)}"
            )
        if kind == "WordNet ids":
            return [f"classes: the WordNet ids are not those of {self.title}"]
        if recorded is None or list(recorded) != list(names):
            raise UsageError(
                f"{data} has classes such as '{names[0]}', so it cannot be told which output means which: name folders "
                f"by WordNet id (n01440764) or by index (0 to {self.classes - 1})."
            )
        return ["classes: neither WordNet ids nor indices, so nothing says that they are the published ones"]

    def _official(self, names: Sequence[str]) -> bool:
        """Whether these are the published classes in the published order, by index or by WordNet id."""
        if _naming(names) == "indices":
            return [int(n) for n in names] == list(range(self.classes))
        return hash_of_classes(names) == self.class_list

    def _identify(
        self, weights: str | Path, config: SwinConfig, asked: str | None
    ) -> tuple[Published | None, str, list[str]]:
        """The published weights that these are, how that is known, and what speaks against a comparison."""
        trained_here = "task" in read_metadata(resolve(weights))
        named = None if trained_here else published(weights)
        entry, known_by = named, "by the name of the weights"
        if asked is not None:
            entry, known_by = published(asked), "as --published says"
            if entry is None:
                known = [e.name for e in PUBLISHED if any(self.numbers(e))]
                raise UsageError(
                    f"--published {asked}: nothing is published of that name.{suggest(asked, known)} Known: "
                    f"{', '.join(known)}."
                )
        if entry is None:
            names = [e.name for e in _distinct(PUBLISHED) if any(self.numbers(e)) and not _departures(config, e)]
            which = (
                f"add --published with one of {', '.join(names)}"
                if names
                else f"{self.title} has no published number for such a model"
            )
            return None, "", [f"weights: their name does not say which published ones they are; {which}"]
        obstacles = [f"weights: {line} of {entry.name}" for line in _departures(config, entry)]
        if named is not None and len(_distinct((named, entry))) > 1:
            obstacles.append(f"weights: their name says {named.name}, not {entry.name}")
        if not any(self.numbers(entry)):
            obstacles.append(f"no number on {self.title} is published for {entry.name}")
        return entry, known_by, obstacles


def hash_of_classes(names: Sequence[str]) -> str:
    """SHA-256 of class names in their order, one a line without a last line feed."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _naming(names: Sequence[str]) -> str:
    for kind, pattern in (("indices", r"\d+"), ("WordNet ids", r"n\d{8}")):
        if all(re.fullmatch(pattern, name) for name in names):
            return kind
    return "words"


def _absent(names: Sequence[str], count: int) -> str:
    """ " There is no 7, 12." of folders named by index."""
    absent = [str(i) for i in range(count) if i not in {int(n) for n in names}] if _naming(names) == "indices" else []
    return f" There is no {', '.join(absent[:5])}{', …' if len(absent) > 5 else ''}." if absent else ""


def _departures(config: SwinConfig, entry: Published) -> list[str]:
    """In what a model differs from the published one, a line each; the architecture alone where that is another."""
    theirs = model_config(entry.model)
    if theirs.rank != config.rank:
        return ["a model for images, while that is one for clips"]
    for fields in (ARCHITECTURE, TRANSFERRED):
        pairs = [(name.replace("_", " "), getattr(config, name), getattr(theirs, name)) for name in fields]
        if lines := [f"{name} {_words(a)} instead of {_words(b)}" for name, a, b in pairs if a != b]:
            return lines
    return []


def _words(value: Any) -> str:
    """Sizes as 8×8, several as 8×8 8×8 4×4."""
    if not isinstance(value, tuple) or not value:
        return "none" if value == () else str(value)
    if isinstance(value[0], int):
        return format_size(value)
    return " ".join(map(_words, value))


def _distinct(entries: Sequence[Published]) -> list[Published]:
    """One of each file: some have two names."""
    return list({replace(entry, name=""): entry for entry in entries}.values())


def _on_imagenet(entry: Published) -> Numbers:
    return (entry.top1, entry.top5) if entry.data.endswith(IN1K) else (None, None)


def _on_imagenet_v2(entry: Published) -> Numbers:
    return entry.top1_v2, None


IMAGENET = ClassificationSuite(
    name="imagenet",
    title="ImageNet-1K's validation set",
    images=50_000,
    classes=1_000,
    class_list=IMAGENET_CLASSES,
    split="val",
    layout="a folder per class, named by WordNet id (n01440764 ...), alone or under val",
    not_these=(),
    tolerance=0.1,
    numbers=_on_imagenet,
)
IMAGENET_V2 = replace(
    IMAGENET,
    name="imagenet-v2",
    title="ImageNet-V2 (matched frequency)",
    images=10_000,
    layout="a folder per class, named by index (0 ... 999)",
    not_these=("imagenetv2-threshold", "imagenetv2-top"),
    tolerance=0.2,
    numbers=_on_imagenet_v2,
)
