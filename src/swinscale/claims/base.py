"""What a claim is: a sentence of an article, an experiment in steps, and a reading of what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swinscale.claims.statistics import Verdict, combine, judge, judge_within
from swinscale.config import to_dict
from swinscale.errors import NonFiniteLoss
from swinscale.intervals import Interval
from swinscale.recipes import Recipe, run
from swinscale.runlog import read_log

Scale = Literal["desk", "gpu", "paper"]
Results = Mapping[str, Any]
"""What the steps returned, by their names; plain values that JSON can hold."""


@dataclass(frozen=True)
class Step:
    """A part of an experiment that is done as a whole, in a directory of its own.

    Args:
        name: also the path of its directory below the claim's.
        run: a function of a module (other processes import it), called with the directory and ``arguments``; returns plain
            values for ``Results``. Called again after a kill, it goes on where it stopped.
        arguments: plain values and recipes. With others, a result that an earlier call left is refused.
        after: names of steps that must be done before; ``run`` finds their directories beside its own.
        alone: nothing may run beside it, because it takes times.
    """

    name: str
    run: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    alone: bool = False

    def described(self) -> dict[str, Any]:
        """Function and arguments as plain values, to tell whether a result is of this step."""
        plain = {k: to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in self.arguments.items()}
        return {"run": f"{self.run.__module__}.{self.run.__qualname__}", "arguments": plain}


@dataclass(frozen=True)
class Published:
    """A figure that an article or its authors' code reports."""

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class Finding:
    """One statement of a claim, measured.

    Args:
        statement: what should be the case.
        measured: in words and numbers, what is; with ``interval`` where there is one.
        rule: when it counts as reproduced.
    """

    statement: str
    published: str
    measured: str
    rule: str
    verdict: Verdict
    interval: Interval | None = None
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """Measured values; the first column names the row. Values are numbers, text or ``Interval``s."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing by a function of ``diagnose.plots``, as plain values, so that it can be drawn again from a file."""

    name: str
    kind: Literal["lines", "dots", "heat_maps"]
    options: Mapping[str, Any]
    caption: str


@dataclass(frozen=True)
class Outcome:
    """What an experiment showed."""

    findings: Sequence[Finding]
    tables: Sequence[Table]
    figures: Sequence[Figure]
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> Verdict:
        return combine([finding.verdict for finding in self.findings])


@dataclass(frozen=True)
class Claim:
    """A claim of an article and the experiment that tests it.

    Args:
        sentence: the claim in our own words.
        source: article and place.
        published: its figures.
        steps: from scale, images and seeds, the experiment.
        read: from scale and results, what it showed.
        settings: from scale, in words, what is trained on what and for how long.
    """

    name: str
    title: str
    sentence: str
    source: str
    published: Sequence[Published]
    steps: Callable[[Scale, str, int], list[Step]]
    read: Callable[[Scale, Results], Outcome]
    settings: Callable[[Scale], str]
    seeds: int = 3


def ahead(
    statement: str,
    published: str,
    one: Sequence[float],
    other: Sequence[float],
    unit: str = "points",
    rule: str = "the interval of the difference, paired by seed, lies above 0",
) -> Finding:
    """That ``one`` is above ``other``, pair by pair; the two of a pair share their seed, or what ``rule`` says."""
    gain = Interval.of_difference(one, other)
    return Finding(statement, published, gain.text(unit), rule, judge(gain, "above"), gain, unit)


def dots_of(name: str, title: str, arms: Mapping[str, Sequence[float]], groups: Sequence[int] = ()) -> Figure:
    """Mean accuracy of each arm over seeds; ``groups`` are colours."""
    places = groups or [0] * len(arms)
    rows = [
        {"label": label, **Interval.of(values).whisker(), "group": group}
        for (label, values), group in zip(arms.items(), places, strict=True)
    ]
    options = {"title": title, "rows": rows, "x": "top-1, %; whisker: 95 % interval over seeds"}
    return Figure(name, "dots", options, "Single means; the statements compare pairs of equal seed.")


