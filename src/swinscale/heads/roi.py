"""What all heads over regions share: pooling, sampling, the box and the mask network with their losses, final boxes.

A region (RoI) is a box in pixels of the network's input. Labels are 0 … K-1, and K is background: the last logit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.heads.config import DetectConfig
from swinscale.heads.convs import conv, relu_deviation
from swinscale.heads.detections import Detections, suppress
from swinscale.heads.rpn import Targets
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher  # noqa: E402
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align  # noqa: E402

POOLED = 7
"""Side of the pooled region that boxes are predicted from."""
FINEST = 56
"""Regions up to twice this side (square root of the area) are pooled from the finest level."""
GIOU_WEIGHT = 10.0

Sizes = Sequence[tuple[int, int]]


def with_image(boxes: Sequence[Tensor]) -> Tensor:
    """The boxes of all images, (N, 5): the number of the image first."""
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])


def pool(maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], side: int) -> Tensor:
    """(N, C, side, side): each region from the level that fits its size (Lin et al., arXiv 1612.03144).

    Args:
        maps: (B, C, h, w) of each level, finest first.
        boxes: (n, 4) of each image.
    """
    regions = with_image(boxes)
    area = (regions[:, 3:] - regions[:, 1:3]).clamp(min=0).prod(1)
    level = (area.sqrt() / FINEST + 1e-6).log2().floor().clamp(0, len(maps) - 1)
    if len(maps) == 1:
        return roi_align(maps[0].float(), regions, (side, side), 1 / strides[0], 0, aligned=True)
    out = maps[0].new_zeros((len(regions), maps[0].shape[1], side, side), dtype=torch.float32)
    for index, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        mine = (level == index).nonzero()[:, 0]
        if len(mine):
            pooled = roi_align(features.float(), regions[mine], (side, side), 1 / stride, 0, aligned=True)
            out = out.index_copy(0, mine, pooled)
    return out


@dataclass(frozen=True)
class Sampled:
    """The regions of a batch that a head learns from, image by image."""

    boxes: list[Tensor]
    """(n, 4) of each image."""
    labels: Tensor
    """(N,) of all regions; background is the number of classes."""
    objects: list[Tensor]
    """(n,) of each image: which object a region belongs to; -1 for none."""
    wanted: Tensor
    """(N, 4): the box of that object; its own where there is none."""
    given: Tensor
    """(N,) whether the region is not a proposal but the box of an object itself."""

    @property
    def positive(self) -> Tensor:
        """(N,) whether a region is on an object."""
        return torch.cat(self.objects) >= 0

    def on_objects(self) -> list[Tensor]:
        """(n, 4) of each image: the regions on objects."""
        return [b[o >= 0] for b, o in zip(self.boxes, self.objects, strict=True)]


def sample(proposals: Sequence[Tensor], targets: Targets, iou: float, count: int, num_classes: int) -> Sampled:
    """At most ``count`` regions per image, a quarter of them overlapping an object by at least ``iou``, if there are so many.

    The boxes of the objects themselves are among the candidates.
    """
    matcher, sampler = Matcher(iou, iou), BalancedPositiveNegativeSampler(count, 0.25)
    boxes, labels, objects, wanted, given = [], [], [], [], []
    for found, target in zip(proposals, targets, strict=True):
        known = target["boxes"].to(found)
        candidates = torch.cat([known, found])
        match = torch.full((len(candidates),), -1, dtype=torch.int64, device=found.device)
        if len(known):
            match = matcher(box_iou(known, candidates))
        on, off = sampler([(match >= 0).long()])
        chosen = torch.cat([on[0].nonzero()[:, 0], off[0].nonzero()[:, 0]])
        match = match[chosen]
        background = torch.full_like(match, num_classes)
        boxes.append(candidates[chosen])
        objects.append(match)
        given.append(chosen < len(known))
        hit = match >= 0
        labels.append(torch.where(hit, target["labels"][match.clamp(min=0)], background) if len(known) else background)
        wanted.append(torch.where(hit[:, None], known[match.clamp(min=0)], boxes[-1]) if len(known) else boxes[-1])
    return Sampled(boxes, torch.cat(labels), objects, torch.cat(wanted), torch.cat(given))


class BoxHead(nn.Module):
    """Pooled regions → class logits and box deltas: ``convs`` convolutions with batch norm, ``fcs`` linear layers.

    Args:
        deviations: of the box deltas x, y, width, height, which they are divided by.
    """

    def __init__(
        self,
        config: DetectConfig,
        num_classes: int,
        convs: int,
        fcs: int,
        deviations: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    ):
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.convs = nn.ModuleList(conv(config.channels, config.channels, 3, norm=True) for _ in range(convs))
        widths = [config.channels * POOLED**2, *[config.fc_channels] * fcs]
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.classify = nn.Linear(config.fc_channels, num_classes + 1)
        self.regress = nn.Linear(config.fc_channels, 4 * (1 if config.class_agnostic else num_classes))
        self.initially_normal = {"classify.weight": 0.01, "regress.weight": 0.001}
        self.initially_normal |= {f"fcs.{i}.weight": relu_deviation(fc) for i, fc in enumerate(self.fcs)}
        self.coder = BoxCoder(cast(tuple[float, float, float, float], tuple(1 / d for d in deviations)))

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, 7, 7) → (N, K+1) logits and (N, K or 1, 4) deltas, in single precision."""
        for layer in self.convs:
            regions = layer(regions)
        x = regions.flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        return self.classify(x).float(), self.regress(x).float().unflatten(1, (-1, 4))

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """(N, k, 4) deltas from (N, 4) boxes → (N, k, 4) boxes."""
        return self.coder.decode_single(deltas.flatten(1), boxes).view(deltas.shape)

    def of_class(self, deltas: Tensor, labels: Tensor) -> Tensor:
        """(N, K or 1, 4), (N,) → (N, 1, 4): the deltas of one class per region."""
        index = labels.clamp(max=deltas.shape[1] - 1)
        return deltas[torch.arange(len(deltas), device=deltas.device), index][:, None]

    def losses(self, logits: Tensor, deltas: Tensor, regions: Sampled) -> dict[str, Tensor]:
        """Cross-entropy, and the distance of the boxes on objects from them, per sampled region."""
        on, boxes = regions.positive, torch.cat(regions.boxes)
        mine = self.of_class(deltas[on], regions.labels[on])
        if self.config.box_loss == "giou":
            moved = self.decode(mine, boxes[on])[:, 0]
            distance = GIOU_WEIGHT * generalized_box_iou_loss(moved, regions.wanted[on], reduction="sum")
        else:
            wanted = self.coder.encode_single(regions.wanted[on], boxes[on])
            beta = {"l1": 0.0, "smooth_l1": 1.0}[self.config.box_loss]
            distance = F.smooth_l1_loss(mine[:, 0], wanted, beta=beta, reduction="sum")
        count = max(1, len(boxes))  # an earlier stage may have pushed all of them out of the image
        return {"class": F.cross_entropy(logits, regions.labels, reduction="sum") / count, "box": distance / count}

    @torch.no_grad()
    def refine(
        self, logits: Tensor, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sizes, labels: Tensor | None = None
    ) -> list[Tensor]:
        """The regions after this head has moved them, (n, 4) of each image: what the next stage of a cascade looks at.

        Args:
            labels: (N,) the class whose box counts; background, or None: the most probable class.
        """
        chosen = logits[:, :-1].argmax(1)
        if labels is not None:
            chosen = torch.where(labels < self.num_classes, labels, chosen)
        moved = self.decode(self.of_class(deltas, chosen), torch.cat(list(boxes)))[:, 0]
        parts = moved.split([len(b) for b in boxes])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


