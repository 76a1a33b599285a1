"""What a detector is, beside its backbone: one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swinscale.config import check_ranges
from swinscale.errors import UsageError

STAGES = 3
"""Box stages of a cascade."""


@dataclass(frozen=True)
class DetectConfig:
    """Options of object detection and instance segmentation. Defaults are those of the published Swin Mask R-CNN.

    Args:
        head: "mask_rcnn"; "cascade", three box stages of rising quality; or "htc", the hybrid task cascade, in which masks and
            a semantic map are interleaved with them.
        masks: predict masks too.
        frozen_stages: the patch embedding and so many of the backbone's stages are not trained.
        channels: of the feature pyramid and the heads' convolutions.
        fc_channels: of the heads' fully connected layers.
        class_agnostic: one box per region instead of one per region and class.
        box_loss: "l1", "smooth_l1", or "giou" on decoded boxes, with weight 10.
        anchor_scale: side of an anchor of ratio 1 in cells of its level.
        anchor_ratios: height over width.
        anchors_inside: in training, anchors that cross the border of the image are left out.
        rpn_box_loss: "l1", or "smooth_l1" with beta 1/9.
        proposals: regions per image that reach the head in training, and in use.
        proposals_per_level: best anchors of each level that compete for that, in training and in use.
        regions: sampled per image in training; a quarter of them on objects, as far as there are such.
        mask_size: side of predicted masks; twice the side of the regions that they are predicted from.
        semantic: with "htc", predict a semantic map too and add its features to those of each region.
        semantic_classes: classes of the semantic maps that come with the data; 0: the map is drawn from the objects, with one
            more class for what is none.
        global_attention: one attention layer over the whole last map (HTC++).
        score, limit: detections need this score; at most so many are kept per image.
        nms_iou: of two boxes of a class that overlap more, the worse one goes.
        soft_nms: instead it loses score, "linear" or "gaussian".
        test_short: short sides of the scales at which a picture is looked at, merged afterwards; (): the size of the data alone.
        test_long: longest side of these scales.
        test_ranges: for each of them the smallest and largest object (square root of its box, in pixels of the picture) that is
            taken from it; (): all from all.
        test_flip: look at the mirrored picture, too.
    """

    head: Literal["mask_rcnn", "cascade", "htc"] = "mask_rcnn"
    masks: bool = True
    frozen_stages: int = 0
    channels: int = 256
    fc_channels: int = 1024
    class_agnostic: bool = False
    box_loss: Literal["l1", "smooth_l1", "giou"] = "l1"
    anchor_scale: float = 8.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchors_inside: bool = False
    rpn_box_loss: Literal["l1", "smooth_l1"] = "l1"
    proposals: tuple[int, int] = (1000, 1000)
    proposals_per_level: tuple[int, int] = (2000, 1000)
    regions: int = 512
    mask_size: int = 28
    semantic: bool = False
    semantic_classes: int = 0
    global_attention: bool = False
    score: float = 0.05
    limit: int = 100
    nms_iou: float = 0.5
    soft_nms: Literal["none", "linear", "gaussian"] = "none"
    test_short: tuple[int, ...] = ()
    test_long: int = 1333
    test_ranges: tuple[tuple[float, float], ...] = ()
    test_flip: bool = False

    def __post_init__(self) -> None:
        counts = ("channels", "fc_channels", "proposals", "proposals_per_level", "regions", "limit", "test_long")
        ranges = {**dict.fromkeys(counts, "[1, inf)"), **dict.fromkeys(("anchor_scale", "anchor_ratios"), "(0, inf)")}
        ranges |= dict.fromkeys(("frozen_stages", "semantic_classes"), "[0, inf)") | {"test_short": "[1, inf)"}
        check_ranges(self, "task.", mask_size="[2, inf)", score="[0, 1)", nms_iou="(0, 1]", **ranges)
        if self.mask_size % 2:
            raise UsageError(f"task.mask_size={self.mask_size} must be even: masks are twice as fine as their regions.")
        if self.test_ranges and len(self.test_ranges) != len(self.test_short):
            raise UsageError(
                f"task.test_ranges has {len(self.test_ranges)} entries, task.test_short {len(self.test_short)}: give one range for "
                f"each scale, or none."
            )
        if not self.anchor_ratios:
            raise UsageError("task.anchor_ratios=() is not allowed: name at least one ratio.")
        if self.semantic and self.head != "htc":
            raise UsageError(f"task.semantic=True belongs to task.head='htc', not to '{self.head}'.")

    def semantic_outputs(self, num_classes: int) -> int:
        """Classes of the semantic map for a detector of ``num_classes``."""
        return self.semantic_classes or num_classes + 1
