"""Detectors as OpenMMLab names them, with a Swin Transformer inside, into ours and the way back.

Mask R-CNN, Cascade Mask R-CNN and Hybrid Task Cascade, and the same without masks. The backbone is in the published dense
form or in OpenMMLab's, and goes through ``load_weights``; everything else only changes its name. Both sides put the
background last, order anchors and pooled features alike, and count boxes class by class, so no number moves.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.weights.detector_parts import (
    BACKBONE,
    BLOCK,
    DETECTOR,
    TO_THEIRS,
    DetectorFile,
    branches,
    describe_parts,
    differences,
    open_detector,
    parts_of,
    translate,
)
from swinscale.weights.files import State, read_state_dict
from swinscale.weights.hashes import check_hashes
from swinscale.weights.infer import name_disagreements
from swinscale.weights.layouts import from_official
from swinscale.weights.load import load_weights, naming
from swinscale.weights.records import read_config
from swinscale.weights.report import LoadReport, some
from swinscale.weights.resize import BiasMethod


def is_detector(names: Iterable[str]) -> bool:
    """Whether these are names of a two-stage detector, OpenMMLab's or ours."""
    return any(DETECTOR.fullmatch(name) for name in names)


def describe_detector(state: State) -> str:
    """What a detector is: "Mask R-CNN, 80 classes, pyramid of 256 channels, …". Tensors may be on ``meta``.

    Raises:
        UsageError: if it is none.
    """
    if not is_detector(state):
        raise UsageError(
            "These are not the weights of a two-stage detector: none is named roi_head.bbox_head.fc_cls.weight "
            "(OpenMMLab) or roi.box_heads.0.classify.weight."
        )
    return describe_parts(parts_of(open_detector(state).heads))


def load_detector(
    model: nn.Module,
    source: str | os.PathLike[str] | State,
    *,
    strict: bool = True,
    transfer: bool | BiasMethod = True,
    min_match: float = 0.99,
    heads: bool = True,
    config: SwinConfig | None = None,
    keep_meta: bool = False,
) -> LoadReport:
    """Loads a detector of OpenMMLab, of the published Swin detection code or of ours into ``model``, in place.

    Where the classes differ in number, the last layers that count them keep their values and all else is loaded. A branch for masks
    or for a semantic map that only one side has is left out, or keeps its values. Of weights
    without heads (a classifier, masked image modelling, segmentation) the backbone is loaded, with stage norms where
    there are some. Nothing is changed when the weights do not fit.

    Args:
        model: a detector, or a module that holds exactly one (a task).
        source: a weight file, a directory with one, or tensors by name.
        strict: raise when the weights do not fit; otherwise load what fits and report the rest.
        transfer, min_match, config: of the backbone, see ``load_weights``.
        keep_meta: parameters on the meta device that the file does not have may stay there, to be initialised later.
        heads: False: load the backbone and its stage norms alone.

    Returns: the report; names are those of the detector. ``share`` and ``elements`` are those of the backbone.

    Raises:
        UsageError: for weights that cannot be read or, when strict, do not fit: the message names the parts that differ.
    """
    detector = _find_detector(model)
    if isinstance(source, dict):
        label, state = "state dict", source
    else:
        check_hashes(source)
        label, state = str(source), read_state_dict(source)[0]
        config = config or read_config(source)
    file = open_detector(state)
    own = {name: t for name, t in detector.state_dict().items() if not name.startswith(BACKBONE)}
    report = LoadReport(label, "", "", left_out=list(file.notes))
    if file.has_heads and not heads:
        count = len(file.unknown) + sum(not name.startswith("body.") for name in file.heads)
        report.left_out.append(f"the heads ({count} tensors): heads=False")
    whole = heads and file.has_heads
    reason = "the file has no heads" if heads else "heads=False"
    fitted = _fit_heads(own, file, report) if whole else _fit_norms(own, file, report, reason)
    if strict:
        _judge(own, file, report, whole)
    left = [name for name, tensor in own.items() if tensor.is_meta and name not in fitted and not keep_meta]
    if left:
        raise UsageError(
            f"The model is on the meta device, and {label} has no {some(left)}: call model.to_empty(device='cpu') and "
            f"initialise it before loading."
        )
    if config is None and not isinstance(source, dict):
        with naming(label):
            report.disagreements = name_disagreements(file.backbone, source)
    backbone: nn.Module = detector.get_submodule("body.backbone")
    try:
        found = load_weights(
            backbone,
            file.backbone,
            strict=strict,
            transfer=transfer,
            min_match=min_match,
            config=config,
            keep_meta=keep_meta,
        )
    except UsageError as error:
        raise UsageError(str(error).replace("state dict", f"The backbone of {label}", 1)) from error
    _put(detector, own, fitted)
    return _join(found, report, fitted, f"{describe_parts(parts_of(file.heads))}, with " if file.has_heads else "")


