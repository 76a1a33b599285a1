"""Our backbones inside torchvision's detectors (R-INST-3, R-DOWN-1, R-DOWN-4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import swinscale
from random_models import random_swin, randomise
from swinscale import UsageError
from swinscale.adapters.torchvision import DetectionBackbone, detection_backbone

FOUR = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 16, "img_size": 64, "window_size": 4}


def backbone(**settings: Any) -> DetectionBackbone:
    return detection_backbone(random_swin(**FOUR, drop_path_rate=0.3), out_channels=32, **settings)


def photos_with_one_object_each() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images, targets = [torch.rand(3, 60, 80), torch.rand(3, 72, 50)], []
    for image in images:
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[:, 10:40, 8:36] = 1
        targets.append({"boxes": torch.tensor([[8.0, 10, 36, 40]]), "labels": torch.tensor([1]), "masks": mask})
    return images, targets


@pytest.mark.parametrize("family", [FasterRCNN, MaskRCNN, RetinaNet, FCOS])
def test_a_training_step_and_a_prediction(family: Any):
    levels: dict[str, Any] = {}
    if family in (RetinaNet, FCOS):
        levels = {"stages": (1, 2, 3), "extra_blocks": LastLevelP6P7(32, 32)}
    few = {"detections_per_img": 9} if levels else {"box_detections_per_img": 9}
    model = family(backbone(frozen_stages=1, **levels), num_classes=3, min_size=64, max_size=96, **few).train()
    images, targets = photos_with_one_object_each()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = model(images, targets)
    assert len(losses) >= 2 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.backbone.named_parameters():
        frozen = name.startswith(("body.backbone.patch_embed", "body.backbone.layers.0", "body.norms.0"))
        assert parameter.requires_grad != frozen, name
        assert frozen or parameter.grad.isfinite().all(), name
    optimiser.step()
    found = model.eval()(images)
    assert len(found) == 2 and all({"boxes", "labels", "scores"} <= set(one) for one in found)
    if family is MaskRCNN:
        assert all(one["masks"].shape[1:] == (1, *image.shape[1:]) for one, image in zip(found, images, strict=True))


def test_maps_have_the_strides_that_torchvision_expects():
    model = backbone().eval()
    maps = model(torch.randn(1, 3, 64, 96))
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == {
        "0": (32, 16, 24), "1": (32, 8, 12), "2": (32, 4, 6), "3": (32, 2, 3), "pool": (32, 1, 2)
    }  # fmt: skip
    assert model.out_channels == 32


def test_a_model_by_name_and_weights_in_one_call(tmp_path: Path):
    ours = random_swin(**FOUR)
    swinscale.save_pretrained(ours, tmp_path)
    model = detection_backbone("swinv2_tiny_window8_256", out_channels=8, **FOUR).eval()
    swinscale.load_weights(model, tmp_path)
    images = torch.randn(1, 3, 50, 70)
    last = ours.forward_intermediates(images, norm=True, intermediates_only=True)[3]
    assert torch.equal(model.body(images)[3], last)
    trimmed = detection_backbone(swinscale.from_pretrained(tmp_path), (0, 1), out_channels=8)
    assert len(trimmed.body.backbone.layers) == 2 and trimmed.body.channels == [16, 32]
    randomise(trimmed)
    sum(x.square().mean() for x in trimmed(images).values()).backward()
    assert not [name for name, parameter in trimmed.named_parameters() if parameter.grad is None]


def test_settings_of_a_built_model_are_refused():
    with pytest.raises(UsageError, match="window_size cannot be set here: the model is built already"):
        detection_backbone(random_swin(), window_size=7)
    with pytest.raises(UsageError, match="Unknown model 'resnet50'"):
        detection_backbone("resnet50")