def line_of(label: str, x: Sequence[float], values: Sequence[Sequence[float]], group: int) -> dict[str, Any]:
    """A ``plots.Line`` through the means of ``values``, one list per ``x``, with bars over seeds."""
    whiskers = [Interval.of(v).whisker() for v in values]
    parts = {part: [w[key] for w in whiskers] for part, key in (("y", "value"), ("low", "low"), ("high", "high"))}
    return {"label": label, "x": list(x), **parts, "group": group}


def alike(statement: str, published: str, one: Sequence[float], other: Sequence[float], most: float) -> Finding:
    """That ``one`` and ``other`` differ by no more than ``most`` points, pair by pair."""
    change = Interval.of_difference(one, other)
    rule = f"the interval of the difference, paired by seed, lies within ±{most:g} point"
    return Finding(statement, published, change.text("points"), rule, judge_within(change, most), change, "points")


def ratio_to(
    statement: str,
    published: str,
    ratio: Interval,
    claimed: Literal["above", "below"],
    bound: float,
    rule: str,
    missing: str = "not measured",
) -> Finding:
    """That a ratio of times lies on one side of a bound; ``missing`` says why there is none."""
    measured = ratio.text("times", signed=False) if ratio.known else missing
    return Finding(statement, published, measured, rule, judge(ratio, claimed, bound), ratio, "times")


def train_step(name: str, recipe: Recipe, *, init: str | None = None) -> Step:
    """A step that trains ``recipe``, from the last weights of the step ``init`` if it is named."""
    if init is None:
        return Step(name, train_arm, {"recipe": recipe})
    return Step(name, train_arm, {"recipe": recipe, "init": f"{init}/run/last"}, (init,))


def train_arm(directory: Path, recipe: Recipe, init: str | None = None) -> dict[str, Any]:
    """Trains a recipe in ``directory``/run. A loss that stops being finite is a result, not an error.

    Args:
        init: weights to start from, relative to the directory of the claim.

    Returns:
        ``metrics`` of the last evaluation, ``losses`` as (step, training loss), ``vitals`` (the entries of that kind),
        ``seconds``, ``steps``, and ``diverged``: what was not finite, or None.
    """
    if init is not None:
        root = next(p for p in directory.parents if (p / init).exists())
        recipe = dataclasses.replace(recipe, init=str(root / init))
    diverged: str | None = None
    metrics, seconds, steps = dict[str, Any](), 0.0, 0
    try:
        result = run(recipe, directory / "run", resume=True)
        metrics = {k: v for k, v in result.metrics.items() if isinstance(v, float)}
        seconds, steps = result.seconds, result.steps
    except NonFiniteLoss as error:
        diverged = str(error)
    log = read_log(directory / "run")
    losses = [(e["step"], e["loss"]) for e in log if e["kind"] == "train" and "loss" in e]
    vitals = [e for e in log if e["kind"] == "vitals"]
    return {
        "metrics": metrics, "losses": losses, "vitals": vitals, "seconds": seconds, "steps": steps, "diverged": diverged,
    }  # fmt: skip


def has_diverged(result: Mapping[str, Any], ceiling: float) -> bool:
    """Whether training failed: not finite, or its last tenth is on average not below ``ceiling``, a loss of not learning."""
    losses = [loss for _, loss in result["losses"]]
    last = losses[-max(1, len(losses) // 10) :]
    return result["diverged"] is not None or not losses or not sum(last) / len(last) < ceiling


def seed_values(results: Results, pattern: str, seeds: int, measure: str = "top1") -> list[float]:
    """A measure of the runs ``pattern.format(seed=0)``, …, in percent if it is an accuracy."""
    factor = 100.0 if measure.startswith("top") else 1.0
    return [factor * results[pattern.format(seed=s)]["metrics"].get(measure, float("nan")) for s in range(seeds)]
