"""How other projects name the parameters of a Swin Transformer, and the way there and back.

The published names (microsoft/Swin-Transformer) are ours, and every conversion goes through them. Each other project is
a table of (published name, its name), where ``{i}`` is the stage and ``{j}`` the block; a name stands for everything
below it. What a table cannot say is done by two steps around it: transformers splits ``qkv``, and torchvision keeps
one bias for q, k and v.

In published form the tensors of masked image modelling stand beside the backbone: ``mask_token`` and ``decoder.0``.
timm before 0.9 used the published names and needs no table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.windows import relative_coords, relative_position_index
from swinscale.weights.files import State

Pairs = tuple[tuple[str, str], ...]

BLOCK = "layers.{i}.blocks.{j}"

_TRANSFORMERS: Pairs = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "embeddings.norm"),
    ("absolute_pos_embed", "embeddings.position_embeddings"),
    ("mask_token", "embeddings.mask_token"),
    (f"{BLOCK}.norm1", f"encoder.{BLOCK}.layernorm_before"),
    (f"{BLOCK}.norm2", f"encoder.{BLOCK}.layernorm_after"),
    ("layers.{i}.downsample", "encoder.layers.{i}.downsample"),
    ("norm", "layernorm"),
    ("head", "classifier"),
    ("decoder", "decoder"),
)
_TRANSFORMERS_FILES: Pairs = (
    *_TRANSFORMERS,
    (f"{BLOCK}.attn.q", f"encoder.{BLOCK}.attention.self.query"),
    (f"{BLOCK}.attn.k", f"encoder.{BLOCK}.attention.self.key"),
    (f"{BLOCK}.attn.v", f"encoder.{BLOCK}.attention.self.value"),
    (f"{BLOCK}.attn.proj", f"encoder.{BLOCK}.attention.output.dense"),
    (f"{BLOCK}.attn.logit_scale", f"encoder.{BLOCK}.attention.self.logit_scale"),
    (f"{BLOCK}.attn.cpb_mlp", f"encoder.{BLOCK}.attention.self.continuous_position_bias_mlp"),
    (f"{BLOCK}.attn.relative_position_bias_table", f"encoder.{BLOCK}.attention.self.relative_position_bias_table"),
    (f"{BLOCK}.mlp.fc1", f"encoder.{BLOCK}.intermediate.dense"),
    (f"{BLOCK}.mlp.fc2", f"encoder.{BLOCK}.output.dense"),
)
_TRANSFORMERS_5: Pairs = (
    *_TRANSFORMERS,
    (f"{BLOCK}.attn.q", f"encoder.{BLOCK}.attention.q_proj"),
    (f"{BLOCK}.attn.k", f"encoder.{BLOCK}.attention.k_proj"),
    (f"{BLOCK}.attn.v", f"encoder.{BLOCK}.attention.v_proj"),
    (f"{BLOCK}.attn.proj", f"encoder.{BLOCK}.attention.o_proj"),
    (
        f"{BLOCK}.attn.relative_position_bias_table",
        f"encoder.{BLOCK}.attention.relative_position_bias.relative_position_bias_table",
    ),
    (f"{BLOCK}.mlp", f"encoder.{BLOCK}.mlp"),
)
_TIMM: Pairs = (
    ("patch_embed", "patch_embed"),
    (BLOCK, BLOCK),
    ("layers.{i}.downsample", "layers.{i+1}.downsample"),
    ("norm", "norm"),
    ("head", "head.fc"),
)
_TORCHVISION: Pairs = (
    ("patch_embed.proj", "features.0.0"),
    ("patch_embed.norm", "features.0.2"),
    (BLOCK, "features.{2i+1}.{j}"),
    (f"{BLOCK}.mlp.fc1", "features.{2i+1}.{j}.mlp.0"),
    (f"{BLOCK}.mlp.fc2", "features.{2i+1}.{j}.mlp.3"),
    ("layers.{i}.downsample", "features.{2i+2}"),
    ("norm", "norm"),
    ("head", "head"),
)


@dataclass(frozen=True)
class NameTable:
    """How one project names its parameters.

    Args:
        pairs: (published name, name there); None: the published names.
        anchor: a name that every file of this kind has, by which it is recognised.
        title: what to call it in a message.
    """

    pairs: Pairs | None
    anchor: str
    title: str


_ANCHOR = "layers.0.blocks.0.attn.qkv.weight"
LAYOUTS: dict[str, NameTable] = {
    "official": NameTable(None, _ANCHOR, "published"),
    "official-simmim": NameTable(None, _ANCHOR, "published SimMIM"),
    "swinscale-simmim": NameTable(None, _ANCHOR, "swinscale SimMIM"),
    "timm": NameTable(_TIMM, _ANCHOR, "timm"),
    "transformers": NameTable(
        _TRANSFORMERS_FILES, "encoder.layers.0.blocks.0.attention.self.query.weight", "transformers"
    ),
    "transformers5": NameTable(_TRANSFORMERS_5, "encoder.layers.0.blocks.0.attention.q_proj.weight", "transformers"),
    "torchvision": NameTable(_TORCHVISION, "features.1.0.attn.qkv.weight", "torchvision"),
}
"""Layouts by name. "transformers" is what its files hold, in every release, and what its V2 modules use; release 5
renamed the modules of V1, and "transformers5" is for ``load_state_dict`` into these."""

# Relatives that compute something else, or merge patches in another order: loaded by name they would give noise.
RELATIVES = {
    r"\.attn\.w_msa\.qkv\.weight$": "an OpenMMLab Swin, whose patch merging orders channels differently",
    r"\.attn\.meta_mlp\.": "timm's swinv2_cr, which is another architecture",
    r"^(\w+\.)*layers\.0\.0\.blocks\.|layers1\.0\.blocks\.": "a MONAI SwinViT, which is another architecture",
    r"^(\w+\.)*layers_0\.blocks\.": "a timm features_only model; take the weights of the whole model",
}

DERIVED = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|k_bias)$")
"""Buffers that follow from the configuration. Ours are never stored."""


def detect_layout(state: Iterable[str]) -> str:
    """Whose names these are: a key of ``LAYOUTS``. Prefixes such as ``module.`` or ``backbone.`` do not matter.

    Raises:
        UsageError: if it is not a Swin Transformer, or one whose layout is not known.
    """
    return _recognise(state)[0]


def _recognise(names: Iterable[str]) -> tuple[str, str]:
    """(layout, prefix of the backbone's names)"""
    names = set(names)
    for layout, anchor in {name: table.anchor for name, table in LAYOUTS.items()}.items():
        prefixes = sorted((n.removesuffix(anchor) for n in names if n == anchor or n.endswith("." + anchor)), key=len)
        if not prefixes:
            continue
        prefix = prefixes[0]
        if layout == "official":
            if f"{prefix}mask_token" in names:
                layout = "official-simmim"
            elif f"{prefix.removesuffix('encoder.')}mask_token" in names:
                layout = "swinscale-simmim"
            elif f"{prefix}layers.0.downsample.reduction.weight" not in names and (
                f"{prefix}layers.1.downsample.reduction.weight" in names or f"{prefix}head.fc.weight" in names
            ):
                layout = "timm"
        return layout, prefix
    for pattern, what in RELATIVES.items():
        if any(re.search(pattern, name) for name in names):
            raise UsageError(f"These weights look like {what}; they cannot be used in a Swin Transformer here.")
    some = ", ".join(sorted(names)[:3]) or "nothing"
    raise UsageError(
        f"These are not the weights of a Swin Transformer: {len(names)} tensors named {some}, ... "
        f"Known layouts: {', '.join(LAYOUTS)}."
    )


def convert_state_dict(state: State, to: str, frm: str | None = None, *, config: SwinConfig | None = None) -> State:
    """Renames, splits and joins tensors from one project's layout to another's, without loss.

    Args:
        to: a key of ``LAYOUTS``.
        frm: the layout of ``state``; None: recognised.
        config: the model's configuration; needed for torchvision, whose files store buffers that depend on the windows.

    Raises:
        UsageError: for an unknown layout, or tensors that the other layout has no place for.
    """
    return from_official(to_official(state, frm)[0], to, config)


def to_official(state: State, layout: str | None = None, *, drop_k_bias: bool = False) -> tuple[State, list[str]]:
    """Tensors of any layout under published names, derived buffers dropped.

    Args:
        layout: a key of ``LAYOUTS``; None: recognised.
        drop_k_bias: drop a non-zero bias of the keys of a V2 model. Under cosine attention it changes results, so
            otherwise it is refused; torchvision itself sets it to zero at run time, so there it never matters.

    Returns: the tensors, and one line for each thing that was left out.

    Raises:
        UsageError: for an unknown layout or one that the tensors do not have, or for a bias of the keys.
    """
    _check(layout)
    found, prefix = _recognise(state)
    layout = layout or found
    if LAYOUTS[layout].anchor != LAYOUTS[found].anchor:
        raise UsageError(f"These weights have the layout '{found}', not '{layout}'.")
    flat: State = {}
    for name, tensor in state.items():
        short = _without_prefix(name, prefix)
        if layout.startswith("transformers"):
            short = re.sub(r"^swin(v2)?\.", "", short)
        if short in flat:
            raise UsageError(
                f"The weights hold '{short}' twice, with and without the prefix '{prefix}'. Keep one model."
            )
        flat[short] = tensor
    notes = []
    names = _table(layout, _depths(flat, layout))
    theirs = {there: ours for ours, there in names.items()}
    flat = {_rename(name, theirs) or name: tensor for name, tensor in flat.items()}
    flat = {
        re.sub(r"(blocks\.\d+)\.norm3\.", r"\1.enorm.", n.replace("rpe_mlp", "cpb_mlp")): t for n, t in flat.items()
    }
    flat = _join_qkv(flat)
    flat, note = _split_v2_bias(flat, drop_k_bias or layout == "torchvision")
    if note and layout == "torchvision":
        note += "; torchvision sets it to zero at run time"
    notes += [note] if note else []
    derived = [name for name in flat if DERIVED.search(name)]
    if derived:
        kinds = sorted({name.rpartition(".")[2] for name in derived})
        notes.append(f"{len(derived)} derived buffers ({', '.join(kinds)}), computed from the configuration")
    return {name: tensor for name, tensor in flat.items() if name not in set(derived)}, notes


def from_official(state: State, layout: str, config: SwinConfig | None = None) -> State:
    """Tensors under published names in another project's layout, so that its strict loading accepts them.

    Args:
        config: needed for torchvision, whose files store position indices and coordinates.

    Raises:
        UsageError: for an unknown layout, or tensors that it has no place for.
    """
    _check(layout)
    version = 2 if any(name.endswith("attn.logit_scale") for name in state) else 1
    _refuse_unknown(state, layout, version, config)
    if layout == "official":
        return dict(state)
    if layout.endswith("-simmim"):
        outside = ("decoder.",) if layout == "official-simmim" else ("decoder.", "mask_token")
        return {name if name.startswith(outside) else f"encoder.{name}": tensor for name, tensor in state.items()}
    out = dict(state)
    if layout == "transformers5" and version == 2:
        layout = "transformers"  # release 5 left the modules of V2 as they were
    if layout.startswith("transformers"):
        out = _split_qkv(out)
    elif layout == "torchvision":
        out = _torchvision_extras(out, config)
    names = _table(layout, _depths(out, "official"))
    renamed: State = {}
    for name, tensor in out.items():
        there = _rename(name, names)
        if there is None:
            raise UsageError(f"{LAYOUTS[layout].title} has no place for '{name}': it cannot hold this model.")
        renamed[there] = tensor
    if layout.startswith("transformers"):
        root = "swin." if version == 1 else "swinv2."
        renamed = {n if n.startswith(("classifier.", "decoder.")) else root + n: t for n, t in renamed.items()}
    return renamed


def _check(layout: str | None) -> None:
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"Unknown layout '{layout}'.{suggest(layout, LAYOUTS)} Choose one of {', '.join(LAYOUTS)}.")


