"""Files of results: one JSON per claim and scale, from which pages and pictures are made again at any time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from swinscale.checkpoint import write_atomically
from swinscale.claims.base import Claim, Figure, Outcome, Scale
from swinscale.diagnose import plots
from swinscale.errors import UsageError
from swinscale.intervals import Interval
from swinscale.manifest import environment


def record(
    claim: Claim, scale: Scale, data: str, seeds: int, outcome: Outcome, command: str, minutes: float, steps: int
) -> dict[str, Any]:
    """Everything that a page shows, as plain values."""
    return {
        "kind": "claim",
        "name": claim.name,
        "title": claim.title,
        "sentence": claim.sentence,
        "source": claim.source,
        "published": [vars(p) for p in claim.published],
        "scale": scale,
        "settings": claim.settings(scale),
        "data": data,
        "seeds": seeds,
        "verdict": outcome.verdict,
        "findings": [_plain(vars(f)) for f in outcome.findings],
        "tables": [_plain(vars(t)) for t in outcome.tables],
        "figures": [_plain(vars(f)) for f in outcome.figures],
        "notes": list(outcome.notes),
        "steps": steps,
        "minutes": round(minutes, 1),
        "environment": {**environment(), "command": command},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {name: _plain(v) for name, v in vars(value).items()}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no infinity
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if hasattr(value, "__dataclass_fields__"):
        return _plain(vars(value))
    return value


def write_result(folder: Path, content: dict[str, Any]) -> Path:
    """``folder``/NAME/SCALE.json, and its pictures beside it."""
    place = folder / content["name"] / f"{content['scale']}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, json.dumps(content, indent=1) + "\n")
    draw(content, place.parent)
    return place


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results below ``folder``.

    Raises:
        UsageError: for a file that is no result.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            content = json.loads(path.read_text())
            assert content["kind"] == "claim"
        except (ValueError, KeyError, AssertionError):
            raise UsageError(
                f"{path} is not a result of 'swinscale claims': delete it, or move it elsewhere."
            ) from None
        found.append(content)
    return found


def draw(content: dict[str, Any], folder: Path) -> None:
    """The pictures of a result: SCALE-NAME.svg and .png."""
    for figure in content["figures"]:
        drawing(figure).save(folder / f"{content['scale']}-{figure['name']}")


def drawing(figure: dict[str, Any] | Figure) -> plots.Drawing:
    """A figure drawn by ``diagnose.plots``."""
    figure = vars(figure) if isinstance(figure, Figure) else figure
    options = dict(figure["options"])
    if figure["kind"] == "lines":
        options["series"] = [plots.Line(**line) for line in options["series"]]
        return plots.lines(**options)
    if figure["kind"] == "dots":
        options["rows"] = [plots.Dot(**dot) for dot in options["rows"]]
        return plots.dots(**options)
    return plots.heat_maps(**options)
