"""What suites of all tasks have in common: options, measures beside published ones, printing and writing them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from swinscale.data import EpochLoader
from swinscale.data.dataset import EpochDataset
from swinscale.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swinscale.errors import UsageError
from swinscale.evaluation import evaluate
from swinscale.manifest import environment
from swinscale.parallel import world
from swinscale.tasks.base import Task
from swinscale.weights.files import atomic


@dataclass(frozen=True)
class Options:
    """How a suite is run. None: as published.

    Args:
        published: name of the published weights that these are, where their own name does not say it.
        img_size, window_size: evaluate at another size or with another window; weights are transferred.
        resize: pixels of the short side before the centre crop.
        split: part of the data; None: the suite's own.
        batch_size: images at a time; None: what suits the suite.
        workers: processes that read images; None: up to 8 beside a GPU, else none.
        scales: sizes at which a picture is looked at, as factors on the published one; (): at that one alone.
        flip: look at the mirrored picture, too.
        clips, crops: of a film, and of each clip.
    """

    published: str | None = None
    img_size: int | None = None
    window_size: int | None = None
    resize: int | None = None
    split: str | None = None
    batch_size: int | None = None
    device: str = "auto"
    workers: int | None = None
    scales: tuple[float, ...] = ()
    flip: bool = False
    clips: int | None = None
    crops: int | None = None


@dataclass(frozen=True)
class Measure:
    """A measure beside its published value, all in per cent.

    Args:
        interval: 95 % interval of ``ours`` for other images of the same kind; None: not computed.
        published: None where none is published, or it may not be compared.
        tolerance: the largest difference that is put down to rounding, decoders and arithmetic.
    """

    name: str
    ours: float
    interval: tuple[float, float] | None
    published: float | None
    tolerance: float

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return None if self.published is None else self.ours - self.published

    @property
    def within(self) -> bool | None:
        """Whether the difference is within the tolerance."""
        return None if self.difference is None else abs(self.difference) <= self.tolerance + 1e-9


@dataclass(frozen=True)
class Outcome:
    """What a suite measured.

    Args:
        protocol: how an image became an input, in words.
        published: which published number it is compared with and how that is known, in words; None without comparison.
        obstacles: why there is no comparison, one reason each; empty with one.
        details: what else belongs in the record; JSON-ready.
        main: whether this process prints and writes for all of them.
        what: it was measured on: ``images`` counts these.
    """

    suite: str
    weights: str
    data: str
    images: int
    protocol: str
    measures: tuple[Measure, ...]
    published: str | None
    obstacles: tuple[str, ...]
    details: dict[str, Any]
    main: bool
    what: str = "images"


class Suite(Protocol):
    """A published table: how its numbers are measured, and on which images."""

    @property
    def name(self) -> str:
        """As the command line calls it."""

    def measure(self, weights: str | Path, data: str, options: Options) -> Outcome:
        """Evaluates weights, and compares them where nothing differs from what was published."""


@dataclass(frozen=True)
class Measured:
    """What ``measured`` found.

    Args:
        metrics: of the task, without ``unreadable``.
        unreadable: images that cannot be read, of all processes.
        main: see ``Outcome``.
    """

    metrics: dict[str, Any]
    unreadable: int
    device: str
    main: bool


def measured(task: Task, dataset: EpochDataset, options: Options, batch: int, each: bool = False) -> Measured:
    """Evaluates a task on all images in single precision, on the device that the options name.

    Args:
        batch: images at a time.
        each: so many in each process, not in all of them together.
    """
    with world(options.device) as here:
        workers = min(os.cpu_count() or 1, 8) if here.device.type == "cuda" else 0
        loader = EpochLoader(
            dataset,
            batch * (here.size if each else 1),
            shuffle=False,
            drop_last=False,
            rank=here.rank,
            world_size=here.size,
            num_workers=workers if options.workers is None else options.workers,
        )
        metrics = evaluate(task.to(here.device), loader, "fp32", here.device)
        unreadable = int(here.sum(metrics.pop("unreadable")))
        return Measured(metrics, unreadable, str(here.device), here.is_main)


def one_view(options: Options) -> None:
    """For suites whose numbers are all those of one look at each picture.

    Raises:
        UsageError: if the options ask for more.
    """
    if options.scales or options.flip:
        raise UsageError("--scales and --flip: this suite looks at each picture once, as published. Leave them out.")


def other_normalisation(mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """An obstacle where pixels are not normalised as published."""
    if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
        return []
    return [f"normalisation: mean {mean}, std {std} are recorded with the weights, not ImageNet's"]


def not_read(count: int, images: int) -> list[str]:
    """An obstacle where ``count`` of the images cannot be read."""
    return [f"{count:,} of {images:,} images cannot be read; measured on the others"] if count else []


def print_outcome(outcome: Outcome) -> None:
    """A table of ours beside published, and in words what was compared with what, or why nothing was."""
    console = Console(highlight=False)
    compared = not outcome.obstacles
    table = Table(title=f"{outcome.suite}, per cent")
    table.add_column("measure")
    columns = ("published", "difference", "tolerance", "within") if compared else ()
    known = any(m.interval for m in outcome.measures)
    for name in ("ours", *(("95 % interval",) if known else ()), *columns):
        table.add_column(name, justify="right")
    for m in outcome.measures:
        beside = ("none", "", "", "")
        if m.published is not None:
            beside = (f"{m.published:g}", f"{m.difference:+.2f}", f"±{m.tolerance:g}", "yes" if m.within else "no")
        interval = f"{m.interval[0]:.2f} to {m.interval[1]:.2f}" if m.interval else ""
        table.add_row(m.name, f"{m.ours:.2f}", *((interval,) if known else ()), *(beside if compared else ()))
    lines = [
        f"{outcome.weights} on {outcome.images:,} {outcome.what} of {outcome.data}",
        f"Protocol: {outcome.protocol}",
    ]
    console.print("\n".join(lines), soft_wrap=True, markup=False)
    console.print(table)
    if compared:
        console.print(f"Published: {outcome.published}", soft_wrap=True, markup=False)
    else:
        console.print("No comparison with a published number:", soft_wrap=True)
        for reason in outcome.obstacles:
            console.print(f"  {reason}", soft_wrap=True, markup=False)


def write_outcome(outcome: Outcome, path: Path) -> None:
    """Everything that is printed, with machine, versions, date and command, as JSON."""
    measures = {
        m.name: {**_without(m, "name"), "difference": m.difference, "within": m.within} for m in outcome.measures
    }
    record = {
        **_without(outcome, "details", "main", "what", "images"),
        outcome.what: outcome.images,
        **outcome.details,
        "measures": measures,
        **environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without(thing: Any, *left_out: str) -> dict[str, Any]:
    return {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.name not in left_out}
