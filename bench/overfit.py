"""``python -m bench overfit [--data PHOTOS]``: how fast the desk recipes learn eight images by heart (``train --overfit 8``)."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from bench import tables
from bench.progress import say
from swinscale.recipes import get_recipe, run
from swinscale.recipes.overfit import overfit
from swinscale.runlog import read_log

IMAGES, STEPS = 8, (50, 100, 150, 200, 300, 400)


def runs(photos: str | None) -> list[dict[str, Any]]:
    """Losses at ``STEPS`` and the measures at the end; of the recipe for photos where there are some."""
    rows = []
    cases = [("desk_simmim", "bundled:fashion-mnist", "bundled pictures")]
    cases += [("photos_simmim", photos, Path(photos).name)] if photos else []
    for name, data, what in cases:
        recipe = overfit(get_recipe(name), IMAGES)
        how = dataclasses.replace(recipe.train, log_every=50)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=data), train=how)
        with tempfile.TemporaryDirectory() as place:
            metrics = run(recipe, Path(place) / "run").metrics
            losses = {e["step"]: e["loss"] for e in read_log(Path(place) / "run") if e["kind"] == "train"}
        rows.append({
            "recipe": name, "data": what, "losses": {str(step): losses[step] for step in STEPS},
            "loss": metrics["loss"], "psnr": metrics["psnr"],
        })  # fmt: skip
        say(f"{name}: {metrics['loss']:.4f}")
    return rows


def parts(content: dict[str, Any]) -> dict[str, Any]:
    """What a page can show."""
    return {"losses": lambda: table(content), "machine": lambda: tables.machine(content["environment"])}


def table(content: dict[str, Any]) -> str:
    """Losses by step, and what the evaluation says at the end."""
    heads = ("recipe", "images", *(f"step {step}" for step in STEPS), "evaluated at the end")
    rows = []
    for row in content["runs"]:
        losses = (f"{row['losses'][str(step)]:.3f}" for step in STEPS)
        rows.append((f"`{row['recipe']}`", row["data"], *losses, f"{row['loss']:.3f}, PSNR {row['psnr']:.1f} dB"))
    return tables.table(heads, rows)
