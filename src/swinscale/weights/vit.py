"""Loading the weights of a plain Vision Transformer, ours or timm's: classification, or masked image modelling around it."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from swinscale.models.config import Size, format_size
from swinscale.models.vit_config import ViTConfig
from swinscale.weights.exact import fit_channels, leave_classifier, load_exactly
from swinscale.weights.files import State, read_state_dict
from swinscale.weights.hashes import check_hashes
from swinscale.weights.records import read_model_config
from swinscale.weights.report import LoadReport
from swinscale.weights.resize import ChannelInit, resize_position_embedding, square_map

FIRST, POSITIONS = "patch_embed.proj.weight", "pos_embed"


def load_vit(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    in_chans_init: ChannelInit = "repeat",
    keep_meta: bool = False,
    verify: bool = True,
) -> LoadReport:
    """Loads a directory or weight file of this library or of timm into ``model``, in place.

    A model of masked image modelling keeps its own mask token and decoder where the file has none that fit; a classifier takes the
    encoder of such a file. The position embedding is resized to the model's map (bicubic), a classifier of other classes stays
    the model's own.

    Args:
        model: an ``adapters.vit.ViT``, or SimMIM around one.
        in_chans_init, keep_meta, verify: as in ``load_lrnet``.

    Raises:
        UsageError: for weights that cannot be read, or do not fit; then nothing is changed.
    """
    if verify:
        check_hashes(source)
    masked = isinstance(getattr(model, "mask_token", None), Tensor)
    net = cast(Any, model).encoder if masked else model
    config = cast(ViTConfig, net.config)
    state: State = {name.removeprefix("encoder."): tensor for name, tensor in read_state_dict(source)[0].items()}
    report = LoadReport(str(source), "timm", "a ViT" if POSITIONS in state and FIRST in state else "no ViT")
    around = {name: state.pop(name) for name in list(state) if name.startswith(("mask_token", "decoder."))}
    if around and not masked:
        report.left_out.append(f"mask token and decoder of masked image modelling ({len(around)} tensors)")
    fit_channels(state, FIRST, config.in_chans, in_chans_init, report)
    leave_classifier(state, config.num_classes, report)
    _fit_positions(state, source, config, report)
    if masked:
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
        for place in (report.fresh, report.reshaped):
            changed = {f"encoder.{name}": why for name, why in place.items()}
            place.clear()
            place.update(changed)
        state |= _fit_around(model, around, report)
    what = f"a ViT of depth {config.depth}, width {config.embed_dim} and patches of {format_size(config.patch_size)}"
    return load_exactly(model, state, report, what, keep_meta)


def _fit_positions(state: State, source: str | os.PathLike[str], config: ViTConfig, report: LoadReport) -> None:
    table, new = state.get(POSITIONS), config.stage_maps()[0]
    if table is None or table.ndim != 3:
        return
    known = read_model_config(source)
    old: Size | None = known.stage_maps()[0] if isinstance(known, ViTConfig) else square_map(table.shape[1] - 1, 2)
    if old is None or old == new:
        return
    first, rest = table[:, :1], table[:, 1:]
    state[POSITIONS] = torch.cat([first, resize_position_embedding(rest, old, new)], 1)
    report.reshaped[POSITIONS] = f"position embedding, map {format_size(old)} → {format_size(new)}, bicubic"


def _fit_around(model: nn.Module, theirs: State, report: LoadReport) -> State:
    """Mask token and decoder of the file, as far as they are the model's; the others are fresh."""
    ours = {name: t for name, t in model.state_dict().items() if not name.startswith("encoder.")}
    for name, tensor in ours.items():
        if name not in theirs:
            report.fresh[name] = "the file has none"
        elif theirs[name].shape != tensor.shape:
            report.fresh[name] = f"file {tuple(theirs[name].shape)}, model {tuple(tensor.shape)}"
    return {name: tensor for name, tensor in theirs.items() if name not in report.fresh}
