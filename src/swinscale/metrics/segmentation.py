"""Intersection over union and accuracy of label maps, added up over batches and processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swinscale.errors import UsageError

MOST_CONFUSED = 40
"""Classes up to which ``SegmentationMetric.compute`` also returns who is taken for whom."""
_COUNTED_AT_ONCE = 2**20
"""Pixels that torchmetrics counts at a time; it makes copies of about 40 bytes each."""


class SegmentationMetric:
    """Mean intersection over union (mIoU), mean accuracy of the classes, and accuracy of all pixels.

    The rules are those of published tables. Pixels are counted over all images together, not image by image. A class
    that is neither there nor predicted has no IoU, and one that is not there has no accuracy; the means leave them out.
    A class that is predicted but not there has an IoU of 0. Pixels that are ``ignored`` in the truth count nowhere,
    whatever is predicted for them.

    Args:
        classes: their names, in the order of the labels.
        ignored: the label of pixels that do not count; outside 0 … classes - 1.

    Raises:
        UsageError: without classes, or if ``ignored`` is the label of one.
    """

    def __init__(self, classes: Sequence[str], ignored: int = -1):
        if not classes or 0 <= ignored < len(classes):
            raise UsageError(
                f"{len(classes)} classes, ignored={ignored}: give at least one class, and a label that is none of theirs."
            )
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.classes, self.ignored = list(classes), ignored
        # Its own validation sorts the pixels, and refuses a single class.
        self._matrix = MulticlassConfusionMatrix(len(classes), ignore_index=ignored, validate_args=False)

    def to(self, device: Any) -> SegmentationMetric:
        """Itself, counting on ``device``."""
        self._matrix.to(device)
        return self

    @torch.no_grad()
    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Adds label maps, of one image (H, W) or several (B, H, W), both of the same shape and of an integer type.

        Raises:
            UsageError: for another shape or type, and for a label outside 0 … classes - 1; in ``target`` ``ignored`` is
                allowed.
        """
        if predicted.shape != target.shape or predicted.is_floating_point() or target.is_floating_point():
            kinds = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (predicted, target)]
            raise UsageError(
                f"Predicted labels are {kinds[0]}, true ones {kinds[1]}: both must be integers of one shape."
            )
        predicted, target = (t.flatten().to(self._matrix.device) for t in (predicted, target))
        mode = torch.get_deterministic_debug_mode()
        # Sums of whole numbers are the same in any order. In the deterministic mode torchmetrics would compare each pixel
        # with each pair of classes, which no memory holds.
        torch.set_deterministic_debug_mode("default")
        try:
            for pixels, truth in zip(predicted.split(_COUNTED_AT_ONCE), target.split(_COUNTED_AT_ONCE), strict=True):
                self._check("prediction", pixels)
                self._check("truth", torch.where(truth == self.ignored, 0, truth))
                self._matrix.update(pixels, truth)
        finally:
            torch.set_deterministic_debug_mode(mode)

    def _check(self, what: str, labels: Tensor) -> None:
        if not labels.numel():
            return
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= len(self.classes):
            wrong = low if low < 0 else high
            allowed = f"0 … {len(self.classes) - 1}" + (f" or {self.ignored}, ignored" if what == "truth" else "")
            raise UsageError(f"Label {wrong} of a {what} is none of the {len(self.classes)} classes: give {allowed}.")

    def compute(self) -> dict[str, Any]:
        """The measures over the pixels of all processes. Every process must take part.

        Returns:
            ``miou``, ``macc``, ``aacc``: floats in 0…1, None where nothing was counted.
            ``per_class``: for each class ``name``, ``iou``, ``acc`` (None where there is none) and ``pixels``, of the
            truth. ``confusion``: (classes, classes) pixels of true class i that were taken for class j, with up to 40
            classes.
        """
        count = len(self.classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nothing counted, which happens to a process without images
            total = self._matrix.compute()
        matrix: NDArray[np.int64] = total.reshape(count, count).cpu().numpy()
        right, there, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        ious, accuracies = _shares(right, there + found - right), _shares(right, there)
        rows = zip(self.classes, ious, accuracies, there.tolist(), strict=True)
        result: dict[str, Any] = {
            "miou": _mean(ious),
            "macc": _mean(accuracies),
            "aacc": _shares([right.sum()], [matrix.sum()])[0],
            "per_class": [{"name": name, "iou": iou, "acc": acc, "pixels": pixels} for name, iou, acc, pixels in rows],
        }
        return result | ({"confusion": matrix.tolist()} if count <= MOST_CONFUSED else {})


def _shares(parts: Iterable[np.int64], wholes: Iterable[np.int64]) -> list[float | None]:
    """Of each whole, None where it is empty."""
    return [int(part) / int(whole) if whole else None for part, whole in zip(parts, wholes, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
