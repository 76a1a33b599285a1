"""What the tensors of a detector are: OpenMMLab's names and ours, and the parts that tell one detector from another."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from swinscale.weights.files import State
from swinscale.weights.report import some

PAIRS = (
    ("body.norms.{i}", "backbone.norm{i}"),
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


def _rows(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    numbered = ((re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(frm)), to) for frm, to in pairs)
    return [(re.compile(rf"{pattern}\.(?P<leaf>\w+)"), to + ".{leaf}") for pattern, to in numbered]


TO_OURS = _rows((theirs, ours) for ours, theirs in PAIRS)
TO_THEIRS = _rows(PAIRS)

BACKBONE = "body.backbone."
BLOCK = re.compile(r"(.*\.)?backbone\.(?:layers|stages)\.(\d+)\.blocks\.0\.norm1\.weight")
HEADS = re.compile(r"(neck|(rpn|roi|bbox|mask)_head|fpn|rpn|roi)\.")
"""Beginnings of the names of a detector's parts, of detectors that we do not have too."""
BRANCHES = ("roi.mask_heads.", "roi.semantic.")
DETECTOR = re.compile(r"(.*\.)?(roi_head\.bbox_head\.(\d+\.)?fc_cls|roi\.box_heads\.\d+\.classify)\.weight")


class DetectorFile(NamedTuple):
    """What a file holds.

    Args:
        backbone: its tensors as they were named, for ``load_weights``.
        heads: tensors of all else under our names, stage norms included.
        names: our name → the name in the file.
        unknown: names of tensors that no detector of ours has.
        notes: a line about each group that was not looked at.
    """

    backbone: State
    heads: State
    names: dict[str, str]
    unknown: list[str]
    notes: list[str]

    @property
    def has_heads(self) -> bool:
        """Whether there is more than a backbone with stage norms."""
        return bool(self.unknown) or any(not name.startswith("body.") for name in self.heads)


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


def translate(name: str, rows: list[tuple[re.Pattern[str], str]]) -> str | None:
    """The name of a tensor on the other side, None where it has none. ``rows``: ``TO_OURS`` or ``TO_THEIRS``."""
    found = ((pattern.fullmatch(name), to) for pattern, to in rows)
    return next((to.format(**match.groupdict()) for match, to in found if match), None)


def open_detector(state: State) -> DetectorFile:
    """Sorts the tensors of a file. Of several models in one the teacher counts, then the one with the shortest prefix."""
    blocks = [match for match in map(BLOCK.fullmatch, state) if match]
    if not blocks:
        return DetectorFile(state, {}, {}, [], [])  # a backbone alone
    roots = {(match[1] or "").removesuffix("body.") for match in blocks}
    root = min(roots, key=lambda r: ("teacher" not in r, len(r), r))
    ours = any((match[1] or "") == f"{root}body." for match in blocks)
    last = max(int(match[2]) for match in blocks if (match[1] or "").startswith(root))
    file = DetectorFile({}, {}, {}, [], [])
    others: dict[str, int] = {}
    rest: State = {}
    for name, tensor in state.items():
        short = name.removeprefix(root)
        if not name.startswith(root) or re.match(r"ema_\w+$", short):
            group = name.split(".")[0] if not name.startswith(root) else "ema_…"
            others[group] = others.get(group, 0) + 1
            continue
        if ours:
            new = None if short.startswith(BACKBONE) else short
        else:
            new = translate(re.sub(r"^(roi_head\.(?:bbox|mask)_head)\.(?!\d)", r"\1.0.", short), TO_OURS)
        if new is not None and new != f"body.norms.{last}.{new.rpartition('.')[2]}":
            file.heads[new], file.names[new] = tensor, name
        elif short.startswith(("backbone.", BACKBONE)):
            file.backbone[short.removeprefix("body.")] = tensor
        elif HEADS.match(short):
            file.unknown.append(name)
        else:
            rest[short] = tensor
    if file.has_heads:
        file.unknown.extend(root + short for short in rest)
    else:
        file.backbone.update(rest)  # of a classifier or a segmenter: ``load_weights`` says what it leaves out
    if others:
        groups = some(sorted(others), 6)
        file.notes.append(f"{sum(others.values())} tensors of other copies of the model ({groups})")
    return file


