"""Loading weights of any layout into a model, with a report, and with an error when they do not fit."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig, format_size
from swinscale.models.swin import SwinTransformer
from swinscale.models.swin_mlp import SwinMLP
from swinscale.weights.files import State, read_state_dict
from swinscale.weights.hashes import check_hashes
from swinscale.weights.infer import describe, name_disagreements, stored_windows
from swinscale.weights.layouts import detect_layout, to_official
from swinscale.weights.records import read_config
from swinscale.weights.report import LoadReport, some
from swinscale.weights.resize import (
    BiasMethod,
    ChannelInit,
    Inflate,
    adapt_channels,
    inflate_bias_table,
    inflate_coordinates,
    inflate_patches,
    resize_bias_table,
    resize_position_embedding,
    square_map,
    square_window,
    tabulate_bias,
)

BACKBONE = ("patch_embed.", "absolute_pos_embed", "layers.", "norm.")
"""Beginnings of the published names that belong to the backbone."""


class _Target(NamedTuple):
    backbone: SwinTransformer
    masked: nn.Module | None  # the module with mask_token and decoder around the backbone, in masked image modelling


@dataclasses.dataclass(frozen=True)
class _Fitting:
    """From which model to which, and how tensors are fitted.

    Args:
        ours: the model that is loaded.
        theirs: the model that the tensors belong to; None where nobody knows.
        rank: number of axes of theirs.
    """

    ours: SwinConfig
    theirs: SwinConfig | None
    rank: int
    transfer: bool
    table: BiasMethod
    in_chans_init: ChannelInit
    inflate: Inflate

    @property
    def inflates(self) -> bool:
        """From images to clips."""
        return self.transfer and (self.rank, self.ours.rank) == (2, 3)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | State,
    *,
    strict: bool = True,
    transfer: bool | BiasMethod = True,
    min_match: float = 0.99,
    reset_head: Literal["auto", "always", "never"] = "auto",
    classes: Sequence[int] | None = None,
    in_chans_init: ChannelInit = "repeat",
    inflate: Inflate = "repeat",
    drop_k_bias: bool = False,
    config: SwinConfig | None = None,
    keep_meta: bool = False,
    verify: bool = True,
) -> LoadReport:
    """Loads the weights of a Swin Transformer into ``model``, in place.

    The layout (published, timm, transformers, torchvision, ours; classification or SimMIM) is recognised. Weights of
    masked image modelling give a classifier their encoder. Nothing is changed when the weights do not fit.

    Args:
        model: a ``SwinTransformer`` or a module that holds exactly one (a task, a wrapper).
        source: a weight file, a directory with one, or tensors by name.
        strict: raise when the weights do not fit; otherwise load what fits and report the rest.
        transfer: fit bias tables and absolute position embeddings to another window or map by bicubic interpolation, and
            those of an image model to clips, and make sure that a continuous position bias keeps its scale. With the name
            of a method (``bias_methods``), "geometric" resizes tables in that way, "stretch" lets the scale change, and
            "bicubic" and "geometric" make a table of a continuous bias where the model has one. False: nothing of this.
        min_match: share of the backbone's learnable elements that must be found.
        reset_head: keep the model's own classifier when its number of classes differs ("auto"), or "always"; with
            "never" a differing one is an error.
        classes: rows of the file's classifier to take, one for each class of the model.
        in_chans_init: what the first layer does with another number of input channels; see ``adapt_channels``.
        inflate: how an image model gets to clips; see ``inflate_patches`` and ``inflate_bias_table``.
        drop_k_bias: see ``to_official``.
        config: configuration of the weights, where ``source`` does not record it.
        keep_meta: parameters on the meta device that the file does not have may stay there, to be initialised later.
        verify: compare the file with the SHA-256 recorded beside it, where there is one; see ``weights.hashes``.

    Raises:
        UsageError: for weights that cannot be read or, when strict, do not fit.
    """
    methods = get_args(BiasMethod)
    if transfer not in (True, False, *methods):
        raise UsageError(f"transfer={transfer!r} is not allowed: choose True, False or one of {', '.join(methods)}.")
    if inflate not in get_args(Inflate):
        raise UsageError(f"inflate={inflate!r} is not allowed: choose one of {', '.join(get_args(Inflate))}.")
    target = _find_target(model)
    ours = target.backbone.config
    if isinstance(source, dict):
        label, state = "state dict", source
    else:
        if verify:
            check_hashes(source)
        label, state = str(source), read_state_dict(source)[0]
        config = config or read_config(source)
    mixer = isinstance(target.backbone, SwinMLP)  # it has the published names everywhere
    with naming(label):
        official, notes = (dict(state), []) if mixer else to_official(state, drop_k_bias=drop_k_bias)
        layout = "official" if mixer else detect_layout(state)
        kind = "a SwinMLP" if any(".spatial_mlp." in name for name in official) else "no SwinMLP"
        report = LoadReport(label, layout, kind if mixer else describe(official, layout), left_out=notes)
    if config is None and not mixer and not isinstance(source, dict):
        report.disagreements = name_disagreements(state, source)
    if config is not None:
        _check_record(label, config, official)
    rank = official["patch_embed.proj.weight"].ndim - 2 if "patch_embed.proj.weight" in official else ours.rank
    if (
        transfer in ("bicubic", "geometric")
        and ours.position_bias == "table"
        and any(".cpb_mlp." in n for n in official)
    ):
        if config is None:
            raise UsageError(
                f"{label} does not say its windows, which a table of its position bias needs: pass config."
            )
        official = tabulate_bias(official, config)
        report.left_out.append(
            f"the networks of the position bias ('{config.position_bias}'): tables were made of them"
        )
        config = dataclasses.replace(config, position_bias="table", pretrained_window_sizes=0)
    elif transfer and transfer != "stretch":
        _check_bias_scale(label, state, config, ours)
    table: BiasMethod = "geometric" if transfer == "geometric" else "bicubic"
    fitting = _Fitting(ours, config, rank, bool(transfer), table, in_chans_init, inflate)
    own = target.backbone.state_dict()
    fitted: State = {}
    for name, tensor in own.items():
        if name.startswith("head."):
            continue
        report.elements += tensor.numel()
        if name not in official:
            report.missing.append(name)
            continue
        value = official.pop(name)
        if name == "patch_embed.proj.weight" and in_chans_init == "random" and value.shape[1] != tensor.shape[1]:
            report.fresh[name] = f"{value.shape[1]} channels in the file, {tensor.shape[1]} in the model"
            report.elements -= tensor.numel()
            continue
        value, how = _fit(name, value, tensor, fitting)
        if value.shape != tensor.shape:
            report.mismatched[name] = how
            continue
        if how:
            report.reshaped[name] = how
        fitted[name] = value
        report.elements_matched += tensor.numel()
    _leave_out_removed_stages(target.backbone, official, report)
    if classes is not None:
        _select_classes(label, official, classes, report)
    fitted.update(_fit_head(own, official, report, reset_head))
    around = _fit_around(target.masked, official, report)
    report.unexpected = list(official)
    report.matched = [*fitted, *around]
    if strict:
        _judge(report, min_match, ours)
    left = [name for name, tensor in own.items() if tensor.is_meta and name not in fitted and not keep_meta]
    if left:
        raise UsageError(
            f"The model is on the meta device, and {label} has no {some(left)}: call model.to_empty(device='cpu') and "
            f"init_weights() before loading."
        )
    with torch.no_grad():
        for module, tensors in ((target.backbone, fitted), (target.masked, around)):
            if module is not None:
                put(module, tensors)
    return report


def put(module: nn.Module, tensors: State) -> None:
    """Copies ``tensors`` into the parameters of ``module``; takes their place where those are on ``meta``."""
    own = module.state_dict()
    on_meta = [name for name in tensors if own[name].is_meta]
    module.load_state_dict({n: t for n, t in tensors.items() if n not in on_meta}, strict=False)
    module.load_state_dict({n: tensors[n].to(own[n].dtype) for n in on_meta}, strict=False, assign=True)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Begins the message of a ``UsageError`` with the file that it is about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def _find_target(model: nn.Module) -> _Target:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, SwinTransformer)]
    if len(found) != 1:
        raise UsageError(f"{type(model).__name__} holds {len(found)} SwinTransformers: pass the one to load into.")
    name, backbone = found[0]
    around = model.get_submodule(name.rpartition(".")[0]) if name else None
    return _Target(backbone, around if isinstance(getattr(around, "mask_token", None), Tensor) else None)


def _check_record(label: str, config: SwinConfig, official: State) -> None:
    """The recorded windows and maps must be those of the tensors: resizing relies on them."""
    for name, tensor in official.items():
        if name.endswith("relative_position_bias_table"):
            stage = int(name.split(".")[1])
            fits = stage < len(config.depths) and len(tensor) == math.prod(
                2 * w - 1 for w in config.stage_windows[stage]
            )
        else:
            fits = name != "absolute_pos_embed" or tensor.shape[1] == math.prod(config.stage_maps()[0])
        if not fits:
            raise UsageError(
                f"{label}: the shape {tuple(tensor.shape)} of {name} does not belong to the recorded configuration "
                f"(img_size {config.img_size}, window_size {config.window_size}). Correct config.json, or pass config."
            )


def _check_bias_scale(label: str, state: State, theirs: SwinConfig | None, ours: SwinConfig) -> None:
    """A continuous bias reads scaled coordinates: with another scale every offset would get another value."""
    kind = theirs.position_bias if theirs else "log"
    trained = theirs.trained_windows if theirs else stored_windows(state, len(ours.depths))
    if "table" in (kind, ours.position_bias) or trained is None or len(trained) != len(ours.depths):
        return
    if kind != ours.position_bias:
        raise UsageError(
            f"{label} has position_bias='{kind}', the model '{ours.position_bias}': build it with '{kind}'."
        )
    axes = len(trained[0])  # an image model knows no scale of time
    scale = tuple((0,) * (ours.rank - axes) + window for window in trained)
    if trained != tuple(window[-axes:] for window in ours.trained_windows):
        raise UsageError(
            f"{label} was trained with windows {trained}, but the model's position bias is scaled to "
            f"{ours.trained_windows}: build it with pretrained_window_sizes={scale}, or use transfer_config "
            f"(transfer='stretch' stretches the bias instead)."
        )


def _fit(name: str, value: Tensor, like: Tensor, fitting: _Fitting) -> tuple[Tensor, str]:
    """``value`` fitted to the shape of ``like`` if possible, and how, or both shapes if not."""
    shape, notes = value.shape, list[str]()
    if name == "patch_embed.proj.weight":
        value, notes = _fit_patches(value, like, fitting)
    elif fitting.transfer and name.endswith("relative_position_bias_table") and value.shape[1] == like.shape[1]:
        value, notes = _fit_table(name, value, like, fitting)
    elif fitting.transfer and name == "absolute_pos_embed" and value.shape[2] == like.shape[2]:
        value, notes = _fit_position_embedding(value, like, fitting)
    elif fitting.inflates and name.endswith("cpb_mlp.0.weight"):
        if fitting.inflate != "repeat":
            raise UsageError(
                f"inflate='{fitting.inflate}' sets entries of a table, and a continuous position bias has none: choose "
                f"inflate='repeat', or cpb='bicubic', which makes a table of it."
            )
        value, notes = inflate_coordinates(value), ["position bias, a time coordinate without weight"]
    if value.shape != like.shape:
        return value, f"file {tuple(shape)}, model {tuple(like.shape)}"
    return value, "; ".join(notes)


def _fit_patches(weight: Tensor, like: Tensor, fitting: _Fitting) -> tuple[Tensor, list[str]]:
    if weight.shape[-2:] != like.shape[-2:] or weight.ndim + fitting.inflates != like.ndim:
        return weight, []
    notes: list[str] = []
    channels = like.shape[1]
    if weight.shape[1] != channels or not isinstance(fitting.in_chans_init, str):
        notes.append(f"input channels {weight.shape[1]} → {channels}, in_chans_init={fitting.in_chans_init!r}")
        weight = adapt_channels(weight, channels, fitting.in_chans_init)
    if fitting.inflates:
        notes.append(f"patches, frames 1 → {like.shape[2]}, inflate='{fitting.inflate}'")
        weight = inflate_patches(weight, like.shape[2], fitting.inflate)
    return weight, notes


def _fit_table(name: str, table: Tensor, like: Tensor, fitting: _Fitting) -> tuple[Tensor, list[str]]:
    stage, theirs = int(name.split(".")[1]), fitting.theirs
    window = fitting.ours.stage_windows[stage]
    new = window[-fitting.rank :]
    fits = table.shape == like.shape and not fitting.inflates
    same = new if fits else square_window(len(table), fitting.rank)
    old, notes = theirs.stage_windows[stage] if theirs else same, []
    if old is None or len(old) != len(new):
        return table, []
    if old != new:
        table = resize_bias_table(table, old, new, fitting.table)
        how = "trilinear" if fitting.table == "bicubic" and fitting.rank == 3 else fitting.table
        notes.append(f"bias table, window {format_size(old)} → {format_size(new)}, {how}")
    if fitting.inflates:
        table = inflate_bias_table(table, window[0], fitting.inflate)
        notes.append(f"bias table, window {format_size(window)} in time, inflate='{fitting.inflate}'")
    return table, notes


def _fit_position_embedding(embedding: Tensor, like: Tensor, fitting: _Fitting) -> tuple[Tensor, list[str]]:
    size, theirs = fitting.ours.stage_maps()[0], fitting.theirs
    new = size[-fitting.rank :]
    fits = embedding.shape == like.shape and not fitting.inflates
    same = new if fits else square_map(embedding.shape[1], fitting.rank)
    old, notes = theirs.stage_maps()[0] if theirs else same, []
    if old is None or len(old) != len(new):
        return embedding, []
    if old != new:
        embedding = resize_position_embedding(embedding, old, new)
        notes.append(f"position embedding, map {format_size(old)} → {format_size(new)}, bicubic")
    if fitting.inflates:
        embedding = embedding.repeat(1, size[0], 1)
        notes.append(f"position embedding, the same at {size[0]} times")
    return embedding, notes


def _leave_out_removed_stages(backbone: SwinTransformer, official: State, report: LoadReport) -> None:
    """Of a backbone that lost its last stages (``swinscale.adapters``), what belonged to them."""
    left = len(backbone.layers)
    if left == len(backbone.config.depths):
        return
    gone = [f"layers.{stage}." for stage in range(left, len(backbone.config.depths))]
    gone += [f"layers.{left - 1}.downsample.", "norm."]
    names = [name for name in official if name.startswith(tuple(gone))]
    for name in names:
        del official[name]
    if names:
        report.left_out.append(f"stages after the {left} that this backbone keeps ({len(names)} tensors)")


def _select_classes(label: str, official: State, classes: Sequence[int], report: LoadReport) -> None:
    """Keeps these rows of the file's classifier, in this order."""
    head = [name for name in ("head.weight", "head.bias") if name in official]
    if not head:
        raise UsageError(f"{label} has no classifier to take classes from: leave classes out.")
    count = len(official[head[0]])
    for row in classes:
        if not 0 <= row < count:
            raise UsageError(f"{label} has {count} classes, 0 to {count - 1}: there is no class {row}.")
    for name in head:
        official[name] = official[name][torch.tensor(list(classes), dtype=torch.long)]
        report.reshaped[name] = f"{len(classes)} of {count} classes"


