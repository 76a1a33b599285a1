"""Directories of ``config.json`` and ``model.safetensors``: saving a model with what it takes to use it, and back."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.lrnet import LRNet
from swinscale.models.lrnet_config import LRNetConfig
from swinscale.models.variants import build_model, check_fields, is_network
from swinscale.models.vit_config import ViTConfig
from swinscale.weights.files import atomic, read_state_dict, write_safetensors
from swinscale.weights.hashes import ENTRY, read_record, recorded_hashes, sha256
from swinscale.weights.hub import resolve
from swinscale.weights.infer import infer_config
from swinscale.weights.load import load_weights, naming
from swinscale.weights.lrnet import load_lrnet
from swinscale.weights.records import MODEL_TYPE, make_record, read_model_config
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
    """Writes ``config.json`` and ``model.safetensors``, each in one step; a kill at any moment leaves a directory that loads.

    The weight file also carries the record in its header, so that it can be used alone. ``config.json`` records the
    SHA-256 of the weight file besides (``weights.hashes`` says in which order things are written, and why).

    Args:
        model: a ``SwinTransformer``, an ``LRNet`` or the ViT of ``adapters``, or a module that holds exactly one (SimMIM, a
            detector), which is saved whole.
        metadata: JSON-ready entries for ``config.json``, such as "preprocessing" and "task".
        state: the state dict of ``model``, where its own tensors are spread over processes; None: its own.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    inside = [module for module in model.modules() if is_network(module)]
    if len(inside) != 1:
        raise UsageError(
            f"{type(model).__name__} holds {len(inside)} networks of this library: exactly one can be saved."
        )
    record = make_record(cast(Any, inside[0]).config, type(model).__name__, metadata)
    header = {MODEL_TYPE: json.dumps(record, indent=2)}
    weights = Path(directory) / "model.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    with atomic(weights) as temporary:
        write_safetensors(temporary, dict(model.state_dict() if state is None else state), header)
        digest = sha256(temporary)
        _write_record(weights, record, " ".join([digest, *_replaced(weights, record)]))
    _write_record(weights, record, digest)


def _write_record(weights: Path, record: dict[str, Any], digests: str) -> None:
    with atomic(weights.with_name("config.json")) as temporary:
        temporary.write_text(json.dumps({**record, ENTRY: {weights.name: digests}}, indent=2) + "\n")


def _replaced(weights: Path, record: dict[str, Any]) -> list[str]:
    """Digests of the weights that are about to be replaced, if ``record`` describes them too."""
    before = read_record(weights.parent)
    before.pop(ENTRY, None)
    if not weights.is_file() or before != json.loads(json.dumps(record)):
        return []
    recorded = recorded_hashes(weights.parent).get(weights.name)
    return recorded.split() if recorded else [sha256(weights)]


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    verify: bool = True,
    in_chans_init: ChannelInit = "repeat",
    **overrides: Any,
) -> Any:
    """A model from a directory of this library, transformers or timm, from a single weight file of any layout, or from a
    repository of the Hugging Face Hub that holds one of these directories.

    The ``LoadReport`` is logged, as a warning when something was not loaded as it is (a new classifier, a resized table).

    Args:
        path: a directory or file on this machine, or "owner/name", "owner/name@revision", "hf-hub:owner/name"; see
            ``weights.hub.resolve``, which also explains ``revision``, ``cache_dir`` and ``token``.
        verify: compare the files with the hashes that the Hub states and that were recorded when they were saved.
        overrides: fields of ``SwinConfig`` (of an LR-Net, ``LRNetConfig``). Another ``img_size``, ``window_size``, ``in_chans``
            or ``num_classes`` is a transfer, see ``transfer_config``; for clips of an image model, too. For a file of an image model that does not
            record its configuration the sizes of images complete it.

    Returns: a ``SwinTransformer``, or an ``LRNet`` from a directory of one.

    Raises:
        UsageError: for a path, repository or field that does not exist, or weights that cannot be read, are damaged or
            do not fit.
    """
    place = resolve(path, revision=revision, cache_dir=cache_dir, token=token, verify=verify)
    here = place == Path(path)  # what comes from the Hub has been verified
    trained = read_model_config(place)
    check_fields(trained or SwinConfig, overrides)
    if isinstance(trained, ViTConfig):
        raise UsageError(f"{path} holds a ViT that timm makes: open it with swinscale.adapters.vit.from_pretrained.")
    if isinstance(trained, LRNetConfig):
        net = LRNet(dataclasses.replace(trained, **overrides))
        report = load_lrnet(net, place, in_chans_init=in_chans_init, verify=verify and here)
        log.log(logging.INFO if report.plain else logging.WARNING, "%s", report)
        return net
    moved = {n: overrides.pop(n) for n in ("img_size", "window_size", "in_chans", "num_classes") if n in overrides}
    if trained is None:
        state = read_state_dict(place)[0]
        size = moved.get("img_size")
        clips = any(tensor.ndim == 5 for tensor in state.values()) or (isinstance(size, Sequence) and len(size) == 3)
        # The tables of a video model say its windows, and an image model has none of clips: sizes are where it shall go.
        known = {} if clips else {n: moved.pop(n) for n in ("img_size", "window_size") if n in moved}
        with naming(str(place)):
            trained = infer_config(state, name=path, **known, **overrides)
    model = build_model(dataclasses.replace(transfer_config(trained, **moved), **overrides))
    report = load_weights(model, place, config=trained, in_chans_init=in_chans_init, verify=verify and here)
    log.log(logging.INFO if report.plain else logging.WARNING, "%s", report)
    return model
