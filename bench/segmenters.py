"""UPerNets of other projects, and ours with random weights that those with the same network receive."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders import SIZES, Cannot, randomise
from bench.detectors import TRIAL
from bench.runner import Classifier
from swinscale.config import to_dict
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import Segmenter
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.recipes.parts import dense_model
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights.peer_records import transformers_record
from swinscale.weights.segmenters import segmenter_to_transformers
from swinscale.weights.upernet_records import upernet_record

CLASSES = 150
OURS = ("swinscale V1-T", "swinscale V2-T")
SAME = ("transformers Swin-T", "transformers around swinscale V1-T")
"""With the weights of the first of ours."""
CONTENDERS = (*OURS, *SAME, "segmentation_models_pytorch ResNet-50")
BASES = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}


def heads(tiny: bool) -> SegmentConfig:
    """The published ones without dropout."""
    return SegmentConfig(channels=16, aux_channels=8, dropout=0.0) if tiny else SegmentConfig(dropout=0.0)


def our_segmenter(version: int, tiny: bool) -> Segmenter:
    """A UPerNet of ours around Swin-T without stochastic depth; neither a parameter nor a running statistic is trivial."""
    shape = TRIAL if tiny else SIZES["tiny"]
    config = dataclasses.replace(dense_model(BASES[version], 0.0, img_size=512), **shape)
    model = Segmenter(SwinTransformer(config), CLASSES, heads(tiny))
    randomise(model)
    draw = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=draw)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=draw)
    return model


class Transformers(nn.Module):
    """``UperNetForSemanticSegmentation`` of transformers as ours is called."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → logits (B, K, H, W)."""
        logits: Tensor = self.model(images).logits
        return logits

    def losses(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The sum of both losses."""
        return {"loss": self.model(images, labels=target).loss}


def build(name: str, tiny: bool) -> nn.Module:
    """One of ``CONTENDERS``: called with images it gives logits, ``losses(images, target)`` what training adds up.

    Raises:
        Cannot: with the reason.
    """
    if name in OURS:
        return our_segmenter(1 if name == OURS[0] else 2, tiny)
    package = name.partition(" ")[0]
    if importlib.util.find_spec(package) is None:
        raise Cannot(f"{package} is not installed")
    ensure_torchvision()
    if package == "segmentation_models_pytorch":
        smp = importlib.import_module(package)
        encoder = {"encoder_name": "resnet18" if tiny else "resnet50", "encoder_weights": None}
        return Classifier(smp.UPerNet(**encoder, decoder_channels=heads(tiny).channels, classes=CLASSES))
    model = our_segmenter(1, tiny)
    around = _their_backbone if name == SAME[0] else _our_backbone
    return Transformers(around(model.backbone.config, heads(tiny), dict(model.state_dict())))


def _record(backbone: dict[str, Any], config: SegmentConfig) -> Any:
    """Configuration of a UPerNet of transformers around its own backbone."""
    names = [f"class {index}" for index in range(CLASSES)]
    fields = ("channels", "pool_scales", "aux_channels", "aux_weight")
    options = {name: getattr(config, name) for name in fields}
    return upernet_record(backbone, names, ignore_index=255, **options)


def _their_backbone(swin: SwinConfig, config: SegmentConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """Filled as transformers reads a file that we convert."""
    transformers = importlib.import_module("transformers")
    record = _record(transformers_record(swin, {}), config)
    kind = transformers.UperNetForSemanticSegmentation
    transformers.utils.logging.disable_progress_bar()
    made = transformers.UperNetConfig.from_dict(record)
    model, told = kind.from_pretrained(
        None, config=made, state_dict=segmenter_to_transformers(dict(state)), output_loading_info=True
    )
    if wrong := [name for found in told.values() for name in found]:
        raise Cannot(f"its weights do not fit: {', '.join(map(str, wrong[:3]))}")
    filled: nn.Module = model
    return filled


def _our_backbone(swin: SwinConfig, config: SegmentConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """transformers' heads around our backbone."""
    transformers = importlib.import_module("transformers")
    adapter = importlib.import_module("swinscale.adapters.transformers")
    backbone = adapter.SwinscaleConfig(model=to_dict(swin), out_indices=[0, 1, 2, 3])
    made = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=config.channels,
        pool_scales=list(config.pool_scales),
        auxiliary_channels=config.aux_channels,
        auxiliary_loss_weight=config.aux_weight,
        num_labels=CLASSES,
    )
    model: nn.Module = transformers.UperNetForSemanticSegmentation(made)
    named = {k: v for k, v in segmenter_to_transformers(dict(state)).items() if not k.startswith("backbone.")}
    for name, tensor in state.items():
        if name.startswith("body."):
            named[f"backbone.{name.removeprefix('body.').replace('backbone.', 'swinscale.', 1)}"] = tensor
    model.load_state_dict(named)
    return model
