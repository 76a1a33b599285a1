"""A whole detector: backbone → feature pyramid → proposals → heads over regions. Images of any size, V1 or V2."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swinscale.heads.cascade import CascadeHead
from swinscale.heads.config import DetectConfig
from swinscale.heads.detections import Detections
from swinscale.heads.htc import GlobalAttention, HTCHead
from swinscale.heads.mask_rcnn import MaskRCNNHead
from swinscale.heads.rehearsal import head_loss, rpn_loss
from swinscale.heads.roi import Sizes
from swinscale.heads.rpn import RPN, Targets
from swinscale.models import SwinTransformer
from swinscale.models.pyramid import Pyramid
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.ops import FeaturePyramidNetwork  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool  # noqa: E402


class Detector(nn.Module):
    """Finds objects of ``num_classes`` kinds, with boxes and masks.

    Args:
        backbone: trimmed in place (``models.pyramid``): it keeps no classifier.
    """

    def __init__(self, backbone: SwinTransformer, num_classes: int, config: DetectConfig | None = None):
        super().__init__()
        self.config, self.num_classes = config or DetectConfig(), num_classes
        swin = backbone.config
        self.body = Pyramid(backbone, range(len(backbone.layers)), self.config.frozen_stages)
        strides = [max(stride) for stride in swin.stage_strides()]
        strides = [*strides, 2 * strides[-1]]
        self.last_stride = strides[-2]
        self.attention = (
            GlobalAttention(swin.num_features, swin.num_heads[-1], swin.drop_path_rate)
            if self.config.global_attention
            else None
        )
        self.fpn = FeaturePyramidNetwork(self.body.channels, self.config.channels, LastLevelMaxPool())
        self.rpn = RPN(self.config, strides)
        self.roi: MaskRCNNHead | CascadeHead
        if self.config.head == "htc":
            self.roi = HTCHead(self.config, num_classes, strides)
        elif self.config.head == "cascade":
            self.roi = CascadeHead(self.config, num_classes, strides[:-1])
        else:
            self.roi = MaskRCNNHead(self.config, num_classes, strides[:-1])

    @property
    def backbone(self) -> SwinTransformer:
        """The Swin Transformer inside."""
        return self.body.backbone

    def features(self, images: Tensor, sizes: Sizes) -> list[Tensor]:
        """(B, C, H, W) → (B, channels, h, w) of each level: the backbone's strides, and twice the last."""
        maps = self.body(images)
        if self.attention is not None:
            maps[-1] = self.attention(maps[-1], sizes, self.last_stride)
        return list(self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps))).values())

    def forward(self, images: Tensor, sizes: Sizes, targets: Targets) -> dict[str, Tensor]:
        """The losses by name.

        Args:
            images: (B, C, H, W), padded at the right and the bottom.
            sizes: height and width of each image, without padding.
        """
        maps = self.features(images, sizes)
        proposals, losses = self.rpn(maps, sizes, targets)
        return {**losses, **self.roi(self._pooled_levels(maps), proposals, sizes, targets)}

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sizes) -> list[Detections]:
        """What is in each image, in its pixels. Call it in evaluation mode."""
        maps = self.features(images, sizes)
        proposals, _ = self.rpn(maps, sizes)
        return self.roi.detect(self._pooled_levels(maps), proposals, sizes)

    def rehearse(self, images: Tensor, targets: Targets) -> Tensor:
        """The sum of the losses, from as many anchors and regions as there are at most, whatever is in the images (B, C, H, W)."""
        height, width = images.shape[-2:]
        sizes = [(height, width)] * len(images)
        maps = self.features(images, sizes)
        proposals = rpn_loss(self.rpn, maps, targets)
        return proposals + head_loss(self.roi, self._pooled_levels(maps), sizes, targets, self.config.proposals[0])

    def _pooled_levels(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """The coarsest level serves proposals, and the semantic map of HTC."""
        return maps if isinstance(self.roi, HTCHead) else maps[:-1]