def _fit_head(own: State, official: State, report: LoadReport, reset_head: str) -> State:
    """The classifier of the file, if the model has the same number of classes; takes it out of ``official``."""
    theirs = {name: official.pop(name) for name in list(official) if name in ("head.weight", "head.bias")}
    ours = {name: tensor for name, tensor in own.items() if name.startswith("head.")}
    counts = [len(head["head.weight"]) if "head.weight" in head else 0 for head in (theirs, ours)]
    if not ours:
        report.left_out += [f"the classifier ({counts[0]} classes): the model has none"] if theirs else []
        return {}
    if reset_head == "always" and theirs:
        report.left_out.append(f"the classifier ({counts[0]} classes): reset_head='always'")
    if not theirs or reset_head == "always":
        report.fresh.update(dict.fromkeys(ours, "new classifier" + ("" if theirs else ": the file has none")))
        return {}
    if {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}:
        return theirs
    if counts[0] != counts[1] and reset_head == "auto":
        report.fresh.update(
            dict.fromkeys(ours, f"new classifier: {counts[0]} classes in the file, {counts[1]} in the model")
        )
    else:
        shapes = {name: f"file {tuple(theirs[name].shape) if name in theirs else None}" for name in ours}
        report.mismatched.update({name: f"{shapes[name]}, model {tuple(ours[name].shape)}" for name in ours})
    return {}


