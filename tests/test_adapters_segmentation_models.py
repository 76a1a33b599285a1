"""Our models as encoders of segmentation_models_pytorch (R-INST-3, R-DOWN-1, R-DOWN-4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import swinscale
import swinscale.adapters.timm
from random_models import random_swin, randomise
from swinscale import UsageError
from swinscale.adapters.segmentation_models import SwinscaleEncoder, register
from swinscale.weights.resize import adapt_channels

FEMTO = "swinscale-swinv2_femto_window8_128"  # strides 4, 8, 16, 32
MICRO = "swinscale-swinv2_micro_patch2_window4_32"  # strides 2, 4, 8
FOUR = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 16, "img_size": 64, "window_size": 4}

WHOLE = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "UPerNet", "Segformer"]
PARTIAL: list[tuple[str, dict[str, Any]]] = [
    ("PSPNet", {"encoder_depth": 3}),
    ("PAN", {"encoder_output_stride": 32}),
    ("DeepLabV3", {"encoder_depth": 4, "encoder_output_stride": 16}),
    ("DeepLabV3Plus", {"encoder_depth": 4, "encoder_output_stride": 16}),
]


@pytest.fixture
def four(tmp_path: Path) -> Any:
    """A model with every parameter random, registered from its directory as "swinscale-test"."""
    model = random_swin(**FOUR)
    swinscale.save_pretrained(model, tmp_path / "model")
    register("swinscale-test", tmp_path / "model")
    return model


@pytest.mark.parametrize(("decoder", "settings"), [*((name, {}) for name in WHOLE), *PARTIAL])
def test_decoders_train(decoder: str, settings: dict[str, Any], four: nn.Module):
    model = getattr(smp, decoder)("swinscale-test", encoder_weights=None, in_channels=4, classes=3, **settings).train()
    size = (256, 320) if decoder == "PAN" else (64, 96)
    masks = model(torch.randn(2, 4, *size))
    assert masks.shape == (2, 3, *size)
    masks.square().mean().backward()
    read = [
        (name, p) for name, p in model.encoder.named_parameters() if decoder in WHOLE or not name.startswith("norms.")
    ]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for _, parameter in read)


def test_by_way_of_timm():
    model = smp.Unet("tu-swinscale_swinv2_femto_window8_128", encoder_weights=None, classes=2).train()
    masks = model(torch.randn(2, 3, 64, 96))
    assert masks.shape == (2, 2, 64, 96)
    masks.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())


def test_features_are_those_of_the_model(four: Any):
    encoder = smp.encoders.get_encoder("swinscale-test").eval()
    images = torch.randn(1, 3, 64, 96)
    features = encoder(images)
    assert encoder.out_channels == [x.shape[1] for x in features] == [3, 0, 16, 32, 64, 128]
    assert [tuple(x.shape[2:]) for x in features] == [(64 >> k, 96 >> k) for k in range(6)]
    assert torch.equal(features[0], images)
    assert torch.equal(features[5], four.forward_intermediates(images, norm=True, intermediates_only=True)[3])


def test_small_patches_have_a_map_of_stride_two():
    encoder = smp.encoders.get_encoder(MICRO, depth=3)
    assert encoder.out_channels == [3, 32, 64, 128]
    assert [x.shape[2] for x in encoder(torch.randn(1, 3, 32, 32))] == [32, 16, 8, 4]
    model = smp.Unet(MICRO, encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=2)
    assert model(torch.randn(1, 3, 40, 64)).shape == (1, 2, 40, 64)


def test_trained_filters_go_to_more_channels_and_fresh_ones_are_drawn_anew(four: Any):
    trained = four.patch_embed.proj
    encoder = smp.Unet("swinscale-test", encoder_weights=None, in_channels=5).encoder
    assert torch.equal(encoder.backbone.patch_embed.proj.weight, adapt_channels(trained.weight, 5, "repeat"))
    assert torch.equal(encoder.backbone.patch_embed.proj.bias, trained.bias)
    fresh = smp.Unet(FEMTO, encoder_weights=None, in_channels=5).encoder.backbone
    assert fresh.patch_embed.proj.weight[:, 3:].std() > 0 and fresh.config.in_chans == 5
    assert not torch.equal(fresh.patch_embed.proj.weight[:, 3], fresh.patch_embed.proj.weight[:, 0])


def test_weights_in_one_call(four: Any, tmp_path: Path):
    model = smp.FPN(FEMTO, encoder_weights=None, in_channels=4).eval()
    whole = randomise(swinscale.create_model("swinv2_femto_window8_128", num_classes=3))
    swinscale.load_weights(model, whole.state_dict())
    assert torch.equal(
        model.encoder.backbone.layers[3].blocks[1].mlp.fc2.weight, whole.layers[3].blocks[1].mlp.fc2.weight
    )


def test_smp_saves_and_loads(four: Any, tmp_path: Path):
    model = randomise(smp.Unet(FEMTO, encoder_weights=None, in_channels=4, classes=2))
    model.save_pretrained(tmp_path / "smp")
    again = smp.from_pretrained(tmp_path / "smp").eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    images = torch.randn(1, 4, 64, 32)
    for a, b in zip(model.encoder(images), again.encoder(images), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_possible_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"output_stride=16 would dilate attention windows.*set encoder_depth=4"):
        smp.DeepLabV3Plus(FEMTO, encoder_weights=None)
    with pytest.raises(UsageError, match="encoder_depth=1 is not allowed: choose 2 to 5"):
        smp.encoders.get_encoder(FEMTO, depth=1)
    with pytest.raises(UsageError, match="encoder_depth=5 is not allowed: choose 1 to 3"):
        smp.encoders.get_encoder(MICRO)
    with pytest.raises(UsageError, match="There is no file or directory"):
        register("swinscale-nothing", tmp_path / "nothing")
    for taken in ("resnet34", "tu-mine"):
        with pytest.raises(UsageError, match=f"'{taken}' is an encoder of smp"):
            register(taken, tmp_path)
    with pytest.raises(KeyError, match="Wrong pretrained weights `imagenet`"):
        smp.Unet(FEMTO)
    swinscale.save_pretrained(random_swin(patch_size=3, img_size=24), tmp_path / "three")
    with pytest.raises(UsageError, match="strides that are powers of 2"):
        SwinscaleEncoder(path=tmp_path / "three")
