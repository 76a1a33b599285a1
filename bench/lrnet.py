"""``python -m bench lrnet``: speed and memory of LR-Net, its layers with and without copies of their neighbourhoods, beside a Swin."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import runner, segment, tables
from bench.contenders import Cannot
from bench.runner import Classifier
from bench.speed import Row, speed_table
from swinscale.models import create_model
from swinscale.models.lrnet import LocalRelation
from swinscale.torchvision_cpu import ensure_torchvision

NAMES = {False: ("lrnet50", "swin_tiny_patch4_window7_224"), True: ("lrnet_micro", "swin_micro_patch2_window4_32")}
OURS = ("swinscale LR-Net",)
UNFOLDED, SWIN, RESNET = "LR-Net, neighbourhoods copied", "swinscale Swin V1-T", "timm ResNet-50"
CONTENDERS = (*OURS, UNFOLDED, SWIN, RESNET)
CLASSES = 1000
KEYS = ("device", "threads", "mode", "dtype", "size", "batch")
"""What a result is the result of."""


@dataclass(frozen=True)
class Speed(runner.Speed):
    """One measurement of classifiers: one batch of random images; see ``runner.Speed``."""

    kind: ClassVar[str] = "lrnet"
    contenders: ClassVar[tuple[str, ...]] = CONTENDERS
    ours: ClassVar[tuple[str, ...]] = OURS
    same: ClassVar[tuple[str, ...]] = (UNFOLDED,)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, size, size), and their classes (batch,)."""
        draw = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=draw)
        return images.to(self.device), torch.randint(CLASSES, (self.batch,), generator=draw).to(self.device)

    def build(self, name: str) -> nn.Module:
        """One of ``CONTENDERS``."""
        return Classifier(build(name, self.tiny))


class Unfolded(LocalRelation):
    """The same layer, with the neighbours of each place side by side in memory, as a plain implementation has them."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ceil(H / stride), ceil(W / stride))"""
        k, step, groups = self.kernel_size, self.stride, self.query.out_channels
        query, key = self.query(x[:, :, ::step, ::step]), self.key(x)
        size = query.shape[-2:]

        def near(maps: Tensor, empty: float) -> Tensor:
            padded = F.pad(maps, (k // 2,) * 4, value=empty)
            return F.unfold(padded, k, stride=step).unflatten(1, (maps.shape[1], k * k)).unflatten(-1, size)

        inside = near(torch.ones_like(key[:1, :1]), 0.0)
        keys, q = near(key, 0.0), query[:, :, None]
        kinds = {
            "product": lambda: q * keys,
            "squared": lambda: -((q - keys) ** 2),
            "absolute": lambda: -(q - keys).abs(),
        }
        logits = kinds[self.similarity]() + self.geometry()[..., None, None]
        weights = logits.float().masked_fill(inside == 0, -torch.inf).softmax(2).to(x.dtype)
        values = near(F.pad(x, (0, 0, 0, 0, 0, groups * self.shared - x.shape[1])), 0.0).unflatten(1, (groups, -1))
        out = torch.einsum("bgkhw,bgmkhw->bgmhw", weights, values).flatten(1, 2)[:, : x.shape[1]]
        return self.proj(out)


def build(name: str, tiny: bool) -> nn.Module:
    """One of ``CONTENDERS``; both kinds of LR-Net have the same weights.

    Raises:
        Cannot: with the reason.
    """
    torch.manual_seed(0)
    lrnet, swin = NAMES[tiny]
    if name == SWIN:
        return create_model(swin, num_classes=CLASSES, drop_path_rate=0.0)
    if name == RESNET:
        ensure_torchvision()
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise Cannot(f"timm is not installed: {error}") from error
        return timm.create_model("resnet50", num_classes=CLASSES)
    model = create_model(lrnet, num_classes=CLASSES)
    if name == UNFOLDED:
        for module in model.modules():
            if isinstance(module, LocalRelation):
                module.__class__ = Unfolded
    return model


def parts(content: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """What a page can show."""
    rows = content["speed"]
    return {
        "speed": lambda: table(rows),
        "machine": lambda: "\n\n".join(dict.fromkeys(tables.machine(row["environment"]) for row in rows)),
    }


def table(cases: list[Row]) -> str:
    """A row per contender, and below what is compared."""
    return (
        f"{speed_table(cases, OURS, segment.title)}\n\nLR-Net-50, Swin V1-T and timm's ResNet-50 from random weights on random images. Training is "
        f"forward, cross entropy, backward and an AdamW step. `{UNFOLDED}` has the same weights and copies the 49 neighbours of each "
        f'place side by side, as a plain implementation does; "difference" is that of its logits, or of loss and gradients.'
    )