def _refuse_unknown(state: State, layout: str, version: int, config: SwinConfig | None) -> None:
    """Refuses what no other project computes: it would load there and mean something else."""
    title = LAYOUTS[layout].title
    if layout.endswith("-simmim") != ("mask_token" in state) and not layout.startswith("transformers"):
        kind = "has a mask token: export its encoder, or choose 'official-simmim' or 'transformers'"
        kind = "has no mask token: choose another layout" if layout.endswith("-simmim") else kind
        raise UsageError(f"layout='{layout}' does not fit this model, which {kind}.")
    if LAYOUTS[layout].pairs is None:
        return
    if any(".enorm." in name for name in state):
        raise UsageError(f"{title} has no norm on the main branch (main_norm_interval): it cannot hold this model.")
    if version == 2 and "absolute_pos_embed" in state:
        raise UsageError(
            f"{title} has no Swin V2 with an absolute position embedding (ape): it cannot hold this model."
        )
    bias = "relative_position_bias_table" if version == 2 else "cpb_mlp"
    if any(bias in name for name in state) or (config and config.position_bias in ("linear", "paper")):
        raise UsageError(f"{title} has no Swin V{version} with this position bias: it cannot hold this model.")


def _without_prefix(name: str, prefix: str) -> str:
    """``name`` without the longest leading part of ``prefix`` that it shares: ``module.head`` for ``module.swin.``."""
    while prefix and not name.startswith(prefix):
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    return name[len(prefix) :]


