"""transformers: our models in its Auto classes, and so as backbones of its segmentation and detection models.

    import transformers
    from swinscale.adapters.transformers import SwinscaleConfig  # registers "swinscale"

    config = SwinscaleConfig(model="swinv2_tiny_window8_256", out_indices=[0, 1, 2, 3])
    model = transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config, num_labels=150))

A directory that ``swinscale.save_pretrained`` wrote loads with ``from_pretrained`` of ``AutoModel``,
``AutoModelForImageClassification`` and ``SwinscaleBackbone``; ``swinscale.load_weights(model, path)`` puts weights of any
layout into the backbone inside ``model``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swinscale.adapters import needs
from swinscale.config import from_dict, to_dict
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.models.init import initial_values
from swinscale.models.pyramid import keep_stages, stage_maps, stage_norms
from swinscale.weights.hashes import ENTRY as HASHES
from swinscale.weights.records import MODEL_TYPE

with needs("transformers"):
    import transformers
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
    from transformers.utils.generic import can_return_tuple


class SwinscaleConfig(BackboneConfigMixin, transformers.PreTrainedConfig):
    """What ``config.json`` of our directories holds, with transformers' own entries beside it.

    Args:
        model: a name, or the fields of ``SwinConfig``.
        out_features, out_indices: the stages whose maps a backbone returns, by name ("stage1", …) or number from 0.
            Default: the last.
        num_labels, id2label: the classes; default: those of ``model``.
    """

    model_type = MODEL_TYPE
    model: Any = "swinv2_tiny_window8_256"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        config = model_config(self.model) if isinstance(self.model, str) else from_dict(SwinConfig, dict(self.model))
        self.model = to_dict(config)
        if self.id2label is None:
            names = (kwargs.get("preprocessing") or {}).get("classes") or ()
            if "num_labels" not in kwargs and len(names) == config.num_classes:
                self.id2label = dict(enumerate(names))
                self.label2id = {name: index for index, name in self.id2label.items()}
            else:
                kwargs.setdefault("num_labels", config.num_classes)
        for name in ("stage_names", "hidden_size", "num_channels", "image_size", HASHES):
            kwargs.pop(name, None)  # they follow from the model, or from the files it came from
        self.stage_names = [f"stage{stage + 1}" for stage in range(len(config.depths))]
        self.hidden_size, self.num_channels, self.image_size = config.num_features, config.in_chans, config.img_size
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def swin(self, **changes: Any) -> SwinConfig:
        """The configuration of the model itself."""
        return dataclasses.replace(from_dict(SwinConfig, self.model), **{"num_classes": self.num_labels, **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; "model" is what ``swinscale.from_pretrained`` reads."""
        return {**super().to_dict(), "model": to_dict(self.swin())}


class SwinscalePreTrainedModel(transformers.PreTrainedModel):
    """What the models below share: ``swinscale`` is the ``SwinTransformer``, under the names of its own files."""

    swinscale: SwinTransformer
    config_class = SwinscaleConfig
    base_model_prefix = "swinscale"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwinBlock"]  # noqa: RUF012
    _supports_sdpa = True
    # what other models around the same backbone have; anchored, since transformers also asks for names of whole detectors
    _keys_to_ignore_on_load_unexpected = [r"^(swinscale\.)?(head|norm|norms|mask_token|decoder)\b"]  # noqa: RUF012

    @property
    def gradient_checkpointing(self) -> bool:
        return any(block.checkpointing != "none" for stage in self.swinscale.layers for block in stage.blocks)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.swinscale.set_grad_checkpointing(enable)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """First values of all that was not loaded. transformers asks for one module after another: the first does it."""
        left = {name for name, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
        seed = int(torch.randint(2**62, (), device="cpu"))
        for name, value in initial_values(self, seed) if left else ():
            if name in left:
                parameter: Any = self.get_parameter(name)
                parameter.copy_(value)
                parameter._is_hf_initialized = True


class SwinscaleModel(SwinscalePreTrainedModel):
    """Images to the last map, as a sequence, and its mean."""

    def __init__(self, config: SwinscaleConfig):
        super().__init__(config)
        self.swinscale = SwinTransformer(config.swin(num_classes=0))
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """(B, C, H, W) → ``last_hidden_state`` (B, L, D) and ``pooler_output`` (B, D)"""
        x = self.swinscale.forward_features(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=x.flatten(1, -2), pooler_output=self.swinscale.forward_head(x)
        )


class SwinscaleForImageClassification(SwinscalePreTrainedModel):
    """Images to logits."""

    def __init__(self, config: SwinscaleConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.swinscale = SwinTransformer(config.swin())
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """(B, C, H, W) → ``logits`` (B, classes), and the ``loss`` where there are labels"""
        logits = self.swinscale(pixel_values)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


class SwinscaleBackbone(BackboneMixin, SwinscalePreTrainedModel):
    """Images to feature maps of the stages in ``config.out_features``, each normalised; without a spare parameter.

    Hidden states and attention probabilities of single blocks are not returned.
    """

    has_attentions = False

    def __init__(self, config: SwinscaleConfig):
        super().__init__(config)
        self.swinscale = SwinTransformer(config.swin(num_classes=0))
        self.num_features = list(self.swinscale.config.stage_dims)
        self.stages = [index % len(self.stage_names) for index in self.out_indices]
        keep_stages(self.swinscale, self.stages)
        self.norms = stage_norms(self.swinscale, self.stages)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, output_attentions: bool | None = None, **_: Any) -> BackboneOutput:
        """(B, C, H, W) → ``feature_maps``: one (B, D, H / stride, W / stride) per stage"""
        if output_attentions:
            raise UsageError("output_attentions=True is not possible: attention probabilities are never kept.")
        maps: Any = tuple(stage_maps(self.swinscale, self.norms, pixel_values, self.stages))
        return BackboneOutput(feature_maps=maps)


def register() -> None:
    """Makes transformers' Auto classes know our models. Importing this module calls it."""
    auto: Mapping[Any, Any] = {
        transformers.AutoModel: SwinscaleModel,
        transformers.AutoModelForImageClassification: SwinscaleForImageClassification,
        transformers.AutoBackbone: SwinscaleBackbone,
    }
    transformers.AutoConfig.register(MODEL_TYPE, SwinscaleConfig, exist_ok=True)
    for kind, model in auto.items():
        kind.register(SwinscaleConfig, model, exist_ok=True)
    # masked image modelling keeps its model in "encoder"
    simmim = WeightRenaming(r"^encoder\.", "swinscale.")
    register_checkpoint_conversion_mapping(MODEL_TYPE, [simmim], overwrite=True)


register()
