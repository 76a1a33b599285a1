"""Cascade Mask R-CNN (Cai and Vasconcelos, arXiv 1906.09756): three box heads, each of which learns from the boxes of the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from swinscale.heads.config import STAGES, DetectConfig
from swinscale.heads.detections import Detections
from swinscale.heads.roi import (
    POOLED,
    BoxHead,
    MaskHead,
    Sampled,
    Sizes,
    final_boxes,
    mask_loss,
    mask_regions,
    pool,
    sample,
    with_masks,
)
from swinscale.heads.rpn import Targets

OVERLAP = (0.5, 0.6, 0.7)
"""IoU with an object from which a region counts as on it, in each stage."""
WEIGHT = (1.0, 0.5, 0.25)
"""Of the losses of each stage."""
Pooled = Callable[[Sequence[Tensor]], Tensor]
DEVIATIONS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
"""Of the box deltas of each stage."""


class CascadeHead(nn.Module):
    """Regions → classes, boxes and masks in three stages; four convolutions and a linear layer in each box head.

    In use, class probabilities and masks are means over the stages' heads, and boxes are those of the last one.

    Args:
        strides: pixels per cell of the levels that regions are pooled from.
    """

    def __init__(self, config: DetectConfig, num_classes: int, strides: Sequence[int]):
        super().__init__()
        self.config, self.num_classes, self.strides = config, num_classes, tuple(strides)
        self.box_heads = nn.ModuleList(BoxHead(config, num_classes, 4, 1, DEVIATIONS[stage]) for stage in range(STAGES))
        self.mask_heads = nn.ModuleList(
            MaskHead(config, num_classes, carries=config.head == "htc" and stage > 0)
            for stage in range(STAGES if config.masks else 0)
        )

    def box_head(self, stage: int) -> BoxHead:
        """The box head of a stage."""
        return cast(BoxHead, self.box_heads[stage])

    def mask_head(self, stage: int) -> MaskHead:
        """The mask head of a stage."""
        return cast(MaskHead, self.mask_heads[stage])

    def sample(self, stage: int, proposals: Sequence[Tensor], targets: Targets) -> Sampled:
        """The regions that a stage learns from."""
        return sample(proposals, targets, OVERLAP[stage], self.config.regions, self.num_classes)

    def proposals_after(
        self, stage: int, logits: Tensor, deltas: Tensor, regions: Sampled, sizes: Sizes
    ) -> list[Tensor]:
        """The regions as a stage has moved them, without those that were the boxes of objects."""
        moved = self.box_head(stage).refine(logits, deltas, regions.boxes, sizes, regions.labels)
        given = regions.given.split([len(b) for b in regions.boxes])
        return [real(m[~g]) for m, g in zip(moved, given, strict=True)]

    def forward(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes, targets: Targets
    ) -> dict[str, Tensor]:
        """The losses of one batch; ``maps`` (B, C, h, w) of each level, ``proposals`` (n, 4) of each image."""
        losses: dict[str, Tensor] = {}
        for stage in range(STAGES):
            regions = self.sample(stage, proposals, targets)
            logits, deltas = self.box_head(stage)(pool(maps, self.strides, regions.boxes, POOLED))
            found = self.box_head(stage).losses(logits, deltas, regions)
            if self.config.masks:
                pooled = pool(maps, self.strides, mask_regions(regions), self.config.mask_size // 2)
                head = self.mask_head(stage)
                found["mask"] = mask_loss(head(head.features(pooled)), regions, targets)
            losses |= {f"{name}{stage}": WEIGHT[stage] * loss for name, loss in found.items()}
            if stage + 1 < STAGES:
                proposals = self.proposals_after(stage, logits, deltas, regions, sizes)
        return losses

    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes) -> list[Detections]:
        """What is in each image."""
        found = self.detect_boxes(lambda boxes: pool(maps, self.strides, boxes, POOLED), proposals, sizes)
        if self.config.masks:
            pooled = pool(maps, self.strides, [f.boxes for f in found], self.config.mask_size // 2)
            heads = [self.mask_head(stage) for stage in range(STAGES)]
            masks = torch.stack([head(head.features(pooled)).sigmoid() for head in heads]).mean(0)
            found = with_masks(found, masks)
        return found

    def detect_boxes(self, pooled: Pooled, proposals: Sequence[Tensor], sizes: Sizes) -> list[Detections]:
        """The detections without masks; ``pooled`` gives the regions' features (N, C, 7, 7)."""
        boxes, total = list(proposals), torch.zeros(())
        for stage in range(STAGES):
            head = self.box_head(stage)
            logits, deltas = head(pooled(boxes))
            total = total.to(logits) + logits.softmax(-1) / STAGES
            if stage + 1 < STAGES:
                boxes = head.refine(logits, deltas, boxes, sizes)
        places = head.decode(deltas, torch.cat(boxes))
        return final_boxes(total, places, [len(b) for b in boxes], sizes, self.config)


def real(boxes: Tensor) -> Tensor:
    """Those of the boxes (n, 4) that still have an area."""
    return boxes[((boxes[:, 2:] - boxes[:, :2]) > 1e-3).all(1)]
