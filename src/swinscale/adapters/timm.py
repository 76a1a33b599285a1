"""timm: our models under its own functions, named ``swinscale_`` and our name.

    import swinscale.adapters.timm  # registers the names
    import timm

    model = timm.create_model("swinscale_swinv2_tiny_window8_256", num_classes=10)
    pyramid = timm.create_model("swinscale_swinv2_tiny_window8_256", features_only=True, out_indices=(1, 2, 3))

``pretrained=True`` needs a place to load from: ``pretrained_cfg_overlay={"file": "runs/demo/finetuned/best"}``, any directory
or file that ``swinscale.load_weights`` reads. Settings are those of ``SwinConfig``: ``drop_rate`` is dropout inside blocks.
Feature maps are not normalised, as timm's own are not.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from swinscale.adapters import needs
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.models.pyramid import drop_norm, keep_stages
from swinscale.models.variants import VARIANTS
from swinscale.weights import load_weights

with needs("timm"):
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

log = logging.getLogger(__name__)
PREFIX = "swinscale_"
FIELDS = {field.name for field in dataclasses.fields(SwinConfig)}


class TimmSwin(SwinTransformer):
    """A ``SwinTransformer`` with the methods that timm's training and feature code calls."""

    output_fmt = "NHWC"  # of forward_features

    def __init__(self, name: str, **settings: Any):
        if settings.pop("global_pool", "avg") not in ("avg", None):
            raise UsageError("global_pool must be 'avg': a Swin Transformer averages its last map.")
        for setting in settings:
            if setting not in FIELDS:
                raise UsageError(f"'{PREFIX}{name}' has no setting '{setting}'. Allowed: {', '.join(sorted(FIELDS))}.")
        super().__init__(model_config(name, **settings))
        self.in_chans = self.config.in_chans

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one; 0 removes it."""
        if global_pool not in (None, "", "avg"):
            raise UsageError(f"global_pool='{global_pool}' is not allowed: a Swin Transformer averages its last map.")
        super().reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: Any = True) -> None:
        """``SwinTransformer.set_grad_checkpointing`` under the name that timm gives its argument."""
        super().set_grad_checkpointing(enable)

    def load_pretrained(self, path: str, **_: Any) -> None:
        """Weights of any layout, transferred to the windows and channels of this model; see ``swinscale.load_weights``."""
        report = load_weights(self, path)
        log.log(logging.INFO if report.plain else logging.WARNING, "%s", report)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what features at ``indices`` do not need; returns the stages as positive numbers."""
        count, head = len(self.layers), self.head
        named = range(count)[-indices:] if isinstance(indices, int) else indices
        wanted = [stage + count if stage < 0 else stage for stage in named]
        last = max(wanted)
        keep_stages(self, list(range(last + 1)))
        if prune_norm:
            drop_norm(self)
        if not prune_head and last == len(self.config.depths) - 1:
            self.head = head
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups parameters by depth, for layer-wise learning rates: as ``SwinConfig.layer_id`` does.

        Only ``absolute_pos_embed`` belongs to the first layer, as in timm, and not to the last.
        """
        join = (99999,)  # timm's sign for: with the group before
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", join)]
        return {"stem": r"^(?:patch_embed|absolute_pos_embed)", "blocks": r"^layers\.(\d+)" if coarse else blocks}


def _metadata(config: SwinConfig) -> dict[str, Any]:
    """What timm keeps beside a model: how its inputs are made, and the names of its first and last layer."""
    return {
        "url": "", "num_classes": config.num_classes, "input_size": (config.in_chans, *config.img_size),
        "pool_size": config.stage_maps()[-1], "fixed_input_size": False, "crop_pct": 0.9, "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj",
        "classifier": "head", "license": "mit", "custom_load": True,
    }  # fmt: skip


def _entry(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **settings: Any) -> nn.Module:
        features = {"out_indices": tuple(range(len(VARIANTS[name].depths))), "feature_cls": "getter"}
        if settings.get("features_only"):
            settings["num_classes"] = 0
        overlay = {"custom_load": True, **(settings.pop("pretrained_cfg_overlay", None) or {})}
        return build_model_with_cfg(
            partial(TimmSwin, name), PREFIX + name, pretrained, feature_cfg=features, pretrained_cfg_overlay=overlay, **settings
        )  # fmt: skip

    build.__name__, build.__doc__ = PREFIX + name, f"``swinscale.create_model('{name}')`` for timm."
    return build


IMAGE_MODELS = {name: config for name, config in VARIANTS.items() if config.rank == 2}
default_cfgs = generate_default_cfgs({PREFIX + name: _metadata(config) for name, config in IMAGE_MODELS.items()})
__all__ = ["TimmSwin"]
for _name in IMAGE_MODELS:
    globals()[PREFIX + _name] = register_model(_entry(_name))
