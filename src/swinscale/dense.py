"""What using trained detectors, segmenters and video models has in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from swinscale.config import from_dict
from swinscale.data import EpochLoader
from swinscale.diagnose.plots import Drawing
from swinscale.evaluation import evaluate
from swinscale.manifest import environment
from swinscale.models import SwinConfig
from swinscale.parallel import resolve_precision, world
from swinscale.tasks.base import Task
from swinscale.tasks.dense import DenseTask
from swinscale.weights import read_config, read_metadata
from swinscale.weights.files import atomic

Options = TypeVar("Options")


def recorded(place: Path, kind: str, options: type[Options]) -> tuple[SwinConfig, Options, dict[str, Any]] | None:
    """Backbone, options and preprocessing as a run recorded them; None for weights of another origin, or another task.

    Args:
        kind: name of the task.
        options: class of its options.
    """
    record, config = read_metadata(place), read_config(place)
    settings = dict(record.get("task", {}))
    if settings.pop("name", None) != kind or config is None:
        return None
    return config, from_dict(options, settings), record["preprocessing"]


def fill(task: DenseTask, load: Callable[..., object], place: Path) -> None:
    """Gives a task on ``meta`` its parameters: first values, then what ``load(model, place)`` finds."""
    task.to_empty(device="cpu")
    task.init_weights(0)
    load(task.model, place)


@torch.no_grad()
def measure(task: Task, dataset: Any, batch_size: int, device: str, workers: int | None = 0) -> dict[str, Any]:
    """The task's measures on a data set, whole.

    Args:
        workers: processes that read it; None: up to 8 beside a GPU, else none.
    """
    with world(device) as here:
        if workers is None:
            workers = min(os.cpu_count() or 1, 8) if here.device.type == "cuda" else 0
        loader = EpochLoader(dataset, batch_size, shuffle=False, drop_last=False, num_workers=workers)
        return evaluate(task.to(here.device), loader, resolve_precision("auto", here.device), here.device)


def report(
    weights: str | Path,
    data: str,
    images: int,
    metrics: dict[str, Any],
    show: Callable[[Console, dict[str, Any]], None],
    out: Path | None,
    draw: Callable[[dict[str, Any]], Drawing] | None = None,
    what: str = "images",
) -> None:
    """Prints measures by ``show``; with ``out`` also writes them as JSON with machine and versions, and beside it a drawing.

    Args:
        images: how many there are, of what ``what`` says.
    """
    console = Console(highlight=False)
    console.print(f"{weights} on {data}: {images} {what}", soft_wrap=True, markup=False)
    show(console, metrics)
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"weights": str(weights), "data": data, what: images, **metrics, **environment()}
    with atomic(out) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    wrote = str(out)
    if draw is not None:
        draw(metrics).save(out.with_suffix(""))
        wrote += f" and {out.with_suffix('.svg').name}"
    console.print(f"wrote {wrote}", soft_wrap=True, markup=False)
