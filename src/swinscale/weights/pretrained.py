"""Directories of ``config.json`` and ``model.safetensors``: saving a model with what it takes to use it, and back."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.swin import SwinTransformer
from swinscale.weights.files import atomic, read_state_dict, write_safetensors
from swinscale.weights.infer import infer_config
from swinscale.weights.load import load_weights, naming
from swinscale.weights.records import MODEL_TYPE, make_record, read_config
from swinscale.weights.resize import ChannelInit
from swinscale.weights.transfer import transfer_config

log = logging.getLogger(__name__)


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    metadata: dict[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes ``config.json`` and ``model.safetensors``, each in one step.

    The weight file also carries the record in its header, so that it can be used alone.

    Args:
        model: a ``SwinTransformer``, or a module with one in ``encoder`` (SimMIM), which is saved whole.
        metadata: JSON-ready entries for ``config.json``, such as "preprocessing" and "task".
        state: the state dict of ``model``, where its own tensors are spread over processes; None: its own.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    backbone = model if isinstance(model, SwinTransformer) else getattr(model, "encoder", None)
    if not isinstance(backbone, SwinTransformer):
        raise UsageError(f"{type(model).__name__} is not a SwinTransformer and has none in its attribute 'encoder'.")
    record = json.dumps(make_record(backbone.config, type(model).__name__, metadata), indent=2)
    directory = Path(directory)
    write_safetensors(
        directory / "model.safetensors", dict(model.state_dict() if state is None else state), {MODEL_TYPE: record}
    )
    with atomic(directory / "config.json") as temporary:
        temporary.write_text(record + "\n")


def from_pretrained(
    path: str | os.PathLike[str], *, in_chans_init: ChannelInit = "repeat", **overrides: Any
) -> SwinTransformer:
    """A model from a directory of this library, transformers or timm, or from a single weight file of any layout.

    The ``LoadReport`` is logged, as a warning when something was not loaded as it is (a new classifier, a resized table).

    Args:
        path: a directory or file on this machine.
        overrides: fields of ``SwinConfig``. Another ``img_size``, ``window_size``, ``in_chans`` or ``num_classes`` is a
            transfer, see ``transfer_config``. For a file that does not record its configuration they complete it.

    Raises:
        UsageError: for a path or field that does not exist, or weights that cannot be read or do not fit.
    """
    if not Path(path).exists():
        raise UsageError(
            f"There is no file or directory '{path}'. Weights are not downloaded: fetch them first and give their path."
        )
    fields = [f.name for f in dataclasses.fields(SwinConfig)]
    for field in overrides:
        if field not in fields:
            raise UsageError(f"Unknown model setting '{field}'.{suggest(field, fields)} Allowed: {', '.join(fields)}.")
    trained = read_config(path)
    moved = {n: overrides.pop(n) for n in ("img_size", "window_size", "in_chans", "num_classes") if n in overrides}
    if trained is None:
        known = {n: moved.pop(n) for n in ("img_size", "window_size") if n in moved}
        state = read_state_dict(path)[0]
        with naming(str(path)):
            trained = infer_config(state, **known, **overrides)
    model = SwinTransformer(dataclasses.replace(transfer_config(trained, **moved), **overrides))
    report = load_weights(model, path, config=trained, in_chans_init=in_chans_init)
    log.log(logging.INFO if report.plain else logging.WARNING, "%s", report)
    return model
