"""Video classification: several clips of a film, several crops of each, one answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.config import check_ranges
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.tasks.base import Batch
from swinscale.tasks.classify import Classify, ClassifyConfig
from swinscale.tasks.dense import sizes_of


@dataclass(frozen=True)
class VideoConfig(ClassifyConfig):
    """Options of video classification, besides those of ``ClassifyConfig``.

    Args:
        head_dropout: share of the pooled features that is dropped before the classifier.
        test_clips, test_crops: a film is judged by so many clips, spread evenly over it, and so many crops of each, along its
            longer side; their probabilities are averaged. A run in training looks at one crop of one clip.
        inflate: how weights of an image model become those of a video model; see ``weights.resize.inflate_patches``.
    """

    label_smoothing: float = 0.0
    head_dropout: float = 0.5
    test_clips: int = 4
    test_crops: int = 3
    inflate: Literal["repeat", "centre"] = "repeat"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "task.", head_dropout="[0, 1)", test_clips="[1, inf)", test_crops="[1, inf)")


class ClassifyVideo(Classify):
    """A classifier of clips and its cross-entropy.

    Reads ``batch["image"]`` (B, C, T, H, W) in training, and in evaluation (B, clips, C, T, H, W) with ``batch["size"]`` (B, 2), the
    height and width of each without padding; ``batch["label"]`` (B,).

    Attributes:
        crops: of each clip in evaluation.
    """

    name = "video"

    def __init__(
        self,
        model: SwinTransformer,
        num_classes: int,
        config: VideoConfig | None = None,
        preprocessing: dict[str, Any] | None = None,
    ):
        config = config or VideoConfig()
        super().__init__(model, num_classes, config, preprocessing)
        if model.config.rank != 3:
            raise UsageError(f"patch_size={model.config.patch_size}: a model of clips has three axes, time first.")
        self.head_dropout, self.crops = config.head_dropout, 1
        self.initially_normal = {"model.head.weight": 0.01}

    def _swin(self) -> SwinTransformer:
        assert isinstance(self.model, SwinTransformer)
        return self.model

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, T, H, W) → (B, K) in fp32."""
        model = self._swin()
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        return model.head(F.dropout(features, self.head_dropout, self.training)).float()

    def update_metrics(self, metrics: dict[str, Any], batch: Batch) -> None:
        seen, labels = self.probabilities(batch), batch["label"]
        metrics["loss"].update(F.nll_loss(seen.clamp(min=1e-12).log(), labels), len(labels))
        for name in ("top1", "top5", "confusion"):
            metrics[name].update(seen, labels)

    def probabilities(self, batch: Batch) -> Tensor:
        """(B, K): the mean over all clips and crops of each film."""
        total = torch.zeros(())
        views = 0
        for view in self._views(batch):
            total, views = total.to(view.device) + self.logits(view).softmax(-1), views + 1
        return total / views

    def passes(self, batch: Batch) -> int:
        return int(batch["image"].shape[1]) * self.crops

    def idle_pass(self, batch: Batch) -> None:
        self.model(batch["image"][:1, 0, :, :1, :32, :32])

    def _views(self, batch: Batch) -> Iterator[Tensor]:
        """(B, C, T, h, w), one view of every film of the batch after the other."""
        images, sizes = batch["image"], sizes_of(batch["size"])
        side = self._swin().config.img_size[1:]
        for crop in range(self.crops):
            corners = [crop_corner(size, side, crop, self.crops) for size in sizes]
            for clip in range(images.shape[1]):
                cut = [
                    image[clip, ..., top : top + side[0], left : left + side[1]]
                    for image, (top, left) in zip(images, corners, strict=True)
                ]
                yield torch.stack(cut)


def crop_corner(size: tuple[int, int], side: tuple[int, ...], crop: int, crops: int) -> tuple[int, int]:
    """Top and left of a crop: the centre of one; of several, spread evenly along the axis with more room, first to last.

    Args:
        size: height and width of the picture, at least ``side``.
    """
    room = (size[0] - side[0], size[1] - side[1])
    share = 0.5 if crops == 1 else crop / (crops - 1)
    along = 0 if room[0] > room[1] else 1
    corner = [round(free / 2) for free in room]
    corner[along] = round(room[along] * share)
    return corner[0], corner[1]
