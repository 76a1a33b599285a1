"""Files of detectors and segmenters, sorted: the backbone, the norms of its stages, the heads, and whose names they have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from swinscale.weights.files import State
from swinscale.weights.report import some

Rows = list[tuple[re.Pattern[str], str]]

STAGE_NORMS = ("body.norms.{i}", "backbone.norm{i}")
"""(our name of a module, OpenMMLab's)"""

BACKBONE = "body.backbone."
BLOCK = re.compile(
    r"(.*\.)?backbone\.(?:(?:swin(?:v2)?\.)?encoder\.)?(?:layers|stages)\.(\d+)\.blocks\.0\."
    r"(?:norm1|layernorm_before)\.weight"
)
"""A name that each stage of a backbone has, and in front of it the model's prefix."""


class DenseFile(NamedTuple):
    """What a file holds.

    Args:
        backbone: its tensors as they were named, for ``load_weights``.
        heads: tensors of all else under our names, stage norms included.
        names: our name → the name in the file.
        unknown: names of tensors that no model of ours of this kind has.
        notes: a line about each group that was not looked at.
    """

    backbone: State
    heads: State
    names: dict[str, str]
    unknown: list[str]
    notes: list[str]

    @property
    def has_heads(self) -> bool:
        """Whether there is more than a backbone with stage norms."""
        return bool(self.unknown) or any(not name.startswith("body.") for name in self.heads)


def rows(pairs: Iterable[tuple[str, str]]) -> Rows:
    """(name of a module, name on the other side), with numbers as ``{i}``, as ``translate`` takes them."""
    numbered = ((re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(frm)), to) for frm, to in pairs)
    return [(re.compile(rf"{pattern}\.(?P<leaf>\w+)"), to + ".{leaf}") for pattern, to in numbered]


def translate(name: str, table: Rows) -> str | None:
    """The name of a tensor on the other side, None where it has none."""
    found = ((pattern.fullmatch(name), to) for pattern, to in table)
    return next((to.format(**match.groupdict()) for match, to in found if match), None)


def open_dense(
    state: State, to_ours: Callable[[str], str | None], own: tuple[str, ...], heads: re.Pattern[str]
) -> DenseFile:
    """Sorts the tensors of a file. Of several models in one the teacher counts, then the one with the shortest prefix.

    Args:
        to_ours: another project's name → ours, None where there is none.
        own: beginnings of the names of our modules of this kind.
        heads: beginnings of the names of heads of this kind, of models that we do not have too. A file without any gives its
            backbone, whatever else it holds.
    """
    blocks = [match for match in map(BLOCK.fullmatch, state) if match]
    if not blocks:
        return DenseFile(state, {}, {}, [], [])  # a backbone alone
    roots = {(match[1] or "").removesuffix("body.") for match in blocks}
    root = min(roots, key=lambda r: ("teacher" not in r, len(r), r))
    ours = any((match[1] or "") == f"{root}body." for match in blocks)
    last = max(int(match[2]) for match in blocks if (match[1] or "").startswith(root))
    file = DenseFile({}, {}, {}, [], [])
    others: dict[str, int] = {}
    rest: State = {}
    for name, tensor in state.items():
        short = name.removeprefix(root)
        if not name.startswith(root) or re.match(r"ema_\w+$", short):
            group = name.split(".")[0] if not name.startswith(root) else "ema_…"
            others[group] = others.get(group, 0) + 1
            continue
        if ours:
            new = short if short.startswith(own) and not short.startswith(BACKBONE) else None
        else:
            new = to_ours(_stage_norm(short))
        if new is not None and new != f"body.norms.{last}.{new.rpartition('.')[2]}":
            file.heads[new], file.names[new] = tensor, name
        elif short.startswith(("backbone.", BACKBONE)):
            file.backbone[short.removeprefix("body.")] = tensor
        elif heads.match(short):
            file.unknown.append(name)
        else:
            rest[short] = tensor
    if file.has_heads:
        file.unknown.extend(root + short for short in rest)
    else:
        file.backbone.update(rest)  # of another kind of model: ``load_weights`` says what it leaves out
    if others:
        groups = some(sorted(others), 6)
        file.notes.append(f"{sum(others.values())} tensors of other copies of the model ({groups})")
    return file


def _stage_norm(name: str) -> str:
    """transformers counts the norms behind the stages from 1."""
    match = re.fullmatch(r"backbone\.hidden_states_norms\.stage(\d+)\.(\w+)", name)
    return f"backbone.norm{int(match[1]) - 1}.{match[2]}" if match else name


def differences(file: Any, model: Any, compared: Mapping[str, str]) -> list[str]:
    """A line about each part that differs and that both sides know.

    Args:
        file, model: objects with the fields ``compared``, which are "" where a side leaves it open.
        compared: field → what a message calls it.
    """
    pairs = [(what, getattr(file, field), getattr(model, field)) for field, what in compared.items()]
    return [f"{what}: {a} in the file, {b} in the model" for what, a, b in pairs if a != b and "" not in (a, b)]


def count(heads: State, pattern: str) -> int:
    """How many different numbers stand in the names that begin with ``pattern``, in its group."""
    return len({match[1] for match in (re.match(pattern, name) for name in heads) if match})


def side(heads: State, name: str, axis: int) -> int:
    """The size of a tensor along an axis; 0 where there is no such tensor."""
    return heads[name].shape[axis] if name in heads else 0


def number(amount: int, what: str) -> str:
    """ "1 class", "2 heads"."""
    plural = f"{what}{'es' if what.endswith('s') else 's'}"
    return f"{amount} {what if amount == 1 else plural}"
