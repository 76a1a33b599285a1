"""What a model is, read off its tensors, and what the name of its file says of the rest."""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from swinscale.errors import UsageError
from swinscale.models.config import Size, SwinConfig
from swinscale.models.variants import VARIANTS
from swinscale.weights.arrange import window_of_index
from swinscale.weights.filenames import NameHints, disagreements, fields_of, read_name, telling_name
from swinscale.weights.files import State
from swinscale.weights.layouts import LAYOUTS, published_names, to_official
from swinscale.weights.resize import square_map, square_window


@dataclass(frozen=True)
class Inference:
    """The configuration of a model from its tensors, and how it is known.

    Args:
        windows_from: "tensors" (bias tables or stored buffers), "name" of the file, "caller", or "assumed".
        disagreements: lines about what the file's name says and the tensors deny.
    """

    config: SwinConfig
    windows_from: Literal["tensors", "name", "caller", "assumed"]
    disagreements: tuple[str, ...] = ()


def infer_config(state: State, *, name: str | os.PathLike[str] | None = None, **known: Any) -> SwinConfig:
    """The configuration of a model, from its tensors in any layout.

    Windows are read from bias tables (V1) or from stored buffers (V2 files of the published code, OpenMMLab and
    torchvision). Other V2 files do not hold them: then the name of the file counts, and without it 8 is assumed, with a
    warning, unless ``known`` says them. The image size is the one whose last map is as large as the last window; that of a
    video model with the architecture and the windows of a named one is the clip of that.

    Args:
        name: the file or directory that the tensors come from. Where its name denies the tensors, they win, and a
            warning says both.
        known: fields of ``SwinConfig`` that the caller knows; they win over what is inferred.

    Raises:
        UsageError: for tensors that are no Swin Transformer.
    """
    found = infer(state, name, **known)
    for line in found.disagreements:
        warnings.warn(f"{telling_name(name or '')}: {line}. The tensors count.", stacklevel=2)
    if found.windows_from == "assumed":
        warnings.warn(
            f"The windows of this Swin V{found.config.version} are not stored in its tensors: assuming 8. "
            f"If it was trained with others, pass window_size (and pretrained_window_sizes).",
            stacklevel=2,
        )
    return found.config


def infer(state: State, name: str | os.PathLike[str] | None = None, **known: Any) -> Inference:
    """As ``infer_config``, without warnings and with how the windows are known."""
    official, _ = to_official(state, drop_k_bias=True)
    found = _architecture(official)
    hints = read_name(name) if name else NameHints()
    fields, rank, depths = {**found, **known}, len(found["patch_size"]), found["depths"]
    how: Literal["tensors", "name", "caller", "assumed"] = "caller"
    if "window_size" not in known:
        stored = published_names(state)[0]
        tables, buffers = _windows_of_tables(official, stored, depths, rank), _windows_of_buffers(stored, depths)
        windows: Any = tables or buffers
        how = "tensors" if windows else "name" if hints.window else "assumed"
        if how == "name":
            fields = {**found, **fields_of(hints, len(depths)), **known}
        else:
            windows = windows or [(8,) * rank] * len(depths)
            fields["window_size"] = tuple(windows)
            if "pretrained_window_sizes" not in known and found["position_bias"] != "table":
                trained = stored_windows(state, len(depths))
                fields["pretrained_window_sizes"] = trained if trained and trained != tuple(windows) else 0
    if "img_size" not in fields:
        shape = SwinConfig(**fields)
        size = tuple(n * s for n, s in zip(shape.window_size[-1], shape.stage_strides()[-1], strict=True))
        if "absolute_pos_embed" in official:
            tokens = square_map(official["absolute_pos_embed"].shape[1], rank)
            size = tuple(n * p for n, p in zip(tokens, shape.patch_size, strict=True)) if tokens else size
        fields["img_size"] = _named_clip(shape) or size
    config = SwinConfig(**fields)
    return Inference(config, how, tuple(disagreements(hints, config, how == "tensors")))


def _named_clip(shape: SwinConfig) -> Size | None:
    """The clip of the named video model with this architecture and these windows, which do not say how long clips are."""
    same = ("version", "patch_size", "embed_dim", "depths", "num_heads", "window_size")
    alike = (v for v in VARIANTS.values() if v.rank == 3 and all(getattr(v, n) == getattr(shape, n) for n in same))
    return next((variant.img_size for variant in alike), None)


def name_disagreements(state: State, name: str | os.PathLike[str]) -> list[str]:
    """Lines about what the name of a file says and its tensors deny."""
    return list(infer(state, name).disagreements) if read_name(name) else []


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


def _windows_of_tables(official: State, stored: State, depths: tuple[int, ...], rank: int) -> list[Size] | None:
    """The window of each stage from its bias table, and from the position index where one is stored; None without tables."""
    windows = []
    indices = _buffers(stored, "relative_position_index", len(depths))
    for stage in range(len(depths)):
        table = official.get(f"layers.{stage}.blocks.0.attn.relative_position_bias_table")
        if table is None:
            return None
        exact = window_of_index(indices[stage], rank) if indices else None
        if exact is not None and _offsets(exact) == len(table):
            windows.append(exact)
            continue
        window = square_window(len(table), rank) if rank == 2 else _video_window(len(table))
        if window is None:
            raise UsageError(
                f"Stage {stage} has a bias table of {len(table)} offsets, so its window is not square: pass window_size."
            )
        windows.append(window)
    return windows


def _offsets(window: Size) -> int:
    return math.prod(2 * w - 1 for w in window)


def _video_window(offsets: int) -> Size | None:
    """The window (time, side, side) whose table has ``offsets`` rows: 2535 = 15·13·13 is (8, 7, 7).

    Of several the one with the largest side that has more than one frame; None if there is none.
    """
    odd = [n for n in range(1, math.isqrt(offsets) + 1, 2) if offsets % n**2 == 0 and offsets // n**2 % 2]
    sides = sorted(odd, key=lambda n: (offsets // n**2 > 1, n))
    return ((offsets // sides[-1] ** 2 + 1) // 2, (sides[-1] + 1) // 2, (sides[-1] + 1) // 2) if sides else None


def _buffers(state: State, name: str, stages: int) -> list[Any]:
    """The first buffer of that name in each stage, in the order of the stages; empty if a stage has none."""
    found: dict[str, Any] = {}
    for key in sorted(state, key=lambda k: [int(n) for n in re.findall(r"\d+", k)]):
        place = re.fullmatch(rf"(.*)\.\d+\.attn\.(w_msa\.)?{name}", key)
        if place:
            found.setdefault(place[1], state[key])
    return list(found.values()) if len(found) == stages else []


def _windows_of_buffers(stored: State, depths: tuple[int, ...]) -> list[Size] | None:
    """Windows from stored coordinate tables (1, 2h-1, 2w-1, 2)."""
    tables = _buffers(stored, "relative_coords_table", len(depths))
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


def describe(official: State, layout: str) -> str:
    """What tensors look like, for a message: "a timm Swin V1 with embed_dim 96, depths (2, 2, 6, 2), 3 channels".

    Args:
        official: the tensors under published names.
        layout: the names that they had, a key of ``LAYOUTS``.
    """
    a = _architecture(official)
    text = (
        f"a {LAYOUTS[layout].title} Swin V{a['version']} with embed_dim {a['embed_dim']}, depths {a['depths']}, "
        f"in_chans {a['in_chans']}, patch_size {a['patch_size']}"
    )
    return text + (f", {a['num_classes']} classes" if a["num_classes"] else "")
