"""Image classification: from scratch, fine-tuning, or a linear probe on frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.config import check_ranges, to_dict
from swinscale.errors import UsageError
from swinscale.models.variants import is_network
from swinscale.tasks.base import Batch, Task
from swinscale.weights import save_pretrained


@dataclass(frozen=True)
class ClassifyConfig:
    """Options of classification.

    Args:
        label_smoothing: share of each target spread evenly over all classes.
        mixup: Beta parameter of mixup; 0: off.
        cutmix: Beta parameter of CutMix; 0: off. With both, each batch takes one of them with equal probability.
        linear_probe: train the classifier alone; everything before it is frozen and in evaluation mode.
    """

    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    linear_probe: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "task.", label_smoothing="[0, 1)", mixup="[0, inf)", cutmix="[0, inf)")


class Classify(Task):
    """A classifier and its cross-entropy. Reads ``batch["image"]`` (B, C, H, W) and ``batch["label"]`` (B,).

    ``model`` is any module that maps images to logits; layer-wise decay, ``linear_probe`` and ``save_pretrained`` need a
    ``SwinTransformer``, an ``LRNet`` or the ViT of ``adapters``.
    """

    metric = "top1"
    higher_is_better = True
    name = "classify"
    """Of the task, as a checkpoint records it."""

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        config: ClassifyConfig | None = None,
        preprocessing: dict[str, Any] | None = None,
    ):
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes={num_classes}: a classifier needs at least 2 classes.")
        self.model, self.num_classes = model, num_classes
        self.config = config or ClassifyConfig()
        self.preprocessing = preprocessing or {}
        self.mix = _mixing(self.config, num_classes)
        if self.config.linear_probe:
            head = set(self._ours().head.parameters())
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in head)

    def _ours(self) -> Any:
        if not is_network(self.model):
            raise UsageError(
                f"{type(self.model).__name__} is neither a SwinTransformer nor an LRNet nor a ViT: this option needs one."
            )
        return self.model

    def train(self, mode: bool = True) -> Classify:
        super().train(mode)
        if self.config.linear_probe:  # no stochastic depth in frozen features
            self.model.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch["image"], batch["label"]
        if self.mix is not None:
            mixed, labels = self.mix(images.flatten(1, -3), labels)  # all frames of a clip alike
            images = mixed.view_as(images)
        return F.cross_entropy(self.logits(images), labels, label_smoothing=self.config.label_smoothing), {}

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, *size) → (B, K) in fp32."""
        logits: Tensor = self.model(images).float()
        return logits

    def new_metrics(self) -> dict[str, Any]:
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        count = self.num_classes
        return {
            "loss": MeanMetric(),
            "top1": MulticlassAccuracy(count, average="micro"),
            "top5": MulticlassAccuracy(count, average="micro", top_k=min(5, count)),
            "confusion": MulticlassConfusionMatrix(count),
        }

    def update_metrics(self, metrics: dict[str, Any], batch: Batch) -> None:
        logits, labels = self.logits(batch["image"]), batch["label"]
        metrics["loss"].update(F.cross_entropy(logits, labels), len(labels))
        for name in ("top1", "top5", "confusion"):
            metrics[name].update(logits, labels)

    @property
    def backbone(self) -> nn.Module:
        return self.model

    @property
    def num_layers(self) -> int:
        return int(self._ours().config.num_layers) if is_network(self.model) else 0

    def layer_id(self, name: str) -> int:
        if not is_network(self.model):
            return self.num_layers
        return int(self._ours().config.layer_id(name.removeprefix("model.")))

    def no_weight_decay(self) -> set[str]:
        exempt = getattr(self.model, "no_weight_decay", set)
        return {f"model.{name}" for name in exempt()}

    def save_pretrained(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        task = {"name": self.name, **to_dict(self.config)}
        metadata = {"task": task, "preprocessing": self.preprocessing}
        state = state and {name.removeprefix("model."): tensor for name, tensor in state.items()}
        save_pretrained(self._ours(), directory, metadata=metadata, state=state)


def _mixing(config: ClassifyConfig, num_classes: int) -> Any:
    """Mixup and/or CutMix over a batch, as in torchvision; None when both are off."""
    if not (config.mixup or config.cutmix):
        return None
    from swinscale.torchvision_cpu import ensure_torchvision

    ensure_torchvision()
    from torchvision.transforms import v2

    choices: list[nn.Module] = []
    if config.mixup:
        choices.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        choices.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices)
