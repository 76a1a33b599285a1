"""Object detection and instance segmentation on COCO-format data: Mask R-CNN, Cascade Mask R-CNN, HTC and HTC++."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.heads.detections import Detections, merge_views
from swinscale.heads.detector import Detector
from swinscale.heads.rehearsal import usual_targets
from swinscale.metrics.coco import CocoMetric
from swinscale.tasks.base import Batch
from swinscale.tasks.dense import SMALL, DenseTask, fitted, sizes_of


class Detect(DenseTask):
    """A detector and its losses.

    Reads ``batch["image"]`` (B, C, H, W), padded at the right and the bottom, ``batch["size"]`` (B, 2), height and width without
    padding, and for training ``batch["targets"]``, for each image ``boxes`` (n, 4), ``labels`` (n,), ``masks`` (n, h, w) bool and,
    with a semantic branch, ``semantic`` (h, w). Evaluation reads ``original_size``, ``image_id`` and ``annotations`` instead.
    """

    metric = "box_ap"
    name = "detect"

    def __init__(self, model: Detector, classes: Sequence[str], preprocessing: dict[str, Any] | None = None):
        super().__init__(model, classes, preprocessing)
        self.model, self.config = model, model.config

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.model(batch["image"], sizes_of(batch["size"]), batch["targets"])
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}

    def usual_targets(self, images: Tensor) -> Batch:
        return {"targets": usual_targets(images, self.config)}

    def rehearse(self, batch: Batch) -> Tensor:
        return self.model.rehearse(batch["image"], batch["targets"])

    def new_metrics(self) -> dict[str, Any]:
        return {"coco": CocoMetric(self.classes, masks=self.config.masks, max_detections=self.config.limit)}

    def update_metrics(self, metrics: dict[str, Any], batch: Batch) -> None:
        sizes = sizes_of(batch["original_size"])
        metrics["coco"].update(self.detect(batch), batch["image_id"], sizes, batch["annotations"])

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Detections]:
        """What is in each image, best first, in pixels of the pictures as they were (``original_size``)."""
        images, sizes, originals = batch["image"], sizes_of(batch["size"]), sizes_of(batch["original_size"])
        if self.config.test_short or self.config.test_flip:
            pairs = zip(images, sizes, originals, strict=True)
            return [self._from_views(image[..., : s[0], : s[1]], original) for image, s, original in pairs]
        found = self.model.detect(images, sizes)
        return [_to_picture(f, s, o) for f, s, o in zip(found, sizes, originals, strict=True)]

    def _from_views(self, image: Tensor, original: tuple[int, int]) -> Detections:
        """The detections in one picture (C, H, W), from all scales and mirrored."""
        found: list[Detections] = []
        ranges: list[tuple[float, float]] = []
        kept = self.config.test_ranges or [(0.0, float("inf"))] * max(1, len(self.config.test_short))
        for view, keeps in zip(self._scales(image), kept, strict=True):
            size = view.shape[-2], view.shape[-1]
            for flipped in (False, True) if self.config.test_flip else (False,):
                [seen] = self.model.detect(padded(view.flip(-1) if flipped else view), [size])
                found.append(_to_picture(seen.flipped(size[1]) if flipped else seen, size, original))
                ranges.append(keeps)
        c = self.config
        return merge_views(found, iou=c.nms_iou, soft=c.soft_nms, min_score=c.score, limit=c.limit, ranges=ranges)

    def _scales(self, image: Tensor) -> Iterator[Tensor]:
        """(C, H, W) at each size that the settings name, or as it is."""
        if not self.config.test_short:
            yield image
        for short in self.config.test_short:
            yield fitted(image, short, self.config.test_long)

    def passes(self, batch: Batch) -> int:
        views = max(1, len(self.config.test_short)) * (1 + self.config.test_flip)
        return len(batch["image"]) * views if views > 1 or self.config.test_short else 1

    def idle_pass(self, batch: Batch) -> None:
        image = batch["image"][:1, :, :SMALL, :SMALL]
        self.model.detect(image, [(image.shape[-2], image.shape[-1])])


def _to_picture(found: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    """Detections in an input of ``size``, in pixels of the picture it was made from."""
    return found.scaled(original[1] / size[1], original[0] / size[0])


def padded(image: Tensor, multiple: int = 32) -> Tensor:
    """(C, H, W) → (1, C, H', W'), padded at the right and the bottom to multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))[None]