class MaskHead(nn.Module):
    """Pooled regions → a mask per class: four convolutions, one transposed convolution, one prediction.

    Args:
        carries: take in the features of the head of the stage before (hybrid task cascade).
    """

    def __init__(self, config: DetectConfig, num_classes: int, carries: bool = False):
        super().__init__()
        width = config.channels
        self.convs = nn.ModuleList(conv(width, width, 3) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.predict = nn.Conv2d(width, num_classes, 1)
        self.carry = conv(width, width, 1) if carries else None
        he = relu_deviation(self.convs[0][0])  # type: ignore[index]
        self.initially_normal = {f"convs.{i}.0.weight": he for i in range(4)}
        self.initially_normal |= {"upsample.weight": math.sqrt(2 / width), "predict.weight": math.sqrt(2 / width)}

    def features(self, regions: Tensor, before: Tensor | None = None) -> Tensor:
        """(N, C, s, s) → (N, C, s, s): the convolutions. ``before``: these of the stage before."""
        if self.carry is not None and before is not None:
            regions = regions + self.carry(before)
        for layer in self.convs:
            regions = layer(regions)
        return regions

    def forward(self, features: Tensor) -> Tensor:
        """What ``features`` returns → (N, K, 2s, 2s) logits."""
        return self.predict(F.relu(self.upsample(features))).float()


def mask_targets(regions: Sampled, targets: Targets, side: int) -> Tensor:
    """(P, side, side) in {0, 1}: the part of its object's mask that each region on an object shows."""
    parts = []
    for boxes, objects, target in zip(regions.boxes, regions.objects, targets, strict=True):
        on = objects >= 0
        used, which = objects[on].unique(return_inverse=True)
        if len(used):
            crops = torch.cat([which[:, None].to(boxes), boxes[on]], 1)
            masks = target["masks"][used][:, None].float()
            parts.append(roi_align(masks, crops, (side, side), 1.0, 0, aligned=True)[:, 0])
    return (torch.cat(parts) >= 0.5).float()


def mask_loss(logits: Tensor, regions: Sampled, targets: Targets) -> Tensor:
    """Mean cross-entropy over the pixels of the masks (P, K, side, side) of the regions on objects."""
    on = regions.positive
    if not on.any():  # the heads are run on one region all the same, so that every parameter has a gradient
        return logits.sum() * 0
    mine = logits[torch.arange(len(logits), device=logits.device), regions.labels[on]]
    return F.binary_cross_entropy_with_logits(mine, mask_targets(regions, targets, logits.shape[-1]))


def mask_regions(regions: Sampled) -> list[Tensor]:
    """(n, 4) of each image: the regions on objects; if there are none in the batch, one that is not, for ``mask_loss``."""
    boxes = regions.on_objects()
    return boxes if any(map(len, boxes)) else [regions.boxes[0][:1], *boxes[1:]]


def final_boxes(
    probabilities: Tensor, boxes: Tensor, counts: Sequence[int], sizes: Sizes, config: DetectConfig
) -> list[Detections]:
    """The detections of each image, best first, without masks.

    Args:
        probabilities: (N, K+1) of all regions.
        boxes: (N, K or 1, 4), for each class or for all of them.
        counts: regions of each image.
    """
    found = []
    for scores, places, size in zip(probabilities.split(counts), boxes.split(counts), sizes, strict=True):
        region, label = (scores[:, :-1] > config.score).nonzero(as_tuple=True)
        score = scores[region, label]
        place = clip_boxes_to_image(places[region, label.clamp(max=places.shape[1] - 1)], size)
        real = ((place[:, 2:] - place[:, :2]).amin(1) > 0) & place.isfinite().all(1)
        place, score, label = place[real], score[real], label[real]
        keep, score = suppress(
            place, score, label, iou=config.nms_iou, soft=config.soft_nms, min_score=config.score, limit=config.limit
        )
        found.append(Detections(place[keep], score, label[keep], None))
    return found


def with_masks(found: Sequence[Detections], masks: Tensor) -> list[Detections]:
    """``found`` with the mask of its class for each detection, from probabilities (N, K, side, side) of all of them."""
    labels = torch.cat([f.labels for f in found])
    mine = masks[torch.arange(len(labels), device=labels.device), labels]
    parts = mine.split([len(f) for f in found])
    return [Detections(f.boxes, f.scores, f.labels, m) for f, m in zip(found, parts, strict=True)]
