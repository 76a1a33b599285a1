"""Mask R-CNN (He et al., arXiv 1703.06870) with two linear layers over each region, as in the published Swin detectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swinscale.heads.config import DetectConfig
from swinscale.heads.detections import Detections
from swinscale.heads.roi import (
    POOLED,
    BoxHead,
    MaskHead,
    Sizes,
    final_boxes,
    mask_loss,
    mask_regions,
    pool,
    sample,
    with_masks,
)
from swinscale.heads.rpn import Targets


class MaskRCNNHead(nn.Module):
    """Regions → classes, boxes and masks.

    Args:
        strides: pixels per cell of the levels that regions are pooled from.
    """

    def __init__(self, config: DetectConfig, num_classes: int, strides: Sequence[int]):
        super().__init__()
        self.config, self.num_classes, self.strides = config, num_classes, tuple(strides)
        self.box_heads = nn.ModuleList([BoxHead(config, num_classes, convs=0, fcs=2)])
        self.mask_heads = nn.ModuleList([MaskHead(config, num_classes)] if config.masks else [])

    def forward(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes, targets: Targets
    ) -> dict[str, Tensor]:
        """The losses of one batch; ``maps`` (B, C, h, w) of each level, ``proposals`` (n, 4) of each image."""
        regions = sample(proposals, targets, 0.5, self.config.regions, self.num_classes)
        head = self.box_heads[0]
        losses = head.losses(*head(pool(maps, self.strides, regions.boxes, POOLED)), regions)  # type: ignore[operator]
        for mask_head in self.mask_heads:
            pooled = pool(maps, self.strides, mask_regions(regions), self.config.mask_size // 2)
            losses["mask"] = mask_loss(mask_head(mask_head.features(pooled)), regions, targets)  # type: ignore[operator]
        return losses

    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes) -> list[Detections]:
        """What is in each image."""
        head = self.box_heads[0]
        logits, deltas = head(pool(maps, self.strides, proposals, POOLED))
        boxes = head.decode(deltas, torch.cat(list(proposals)))  # type: ignore[operator]
        found = final_boxes(logits.softmax(-1), boxes, [len(p) for p in proposals], sizes, self.config)
        for mask_head in self.mask_heads:
            pooled = pool(maps, self.strides, [f.boxes for f in found], self.config.mask_size // 2)
            found = with_masks(found, mask_head(mask_head.features(pooled)).sigmoid())  # type: ignore[operator]
        return found
