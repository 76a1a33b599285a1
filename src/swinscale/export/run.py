"""From a run's checkpoint, however many processes wrote it, to one directory that can be used, fine-tuned or published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from swinscale.checkpoint import Checkpoints
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig, SegmentConfig
from swinscale.parallel import World
from swinscale.recipes.base import build_task, recipe_from_dict


def export(run: Path, out: Path, *, step: int | None = None, averaged: bool = True) -> int:
    """Writes ``config.json`` and ``model.safetensors`` of a checkpoint, without its data and in one process.

    Args:
        run: the directory of a run, which need not have ended.
        step: which checkpoint; None: the newest one that is intact.
        averaged: the moving average of the weights, where the run keeps one.

    Returns: the step of the checkpoint.

    Raises:
        UsageError: if ``run`` holds no checkpoint that can be read.
    """
    if not (run / "checkpoints").is_dir() or not (run / "config.json").is_file():
        raise UsageError(f"{run} is not a run: expected config.json and checkpoints/ in it.")
    recipe = recipe_from_dict(json.loads((run / "config.json").read_text()))
    alone = dataclasses.replace(
        recipe.train, memory=dataclasses.replace(recipe.train.memory, shard="none", offload=False)
    )
    checkpoints = Checkpoints(run / "checkpoints", World(0, 1, torch.device("cpu")))
    classes = None
    if isinstance(recipe.task, (DetectConfig, SegmentConfig)):
        # their number is that of the data, which this command does without
        values, _ = checkpoints.load(lambda stored: {}, step)
        step, classes = int(values["step"]), values["preprocessing"]["classes"]
    task, _ = build_task(dataclasses.replace(recipe, train=alone, init=None), classes)

    def wanted(stored: Collection[str]) -> dict[str, Tensor]:
        prefix = "ema.module." if averaged and any(name.startswith("ema.") for name in stored) else "task."
        return {prefix + name: tensor for name, tensor in task.state_dict().items()}

    values, _ = checkpoints.load(wanted, step)
    task.preprocessing = values["preprocessing"]
    task.save_pretrained(out)
    return int(values["step"])