def _fit_around(masked: nn.Module | None, official: State, report: LoadReport) -> State:
    """Mask token and decoder, which masked image modelling has around the backbone; takes them out of ``official``."""
    theirs = {name: official.pop(name) for name in list(official) if name.startswith(("mask_token", "decoder."))}
    if masked is None:
        if theirs:
            report.left_out.append(f"mask token and decoder of masked image modelling ({len(theirs)} tensors)")
        return {}
    ours = {name: t for name, t in masked.state_dict().items() if name.startswith(("mask_token", "decoder."))}
    fitted = {}
    for name, tensor in ours.items():
        value = theirs.pop(name, None)
        if value is None:
            report.fresh[name] = "the file has none"
        elif value.shape != tensor.shape:
            report.fresh[name] = f"file {tuple(value.shape)}, model {tuple(tensor.shape)}"
        else:
            fitted[name] = value
    official.update(theirs)
    return fitted


def _judge(report: LoadReport, min_match: float, config: SwinConfig) -> None:
    surplus = [name for name in report.unexpected if name.startswith(BACKBONE)]
    head = [name for name in report.mismatched if name.startswith("head.")]
    if report.share >= min_match and not surplus and not head:
        return
    parts = [
        f"the weights look like {report.looks_like}, the model is a Swin V{config.version} with embed_dim "
        f"{config.embed_dim}, depths {config.depths}, in_chans {config.in_chans}, patch_size {config.patch_size}",
    ]
    if report.share < min_match:
        parts.append(f"{100 * report.share:.1f} % of the model's backbone was found ({100 * min_match:g} % needed)")
    if report.missing:
        parts.append(f"missing: {some(report.missing)}")
    if report.mismatched:
        parts.append(f"other shape: {some([f'{name} ({shapes})' for name, shapes in report.mismatched.items()])}")
    if surplus:
        parts.append(f"the model has no place for {some(surplus)}")
    raise UsageError(
        f"{report.source} does not fit: {'; '.join(parts)}. Build the model that infer_config describes, or pass "
        f"strict=False to load what fits."
    )
