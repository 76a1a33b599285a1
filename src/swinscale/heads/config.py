"""What a detector or a segmenter is, beside its backbone: a frozen dataclass each."""

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


@dataclass(frozen=True)
class SegmentConfig:
    """Options of semantic segmentation. Defaults are those of the published Swin UPerNet.

    Args:
        channels: of the pyramid pooling, the feature pyramid and their fusion.
        pool_scales: cells per side of the pooled maps.
        dropout: share of the channels that training leaves out before the last layer.
        aux_channels: of the auxiliary head, which in training predicts the classes from the map of ``aux_stage``, too.
        aux_stage: number of that stage, from 0.
        aux_weight: of its loss; 0: there is no auxiliary head.
        class_weights: a factor on the loss of each class, for classes that are rare; (): none.
        frozen_stages: the patch embedding and so many of the backbone's stages are not trained.
        test_short, test_long: in evaluation and use the short side of a picture becomes this many pixels, unless the long side would
            become longer than that; ``test_short=0``: pictures stay as they are.
        test_ratios: sizes at which a picture is looked at, as factors on the size above; probabilities are averaged.
        test_flip: look at the mirrored picture, too.
        test_crop: side of a window that slides over the picture; logits are averaged where windows overlap. 0: the whole picture.
        test_stride: by how much the window moves; 0: two thirds of its side.
        test_antialias: average over all pixels where a picture becomes smaller. False: as OpenCV resizes, with which the published
            figures were made.
    """

    channels: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    aux_channels: int = 256
    aux_stage: int = 2
    aux_weight: float = 0.4
    class_weights: tuple[float, ...] = ()
    frozen_stages: int = 0
    test_short: int = 512
    test_long: int = 2048
    test_ratios: tuple[float, ...] = (1.0,)
    test_flip: bool = False
    test_crop: int = 0
    test_stride: int = 0
    test_antialias: bool = True

    def __post_init__(self) -> None:
        at_least_0 = (
            "aux_stage",
            "aux_weight",
            "class_weights",
            "frozen_stages",
            "test_short",
            "test_crop",
            "test_stride",
        )
        at_least_1 = ("channels", "pool_scales", "aux_channels", "test_long")
        ranges = {**dict.fromkeys(at_least_0, "[0, inf)"), **dict.fromkeys(at_least_1, "[1, inf)")}
        check_ranges(self, "task.", dropout="[0, 1)", test_ratios="(0, inf)", **ranges)
        if not self.pool_scales or not self.test_ratios:
            raise UsageError(
                "task.pool_scales and task.test_ratios need at least one number each; the published: (1,2,3,6), (1.0)."
            )
        if self.test_long < self.test_short:
            raise UsageError(
                f"task.test_long={self.test_long} is less than task.test_short={self.test_short}: the long side cannot be shorter."
            )
        if self.test_stride > self.test_crop:
            raise UsageError(
                f"task.test_stride={self.test_stride} is more than task.test_crop={self.test_crop}: pixels between windows would "
                f"not be seen."
            )
