"""Region proposals: torchvision's network with anchors that fit every size, in single precision, with the losses of Swin's recipes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.heads.config import DetectConfig
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.models.detection.rpn import (  # noqa: E402
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)

Targets = Sequence[dict[str, Tensor]]
"""For each image ``boxes`` (n, 4), ``labels`` (n,), and ``masks`` (n, H, W) bool or ``semantic`` (H, W) where needed."""


def anchors_of_level(height: int, width: int, stride: int, scale: float, ratios: Sequence[float]) -> Tensor:
    """(height · width · ratios, 4): the boxes around the corners of a level's cells, in pixels.

    torchvision's generator rounds them to whole pixels and takes the stride to be the quotient of two sizes, which is wrong on
    levels of odd size; published Swin detectors do neither.
    """
    ratio = torch.tensor(ratios, dtype=torch.float32).sqrt()
    half = stride * scale / 2 * torch.stack([1 / ratio, ratio], 1)
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    centres = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (centres + torch.cat([-half, half], 1)).reshape(-1, 4)


class RPN(RegionProposalNetwork):
    """Scores anchors of all levels, moves them onto objects and keeps the best.

    Args:
        strides: pixels per cell of each level.
    """

    def __init__(self, config: DetectConfig, strides: Sequence[int]):
        head = RPNHead(config.channels, len(config.anchor_ratios))
        pre, post = (
            dict(zip(("training", "testing"), numbers, strict=True))
            for numbers in (config.proposals_per_level, config.proposals)
        )
        none: torch.nn.Module = torch.nn.Identity()  # anchors are made below
        super().__init__(none, head, 0.7, 0.3, 256, 0.5, pre, post, nms_thresh=0.7)
        self.config, self.strides = config, tuple(strides)
        self.initially_normal = {f"head.{name}": 0.01 for name, p in head.named_parameters() if p.ndim > 1}
        self._anchors: dict[tuple[object, ...], list[Tensor]] = {}

    def anchors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each level, kept until the sizes change."""
        key = (*(tuple(m.shape[-2:]) for m in maps), maps[0].device)
        if key not in self._anchors:
            self._anchors.clear()
            settings = self.config.anchor_scale, self.config.anchor_ratios
            self._anchors[key] = [
                anchors_of_level(m.shape[-2], m.shape[-1], stride, *settings).to(m.device)
                for m, stride in zip(maps, self.strides, strict=True)
            ]
        return self._anchors[key]

    def forward(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals (n, 4) of each image, at least one, best first; with ``targets`` the losses, too.

        Args:
            maps: (B, C, h, w) of each level.
            sizes: height and width of each image, without padding.
        """
        scores, deltas = self.head(list(maps))
        levels = self.anchors(maps)
        anchors = torch.cat(levels)
        logits, moves = concat_box_prediction_layers([s.float() for s in scores], [d.float() for d in deltas])
        logits, moves = logits.view(len(sizes), -1), moves.view(len(sizes), -1, 4)
        with torch.no_grad():
            boxes = torch.stack([self.box_coder.decode_single(m, anchors).view(-1, 4) for m in moves])
            found, _ = self.filter_proposals(boxes, logits, list(sizes), [len(a) for a in levels])
        whole = [anchors.new_tensor([[0, 0, w, h]]) for h, w in sizes]
        proposals = [f if len(f) else w for f, w in zip(found, whole, strict=True)]
        return proposals, {} if targets is None else self.losses(anchors, logits, moves, sizes, targets)

    def losses(
        self, anchors: Tensor, logits: Tensor, moves: Tensor, sizes: Sequence[tuple[int, int]], targets: Targets
    ) -> dict[str, Tensor]:
        """Cross-entropy of a sample of the anchors (A, 4), and the distance of those on objects from their boxes."""
        labels, matched = self.assign_targets_to_anchors([anchors] * len(sizes), list(targets))
        if self.config.anchors_inside:
            for (h, w), label in zip(sizes, labels, strict=True):
                far = anchors.new_tensor([w, h])
                inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2:] <= far).all(1)
                if inside.any():  # small images may have no anchor inside
                    label[~inside] = -1
        positive, negative = (torch.stack(masks).bool() for masks in self.fg_bg_sampler(labels))
        chosen = positive | negative
        wanted = self.box_coder.encode_single(
            torch.stack(matched)[positive], anchors.expand(len(sizes), -1, 4)[positive]
        )
        beta = {"l1": 0.0, "smooth_l1": 1 / 9}[self.config.rpn_box_loss]
        distance = F.smooth_l1_loss(moves[positive], wanted, beta=beta, reduction="sum")
        objectness = F.binary_cross_entropy_with_logits(logits[chosen], torch.stack(labels)[chosen])
        return {"rpn_objectness": objectness, "rpn_box": distance / chosen.sum().clamp(min=1)}
