"""The hybrid task cascade (Chen et al., arXiv 1901.07518) and what Swin's HTC++ adds to it.

Beyond a cascade: the masks of a stage are predicted from the boxes that this stage has just moved; each mask head takes in the
features of the one before; and a semantic map is predicted, whose features are added to those of every region. HTC++ adds one
layer of attention over the whole last map of the backbone (Swin V1 article, appendix; the layer's form is that of ViT-Adapter's
public reproduction: pre-norm, a feed-forward part of ratio 4, a norm at the end, no position term).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.heads.cascade import STAGES, WEIGHT, CascadeHead
from swinscale.heads.config import DetectConfig
from swinscale.heads.convs import conv, relu_deviation
from swinscale.heads.detections import Detections
from swinscale.heads.roi import POOLED, Sizes, mask_loss, mask_regions, pool, with_masks
from swinscale.heads.rpn import Targets

LEVEL = 1
"""The level at whose resolution the semantic map is made."""
SEMANTIC_WEIGHT = 0.2
IGNORED = 255
"""Value in a semantic map that takes no part in the loss."""


class SemanticHead(nn.Module):
    """All levels, brought to one resolution and added up → a semantic map, and features for the regions."""

    def __init__(self, config: DetectConfig, outputs: int, levels: int):
        super().__init__()
        width = config.channels
        self.laterals = nn.ModuleList(conv(width, width, 1) for _ in range(levels))
        self.convs = nn.ModuleList(conv(width, width, 3) for _ in range(4))
        self.embed = conv(width, width, 1)
        self.predict = nn.Conv2d(width, outputs, 1)
        self.initially_normal = {
            f"{name}.weight": relu_deviation(layer)
            for name, layer in self.named_modules()
            if isinstance(layer, nn.Conv2d) and name != "predict"
        }

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) of each level → (B, outputs, H, W) logits and (B, C, H, W) features, at the second level's size."""
        size = maps[LEVEL].shape[-2:]
        x: Tensor | float = 0.0
        for lateral, level in zip(self.laterals, maps, strict=True):
            same = level.shape[-2:] == size
            x = x + lateral(level if same else F.interpolate(level, size, mode="bilinear", align_corners=True))
        for layer in self.convs:
            x = layer(x)
        return self.predict(x).float(), self.embed(x)

    def loss(self, logits: Tensor, targets: Targets, stride: int) -> Tensor:
        """Mean cross-entropy over the cells whose centre lies in an image and is not ``IGNORED``."""
        wanted = torch.full((len(targets), *logits.shape[-2:]), IGNORED, dtype=torch.int64, device=logits.device)
        for into, target in zip(wanted, targets, strict=True):
            cells = target["semantic"].to(into)[stride // 2 :: stride, stride // 2 :: stride]
            into[: cells.shape[0], : cells.shape[1]] = cells
        total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        return total / (wanted != IGNORED).sum().clamp(min=1)


class HTCHead(CascadeHead):
    """A cascade whose masks and semantic map are interleaved with its boxes.

    Args:
        strides: pixels per cell of all levels; regions are pooled from all but the last.
    """

    def __init__(self, config: DetectConfig, num_classes: int, strides: Sequence[int]):
        super().__init__(config, num_classes, strides[:-1])
        self.levels = tuple(strides)
        outputs = config.semantic_outputs(num_classes)
        self.semantic = SemanticHead(config, outputs, len(strides)) if config.semantic else None

    def pooled(self, maps: Sequence[Tensor], semantic: Tensor | None, boxes: Sequence[Tensor], side: int) -> Tensor:
        """(N, C, side, side): the features of the regions, those of the semantic map added."""
        x = pool(maps[:-1], self.strides, boxes, side)
        if semantic is None:
            return x
        more = pool([semantic], [self.levels[LEVEL]], boxes, 2 * POOLED)
        return x + (more if side == 2 * POOLED else F.adaptive_avg_pool2d(more, side))

    def mask_logits(self, stage: int, regions: Tensor) -> Tensor:
        """(N, C, s, s) → (N, K, 2s, 2s) of a stage, whose head takes in what those before it see in the same regions."""
        before = None
        for earlier in range(stage + 1):
            before = self.mask_head(earlier).features(regions, before)
        assert before is not None
        return self.mask_head(stage)(before)

    def forward(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes, targets: Targets
    ) -> dict[str, Tensor]:
        """The losses of one batch; ``maps`` (B, C, h, w) of every level, ``proposals`` (n, 4) of each image."""
        losses: dict[str, Tensor] = {}
        semantic = None
        if self.semantic is not None:
            logits, semantic = self.semantic(maps)
            losses["semantic"] = SEMANTIC_WEIGHT * self.semantic.loss(logits, targets, self.levels[LEVEL])
        for stage in range(STAGES):
            regions = self.sample(stage, proposals, targets)
            logits, deltas = self.box_head(stage)(self.pooled(maps, semantic, regions.boxes, POOLED))
            found = self.box_head(stage).losses(logits, deltas, regions)
            proposals = self.proposals_after(stage, logits, deltas, regions, sizes)
            if self.config.masks:
                regions = self.sample(stage, proposals, targets)
                pooled = self.pooled(maps, semantic, mask_regions(regions), self.config.mask_size // 2)
                found["mask"] = mask_loss(self.mask_logits(stage, pooled), regions, targets)
            losses |= {f"{name}{stage}": WEIGHT[stage] * loss for name, loss in found.items()}
        return losses

    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes) -> list[Detections]:
        """What is in each image."""
        semantic = None if self.semantic is None else self.semantic(maps)[1]
        found = self.detect_boxes(lambda boxes: self.pooled(maps, semantic, boxes, POOLED), proposals, sizes)
        if self.config.masks:
            pooled = self.pooled(maps, semantic, [f.boxes for f in found], self.config.mask_size // 2)
            before, masks = None, []
            for stage in range(STAGES):
                before = self.mask_head(stage).features(pooled, before)
                masks.append(self.mask_head(stage)(before).sigmoid())
            found = with_masks(found, torch.stack(masks).mean(0))
        return found


class GlobalAttention(nn.Module):
    """A Transformer layer in which every cell of a map attends to all cells of its image, but not to padding."""

    def __init__(self, dim: int, num_heads: int, drop_path_rate: float):
        super().__init__()
        self.num_heads, self.drop_path_rate = num_heads, drop_path_rate
        self.norm1, self.norm2, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def drop_path(self, x: Tensor) -> Tensor:
        """Drops the branch for whole samples and scales the others up."""
        if not self.training or self.drop_path_rate == 0:
            return x
        keep = x.new_empty((len(x), 1, 1)).bernoulli_(1 - self.drop_path_rate)
        return x * keep / (1 - self.drop_path_rate)

    def forward(self, maps: Tensor, sizes: Sizes, stride: int) -> Tensor:
        """(B, D, h, w) → (B, D, h, w). ``sizes``: of the images in pixels; ``stride``: pixels per cell."""
        height, width = maps.shape[-2:]
        rows = torch.tensor([-(-h // stride) for h, _ in sizes], device=maps.device)
        columns = torch.tensor([-(-w // stride) for _, w in sizes], device=maps.device)
        inside = torch.arange(height, device=maps.device)[None, :, None] < rows[:, None, None]
        inside = inside & (torch.arange(width, device=maps.device) < columns[:, None, None])
        x = maps.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = inside.flatten(1)[:, None, None]  # True: may be attended
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.drop_path(self.proj(attended))
        x = x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return self.norm(x).transpose(1, 2).unflatten(2, (height, width))
