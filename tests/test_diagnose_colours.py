"""Colours of classes: apart from each other, readable, and given ones as they are."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from swinscale.diagnose.colours import INK, _lab, class_colour, class_colours, ink_on, luminance
from swinscale.errors import UsageError


def test_classes_have_colours_of_their_own_on_which_names_are_readable():
    colours = class_colours(150)
    assert min(math.dist(a, b) for a, b in combinations(colours, 2)) > 15
    assert min(math.dist(a, b) for a, b in combinations(colours[:12], 2)) > 40
    seen = _lab(np.array(colours, dtype=float))
    assert min(math.dist(a, b) for a, b in combinations(seen, 2)) > 12  # 2 is just noticeable
    for colour in colours:
        light, dark = sorted([luminance(colour), luminance(ink_on(colour))], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.0
    assert ink_on((255, 255, 0)) == INK
    assert ink_on((0, 0, 90)) == (255, 255, 255)


def test_a_class_has_the_same_colour_whatever_the_number_of_classes():
    assert class_colours(7) == class_colours(150)[:7]
    assert class_colour(3000) == class_colour(3000 % 512)


def test_colours_that_are_seen_are_measured_as_the_standard_has_it():
    """White, and red and blue from the published tables of CIELAB."""
    measured = _lab(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255]], dtype=float))
    assert measured[0] == pytest.approx([100, 0, 0], abs=0.02)
    assert measured[1] == pytest.approx([53.24, 80.09, 67.20], abs=0.1)
    assert measured[2] == pytest.approx([32.30, 79.19, -107.86], abs=0.1)


def test_given_colours_are_taken_as_they_are():
    assert class_colours(2, [(1, 2, 3), (1, 2, 3)]) == [(1, 2, 3), (1, 2, 3)]
    with pytest.raises(UsageError, match="1 colours for 2 classes: give one to each"):
        class_colours(2, [(1, 2, 3)])
