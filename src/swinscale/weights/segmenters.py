"""Segmenters as OpenMMLab and transformers name them, UPerNets around a Swin Transformer, into ours and the way back.

The backbone goes through ``load_weights``; of everything else only names change: all three resize, pool and concatenate alike, so
no number moves. Of transformers it is the backbone of V1: that of V2 has no norms after its stages, and so computes something
else.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.weights.dense_load import Comparison, Kind, load_dense
from swinscale.weights.dense_parts import (
    BACKBONE,
    BLOCK,
    STAGE_NORMS,
    DenseFile,
    count,
    differences,
    number,
    open_dense,
    rows,
    side,
    translate,
)
from swinscale.weights.files import State, read_state_dict
from swinscale.weights.infer import infer_config
from swinscale.weights.layouts import from_official
from swinscale.weights.load import naming
from swinscale.weights.records import read_config
from swinscale.weights.report import LoadReport
from swinscale.weights.resize import BiasMethod

PAIRS = (
    STAGE_NORMS,
    ("decode.pooling.branches.{i}.0", "decode_head.psp_modules.{i}.1.conv"),
    ("decode.pooling.branches.{i}.1", "decode_head.psp_modules.{i}.1.bn"),
    ("decode.pooling.fuse.0", "decode_head.bottleneck.conv"),
    ("decode.pooling.fuse.1", "decode_head.bottleneck.bn"),
    ("decode.laterals.{i}.0", "decode_head.lateral_convs.{i}.conv"),
    ("decode.laterals.{i}.1", "decode_head.lateral_convs.{i}.bn"),
    ("decode.smooth.{i}.0", "decode_head.fpn_convs.{i}.conv"),
    ("decode.smooth.{i}.1", "decode_head.fpn_convs.{i}.bn"),
    ("decode.fuse.0", "decode_head.fpn_bottleneck.conv"),
    ("decode.fuse.1", "decode_head.fpn_bottleneck.bn"),
    ("decode.predict", "decode_head.conv_seg"),
    ("auxiliary.convs.{i}.0", "auxiliary_head.convs.{i}.conv"),
    ("auxiliary.convs.{i}.1", "auxiliary_head.convs.{i}.bn"),
    ("auxiliary.predict", "auxiliary_head.conv_seg"),
)
"""(our name of a module, OpenMMLab's)"""

TO_OURS = rows((theirs, ours) for ours, theirs in PAIRS)
TO_THEIRS = rows(PAIRS)

OWN = ("body.", "decode.", "auxiliary.")
HEADS = re.compile(r"(decode|auxiliary)(_head)?\.")
"""Beginnings of the names of a segmenter's heads, of segmenters that we do not have too."""
SEGMENTER = re.compile(r"(.*\.)?(decode_head\.fpn_bottleneck\.conv|decode\.fuse\.0)\.weight")
POOL_SCALES = (1, 2, 3, 6)
"""Cells a side of the pooled maps of published segmenters; tensors do not tell them."""
PUBLISHED_SIZE = 512
"""Side of the crops that they were trained on, in pixels."""
TRANSFORMERS_V2 = "the Swin V2 backbone of transformers has no norms after its stages, which every segmenter here has, as the published ones do"


@dataclasses.dataclass(frozen=True)
class SegmenterParts:
    """What a segmenter is made of, as far as its tensors tell.

    Args:
        kind: "UPerNet", or "another kind of segmenter".
        classes: how many it knows.
        channels: of the pyramid and its fusion.
        widths: of the backbone's maps, "96-192-384-768".
        norms: after the stages, the last of which belongs to the backbone.
        pools: pooled maps.
        aux_channels: of the auxiliary head; 0: there is none.
        aux_stage: number of the stage that it reads, from 0; -1: none, or one that its width does not tell.
        aux_convs: its convolutions.
    """

    kind: str
    classes: int
    channels: int
    widths: str
    norms: int
    pools: int
    aux_channels: int
    aux_stage: int
    aux_convs: int


COMPARED = {
    "widths": "widths of the maps",
    "norms": "norms after the stages before the last",
    "channels": "channels",
    "pools": "pooled maps",
}
COMPARED_AUXILIARY = {
    "aux_stage": "stage of the auxiliary head",
    "aux_channels": "channels of the auxiliary head",
    "aux_convs": "convolutions in the auxiliary head",
}
"""Parts that must be the same, and what a message calls them. The number of classes may differ, and one side may have no
auxiliary head."""


def is_segmenter(names: Iterable[str]) -> bool:
    """Whether these are names of a UPerNet: OpenMMLab's, transformers' or ours."""
    return any(SEGMENTER.fullmatch(name) for name in names)


def open_segmenter(state: State) -> DenseFile:
    """Sorts the tensors of a file. Of several models in one the teacher counts, then the one with the shortest prefix."""
    return open_dense(state, _to_ours, OWN, HEADS)


def _to_ours(name: str) -> str | None:
    if HEADS.match(name):
        name = re.sub(r"^(\w+_head)\.classifier\.", r"\1.conv_seg.", name.replace(".batch_norm.", ".bn."))
    return translate(name, TO_OURS)


def segmenter_parts(heads: State) -> SegmenterParts:
    """Parts of a segmenter from tensors under our names, the backbone not needed."""
    laterals = count(heads, r"decode\.laterals\.(\d+)\.")
    widths = [side(heads, f"decode.laterals.{i}.0.weight", 1) for i in range(laterals)]
    widths.append(side(heads, "decode.pooling.branches.0.0.weight", 1))
    aux = side(heads, "auxiliary.convs.0.0.weight", 1)
    return SegmenterParts(
        kind="UPerNet" if is_segmenter(heads) else "another kind of segmenter",
        classes=side(heads, "decode.predict.weight", 0),
        channels=side(heads, "decode.fuse.0.weight", 0),
        widths="-".join(map(str, widths)) if laterals else "",
        norms=count(heads, r"body\.norms\.(\d+)\."),
        pools=count(heads, r"decode\.pooling\.branches\.(\d+)\."),
        aux_channels=side(heads, "auxiliary.predict.weight", 1),
        aux_stage=widths.index(aux) if aux in widths and aux else -1,
        aux_convs=count(heads, r"auxiliary\.convs\.(\d+)\."),
    )


def describe_segmenter_parts(parts: SegmenterParts) -> str:
    """ "UPerNet, 150 classes, …"."""
    text = f"{parts.kind}, {number(parts.classes, 'class')}, {number(parts.channels, 'channel')}"
    text += f", {number(parts.pools, 'pooled map')}"
    if not parts.aux_channels:
        return f"{text}, no auxiliary head"
    where = f" on stage {parts.aux_stage + 1}" if parts.aux_stage >= 0 else ""
    return f"{text}, auxiliary head of {number(parts.aux_channels, 'channel')}{where}"


def describe_segmenter(state: State) -> str:
    """What a segmenter is: "UPerNet, 150 classes, 512 channels, …". Tensors may be on ``meta``.

    Raises:
        UsageError: if it is none.
    """
    if not is_segmenter(state):
        raise UsageError(
            "These are not the weights of a UPerNet: none is named decode_head.fpn_bottleneck.conv.weight (OpenMMLab, "
            "transformers) or decode.fuse.0.weight."
        )
    return describe_segmenter_parts(segmenter_parts(open_segmenter(state).heads))


def read_segmenter_config(place: str | os.PathLike[str]) -> tuple[SwinConfig, dict[str, Any], dict[str, Any]]:
    """Backbone, options and preprocessing of a segmenter beside which nothing is recorded, as far as its tensors tell.

    What they leave open is as in the published segmenters. transformers records it: then ``read_config`` and ``read_metadata``
    say it.

    Returns: the backbone; "channels", "pool_scales", "aux_channels", "aux_stage" and "aux_weight", fields of
        ``heads.config.SegmentConfig``; and "classes" (names, None: not known), their "count", "mean", "std" and "colours".

    Raises:
        UsageError: for weights that are no segmenter, and for pooled maps of sizes that nobody knows.
    """
    state, beside = read_state_dict(place)
    if not is_segmenter(state):
        raise UsageError(
            f"{place} holds no segmenter: name a run of a segmentation recipe, or a UPerNet of OpenMMLab or transformers."
        )
    with naming(str(place)):
        file = open_segmenter(state)
        swin = read_config(place) or infer_config(file.backbone, name=place)
    parts = segmenter_parts(file.heads)
    if parts.pools != len(POOL_SCALES):
        raise UsageError(
            f"{place} has {number(parts.pools, 'pooled map')} and does not say of how many cells: only {len(POOL_SCALES)} of "
            f"{', '.join(map(str, POOL_SCALES))} cells a side are known."
        )
    pad: Literal["exact", "legacy"] = "legacy" if swin.version == 1 else "exact"
    swin = dataclasses.replace(swin, img_size=PUBLISHED_SIZE, small_map="pad", num_classes=0, pad=pad)
    options: dict[str, Any] = {"channels": parts.channels, "pool_scales": POOL_SCALES}
    options |= {"aux_channels": parts.aux_channels} if parts.aux_channels else {"aux_weight": 0.0}
    options |= {"aux_stage": parts.aux_stage} if parts.aux_stage >= 0 else {}
    names = beside.get("classes")
    classes = names if isinstance(names, list) and len(names) == parts.classes else None
    return swin, options, {"classes": classes, "count": parts.classes, "mean": None, "std": None, "colours": None}


def load_segmenter(
    model: nn.Module,
    source: str | os.PathLike[str] | State,
    *,
    strict: bool = True,
    transfer: bool | BiasMethod = True,
    min_match: float = 0.99,
    heads: bool = True,
    config: SwinConfig | None = None,
    keep_meta: bool = False,
) -> LoadReport:
    """Loads a UPerNet of OpenMMLab, of the published Swin segmentation code, of transformers or of ours into ``model``, in place.

    Where the classes differ in number, the last layers keep their values and all else is loaded. An auxiliary head that only one
    side has is left out, or keeps its values. Of weights without heads (a classifier, masked image modelling, a detector) the
    backbone is loaded, with stage norms where there are some. Nothing is changed when the weights do not fit.

    Args:
        model: a segmenter, or a module that holds exactly one (a task).
        source: a weight file, a directory with one, or tensors by name.
        strict: raise when the weights do not fit; otherwise load what fits and report the rest.
        transfer, min_match, config: of the backbone, see ``load_weights``.
        heads: False: load the backbone and its stage norms alone.
        keep_meta: parameters on the meta device that the file does not have may stay there, to be initialised later.

    Returns: the report; names are those of the segmenter. ``share`` and ``elements`` are those of the backbone.

    Raises:
        UsageError: for weights that cannot be read or, when strict, do not fit: the message names the parts that differ.
    """
    return load_dense(
        KIND,
        model,
        source,
        strict=strict,
        transfer=transfer,
        min_match=min_match,
        heads=heads,
        config=config,
        keep_meta=keep_meta,
    )


def segmenter_to_mm(state: State, layout: Literal["official-dense", "mm"] = "official-dense") -> State:
    """Tensors of our segmenter under OpenMMLab's names.

    Args:
        layout: how the backbone is named: as in the published Swin segmentation code (V1 alone), or as in mmsegmentation.

    Raises:
        UsageError: for a backbone that the layout has no place for, and for tensors that are no segmenter of ours.
    """
    if layout not in ("official-dense", "mm"):
        raise UsageError(f"layout='{layout}' is not allowed for a segmenter: choose 'official-dense' or 'mm'.")
    backbone, heads = _divide(state)
    return {**from_official(backbone, layout), **heads}


def segmenter_to_transformers(state: State) -> State:
    """Tensors of our segmenter as files of transformers' ``UperNetForSemanticSegmentation`` name them.

    Raises:
        UsageError: for a backbone that transformers has no place for, and for tensors that are no segmenter of ours.
    """
    backbone, heads = _divide(state)
    if any(name.endswith("logit_scale") for name in backbone):
        raise UsageError(f"transformers cannot hold this model: {TRANSFORMERS_V2}.")
    named = from_official(backbone, "transformers")
    last = count(named, r"swin\.encoder\.layers\.(\d+)\.")
    out: State = {}
    for name, tensor in named.items():
        short = name.removeprefix("swin.")
        out[f"backbone.{re.sub(r'^layernorm[.]', f'hidden_states_norms.stage{last}.', short)}"] = tensor
    for name, tensor in heads.items():
        if norm := re.fullmatch(r"backbone\.norm(\d+)\.(\w+)", name):
            name = f"backbone.hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"
        out[name.replace(".bn.", ".batch_norm.").replace(".conv_seg.", ".classifier.")] = tensor
    return out


def _divide(state: State) -> tuple[State, State]:
    """Our backbone under its published names, and all else under OpenMMLab's."""
    root = next((m[1] or "" for m in map(BLOCK.fullmatch, state) if m and (m[1] or "").endswith("body.")), None)
    if root is None or not is_segmenter(state):
        raise UsageError("These are not the tensors of a segmenter of ours: pass segmenter.state_dict().")
    inside = {name.removeprefix(root.removesuffix("body.")): tensor for name, tensor in state.items()}
    heads: State = {}
    for name, tensor in inside.items():
        if name.startswith(BACKBONE):
            continue
        there = translate(name, TO_THEIRS)
        if there is None:
            raise UsageError(f"UPerNets of other projects have no place for '{name}': they cannot hold this model.")
        heads[there] = tensor
    return {n.removeprefix(BACKBONE): t for n, t in inside.items() if n.startswith(BACKBONE)}, heads


def _other_classes(name: str, file: tuple[int, ...], model: tuple[int, ...], theirs: State, ours: State) -> str:
    """Why a last layer stays as it is; "" if the number of classes does not explain the shapes."""
    classes = segmenter_parts(theirs).classes, segmenter_parts(ours).classes
    last = name.startswith(("decode.predict.", "auxiliary.predict."))
    if not last or not (file and model) or file[1:] != model[1:] or (file[0], model[0]) != classes:
        return ""
    return "new last layer: {} classes in the file, {} in the model".format(*classes)


def _compare(theirs: State, ours: State) -> Comparison:
    file, model = segmenter_parts(theirs), segmenter_parts(ours)
    if file.kind != model.kind:
        return Comparison(file.kind, model.kind, ["its heads are none of a UPerNet"], "Choose a UPerNet, or")
    compared = {**COMPARED, **(COMPARED_AUXILIARY if file.aux_channels and model.aux_channels else {})}
    advice = f"Build a model as the file has it ({describe_segmenter_parts(file)}), or"
    if not file.norms:
        advice = f"{TRANSFORMERS_V2[0].upper()}{TRANSFORMERS_V2[1:]}. You can"
    return Comparison(file.kind, model.kind, differences(file, model, compared), advice)


KIND = Kind(
    what="segmenters",
    modules=("body", "decode"),
    optional=("auxiliary.",),
    unread=(),
    open=open_segmenter,
    published=lambda name: translate(name, TO_THEIRS) is not None,
    describe=lambda heads: describe_segmenter_parts(segmenter_parts(heads)),
    other_classes=_other_classes,
    compare=_compare,
)
