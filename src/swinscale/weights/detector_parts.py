"""What the tensors of a detector are: OpenMMLab's names and ours, and the parts that tell one detector from another."""

from __future__ import annotations

import re
from dataclasses import dataclass

from swinscale.weights import dense_parts
from swinscale.weights.dense_parts import STAGE_NORMS, DenseFile, count, number, open_dense, rows, side, translate
from swinscale.weights.files import State

PAIRS = (
    STAGE_NORMS,
    ("fpn.inner_blocks.{i}.0", "neck.lateral_convs.{i}.conv"),
    ("fpn.layer_blocks.{i}.0", "neck.fpn_convs.{i}.conv"),
    ("rpn.head.conv.0.0", "rpn_head.rpn_conv"),
    ("rpn.head.cls_logits", "rpn_head.rpn_cls"),
    ("rpn.head.bbox_pred", "rpn_head.rpn_reg"),
    ("roi.box_heads.{s}.convs.{i}.0", "roi_head.bbox_head.{s}.shared_convs.{i}.conv"),
    ("roi.box_heads.{s}.convs.{i}.1", "roi_head.bbox_head.{s}.shared_convs.{i}.bn"),
    ("roi.box_heads.{s}.fcs.{i}", "roi_head.bbox_head.{s}.shared_fcs.{i}"),
    ("roi.box_heads.{s}.classify", "roi_head.bbox_head.{s}.fc_cls"),
    ("roi.box_heads.{s}.regress", "roi_head.bbox_head.{s}.fc_reg"),
    ("roi.mask_heads.{s}.convs.{i}.0", "roi_head.mask_head.{s}.convs.{i}.conv"),
    ("roi.mask_heads.{s}.upsample", "roi_head.mask_head.{s}.upsample"),
    ("roi.mask_heads.{s}.predict", "roi_head.mask_head.{s}.conv_logits"),
    ("roi.mask_heads.{s}.carry.0", "roi_head.mask_head.{s}.conv_res.conv"),
    ("roi.semantic.laterals.{i}.0", "roi_head.semantic_head.lateral_convs.{i}.conv"),
    ("roi.semantic.convs.{i}.0", "roi_head.semantic_head.convs.{i}.conv"),
    ("roi.semantic.embed.0", "roi_head.semantic_head.conv_embedding.conv"),
    ("roi.semantic.predict", "roi_head.semantic_head.conv_logits"),
)
"""(our name of a module, OpenMMLab's). ``{s}`` is the stage of a cascade; with one stage alone theirs leave it out."""

TO_OURS = rows((theirs, ours) for ours, theirs in PAIRS)
TO_THEIRS = rows(PAIRS)

OWN = ("body.", "attention.", "fpn.", "rpn.", "roi.")
"""Beginnings of the names of our modules."""
HEADS = re.compile(r"(neck|(rpn|roi|bbox|mask)_head|fpn|rpn|roi)\.")
"""Beginnings of the names of a detector's parts, of detectors that we do not have too."""
OPTIONAL = ("roi.mask_heads.", "roi.semantic.")
"""Masks, and a semantic map."""
UNREAD = ("roi.mask_heads.0.carry.",)
"""Old files of HTC have a layer that nothing reads."""
DETECTOR = re.compile(r"(.*\.)?(roi_head\.bbox_head\.(\d+\.)?fc_cls|roi\.box_heads\.\d+\.classify)\.weight")


@dataclass(frozen=True)
class Parts:
    """What a detector is made of, as far as its tensors tell. Texts are "" where these leave it open."""

    boxes: int
    masks: int
    classes: int
    widths: str
    channels: int
    levels: int
    anchors: int
    convs: str
    fcs: str
    norm: str
    regress: str
    mask_convs: str
    predict: str
    carries: int
    semantic: str

    @property
    def kind(self) -> str:
        """What such a detector is called."""
        if not self.boxes:
            return "another kind of detector"
        if self.carries or self.semantic == "yes":
            return "HTC"
        if self.boxes > 1:
            return "Cascade Mask R-CNN" if self.masks else "Cascade R-CNN"
        return "Mask R-CNN" if self.masks else "Faster R-CNN"


