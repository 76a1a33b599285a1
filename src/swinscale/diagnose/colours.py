"""Colours of classes that are told apart, and the ink that is readable on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from swinscale.diagnose.plots import COLOURS
from swinscale.errors import UsageError

Colour = tuple[int, int, int]
WHITE, INK = (255, 255, 255), (27, 31, 36)
_CHOSEN = 512
"""Classes with a colour of their own; more take the same ones again."""


def class_colour(label: int) -> Colour:
    """Our colour of a class, the same in every picture."""
    return _palette()[label % _CHOSEN]


def class_colours(count: int, given: Sequence[Colour] | None = None) -> list[Colour]:
    """A colour for each of ``count`` classes: those that are ``given``, as a class list has them, or ours.

    Raises:
        UsageError: if another number of colours is given.
    """
    if given is None:
        return [class_colour(label) for label in range(count)]
    if len(given) != count:
        raise UsageError(f"{len(given)} colours for {count} classes: give one to each.")
    return [(red, green, blue) for red, green, blue in given]


@lru_cache(maxsize=1)
def _palette() -> list[Colour]:
    """The colours of our plots, and then each time the one that is farthest from all before it.

    They are neither so light nor so dark nor so grey that a picture's own light, shadow and fog could pass for them, nor so
    glaring that one class would outshine the others.
    """
    steps = np.linspace(0, 255, 18).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 28) & (lab[:, 0] < 92) & (chroma > 18) & (chroma < 86)
    candidates, lab = candidates[usable], lab[usable]
    first = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS]
    grounds = _lab(np.array([*first, WHITE, INK, (128, 128, 128)], dtype=float))
    nearest = np.linalg.norm(lab[:, None] - grounds, axis=-1).min(1)
    chosen = np.array(first, dtype=float)
    while len(chosen) < _CHOSEN:
        farthest = int(nearest.argmax())
        chosen = np.concatenate([chosen, candidates[farthest, None]])
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[farthest], axis=1))
    return [(int(red), int(green), int(blue)) for red, green, blue in chosen]


def ink_on(colour: Colour) -> Colour:
    """White or a near black: what has the higher contrast on ``colour``."""
    ground, dark = luminance(colour), luminance(INK)
    return WHITE if 1.05 / (ground + 0.05) >= (ground + 0.05) / (dark + 0.05) else INK


def luminance(colour: Colour) -> float:
    """Relative luminance, 0…1, as the contrast rules of the web define it."""
    return float(_linear(np.array(colour, dtype=float)) @ [0.2126, 0.7152, 0.0722])


def _linear(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB, 0…255, as amounts of light, 0…1."""
    parts = colours / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _lab(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3) sRGB, 0…255, in CIELAB under daylight (D65), in which distances are about what eyes see."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.moveaxis(np.cbrt(_linear(colours) @ to_xyz.T / to_xyz.sum(1)), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
