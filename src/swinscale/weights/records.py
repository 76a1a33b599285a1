"""What is recorded beside weights: the configuration of the model, how images become inputs, the task."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from swinscale.config import from_dict, to_dict
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.variants import VARIANTS, ModelConfig, config_class, model_config
from swinscale.models.vit_config import TIMM_NAME, ViTConfig
from swinscale.weights.files import WEIGHT_FILES
from swinscale.weights.hashes import ENTRY
from swinscale.weights.upernet_records import UPERNET, upernet_metadata

MODEL_TYPE = "swinscale"
RESERVED = {"model_type", "architecture", "model", "timm", ENTRY}
"""Entries of ``config.json`` that describe the model and its file; everything else is metadata."""


def make_record(config: ModelConfig, architecture: str, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """What ``config.json`` holds: the kind of model, its configuration under "model", and ``metadata``.

    Of a ViT also, under "timm", with which name and arguments ``timm.create_model`` builds the same network.
    """
    if clash := RESERVED & set(metadata or {}):
        raise UsageError(f"metadata must not have the entries {sorted(clash)}: they describe the model.")
    record = {"model_type": MODEL_TYPE, "architecture": architecture, "model": to_dict(config), **(metadata or {})}
    if isinstance(config, ViTConfig):
        record["timm"] = {"architecture": TIMM_NAME, "model_args": config.timm_arguments()}
    return record


def read_config(path: str | os.PathLike[str]) -> SwinConfig | None:
    """``read_model_config``, for what works with Swin Transformers alone.

    Raises:
        UsageError: for a record of another model, or one that is damaged.
    """
    config = read_model_config(path)
    if config is not None and not isinstance(config, SwinConfig):
        kind = "a ViT" if isinstance(config, ViTConfig) else "an LR-Net"
        raise UsageError(f"{path} holds {kind}, and this works with Swin Transformers alone. Name the weights of one.")
    return config


def read_model_config(path: str | os.PathLike[str]) -> ModelConfig | None:
    """The configuration recorded with weights: by this library, transformers or timm. None where nothing is recorded.

    Args:
        path: a directory with a ``config.json``, or a weight file (one of ours, or one in such a directory).

    Raises:
        UsageError: for a record of another model, or one that is damaged.
    """
    record = _read_record(Path(path))
    kind = record.get("model_type")
    if kind == MODEL_TYPE:
        return from_dict(config_class(record["model"]), record["model"])
    if kind in ("swin", "swinv2"):
        return _transformers_config(record)
    if kind == UPERNET and (record.get("backbone_config") or {}).get("model_type") in ("swin", "swinv2"):
        # A backbone of transformers takes pictures of any size, and pads them as the published dense code does.
        backbone = replace(_transformers_config({**record["backbone_config"], "architectures": []}), small_map="pad")
        return replace(backbone, pad="legacy") if backbone.version == 1 else backbone
    if "architecture" in record and "pretrained_cfg" in record:
        return _timm_config(record)
    if kind is not None:
        raise UsageError(
            f"{path} holds a model of type '{kind}', not a Swin Transformer (swinscale, swin, swinv2, or "
            f"upernet around one of the last two)."
        )
    return None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What else is recorded with weights: "task", and "preprocessing" with img_size, mean, std, crop_ratio, classes."""
    record = _read_record(Path(path))
    if record.get("model_type") == MODEL_TYPE:
        return {name: value for name, value in record.items() if name not in RESERVED}
    if "pretrained_cfg" in record:
        cfg = record["pretrained_cfg"]
        names = {"mean": "mean", "std": "std", "crop_pct": "crop_ratio"}
        known = {ours: cfg[theirs] for theirs, ours in names.items() if theirs in cfg}
        return {"preprocessing": {**known, **({"classes": record["label_names"]} if "label_names" in record else {})}}
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if record.get("model_type") == UPERNET:
        return upernet_metadata(record, _read_json(folder / "preprocessor_config.json"))
    beside = _read_json(folder / "preprocessor_config.json") if "image_size" in record else {}
    found = {
        ours: beside[theirs] for theirs, ours in (("image_mean", "mean"), ("image_std", "std")) if theirs in beside
    }
    if "id2label" in record:
        found["classes"] = [record["id2label"][key] for key in sorted(record["id2label"], key=int)]
    return {"preprocessing": found} if found else {}


def _read_record(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _read_json(path / "config.json")
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
        except SafetensorError:
            header = {}  # reading the tensors says what is wrong
        if MODEL_TYPE in header:
            return dict(json.loads(header[MODEL_TYPE]))
    return _read_json(path.parent / "config.json") if path.name in WEIGHT_FILES else {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}). Copy the directory again.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a configuration: expected an object of settings.")
    return content


def _transformers_config(record: dict[str, Any]) -> SwinConfig:
    for name, only in (("layer_norm_eps", 1e-5), ("hidden_act", "gelu")):
        if record.get(name, only) != only:
            raise UsageError(f"This transformers model has {name}={record[name]!r}; only {only!r} is possible here.")
    defaults = {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 4.0,
        "qkv_bias": True,
    }
    same = {name: record.get(name, default) for name, default in defaults.items()}
    stages = len(same["depths"])
    classes = len(record.get("id2label") or (0, 1))  # transformers leaves out its default of two labels
    classifier = any("ForImageClassification" in name for name in record.get("architectures") or ())
    pretrained = record.get("pretrained_window_sizes") or [0] * stages
    return SwinConfig(
        version=2 if record["model_type"] == "swinv2" else 1,
        img_size=_size(record.get("image_size", 224)),
        patch_size=_size(record.get("patch_size", 4)),
        in_chans=record.get("num_channels", 3),
        num_classes=classes if classifier else 0,
        window_size=_size(record.get("window_size", 7)),
        pretrained_window_sizes=tuple(_size(size) for size in pretrained[:stages]),
        drop_rate=record.get("hidden_dropout_prob", 0.0),
        attn_drop_rate=record.get("attention_probs_dropout_prob", 0.0),
        drop_path_rate=record.get("drop_path_rate", 0.1),
        ape=record.get("use_absolute_embeddings", False),
        **same,
    )


def _size(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _timm_config(record: dict[str, Any]) -> SwinConfig | None:
    """timm records the name of the architecture; None for one that is not known here."""
    if record["architecture"] not in VARIANTS:
        return None
    same = ["img_size", "patch_size", "in_chans", "window_size", "embed_dim", "depths", "num_heads", "mlp_ratio"]
    same += ["qkv_bias", "attn_drop_rate", "drop_path_rate", "pretrained_window_sizes"]
    names = {**{name: name for name in same}, "proj_drop_rate": "drop_rate"}
    changed: dict[str, Any] = {"in_chans": (record["pretrained_cfg"].get("input_size") or (3,))[0]}
    changed |= {"pretrained_window_sizes": 0} if "depths" in (record.get("model_args") or {}) else {}
    changed |= {names[name]: value for name, value in (record.get("model_args") or {}).items() if name in names}
    return model_config(record["architecture"], num_classes=record.get("num_classes", 1000), **changed)
