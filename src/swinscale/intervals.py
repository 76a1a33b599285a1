"""95 % intervals: of a proportion, and of a mean over few independent values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from swinscale.errors import UsageError

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t at 97.5 % for 1 to 20 degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, from ``count`` independent values."""

    estimate: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Mean of values that are independent and about normal, such as one per seed. One value alone has no interval."""
        finite = [v for v in values if math.isfinite(v)]
        if len(finite) < len(values) or not finite:
            return Interval(math.nan, -math.inf, math.inf, len(finite))
        mean = fmean(finite)
        if len(finite) == 1:
            return Interval(mean, -math.inf, math.inf, 1)
        degrees = len(finite) - 1
        t = T_975[degrees - 1] if degrees <= len(T_975) else 1.96 + 2.5 / degrees
        half = t * stdev(finite) / math.sqrt(len(finite))
        return Interval(mean, mean - half, mean + half, len(finite))

    @staticmethod
    def of_difference(one: Sequence[float], other: Sequence[float]) -> Interval:
        """Of ``one - other``, pair by pair: the two of a pair share their seed."""
        return Interval.of([a - b for a, b in zip(one, other, strict=True)])

    @staticmethod
    def of_ratio(over: Sequence[float], under: Sequence[float]) -> Interval:
        """Of quotients within the same round, so that a slow moment of the machine falls on both."""
        return Interval.of([a / b for a, b in zip(over, under, strict=True)])

    @property
    def known(self) -> bool:
        """Whether there are values enough for an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def text(self, unit: str = "", *, signed: bool = True) -> str:
        """ "+0.52 (-0.10 – 1.13) points"; without a sign for what is not a difference."""
        numbers = [f"{v:+.2f}" if signed else f"{v:.2f}" for v in (self.estimate, self.low, self.high)]
        interval = f" ({numbers[1]} – {numbers[2]})" if self.known else " (no interval)"
        return f"{numbers[0]}{interval} {unit}".rstrip()

    def whisker(self) -> dict[str, float]:
        """As ``plots.Dot`` takes it; a single value has a whisker of no length."""
        low, high = (self.low, self.high) if self.known else (self.estimate, self.estimate)
        return {"value": self.estimate, "low": low, "high": high}


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Journal of the American Statistical Association 22, 1927), in 0…1.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and at ``total`` of ``total``.
    """
    if not 0 <= correct <= total or total < 1:
        raise UsageError(
            f"{correct} of {total} is not a proportion: give 0 to total correct ones, and a positive total."
        )
    z2, share = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2, correct / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * share * (1 - share) / total + (z2 / (2 * total)) ** 2) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)
