"""What an interval says about a claim. The rule is fixed before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from swinscale.intervals import Interval

Verdict = Literal["reproduced", "not reproduced", "not decided at this scale"]
REPRODUCED: Verdict = "reproduced"
REFUTED: Verdict = "not reproduced"
OPEN: Verdict = "not decided at this scale"


def judge(interval: Interval, claimed: Literal["above", "below"], bound: float = 0.0) -> Verdict:
    """Reproduced if the whole interval lies on the claimed side of ``bound``, not reproduced if it lies on the other."""
    if not interval.known:
        return OPEN
    low, high = (interval.low, interval.high) if claimed == "above" else (-interval.high, -interval.low)
    bound = bound if claimed == "above" else -bound
    return REPRODUCED if low > bound else REFUTED if high < bound else OPEN


def judge_within(interval: Interval, most: float) -> Verdict:
    """For a claim that two things are alike: reproduced if the whole interval lies within ±``most``."""
    if not interval.known:
        return OPEN
    if -most <= interval.low and interval.high <= most:
        return REPRODUCED
    return REFUTED if interval.low > most or interval.high < -most else OPEN


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim of several statements: reproduced if all are, not reproduced if one is contradicted."""
    if REFUTED in verdicts:
        return REFUTED
    return REPRODUCED if verdicts and all(v == REPRODUCED for v in verdicts) else OPEN