def detector_to_mm(state: State, layout: Literal["official-dense", "mm"] = "official-dense") -> State:
    """Tensors of our detector under OpenMMLab's names.

    Args:
        layout: how the backbone is named: as in the published Swin detection code (V1 alone), or as in mmdetection.

    Raises:
        UsageError: for a backbone or a part that the layout has no place for, and for tensors that are no detector of ours.
    """
    if layout not in ("official-dense", "mm"):
        raise UsageError(f"layout='{layout}' is not allowed for a detector: choose 'official-dense' or 'mm'.")
    root = next((m[1] or "" for m in map(BLOCK.fullmatch, state) if m and (m[1] or "").endswith("body.")), None)
    if root is None or not is_detector(state):
        raise UsageError("These are not the tensors of a detector of ours: pass detector.state_dict().")
    root = root.removesuffix("body.")
    inside = {name.removeprefix(root): tensor for name, tensor in state.items()}
    out = from_official({n.removeprefix(BACKBONE): t for n, t in inside.items() if n.startswith(BACKBONE)}, layout)
    single = not any(name.startswith("roi.box_heads.1.") for name in inside)
    for name, tensor in inside.items():
        if name.startswith(BACKBONE):
            continue
        there = translate(name, TO_THEIRS)
        if there is None:
            raise UsageError(f"OpenMMLab's detectors have no place for '{name}': they cannot hold this model.")
        out[re.sub(r"^(roi_head\.(bbox|mask)_head)\.0\.", r"\1.", there) if single else there] = tensor
    return out


def _find_detector(model: nn.Module) -> nn.Module:
    parts = ("body", "fpn", "rpn", "roi")
    found = [module for module in model.modules() if all(hasattr(module, part) for part in parts)]
    if len(found) != 1:
        raise UsageError(f"{type(model).__name__} holds {len(found)} detectors: pass the one to load into.")
    return found[0]


def _fit_heads(own: State, file: DetectorFile, report: LoadReport) -> State:
    """Tensors of the heads and stage norms that fit as they are; the report gets the others."""
    classes = parts_of(file.heads).classes, parts_of(own).classes
    new, dropped = branches(own) - branches(file.heads), branches(file.heads) - branches(own)
    fitted: State = {}
    for name, tensor in own.items():
        value = file.heads.get(name)
        if value is None:
            if name.startswith(tuple(new)):
                report.fresh[name] = "the file has no such branch"
            elif name.endswith("num_batches_tracked"):
                report.fresh[name] = "the file has none"
            elif translate(name, TO_THEIRS) is None:
                report.fresh[name] = "the file has none; it has no published name"
            else:
                report.missing.append(name)
        elif value.shape == tensor.shape:
            fitted[name] = value
        elif why := _other_classes(name, tuple(value.shape), tuple(tensor.shape), classes):
            report.fresh[name] = why
        else:
            report.mismatched[name] = f"file {tuple(value.shape)}, model {tuple(tensor.shape)}"
    spare = [name for name in file.heads if name not in own and not name.startswith(tuple(dropped))]
    for branch in sorted(dropped):
        report.left_out.append(
            f"{file.names[next(n for n in file.heads if n.startswith(branch))]}, …: the model has no such branch"
        )
    counter = ".num_batches_tracked"  # frozen norms have none
    unused = [
        n
        for n in spare
        if n.startswith("roi.mask_heads.0.carry.")
        or (n.endswith(counter) and n.removesuffix(counter) + ".running_mean" in own)
    ]
    if unused:
        report.left_out.append(f"{some([file.names[name] for name in unused])}: nothing reads it")
    report.unexpected = [*(file.names[name] for name in spare if name not in unused), *file.unknown]
    return fitted


