"""What a detector found in an image: boxes with scores, classes and masks; suppression of duplicates, fusion of views.

Boxes are x1, y1, x2, y2 in pixels, edges rather than indices: the first pixel reaches from 0 to 1, its centre is at 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.torchvision_cpu import ensure_torchvision

Soft = Literal["none", "linear", "gaussian"]
_PASTED_AT_ONCE = 2**25
"""Pixels of full masks that are interpolated at a time away from a CPU; each takes 12 bytes."""


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best first.

    Args:
        boxes: (n, 4) float, x1, y1, x2, y2 in pixels.
        scores: (n,) float in 0…1.
        labels: (n,) int64, 0 … classes - 1.
        masks: (n, h, w) float, the probability that a point of the box belongs to the object, on a grid over the box; or
            None.

    Raises:
        UsageError: for fields of different length.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.boxes)
        shapes = [tuple(x.shape) for x in (self.boxes, self.scores, self.labels)]
        masks_fit = self.masks is None or (self.masks.dim() == 3 and len(self.masks) == n)
        if shapes != [(n, 4), (n,), (n,)] or not masks_fit:
            raise UsageError(
                f"boxes, scores and labels have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, masks "
                f"{None if self.masks is None else tuple(self.masks.shape)}: give (n, 4), (n,), (n,) and (n, h, w) or None."
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def scaled(self, x: float, y: float) -> Detections:
        """The same objects in an image whose width is ``x`` times and whose height is ``y`` times this one's."""
        return replace(self, boxes=self.boxes * self.boxes.new_tensor([x, y, x, y]))

    def clipped(self, height: int, width: int) -> Detections:
        """Boxes cut at the edges of an image of ``height`` × ``width`` pixels; each mask is sampled anew where its box changed.

        A box outside the image becomes one without area; none is removed.
        """
        limits = self.boxes.new_tensor([width, height, width, height])
        boxes = torch.minimum(self.boxes.clamp(min=0), limits)
        masks = self.masks
        if masks is not None and (changed := (boxes != self.boxes).any(1)).any():
            rows, columns = masks.shape[1:]
            cut, whole = boxes[changed], self.boxes[changed]
            y = cut[:, 1, None] + _centres(0, rows, cut) / rows * (cut[:, 3] - cut[:, 1])[:, None]
            x = cut[:, 0, None] + _centres(0, columns, cut) / columns * (cut[:, 2] - cut[:, 0])[:, None]
            masks = masks.clone()
            masks[changed] = _sampled(masks[changed], whole, y, x).to(masks.dtype)
        return replace(self, boxes=boxes, masks=masks)

    def flipped(self, width: float) -> Detections:
        """The same objects in the image mirrored left to right, ``width`` pixels wide."""
        x1, y1, x2, y2 = self.boxes.unbind(1)
        masks = None if self.masks is None else self.masks.flip(2)
        return replace(self, boxes=torch.stack([width - x2, y1, width - x1, y2], 1), masks=masks)

    def take(self, indices: Tensor | slice) -> Detections:
        """The objects at ``indices``, in their order; a bool tensor (n,) says which."""
        masks = None if self.masks is None else self.masks[indices]
        return Detections(self.boxes[indices], self.scores[indices], self.labels[indices], masks)

    def to(self, device: Any) -> Detections:
        """The same on another device."""
        masks = None if self.masks is None else self.masks.to(device)
        return Detections(self.boxes.to(device), self.scores.to(device), self.labels.to(device), masks)

    @torch.no_grad()
    def full_masks(self, height: int, width: int, threshold: float = 0.5) -> Tensor:
        """Masks of the whole image: (n, height, width) bool, where the probability at a pixel's centre reaches ``threshold``.

        Probabilities are interpolated bilinearly between the centres of a mask's cells, and are 0 outside its box.

        Args:
            height, width: of the image whose pixels the boxes count.
            threshold: above 0.

        Raises:
            UsageError: for detections without masks.
        """
        if self.masks is None:
            raise UsageError("These detections have no masks: use a detector with a mask head.")
        full = torch.zeros((len(self), height, width), dtype=torch.bool, device=self.boxes.device)
        # On a CPU, time goes with the area of the boxes; elsewhere with the number of calls.
        together = 1 if full.device.type == "cpu" else max(1, _PASTED_AT_ONCE // max(1, height * width))
        boxes = self.boxes.float()
        # Between the outermost centres and nothing there is half a cell more.
        half = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor(self.masks.shape[:0:-1], device=boxes.device) / 2
        low, high = (boxes[:, :2] - half).floor(), (boxes[:, 2:] + half).ceil()
        limits = boxes.new_tensor([width, height])
        for start in range(0, len(self), together):
            part = slice(start, start + together)
            first = torch.minimum(low[part].amin(0).nan_to_num(0).clamp(min=0), limits)
            last = torch.minimum(high[part].amax(0).nan_to_num(0).clamp(min=0), limits)
            (left, top), (right, bottom) = first.int().tolist(), last.int().tolist()
            if right > left and bottom > top:
                y, x = _centres(top, bottom, boxes), _centres(left, right, boxes)
                count = len(boxes[part])
                pasted = _sampled(self.masks[part], boxes[part], y.expand(count, -1), x.expand(count, -1))
                full[part, top:bottom, left:right] = pasted >= threshold
        return full


def _centres(start: int, end: int, like: Tensor) -> Tensor:
    return torch.arange(start, end, dtype=torch.float32, device=like.device) + 0.5


def _sampled(masks: Tensor, boxes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(n, h, w) masks over boxes (n, 4), read at rows y (n, H) and columns x (n, W) in pixels: (n, H, W) float32.

    Outside its box a mask is 0.
    """
    boxes = boxes.float()
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    x = (x - boxes[:, :1]) / size[:, :1] * 2 - 1
    y = (y - boxes[:, 1:2]) / size[:, 1:] * 2 - 1
    shape = (len(boxes), y.shape[1], x.shape[1])
    points = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], -1)
    return F.grid_sample(masks[:, None].float(), points, align_corners=False)[:, 0]


@torch.no_grad()
def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    iou: float = 0.5,
    soft: Soft = "none",
    sigma: float = 0.5,
    min_score: float = 0.0,
    limit: int = 100,
) -> tuple[Tensor, Tensor]:
    """Which boxes remain when those that a better one of the same class overlaps are removed, or lose score (soft-NMS).

    Soft-NMS is that of Bodla et al., arXiv 1704.04503: again and again the best box left is taken, and the scores s of the
    others of its class become s · (1 - overlap) where the overlap is above ``iou`` ("linear"), or
    s · exp(-overlap² / sigma) ("gaussian").

    Args:
        boxes, scores, labels: (n, 4), (n,), (n,).
        iou: the intersection over union above which a box is a duplicate.
        min_score: boxes remain while their score is above it.
        limit: the largest number of boxes that remain.

    Returns:
        Indices (m,) int64 into ``boxes``, best first, and their scores (m,), which only soft-NMS changes.
    """
    if soft not in get_args(Soft):
        raise UsageError(f"soft={soft!r}: choose one of {', '.join(get_args(Soft))}.")
    if not (0 <= iou <= 1 and sigma > 0 and limit >= 1):
        raise UsageError(
            f"iou={iou}, sigma={sigma}, limit={limit}: give iou in [0, 1], sigma above 0, limit at least 1."
        )
    among = (scores > min_score).nonzero()[:, 0]
    boxes, scores, labels = boxes[among].float(), scores[among], labels[among]
    if soft == "none" and boxes.is_cuda:
        ensure_torchvision()
        from torchvision.ops import batched_nms

        kept = batched_nms(boxes, scores.float(), labels, iou)[:limit]
        return among[kept], scores[kept]
    # Scores only fall, so the best box of all classes is also the best of its own, and what is taken comes in order.
    left, gone, taken, values = scores, torch.zeros_like(scores, dtype=torch.bool), [], []
    for _ in range(min(limit, len(boxes))):
        value, best = left.masked_fill(gone, -math.inf).max(0)
        if boxes.device.type == "cpu" and value <= min_score:
            break
        taken.append(best)
        values.append(value)
        overlap = _overlaps(boxes[best], boxes)
        same = labels == labels[best]
        if soft == "none":
            gone = gone | (same & (overlap > iou))
        else:
            factor = torch.exp(-(overlap**2) / sigma) if soft == "gaussian" else 1 - overlap * (overlap > iou)
            left = torch.where(same, left * factor.to(left.dtype), left)
        gone = gone.index_fill(0, best, True)
    if not taken:
        return among, scores
    kept, best_scores = torch.stack(taken), torch.stack(values)
    above = best_scores > min_score
    return among[kept[above]], best_scores[above]


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box (4,) with each of (n, 4); 0 where there is no area."""
    shared = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared / (areas + (box[2:] - box[:2]).prod() - shared).clamp(min=1e-9)


def merge_views(
    views: Sequence[Detections],
    *,
    iou: float = 0.5,
    soft: Soft = "none",
    sigma: float = 0.5,
    min_score: float = 0.0,
    limit: int = 100,
    ranges: Sequence[tuple[float, float] | None] | None = None,
) -> Detections:
    """Late fusion: what was found in several views of one image, without the duplicates. A box that remains keeps its mask.

    Args:
        views: all in the pixels of the same image (``scaled`` and ``flipped`` bring them there); all or none with masks.
        iou, soft, sigma, min_score, limit: see ``suppress``.
        ranges: for each view the smallest and largest square root of a box's area, in pixels, that is taken from it, such
            as small objects from an enlarged view; None: all.

    Raises:
        UsageError: for no views, another number of ranges, and masks in some views or of different sizes.
    """
    if not views or (ranges is not None and len(ranges) != len(views)):
        raise UsageError(
            f"{len(views)} views and {'no' if ranges is None else len(ranges)} ranges: give at least one view, and a range each."
        )
    masks = [view.masks for view in views]
    sizes = {None if each is None else tuple(each.shape[1:]) for each in masks}
    if len(sizes) > 1:
        raise UsageError(f"The views have masks of sizes {sizes}: let all be of one size, or all None.")
    parts = []
    for view, kept in zip(views, ranges or [None] * len(views), strict=True):
        if kept is not None:
            side = (view.boxes[:, 2:] - view.boxes[:, :2]).clamp(min=0).prod(1).sqrt()
            view = view.take((side >= kept[0]) & (side <= kept[1]))
        parts.append(view)
    joined = Detections(
        torch.cat([part.boxes for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.labels for part in parts]),
        None if None in sizes else torch.cat([part.masks for part in parts if part.masks is not None]),
    )
    indices, scores = suppress(
        joined.boxes, joined.scores, joined.labels, iou=iou, soft=soft, sigma=sigma, min_score=min_score, limit=limit
    )
    return replace(joined.take(indices), scores=scores)
