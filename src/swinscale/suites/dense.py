"""What suites of dense tasks share: which published model weights are, in what they differ from it, and what is recorded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from swinscale.config import suggest
from swinscale.data import Source
from swinscale.errors import UsageError
from swinscale.models import SwinConfig
from swinscale.models.config import format_size
from swinscale.suites.base import Measured
from swinscale.suites.classification import ARCHITECTURE
from swinscale.tasks.dense import DenseTask
from swinscale.weights import read_metadata
from swinscale.weights.filenames import telling_name
from swinscale.weights.files import find_weights
from swinscale.weights.hashes import sha256
from swinscale.weights.hub import resolve

BACKBONE = (*ARCHITECTURE, "pad", "small_map")
"""Fields of ``SwinConfig`` that a published model's backbone is compared by."""
TABLES = ("per_class", "curves", "confusion")
"""Measures that are no single number."""


class Entry(Protocol):
    """A published model."""

    @property
    def name(self) -> str:
        """What it is called here: as its published file, without extension, where there is one."""

    @property
    def recipe(self) -> str:
        """The recipe that trains it here, which says its architecture and how it is tested."""


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def find_entry(name: str, entries: Iterable[AnyEntry]) -> AnyEntry | None:
    """The first published model of this name, with or without date and hash, or that this recipe trains."""
    plain = re.sub(r"[-.]", "_", re.sub(r"(_20\d{6})?(-[0-9a-f]{8})?$", "", name.lower()))
    return next((entry for entry in entries if plain and plain in (entry.name, entry.recipe)), None)


def identify(
    weights: str | Path, asked: str | None, entries: Sequence[AnyEntry], what: str
) -> tuple[AnyEntry | None, str, list[str]]:
    """The published model that these weights are, how that is known, and what speaks against a comparison.

    Args:
        asked: its name as the user says it; None: the name of the weights counts, unless a run of this library wrote them.
        what: "detector".

    Raises:
        UsageError: if nothing is published of the name that was asked for.
    """
    named = None if "task" in read_metadata(resolve(weights)) else find_entry(telling_name(weights), entries)
    known = [entry.name for entry in entries]
    if asked is None:
        if named is not None:
            return named, "by the name of the weights", []
        why = f"weights: their name does not say which published ones they are; add --published with one of {', '.join(known)}"
        return None, "", [why]
    entry = find_entry(asked, entries)
    if entry is None:
        raise UsageError(
            f"--published {asked}: no {what} is published of that name.{suggest(asked, known)} Known: {', '.join(known)}."
        )
    other = named if named != entry else None
    obstacles = [f"weights: their name says {other.name}, not {entry.name}"] if other else []
    return entry, "as --published says", obstacles


def differences(ours: Any, theirs: Any, names: Sequence[str]) -> list[str]:
    """In which of these fields two settings differ, a line each."""
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return [f"{name.replace('_', ' ')} {_words(a)} instead of {_words(b)}" for name, a, b in pairs if a != b]


def other_windows(config: SwinConfig, sides: Collection[int]) -> list[str]:
    """A line where not all stages have windows of one of these sides."""
    if any(all(window == (side, side) for window in config.stage_windows) for side in sides):
        return []
    wanted = " or ".join(f"{side}×{side}" for side in sides)
    return [f"windows {' '.join(map(format_size, config.stage_windows))} instead of {wanted} in every stage"]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def details(title: str, place: Path, task: DenseTask, source: Source, found: Measured) -> dict[str, Any]:
    """What else belongs in the record of an evaluation; see ``Outcome.details``."""
    windows = [list(window) for window in task.backbone.config.stage_windows]
    return {
        "title": title,
        "model": {"task": dataclasses.asdict(task.config), "windows": windows},
        "sha256": sha256(find_weights(place)),
        "images_fingerprint": source.fingerprint(),
        "device": found.device,
        "metrics": {name: value for name, value in found.metrics.items() if name not in TABLES},
        "per_class": found.metrics["per_class"],
    }
