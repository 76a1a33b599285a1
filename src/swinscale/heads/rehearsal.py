"""A detector's training pass as it is when there is much to find: for the prediction of memory, on tensors without content.

How much a detector keeps depends on what it finds, and tensors without content hold nothing to find. Here the numbers are
given: ``OBJECTS`` annotated per image, as many sampled anchors and regions as the settings allow, a quarter of the regions on
objects, and every level of the pyramid with an equal share of them. The layers are the detector's own; only what chooses among
boxes is replaced, by something of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.heads.cascade import CascadeHead
from swinscale.heads.config import DetectConfig
from swinscale.heads.htc import LEVEL, HTCHead
from swinscale.heads.mask_rcnn import MaskRCNNHead
from swinscale.heads.roi import POOLED, BoxHead, MaskHead, Sizes
from swinscale.heads.rpn import RPN, Targets
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.models.detection.rpn import concat_box_prediction_layers  # noqa: E402
from torchvision.ops import box_iou  # noqa: E402

OBJECTS = 32
"""Annotated in an image. COCO has seven on average; each takes a mask of the image's size, and a row in a matrix over all anchors."""


def usual_targets(images: Tensor, config: DetectConfig) -> list[dict[str, Tensor]]:
    """What is annotated in a batch (B, C, H, W) with many objects, without content."""
    size = tuple(images.shape[-2:])
    target: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "boxes": ((OBJECTS, 4), torch.float32),
        "labels": ((OBJECTS,), torch.int64),
    }
    target |= {"masks": ((OBJECTS, *size), torch.bool)} if config.masks else {}
    target |= {"semantic": (size, torch.int64)} if config.semantic else {}
    return [
        {name: images.new_empty(shape, dtype=dtype) for name, (shape, dtype) in target.items()}
        for _ in range(len(images))
    ]