def _depths(state: State, layout: str) -> list[int]:
    """Blocks of each stage, counted in the names of a layout."""
    block = dict(LAYOUTS[layout].pairs or ()).get(BLOCK, BLOCK)
    if layout.startswith("transformers"):
        block = f"encoder.{BLOCK}"
    heads = {".".join(parts[:n]) for parts in (name.split(".") for name in state) for n in range(1, len(parts))}
    depths: list[int] = []
    while (depth := _count(heads, block, len(depths))) > 0:
        depths.append(depth)
    return depths


def _count(heads: set[str], block: str, stage: int) -> int:
    depth = 0
    while _fill(block, stage, depth) in heads:
        depth += 1
    return depth


def _fill(name: str, stage: int, block: int) -> str:
    values = {"{i}": stage, "{i+1}": stage + 1, "{2i+1}": 2 * stage + 1, "{2i+2}": 2 * stage + 2, "{j}": block}
    for letter, value in values.items():
        name = name.replace(letter, str(value))
    return name


def _table(layout: str, depths: list[int]) -> dict[str, str]:
    """All published names of modules in a model of these depths → the names in ``layout``."""
    table = {}
    for ours, theirs in LAYOUTS[layout].pairs or ():
        for stage, depth in enumerate(depths):
            for block in range(depth if "{j}" in ours else 1):
                table[_fill(ours, stage, block)] = _fill(theirs, stage, block)
    return table


