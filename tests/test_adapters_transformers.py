"""Our backbones inside transformers' own models (R-INST-3, R-DOWN-1, R-DOWN-4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import swinscale
from random_models import random_swin, randomise
from swinscale import UsageError
from swinscale.adapters.transformers import SwinscaleBackbone, SwinscaleConfig
from swinscale.config import to_dict
from swinscale.models import SwinConfig
from swinscale.tasks import SimMIM

FOUR = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 16, "img_size": 64, "window_size": 4}
ODD = (2, 3, 71, 90)  # neither side is a multiple of anything


def backbone_config(*indices: int) -> SwinscaleConfig:
    return SwinscaleConfig(model=to_dict(SwinConfig(**FOUR)), out_indices=list(indices))


def check_gradients(backbone: torch.nn.Module) -> None:
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def check_round_trip(model: Any, folder: Path, backbone: str, images: torch.Tensor) -> None:
    """Saved and read again: the same tensors, the same feature maps bit for bit, and only these parameters."""
    model.eval().save_pretrained(folder)
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    for a, b in zip(*(m.get_submodule(backbone)(images).feature_maps for m in (model, again)), strict=True):
        assert torch.equal(a, b)


def boxes() -> list[dict[str, torch.Tensor]]:
    return [
        {"class_labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.3, 0.2, 0.2]])}
    ] * 2


def test_upernet(tmp_path: Path):
    config = transformers.UperNetConfig(
        backbone_config=backbone_config(0, 1, 2, 3), hidden_size=16, pool_scales=[1, 2], num_labels=3,
        auxiliary_channels=8, auxiliary_in_channels=64,
    )  # fmt: skip
    model = randomise(transformers.UperNetForSemanticSegmentation(config)).train()
    images = torch.randn(ODD)
    out = model(images, labels=torch.randint(0, 3, (2, *ODD[2:])))
    assert out.logits.shape == (2, 3, *ODD[2:]) and out.loss.isfinite()
    out.loss.backward()
    check_gradients(model.backbone)
    check_round_trip(model, tmp_path, "backbone", images)


@pytest.mark.parametrize("family", ["Mask2Former", "MaskFormer"])
def test_mask_classification(family: str, tmp_path: Path):
    small: dict[str, Any] = {"num_labels": 3, "num_queries": 5}
    if family == "Mask2Former":
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone_config(0, 1, 2, 3), feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32,
            train_num_points=64, **small,
        )  # fmt: skip
    else:
        decoder = transformers.DetrConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
            encoder_attention_heads=2, decoder_attention_heads=2, num_labels=3,
        )  # fmt: skip
        config = transformers.MaskFormerConfig(
            backbone_config=backbone_config(0, 1, 2, 3), decoder_config=decoder, fpn_feature_size=32,
            mask_feature_size=32, num_labels=3,
        )  # fmt: skip
    model = randomise(getattr(transformers, f"{family}ForUniversalSegmentation" if family == "Mask2Former" else
                              f"{family}ForInstanceSegmentation")(config)).train()  # fmt: skip
    images = torch.randn(ODD)
    masks = [torch.zeros(2, *ODD[2:]) for _ in range(2)]
    for mask in masks:
        mask[0, 10:40, 5:50] = mask[1, 50:, 30:] = 1
    loss = model(images, mask_labels=masks, class_labels=[torch.tensor([0, 2])] * 2).loss
    assert loss.isfinite()
    loss.backward()
    check_gradients(model.model.pixel_level_module.encoder)
    check_round_trip(model, tmp_path, "model.pixel_level_module.encoder", images)


@pytest.mark.parametrize("family", ["Detr", "ConditionalDetr", "DeformableDetr", "RTDetr"])
def test_detection_transformers(family: str, tmp_path: Path):
    small: dict[str, Any] = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6, "num_labels": 3,
    }  # fmt: skip
    indices = (1, 2, 3) if family in ("DeformableDetr", "RTDetr") else (2,)  # (2,): the last stage is left out
    if family == "DeformableDetr":
        small |= {"num_feature_levels": 4, "decoder_layers": 2}
    if family == "RTDetr":
        small |= {
            "encoder_hidden_dim": 32, "encoder_in_channels": [32, 64, 128], "encoder_ffn_dim": 32, "num_denoising": 0,
            "decoder_in_channels": [32, 32, 32], "decoder_attention_heads": 2,
        }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(backbone_config=backbone_config(*indices), **small)
    model = randomise(getattr(transformers, f"{family}ForObjectDetection")(config)).train()
    images = torch.randn(2, 3, 64, 96)
    out = model(images, labels=boxes())
    assert out.pred_boxes.shape == (2, 6, 4) and out.loss.isfinite()
    out.loss.backward()
    (name, backbone), = [(n, m) for n, m in model.named_modules() if isinstance(m, SwinscaleBackbone)]  # fmt: skip
    check_gradients(backbone)
    check_round_trip(model, tmp_path, name, images)


@pytest.mark.parametrize("version", [1, 2])
def test_directories_of_ours_load(version: int, tmp_path: Path):
    ours = random_swin(version)
    swinscale.save_pretrained(
        ours, tmp_path, metadata={"preprocessing": {"classes": list("abcde")}, "task": "classify"}
    )
    images = torch.randn(2, 3, 41, 52)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(model(images).logits, ours(images))
    assert model.config.id2label == dict(enumerate("abcde")) and model.config.label2id["e"] == 4
    assert model(images, labels=torch.tensor([0, 4])).loss.isfinite()
    base = transformers.AutoModel.from_pretrained(tmp_path)(images)
    assert torch.equal(base.last_hidden_state, ours.forward_features(images).flatten(1, 2))
    assert torch.equal(base.pooler_output, ours.forward_head(ours.forward_features(images), pre_logits=True))
    backbone = SwinscaleBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage2"])
    last = ours.forward_intermediates(images, norm=True, intermediates_only=True)[1]
    assert torch.equal(backbone(images).feature_maps[1], last)
    assert backbone.channels == [24, 48] and backbone(images, return_dict=False)[0][1].equal(last)


def test_what_transformers_saves_loads_here(tmp_path: Path):
    ours = random_swin()
    swinscale.save_pretrained(ours, tmp_path / "ours")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    again = swinscale.from_pretrained(tmp_path / "theirs").eval()
    images = torch.randn(1, 3, 32, 32)
    assert again.config == ours.config and torch.equal(again(images), ours(images))
    other = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "theirs", num_labels=7, ignore_mismatched_sizes=True
    )
    assert other(images).logits.shape == (1, 7) and other.config.to_dict()["model"]["num_classes"] == 7


def test_masked_image_modelling_gives_its_encoder(tmp_path: Path):
    encoder = random_swin(num_classes=0)
    swinscale.save_pretrained(randomise(SimMIM(encoder)), tmp_path)
    images = torch.randn(1, 3, 32, 32)
    expected = encoder.forward_intermediates(images, norm=True, intermediates_only=True)[1]
    backbone = SwinscaleBackbone.from_pretrained(tmp_path)
    assert torch.equal(backbone(images).feature_maps[0], expected)
    backbone.save_pretrained(tmp_path / "again")
    assert torch.equal(SwinscaleBackbone.from_pretrained(tmp_path / "again")(images).feature_maps[0], expected)


def test_weights_go_into_the_backbone_of_a_whole_model_in_one_call():
    ours = random_swin(**FOUR)
    config = transformers.UperNetConfig(backbone_config=backbone_config(0, 3), hidden_size=8, use_auxiliary_head=False)
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    report = swinscale.load_weights(model, ours.state_dict())
    assert report.share == 1
    images = torch.randn(1, 3, 64, 64)
    expected = ours.forward_intermediates(images, [3], norm=True, intermediates_only=True)[0]
    assert torch.equal(model.backbone(images).feature_maps[1], expected)


def test_what_is_not_loaded_gets_its_first_value(tmp_path: Path):
    """R-DOWN-1: norms exist for the levels asked for; a fresh one is the identity, a loaded tensor stays as it is."""
    swinscale.save_pretrained(random_swin(**FOUR), tmp_path)
    backbone, report = SwinscaleBackbone.from_pretrained(tmp_path, out_indices=[0, 2], output_loading_info=True)
    unread = ("layers.3.", "layers.2.downsample.")
    assert report["unexpected_keys"] and all(name.startswith(unread) for name in report["unexpected_keys"])
    assert report["missing_keys"] == {f"norms.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in backbone.norms.values())
    assert not [n for n, _ in backbone.named_parameters() if "layers.3" in n or "swinscale.norm" in n or "head" in n]
    other = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=300, ignore_mismatched_sizes=True
    )
    assert (
        other.swinscale.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        and (other.swinscale.head.bias == 0).all()
    )


def test_fresh_models_start_as_ours_do():
    config = transformers.UperNetConfig(backbone_config=backbone_config(3), hidden_size=8, use_auxiliary_head=False)
    for backbone in (
        SwinscaleBackbone(backbone_config(3)),
        transformers.UperNetForSemanticSegmentation(config).backbone,
    ):
        block = backbone.swinscale.layers[0].blocks[0]
        assert (block.norm1.weight == 0).all()  # a fresh V2 block is the identity
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_stages_by_name_or_number():
    named = SwinscaleConfig(model="swinv2_pico_patch4_window4_32", out_features=["stage1"])
    assert named.out_indices == [0] and named.stage_names == ["stage1", "stage2"]
    assert SwinscaleConfig(model="swinv2_pico_patch4_window4_32").out_features == ["stage2"]
    last = transformers.AutoBackbone.from_config(SwinscaleConfig(model=named.model, out_indices=[-1]))
    assert last.channels == [128] and last(torch.randn(1, 3, 32, 32)).feature_maps[0].shape == (1, 128, 4, 4)
    with pytest.raises(ValueError, match="stage_names"):
        SwinscaleConfig(model=named.model, out_features=["stage3"])
    with pytest.raises(UsageError, match="Unknown model 'swinv3'"):
        SwinscaleConfig(model="swinv3")


def test_checkpointing_changes_memory_and_not_gradients():
    backbone = randomise(SwinscaleBackbone(backbone_config(1, 3)))
    images, gradients = torch.randn(1, 3, 64, 64), []
    for enable in (False, True):
        if enable:
            backbone.activation_checkpointing_enable()
        assert backbone.gradient_checkpointing is enable
        backbone.zero_grad()
        sum(x.square().mean() for x in backbone(images).feature_maps).backward()
        gradients.append(backbone.swinscale.patch_embed.proj.weight.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4)
    backbone.activation_checkpointing_disable()
    assert not backbone.gradient_checkpointing
    config = transformers.DetrConfig(backbone_config=backbone_config(3), d_model=16, encoder_layers=1, decoder_layers=1)
    detector = transformers.DetrForObjectDetection(config)
    detector.activation_checkpointing_enable()
    assert detector.model.backbone.model.gradient_checkpointing


def test_attention_probabilities_are_refused():
    with pytest.raises(UsageError, match="output_attentions=True is not possible"):
        SwinscaleBackbone(backbone_config(3))(torch.randn(1, 3, 32, 32), output_attentions=True)
