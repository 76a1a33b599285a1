"""LR-Net, the ancestor of window attention: a ResNet whose convolutions are local relation layers, for images of any size.

A local relation layer (arXiv 1904.11491) gives each pixel weights for the k×k pixels around it: a softmax over the similarity of
its query to their keys, which are single numbers, plus a learned prior of the offset. Groups of channels share weights, and what is
averaged is the input itself. The fast computation is in ``ops/local_relation.py``.

Where the article leaves a choice open, or we do not know it, ``LRNetConfig`` has a field. Groups of 8 do not divide 100 channels: the
last one has 4.

Shape letters: B batch, C channels, H, W the map, G groups, K = k·k offsets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swinscale.errors import UsageError
from swinscale.models.init import initial_values, reset_statistics
from swinscale.models.lrnet_config import LRNetConfig
from swinscale.models.stages import check_input, chosen_stages
from swinscale.ops.local_relation import local_relation


class LocalRelation(nn.Module):
    """A local relation layer: aggregation over the k×k neighbourhood, then a 1×1 layer."""

    offsets: Tensor

    def __init__(self, config: LRNetConfig, dim: int, stride: int = 1):
        super().__init__()
        groups = math.ceil(dim / config.shared_channels)
        self.shared, self.stride = config.shared_channels, stride
        self.kernel_size, self.similarity = config.kernel_size, config.similarity
        self.query = nn.Conv2d(dim, groups, 1)
        self.key = nn.Conv2d(dim, groups, 1, bias=False)  # the softmax, or the query's bias, would cancel it
        self.prior = nn.Sequential(
            nn.Conv2d(2, config.prior_hidden, 1), nn.ReLU(), nn.Conv2d(config.prior_hidden, groups, 1, bias=False)
        )
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ceil(H / stride), ceil(W / stride))"""
        query, key = self.query(x[:, :, :: self.stride, :: self.stride]), self.key(x)
        size, kind = self.kernel_size, self.similarity
        return cast(
            Tensor, self.proj(local_relation(x, query, key, self.geometry(), size, self.shared, kind, self.stride))
        )

    def geometry(self) -> Tensor:
        """(G, K): the prior of each offset, from its coordinates in [-1, 1]."""
        line = torch.linspace(-1, 1, self.kernel_size) if self.kernel_size > 1 else torch.zeros(1)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).to(self.proj.weight)
        return cast(Tensor, self.prior(grid[None])[0].flatten(1))


class Bottleneck(nn.Module):
    """1×1 layer, local relation, 1×1 layer, each with a norm, beside a shortcut."""

    initially_zero = ("norm3.weight",)
    """A block starts as its shortcut, which helps deep residual networks to begin to learn (arXiv 1706.02677)."""

    def __init__(self, config: LRNetConfig, dim: int, stage: int, stride: int):
        super().__init__()
        width, out = config.widths[stage], config.stage_dims[stage]
        self.stride = stride
        self.conv1, self.norm1 = nn.Conv2d(dim, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relation, self.norm2 = LocalRelation(config, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if dim != out or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(dim, out, 1, bias=False), nn.BatchNorm2d(out))
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D, H / stride, W / stride), rounded up"""
        if not self.checkpointing or not torch.is_grad_enabled():
            return self.transform(x)
        contexts = lambda: (nullcontext(), _statistics_as_they_are(self))  # noqa: E731
        return cast(Tensor, checkpoint(self.transform, x, use_reentrant=False, context_fn=contexts))

    def transform(self, x: Tensor) -> Tensor:
        """``forward`` without activation checkpointing."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.relation(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x[:, :, :: self.stride, :: self.stride]))


@contextmanager
def _statistics_as_they_are(module: nn.Module) -> Iterator[None]:
    """Batch norms see a batch again, which their running statistics count already."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, cast(Tensor, norm.num_batches_tracked).clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, seen) in zip(norms, before, strict=True):
            norm.momentum = momentum
            cast(Tensor, norm.num_batches_tracked).copy_(seen)


class LRStage(nn.Module):
    """The blocks of one resolution; the first one of all but the first stage halves the map."""

    def __init__(self, config: LRNetConfig, stage: int):
        super().__init__()
        dims = [config.stage_dims[stage - 1] if stage else config.stem_width] + [
            config.stage_dims[stage]
        ] * config.depths[stage]
        self.blocks = nn.ModuleList(
            Bottleneck(config, dims[block], stage, 2 if stage and not block else 1)
            for block in range(config.depths[stage])
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D, H, W), or half the height and width"""
        for block in self.blocks:
            x = block(x)
        return x