def _rename(name: str, table: dict[str, str]) -> str | None:
    """``name`` with its longest known beginning replaced, or None."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        new = table.get(".".join(parts[:n]))
        if new is not None:
            return ".".join([new, *parts[n:]])
    return None


def _split_qkv(state: State) -> State:
    out: State = {}
    for name, tensor in state.items():
        block, _, leaf = name.partition(".attn.")
        if leaf in ("qkv.weight", "qkv.bias"):
            kind = leaf.removeprefix("qkv.")
            out.update({f"{block}.attn.{x}.{kind}": t.clone() for x, t in zip("qkv", tensor.chunk(3), strict=True)})
        elif leaf in ("q_bias", "v_bias"):
            out[f"{block}.attn.{leaf[0]}.bias"] = tensor
        else:
            out[name] = tensor
    return out


def _join_qkv(state: State) -> State:
    out: State = {}
    for name, tensor in state.items():
        split = re.fullmatch(r"(.*\.attn)\.([qkv])\.(weight|bias)", name)
        if split is None:
            out[name] = tensor
            continue
        attn, letter, kind = split.groups()
        parts = [state[part] for part in (f"{attn}.{x}.{kind}" for x in "qkv") if part in state]
        if len(parts) == 3:
            if letter == "q":
                out[f"{attn}.qkv.{kind}"] = torch.cat(parts)
        elif kind == "bias" and letter != "k":
            out[f"{attn}.{letter}_bias"] = tensor
        else:
            raise UsageError(f"The weights hold {attn}.{letter}.{kind} without the other two of query, key and value.")
    return out


def _split_v2_bias(state: State, drop_k_bias: bool) -> tuple[State, str]:
    """V2 has no bias of the keys: q_bias and v_bias instead of one qkv.bias."""
    out, largest = dict(state), 0.0
    for name, bias in state.items():
        found = re.fullmatch(r"(.*\.attn)\.(qkv\.bias|k_bias)", name)
        if found is None or f"{found[1]}.logit_scale" not in state:
            continue
        if found[2] == "qkv.bias":
            out[f"{found[1]}.q_bias"], bias, out[f"{found[1]}.v_bias"] = (t.clone() for t in out.pop(name).chunk(3))
        largest = max(largest, bias.abs().max().item())
    if largest and not drop_k_bias:
        raise UsageError(
            f"The keys of this V2 model have a bias (largest {largest:.3g}), which cosine attention does not cancel and "
            f"Swin V2 does not have. Pass drop_k_bias=True to leave it out and accept different results."
        )
    return out, f"the bias of the keys (largest {largest:.3g}), which Swin V2 does not have" if largest else ""


def _torchvision_extras(state: State, config: SwinConfig | None) -> State:
    """One bias for q, k and v, and the buffers that torchvision stores."""
    if config is None:
        raise UsageError("torchvision's files depend on the windows: pass config=model.config.")
    if len(set(config.stage_windows)) > 1:
        raise UsageError(
            f"torchvision has one window for all stages, but this model has {config.stage_windows}. "
            f"Export to timm or transformers, or transfer it to one window with small_map='pad-noshift'."
        )
    out: State = {}
    for name, tensor in state.items():
        attn, _, leaf = name.rpartition(".")
        if leaf == "q_bias":
            out[f"{attn}.qkv.bias"] = torch.cat((tensor, torch.zeros_like(tensor), state[f"{attn}.v_bias"]))
        elif leaf != "v_bias":
            out[name] = tensor
    window, cpu = config.stage_windows[0], torch.device("cpu")
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            attn = f"{_fill(BLOCK, stage, block)}.attn"
            out[f"{attn}.relative_position_index"] = relative_position_index(window, window, cpu).clone()
            if config.position_bias != "table":
                coords = relative_coords(window, config.trained_windows[stage], "log", cpu)
                out[f"{attn}.relative_coords_table"] = coords.view(1, *(2 * w - 1 for w in window), config.rank).clone()
    return out
