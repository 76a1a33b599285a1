"""Configurations: JSON and back, overrides, and errors that name the nearest field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from swinscale.config import from_dict, override, suggest, to_dict
from swinscale.errors import UsageError


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 10
    limit: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def test_settings_that_must_fit_each_other_change_together():
    from swinscale.models import SwinConfig

    changed = override(SwinConfig(), "embed_dim=40", "num_heads=(5,10,20,40)", "window_size=(4,4)")
    assert (changed.embed_dim, changed.num_heads, changed.window_size[3]) == (40, (5, 10, 20, 40), (4, 4))
    fewer = override(SwinConfig(), "depths=(2,2)", "num_heads=(3,6)")  # equal windows need no mention
    assert fewer.window_size == SwinConfig().window_size[:2]
    with pytest.raises(UsageError, match="one of these per stage"):
        override(SwinConfig(window_size=(7, 7, 7, 14)), "depths=(2,2)", "num_heads=(3,6)")
    both = override(Outer("a"), "inner.lr=1", "inner.kind=linear", "steps=2")
    assert (both.inner.lr, both.inner.kind, both.steps) == (1.0, "linear", 2)
    with pytest.raises(UsageError, match=r"inside 'steps'"):
        override(Outer("a"), "steps=1", "steps.x=2")


def test_json_round_trip():
    config = Outer("a", limit=3, sizes=(4,), inner=Inner(lr=0.5))
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("steps=7", ("steps",), 7),
        ("inner.lr=3e-4", ("inner", "lr"), 3e-4),
        ("inner.lr=1", ("inner", "lr"), 1.0),
        ("limit=none", ("limit",), None),
        ("limit=5", ("limit",), 5),
        ("sizes=(7, 8, 9)", ("sizes",), (7, 8, 9)),
        ("sizes=[7]", ("sizes",), (7,)),
        ("flag=true", ("flag",), True),
        ("name=some text", ("name",), "some text"),
        ("inner.kind=linear", ("inner", "kind"), "linear"),
        ("inner.betas=(0.8, 0.9)", ("inner", "betas"), (0.8, 0.9)),
    ],
)
def test_override_changes_one_field(assignment, path, value):
    before = Outer("a")
    after = override(before, assignment)
    found = after
    for name in path:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    assert before == Outer("a")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stesp=7", ["'stesp'", "Did you mean 'steps'?"]),
        ("inner.lrr=7", ["'inner.lrr'", "Did you mean 'lr'?", "inner.betas"]),
        ("steps=many", ["steps='many'", "int"]),
        ("steps=true", ["steps=True", "int"]),
        ("inner.kind=cosin", ["'cosin'", "Did you mean 'cosine'?"]),
        ("steps", ["setting=value"]),
        ("steps.deep=1", ["'steps' is a plain value"]),
        ("inner.betas=(1,)", ["inner.betas=(1,)"]),
    ],
)
def test_wrong_overrides_say_what_is_allowed(assignment, words):
    with pytest.raises(UsageError) as error:
        override(Outer("a"), assignment)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_and_missing_fields_in_json():
    with pytest.raises(UsageError, match=r"inner.lrate.*Did you mean 'lr'"):
        from_dict(Outer, {"name": "a", "inner": {"lrate": 1}})
    with pytest.raises(UsageError, match="name"):
        from_dict(Outer, {})


def test_suggest_stays_silent_without_a_near_word():
    assert suggest("zzz", ["steps"]) == ""
