"""Configurations are frozen dataclasses; this module turns them into JSON and back and changes single fields.

A recipe is a Python function that returns such a dataclass. JSON only records what ran. Unknown fields are refused
with the nearest known name.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from swinscale.errors import UsageError

T = TypeVar("T")


def suggest(word: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of ``allowed``, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars, ready for ``json.dump``."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Builds dataclass ``cls`` from plain values, nested dataclasses included.

    Raises:
        UsageError: for an unknown field, a missing one, or a value of the wrong type; the message names the field.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UsageError(f"Unknown setting '{where}{name}' of {cls.__name__}.{suggest(name, fields)}")
    try:
        return cls(**{name: _coerce(value, hints[name], where + name) for name, value in values.items()})
    except TypeError as error:  # a required field is missing
        raise UsageError(f"{cls.__name__}: {error}.") from error


NOT_RECORDED = "not recorded"


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """What differs between two recorded configurations: ``("train.epochs", 10, 20)`` for every such setting.

    A setting that one of them lacks has the value ``NOT_RECORDED`` there.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [
            d
            for k in keys
            for d in differences(old.get(k, NOT_RECORDED), new.get(k, NOT_RECORDED), f"{path}.{k}" if path else k)
        ]
    return [] if old == new else [(path, old, new)]


def override(config: T, *assignments: str) -> T:
    """Returns ``config`` with fields changed: ``override(recipe, "train.epochs=3", "model.img_size=(192, 256)")``.

    Values are read as Python literals (``3``, ``1e-3``, ``(7, 7)``, ``None``, ``true``) and as text otherwise. All changes
    are made at once, so that fields which must fit each other can change together.

    Raises:
        UsageError: for an assignment without ``=``, an unknown field (with the nearest name) or a wrong type.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        if not sep:
            raise UsageError(f"'{assignment}' is not an override. Write setting=value, for example train.epochs=10.")
        *parents, name = path.strip().split(".")
        inner = changes
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UsageError(f"'{path.strip()}' is inside '{parent}', which is set as a whole. Set one of them.")
        inner[name] = _Value(_literal(text.strip()))
    return _replace(config, changes, "")


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value to set, in contrast to a dict of changes further down."""

    value: Any


def _replace(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    fields = [f.name for f in dataclasses.fields(config)]
    hints = typing.get_type_hints(type(config))
    new = {}
    for name, change in changes.items():
        where = prefix + name
        if name not in fields:
            allowed = ", ".join(prefix + f for f in fields)
            raise UsageError(f"Unknown setting '{where}'.{suggest(name, fields)} Allowed here: {allowed}.")
        if isinstance(change, _Value):
            new[name] = _coerce(change.value, hints[name], where)
        elif dataclasses.is_dataclass(child := getattr(config, name)):
            new[name] = _replace(child, change, where + ".")
        else:
            raise UsageError(f"Setting '{where}.{next(iter(change))}' does not exist: '{name}' is a plain value.")
    return dataclasses.replace(config, **new)


def check_ranges(config: Any, where: str, **intervals: str) -> None:
    """Refuses numbers outside their interval: ``check_ranges(self, "train.", epochs="(0, inf)", ema_decay="[0, 1)")``.

    Every entry of a tuple is checked; None is always allowed.

    Raises:
        UsageError: names the setting, its value and the interval.
    """
    for name, interval in intervals.items():
        value = getattr(config, name)
        low, high = (float(end) for end in interval[1:-1].split(","))
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:
                continue
            above = number > low or (number == low and interval[0] == "[")
            below = number < high or (number == high and interval[-1] == "]")
            if not (above and below):
                least = f"at least {low:g}" if interval[0] == "[" else f"greater than {low:g}"
                most = "" if high == math.inf else f" and {'at most' if interval[-1] == ']' else 'less than'} {high:g}"
                raise UsageError(f"{where}{name}={value} is not allowed: it must be {least}{most}.")


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type, or a UsageError that names the setting."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        kinds = [option for option in args if dataclasses.is_dataclass(option)]
        if (
            isinstance(value, dict) and kinds
        ):  # of the kind that knows most of the names, so that a mistake inside is named
            known = [{f.name for f in dataclasses.fields(kind)} for kind in kinds]
            return _coerce(value, kinds[min(range(len(kinds)), key=lambda i: len(value.keys() - known[i]))], where)
        for option in args:
            try:
                return _coerce(value, option, where)
            except UsageError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        allowed = ", ".join(map(repr, args))
        raise UsageError(
            f"{where}={value!r} is not allowed: choose one of {allowed}.{suggest(str(value), map(str, args))}"
        )
    elif hint is type(None):
        if value is None:
            return None
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, dict):
            return from_dict(hint, value, where + ".")  # type: ignore[arg-type]
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(_coerce(v, args[0], where) for v in value)
            if len(args) == len(value):
                return tuple(_coerce(v, a, where) for v, a in zip(value, args, strict=True))
    elif origin is dict:
        if isinstance(value, dict):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{where}={value!r} is not allowed: expected {_describe(hint)}.")


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple and args[1:] == (Ellipsis,):
        return f"several, each {_describe(args[0])}"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
