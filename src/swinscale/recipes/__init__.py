"""Experiments as functions: each returns a ``Recipe``, and its docstring says the command and what to expect."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.recipes import desk, imagenet, simmim
from swinscale.recipes.base import Built, DataConfig, Recipe, build, run

__all__ = ["RECIPES", "Built", "DataConfig", "Recipe", "build", "get_recipe", "run"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    name: function
    for module in (desk, simmim, imagenet)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
}
"""Every recipe by name."""


def get_recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        UsageError: for an unknown name, with the nearest known one.
    """
    if name not in RECIPES:
        raise UsageError(
            f"Unknown recipe '{name}'.{suggest(name, RECIPES)} 'swinscale list recipes' shows all of them."
        )
    return RECIPES[name]()
