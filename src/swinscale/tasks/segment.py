"""Semantic segmentation: a class for each pixel of pictures of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.heads.upernet import Segmenter, resized
from swinscale.metrics.segmentation import SegmentationMetric
from swinscale.tasks.base import Batch
from swinscale.tasks.dense import SMALL, DenseTask, fitted, sizes_of

_AT_ONCE = 2**28
"""Logits in memory at a time while the best class of each pixel of a picture is looked for."""


class Segment(DenseTask):
    """A segmenter and its losses.

    Reads ``batch["image"]`` (B, C, H, W) and ``batch["target"]`` (B, H, W) int64, classes or ``heads.upernet.IGNORED``. In
    evaluation images have the sizes of the pictures, ``batch["size"]`` (B, 2), and are padded at the right and the bottom.
    """

    metric = "miou"
    name = "segment"

    def __init__(self, model: Segmenter, classes: Sequence[str], preprocessing: dict[str, Any] | None = None):
        super().__init__(model, classes, preprocessing)
        self.model, self.config = model, model.config
        weights = self.config.class_weights
        if weights and len(weights) != len(self.classes):
            raise UsageError(
                f"task.class_weights has {len(weights)} numbers for {len(self.classes)} classes: give one for each."
            )

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.model.losses(batch["image"], batch["target"])
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}

    def usual_targets(self, images: Tensor) -> Batch:
        return {"target": torch.zeros(images.shape[0], *images.shape[-2:], dtype=torch.int64, device=images.device)}

    def new_metrics(self) -> dict[str, Any]:
        return {"segmentation": SegmentationMetric(self.classes)}

    def update_metrics(self, metrics: dict[str, Any], batch: Batch) -> None:
        for predicted, target in zip(self.segment(batch), batch["target"], strict=True):
            height, width = predicted.shape
            metrics["segmentation"].update(predicted, target[:height, :width])

    @torch.no_grad()
    def segment(self, batch: Batch) -> list[Tensor]:
        """The class of each pixel of each picture, (H, W) int64. Pictures of one size go through the model together."""
        found: list[Tensor] = []
        for images in self._together(batch):
            found += self._classes(images)
        return found

    def passes(self, batch: Batch) -> int:
        count = 0
        for images in self._together(batch):
            for view in self._views(images):
                count += len(windows(view.shape[-2:], *self._window())) * (1 + self.config.test_flip)
        return count

    def idle_pass(self, batch: Batch) -> None:
        self.model(batch["image"][:1, :, :SMALL, :SMALL])

    def _together(self, batch: Batch) -> Iterator[Tensor]:
        """The pictures without padding: all of them where they are of one size, else one after the other."""
        sizes = sizes_of(batch["size"])
        if len(set(sizes)) == 1:
            yield batch["image"][..., : sizes[0][0], : sizes[0][1]]
        else:
            for image, (height, width) in zip(batch["image"], sizes, strict=True):
                yield image[None, :, :height, :width]

    def _classes(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, H, W)."""
        size = images.shape[-2:]
        if len(self.config.test_ratios) == 1 and not self.config.test_flip:
            return best_class(self._logits(next(self._views(images))), size)
        total: Tensor | None = None
        for view in self._views(images):
            for flipped in (False, True) if self.config.test_flip else (False,):
                logits = self._logits(view.flip(-1) if flipped else view)
                seen = resized(logits.flip(-1) if flipped else logits, size).softmax(1)
                total = seen if total is None else total.add_(seen)
        assert total is not None
        return total.argmax(1)

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        """(B, C, H, W) at each size that the settings name."""
        c = self.config
        short, long = (c.test_short, c.test_long) if c.test_short else (min(images.shape[-2:]), max(images.shape[-2:]))
        for ratio in c.test_ratios:
            yield fitted(images, short * ratio, long * ratio, c.test_antialias)

    def _window(self) -> tuple[int, int]:
        """Side and stride of the sliding window; 0, 0: none."""
        return self.config.test_crop, self.config.test_stride or -(-self.config.test_crop * 2 // 3)

    def _logits(self, view: Tensor) -> Tensor:
        """(B, C, h, w) → (B, K, h, w): of the whole, or the mean of what overlapping windows give."""
        places = windows(view.shape[-2:], *self._window())
        if len(places) == 1:
            return self.model(view)
        total = view.new_zeros(len(view), self.model.num_classes, *view.shape[-2:], dtype=torch.float32)
        count = view.new_zeros(view.shape[-2:], dtype=torch.float32)
        for rows, columns in places:
            total[..., rows, columns] += self.model(view[..., rows, columns])
            count[rows, columns] += 1
        return total.div_(count)


def windows(size: Sequence[int], side: int, stride: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows that cover a picture; the last ones lie at its border. ``side=0``: one, the whole.

    Args:
        size: height and width.
        side: of a window, or less where the picture is smaller.
        stride: from a window to the next.
    """
    if not side:
        return [(slice(0, size[0]), slice(0, size[1]))]
    axes = []
    for length in size:
        last = max(length - side, 0)
        starts = [*range(0, last, stride), last]
        axes.append([slice(start, min(start + side, length)) for start in starts])
    return [(rows, columns) for rows in axes[0] for columns in axes[1]]


def best_class(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(B, K, h, w) → (B, *size): where logits, resized to ``size``, are largest. A few classes at a time if there are many pixels."""
    pixels = len(logits) * size[0] * size[1]
    parts = logits.split(max(1, _AT_ONCE // pixels), dim=1)
    best, found = resized(parts[0], size).max(1)
    begin = parts[0].shape[1]
    for part in parts[1:]:
        value, index = resized(part, size).max(1)
        found = torch.where(value > best, index + begin, found)
        best = torch.maximum(best, value)
        begin += part.shape[1]
    return found
