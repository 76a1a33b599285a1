"""How other projects name the parameters of a Swin Transformer, and the way there and back.

The published names (microsoft/Swin-Transformer) are ours, and every conversion goes through them. Each other project is
a table of (published name, its name), where ``{i}`` is the stage, ``{j}`` the block and ``{last}`` the last stage; a name
stands for everything below it. What a table cannot say is done by steps around it (``arrange.py``): transformers splits
``qkv``, torchvision keeps one bias for q, k and v, OpenMMLab merges patches in another channel order.

In published form the tensors of masked image modelling stand beside the backbone: ``mask_token`` and ``decoder.0``.
timm before 0.9 used the published names and needs no table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.weights.arrange import (
    check_merging_order,
    flatten_position_embedding,
    join_qkv,
    merging_from_unfold,
    merging_to_unfold,
    norms_of_transformers_backbone,
    split_qkv,
    split_v2_bias,
    with_torchvision_buffers,
)
from swinscale.weights.files import State
from swinscale.weights.relatives import refuse_relatives
from swinscale.weights.report import some

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

_TORCHVISION_VIDEO: Pairs = (
    ("patch_embed", "patch_embed"),
    (BLOCK, "features.{2i}.{j}"),
    (f"{BLOCK}.mlp.fc1", "features.{2i}.{j}.mlp.0"),
    (f"{BLOCK}.mlp.fc2", "features.{2i}.{j}.mlp.3"),
    ("layers.{i}.downsample", "features.{2i+1}"),
    ("norm", "norm"),
    ("head", "head"),
)
_MM: Pairs = (
    ("patch_embed.proj", "backbone.patch_embed.projection"),
    ("patch_embed.norm", "backbone.patch_embed.norm"),
    ("absolute_pos_embed", "backbone.absolute_pos_embed"),
    (BLOCK, "backbone.stages.{i}.blocks.{j}"),
    (f"{BLOCK}.attn", "backbone.stages.{i}.blocks.{j}.attn.w_msa"),
    (f"{BLOCK}.mlp.fc1", "backbone.stages.{i}.blocks.{j}.ffn.layers.0.0"),
    (f"{BLOCK}.mlp.fc2", "backbone.stages.{i}.blocks.{j}.ffn.layers.1"),
    ("norm", "backbone.norm{last}"),
    ("head", "head.fc"),
)
_DENSE: Pairs = (
    ("patch_embed", "backbone.patch_embed"),
    ("absolute_pos_embed", "backbone.absolute_pos_embed"),
    (BLOCK, f"backbone.{BLOCK}"),
    ("layers.{i}.downsample", "backbone.layers.{i}.downsample"),
    ("norm", "backbone.norm{last}"),
)
_VIDEO_HEAD = ("head", "cls_head.fc_cls")


@dataclass(frozen=True)
class NameTable:
    """How one project names its parameters.

    Args:
        pairs: (published name, name there); None: the published names.
        anchor: a name that every file of this kind has, by which it is recognised.
        title: what to call it in a message.
        only_v1: (published name, name there) for V1 alone.
        only_v2: the same for V2.
    """

    pairs: Pairs | None
    anchor: str
    title: str
    only_v1: Pairs = ()
    only_v2: Pairs = ()


_ANCHOR = "layers.0.blocks.0.attn.qkv.weight"
LAYOUTS: dict[str, NameTable] = {
    "official": NameTable(None, _ANCHOR, "published"),
    "official-simmim": NameTable(None, _ANCHOR, "published SimMIM"),
    "official-dense": NameTable(_DENSE, _ANCHOR, "published dense"),
    "official-video": NameTable((*_DENSE[:-1], ("norm", "backbone.norm"), _VIDEO_HEAD), _ANCHOR, "published video"),
    "swinscale-simmim": NameTable(None, _ANCHOR, "swinscale SimMIM"),
    "timm": NameTable(_TIMM, _ANCHOR, "timm"),
    "transformers": NameTable(
        _TRANSFORMERS_FILES, "encoder.layers.0.blocks.0.attention.self.query.weight", "transformers"
    ),
    "transformers5": NameTable(_TRANSFORMERS_5, "encoder.layers.0.blocks.0.attention.q_proj.weight", "transformers"),
    "torchvision": NameTable(_TORCHVISION, "features.1.0.attn.qkv.weight", "torchvision"),
    "torchvision-video": NameTable(_TORCHVISION_VIDEO, "features.0.0.attn.qkv.weight", "torchvision video"),
    "mm": NameTable(
        _MM,
        "stages.0.blocks.0.attn.w_msa.qkv.weight",
        "OpenMMLab",
        only_v1=(("layers.{i}.downsample", "backbone.stages.{i}.downsample"),),
        only_v2=(
            ("layers.{i}.downsample", "backbone.stages.{i+1}.downsample"),
            (f"{BLOCK}.enorm", "backbone.stages.{i}.blocks.{j}.norm3"),
        ),
    ),
    "mm-video": NameTable((*_DENSE, _VIDEO_HEAD), _ANCHOR, "OpenMMLab video"),
}
"""Layouts by name. "transformers" is what its files hold, in every release, and what its V2 modules use; release 5
renamed the modules of V1, and "transformers5" is for ``load_state_dict`` into these. "official-dense" is what the
published detection and segmentation code stores, "official-video" what Video-Swin stores, "mm" what mmpretrain, mmdetection
and mmsegmentation store, "mm-video" what mmaction2 stores; classifiers stand beside their ``backbone.``"""

DERIVED = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|k_bias)$")
"""Buffers that follow from the configuration. Ours are never stored."""

HEADS = re.compile(r"head\.(weight|bias)|mask_token|decoder\.0\.(weight|bias)")
"""Published names of what may stand beside a backbone that has a prefix."""

OTHERS = r"norm\d+\.|hidden_states_norms\.|head\.(?!weight$|bias$)|head_"
"""Beginnings of the names of norms and heads that no backbone or classifier has."""


def detect_layout(state: Iterable[str]) -> str:
    """Whose names these are: a key of ``LAYOUTS``. Prefixes such as ``module.`` or ``backbone.`` do not matter.

    Raises:
        UsageError: if it is not a Swin Transformer, a relative that computes something else, or one whose layout is not
            known.
    """
    return _recognise(map(_flat_stage, state))[0]


def _flat_stage(name: str) -> str:
    """timm's features_only models have ``layers_0`` for ``layers.0``."""
    return re.sub(r"(^|\.)layers_(\d+)\.", r"\1layers.\2.", name)


