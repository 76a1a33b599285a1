"""Convolutions of heads: what detectors and segmenters have in common."""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """PyTorch's, but a single value per channel, which has no deviation, is normalised by the running statistics in training
    too: a map pooled to one cell, of one image. Converted to ``SyncBatchNorm`` on several GPUs like any other."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] == input.shape[2] == input.shape[3] == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


def conv(channels: int, out: int, kernel: int, norm: bool = False) -> nn.Sequential:
    """A convolution of the same size, a batch norm if asked for, and a ReLU."""
    layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, *([BatchNorm(out)] if norm else []), nn.ReLU())


def relu_deviation(layer: nn.Module) -> float:
    """Standard deviation with which a layer before a ReLU keeps the size of its input (He et al., arXiv 1502.01852)."""
    return math.sqrt(2 / cast(Tensor, layer.weight)[0].numel())
