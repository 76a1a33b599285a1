"""Detectors of a few thousand parameters, with targets to learn from; for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from random_models import randomise
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.models import SwinConfig, SwinTransformer

FOUR = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "embed_dim": 8, "img_size": 64, "window_size": 4}
DENSE = {**FOUR, "num_classes": 0, "small_map": "pad", "drop_path_rate": 0.0}
"""Of a backbone of four stages, as recipes of detection build it."""
SMALL = {"channels": 16, "fc_channels": 32, "anchor_scale": 4.0, "regions": 32, "proposals": (40, 40),
         "proposals_per_level": (60, 60), "mask_size": 14}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {},
    "cascade": {"head": "cascade", "box_loss": "giou", "rpn_box_loss": "smooth_l1", "anchors_inside": True},
    "htc": {"head": "htc", "box_loss": "smooth_l1", "class_agnostic": True, "semantic": True, "global_attention": True},
}
PAD = {1: "legacy", 2: "exact"}


def small_config(kind: str = "mask_rcnn", **fields: Any) -> DetectConfig:
    """The heads of ``HEADS``, narrow."""
    return DetectConfig(**{**SMALL, **HEADS[kind], **fields})


def small_detector(
    kind: str = "mask_rcnn", version: int = 1, classes: int = 3, backbone: dict[str, Any] | None = None, **fields: Any
) -> Detector:
    """A detector in training mode; no parameter has a trivial value, and scores do not saturate."""
    swin = SwinTransformer(SwinConfig(version=version, pad=PAD[version], **{**DENSE, **(backbone or {})}))
    detector = randomise(Detector(swin, classes, small_config(kind, **fields)))
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.startswith(("rpn.", "roi.", "fpn.")) and parameter.ndim > 1:
                parameter.mul_(0.3)
    return detector.train()


def rectangle_targets(
    sizes: list[tuple[int, int]], classes: int = 3, each: int = 2, seed: int = 0
) -> list[dict[str, Tensor]]:
    """For each image ``each`` boxes with masks that fill them, and the semantic map made of them."""
    draw, targets = torch.Generator().manual_seed(seed), []
    for height, width in sizes:
        far = torch.tensor([width, height])
        corner = (torch.rand(each, 2, generator=draw) * far / 2).floor()
        side = (1 + torch.rand(each, 2, generator=draw) * far / 3).floor()
        boxes = torch.cat([corner, torch.minimum(corner + side, far)], 1)
        labels = torch.randint(classes, (each,), generator=draw)
        masks, semantic = torch.zeros(each, height, width, dtype=torch.bool), torch.full((height, width), classes)
        for mask, (x1, y1, x2, y2), label in zip(masks, boxes.int().tolist(), labels.tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
            semantic[mask] = label
        targets.append({"boxes": boxes, "labels": labels, "masks": masks, "semantic": semantic})
    return targets
