"""UPerNet: pyramid pooling over the last map, a feature pyramid, and their fusion (Xiao et al., arXiv 1807.10221).

As the published Swin Transformers for ADE20K have it (SwinTransformer/Swin-Transformer-Semantic-Segmentation), with an auxiliary
head on the third stage in training. Images of any size, V1 or V2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.convs import conv, relu_deviation
from swinscale.models import SwinTransformer
from swinscale.models.pyramid import Pyramid

IGNORED = -1
"""Value in a map of classes that takes no part in loss and measures."""
PREDICT_DEVIATION = 0.01
"""Of the first values of a last layer, so that all classes begin alike."""


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear between the centres of cells."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """Adds to each cell of a map what is around it: means over the whole map and over parts of it (Zhao et al., arXiv 1612.01105)."""

    def __init__(self, in_channels: int, config: SegmentConfig):
        super().__init__()
        self.scales, width = config.pool_scales, config.channels
        self.branches = nn.ModuleList(conv(in_channels, width, 1, norm=True) for _ in self.scales)
        self.fuse = conv(in_channels + len(self.scales) * width, width, 3, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, channels, h, w)."""
        around = [
            branch(F.adaptive_avg_pool2d(x, scale)) for branch, scale in zip(self.branches, self.scales, strict=True)
        ]
        return self.fuse(torch.cat([x, *(resized(part, x.shape[-2:]) for part in around)], 1))


class UPerHead(nn.Module):
    """Maps of all stages → logits at the resolution of the first.

    Args:
        in_channels: of the maps, finest first.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, config: SegmentConfig):
        super().__init__()
        *finer, last = in_channels
        width = config.channels
        self.pooling = PyramidPooling(last, config)
        self.laterals = nn.ModuleList(conv(channels, width, 1, norm=True) for channels in finer)
        self.smooth = nn.ModuleList(conv(width, width, 3, norm=True) for _ in finer)
        self.fuse = conv(len(in_channels) * width, width, 3, norm=True)
        self.dropout = nn.Dropout2d(config.dropout)
        self.predict = nn.Conv2d(width, num_classes, 1)
        self.initially_normal = first_deviations(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, C, h, w) of each stage → (B, num_classes, H, W)."""
        top = self.pooling(maps[-1])
        levels = [top]
        for lateral, finer in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            top = lateral(finer) + resized(top, finer.shape[-2:])
            levels.insert(0, top)
        levels[:-1] = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        fused = self.fuse(torch.cat([levels[0], *(resized(level, size) for level in levels[1:])], 1))
        return self.predict(self.dropout(fused))


class FCNHead(nn.Module):
    """One map → logits of its resolution: a convolution and a classifier of each cell."""

    def __init__(self, in_channels: int, num_classes: int, config: SegmentConfig):
        super().__init__()
        self.convs = nn.Sequential(conv(in_channels, config.aux_channels, 3, norm=True))
        self.dropout = nn.Dropout2d(config.dropout)
        self.predict = nn.Conv2d(config.aux_channels, num_classes, 1)
        self.initially_normal = first_deviations(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, num_classes, h, w)."""
        return self.predict(self.dropout(self.convs(x)))


class Segmenter(nn.Module):
    """Gives each pixel one of ``num_classes`` classes.

    Args:
        backbone: trimmed in place (``models.pyramid``): it keeps no classifier.
    """

    def __init__(self, backbone: SwinTransformer, num_classes: int, config: SegmentConfig | None = None):
        super().__init__()
        self.config, self.num_classes = config or SegmentConfig(), num_classes
        stages = len(backbone.layers)
        if stages < 2:
            raise UsageError("A UPerNet needs a backbone of two stages or more; this one has 1.")
        if self.config.aux_weight and self.config.aux_stage >= stages:
            raise UsageError(
                f"task.aux_stage={self.config.aux_stage} must be one of the {stages} stages that this backbone has, counted from 0; "
                f"with task.aux_weight=0 there is no auxiliary head."
            )
        self.body = Pyramid(backbone, range(stages), self.config.frozen_stages)
        self.decode = UPerHead(self.body.channels, num_classes, self.config)
        self.auxiliary = (
            FCNHead(self.body.channels[self.config.aux_stage], num_classes, self.config)
            if self.config.aux_weight
            else None
        )

    @property
    def backbone(self) -> SwinTransformer:
        """The Swin Transformer inside."""
        return self.body.backbone

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → logits (B, num_classes, H, W)."""
        return resized(self.decode(self.body(images)).float(), images.shape[-2:])

    def losses(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The losses by name, each a mean over all pixels; ``IGNORED`` ones add nothing to it.

        Args:
            target: (B, H, W) int64, 0 … num_classes - 1 or ``IGNORED``.
        """
        maps = self.body(images)
        losses = {"decode": self._loss(self.decode(maps), target)}
        if self.auxiliary is not None:
            seen = self.auxiliary(maps[self.config.aux_stage])
            losses["auxiliary"] = self.config.aux_weight * self._loss(seen, target)
        return losses

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        weights = self.config.class_weights
        weight = logits.new_tensor(weights, dtype=torch.float32) if weights else None
        full = resized(logits.float(), target.shape[-2:])
        # Divided by the number of all pixels, as published, so that each image has the same share whatever batch it is part of.
        return F.cross_entropy(full, target, weight, ignore_index=IGNORED, reduction="sum") / target.numel()


def first_deviations(head: nn.Module) -> dict[str, float]:
    """First values of the convolutions of a head, for ``models.init``: those before a ReLU keep the size of their input."""
    return {
        f"{name}.weight": PREDICT_DEVIATION if name == "predict" else relu_deviation(layer)
        for name, layer in head.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