def _recognise(names: Iterable[str]) -> tuple[str, str]:
    """(layout, prefix of the backbone's names)"""
    names = set(names)
    refuse_relatives(names)
    for layout, anchor in {name: table.anchor for name, table in LAYOUTS.items()}.items():
        prefixes = [n.removesuffix(anchor) for n in names if n == anchor or n.endswith("." + anchor)]
        if not prefixes:
            continue
        # Of several models in one file the shortest prefix is the main one (encoder. beside encoder_k.), a teacher first.
        prefix = min(prefixes, key=lambda p: ("teacher" not in p, len(p), p))
        if layout == "official":
            layout = _published_kind(names, prefix)
        return layout, prefix
    some_names = ", ".join(sorted(names)[:3]) or "nothing"
    raise UsageError(
        f"These are not the weights of a Swin Transformer: {len(names)} tensors named {some_names}, ... "
        f"Known layouts: {', '.join(LAYOUTS)}."
    )


def _published_kind(names: set[str], prefix: str) -> str:
    """Which of the layouts that share the published names of the blocks."""
    if f"{prefix}mask_token" in names:
        return "official-simmim"
    if f"{prefix.removesuffix('encoder.')}mask_token" in names:
        return "swinscale-simmim"
    if any(name.endswith("cls_head.fc_cls.weight") for name in names):
        return "official-video" if f"{prefix}norm.weight" in names else "mm-video"
    if f"{prefix}layers.0.downsample.reduction.weight" not in names and (
        f"{prefix}layers.1.downsample.reduction.weight" in names or f"{prefix}head.fc.weight" in names
    ):
        return "timm"
    if f"{prefix}norm.weight" not in names and any(re.match(rf"{re.escape(prefix)}norm\d+\.weight", n) for n in names):
        return "official-dense"
    return "official"


