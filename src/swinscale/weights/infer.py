"""What a model is, read off its tensors."""

from __future__ import annotations

import re
import warnings
from typing import Any

from swinscale.errors import UsageError
from swinscale.models.config import Size, SwinConfig
from swinscale.weights.files import State
from swinscale.weights.layouts import LAYOUTS, detect_layout, to_official
from swinscale.weights.resize import square_map, square_window


def infer_config(state: State, **known: Any) -> SwinConfig:
    """The configuration of a model, from its tensors in any layout.

    Windows are read from bias tables (V1) or from stored buffers (V2 files of the published code and of torchvision).
    Other V2 files do not hold them: then 8 is assumed, with a warning, unless ``known`` says them. The image size is
    the one whose last map is as large as the last window.

    Args:
        known: fields of ``SwinConfig`` that the caller knows; they win over what is inferred.

    Raises:
        UsageError: for tensors that are no Swin Transformer.
    """
    official, _ = to_official(state, drop_k_bias=True)
    found = _architecture(official)
    fields, rank, depths = {**found, **known}, len(found["patch_size"]), found["depths"]
    if "window_size" not in known:
        windows = _windows_of_tables(official, depths, rank) or _windows_of_buffers(state, depths)
        if windows is None:
            warnings.warn(
                f"The windows of this Swin V{fields['version']} are not stored in its tensors: assuming 8. "
                f"If it was trained with others, pass window_size (and pretrained_window_sizes).",
                stacklevel=2,
            )
            windows = [(8,) * rank] * len(depths)
        fields["window_size"] = tuple(windows)
        if "pretrained_window_sizes" not in known:
            trained = stored_windows(state, len(depths))
            fields["pretrained_window_sizes"] = trained if trained and trained != tuple(windows) else 0
    if "img_size" not in known:
        shape = SwinConfig(**fields)
        size = tuple(n * s for n, s in zip(shape.window_size[-1], shape.stage_strides()[-1], strict=True))
        if "absolute_pos_embed" in official:
            tokens = square_map(official["absolute_pos_embed"].shape[1], rank)
            size = tuple(n * p for n, p in zip(tokens, shape.patch_size, strict=True)) if tokens else size
        fields["img_size"] = size
    return SwinConfig(**fields)


def _architecture(official: State) -> dict[str, Any]:
    """Fields of ``SwinConfig`` that tensors under published names determine."""
    blocks = [m.groups() for m in (re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in official) if m]
    stages = 1 + max(int(stage) for stage, _ in blocks)
    depths = tuple(1 + max((int(b) for s, b in blocks if int(s) == stage), default=0) for stage in range(stages))
    first, embed = "layers.0.blocks.0", official.get("patch_embed.proj.weight")
    if embed is None or f"{first}.mlp.fc1.weight" not in official:
        raise UsageError("These weights have Swin blocks, but no patch embedding or MLP that belongs to them.")
    version = 2 if f"{first}.attn.logit_scale" in official else 1
    table = f"{first}.attn.relative_position_bias_table" in official
    norms = [int(m[1]) + 1 for m in (re.search(r"blocks\.(\d+)\.enorm\.", name) for name in official) if m]
    fc1 = official[f"{first}.mlp.fc1.weight"]
    return {
        "version": version,
        "patch_size": tuple(embed.shape[2:]),
        "in_chans": embed.shape[1],
        "num_classes": official["head.weight"].shape[0] if "head.weight" in official else 0,
        "embed_dim": embed.shape[0],
        "depths": depths,
        "num_heads": tuple(_heads(official, f"layers.{stage}.blocks.0.attn.") for stage in range(stages)),
        "mlp_ratio": fc1.shape[0] / fc1.shape[1],
        "qkv_bias": f"{first}.attn.q_bias" in official or f"{first}.attn.qkv.bias" in official,
        "position_bias": "table" if table else "log",
        "main_norm_interval": min(norms, default=0),
        "patch_norm": "patch_embed.norm.weight" in official,
        "ape": "absolute_pos_embed" in official,
    }


def _heads(official: State, attn: str) -> int:
    for name, axis in (("logit_scale", 0), ("relative_position_bias_table", 1), ("cpb_mlp.2.weight", 0)):
        if attn + name in official:
            return official[attn + name].shape[axis]
    raise UsageError(f"The weights lack {attn}relative_position_bias_table (V1) or {attn}logit_scale (V2): not a Swin.")


def _windows_of_tables(official: State, depths: tuple[int, ...], rank: int) -> list[Size] | None:
    """The window of each stage from the lengths of its bias table; None without tables."""
    windows = []
    for stage in range(len(depths)):
        table = official.get(f"layers.{stage}.blocks.0.attn.relative_position_bias_table")
        if table is None:
            return None
        window = square_window(table.shape[0], rank)
        if window is None:
            raise UsageError(
                f"Stage {stage} has a bias table of {table.shape[0]} offsets, so its window is not square: pass window_size."
            )
        windows.append(window)
    return windows


def _buffers(state: State, name: str, stages: int) -> list[Any]:
    """The first buffer of that name in each stage, in the order of the stages; empty if a stage has none."""
    found: dict[str, Any] = {}
    for key in sorted(state, key=lambda k: [int(n) for n in re.findall(r"\d+", k)]):
        if key.endswith(f".attn.{name}"):
            found.setdefault(key.removesuffix(f".attn.{name}").rpartition(".")[0], state[key])
    return list(found.values()) if len(found) == stages else []


def _windows_of_buffers(state: State, depths: tuple[int, ...]) -> list[Size] | None:
    """Windows from stored coordinate tables (1, 2h-1, 2w-1, 2)."""
    tables = _buffers(state, "relative_coords_table", len(depths))
    return [tuple((n + 1) // 2 for n in table.shape[1:-1]) for table in tables] or None


def stored_windows(state: State, stages: int) -> tuple[Size, ...] | None:
    """The window of each stage that scales the coordinates stored in a V2 file; None where none are stored.

    The largest coordinate is log8(1 + 8 (window - 1) / (trained window - 1)).
    """
    trained = []
    for table in _buffers(state, "relative_coords_table", stages):
        window = [(n + 1) // 2 for n in table.shape[1:-1]]
        ratios = [(8 ** table[..., axis].max().item() - 1) / 8 for axis in range(len(window))]
        trained.append(tuple(round((w - 1) / r) + 1 if w > 1 else 1 for w, r in zip(window, ratios, strict=True)))
    return tuple(trained) or None


def describe(state: State) -> str:
    """What tensors look like, for a message: "a timm Swin V1 with embed_dim 96, depths (2, 2, 6, 2), 3 channels"."""
    layout = detect_layout(state)
    a = _architecture(to_official(state, drop_k_bias=True)[0])
    text = (
        f"a {LAYOUTS[layout].title} Swin V{a['version']} with embed_dim {a['embed_dim']}, depths {a['depths']}, "
        f"in_chans {a['in_chans']}, patch_size {a['patch_size']}"
    )
    return text + (f", {a['num_classes']} classes" if a["num_classes"] else "")
