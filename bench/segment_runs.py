"""Runs of segmentation that are done, as rows of a table: ``python -m bench segment --runs DIR …``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import tables
from swinscale.errors import UsageError
from swinscale.recipes.overfit import OVERFIT_MIOU

Row = dict[str, Any]
MEASURES = ("miou", "macc", "aacc")


def row(directory: Path) -> Row:
    """What the finished run in ``directory`` is and reached, measures in per cent.

    Raises:
        UsageError: for a directory without a finished run of a segmenter.
    """
    try:
        config, manifest, result = (
            json.loads((directory / name).read_text()) for name in ("config.json", "manifest.json", "result.json")
        )
        measures = result["metrics"]
        found = {name: round(100 * measures[name], 2) for name in MEASURES}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{directory} holds no finished run of a segmenter: {error}.") from error
    data, task, train = config["data"], config["task"], config["train"]
    return {
        "name": directory.name,
        "recipe": config["name"],
        "init": Path(config["init"]).parent.name if config["init"] else None,
        "parameters": manifest["parameters"],
        "channels": task["channels"],
        "images": manifest["train_images"],
        "eval_images": manifest["eval_images"],
        "eval_split": data["eval_split"],
        "by_heart": bool(data["limit"]),
        "crop": data["crop"],
        "short": data["short"],
        "test_short": task["test_short"],
        "batch": manifest["effective_batch"],
        "lr": manifest["scaled_lr"],
        "epochs": train["epochs"],
        "steps": result["steps"],
        "minutes": round(result["seconds"] / 60, 1),
        "precision": manifest["precision"],
        "threads": manifest["machine"]["threads"],
        "processor": manifest["machine"]["processor"],
        **found,
        "classes": {one["name"]: None if one["iou"] is None else round(100 * one["iou"], 1) for one in measures["per_class"]},
        "versions": manifest["versions"],
        "commit": manifest["commit"],
        "date": manifest["date"],
    }  # fmt: skip


def heart_table(rows: Sequence[Row]) -> str:
    """Runs that learned a few pictures by heart."""
    found = [one for one in rows if one["by_heart"]]
    header = [
        "recipe", "starts from", "parameters", "pictures", "short side", "rate", "steps", "minutes", "precision", "threads",
        "mIoU", "aAcc", "by heart", "run",
    ]  # fmt: skip
    cells = [
        [
            f"`{one['recipe']}`", f"`{one['init']}`" if one["init"] else "random weights", f"{one['parameters'] / 1e6:.1f} M",
            one["images"], one["test_short"], f"{one['lr']:g}", one["steps"], one["minutes"],
            one["precision"], one["threads"], one["miou"], one["aacc"], "yes" if one["miou"] >= 100 * OVERFIT_MIOU else "no", _when(one),
        ]
        for one in found
    ]  # fmt: skip
    note = f"In per cent, on the pictures themselves; by heart: mIoU {100 * OVERFIT_MIOU:g}. On a CPU."
    return f"{_table(header, cells)}\n\n{note}"


def scenes_table(rows: Sequence[Row]) -> str:
    """Runs that are evaluated on pictures they have not seen, and the classes of each below."""
    found = [one for one in rows if not one["by_heart"]]
    header = ["run", "starts from", "parameters", "epochs", "minutes", "precision", "mIoU", "mAcc", "aAcc", "begun"]
    cells = [
        [
            f"`{one['recipe']}`", f"`{one['init']}`" if one["init"] else "random weights", f"{one['parameters'] / 1e6:.1f} M",
            one["epochs"], one["minutes"], one["precision"], one["miou"], one["macc"], one["aacc"], _when(one),
        ]
        for one in found
    ]  # fmt: skip
    parts = [_table(header, cells)]
    if found:
        names = list(found[0]["classes"])
        of_each = [[one["init"] or "random weights", *(one["classes"][name] for name in names)] for one in found]
        first = found[0]
        parts.append(_table(["IoU", *names], of_each))
        parts.append(
            f"In per cent, on {first['eval_images']} {first['eval_split']} pictures at full size, after training on "
            f"{first['images']} at a short side of {first['short']}, one seed. CPU, {first['threads']} thread"
            f"{'s' * (first['threads'] > 1)}, beside other work."
        )
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return tables.table(header, [["–" if cell is None else str(cell) for cell in one] for one in rows])


def _when(one: Row) -> str:
    return f"{one['date'][:10]}, {one['commit']}"