def convert_state_dict(state: State, to: str, frm: str | None = None, *, config: SwinConfig | None = None) -> State:
    """Renames, splits, joins and re-orders tensors from one project's layout to another's, without loss.

    What no classifier or encoder has (the heads of a detector, a second encoder) is left out; ``to_official`` says what.

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
        UsageError: for an unknown layout or one that the tensors do not have, for a bias of the keys, or for patch
            mergings in another channel order than the names say.
    """
    flat, layout, notes = published_names(state, layout)
    derived = [name for name in flat if DERIVED.search(name) and not name.endswith("k_bias")]
    flat = join_qkv({name: tensor for name, tensor in flat.items() if name not in set(derived)})
    flat, note = split_v2_bias(flat, drop_k_bias or layout == "torchvision")
    if note and layout == "torchvision":
        note += "; torchvision sets it to zero at run time"
    notes += [note] if note else []
    derived += [name for name in flat if DERIVED.search(name)]
    if derived:
        kinds = sorted({name.rpartition(".")[2] for name in derived})
        notes.append(f"{len(derived)} derived buffers ({', '.join(kinds)}), computed from the configuration")
    flat = flatten_position_embedding({name: tensor for name, tensor in flat.items() if not DERIVED.search(name)})
    check_merging_order(flat, unfold=layout == "mm")
    return (merging_from_unfold(flat) if layout == "mm" else flat), notes


def published_names(state: State, layout: str | None = None) -> tuple[State, str, list[str]]:
    """The tensors of a backbone and its head, stored buffers included, under published names but as they were stored.

    Returns: the tensors, their layout, and one line for each group that belongs to neither.

    Raises:
        UsageError: as ``to_official``.
    """
    _check(layout)
    state = {_flat_stage(name): tensor for name, tensor in state.items()}
    found, prefix = _recognise(state)
    layout = layout or found
    if LAYOUTS[layout].anchor != LAYOUTS[found].anchor:
        raise UsageError(f"These weights have the layout '{found}', not '{layout}'.")
    flat: State = {}
    outside = set()
    for name, tensor in state.items():
        short = _without_prefix(name, prefix)
        if layout.startswith("transformers"):
            short = re.sub(r"^swin(v2)?\.", "", short)
        if short in flat:
            raise UsageError(
                f"The weights hold '{short}' twice, with and without the prefix '{prefix}'. Keep one model."
            )
        flat[short] = tensor
        if not name.startswith(prefix):
            outside.add(short)
    version = 2 if any(name.endswith("logit_scale") for name in flat) else 1
    depths = _depths(flat, layout)
    flat, notes = norms_of_transformers_backbone(flat, len(depths)) if layout.startswith("transformers") else (flat, [])
    names = _table(layout, depths, version)
    theirs = {there.removeprefix("backbone."): ours for ours, there in names.items()}
    renamed: State = {}
    elsewhere = []
    for name, tensor in flat.items():
        new = _rename(name, theirs) or name
        new = re.sub(r"(blocks\.\d+)\.norm3\.", r"\1.enorm.", new.replace("rpe_mlp", "cpb_mlp"))
        new = new.replace(".attn.v2_logit_scale", ".attn.logit_scale")  # torchvision's first V2 files
        if (name in outside and not HEADS.fullmatch(new)) or re.match(OTHERS, new):
            elsewhere.append(name)
        else:
            renamed[new] = tensor
    groups = sorted({re.match(r"[^.]*", name)[0] for name in elsewhere})  # type: ignore[index]
    if groups:
        notes.append(f"{len(elsewhere)} tensors that belong to no backbone or classifier ({some(groups, 6)})")
    return renamed, layout, notes


