"""Whole detectors and segmenters written as another project reads them, and read back to see that nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swinscale.config import differences, to_dict
from swinscale.data import normalisation
from swinscale.errors import UsageError
from swinscale.models import SwinConfig
from swinscale.weights import (
    LoadReport,
    from_official,
    read_metadata,
    read_state_dict,
    save_pretrained,
    to_official,
    transfer_config,
)
from swinscale.weights.arrange import coordinate_buffers
from swinscale.weights.dense_parts import BACKBONE, DenseFile
from swinscale.weights.files import State, atomic, write_safetensors
from swinscale.weights.infer import infer
from swinscale.weights.records import MODEL_TYPE, make_record, read_config

LAYOUTS = {"official": "official-dense", "mm": "mm"}
"""What ``--to`` takes → the names of the backbone's tensors."""


@dataclass(frozen=True)
class Dense:
    """A kind of model that is converted whole.

    Args:
        what: "detector".
        task: its name in records.
        targets: what ``--to`` may be, beside "swinscale".
        example: a name of a file that says its windows.
        in_use: fields of the options that decide what a trained model finds and no tensor tells.
        open: sorts the tensors of a file.
        settings: path → backbone, options, preprocessing.
        build: backbone, options and number of classes → the model, without memory.
        load: as ``load_detector``.
        describe: a state of ours → "Mask R-CNN, 80 classes, …".
        rename: a state of ours and what ``--to`` takes → the other project's names.
        directory: for a target that is a directory: backbone, options and preprocessing → its JSON files by name.
    """

    what: str
    task: str
    targets: tuple[str, ...]
    example: str
    in_use: tuple[str, ...]
    open: Callable[[State], DenseFile]
    settings: Callable[[Path], tuple[SwinConfig, Any, dict[str, Any]]]
    build: Callable[[SwinConfig, Any, int], nn.Module]
    load: Callable[..., LoadReport]
    describe: Callable[[State], str]
    rename: Callable[[State, str], State]
    directory: Callable[[SwinConfig, Any, dict[str, Any]], dict[str, Any]] | None = None


def convert_dense(
    kind: Dense, source: Path, out: Path, to: str, *, img_size: int | None = None, window_size: int | None = None
) -> list[str]:
    """Writes the model in ``source`` as ``out``, and checks what was written; see ``convert.convert``.

    Raises:
        UsageError: for a target that has no such models or no place for this one, and weights that are not a whole model.
    """
    if to not in (*kind.targets, "swinscale"):
        raise UsageError(
            f"{source} is a {kind.what}, and --to {to} has none: choose {', '.join(kind.targets)} or swinscale, or pass "
            f"--encoder to write its backbone alone."
        )
    if img_size is not None:
        raise UsageError(f"--img-size: a {kind.what} takes pictures of any size. Leave it out.")
    _check_windows(kind, source)
    config, task, preprocessing = kind.settings(source)
    classes = len(preprocessing["classes"])
    model = kind.build(config, task, classes)
    report = kind.load(model, source, keep_meta=True)
    state = {name: tensor for name, tensor in _ours(kind, source).items() if name in model.state_dict()}
    lines = [f"{source}: {kind.describe(state)}, {sum(t.numel() for t in state.values()):,} numbers"]
    lines += [f"  left out: {line}" for line in report.left_out]
    if window_size is not None:
        config = transfer_config(config, window_size=window_size)
        model = kind.build(config, task, classes)
        moved = kind.build(config, task, classes).to_empty(device="cpu")
        kind.load(moved, source)
        changed = {name: tensor for name, tensor in moved.state_dict().items() if name.startswith(BACKBONE)}
        state |= {name: tensor.to(state[name].dtype) for name, tensor in changed.items()}
        lines.append(f"  transferred to window_size {window_size}")
    mean, std = normalisation(config.in_chans, preprocessing["mean"], preprocessing["std"])
    preprocessing = {**preprocessing, "mean": list(mean), "std": list(std)}
    record = {"task": {"name": kind.task, **to_dict(task)}, "preprocessing": preprocessing}
    if to == "swinscale":
        tensors = state
        save_pretrained(model, out, metadata={**read_metadata(source), **record}, state=state)
    else:
        tensors = kind.rename(state, to)
        if to in LAYOUTS:
            backbone = {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}
            tensors |= from_official({**backbone, **coordinate_buffers(config)}, LAYOUTS[to], config)
            _write_file(tensors, out, config, type(model).__name__, record)
        else:
            assert kind.directory is not None
            _write_directory(tensors, out, kind.directory(config, task, preprocessing))
    lines.append(f"{out}: {to}, {len(tensors)} tensors")
    lines += _lost(kind, out, config, task, preprocessing)
    lines.append(_check_written(kind, out, tensors, state))
    return lines


