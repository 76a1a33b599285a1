"""Predicted memory of detectors against what PyTorch's allocator hands out in a step on annotated images."""

from __future__ import annotations

from typing import Any

import torch
from bench.memory import measure
from torch import Tensor, nn

from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.heads.rehearsal import OBJECTS
from swinscale.memory import predict
from swinscale.models import SwinTransformer, model_config
from swinscale.parallel import MemoryConfig
from swinscale.tasks.base import Batch, Task
from swinscale.tasks.detect import Detect

CLASSES = 20
SMALL: dict[str, Any] = {
    "channels": 64, "fc_channels": 256, "anchor_scale": 4.0, "regions": 128, "proposals": (400, 300),
    "proposals_per_level": (400, 300),
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {"head": "mask_rcnn"},
    "cascade": {"head": "cascade", "box_loss": "giou", "anchors_inside": True},
    "htc": {"head": "htc", "class_agnostic": True, "semantic": True, "global_attention": True},
}


class OnObjects(Task):
    """A detector that finds ``OBJECTS`` annotated rectangles in every image, whatever it is."""

    def __init__(self, task: Detect, size: int, count: int):
        super().__init__()
        self.task, self.sizes = task, torch.tensor([[size, size]] * count)
        self.targets = [rectangles(size, seed) for seed in range(count)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, dict[str, Tensor]] = self.task({**batch, "size": self.sizes, "targets": self.targets})
        return result

    @property
    def backbone(self) -> nn.Module:
        return self.task.backbone


def rectangles(size: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(OBJECTS, 2, generator=random) * size * 0.7
    boxes = torch.cat([corners, corners + size * (0.05 + 0.25 * torch.rand(OBJECTS, 2, generator=random))], 1)
    y = torch.arange(size)[None, :, None]
    x = torch.arange(size)[None, None]
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    labels = torch.randint(CLASSES, (OBJECTS,), generator=random)
    semantic = torch.full((size, size), CLASSES)
    return {"boxes": boxes, "labels": labels, "masks": (x >= x1) & (x < x2) & (y >= y1) & (y < y2), "semantic": semantic}


class Pooled(torch.autograd.Function):
    """Numbers in the place of pooled regions, with the memory of torchvision's compiled operator."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, regions: Tensor, side: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(regions)
        ctx.shape = maps.shape
        return torch.randn(len(regions), maps.shape[1], *side)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.new_zeros(ctx.shape), None, None


def detector(model: str, size: int, **settings: Any) -> Detect:
    torch.manual_seed(0)
    config = model_config(model, img_size=size, num_classes=0)
    return Detect(Detector(SwinTransformer(config), CLASSES, DetectConfig(**settings)), [str(n) for n in range(CLASSES)])


def compare(task: Detect, size: int, count: int, memory: MemoryConfig, precision: Any = "fp32") -> list[int]:
    found = predict(task, micro_batch=count, img_size=size, precision=precision, memory=memory, device="cpu")
    annotated = OnObjects(task, size, count)
    targets = sum(t.nbytes for target in annotated.targets for t in target.values() if task.config.semantic or t is not target["semantic"])
    peak, held = measure(annotated, size, count, memory, precision)
    return [found.peak, peak + targets, held + targets, found.where]