def from_official(state: State, layout: str, config: SwinConfig | None = None) -> State:
    """Tensors under published names in another project's layout, so that its strict loading accepts them.

    Args:
        config: needed for torchvision, whose files store position indices and coordinates.

    Raises:
        UsageError: for an unknown layout, or tensors that it has no place for.
    """
    _check(layout)
    version = 2 if any(name.endswith("attn.logit_scale") for name in state) else 1
    embedding = state.get("patch_embed.proj.weight")
    video = embedding is not None and embedding.ndim == 5
    if video and layout in ("torchvision", "mm"):
        layout = {"torchvision": "torchvision-video", "mm": "mm-video"}[layout]
    _refuse_unknown(state, layout, version, video, config)
    if layout == "official":
        return dict(state)
    if layout.endswith("-simmim"):
        outside = ("decoder.",) if layout == "official-simmim" else ("decoder.", "mask_token")
        return {name if name.startswith(outside) else f"encoder.{name}": tensor for name, tensor in state.items()}
    out = dict(state)
    if layout == "transformers5" and version == 2:
        layout = "transformers"  # release 5 left the modules of V2 as they were
    if layout.startswith("transformers"):
        out = split_qkv(out)
    elif layout.startswith("torchvision"):
        out = with_torchvision_buffers(out, config)
    elif layout == "mm":
        out = merging_to_unfold(out)
    names = _table(layout, _depths(out, "official"), version)
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


def _refuse_unknown(state: State, layout: str, version: int, video: bool, config: SwinConfig | None) -> None:
    """Refuses what no other project computes: it would load there and mean something else."""
    title = LAYOUTS[layout].title
    if layout.endswith("-simmim") != ("mask_token" in state) and not layout.startswith("transformers"):
        kind = "has a mask token: export its encoder, or choose 'official-simmim' or 'transformers'"
        kind = "has no mask token: choose another layout" if layout.endswith("-simmim") else kind
        raise UsageError(f"layout='{layout}' does not fit this model, which {kind}.")
    if LAYOUTS[layout].pairs is None:
        return
    if video != layout.endswith("-video"):
        kind = "video: it cannot hold this model" if video else "images: choose another layout"
        raise UsageError(f"{title} has no Swin Transformer for {kind}.")
    if any(".enorm." in name for name in state) and (version, layout) != (2, "mm"):
        raise UsageError(f"{title} has no norm on the main branch (main_norm_interval): it cannot hold this model.")
    if version == 2 and (layout == "official-dense" or layout.endswith("-video")):
        raise UsageError(f"{title} code has no Swin V2: it cannot hold this model.")
    if version == 2 and "absolute_pos_embed" in state and layout != "mm":
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
    """Blocks of each stage, counted in the names of a layout, which have no prefix."""
    block = dict(LAYOUTS[layout].pairs or ()).get(BLOCK, BLOCK).removeprefix("backbone.")
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


def _fill(name: str, stage: int, block: int, last: int = 0) -> str:
    values = {"{i}": stage, "{i+1}": stage + 1, "{2i}": 2 * stage, "{2i+1}": 2 * stage + 1, "{2i+2}": 2 * stage + 2}
    for letter, value in {**values, "{j}": block, "{last}": last}.items():
        name = name.replace(letter, str(value))
    return name


def _table(layout: str, depths: list[int], version: int) -> dict[str, str]:
    """All published names of modules in a model of these depths → the names in ``layout``."""
    entry, table = LAYOUTS[layout], {}
    for ours, theirs in (*(entry.pairs or ()), *(entry.only_v1 if version == 1 else entry.only_v2)):
        for stage, depth in enumerate(depths):
            for block in range(depth if "{j}" in ours else 1):
                table[_fill(ours, stage, block)] = _fill(theirs, stage, block, len(depths) - 1)
    return table


def _rename(name: str, table: dict[str, str]) -> str | None:
    """``name`` with its longest known beginning replaced, or None."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        new = table.get(".".join(parts[:n]))
        if new is not None:
            return ".".join([new, *parts[n:]])
    return None