COMPARED = {
    "boxes": "box heads",
    "masks": "mask heads",
    "semantic": "semantic branch",
    "carries": "mask heads that take in the one before",
    "widths": "widths of the maps below the pyramid",
    "levels": "levels of the pyramid",
    "channels": "channels of the pyramid",
    "anchors": "anchors a place",
    "convs": "convolutions in a box head",
    "fcs": "fully connected layers in a box head",
    "norm": "norm after these convolutions",
    "regress": "boxes",
    "mask_convs": "convolutions in a mask head",
    "predict": "masks",
}
"""Parts that must be the same, and what a message calls them. The number of classes may differ."""


def open_detector(state: State) -> DenseFile:
    """Sorts the tensors of a file. Of several models in one the teacher counts, then the one with the shortest prefix."""
    return open_dense(state, _to_ours, OWN, HEADS)


def _to_ours(name: str) -> str | None:
    """Of a head that is the only one OpenMMLab leaves out the number."""
    return translate(re.sub(r"^(roi_head\.(?:bbox|mask)_head)\.(?!\d)", r"\1.0.", name), TO_OURS)


def differences(file: Parts, model: Parts) -> list[str]:
    """A line about each part that differs; branches that only one side has are none."""
    optional = {"semantic"} | ({"masks", "carries"} if 0 in (file.masks, model.masks) else set())
    compared = {field: what for field, what in COMPARED.items() if field not in optional}
    return dense_parts.differences(file, model, compared)


def parts_of(heads: State) -> Parts:
    """Parts of a detector from tensors under our names, the backbone not needed."""

    def layers(head: str, kind: str) -> str:
        """How many a head has; "" where there is no such head."""
        there = any(name.startswith(f"{head}.") for name in heads)
        return str(count(heads, rf"{re.escape(head)}\.{kind}\.(\d+)\.")) if there else ""

    box, mask = "roi.box_heads.0", "roi.mask_heads.0"
    classes = max(side(heads, f"{box}.classify.weight", 0) - 1, 0)
    inner = count(heads, r"fpn\.inner_blocks\.(\d+)\.")
    convs = layers(box, "convs")
    normed = f"{box}.convs.0.1.weight" in heads
    return Parts(
        boxes=count(heads, r"roi\.box_heads\.(\d+)\."),
        masks=count(heads, r"roi\.mask_heads\.(\d+)\."),
        classes=classes,
        widths="-".join(str(side(heads, f"fpn.inner_blocks.{i}.0.weight", 1)) for i in range(inner)),
        channels=side(heads, "fpn.layer_blocks.0.0.weight", 0),
        levels=count(heads, r"fpn\.layer_blocks\.(\d+)\."),
        anchors=side(heads, "rpn.head.cls_logits.weight", 0),
        convs=convs,
        fcs=layers(box, "fcs"),
        norm="" if convs in ("", "0") else "BatchNorm" if normed else "none",
        regress=_per_class(side(heads, f"{box}.regress.weight", 0), 4, classes),
        mask_convs=layers(mask, "convs"),
        predict=_per_class(side(heads, f"{mask}.predict.weight", 0), 1, classes),
        carries=count(heads, r"roi\.mask_heads\.([1-9]\d*)\.carry\."),
        semantic="yes" if "roi.semantic.predict.weight" in heads else "no",
    )


def _per_class(rows: int, unit: int, classes: int) -> str:
    """Whether a layer has ``unit`` rows or so many for each class; with one class both are the same."""
    if not rows or classes <= 1:
        return ""
    return {unit: "class-agnostic", unit * classes: "class-specific"}.get(rows, f"{rows} numbers")


def describe_parts(parts: Parts) -> str:
    """ "Mask R-CNN, 80 classes, …"."""
    text = f"{parts.kind}, {number(parts.classes, 'class')}"
    text += f", pyramid of {number(parts.channels, 'channel')}, {number(parts.anchors, 'anchor')} a place"
    layers = ((parts.convs, "convolution"), (parts.fcs, "fully connected layer"))
    inside = " and ".join(number(int(many), what) for many, what in layers if many not in ("", "0"))
    if parts.boxes:
        norm = f" ({parts.norm})" if parts.norm == "BatchNorm" else ""
        text += f", {number(parts.boxes, 'box head')} of {inside or 'no layers'}{norm}"
    text += f", {parts.regress} boxes" if parts.regress else ""
    text += f", {number(parts.masks, 'mask head')}" if parts.masks else ""
    return text + (", semantic branch" if parts.semantic == "yes" else "")