class Stem(nn.Module):
    """Pixels to the first map: a 1×1 layer, local relation, and in the published networks max-pooling."""

    def __init__(self, config: LRNetConfig):
        super().__init__()
        width = config.stem_width
        self.conv, self.norm1 = nn.Conv2d(config.in_chans, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relation, self.norm2 = LocalRelation(config, width, min(config.stem_stride, 2)), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if config.stem_stride == 4 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, stem_width, H / stem_stride, W / stem_stride), rounded up"""
        x = F.relu(self.norm1(self.conv(x)))
        return cast(Tensor, self.pool(F.relu(self.norm2(self.relation(x)))))


class LRNet(nn.Module):
    """LR-Net: images (B, C, H, W) of any size to class logits. The surface is that of ``SwinTransformer``."""

    def __init__(self, config: LRNetConfig):
        super().__init__()
        self.config = config
        self.num_classes, self.num_features = config.num_classes, config.num_features
        self.head_hidden_size = config.num_features
        self.stem = Stem(config)
        self.layers: Any = nn.ModuleList(LRStage(config, stage) for stage in range(len(config.depths)))
        self.head = nn.Linear(config.num_features, config.num_classes) if config.num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": dim, "reduction": strides[-1], "module": f"layers.{stage}"}
            for stage, (dim, strides) in enumerate(zip(config.stage_dims, config.stage_strides(), strict=True))
        ]
        if self.stem.conv.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value (``init.py``); ``seed`` None: one from PyTorch's random state."""
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        for name, value in initial_values(self, seed):
            self.get_parameter(name).copy_(value)
        reset_statistics(self)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, *size) → (B, stem_width, *map)"""
        check_input(x, 2, self.config.in_chans)
        return cast(Tensor, self.stem(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *size) → (B, *last map, num_features), channels last."""
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x)
        return x.movedim(1, -1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, then the classifier: (B, *map, num_features) → (B, num_classes)."""
        x = x.flatten(1, -2).mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) → (B, num_classes); pooled features when there is no classifier."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of chosen stages, with strides 4, 8, 16, 32 for the published stem. Arguments: ``SwinTransformer`` has the same.

        Args:
            norm: changes nothing: there is no final norm.

        Returns: (last features, channels last, and the list of features), or the list alone.
        """
        wanted = chosen_stages(indices, output_fmt, len(self.layers))
        x, maps = self.embed(x), []
        for stage in self.layers[: max(wanted) + 1] if stop_early else self.layers:
            x = stage(x)
            maps.append(x)
        features = [maps[i] if output_fmt == "NCHW" else maps[i].movedim(1, -1) for i in wanted]
        return features if intermediates_only else (x.movedim(1, -1), features)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one; 0 removes it."""
        like = self.stem.conv.weight
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        if num_classes and like.device.type != "meta":
            nn.init.trunc_normal_(cast(Tensor, self.head.weight), std=0.02)
            nn.init.zeros_(cast(Tensor, self.head.bias))

    def units(self) -> list[nn.Module]:
        """Blocks in forward order: what is compiled, and spread over devices, one by one."""
        return [block for stage in self.layers for block in stage.blocks]

    def set_grad_checkpointing(self, mode: bool | str | Sequence[str] = True) -> None:
        """Compute the activations of blocks again in the backward pass instead of keeping them.

        Args:
            mode: "block" or True: only inputs of blocks are kept; "none" or False: all. One for the model, or one per stage.
        """
        chosen = [mode] * len(self.layers) if isinstance(mode, (bool, str)) else list(mode)
        known = {True: True, False: False, "block": True, "none": False}
        if len(chosen) != len(self.layers) or not all(one in known for one in chosen):
            raise UsageError(
                f"grad_checkpointing={mode} is not allowed: LR-Net has 'none' and 'block', one for all or one for each of its "
                f"{len(self.layers)} stages."
            )
        for stage, one in zip(self.layers, chosen, strict=True):
            for block in stage.blocks:
                block.checkpointing = known[one]

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not pull to zero, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if ".prior." in name}