def branches(heads: State) -> set[str]:
    """Beginnings of names of the parts that a detector may have or not: masks, and a semantic map."""
    return {branch for branch in BRANCHES if any(name.startswith(branch) for name in heads)}


def differences(file: Parts, model: Parts) -> list[str]:
    """A line about each part that differs; branches that only one side has are none."""
    found = []
    optional = {"semantic"} | ({"masks", "carries"} if 0 in (file.masks, model.masks) else set())
    for field, what in COMPARED.items():
        if field in optional:
            continue
        theirs, ours = getattr(file, field), getattr(model, field)
        if theirs != ours and "" not in (theirs, ours):
            found.append(f"{what}: {theirs} in the file, {ours} in the model")
    return found


def parts_of(heads: State) -> Parts:
    """Parts of a detector from tensors under our names, the backbone not needed."""

    def count(pattern: str) -> int:
        return len({match[1] for match in (re.match(pattern, name) for name in heads) if match})

    def layers(head: str, kind: str) -> str:
        """How many a head has; "" where there is no such head."""
        there = any(name.startswith(f"{head}.") for name in heads)
        return str(count(rf"{re.escape(head)}\.{kind}\.(\d+)\.")) if there else ""

    def shape(name: str, axis: int) -> int:
        return heads[name].shape[axis] if name in heads else 0

    box, mask = "roi.box_heads.0", "roi.mask_heads.0"
    classes = max(shape(f"{box}.classify.weight", 0) - 1, 0)
    inner = count(r"fpn\.inner_blocks\.(\d+)\.")
    convs = layers(box, "convs")
    normed = f"{box}.convs.0.1.weight" in heads
    return Parts(
        boxes=count(r"roi\.box_heads\.(\d+)\."),
        masks=count(r"roi\.mask_heads\.(\d+)\."),
        classes=classes,
        widths="-".join(str(shape(f"fpn.inner_blocks.{i}.0.weight", 1)) for i in range(inner)),
        channels=shape("fpn.layer_blocks.0.0.weight", 0),
        levels=count(r"fpn\.layer_blocks\.(\d+)\."),
        anchors=shape("rpn.head.cls_logits.weight", 0),
        convs=convs,
        fcs=layers(box, "fcs"),
        norm="" if convs in ("", "0") else "BatchNorm" if normed else "none",
        regress=_per_class(shape(f"{box}.regress.weight", 0), 4, classes),
        mask_convs=layers(mask, "convs"),
        predict=_per_class(shape(f"{mask}.predict.weight", 0), 1, classes),
        carries=count(r"roi\.mask_heads\.([1-9]\d*)\.carry\."),
        semantic="yes" if "roi.semantic.predict.weight" in heads else "no",
    )


def _per_class(rows: int, unit: int, classes: int) -> str:
    """Whether a layer has ``unit`` rows or so many for each class; with one class both are the same."""
    if not rows or classes <= 1:
        return ""
    return {unit: "class-agnostic", unit * classes: "class-specific"}.get(rows, f"{rows} numbers")


def describe_parts(parts: Parts) -> str:
    """ "Mask R-CNN, 80 classes, …"."""

    def number(count: int, what: str) -> str:
        return f"{count} {what}{'' if count == 1 else 's'}"

    text = f"{parts.kind}, {parts.classes} class{'' if parts.classes == 1 else 'es'}"
    text += f", pyramid of {number(parts.channels, 'channel')}, {number(parts.anchors, 'anchor')} a place"
    layers = ((parts.convs, "convolution"), (parts.fcs, "fully connected layer"))
    inside = " and ".join(number(int(count), what) for count, what in layers if count not in ("", "0"))
    if parts.boxes:
        norm = f" ({parts.norm})" if parts.norm == "BatchNorm" else ""
        text += f", {number(parts.boxes, 'box head')} of {inside or 'no layers'}{norm}"
    text += f", {parts.regress} boxes" if parts.regress else ""
    text += f", {number(parts.masks, 'mask head')}" if parts.masks else ""
    return text + (", semantic branch" if parts.semantic == "yes" else "")
