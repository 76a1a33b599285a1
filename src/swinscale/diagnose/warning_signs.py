"""Patterns in a run's vital signs that precede divergence, said in plain words. Thresholds: docs/diagnose.md."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from swinscale.models.swin import MAX_LOGIT_SCALE
from swinscale.parallel import Precision

SPREAD = 1e3
"""Between the mean amplitudes of layers. The article sees 1e4 in a V1-L that still trains, and its V1-H collapses."""
GROWTH, LARGE = 10.0, 100.0
"""A mean amplitude that grew by this factor within the remembered readings, once it is large."""
REMEMBERED = 10  # readings
COLLAPSED_ENTROPY, COLLAPSED_SHARE = 0.02, 0.95
ENOUGH_KEYS = 16
"""In a window of fewer tokens one key may well have most of the weight."""
JUMP, ENOUGH = 10.0, 5
"""Gradient norm over the median of the remembered ones, of which there must be enough."""
UPDATE = 0.1
CLIPPED, IN_A_ROW = 0.05, 3
FP16_RANGE, FP16_SHARE = 65504.0, 0.25
AT_CLAMP = 0.999 * math.exp(MAX_LOGIT_SCALE)


@dataclass(frozen=True)
class Signs:
    """What one reading says.

    Args:
        amplitudes: block → mean |x| of the residual stream, before the norm where the norm follows the sum.
        largest: place → largest |x|, in the order of the forward pass; not finite where any value is not.
        entropies, top_keys, scales: block → a value per head.
        gradient: norm over all parameters, before clipping.
        updates: part → RMS of the update over RMS of the weights.
        warm: whether the warm-up is over.
    """

    step: int
    precision: Precision
    warm: bool
    gradient: float
    clipped: float
    updates: Mapping[str, float] = field(default_factory=dict)
    amplitudes: Mapping[str, float] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)
    entropies: Mapping[str, Sequence[float]] = field(default_factory=dict)
    top_keys: Mapping[str, Sequence[float]] = field(default_factory=dict)
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)


class WarningSigns:
    """Compares each reading with thresholds and with the readings before it. Remembers the last few; a resumed run, none."""

    def __init__(self) -> None:
        self.before: deque[Signs] = deque(maxlen=REMEMBERED)

    def read(self, now: Signs) -> list[tuple[str, str]]:
        """(kind, sentence) of each pattern in ``now``."""
        while self.before and self.before[-1].step >= now.step:  # the run went back
            self.before.pop()
        found = [
            *(self._not_finite(now) or (*self._range(now), *self._spread(now), *self._growth(now))),
            *_attention(now),
            *_scales(now),
            *self._gradient(now),
            *self._updates(now),
            *self._clipping(now),
        ]
        self.before.append(now)
        return found

    def _not_finite(self, now: Signs) -> list[tuple[str, str]]:
        bad = next((place for place, value in now.largest.items() if not value < math.inf), None)
        if bad is None:
            return []
        text = (
            f"{bad} gives values that are not finite, though the loss is finite. The model is about to break: lower "
            f"train.optim.lr and go on from an earlier checkpoint, or use train.precision=bf16 or fp32."
        )
        return [("activation_not_finite", text)]

    def _range(self, now: Signs) -> list[tuple[str, str]]:
        place = max(now.largest, key=now.largest.__getitem__, default="")
        if now.precision != "fp16" or not place or now.largest[place] < FP16_SHARE * FP16_RANGE:
            return []
        text = (
            f"{place} reaches {now.largest[place]:.3g}; fp16 ends at {FP16_RANGE:.0f}. "
            f"Use train.precision=bf16, which has the range of fp32, before values overflow."
        )
        return [("activation_range", text)]

    def _spread(self, now: Signs) -> list[tuple[str, str]]:
        known = {block: value for block, value in now.amplitudes.items() if value > 0}
        if not known:
            return []
        high, low = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
        if known[high] < SPREAD * known[low]:
            return []
        text = (
            f"Activations of {high} are {known[high] / known[low]:.2g} times as large as those of {low} (mean |x| "
            f"{known[high]:.3g} and {known[low]:.3g}). Amplitudes this far apart precede collapse in large models: a V2 model "
            f"keeps them together by its norms; else lower train.optim.lr or lengthen the warm-up."
        )
        return [("amplitude_spread", text)]

    def _growth(self, now: Signs) -> list[tuple[str, str]]:
        for block, value in now.amplitudes.items():
            least, step = min(
                ((b.amplitudes.get(block, value), b.step) for b in self.before), default=(value, now.step)
            )
            if value > LARGE and 0 < GROWTH * least < value:
                text = (
                    f"Activations of {block} grew {value / least:.2g} times since step {step} (mean |x| {least:.3g}, now "
                    f"{value:.3g}). If this goes on the run diverges: lower train.optim.lr, or clip gradients more tightly."
                )
                return [("amplitude_growth", text)]
        return []

    def _gradient(self, now: Signs) -> list[tuple[str, str]]:
        norms = [b.gradient for b in self.before if b.warm]  # while the rate rises, so may the gradient
        usual = median(norms) if len(norms) >= ENOUGH else math.inf
        if not 0 < JUMP * usual < now.gradient:
            return []
        text = (
            f"The gradient norm is {now.gradient:.3g}, {now.gradient / usual:.2g} times its usual {usual:.3g}. A single jump "
            f"is harmless when gradients are clipped (train.optim.clip_grad); if it repeats, lower train.optim.lr."
        )
        return [("gradient_jump", text)]

    def _updates(self, now: Signs) -> list[tuple[str, str]]:
        last = self.before[-1].updates if self.before else {}
        again = {part: value for part, value in now.updates.items() if value > UPDATE and last.get(part, 0) > UPDATE}
        if not now.warm or not again:
            return []
        part = max(again, key=again.__getitem__)
        text = (
            f"One step changes the weights of {part} by {100 * again[part]:.2g} % of their size, at two readings in a row; "
            f"0.1 % is usual. Lower train.optim.lr or lengthen the warm-up (train.optim.warmup_epochs)."
        )
        return [("update_ratio", text)]

    def _clipping(self, now: Signs) -> list[tuple[str, str]]:
        recent = [*(b.clipped for b in self.before), now.clipped][-IN_A_ROW:]
        if len(recent) < IN_A_ROW or max(recent) >= CLIPPED:
            return []
        text = (
            f"Gradients were clipped to less than {CLIPPED:.0%} of their norm at {IN_A_ROW} readings in a row (norm "
            f"{now.gradient:.3g}): the clip, not the gradient, sets the size of steps. Raise train.optim.clip_grad, or lower "
            f"train.optim.lr if the loss is unsteady."
        )
        return [("clipping", text)]


def _attention(now: Signs) -> list[tuple[str, str]]:
    for block, shares in now.top_keys.items():
        entropy = fmean(now.entropies[block])
        captured = sum(share > COLLAPSED_SHARE for share in shares)
        if entropy < COLLAPSED_ENTROPY or 2 * captured > len(shares):
            text = (
                f"Attention of {block} has collapsed: {captured} of {len(shares)} heads give more than {COLLAPSED_SHARE:.0%} "
                f"of their weight to one key (entropy {entropy:.3f} of what is possible). Cosine attention (a V2 model) and "
                f"a lower train.optim.lr prevent this."
            )
            return [("attention_collapse", text)]
    return []


def _scales(now: Signs) -> list[tuple[str, str]]:
    for block, scales in now.scales.items():
        held = sum(scale >= AT_CLAMP for scale in scales)
        if 2 * held > len(scales):
            text = (
                f"The logit scale of {held} of {len(scales)} heads of {block} is at its limit of 100, where it gets no "
                f"gradient: these heads want to be sharper than cosine attention allows. If the loss is unsteady, lower "
                f"train.optim.lr."
            )
            return [("logit_scale", text)]
    return []
