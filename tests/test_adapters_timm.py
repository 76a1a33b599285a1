"""Our models under timm's own functions, with timm itself (R-INST-3, R-DOWN-4)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

import swinscale
import swinscale.adapters.timm
from random_models import random_swin, randomise
from swinscale import UsageError

MICRO = "swinscale_swinv2_micro_patch2_window4_32"
PICO = "swinscale_swin_pico_patch4_window4_32"
SMALL = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}  # the model of random_swin


def test_timm_lists_every_model():
    names = timm.list_models("swinscale_*")
    assert set(names) == {"swinscale_" + name for name in swinscale.adapters.timm.IMAGE_MODELS}
    assert timm.is_model(MICRO) and not timm.models.is_model_pretrained(MICRO)
    assert not set(names) & set(timm.list_models(exclude_filters="swinscale_*"))


@pytest.mark.parametrize("version", [1, 2])
def test_the_model_is_ours(version: int):
    ours = random_swin(version)
    name = {1: PICO, 2: PICO.replace("swin_", "swinv2_")}[version]
    model = timm.create_model(name, **SMALL)
    swinscale.load_weights(model, ours.state_dict())
    images = torch.randn(2, 3, 37, 52)
    model.eval()
    assert torch.equal(model(images), ours(images))
    assert torch.equal(model.forward_head(model.forward_features(images)), ours(images))


def test_settings_reach_the_model():
    model = timm.create_model(
        MICRO, num_classes=7, in_chans=4, img_size=64, window_size=8, drop_path_rate=0.3, global_pool="avg"
    )
    config = model.config
    assert (config.num_classes, config.in_chans, config.img_size) == (7, 4, (64, 64))
    assert config.stage_windows[0] == (8, 8) and config.drop_path_rate == 0.3
    assert model(torch.randn(1, 4, 50, 70)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 4, 64, 64)).shape == (1, model.num_features)
    model.reset_classifier(3, "avg")
    assert model(torch.randn(1, 4, 64, 64)).shape == (1, 3) and model.num_classes == 3


def test_what_is_not_possible_is_refused():
    with pytest.raises(UsageError, match=r"has no setting 'proj_drop_rate'. Allowed: ape, attn_drop_rate"):
        timm.create_model(MICRO, proj_drop_rate=0.1)
    with pytest.raises(UsageError, match="global_pool"):
        timm.create_model(MICRO, global_pool="max")
    with pytest.raises(UsageError, match="global_pool"):
        timm.create_model(MICRO).reset_classifier(3, "max")
    with pytest.raises(UsageError, match=r"name some of \[0, 1, 2\]"):
        timm.create_model(MICRO, features_only=True, out_indices=(0, 3))
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(MICRO, pretrained=True)


@pytest.mark.parametrize("out_indices", [None, (0, 1), (1,), (-1,), (0, 2)], ids=str)
def test_feature_maps(out_indices: tuple[int, ...] | None):
    given = {} if out_indices is None else {"out_indices": out_indices}
    pyramid = randomise(timm.create_model(MICRO, features_only=True, **given))
    images = torch.randn(1, 3, 44, 36)
    maps = pyramid(images)
    wanted = [index % 3 for index in out_indices or (0, 1, 2)]
    assert pyramid.feature_info.channels() == [x.shape[1] for x in maps] == [32 * 2**stage for stage in wanted]
    assert pyramid.feature_info.reduction() == [2 * 2**stage for stage in wanted]
    whole = swinscale.create_model("swinv2_micro_patch2_window4_32").eval()
    swinscale.load_weights(whole, pyramid.model.state_dict(), strict=False)
    expected = whole.forward_intermediates(images, wanted, intermediates_only=True)
    assert all(torch.equal(found, want) for found, want in zip(maps, expected, strict=True))
    sum(x.square().mean() for x in maps).backward()
    assert not [name for name, parameter in pyramid.named_parameters() if parameter.grad is None]


def test_features_may_be_normalised():
    pyramid = randomise(timm.create_model(MICRO, features_only=True, feature_cls="getter", out_indices=(2,)))
    assert not [name for name, _ in pyramid.named_parameters() if name.startswith(("model.norm", "model.head"))]
    model = randomise(timm.create_model(MICRO))
    assert model.prune_intermediate_layers(2, prune_norm=False) == [1, 2]
    (last,) = model.forward_intermediates(torch.randn(1, 3, 32, 32), [2], norm=True, intermediates_only=True)
    assert last.shape == (1, 128, 4, 4) and isinstance(model.norm, torch.nn.LayerNorm)


@pytest.mark.parametrize("features_only", [False, True])
def test_weights_of_a_directory_load(tmp_path: Path, features_only: bool):
    ours = random_swin(1)
    swinscale.save_pretrained(ours, tmp_path)
    settings = {**SMALL, "num_classes": 9, "in_chans": 6, "window_size": 8}
    model = timm.create_model(
        PICO, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path)}, features_only=features_only,
        **({**settings, "out_indices": (0,)} if features_only else settings)
    ).eval()  # fmt: skip
    images = torch.randn(1, 3, 32, 32)
    moved = swinscale.from_pretrained(tmp_path, in_chans=6, window_size=8).eval()
    six = images.repeat(1, 2, 1, 1)
    found = model(six)[0] if features_only else model.forward_features(six)
    expected = moved.forward_intermediates(six, [0], intermediates_only=True)[0]
    assert torch.equal(found, expected if features_only else moved.forward_features(six))
    assert torch.allclose(moved.patch_embed(six), ours.patch_embed(images), atol=1e-5)


def test_a_checkpoint_that_timm_saved_loads(tmp_path: Path):
    first = randomise(timm.create_model(MICRO, num_classes=4))
    torch.save({"state_dict": first.state_dict()}, tmp_path / "last.pth.tar")
    second = timm.create_model(MICRO, num_classes=4, checkpoint_path=tmp_path / "last.pth.tar").eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(first(images), second(images)) and torch.equal(copy.deepcopy(first)(images), second(images))


def test_preprocessing_is_known():
    config = timm.data.resolve_model_data_config(timm.create_model("swinscale_swinv2_femto_window8_128"))
    assert config["input_size"] == (3, 128, 128) and config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert timm.data.create_transform(**config) is not None


def test_layerwise_rates_are_those_of_our_optimiser():
    model = timm.create_model("swinscale_swinv2_femto_window8_128", ape=True, num_classes=4)
    depth = group_parameters(model, model.group_matcher(), reverse=True)
    assert depth.pop("absolute_pos_embed") == 0  # in timm it belongs to the embedding
    assert depth == {name: model.config.layer_id(name) for name in depth}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(coarse.values()) == set(range(6))  # embedding, four stages, the rest


def test_timms_optimiser_and_a_step_with_checkpointing():
    model = timm.create_model(MICRO, num_classes=4).train()
    optimiser = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8)
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    spared = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and name not in spared), name
    model.set_grad_checkpointing(enable=True)
    assert all(block.checkpointing == "block" for stage in model.layers for block in stage.blocks)
    before = model.get_classifier().weight.clone()
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    optimiser.step()
    assert not torch.equal(before, model.get_classifier().weight)
