"""Loading a file of a detector or a segmenter into one of ours: backbone, stage norms and heads, with one report of all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.weights.dense_parts import BACKBONE, DenseFile
from swinscale.weights.files import State, read_state_dict
from swinscale.weights.hashes import check_hashes
from swinscale.weights.infer import name_disagreements
from swinscale.weights.load import load_weights, naming
from swinscale.weights.records import read_config
from swinscale.weights.report import LoadReport, some
from swinscale.weights.resize import BiasMethod

COUNTER = ".num_batches_tracked"
"""Frozen norms have none."""


class Comparison(NamedTuple):
    """Why heads do not fit.

    Args:
        theirs, ours: what such models are called.
        wrong: a line about each part that differs.
        advice: how a message that names them goes on: "Build …, or".
    """

    theirs: str
    ours: str
    wrong: list[str]
    advice: str


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of dense model, as far as loading has to know it. Heads are tensors under our names, stage norms included.

    Args:
        what: "detectors".
        modules: names of the modules that such a model consists of.
        optional: beginnings of names of parts that such a model may have or not.
        unread: beginnings of names of tensors that nothing reads.
        open: sorts the tensors of a file.
        published: whether other projects have a name for a tensor of ours.
        describe: heads → "Mask R-CNN, 80 classes, …".
        other_classes: name, shapes in file and model, heads of both → why a last layer that counts classes stays as it is; ""
            if the number of classes does not explain the shapes.
        compare: heads of file and model → why they do not fit.
    """

    what: str
    modules: tuple[str, ...]
    optional: tuple[str, ...]
    unread: tuple[str, ...]
    open: Callable[[State], DenseFile]
    published: Callable[[str], bool]
    describe: Callable[[State], str]
    other_classes: Callable[[str, tuple[int, ...], tuple[int, ...], State, State], str]
    compare: Callable[[State, State], Comparison]


def load_dense(
    kind: Kind,
    model: nn.Module,
    source: str | os.PathLike[str] | State,
    *,
    strict: bool,
    transfer: bool | BiasMethod,
    min_match: float,
    heads: bool,
    config: SwinConfig | None,
    keep_meta: bool,
) -> LoadReport:
    """Loads into ``model``, in place; see ``load_detector``. Nothing is changed when the weights do not fit."""
    target = _find(model, kind)
    if isinstance(source, dict):
        label, state = "state dict", source
    else:
        check_hashes(source)
        label, state = str(source), read_state_dict(source)[0]
        config = config or read_config(source)
    file = kind.open(state)
    own = {name: t for name, t in target.state_dict().items() if not name.startswith(BACKBONE)}
    report = LoadReport(label, "", "", left_out=list(file.notes))
    if file.has_heads and not heads:
        number = len(file.unknown) + sum(not name.startswith("body.") for name in file.heads)
        report.left_out.append(f"the heads ({number} tensors): heads=False")
    whole = heads and file.has_heads
    reason = "the file has no heads" if heads else "heads=False"
    fitted = _fit_heads(kind, own, file, report) if whole else _fit_norms(own, file, report, reason)
    if strict:
        _judge(kind, own, file, report, whole)
    left = [name for name, tensor in own.items() if tensor.is_meta and name not in fitted and not keep_meta]
    if left:
        raise UsageError(
            f"The model is on the meta device, and {label} has no {some(left)}: call model.to_empty(device='cpu') and "
            f"initialise it before loading."
        )
    if config is None and not isinstance(source, dict):
        with naming(label):
            report.disagreements = name_disagreements(file.backbone, source)
    backbone: nn.Module = target.get_submodule("body.backbone")
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
    _put(target, own, fitted)
    return _join(found, report, fitted, f"{kind.describe(file.heads)}, with " if file.has_heads else "")


