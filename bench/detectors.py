"""torchvision's Mask R-CNN behind the interface of ours, so that the same loop, data and measures serve both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinscale.heads.config import DetectConfig
from swinscale.heads.detections import Detections
from swinscale.tasks.detect import Detect
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.models import resnet18, resnet50  # noqa: E402
from torchvision.models import swin_transformer as tv_swin  # noqa: E402
from torchvision.models.detection import MaskRCNN  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.backbone_utils import BackboneWithFPN  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor  # noqa: E402
from torchvision.ops import FeaturePyramidNetwork  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool  # noqa: E402

Sizes = Sequence[tuple[int, int]]
STRIDES = (4, 8, 16, 32, 64)
TRIAL: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
"""A Swin Transformer of four stages, to try the code."""


def resnet_pyramid(layers: int, channels: int) -> nn.Module:
    """A ResNet from random weights, all layers trained, with torchvision's pyramid, as ``maskrcnn_resnet50_fpn`` builds it."""
    body = {18: resnet18, 50: resnet50}[layers](weights=None)
    first = body.inplanes // 8
    stages = {f"layer{i + 1}": str(i) for i in range(4)}
    return BackboneWithFPN(body, stages, [first * 2**i for i in range(4)], channels, LastLevelMaxPool())


class SwinPyramid(nn.Module):
    """The four stages of torchvision's Swin Transformer with torchvision's pyramid; no norms between them.

    Args:
        shape: "embed_dim", "depths" and "num_heads".
    """

    def __init__(self, version: int, shape: Mapping[str, Any], channels: int):
        super().__init__()
        kinds: dict[str, Any] = {}
        if version == 2:
            kinds = {"block": tv_swin.SwinTransformerBlockV2, "downsample_layer": tv_swin.PatchMergingV2}
        swin = tv_swin.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=shape["embed_dim"],
            depths=list(shape["depths"]),
            num_heads=list(shape["num_heads"]),
            window_size=[7, 7] if version == 1 else [8, 8],
            stochastic_depth_prob=0.0,
            **kinds,
        )
        self.features, self.out_channels = swin.features, channels
        self.fpn = FeaturePyramidNetwork([shape["embed_dim"] * 2**i for i in range(4)], channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) → one (B, channels, h, w) per level: "0" to "3" and "pool"."""
        maps, x = OrderedDict[str, Tensor](), images
        for index, part in enumerate(self.features):
            x = part(x)
            if index % 2:  # a stage; the others are embedding and merging
                maps[str(index // 2)] = x.permute(0, 3, 1, 2)
        return self.fpn(maps)


class TorchvisionDetector(nn.Module):
    """torchvision's Mask R-CNN as ``heads.detector.Detector`` is called: padded batches that are not resized, labels from 0.

    Args:
        backbone: with ``out_channels``, gives the maps of ``STRIDES``.
        config: widths, anchors, numbers of proposals, regions and detections; the rest is torchvision's.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, config: DetectConfig):
        super().__init__()
        self.config, self.num_classes = config, num_classes
        width, hidden = config.channels, config.fc_channels
        ratios = (config.anchor_ratios,) * len(STRIDES)
        self.net = MaskRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(tuple((round(config.anchor_scale * s),) for s in STRIDES), ratios),
            rpn_pre_nms_top_n_train=config.proposals_per_level[0],
            rpn_pre_nms_top_n_test=config.proposals_per_level[1],
            rpn_post_nms_top_n_train=config.proposals[0],
            rpn_post_nms_top_n_test=config.proposals[1],
            box_head=TwoMLPHead(width * 7**2, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
            box_batch_size_per_image=config.regions,
            box_score_thresh=config.score,
            box_nms_thresh=config.nms_iou,
            box_detections_per_img=config.limit,
            mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        )

    def forward(self, images: Tensor, sizes: Sizes, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses by name."""
        shifted = [{**target, "labels": target["labels"] + 1} for target in targets]  # its 0 is background
        _, losses = self._run(images, sizes, shifted)
        return losses

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sizes) -> list[Detections]:
        """What is in each image, masks as they come from the head."""
        found, _ = self._run(images, sizes, None)
        return [Detections(f["boxes"].float(), f["scores"].float(), f["labels"] - 1, f["masks"][:, 0]) for f in found]

    @torch.no_grad()
    def pictures(self, images: Tensor, sizes: Sizes) -> list[Tensor]:
        """Masks (n, h, w) bool of each whole image, pasted by torchvision."""
        found, _ = self._run(images, sizes, None)
        pasted = self.net.transform.postprocess(found, list(sizes), list(sizes))
        return [f["masks"][:, 0] >= 0.5 for f in pasted]

    def _run(
        self, images: Tensor, sizes: Sizes, targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """What torchvision's own ``forward`` does between its transform and its pasting of masks."""
        maps = self.net.backbone(images)
        proposals, losses = self.net.rpn(ImageList(images, list(sizes)), maps, targets)
        found, more = self.net.roi_heads(maps, proposals, list(sizes), targets)
        return found, {**losses, **more}


class TorchvisionTask(Detect):
    """torchvision's detector in our loop, with our measures; it keeps its own initial values and has no directory format of ours."""

    model: TorchvisionDetector

    @property
    def backbone(self) -> nn.Module:
        return self.model.net.backbone

    @property
    def num_layers(self) -> int:
        return 0

    def layer_id(self, name: str) -> int:
        return 0

    def no_weight_decay(self) -> set[str]:
        return {
            name for name, _ in self.named_parameters() if "relative_position_bias" in name or "logit_scale" in name
        }

    def save_pretrained(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(state or self.state_dict(), directory / "model.pt")


def torchvision_task(backbone: nn.Module, classes: Sequence[str], config: DetectConfig) -> TorchvisionTask:
    """torchvision's Mask R-CNN on ``backbone`` as a task."""
    return TorchvisionTask(TorchvisionDetector(backbone, len(classes), config), classes)
