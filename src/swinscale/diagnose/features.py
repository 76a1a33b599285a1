"""What features of a frozen network are worth: their rank, and classifiers on top of them.

Plain functions of tensors; where the features come from does not matter. Everything is computed in one pass on the device
of the features, without random numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.errors import UsageError

PENALTIES = tuple(10.0**power for power in range(-4, 3))


class FeatureRank(NamedTuple):
    """How many directions features vary in."""

    effective: float
    """exp(entropy of the singular values over their sum), 1 to min(N − 1, D); 0 if no feature varies. Roy and Vetterli,
    EUSIPCO 2007."""
    largest_share: float
    """Share of the variance along the strongest direction, 0 to 1; 1 if no feature varies."""


def feature_rank(features: Tensor) -> FeatureRank:
    """(N, D) features of N images → their rank around their mean.

    Raises:
        UsageError: for fewer than two images.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(
            f"Features of shape {tuple(features.shape)} have no rank: give (images, channels), two images or more."
        )
    features = features.float()
    values = torch.linalg.svdvals(features - features.mean(0))
    # Equal features differ by rounding, and that noise has a high rank.
    noise = torch.finfo(features.dtype).eps * max(features.shape) ** 0.5 * features.norm()
    values = values[values > noise].double()
    if not len(values):
        return FeatureRank(0.0, 1.0)
    share = values / values.sum()
    variance = values.square()
    return FeatureRank((-(share * share.log()).sum()).exp().item(), (variance.max() / variance.sum()).item())


def nearest_neighbours(
    train: Tensor, labels: Tensor, features: Tensor, neighbours: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classes by a vote of the most similar training images, each weighted by exp(cosine / temperature).

    Wu and others, CVPR 2018 (arXiv 1805.01978).

    Args:
        train: (M, D) features of training images.
        labels: (M,) their classes, 0 and up.
        features: (N, D) features of the images to classify.
        neighbours: how many vote; all where there are fewer.

    Returns:
        (N,) predicted classes.
    """
    _check(train, labels, features)
    similarity = F.normalize(features.float(), dim=1) @ F.normalize(train.float(), dim=1).T
    closest, index = similarity.topk(min(neighbours, len(train)), dim=1)
    votes = similarity.new_zeros(len(features), int(labels.max()) + 1)
    weights = ((closest - closest[:, :1]) / temperature).exp()  # the largest is 1: exp(1 / 0.07) is near fp16's limit
    return votes.scatter_add_(1, labels[index], weights).argmax(1)


def linear_probe(train: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """Classes by a linear classifier: ridge regression of one-hot labels on standardised features, in closed form.

    The penalty is the one of seven, 1e-4 to 100 per training image, whose leave-one-out predictions are right most often (the
    smallest squared error decides between equals).

    Args:
        train: (M, D) features of training images.
        labels: (M,) their classes, 0 and up.
        features: (N, D) features of the images to classify.

    Returns:
        (N,) predicted classes.
    """
    _check(train, labels, features)
    mean, deviation = train.double().mean(0), train.double().std(0, correction=0).clamp(min=1e-6)
    inputs = (train.double() - mean) / deviation
    target = F.one_hot(labels).double()
    offset = target.mean(0)
    # inputs = left · values · rightᵀ: with it, the solution for each penalty is a matter of rescaling.
    left, values, right = torch.linalg.svd(inputs, full_matrices=False)
    projected = left.T @ (target - offset)
    best: tuple[float, float] | None = None
    for penalty in PENALTIES:
        shrink = values.square() / (values.square() + penalty * len(train))
        fitted = left @ (shrink[:, None] * projected) + offset
        leverage = (left.square() @ shrink + 1 / len(train)).clamp(max=1 - 1e-9)
        left_out = target - (target - fitted) / (1 - leverage)[:, None]
        right_ones = (left_out.argmax(1) == labels).double().mean().item()
        score = (right_ones, -(left_out - target).square().mean().item())
        if best is None or score > best:
            best, weights = score, right.T @ (shrink / values.clamp(min=1e-12))[:, None].mul(projected)
    return ((features.double() - mean) / deviation @ weights + offset).argmax(1)


def _check(train: Tensor, labels: Tensor, features: Tensor) -> None:
    fits = train.ndim == features.ndim == 2 and train.shape[1] == features.shape[1]
    if not fits or labels.shape != train.shape[:1] or not len(train) or bool((labels < 0).any()):
        raise UsageError(
            f"Features of shape {tuple(train.shape)} with labels of shape {tuple(labels.shape)} cannot classify features of "
            f"shape {tuple(features.shape)}: give (images, channels) of as many channels, and a class of 0 or more per "
            f"training image."
        )
