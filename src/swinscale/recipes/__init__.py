"""Experiments as functions: each returns a ``Recipe``, and its docstring says the command and what to expect."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.recipes import ade20k, camvid, coco, desk, imagenet, kinetics, lrnet, simmim, vit
from swinscale.recipes.base import Built, DataConfig, Recipe, build, recipe_from_dict, run
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.recipes.segmentation import SegmentationDataConfig
from swinscale.recipes.video import VideoDataConfig

__all__ = [
    "RECIPES",
    "Built",
    "DataConfig",
    "DetectionDataConfig",
    "Recipe",
    "SegmentationDataConfig",
    "VideoDataConfig",
    "build",
    "get_recipe",
    "run",
]

RECIPES: dict[str, Callable[[], Recipe]] = {
    name: function
    for module in (desk, simmim, imagenet, coco, ade20k, camvid, kinetics, lrnet, vit)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
}
"""Every recipe by name."""


def get_recipe(name: str) -> Recipe:
    """The recipe called ``name``, or the one that a run recorded in the JSON file ``name``.

    Raises:
        UsageError: for an unknown name, with the nearest known one, or a file that records no recipe.
    """
    if name.endswith(".json"):
        try:
            return recipe_from_dict(json.loads(Path(name).read_text()))
        except ValueError as error:
            raise UsageError(f"{name} does not record a recipe: {error}") from error
    if name not in RECIPES:
        raise UsageError(
            f"Unknown recipe '{name}'.{suggest(name, RECIPES)} 'swinscale list recipes' shows all of them."
        )
    return RECIPES[name]()
