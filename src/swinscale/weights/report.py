"""What loading weights did: nothing is left out in silence."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """The outcome of ``load_weights``; ``print(report)`` shows it.

    Attributes:
        source: the file, directory or "state dict".
        layout: whose names the tensors had, a key of ``swinscale.weights.LAYOUTS``.
        looks_like: what the tensors are, in words.
        matched: names of the model's tensors that were loaded.
        reshaped: name → how a tensor was fitted to another window, map or channel count; these count as matched.
        fresh: name → why a tensor keeps its initial value on purpose (a new classifier); these do not count.
        left_out: tensors of the file that were not used on purpose, in words.
        missing: backbone tensors of the model that the file does not have.
        mismatched: name → both shapes, where they cannot be reconciled.
        unexpected: tensors of the file that belong to no part of the model.
        disagreements: what the name of the file says and its tensors deny, one line each.
        elements: learnable numbers in the model's backbone.
        elements_matched: how many of them were loaded.
    """

    source: str
    layout: str
    looks_like: str
    matched: list[str] = field(default_factory=list)
    reshaped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    elements: int = 0
    elements_matched: int = 0

    @property
    def share(self) -> float:
        """Loaded share of the backbone's learnable elements, between 0 and 1."""
        return self.elements_matched / max(self.elements, 1)

    @property
    def plain(self) -> bool:
        """Whether every tensor of the model was loaded as it is."""
        return not any((self.reshaped, self.fresh, self.missing, self.mismatched, self.unexpected, self.disagreements))

    def __str__(self) -> str:
        lines = [
            f"Loaded {self.source}: {self.looks_like}",
            f"  matched     {len(self.matched)} tensors, {100 * self.share:.2f} % of {self.elements:,} backbone parameters",
        ]
        by_reason: dict[tuple[str, str], list[str]] = {}
        for label, entries in (("reshaped", self.reshaped), ("fresh", self.fresh), ("mismatched", self.mismatched)):
            for name, reason in entries.items():
                by_reason.setdefault((label, reason), []).append(name)
        lines += [f"  {label:<11} {some(names)}: {reason}" for (label, reason), names in by_reason.items()]
        lines += [f"  name        {line}" for line in self.disagreements]
        lines += [f"  left out    {line}" for line in self.left_out]
        lines += [f"  missing     {some(self.missing)}"] if self.missing else []
        lines += [f"  unexpected  {some(self.unexpected)}"] if self.unexpected else []
        return "\n".join(lines)


def some(names: list[str], limit: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
