"""Parameter groups and learning-rate schedules of the Swin and SimMIM recipes."""

from __future__ import annotations

import logging
import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swinscale.config import check_ranges
from swinscale.errors import UsageError
from swinscale.tasks.base import Task


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Rates are given for ``lr_reference_batch`` images per step and scaled to the batch in use.

    Args:
        lr: peak learning rate at the reference batch. The published configurations give it per 512 images.
        lr_scaling: "linear" (times batch / reference), "sqrt", or "none".
        warmup_lr, min_lr: rate at the first step, and at the end of the cosine; scaled like ``lr``.
        schedule: after the warm-up: "cosine" to ``min_lr``, "linear" to ``min_lr``, "multistep" (times ``gamma`` at each
            epoch of ``milestones``), or "constant".
        by_epoch: the schedule after the warm-up moves once per epoch (OpenMMLab) instead of at every step.
        warmup_epochs: linear warm-up from ``warmup_lr``.
        warmup_factor: each group warms up from this share of its own rate, and ``warmup_lr`` does not count (OpenMMLab); 0: from
            ``warmup_lr``.
        warmup_prefix: the schedule's clock starts after the warm-up (microsoft/Swin-Transformer); False: the warm-up
            overlays its beginning (microsoft/SimMIM).
        weight_decay: not applied to biases, norms and the task's own list (position biases, logit scales, mask token).
        layer_decay: factor on the rate per layer counted from the output; 1: none.
        backbone_lr: factor on the rate of the backbone, where a task has more than that: heads, or the last layer of a classifier.
        clip_grad: largest global gradient norm; 0: no clipping.
    """

    lr: float = 5e-4
    lr_reference_batch: int = 512
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    warmup_lr: float = 5e-7
    min_lr: float = 5e-6
    schedule: Literal["cosine", "linear", "multistep", "constant"] = "cosine"
    by_epoch: bool = False
    warmup_epochs: float = 20
    warmup_factor: float = 0.0
    warmup_prefix: bool = True
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0
    backbone_lr: float = 1.0
    clip_grad: float = 5.0

    def __post_init__(self) -> None:
        at_least_0 = ("lr", "warmup_lr", "min_lr", "warmup_epochs", "milestones", "weight_decay", "clip_grad")
        check_ranges(
            self,
            "train.optim.",
            lr_reference_batch="[1, inf)",
            gamma="(0, 1]",
            warmup_factor="[0, 1]",
            betas="[0, 1)",
            eps="(0, inf)",
            layer_decay="(0, 1]",
            backbone_lr="(0, inf)",
            **dict.fromkeys(at_least_0, "[0, inf)"),
        )

    def scaled(self, rate: float, batch_size: int) -> float:
        """``rate`` for steps of ``batch_size`` images."""
        ratio = batch_size / self.lr_reference_batch
        return rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.lr_scaling]

    def in_steps(self, batch_size: int, steps_per_epoch: int) -> dict[str, float]:
        """What a run makes of these settings, for its manifest."""
        return {
            "effective_batch": batch_size,
            "scaled_lr": self.scaled(self.lr, batch_size),
            "scaled_min_lr": self.scaled(self.min_lr, batch_size),
            "warmup_steps": round(self.warmup_epochs * steps_per_epoch),
            "steps_per_epoch": steps_per_epoch,
        }


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the optimiser step, counted from 0."""

    config: OptimConfig
    batch_size: int
    steps_per_epoch: float
    total_steps: int

    def lr(self, step: int, layer_scale: float = 1.0) -> float:
        """Rate of ``step`` for a group whose base rate is multiplied by ``layer_scale``.

        Warm-up start and minimum are common to all groups, as in the published code.
        """
        c = self.config
        base = c.scaled(c.lr, self.batch_size) * layer_scale
        start, low = (c.scaled(rate, self.batch_size) for rate in (c.warmup_lr, c.min_lr))
        start = c.warmup_factor * base or start
        warmup = round(c.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return start + (base - start) * step / warmup
        if c.by_epoch:
            step = max(warmup, math.floor(step // self.steps_per_epoch * self.steps_per_epoch))
        shift = warmup if c.warmup_prefix else 0
        progress = min((step - shift) / max(self.total_steps - shift, 1), 1.0)
        if c.schedule == "cosine":
            return low + 0.5 * (base - low) * (1 + math.cos(math.pi * progress))
        if c.schedule == "linear":
            return base + (low - base) * progress
        if c.schedule == "multistep":
            return base * c.gamma ** sum(step >= round(m * self.steps_per_epoch) for m in c.milestones)
        return base

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Sets the rate of every parameter group for ``step``; returns the largest."""
        for group in optimizer.param_groups:
            rate = self.lr(step, group["layer_scale"])
            if isinstance(group["lr"], Tensor):  # torchao compiles its update for a rate in a tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return max(self.lr(step, group["layer_scale"]) for group in optimizer.param_groups)


def parameter_groups(task: Task, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups trainable parameters by depth and by whether weight decay acts on them.

    Each group holds ``params``, ``names``, ``layer``, ``layer_scale`` (= layer_decay ** distance from the output, times
    ``backbone_lr`` in the backbone) and ``weight_decay``.

    Raises:
        UsageError: if nothing is trainable.
    """
    exempt = task.no_weight_decay()
    classifier = getattr(task.backbone, "get_classifier", nn.Identity)()
    inside = {id(p) for p in task.backbone.parameters()} - {id(p) for p in classifier.parameters()}
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = task.layer_id(name)
        decay = not (parameter.ndim == 1 or name.endswith("bias") or name in exempt)
        scale = config.layer_decay ** (task.num_layers - layer) * (config.backbone_lr if id(parameter) in inside else 1)
        group = groups.setdefault(
            (layer, scale, decay),
            {
                "params": [],
                "names": [],
                "layer": layer,
                "layer_scale": scale,
                "weight_decay": config.weight_decay if decay else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise UsageError("Nothing to train: every parameter of the model is frozen.")
    return [groups[key] for key in sorted(groups)]


def decay_table(groups: list[dict[str, Any]]) -> list[tuple[str, int, float, float]]:
    """(parameter, layer id, learning-rate factor, weight decay) of every trainable parameter: an audit of the groups."""
    rows = ((name, g["layer"], g["layer_scale"], g["weight_decay"]) for g in groups for name in g["names"])
    return sorted(rows, key=lambda row: (row[1], row[0]))


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, bits: int = 32) -> torch.optim.Optimizer:
    """AdamW over ``groups``; rates are set by ``Schedule.apply`` before each step.

    Args:
        bits: 8 keeps both moments in blocks of 8-bit numbers (torchao; Dettmers et al., arXiv 2110.02861). Tensors of fewer
            than 4,096 values stay in fp32.
    """
    settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if bits == 32:
        return torch.optim.AdamW(_named(groups, lambda _: True), **settings)
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it lists libraries for GPUs that are not here
    from torchao.optim import AdamW8bit

    # Its compiled update takes all shares of a tensor to be of one size (torchao 0.18); the others are small.
    compressed, plain = _named(groups, _evenly_spread), _named(groups, lambda p: not _evenly_spread(p))
    optimizers = [AdamW8bit(compressed, **settings)] if compressed else []
    optimizers += [torch.optim.AdamW(plain, **settings)] if plain else []
    return optimizers[0] if len(optimizers) == 1 else _Together(optimizers)


def _named(groups: list[dict[str, Any]], wanted: Callable[[Tensor], bool]) -> list[dict[str, Any]]:
    """The groups as an optimiser takes them, with the parameters that are ``wanted``, each with its name."""
    chosen = [
        {**group, "params": [pair for pair in zip(group["names"], group["params"], strict=True) if wanted(pair[1])]}
        for group in groups
    ]
    return [{k: v for k, v in group.items() if k != "names"} for group in chosen if group["params"]]


def _evenly_spread(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return True
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return parameter.shape[0] % math.prod(size for placement, size in sizes if placement.is_shard()) == 0


class _Together(torch.optim.Optimizer):
    """Optimisers that act as one, each on its own parameters."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """States by parameter."""
        return ChainMap(*(optimizer.state for optimizer in self.optimizers))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)
