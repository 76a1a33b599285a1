"""Segmenters of a few thousand parameters, with something to learn from; for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from random_models import randomise
from small_detectors import DENSE, PAD
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import IGNORED, Segmenter
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks.base import Batch
from swinscale.tasks.segment import Segment

NARROW: dict[str, Any] = {"channels": 16, "aux_channels": 8, "test_short": 0}
"""Pictures are looked at as they are, where a test says nothing else."""

DEPTHS, HEADS, WIDTHS = (1, 2, 1, 1), (1, 2, 2, 4), [8, 16, 32, 64]
FIELDS: dict[str, Any] = {"embed_dim": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 7, "img_size": 224}


def small_segmenter(
    version: int = 2, classes: int = 4, backbone: dict[str, Any] | None = None, **fields: Any
) -> Segmenter:
    """A segmenter in training mode, without dropout; no parameter and no running statistic has a trivial value."""
    swin = SwinTransformer(SwinConfig(version=version, pad=PAD[version], **{**DENSE, **(backbone or {})}))
    segmenter: Segmenter = randomise(Segmenter(swin, classes, SegmentConfig(**{**NARROW, "dropout": 0.0, **fields})))
    draw = torch.Generator().manual_seed(1)
    for name, buffer in segmenter.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=draw)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=draw)
    return segmenter.train()


def small_task(version: int = 2, classes: int = 4, **fields: Any) -> Segment:
    """The task around ``small_segmenter``, in evaluation mode."""
    return Segment(small_segmenter(version, classes, **fields), [f"class {k}" for k in range(classes)]).eval()


def pictures(sizes: list[tuple[int, int]], classes: int = 4, channels: int = 3, seed: int = 0) -> Batch:
    """Noise of these sizes and labels of which a tenth is ignored, padded as ``SegmentDataset.collate`` does."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    draw = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(sizes), channels, height, width)
    target = torch.full((len(sizes), height, width), IGNORED)
    for image, labels, (h, w) in zip(images, target, sizes, strict=True):
        image[:, :h, :w] = torch.randn(channels, h, w, generator=draw)
        labels[:h, :w] = torch.randint(classes, (h, w), generator=draw)
        labels[:h, :w][torch.rand(h, w, generator=draw) < 0.1] = IGNORED
    return {"image": images, "target": target, "size": torch.tensor(sizes), "index": torch.arange(len(sizes))}


def without_gradient(model: torch.nn.Module) -> list[str]:
    """Parameters that are trained and got no gradient, or one that is not finite."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, p in trained if p.grad is None or not p.grad.isfinite().all()]


def plain_loss(logits: Tensor, target: Tensor, weights: tuple[float, ...] = ()) -> Tensor:
    """Pixel by pixel: minus the log of the probability of the right class, times its weight, divided by all pixels."""
    chances = logits.double().softmax(1)
    total = logits.new_zeros((), dtype=torch.float64)
    for image, row, column in (target != IGNORED).nonzero().tolist():
        label = int(target[image, row, column])
        total = total - (weights[label] if weights else 1) * chances[image, label, row, column].log()
    return total / target.numel()


def four_stages(
    classes: int = 5, version: int = 1, seed: int = 9, swin: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A segmenter of four stages, 8 channels wide at first, windows of 7, as foreign files of the tests have it; random throughout."""
    backbone = SwinTransformer(SwinConfig(version=version, num_classes=0, **{**FIELDS, **(swin or {})}))
    return randomise(
        Segmenter(backbone, classes, SegmentConfig(**{"channels": 16, "aux_channels": 8, **options})), seed
    )
