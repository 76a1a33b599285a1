"""ADE20K's validation images: the published protocol of Swin segmenters, and which published number applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinscale.data import normalisation
from swinscale.data.class_lists import ClassList, class_list
from swinscale.data.segments import SegmentDataset, SegmentSource, open_segments
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.models import SwinConfig
from swinscale.recipes import get_recipe
from swinscale.segmentation import load_segmentation, segmentation_config
from swinscale.suites.base import Measure, Options, Outcome, measured, not_read, other_normalisation
from swinscale.suites.dense import BACKBONE, details, differences, identify, other_windows
from swinscale.weights.hub import resolve

HEADS = ("channels", "pool_scales")
"""Fields of ``SegmentConfig`` that a published segmenter is compared by; the auxiliary head takes no part in evaluation."""
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Of the published figures at several scales, all with the mirror image."""
LONG = 4
"""The long side of a picture is at most so many times the short one of the protocol."""
VIEWS = ("one view", "several scales")
"""The two kinds of published figures, in the order of ``PublishedSegmenter.numbers``."""
MANY = f"--scales {','.join(f'{ratio:g}' for ratio in RATIOS)} --flip"
Numbers = dict[tuple[int, int], tuple[float | None, float | None]]


@dataclass(frozen=True)
class PublishedSegmenter:
    """A published segmenter.

    Args:
        name: of its published file, without extension; where none was published that of its recipe, with the window where the
            recipe has another.
        recipe: the recipe that trains it here, which says its architecture and how it is tested.
        source: where its numbers come from.
        window: side of the windows in training.
        numbers: (side of the windows in use, short side of pictures) → mIoU in per cent in one view, and at ``RATIOS`` with the
            mirror image; None where it was not published.
        unclear: what was published besides, and why nothing can be compared with it.
    """

    name: str
    recipe: str
    source: str
    window: int
    numbers: Numbers
    unclear: str = ""


def _published() -> list[PublishedSegmenter]:
    code, readme = "SwinTransformer/Swin-Transformer-Semantic-Segmentation", "microsoft/Swin-Transformer"
    rows: list[tuple[str, str, str, int, Numbers]] = []
    for size, both in (("tiny", (44.51, 45.81)), ("small", (47.64, 49.47)), ("base", (48.13, 49.72))):
        name = f"upernet_swin_{size}_patch4_window7_512x512"
        rows.append((name, f"upernet_swin_{size}", code, 7, {(7, 512): both}))
    for size, both in (("base", (50.04, 51.66)), ("large", (52.05, 53.53))):
        rows.append((f"upernet_swin_{size}_640", f"upernet_swin_{size}_640", readme, 7, {(7, 640): both}))
    v2, tiny, large, giant = (
        "arXiv 2111.09883",
        *(f"upernet_swinv2_{size}" for size in ("tiny", "large_640", "giant_640")),
    )
    rows += [
        (tiny, tiny, v2, 16, {(16, 512): (47.0, None)}),
        (f"{tiny}_window20", tiny, v2, 20, {(20, 512): (47.7, None)}),
        (f"{tiny}_window32", tiny, v2, 32, {(32, 512): (47.8, None)}),
        (large, large, v2, 40, {(40, 640): (None, 55.9)}),
    ]
    largest: Numbers = {(40, 640): (59.1, None), (56, 896): (59.3, None)}
    unclear = "59.9 at several scales is published without the size and the window that it was measured with"
    return [*(PublishedSegmenter(*row) for row in rows), PublishedSegmenter(giant, giant, v2, 40, largest, unclear)]


PUBLISHED = _published()


