"""What a weight file is: layout, architecture, windows, training, origin, and whether it fits a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swinscale.convert import Source, read_source
from swinscale.errors import UsageError
from swinscale.models import LRNetConfig, SwinConfig, SwinTransformer, model_config
from swinscale.models.config import Size, format_size
from swinscale.models.variants import LRNETS, VARIANTS
from swinscale.models.vit_config import ViTConfig
from swinscale.weights import load_weights, read_metadata, read_state_dict
from swinscale.weights.detectors import describe_detector, is_detector
from swinscale.weights.filenames import SIZES
from swinscale.weights.files import find_weights
from swinscale.weights.hashes import check_hashes, sha256
from swinscale.weights.hub import resolve
from swinscale.weights.layouts import LAYOUTS
from swinscale.weights.published import Published, name_hash, published
from swinscale.weights.records import read_model_config
from swinscale.weights.report import LoadReport
from swinscale.weights.segmenters import describe_segmenter, is_segmenter

KNOWN_FROM = {
    "record": "recorded beside the weights",
    "tensors": "read off the tensors",
    "name": "said by the file's name; the tensors do not store them",
    "assumed": "assumed; neither tensors nor name say them: pass window_size when you load the file",
    "caller": "as given",
}


def info(path: Path, fits: str | None = None) -> str:
    """A description of the weights in ``path``, one fact a line.

    Args:
        path: a file or directory in any layout, or a repository of the Hub.
        fits: the name of a model; adds what would be loaded, reshaped and left out there.

    Raises:
        UsageError: for a file that cannot be read, or a relative of Swin that computes something else.
    """
    path = resolve(path)
    known, file = read_model_config(path), find_weights(path)
    if isinstance(known, (LRNetConfig, ViTConfig)):
        return _without_windows(path, file, known, fits)
    source = read_source(path)
    config, tensors = source.config, read_state_dict(path)[0]
    dense = f"object detection: {describe_detector(tensors)}" if is_detector(tensors) else ""
    dense = f"semantic segmentation: {describe_segmenter(tensors)}" if is_segmenter(tensors) else dense
    windows_say_size = source.windows_from == "tensors" and config.rank == 2  # clips are longer than windows
    lines = {
        "file": f"{file}, {_bytes(path, file)}",
        "sha256": _digest(file),
        "layout": f"{LAYOUTS[source.layout].title} ({source.layout})",
        "model": _model(config),
        "parameters": f"{sum(tensor.numel() for tensor in source.state.values()):,} ({_dtypes(source)})"
        + (" in the backbone" if dense else ""),
        "windows": f"{_windows(config.stage_windows)} ({KNOWN_FROM[source.windows_from]})",
        "trained": _trained_windows(source),
        "input": f"{format_size(config.img_size)} pixels, {config.in_chans} channels, patches of "
        f"{format_size(config.patch_size)}"
        + ("; the size is the one whose last map is the last window" if windows_say_size else ""),
        "task": dense or _task(source),
        "preprocessing": _preprocessing(source.preprocessing),
        "training": _training(path, source.metadata),
        "published": _published(published(path), file),
    }
    text = [f"{name:<14}{line}" for name, line in lines.items() if line]
    text += [f"{'note':<14}{note}" for note in source.notes]
    if fits is not None:
        text += ["", *_fits(source, fits)]
    return "\n".join(text)


def _without_windows(path: Path, file: Path, config: LRNetConfig | ViTConfig, fits: str | None) -> str:
    """``info`` of an LR-Net or a ViT, as this library writes them."""
    check_hashes(path)
    state, metadata = read_state_dict(path)[0], read_metadata(path)
    learned = [
        t for name, t in state.items() if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    kind, model = ("LR-Net", _lrnet(config)) if isinstance(config, LRNetConfig) else ("ViT", _vit(config))
    masked = metadata.get("task", {}).get("name") == "simmim"
    lines = {
        "file": f"{file}, {_bytes(path, file)}",
        "sha256": _digest(file),
        "layout": f"swinscale ({kind})",
        "model": model,
        "parameters": f"{sum(tensor.numel() for tensor in learned):,}",
        "input": f"{format_size(config.img_size)} pixels, {config.in_chans} channels",
        "task": f"classification, {config.num_classes} classes"
        if config.num_classes
        else "masked image modelling"
        if masked
        else "backbone without a classifier",
        "preprocessing": _preprocessing(metadata.get("preprocessing") or {}),
        "training": _training(path, metadata),
    }
    text = [f"{name:<14}{line}" for name, line in lines.items()]
    if fits is not None:
        same = replace(config, **_FREE) == replace(model_config(fits), **_FREE) if fits in LRNETS else False
        text += ["", f"for {fits}: {'fits' if same else 'does not fit'}"]
    return "\n".join(text)


def _lrnet(config: LRNetConfig) -> str:
    names = [name for name, variant in LRNETS.items() if replace(config, **_FREE) == replace(variant, **_FREE)]
    return (
        f"LR-Net (depths {_list(config.depths)}, widths {_list(config.widths)}, neighbourhoods of {config.kernel_size}×"
        f"{config.kernel_size}, {config.shared_channels} channels to a group, similarity {config.similarity}); "
        + (", ".join(names) or "none of 'swinscale list'")
    )


def _vit(config: ViTConfig) -> str:
    return (
        f"ViT of timm (embed_dim {config.embed_dim}, depth {config.depth}, heads {config.num_heads}, patches of "
        f"{format_size(config.patch_size)})"
    )


_FREE: dict[str, Any] = {"img_size": 1, "num_classes": 0, "in_chans": 1}
"""What may differ between an LR-Net and the named one that it is."""


def _bytes(path: Path, file: Path) -> str:
    files = sorted(path.glob(file.name.replace(".index.json", "*"))) if file.name.endswith(".index.json") else [file]
    return f"{sum(f.stat().st_size for f in files):,} bytes"


def _digest(file: Path) -> str:
    promised = name_hash(file)
    if file.name.endswith(".index.json"):
        return f"{sha256(file)} (of the index alone)"
    return sha256(file) + (f" (its name promises {promised}…: the same)" if promised else "")


def _dtypes(source: Source) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in source.state.values()}))


def _model(config: SwinConfig) -> str:
    """ "Swin V2 Tiny (embed_dim 96, …); swinv2_tiny_window8_256"."""
    names = [n for n, shape in SIZES.items() if all(_as(config, f) == _as(shape, f) for f in ("embed_dim", "depths"))]
    exact = [name for name, variant in VARIANTS.items() if _same_architecture(variant, config)]
    kind = "video " if config.rank == 3 else ""
    size = f" {names[0].capitalize()}" if names else ""
    text = f"{kind}Swin V{config.version}{size} (embed_dim {config.embed_dim}, depths {_list(config.depths)}, heads "
    text += f"{_list(config.num_heads)}, head dimension {config.embed_dim // config.num_heads[0]})"
    if config.main_norm_interval:
        text += f", a norm on the main branch every {config.main_norm_interval} blocks"
    if config.ape:
        text += ", absolute position embedding"
    return text + (f"; {', '.join(exact)}" if exact else "; none of 'swinscale list'")


def _as(thing: Any, field: str) -> Any:
    return thing[field] if isinstance(thing, dict) else getattr(thing, field)


def _same_architecture(variant: SwinConfig, config: SwinConfig) -> bool:
    fields = ["version", "embed_dim", "depths", "num_heads", "patch_size", "stage_windows", "trained_windows"]
    fields += ["main_norm_interval", "ape", "position_bias"]
    return all(getattr(variant, field) == getattr(config, field) for field in fields)


def _list(values: tuple[int, ...]) -> str:
    return "-".join(map(str, values))


def _windows(windows: tuple[Size, ...]) -> str:
    """ "8×8 8×8 8×8 8×8" as "8×8 in every stage"."""
    same = len(set(windows)) == 1
    return f"{format_size(windows[0])} in every stage" if same else " ".join(map(format_size, windows))


def _trained_windows(source: Source) -> str:
    """The scale of a continuous position bias, and the windows before these."""
    config = source.config
    parts = []
    if config.position_bias != "table" and source.windows_from != "assumed":
        same = config.trained_windows == config.stage_windows
        parts.append(
            "with these windows"
            if same
            else f"first with windows {_windows(config.trained_windows)}, which scale the bias"
        )
    past = getattr(config, "past_windows", ())
    parts += ["windows before these: " + ", then ".join(map(_windows, past))] if past else []
    return "; ".join(parts)


def _task(source: Source) -> str:
    recorded = (source.metadata.get("task") or {}).get("name")
    if "mask_token" in source.state:
        return "masked image modelling (SimMIM): mask token and decoder, no classifier"
    if source.config.num_classes:
        return f"classification, {source.config.num_classes} classes"
    return f"backbone without a classifier{f' (recorded task: {recorded})' if recorded else ''}"


def _preprocessing(preprocessing: dict[str, Any]) -> str:
    fields = ("img_size", "mean", "std", "crop_ratio")
    parts = [f"{name} {preprocessing[name]}" for name in fields if preprocessing.get(name) is not None]
    classes = preprocessing.get("classes") or []
    parts += [f"classes {', '.join(map(str, classes[:5]))}{', …' if len(classes) > 5 else ''}"] if classes else []
    return ", ".join(parts) or "not recorded"


def _training(path: Path, metadata: dict[str, Any]) -> str:
    """What the run that wrote this directory recorded around it."""
    if metadata.get("trained_with"):
        return str(metadata["trained_with"])
    folder = path if path.is_dir() else path.parent
    recipe = _json(folder.parent / "config.json") if folder.name in ("best", "last") else {}
    if not {"name", "train", "data"} <= recipe.keys():
        return "not recorded"
    train, data = recipe["train"], recipe["data"]
    parts = [f"recipe {recipe['name']}", f"{train['epochs']} epochs" if "epochs" in train else ""]
    parts += [f"batch {train['batch_size']}" if "batch_size" in train else "", f"data {data.get('train')}"]
    parts += [f"started from {recipe['init']}"] if recipe.get("init") else []
    result = _json(folder.parent / "result.json")
    metrics = {n: v for n, v in (result.get("metrics") or {}).items() if isinstance(v, (int, float))}
    parts += [f"{n} {v:.4g} at the end" for n, v in metrics.items() if math.isfinite(v)]
    return ", ".join(part for part in parts if part)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _published(entry: Published | None, file: Path) -> str:
    if entry is None:
        return ""
    text = f"by its name a file of {entry.source}: {entry.data}, {entry.img_size} pixels, window {entry.windows}"
    text += f", published top-1 {entry.top1} %" if entry.top1 is not None else ""
    text += f", weights under {entry.licence}"
    return text + ("" if name_hash(file) else "; no hash of it is published, so the name is all there is")


def _fits(source: Source, name: str) -> list[str]:
    """What loading into the model ``name`` would do."""
    config = model_config(name)
    if config.rank != source.config.rank:
        return [f"for {name}: does not fit, it has {config.rank} axes and the weights have {source.config.rank}"]
    try:
        report = _dry_run(source, config, strict=True)
    except UsageError as error:
        reason = str(error).removeprefix("state dict does not fit: ").removeprefix("state dict ")
        try:
            details = str(_dry_run(source, config, strict=False)).splitlines()[1:]
        except UsageError:  # a position bias of another scale fits no part
            details = []
        return [f"for {name}: does not fit{'' if details else ': ' + reason}", *details]
    return [f"for {name}: fits{' as it is' if report.plain else ''}", *str(report).splitlines()[1:]]


def _dry_run(source: Source, config: SwinConfig, strict: bool) -> LoadReport:
    """Loads into a model of this configuration that takes no memory of its own."""
    with torch.device("meta"):
        model = SwinTransformer(config)
    known = None if source.windows_from == "assumed" else source.config
    return load_weights(model, dict(source.state), config=known, strict=strict, keep_meta=True)