def _check_windows(kind: Dense, source: Path) -> None:
    """Refuses V2 weights without a record whose windows nobody knows: they would be written with guessed ones."""
    if read_config(source) is not None:
        return
    if infer(kind.open(read_state_dict(source)[0]).backbone, source).windows_from == "assumed":
        raise UsageError(f"{source} does not say its windows: give the file a name that does, such as {kind.example}.")


def _ours(kind: Dense, path: Path) -> State:
    """The tensors of a model of any layout under our names, as they are stored."""
    file = kind.open(read_state_dict(path)[0])
    backbone = to_official(file.backbone)[0]
    return {**{BACKBONE + name: tensor for name, tensor in backbone.items()}, **file.heads}


def _write_file(tensors: State, out: Path, config: SwinConfig, architecture: str, record: dict[str, Any]) -> None:
    if out.suffix == ".safetensors":  # our record in its header disturbs no reader
        write_safetensors(out, tensors, {MODEL_TYPE: json.dumps(make_record(config, architecture, record))})
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {"CLASSES": record["preprocessing"]["classes"], "PALETTE": record["preprocessing"].get("colours")}
    content = {
        "meta": {name: list(value) for name, value in known.items() if value},
        "state_dict": {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()},
    }
    with atomic(out) as temporary:
        torch.save(content, temporary)


def _write_directory(tensors: State, out: Path, records: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", tensors)
    for name, record in records.items():
        with atomic(out / name) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")


def _lost(kind: Dense, out: Path, config: SwinConfig, task: Any, preprocessing: dict[str, Any]) -> list[str]:
    """A line about the settings that who reads ``out`` will not find there, and must set."""
    there = kind.settings(out)
    mean, std = normalisation(there[0].in_chans, there[2]["mean"], there[2]["std"])
    pairs = [
        *((f"model.{name}", getattr(there[0], name), getattr(config, name)) for name in ("pad", "small_map")),
        *((f"task.{name}", getattr(there[1], name), getattr(task, name)) for name in kind.in_use),
        *differences({**there[2], "mean": list(mean), "std": list(std)}, preprocessing, "data"),
    ]
    lost = [f"{name}={new}" for name, old, new in pairs if old != new and name != "data.colours"]
    return [f"  note: {out.name} does not hold these settings: {', '.join(lost)}"] if lost else []


def _check_written(kind: Dense, out: Path, tensors: State, state: State) -> str:
    """Reads ``out`` and compares it with what it shall be, and under our names with what was read.

    Raises:
        UsageError: names the first tensor that differs.
    """
    found = read_state_dict(out)[0]
    for what, expected, there in (("written", tensors, found), ("read", state, _ours(kind, out))):
        wrong = sorted(set(expected) ^ set(there)) or [n for n in expected if not torch.equal(expected[n], there[n])]
        if wrong:
            raise UsageError(
                f"{out} differs from what was {what} in {len(wrong)} tensors, the first is {wrong[0]}. Convert again."
            )
    count = sum(tensor.numel() for tensor in state.values())
    return f"read back: {len(found)} tensors bit-equal to what was written; all {count:,} numbers return unchanged"