def rpn_loss(rpn: RPN, maps: Sequence[Tensor], targets: Targets) -> Tensor:
    """``rpn(maps, …)`` with the number of sampled anchors given: the sum of its losses."""
    scores, deltas = rpn.head(list(maps))
    anchors = torch.cat(rpn.anchors(maps))
    logits, moves = concat_box_prediction_layers([s.float() for s in scores], [d.float() for d in deltas])
    with torch.no_grad():
        split = moves.view(len(targets), -1, 4)
        boxes = torch.stack([rpn.box_coder.decode_single(m, anchors) for m in split])
    labels, matched = zip(*(_match(target["boxes"], anchors) for target in targets), strict=True)
    sampled = len(targets) * min(rpn.fg_bg_sampler.batch_size_per_image, len(anchors))
    chosen, positive = (torch.arange(count, device=boxes.device) for count in (sampled, sampled // 2))
    wanted = rpn.box_coder.encode_single(torch.cat(matched)[positive], anchors[positive % len(anchors)])
    distance = F.smooth_l1_loss(moves[positive], wanted, beta=1 / 9, reduction="sum")
    return distance + F.binary_cross_entropy_with_logits(logits.flatten()[chosen], torch.cat(labels)[chosen])


def _match(objects: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """(A,) labels and (A, 4) boxes of the objects (n, 4) that anchors (A, 4) are matched to."""
    overlap = box_iou(objects, anchors)
    best, match = overlap.max(0)
    closest = overlap == overlap.amax(1, keepdim=True)
    return torch.where(closest.any(0), 1.0, (best > 0.7).float()), objects[match]


def head_loss(
    head: MaskRCNNHead | CascadeHead, maps: Sequence[Tensor], sizes: Sizes, targets: Targets, proposals: int
) -> Tensor:
    """``head(maps, …)`` with the number of regions given: the sum of its losses.

    Args:
        maps: of the levels that the head takes.
        proposals: per image.
    """
    count = min(head.config.regions, proposals + OBJECTS)
    regions = _Regions(len(targets), count, maps[0].device)
    levels, semantic, losses = maps, None, []
    if isinstance(head, HTCHead):
        levels = maps[:-1]
        if head.semantic is not None:
            logits, semantic = head.semantic(maps)
            losses.append(head.semantic.loss(logits, targets, head.levels[LEVEL]))
    for stage, box_head in enumerate(head.box_heads):
        pooled = _pool(levels, semantic, regions.boxes, POOLED)
        losses.append(_box_loss(cast(BoxHead, box_head), pooled, regions, sizes))
        if head.config.masks:
            pooled = _pool(levels, semantic, regions.on_objects, head.config.mask_size // 2)
            mask_head = cast(MaskHead, head.mask_heads[stage])
            logits = (
                head.mask_logits(stage, pooled) if isinstance(head, HTCHead) else mask_head(mask_head.features(pooled))
            )
            losses.append(_mask_loss(logits, regions, targets))
    return torch.stack(losses).sum()


class _Regions:
    """``count`` regions in each of ``images``, the first quarter of them on objects."""

    def __init__(self, images: int, count: int, device: Any):
        self.per_image = max(1, count // 4)
        starts = torch.arange(images, device=device)[:, None] * count
        self.positive = (starts + torch.arange(self.per_image, device=device)).flatten()
        self.boxes = torch.empty((images * count, 4), device=device).split(count)
        self.on_objects = [b[: self.per_image] for b in self.boxes]
        self.labels = torch.zeros(images * count, dtype=torch.int64, device=device)


def _box_loss(head: BoxHead, pooled: Tensor, regions: _Regions, sizes: Sizes) -> Tensor:
    logits, deltas = head(pooled)
    boxes, on = torch.cat(list(regions.boxes)), regions.positive
    mine = head.of_class(deltas[on], regions.labels[on])
    distance = (head.decode(mine, boxes[on])[:, 0] - boxes[on]).abs().sum()
    head.refine(logits, deltas, regions.boxes, sizes, regions.labels)
    return F.cross_entropy(logits, regions.labels) + distance


def _mask_loss(logits: Tensor, regions: _Regions, targets: Targets) -> Tensor:
    mine = logits[torch.arange(len(logits), device=logits.device), regions.labels[regions.positive]]
    parts, side = [], logits.shape[-1]
    for target, boxes in zip(targets, regions.on_objects, strict=True):
        used = torch.arange(min(len(target["boxes"]), regions.per_image), device=logits.device)
        masks = target["masks"][used][:, None].float()
        parts.append(_RoIAlign.apply(masks, boxes, side)[:, 0])
    return F.binary_cross_entropy_with_logits(mine, (torch.cat(parts) >= 0.5).float())


def _pool(maps: Sequence[Tensor], semantic: Tensor | None, boxes: Sequence[Tensor], side: int) -> Tensor:
    """(N, C, side, side): regions (n, 4) of each image from the levels, those of the semantic map (B, C, h, w) added."""
    regions = torch.cat(list(boxes))
    x = maps[0].new_zeros((len(regions), maps[0].shape[1], side, side), dtype=torch.float32)
    places = torch.arange(len(regions), device=x.device).tensor_split(len(maps))
    for features, mine in zip(maps, places, strict=True):
        x = x.index_copy(0, mine, _RoIAlign.apply(features.float(), regions[mine], side))
    if semantic is None:
        return x
    more = _RoIAlign.apply(semantic.float(), regions, 2 * POOLED)
    return x + (more if side == 2 * POOLED else F.adaptive_avg_pool2d(more, side))


class _RoIAlign(torch.autograd.Function):
    """What torchvision's compiled operator makes and keeps: the regions and a size."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, regions: Tensor, side: int) -> Tensor:
        ctx.save_for_backward(regions)
        ctx.shape = maps.shape
        return maps.new_empty((len(regions), maps.shape[1], side, side))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.new_empty(ctx.shape), None, None
