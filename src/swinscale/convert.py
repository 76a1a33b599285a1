"""Weights of any project written as another project reads them, and read back to see that nothing changed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.config import format_size
from swinscale.weights import (
    from_official,
    load_weights,
    read_metadata,
    read_state_dict,
    save_pretrained,
    to_official,
    transfer_config,
    write_safetensors,
)
from swinscale.weights.arrange import coordinate_buffers, index_buffers
from swinscale.weights.detectors import is_detector
from swinscale.weights.files import State, atomic
from swinscale.weights.hashes import check_hashes
from swinscale.weights.hub import resolve
from swinscale.weights.infer import infer
from swinscale.weights.layouts import LAYOUTS, detect_layout
from swinscale.weights.load import naming
from swinscale.weights.peer_records import (
    check_peer,
    padding_note,
    timm_record,
    transformers_preprocessor,
    transformers_record,
)
from swinscale.weights.records import MODEL_TYPE, make_record, read_config
from swinscale.weights.segmenters import is_segmenter

PEERS = {
    "timm": "timm",
    "hf": "transformers",
    "torchvision": "torchvision",
    "official": "published",
    "mm": "OpenMMLab",
    "swinscale": "swinscale",
}
"""What ``--to`` takes → the project."""

DIRECTORIES = ("timm", "hf", "swinscale")
WRAPPERS = {"official": "model", "mm": "state_dict", "torchvision": None}
"""The entry of a .pth file in which a project expects the tensors; None: the file is the tensors."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights under published names, with what is known of them.

    Args:
        windows_from: "record", "tensors", "name", "caller" or "assumed".
        notes: what was left out, and what the name denies.
    """

    state: State
    config: SwinConfig
    layout: str
    windows_from: str
    preprocessing: dict[str, Any]
    notes: list[str]
    metadata: dict[str, Any]


def convert(
    source: Path,
    out: Path,
    to: str,
    *,
    img_size: int | None = None,
    window_size: int | None = None,
    encoder: bool = False,
) -> list[str]:
    """Writes the weights in ``source`` as ``out``, and checks what was written.

    Args:
        source: a file or directory in any layout, or a repository of the Hub.
        out: a directory for "hf", "timm" and "swinscale"; otherwise a file that ends in .pth, .pt or .safetensors.
        to: a key of ``PEERS``.
        img_size, window_size: transfer the weights to these first; where ``source`` does not say its windows, they are
            what it was trained with.
        encoder: of masked image modelling, a detector or a segmenter, write the encoder or backbone alone.

    Returns: lines that say what was read, written and checked.

    Raises:
        UsageError: for a source that cannot be read, a model that the other project cannot hold, or an output that is
            the input or has another form.
    """
    source = resolve(source)
    _check_out(source, out, to)
    names = [] if encoder else list(read_state_dict(source)[0])
    if is_detector(names):
        from swinscale.convert_detector import convert_detector

        return convert_detector(source, out, to, img_size=img_size, window_size=window_size)
    if is_segmenter(names):
        from swinscale.convert_segmenter import convert_segmenter

        return convert_segmenter(source, out, to, img_size=img_size, window_size=window_size)
    model = read_source(source, img_size=img_size, window_size=window_size)
    if encoder:
        model = dataclasses.replace(model, state=_without_mask_modelling(model.state))
    lines = [f"{source}: {LAYOUTS[model.layout].title}, {sum(t.numel() for t in model.state.values()):,} numbers"]
    lines += [f"  {note}" for note in model.notes]
    wanted = {"img_size": img_size, "window_size": window_size}
    wanted = {n: v for n, v in wanted.items() if v is not None and model.windows_from != "caller"}
    if model.windows_from == "assumed" and (to != "official" or wanted):
        raise UsageError(
            f"{source} does not say its windows, which {PEERS[to]} must know: pass --window (and --img-size) with those "
            f"it was trained with."
        )
    if model.windows_from == "name":
        windows = " ".join(map(format_size, model.config.stage_windows))
        lines.append(f"  windows {windows}, as the name says; the tensors do not store them")
    _check_whole(source, model)
    if wanted:
        model, report = _transferred(model, wanted)
        lines.append(report)
    layout = _layout(model, to)
    with naming(str(source)):
        if to != "swinscale" and not model.config.published_block:
            c = model.config
            raise UsageError(
                f"{PEERS[to]} models of Swin V{c.version} have no blocks with norm_placement={c.norm_placement!r} and "
                f"similarity={c.similarity!r}: only --to swinscale holds this model."
            )
        if to not in ("official", "swinscale"):
            check_peer(PEERS[to], model.config)
            note = padding_note(PEERS[to], model.config)
            lines += [f"  note: {note}"] if note else []
        state = dict(model.state) if to == "swinscale" else from_official(model.state, layout, model.config)
        if to in ("official", "mm") and model.windows_from != "assumed":
            # Their own files store them, their loaders compute them anew, and a reader learns the windows from them.
            indices = index_buffers(model.config) if model.config.rank == 3 else {}
            state |= from_official({**model.state, **coordinate_buffers(model.config), **indices}, layout, model.config)
    if to == "swinscale":
        written = _write_ours(model, out)
    elif to in DIRECTORIES:
        written = _write_directory(model, state, out, to)
    else:
        written = _write_file(model, state, out, to)
    lines.append(f"{out}: {PEERS[to]}, {', '.join(written)}")
    lines.append(_check_written(model, None if to == "swinscale" else state, out))
    return lines


def read_source(path: Path, *, img_size: int | None = None, window_size: int | None = None) -> Source:
    """Reads weights of any layout with their configuration: recorded, or from tensors and the file's name.

    Args:
        img_size, window_size: where nothing records the configuration and no tensor stores the windows, what is known.

    Raises:
        UsageError: for weights that cannot be read, or are none of a Swin Transformer.
    """
    check_hashes(path)
    state, _ = read_state_dict(path)
    with naming(str(path)):
        official, left_out = to_official(state)
        notes = [f"left out: {line}" for line in left_out]
        layout = detect_layout(state)
        recorded = read_config(path)
        if recorded is not None:
            config, windows_from = recorded, "record"
        else:
            found = infer(state, path)
            if found.windows_from == "assumed" and window_size is not None:
                known: dict[str, Any] = {"window_size": window_size, **({"img_size": img_size} if img_size else {})}
                found = infer(state, path, **known)
            config, windows_from = found.config, found.windows_from
            notes += found.disagreements
    metadata = read_metadata(path)
    preprocessing = dict(metadata.get("preprocessing") or {})
    if len(preprocessing.get("classes") or ()) != config.num_classes:
        preprocessing.pop("classes", None)
    return Source(official, config, layout, windows_from, preprocessing, notes, metadata)


def _check_whole(path: Path, model: Source) -> None:
    """Every tensor of the model must be there, in the shape that its configuration says: others would fill gaps anew."""
    with torch.device("meta"):
        own = SwinTransformer(model.config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in _without_mask_modelling(model.state).items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        where = "recorded beside it" if model.windows_from == "record" else "of its other tensors"
        raise UsageError(
            f"{path} does not hold the whole model of the configuration {where}: {len(wrong)} tensors differ, the first is "
            f"{name} (file {found.get(name, 'none')}, configuration {expected.get(name, 'none')})."
        )


def _check_out(source: Path, out: Path, to: str) -> None:
    if to not in PEERS:
        raise UsageError(f"--to {to} is not allowed: choose one of {', '.join(PEERS)}.")
    if out.exists() and source.exists() and out.resolve() in (source.resolve(), source.resolve().parent):
        raise UsageError(f"{out} is where the weights are read from: give another output.")
    if to in DIRECTORIES:
        if out.is_file() or out.suffix in (".pth", ".pt", ".safetensors"):
            raise UsageError(f"{out}: {PEERS[to]} reads a directory: give the name of one.")
        if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
            raise UsageError(f"{out} is a directory with other files in it: give an empty or a new one.")
    elif out.suffix not in (".pth", ".pt", ".safetensors") or out.is_dir():
        raise UsageError(f"{out}: {PEERS[to]} reads one file: give a name that ends in .pth, .pt or .safetensors.")


def _without_mask_modelling(state: State) -> State:
    return {n: t for n, t in state.items() if n != "mask_token" and not n.startswith("decoder.")}


def _layout(model: Source, to: str) -> str:
    """The key of ``LAYOUTS`` that ``to`` means for this model."""
    masked = "mask_token" in model.state
    if masked and to in ("timm", "torchvision", "mm"):
        raise UsageError(
            f"{PEERS[to]} has no masked image modelling for Swin: pass --encoder to write the encoder alone, or choose "
            f"--to official or --to hf."
        )
    if to == "official" and not masked and (model.config.rank, model.config.version) == (3, 1):
        return "official-video"
    if to == "official":
        return "official-simmim" if masked else "official"
    return {"hf": "transformers"}.get(to, to)


def _transferred(model: Source, wanted: dict[str, Any]) -> tuple[Source, str]:
    config = transfer_config(model.config, **wanted)
    new = SwinTransformer(config).to(model.state["norm.weight"].dtype)
    backbone = _without_mask_modelling(model.state)
    report = load_weights(new, backbone, config=model.config)
    state = {**model.state, **new.state_dict()}
    sizes = ", ".join(f"{name} {value}" for name, value in wanted.items())
    line = f"  transferred to {sizes}: {len(report.reshaped)} tensors reshaped"
    preprocessing = {**model.preprocessing, **({"img_size": list(config.img_size)} if model.preprocessing else {})}
    return dataclasses.replace(model, state=state, config=config, preprocessing=preprocessing), line


def _write_directory(model: Source, state: State, out: Path, to: str) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    if to == "timm":
        records = {"config.json": timm_record(model.config, model.preprocessing)}
    else:
        decoder = model.state.get("decoder.0.weight")
        stride = math.isqrt(decoder.shape[0] // model.config.in_chans) if decoder is not None else 0
        records = {"config.json": transformers_record(model.config, model.preprocessing, stride)}
        records["config.json"]["torch_dtype"] = str(model.state["norm.weight"].dtype).removeprefix("torch.")
        preprocessor = transformers_preprocessor(model.config, model.preprocessing)
        if preprocessor is not None:
            records["preprocessor_config.json"] = preprocessor
    write_safetensors(out / "model.safetensors", state)
    for name, record in records.items():
        with atomic(out / name) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    return ["model.safetensors", *records]


def _write_file(model: Source, state: State, out: Path, to: str) -> list[str]:
    if out.suffix == ".safetensors":
        # Our record in the header does not disturb other readers, and says what the tensors do not.
        metadata = {"preprocessing": model.preprocessing} if model.preprocessing else None
        record = make_record(model.config, "SwinTransformer", metadata)
        write_safetensors(out, state, {MODEL_TYPE: json.dumps(record)})
        return [f"{len(state)} tensors"]
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    wrapper = "state_dict" if _layout(model, to) == "official-video" else WRAPPERS[to]
    with atomic(out) as temporary:
        torch.save({wrapper: tensors} if wrapper else tensors, temporary)
    return [f"{len(state)} tensors" + (f" under '{wrapper}'" if wrapper else "")]


def _write_ours(model: Source, out: Path) -> list[str]:
    """As a run writes it: what is recorded beside the weights is kept."""
    metadata = dict(model.metadata)
    backbone = SwinTransformer(model.config)
    load_weights(backbone, _without_mask_modelling(model.state), config=model.config)
    if model.preprocessing:
        metadata["preprocessing"] = model.preprocessing
    if "mask_token" not in model.state:
        if metadata.get("task", {}).get("name") in ("simmim", "detect", "segment"):
            del metadata["task"]
        save_pretrained(backbone, out, metadata=metadata, state=model.state)
    else:
        from swinscale.tasks.simmim import SimMIM

        task, state = SimMIM(backbone), from_official(model.state, "swinscale-simmim")
        load_weights(task, state, config=model.config)
        metadata.setdefault("task", {"name": "simmim"})
        save_pretrained(task, out, metadata=metadata, state=state)
    return ["model.safetensors", "config.json"]


def _check_written(model: Source, state: State | None, out: Path) -> str:
    """Reads ``out`` and compares every tensor with what it shall be, and in published form with what was read.

    Raises:
        UsageError: names the first tensor that differs.
    """
    found, _ = read_state_dict(out)
    expected = {"what was written": state, "what was read": model.state}
    for what, tensors in expected.items():
        if tensors is None:
            continue
        there = found if tensors is state else to_official(found)[0]
        wrong = sorted(set(tensors) ^ set(there)) or [n for n in tensors if not torch.equal(tensors[n], there[n])]
        if wrong:
            raise UsageError(
                f"{out} differs from {what} in {len(wrong)} tensors, the first is {wrong[0]}. Convert again."
            )
    count = sum(tensor.numel() for tensor in model.state.values())
    return f"read back: {len(found)} tensors bit-equal to what was written; all {count:,} numbers return unchanged"
