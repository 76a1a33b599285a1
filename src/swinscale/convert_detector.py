"""Whole detectors written as OpenMMLab, the published Swin detection code or this library reads them, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from swinscale.config import differences, to_dict
from swinscale.data import normalisation
from swinscale.detection import detection_config, load_detection
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.weights import from_official, read_metadata, read_state_dict, save_pretrained, to_official
from swinscale.weights.arrange import coordinate_buffers
from swinscale.weights.detector_parts import BACKBONE, describe_parts, open_detector, parts_of
from swinscale.weights.detectors import detector_to_mm, load_detector
from swinscale.weights.files import State, atomic, write_safetensors
from swinscale.weights.infer import infer
from swinscale.weights.records import MODEL_TYPE, make_record, read_config

LAYOUTS: dict[str, Literal["official-dense", "mm"]] = {"official": "official-dense", "mm": "mm"}
"""What ``--to`` takes → the names of the backbone's tensors."""
IN_USE = (
    *("anchor_scale", "anchor_ratios", "proposals", "proposals_per_level", "mask_size", "score", "limit", "nms_iou"),
    *("soft_nms", "test_short", "test_long", "test_ranges", "test_flip"),
)
"""Fields of ``DetectConfig`` that decide what a trained detector finds and no tensor tells."""


def convert_detector(
    source: Path, out: Path, to: str, *, img_size: int | None = None, window_size: int | None = None
) -> list[str]:
    """Writes the detector in ``source`` as ``out``, and checks what was written; see ``convert.convert``.

    Raises:
        UsageError: for a target that has no detectors or no place for this one, and weights that are not a whole detector.
    """
    if to not in (*LAYOUTS, "swinscale"):
        raise UsageError(
            f"{source} is a detector, and --to {to} has none: choose mm, official or swinscale, or pass --encoder to "
            f"write its backbone alone."
        )
    if img_size is not None:
        raise UsageError("--img-size: a detector takes pictures of any size. Leave it out.")
    _check_windows(source)
    config, task, preprocessing = detection_config(source)
    model = _without_memory(config, task, len(preprocessing["classes"]))
    report = load_detector(model, source, keep_meta=True)
    state = {name: tensor for name, tensor in _ours(source).items() if name in model.state_dict()}
    lines = [f"{source}: {describe_parts(parts_of(state))}, {sum(t.numel() for t in state.values()):,} numbers"]
    lines += [f"  left out: {line}" for line in report.left_out]
    if window_size is not None:
        backbone = load_detection(source, window_size=window_size).task.backbone
        model, config = _without_memory(backbone.config, task, len(preprocessing["classes"])), backbone.config
        changed = {BACKBONE + name: tensor for name, tensor in backbone.state_dict().items()}
        state |= {name: tensor.to(state[name].dtype) for name, tensor in changed.items()}
        lines.append(f"  transferred to window_size {window_size}")
    mean, std = normalisation(config.in_chans, preprocessing["mean"], preprocessing["std"])
    preprocessing = {**preprocessing, "mean": list(mean), "std": list(std)}
    record = {"task": {"name": "detect", **to_dict(task)}, "preprocessing": preprocessing}
    if to == "swinscale":
        tensors = state
        save_pretrained(model, out, metadata={**read_metadata(source), **record}, state=state)
    else:
        tensors = detector_to_mm(state, LAYOUTS[to])
        backbone_state = {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}
        tensors |= from_official({**backbone_state, **coordinate_buffers(config)}, LAYOUTS[to], config)
        _write_file(tensors, out, config, record)
    lines.append(f"{out}: {to}, {len(tensors)} tensors")
    lines += _lost(out, config, task, preprocessing)
    lines.append(_check_written(out, tensors, state))
    return lines


def _check_windows(source: Path) -> None:
    """Refuses V2 weights without a record whose windows nobody knows: they would be written with guessed ones."""
    if read_config(source) is not None:
        return
    if infer(open_detector(read_state_dict(source)[0]).backbone, source).windows_from == "assumed":
        raise UsageError(
            f"{source} does not say its windows: give the file a name that does, such as mask_rcnn_swinv2_tiny_window16.pth."
        )


def _without_memory(config: SwinConfig, task: DetectConfig, classes: int) -> Detector:
    with torch.device("meta"):
        return Detector(SwinTransformer(config), classes, task)


def _ours(path: Path) -> State:
    """The tensors of a detector of any layout under our names, as they are stored."""
    file = open_detector(read_state_dict(path)[0])
    backbone = to_official(file.backbone)[0]
    return {**{BACKBONE + name: tensor for name, tensor in backbone.items()}, **file.heads}


def _write_file(tensors: State, out: Path, config: SwinConfig, record: dict[str, Any]) -> None:
    if out.suffix == ".safetensors":  # our record in its header disturbs no reader
        write_safetensors(out, tensors, {MODEL_TYPE: json.dumps(make_record(config, "Detector", record))})
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "meta": {"CLASSES": list(record["preprocessing"]["classes"])},
        "state_dict": {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()},
    }
    with atomic(out) as temporary:
        torch.save(content, temporary)


def _lost(out: Path, config: SwinConfig, task: DetectConfig, preprocessing: dict[str, Any]) -> list[str]:
    """A line about the settings that who reads ``out`` will not find there, and must set."""
    there = detection_config(out)
    mean, std = normalisation(there[0].in_chans, there[2]["mean"], there[2]["std"])
    read = {**there[2], "mean": list(mean), "std": list(std)}
    pairs = [
        *((f"model.{name}", getattr(there[0], name), getattr(config, name)) for name in ("pad", "small_map")),
        *((f"task.{name}", getattr(there[1], name), getattr(task, name)) for name in IN_USE),
        *differences(read, preprocessing, "data"),
    ]
    lost = [f"{name}={new}" for name, old, new in pairs if old != new]
    return [f"  note: {out.name} does not hold these settings: {', '.join(lost)}"] if lost else []


def _check_written(out: Path, tensors: State, state: State) -> str:
    """Reads ``out`` and compares it with what it shall be, and under our names with what was read.

    Raises:
        UsageError: names the first tensor that differs.
    """
    found = read_state_dict(out)[0]
    for what, expected, there in (("written", tensors, found), ("read", state, _ours(out))):
        wrong = sorted(set(expected) ^ set(there)) or [n for n in expected if not torch.equal(expected[n], there[n])]
        if wrong:
            raise UsageError(
                f"{out} differs from what was {what} in {len(wrong)} tensors, the first is {wrong[0]}. Convert again."
            )
    count = sum(tensor.numel() for tensor in state.values())
    return f"read back: {len(found)} tensors bit-equal to what was written; all {count:,} numbers return unchanged"
