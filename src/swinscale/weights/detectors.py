"""Detectors as OpenMMLab names them, with a Swin Transformer inside, into ours and the way back.

Mask R-CNN, Cascade Mask R-CNN and Hybrid Task Cascade, and the same without masks. The backbone is in the published dense
form or in OpenMMLab's, and goes through ``load_weights``; everything else only changes its name. Both sides put the
background last, order anchors and pooled features alike, and count boxes class by class, so no number moves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Literal

from torch import nn

from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.weights.dense_load import Comparison, Kind, load_dense
from swinscale.weights.dense_parts import BACKBONE, BLOCK, translate
from swinscale.weights.detector_parts import (
    DETECTOR,
    OPTIONAL,
    TO_THEIRS,
    UNREAD,
    describe_parts,
    differences,
    open_detector,
    parts_of,
)
from swinscale.weights.files import State
from swinscale.weights.layouts import from_official
from swinscale.weights.report import LoadReport
from swinscale.weights.resize import BiasMethod


def is_detector(names: Iterable[str]) -> bool:
    """Whether these are names of a two-stage detector, OpenMMLab's or ours."""
    return any(DETECTOR.fullmatch(name) for name in names)


def describe_detector(state: State) -> str:
    """What a detector is: "Mask R-CNN, 80 classes, pyramid of 256 channels, …". Tensors may be on ``meta``.

    Raises:
        UsageError: if it is none.
    """
    if not is_detector(state):
        raise UsageError(
            "These are not the weights of a two-stage detector: none is named roi_head.bbox_head.fc_cls.weight "
            "(OpenMMLab) or roi.box_heads.0.classify.weight."
        )
    return describe_parts(parts_of(open_detector(state).heads))


def load_detector(
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
    """Loads a detector of OpenMMLab, of the published Swin detection code or of ours into ``model``, in place.

    Where the classes differ in number, the last layers that count them keep their values and all else is loaded. A branch for masks
    or for a semantic map that only one side has is left out, or keeps its values. Of weights
    without heads (a classifier, masked image modelling, segmentation) the backbone is loaded, with stage norms where
    there are some. Nothing is changed when the weights do not fit.

    Args:
        model: a detector, or a module that holds exactly one (a task).
        source: a weight file, a directory with one, or tensors by name.
        strict: raise when the weights do not fit; otherwise load what fits and report the rest.
        transfer, min_match, config: of the backbone, see ``load_weights``.
        keep_meta: parameters on the meta device that the file does not have may stay there, to be initialised later.
        heads: False: load the backbone and its stage norms alone.

    Returns: the report; names are those of the detector. ``share`` and ``elements`` are those of the backbone.

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


def detector_to_mm(state: State, layout: Literal["official-dense", "mm"] = "official-dense") -> State:
    """Tensors of our detector under OpenMMLab's names.

    Args:
        layout: how the backbone is named: as in the published Swin detection code (V1 alone), or as in mmdetection.

    Raises:
        UsageError: for a backbone or a part that the layout has no place for, and for tensors that are no detector of ours.
    """
    if layout not in ("official-dense", "mm"):
        raise UsageError(f"layout='{layout}' is not allowed for a detector: choose 'official-dense' or 'mm'.")
    root = next((m[1] or "" for m in map(BLOCK.fullmatch, state) if m and (m[1] or "").endswith("body.")), None)
    if root is None or not is_detector(state):
        raise UsageError("These are not the tensors of a detector of ours: pass detector.state_dict().")
    root = root.removesuffix("body.")
    inside = {name.removeprefix(root): tensor for name, tensor in state.items()}
    out = from_official({n.removeprefix(BACKBONE): t for n, t in inside.items() if n.startswith(BACKBONE)}, layout)
    single = not any(name.startswith("roi.box_heads.1.") for name in inside)
    for name, tensor in inside.items():
        if name.startswith(BACKBONE):
            continue
        there = translate(name, TO_THEIRS)
        if there is None:
            raise UsageError(f"OpenMMLab's detectors have no place for '{name}': they cannot hold this model.")
        out[re.sub(r"^(roi_head\.(bbox|mask)_head)\.0\.", r"\1.", there) if single else there] = tensor
    return out


def _other_classes(name: str, file: tuple[int, ...], model: tuple[int, ...], theirs: State, ours: State) -> str:
    """Why a last layer that counts classes stays as it is; "" if the number of classes does not explain the shapes."""
    if file[1:] != model[1:] or not (file and model):
        return ""
    classes = parts_of(theirs).classes, parts_of(ours).classes
    layer, rows = name.split(".")[-2], (file[0], model[0])
    if name.startswith("roi.semantic.predict."):
        return "new last layer: {} semantic classes in the file, {} in the model".format(*rows)
    unit, more = {"classify": (1, 1), "regress": (4, 0), "predict": (1, 0)}.get(layer, (0, 0))
    counted = rows == tuple(unit * count + more for count in classes)
    return "new last layer: {} classes in the file, {} in the model".format(*classes) if counted else ""


def _compare(theirs: State, ours: State) -> Comparison:
    file, model = parts_of(theirs), parts_of(ours)
    advice = f"Build a model as the file has it ({file.kind}), or" if file.boxes else "Choose a two-stage detector, or"
    return Comparison(file.kind, model.kind, differences(file, model), advice)


KIND = Kind(
    what="detectors",
    modules=("body", "fpn", "rpn", "roi"),
    optional=OPTIONAL,
    unread=UNREAD,
    open=open_detector,
    published=lambda name: translate(name, TO_THEIRS) is not None,
    describe=lambda heads: describe_parts(parts_of(heads)),
    other_classes=_other_classes,
    compare=_compare,
)