def _find(model: nn.Module, kind: Kind) -> nn.Module:
    found = [module for module in model.modules() if all(hasattr(module, part) for part in kind.modules)]
    if len(found) != 1:
        raise UsageError(f"{type(model).__name__} holds {len(found)} {kind.what}: pass the one to load into.")
    return found[0]


def _branches(kind: Kind, heads: State) -> set[str]:
    """Which of the optional parts are there."""
    return {branch for branch in kind.optional if any(name.startswith(branch) for name in heads)}


def _fit_heads(kind: Kind, own: State, file: DenseFile, report: LoadReport) -> State:
    """Tensors of the heads and stage norms that fit as they are; the report gets the others."""
    there, here = _branches(kind, file.heads), _branches(kind, own)
    new, dropped = here - there, there - here
    fitted: State = {}
    for name, tensor in own.items():
        value = file.heads.get(name)
        if value is None:
            if name.startswith(tuple(new)):
                report.fresh[name] = "the file has no such branch"
            elif name.endswith(COUNTER):
                report.fresh[name] = "the file has none"
            elif not kind.published(name):
                report.fresh[name] = "the file has none; it has no published name"
            else:
                report.missing.append(name)
        elif value.shape == tensor.shape:
            fitted[name] = value
        elif why := kind.other_classes(name, tuple(value.shape), tuple(tensor.shape), file.heads, own):
            report.fresh[name] = why
        else:
            report.mismatched[name] = f"file {tuple(value.shape)}, model {tuple(tensor.shape)}"
    spare = [name for name in file.heads if name not in own and not name.startswith(tuple(dropped))]
    for branch in sorted(dropped):
        report.left_out.append(
            f"{file.names[next(n for n in file.heads if n.startswith(branch))]}, …: the model has no such branch"
        )
    unused = [
        n
        for n in spare
        if n.startswith(kind.unread) or (n.endswith(COUNTER) and n.removesuffix(COUNTER) + ".running_mean" in own)
    ]
    if unused:
        report.left_out.append(f"{some([file.names[name] for name in unused])}: nothing reads it")
    report.unexpected = [*(file.names[name] for name in spare if name not in unused), *file.unknown]
    return fitted


def _fit_norms(own: State, file: DenseFile, report: LoadReport, reason: str) -> State:
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


def _put(target: nn.Module, own: State, fitted: State) -> None:
    """Copies ``fitted`` into the tensors of the model; takes their place where those are on ``meta``."""
    on_meta = {name: value.to(own[name].dtype) for name, value in fitted.items() if own[name].is_meta}
    with torch.no_grad():
        for name, value in fitted.items():
            if name not in on_meta:
                own[name].copy_(value)
    if on_meta:
        target.load_state_dict(on_meta, strict=False, assign=True)


def _judge(kind: Kind, own: State, file: DenseFile, report: LoadReport, whole: bool) -> None:
    if not (report.missing or report.mismatched or report.unexpected):
        return
    found = kind.compare(file.heads, own)
    wrong, advice = (found.wrong if whole else []), found.advice
    if not wrong:  # the same parts, but not the same tensors
        advice = "You can"
        shapes = [f"{name} ({shape})" for name, shape in report.mismatched.items()]
        wrong = [f"other shape: {some(shapes)}"] if shapes else []
        wrong += [f"missing: {some(report.missing)}"] if report.missing else []
        wrong += [f"the model has no place for {some(report.unexpected)}"] if report.unexpected else []
    kinds = (f" ({found.theirs})", f" the model ({found.ours})") if whole else ("", "")
    alone = (
        " heads=False to load the backbone alone (which 'swinscale convert … --encoder' writes), or" if whole else ""
    )
    raise UsageError(
        f"{report.source}{kinds[0]} does not fit{kinds[1]}: {'; '.join(wrong)}. {advice} pass{alone} strict=False to load what "
        f"fits."
    )


def _join(backbone: LoadReport, heads: LoadReport, fitted: State, what: str) -> LoadReport:
    """One report of both, under the names of the whole model."""
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