@dataclass(frozen=True)
class SegmentationProtocol:
    """How a picture is looked at: whole, and resized as OpenCV does it.

    Args:
        short: the short side in pixels; less where the long side would be longer than ``LONG`` times that.
        ratios: sizes at which it is looked at, as factors on that one; probabilities are averaged.
        flip: look at the mirrored picture, too.
    """

    short: int
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The same as fields of ``SegmentConfig``."""
        return {
            "test_short": self.short,
            "test_long": LONG * self.short,
            "test_ratios": self.ratios,
            "test_flip": self.flip,
            "test_crop": 0,
            "test_stride": 0,
            "test_antialias": False,
        }

    @property
    def kind(self) -> int | None:
        """Which of ``VIEWS`` it is; None: neither."""
        if self.flip:
            return 1 if tuple(sorted(self.ratios)) == RATIOS else None
        return 0 if self.ratios == (1.0,) else None

    @property
    def views(self) -> str:
        """In words."""
        if self.ratios == (1.0,) and not self.flip:
            return "one view"
        sizes = ", ".join(f"{ratio:g}" for ratio in self.ratios)
        return f"at {sizes} times that size{' and mirrored' * self.flip}, mean of the probabilities"

    def __str__(self) -> str:
        size = f"short side {self.short}, long side at most {LONG * self.short}"
        return f"whole picture, {size}, bilinear without antialiasing; {self.views}; fp32"


@dataclass(frozen=True)
class SegmentationSuite:
    """Images with label maps and published mean intersections over union.

    Args:
        images: how many there are, named ``stem`` with their number from 1 in eight digits.
        classes: their names in the order of the labels; None: ADE20K's 150.
        tolerance: points of mIoU.
    """

    name: str
    title: str
    images: int
    stem: str
    classes: tuple[str, ...] | None
    split: str
    tolerance: float

    def measure(self, weights: str | Path, data: str, options: Options) -> Outcome:
        """Evaluates a segmenter on the images; see ``base.Suite``.

        Raises:
            UsageError: for weights that are no segmenter's, label maps with labels that the segmenter has no class for, and
                images without a pixel that counts.
        """
        if options.resize is not None:
            raise UsageError(f"--resize belongs to classifiers: the short side of --suite {self.name} is --img-size.")
        place = resolve(weights)
        config, task_config, preprocessing = segmentation_config(place)
        entry, known_by, obstacles = identify(weights, options.published, PUBLISHED, "segmenter")
        as_published: Any = get_recipe(entry.recipe).task if entry is not None else task_config
        short = options.img_size or as_published.test_short or SegmentConfig().test_short
        protocol = SegmentationProtocol(short, options.scales or (1.0,), options.flip)
        mean, std = normalisation(config.in_chans, preprocessing["mean"], preprocessing["std"])
        obstacles += other_normalisation(mean, std)
        pipeline = load_segmentation(place, window_size=options.window_size, **protocol.settings)
        task = pipeline.task
        number: float | None = None
        if entry is not None:
            in_use = task.backbone.config
            obstacles += [
                f"weights: {line} of {entry.name}" for line in _departures(config, in_use, task_config, entry)
            ]
            number, unlike = _number(entry, in_use.stage_windows[0][0], protocol)
            obstacles += unlike
        source = self._open(data, options.split, pipeline.classes)
        obstacles += self._check_classes(pipeline.classes) + self._check_images(source)
        dataset = SegmentDataset(source, pipeline.transform, config.in_chans, replace_corrupt=False)
        found = measured(task, dataset, options, options.batch_size or 1, each=True)
        obstacles += not_read(found.unreadable, len(source))
        values = {name: found.metrics[key] for name, key in (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc"))}
        if None in values.values():
            raise UsageError(
                f"{data} has no pixel with a class in the images that can be read: nothing can be measured."
            )
        beside = None
        if entry is not None and not obstacles:
            beside = f"{entry.source}, {entry.name}, {known_by}"
        numbers = {"mIoU": number if beside else None}
        return Outcome(
            suite=self.name,
            weights=str(weights),
            data=data,
            images=len(source) - found.unreadable,
            protocol=str(protocol),
            measures=tuple(
                Measure(name, 100 * value, None, numbers.get(name), self.tolerance) for name, value in values.items()
            ),
            published=beside,
            obstacles=tuple(obstacles),
            details=details(self.title, place, task, source, found),
            main=found.main,
        )

    @property
    def _names(self) -> tuple[str, ...]:
        return class_list("ade20k").names if self.classes is None else self.classes

    def _open(self, data: str, split: str | None, known: Sequence[str]) -> SegmentSource:
        """The images, with label 0 left out as published; labels that no class of the segmenter has are an error."""
        names = ClassList(tuple(known))
        return open_segments(data, split or self.split, classes=names, ignore_index=255, reduce_zero_label=True)

    def _check_classes(self, known: Sequence[str]) -> list[str]:
        """In what the segmenter's classes differ. Some lists say more in a name: "television receiver", "airplane;plane"."""
        names = self._names
        if _alike(known, names):
            return []
        if _alike(sorted(known), sorted(names)):
            return [f"classes: not in the order of {self.title}"]
        return [f"classes: {len(known)} that are not the {len(names)} of {self.title}"]

    def _check_images(self, source: SegmentSource) -> list[str]:
        """In what the images differ from those of the published numbers."""
        if len(source) != self.images:
            return [f"images: {len(source):,} instead of the {self.images:,} of {self.title}"]
        expected = [f"{self.stem}{number:08d}" for number in range(1, self.images + 1)]
        if sorted(Path(name).stem for name in source.names) != expected:
            return [f"images: not called {expected[0]} to {expected[-1]}, as those of {self.title} are"]
        return []


def _alike(known: Sequence[str], names: Sequence[str]) -> bool:
    return len(known) == len(names) and all(a.startswith(b) for a, b in zip(known, names, strict=True))


def _departures(trained: SwinConfig, in_use: SwinConfig, task: SegmentConfig, entry: PublishedSegmenter) -> list[str]:
    """In what a segmenter differs from the published one, a line each.

    Args:
        trained, in_use: its backbone before and after its windows were changed.
    """
    recipe = get_recipe(entry.recipe)
    lines = differences(in_use, recipe.model, BACKBONE) + differences(task, recipe.task, HEADS)
    windows = other_windows(in_use, dict.fromkeys(window for window, _ in entry.numbers))
    return lines + (windows or [f"trained with {line}" for line in other_windows(trained, [entry.window])])


def _number(entry: PublishedSegmenter, window: int, protocol: SegmentationProtocol) -> tuple[float | None, list[str]]:
    """The published number for this window and protocol, or why there is none."""
    obstacles = []
    shorts = [short for side, short in entry.numbers if side == window]
    if shorts and protocol.short not in shorts:
        published = " or ".join(f"{short} and {LONG * short}" for short in shorts)
        with_window = f" with windows of {window}×{window}" if len(entry.numbers) > 1 else ""
        obstacles.append(
            f"image size: short side {protocol.short}, long side at most {LONG * protocol.short}; published with "
            f"{published}{with_window}"
        )
    kind = protocol.kind
    if kind is None:
        obstacles.append(f"views: {protocol.views}; published in one view, or with {MANY}")
        return None, obstacles
    both = entry.numbers.get((window, protocol.short))
    if both is not None and both[kind] is None:
        other = both[1 - kind]
        why = entry.unclear if kind == 1 and entry.unclear else ""
        why = why or f"{other:g} is published for {VIEWS[1 - kind]}" + (f" ({MANY})" if kind == 0 else "")
        obstacles.append(f"no number for {VIEWS[kind]} is published for {entry.name}: {why}")
    return both[kind] if both is not None else None, obstacles


ADE20K = SegmentationSuite(
    name="ade20k",
    title="ADE20K's validation set",
    images=2_000,
    stem="ADE_val_",
    classes=None,
    split="val",
    tolerance=0.2,
)