def _other_classes(name: str, file: tuple[int, ...], model: tuple[int, ...], classes: tuple[int, int]) -> str:
    """Why a last layer that counts classes stays as it is; "" if the number of classes does not explain the shapes."""
    if file[1:] != model[1:] or not (file and model):
        return ""
    layer, rows = name.split(".")[-2], (file[0], model[0])
    if name.startswith("roi.semantic.predict."):
        return "new last layer: {} semantic classes in the file, {} in the model".format(*rows)
    unit, more = {"classify": (1, 1), "regress": (4, 0), "predict": (1, 0)}.get(layer, (0, 0))
    counted = rows == tuple(unit * count + more for count in classes)
    return "new last layer: {} classes in the file, {} in the model".format(*classes) if counted else ""


def _fit_norms(own: State, file: DetectorFile, report: LoadReport, reason: str) -> State:
    """Stage norms alone, as far as the file has some."""
    fitted: State = {}
    for name, tensor in own.items():
        value = file.heads.get(name) if name.startswith("body.norms.") else None
        if value is not None and value.shape == tensor.shape:
            fitted[name] = value
        elif value is not None:
            report.mismatched[name] = f"file {tuple(value.shape)}, model {tuple(tensor.shape)}"
        else:
            report.fresh[name] = "the file has none" if name.startswith("body.norms.") else reason
    return fitted


def _put(detector: nn.Module, own: State, fitted: State) -> None:
    """Copies ``fitted`` into the tensors of the detector; takes their place where those are on ``meta``."""
    on_meta = {name: value.to(own[name].dtype) for name, value in fitted.items() if own[name].is_meta}
    with torch.no_grad():
        for name, value in fitted.items():
            if name not in on_meta:
                own[name].copy_(value)
    if on_meta:
        detector.load_state_dict(on_meta, strict=False, assign=True)


def _judge(own: State, file: DetectorFile, report: LoadReport, whole: bool) -> None:
    if not (report.missing or report.mismatched or report.unexpected):
        return
    theirs, ours = parts_of(file.heads), parts_of(own)
    wrong = differences(theirs, ours) if whole else []
    advice = (
        f"Build a model as the file has it ({theirs.kind}), or" if theirs.boxes else "Choose a two-stage detector, or"
    )
    if not wrong:  # the same parts, but not the same tensors
        advice = "You can"
        shapes = [f"{name} ({shape})" for name, shape in report.mismatched.items()]
        wrong += [f"other shape: {some(shapes)}"] if shapes else []
        wrong += [f"missing: {some(report.missing)}"] if report.missing else []
        wrong += [f"the model has no place for {some(report.unexpected)}"] if report.unexpected else []
    kinds = (f" ({theirs.kind})", f" the model ({ours.kind})") if whole else ("", "")
    alone = (
        " heads=False to load the backbone alone (which 'swinscale convert … --encoder' writes), or" if whole else ""
    )
    raise UsageError(
        f"{report.source}{kinds[0]} does not fit{kinds[1]}: {'; '.join(wrong)}. {advice} pass{alone} strict=False to load what "
        f"fits."
    )


def _join(backbone: LoadReport, heads: LoadReport, fitted: State, what: str) -> LoadReport:
    """One report of both, under the names of the detector."""
    return dataclasses.replace(
        backbone,
        source=heads.source,
        looks_like=what + backbone.looks_like,
        matched=[*(BACKBONE + name for name in backbone.matched), *fitted],
        reshaped={BACKBONE + name: how for name, how in backbone.reshaped.items()},
        fresh={**{BACKBONE + name: why for name, why in backbone.fresh.items()}, **heads.fresh},
        left_out=[*backbone.left_out, *heads.left_out],
        missing=[*(BACKBONE + name for name in backbone.missing), *heads.missing],
        mismatched={**{BACKBONE + name: shapes for name, shapes in backbone.mismatched.items()}, **heads.mismatched},
        unexpected=[*backbone.unexpected, *heads.unexpected],
        disagreements=heads.disagreements,
    )
