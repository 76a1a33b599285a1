"""torchvision: a feature pyramid for its detectors (Faster R-CNN, Mask R-CNN, RetinaNet, FCOS).

    import swinscale
    from swinscale.adapters.torchvision import detection_backbone
    from torchvision.models.detection import MaskRCNN

    detector = MaskRCNN(detection_backbone(swinscale.from_pretrained("swinv2.safetensors"), frozen_stages=1), num_classes=91)

The usual models give maps with strides 4, 8, 16, 32, and the pooled 64: the levels that torchvision's defaults expect.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from swinscale.adapters import needs
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer, create_model
from swinscale.models.pyramid import Pyramid

with needs("torchvision"):
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool


class DetectionBackbone(nn.Module):
    """A ``Pyramid`` with torchvision's feature pyramid network on top; made by ``detection_backbone``."""

    def __init__(self, body: Pyramid, out_channels: int, extra_blocks: ExtraFPNBlock):
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(body.channels, out_channels, extra_blocks)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, H, W) → one (B, ``out_channels``, h, w) per level: "0", "1", … for the stages, then the extra ones."""
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.body(images))))


def detection_backbone(
    model: str | SwinTransformer,
    stages: Sequence[int] | None = None,
    *,
    out_channels: int = 256,
    extra_blocks: ExtraFPNBlock | None = None,
    frozen_stages: int = 0,
    **settings: Any,
) -> DetectionBackbone:
    """What torchvision's detectors take as ``backbone``.

    Args:
        model: a name, or a model with its weights; the latter is trimmed in place.
        stages: stages whose maps are used, from 0, ascending; None: all.
        out_channels: channels of every level.
        extra_blocks: makes more levels; None: ``LastLevelMaxPool``. RetinaNet's is ``LastLevelP6P7``.
        frozen_stages: see ``Pyramid``.
        settings: fields of ``SwinConfig`` for a model given by name.
    """
    if settings and not isinstance(model, str):
        raise UsageError(f"{', '.join(settings)} cannot be set here: the model is built already.")
    backbone = create_model(model, **{"num_classes": 0, **settings}) if isinstance(model, str) else model
    body = Pyramid(backbone, range(len(backbone.layers)) if stages is None else stages, frozen_stages)
    return DetectionBackbone(body, out_channels, extra_blocks or LastLevelMaxPool())
