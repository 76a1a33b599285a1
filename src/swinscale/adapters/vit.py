"""timm's plain Vision Transformer as a model of recipes and tasks: the other encoder of the SimMIM article.

    from swinscale.adapters.vit import ViT, from_pretrained
    from swinscale.models.vit_config import ViTConfig

    simmim = SimMIM(ViT(ViTConfig(num_classes=0, init_values=0.1)))
    model = from_pretrained("runs/desk_finetune_vit/best")

Parameters have timm's names, and a saved directory records the arguments with which ``timm.create_model`` builds the same network.
The published one (microsoft/SimMIM) has a relative position bias that all blocks share; timm's has a learned position embedding,
which is resized for other sizes. Both give every branch a gain (``init_values``) and average the tokens; here the last norm comes
before the mean in both stages, there after it when fine-tuning.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from swinscale.adapters import needs
from swinscale.errors import UsageError
from swinscale.models.init import initial_values
from swinscale.models.recompute import Checkpointing, recompute
from swinscale.models.variants import check_fields
from swinscale.models.vit_config import ViTConfig
from swinscale.weights.hub import resolve
from swinscale.weights.records import read_model_config
from swinscale.weights.resize import ChannelInit
from swinscale.weights.vit import load_vit

with needs("timm"):
    from timm.models.vision_transformer import VisionTransformer

log = logging.getLogger(__name__)


class ViT(VisionTransformer):
    """timm's ``VisionTransformer``, with what tasks ask of a backbone: images (B, C, H, W) of any size → (B, num_classes)."""

    def __init__(self, config: ViTConfig):
        super().__init__(**config.timm_arguments(), weight_init="skip")
        self.config = config
        self.checkpointing: Checkpointing = "none"
        self.initially_normal = {"cls_token": 0.02, "pos_embed": 0.02}
        gains = [f"{path}.gamma" for path, _ in self.named_modules() if path.endswith((".ls1", ".ls2"))]
        self.initially_constant = dict.fromkeys(gains if config.init_values else (), config.init_values)
        if not self.norm.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:  # type: ignore[override]
        """Gives every parameter its initial value (``models.init``); ``seed`` None: one from PyTorch's random state."""
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        for name, value in initial_values(self, seed):
            self.get_parameter(name).copy_(value)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, rows, columns, D): the patches, without positions; an image is padded to whole patches at its end.

        Raises:
            UsageError: for an input of another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_chans or not x.shape[2:].numel():
            raise UsageError(
                f"The input has shape {tuple(x.shape)}, but this model reads (batch, {self.config.in_chans} channels, height, "
                f"width), neither of them empty."
            )
        return cast(Tensor, self.patch_embed(x))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """(B, rows, columns, D) patches → the same shape, normalised. The class token takes part and is left out at the end."""
        return self._blocks(x)[:, self.num_prefix_tokens :].unflatten(1, x.shape[1:3])

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) → (B, 1 + rows · columns, D), normalised; the class token comes first."""
        return self._blocks(self.embed(x))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) → (B, num_classes); the mean of the tokens where there is no classifier."""
        return self.forward_head(self.forward_features(x))

    def _blocks(self, x: Tensor) -> Tensor:
        x = self._pos_embed(x)
        for block in self.blocks:
            x = recompute(self.checkpointing, block, x)
        return cast(Tensor, self.norm(x))

    def forward_intermediates(  # type: ignore[override]
        self, x: Tensor, indices: int | Sequence[int] | None = None, output_fmt: str = "NCHW", **options: Any
    ) -> Any:
        """As timm's, where every block counts as a stage, with the maps as they are, "NHWC", besides."""
        if not isinstance(indices, (int, type(None))):
            depth = self.config.depth
            if wrong := [index for index in indices if not -depth <= index < depth]:
                raise UsageError(f"There is no block {wrong[0]}: this model has blocks 0 to {depth - 1}.")
            indices = list(indices)
        found: Any = super().forward_intermediates(
            x, indices, output_fmt="NLC" if output_fmt == "NLC" else "NCHW", **options
        )
        if output_fmt != "NHWC":
            return found
        last, maps = (None, found) if options.get("intermediates_only") else found
        maps = [one.movedim(1, -1) for one in maps]
        return maps if last is None else (last, maps)

    def reset_classifier(self, num_classes: int) -> None:  # type: ignore[override]
        """Replaces the classifier by a fresh one; 0 removes it."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        super().reset_classifier(num_classes)

    def units(self) -> Sequence[nn.Module]:
        """Blocks in forward order: what is compiled, and spread over devices, one by one."""
        return list(self.blocks)

    def set_grad_checkpointing(self, enable: bool | Checkpointing = True) -> None:
        """Compute activations again in the backward pass instead of keeping them: "none", "selective", "block"."""
        self.checkpointing = enable if isinstance(enable, str) else "block" if enable else "none"


def from_pretrained(
    path: str | Path, *, in_chans_init: ChannelInit = "repeat", verify: bool = True, **overrides: Any
) -> ViT:
    """The ViT in a directory or repository of this library; of masked image modelling, its encoder. ``swinscale.from_pretrained``
    does the same for our own networks.

    Args:
        overrides: fields of ``ViTConfig``. For another ``img_size`` the position embedding is resized.

    Raises:
        UsageError: for a place that holds no ViT, or fields that do not exist.
    """
    place = resolve(path, verify=verify)
    config = read_model_config(place)
    if not isinstance(config, ViTConfig):
        raise UsageError(f"{path} does not say that it is a ViT: open it with swinscale.from_pretrained.")
    check_fields(config, overrides)
    model = ViT(dataclasses.replace(config, **overrides))
    report = load_vit(model, place, in_chans_init=in_chans_init, verify=verify)
    log.log(logging.INFO if report.plain else logging.WARNING, "%s", report)
    return model
