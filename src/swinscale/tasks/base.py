"""What the training loop knows of a task: a model together with its objective and its measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinscale.models.init import initial_values, reset_statistics

Batch = dict[str, Any]
"""What a loader yields: ``image`` (B, C, H, W) float32, ``index`` (B,), and what the task needs besides."""


class Task(nn.Module):
    """A model with its objective: batch → loss and metrics. One loop trains every subclass.

    Class attributes:
        metric: the name of the measure that decides which checkpoint is the best one.
        higher_is_better: whether more of it is better.
    """

    metric: str = "loss"
    higher_is_better: bool = False
    preprocessing: dict[str, Any]
    """How images become inputs (size, mean, std, class names): saved beside the weights, read by evaluation."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, a mean over the batch, and further scalars for the log."""
        raise NotImplementedError

    def usual_targets(self, images: Tensor) -> Batch:
        """What a batch holds beside ``images`` (B, C, H, W), ``label``, ``mask`` and ``index``, as large as it usually is at most."""
        return {}

    def rehearse(self, batch: Batch) -> Tensor:
        """The training loss on tensors without content, for the prediction of memory: overridden where the sizes of tensors depend
        on what is in the images."""
        return self(batch)[0]

    def new_metrics(self) -> dict[str, Any]:
        """Fresh torchmetrics objects by name; they add up over batches and over processes."""
        raise NotImplementedError

    def update_metrics(self, metrics: dict[str, Any], batch: Batch) -> None:
        """Adds one evaluation batch to ``metrics``."""
        raise NotImplementedError

    def passes(self, batch: Batch) -> int:
        """How many forward passes ``update_metrics`` makes of a batch: under sharding, processes must make the same number."""
        return 1

    def idle_pass(self, batch: Batch) -> None:
        """One forward pass, of any part of the batch, whose result nobody needs: where others make more passes."""
        raise NotImplementedError

    def take_part(self, metrics: dict[str, Any], batch: Batch, passes: int) -> None:
        """``update_metrics``, and idle passes until there were ``passes``. One call, for which parameters are gathered once."""
        self.update_metrics(metrics, batch)
        for _ in range(passes - self.passes(batch)):
            self.idle_pass(batch)

    @property
    def backbone(self) -> nn.Module:
        """The network whose memory the settings ``train.memory`` are about: a ``SwinTransformer``, or any other."""
        raise NotImplementedError

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Gives every parameter its initial value (``swinscale.models.init``)."""
        for name, value in initial_values(self, seed):
            self.get_parameter(name).copy_(value)
        reset_statistics(self)

    @property
    def num_layers(self) -> int:
        """The largest value of ``layer_id``."""
        return 0

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning-rate decay: 0 is the input, ``num_layers`` the output."""
        return self.num_layers

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides those with one axis (norms) and biases."""
        return set()

    def save_pretrained(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors``, from which the task can be used again.

        Args:
            state: the state dict of the task, where this process does not hold it whole.
        """
        raise NotImplementedError
