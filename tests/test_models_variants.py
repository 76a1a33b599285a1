"""Every named model: exact parameter counts, contract, initial values, and the surface that timm's users know."""

from __future__ import annotations

import math

import pytest
import torch

from random_models import random_swin
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, create_model, list_models, model_config

COUNTS = {  # exact; they reproduce the published rounded values
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_large_patch4_window12_384": 196_735_516,
    "swinv2_tiny_window8_256": 28_347_154,
    "swinv2_tiny_window16_256": 28_347_154,
    "swinv2_small_window8_256": 49_728_418,
    "swinv2_small_window16_256": 49_728_418,
    "swinv2_base_window12_192": 87_918_816,
    "swinv2_base_window8_256": 87_918_816,  # no parameter depends on the window
    "swinv2_base_window16_256": 87_918_816,
    "swinv2_base_window12to14_192to224": 87_918_816,
    "swinv2_base_window12to16_192to256": 87_918_816,
    "swinv2_base_window12to24_192to384": 87_918_816,
    "swinv2_large_window12_192": 196_739_932,
    "swinv2_large_window12to16_192to256": 196_739_932,
    "swinv2_large_window12to24_192to384": 196_739_932,
    "swinv2_huge": 658_036_370,
    "swinv2_giant": 3_001_940_680,
}
SWINS = [name for name in list_models() if type(model_config(name)) is SwinConfig]
"""LR-Net and SwinMLP have tests of their own (``test_models_lrnet.py``, ``test_models_swin_mlp.py``)."""
BACKBONES = {"swinv2_huge": 655_219_370, "swinv2_giant": 2_997_843_680, "swinv2_giant_c448_window12_192": 1_060_976_996}


def on_meta(name: str, **overrides) -> SwinTransformer:
    with torch.device("meta"):
        return create_model(name, **overrides)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), COUNTS.items())
def test_parameter_counts(name, parameters):
    """R-BIG-1: G is C = 512, depths (2, 2, 42, 4), 3.0 B, and is built without memory for its weights."""
    assert count(on_meta(name)) == parameters


@pytest.mark.parametrize(("name", "parameters"), BACKBONES.items())
def test_backbone_counts(name, parameters):
    assert count(on_meta(name, num_classes=0)) == parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [("swinv2_tiny_window8_256", 44.37), ("swinv2_base_window12_192", 109.28), ("swinv2_large_window12_192", 228.77)],
)
def test_counts_with_the_head_of_imagenet_22k(name, millions):
    assert round(count(on_meta(name, num_classes=21841)) / 1e6, 2) == millions


def test_count_with_other_heads():
    assert count(on_meta("swinv2_huge", num_heads=(8, 16, 32, 64))) == 657_891_704


def closed_form(config: SwinConfig) -> int:
    """Parameters by arithmetic: weights and biases of each layer, added up on paper."""
    first, v1 = config.embed_dim, config.version == 1
    total = first * config.in_chans * math.prod(config.patch_size) + 3 * first
    for stage, depth in enumerate(config.depths):
        dim, heads = first * 2**stage, config.num_heads[stage]
        offsets = math.prod(2 * w - 1 for w in config.stage_windows[stage])
        block = (
            12 * dim**2 + 13 * dim + offsets * heads
            if v1
            else 12 * dim**2 + 12 * dim + 512 * (config.rank + 1) + 513 * heads
        )
        extra = depth // config.main_norm_interval if config.main_norm_interval else 0
        total += depth * block + extra * 2 * dim
        if stage + 1 < len(config.depths):
            total += 8 * dim**2 + (8 if v1 else 4) * dim
    return total + 2 * dim + dim * config.num_classes + config.num_classes


@pytest.mark.parametrize("name", SWINS)
def test_counts_are_the_closed_form(name):
    model = on_meta(name)
    assert count(model) == closed_form(model.config)


@pytest.mark.parametrize("name", SWINS)
def test_contract_of_every_variant(name):
    """Shapes, feature_info and the pyramid agree, for each name the day it is added."""
    model = on_meta(name).eval()
    config = model.config
    x = torch.empty(2, config.in_chans, *config.img_size, device="meta")
    last, maps = model.forward_intermediates(x)
    assert model(x).shape == (2, config.num_classes)
    assert last.shape == model.forward_features(x).shape == (2, *config.stage_maps()[-1], model.num_features)
    for info, feature, dim, grid in zip(model.feature_info, maps, config.stage_dims, config.stage_maps(), strict=True):
        assert feature.shape == (2, dim, *grid)
        assert info["num_chs"] == dim
        assert grid[-2] == -(-config.img_size[-2] // info["reduction"])
        assert model.get_submodule(info["module"])
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.named_buffers())


def test_unknown_names_suggest():
    with pytest.raises(UsageError, match=r"Did you mean 'swinv2_tiny_window8_256'"):
        create_model("swinv2_tiny_windw8_256")
    with pytest.raises(UsageError, match=r"'num_clases'. Did you mean 'num_classes'"):
        create_model("swinv2_tiny_window8_256", num_clases=3)
    assert list_models("swinv2_giant*") == [
        "swinv2_giant",
        "swinv2_giant_c448_window12_192",
        *list_models("giant_window12"),
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": (3, 6, 12)}, "same number of stages"),
        ({"embed_dim": 100}, "3 heads do not divide"),
        ({"version": 3}, "version=3"),
        ({"pad": "zero"}, "pad='zero'"),
        ({"window_size": (7, 7, 7)}, "window_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"patch_size": 0}, "patch_size"),
        ({"img_size": "big"}, "img_size='big'"),
    ],
)
def test_configurations_that_cannot_be(fields, words):
    with pytest.raises(UsageError) as error:
        SwinConfig(**fields)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bias", ["table", "log", "linear", "paper"])
@pytest.mark.parametrize("version", [1, 2])
def test_init_weights_reaches_every_parameter(version, bias):
    """A model built on meta is filled completely; a forgotten tensor would stay NaN."""
    config = SwinConfig(version=version, embed_dim=16, depths=(1, 2), num_heads=(1, 2), ape=True, img_size=32, patch_size=2,
                        window_size=4, main_norm_interval=2, position_bias=bias)  # fmt: skip
    with torch.device("meta"):
        model = SwinTransformer(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights()
    assert [n for n, p in model.named_parameters() if not p.isfinite().all()] == []
    torch.manual_seed(3)
    model.init_weights()
    eager = SwinTransformer(config)
    torch.manual_seed(3)
    eager.init_weights()
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("version", [1, 2])
def test_initial_values(version):
    """As published: weights of linear layers and tables have σ = 0.02, biases 0, norms 1 and 0, temperature 1/10."""
    model = SwinTransformer(SwinConfig(version=version, embed_dim=48, depths=(1, 1), num_heads=(2, 4), img_size=64))
    scale = model.patch_embed.proj.weight.detach().abs().max().item()
    assert 0.9 / math.sqrt(48) < scale <= 1 / math.sqrt(48)  # PyTorch's own for convolutions: uniform, 48 inputs
    model.reset_classifier(300)
    for name, p in model.named_parameters():
        p = p.detach()
        if "patch_embed.proj" in name:
            continue
        if name.endswith("logit_scale"):
            assert torch.allclose(p, torch.full_like(p, math.log(10)))
        elif name.endswith(("bias_table", "weight")) and p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(p.mean().item()) < 0.003, name
        elif name.endswith("weight"):
            assert (p == (0 if version == 2 and "blocks" in name else 1)).all(), name
        else:
            assert (p == 0).all(), name


def test_fresh_v2_blocks_are_the_identity():
    """R-BIG-2: res-post-norm gains start at zero; without that V2 diverges (microsoft/Swin-Transformer#183)."""
    for version, same in ((2, True), (1, False)):
        model = SwinTransformer(
            SwinConfig(version=version, embed_dim=16, depths=(2,), num_heads=(2,), img_size=32)
        ).eval()
        x = torch.randn(1, 8, 8, 16)
        assert torch.allclose(model.layers[0](x), x, atol=1e-6) == same


def test_extra_norms_of_huge_and_giant():
    """One after every sixth block, counted inside its stage: 3 in H, 7 in G."""
    for name, number in (("swinv2_huge", 3), ("swinv2_giant", 7)):
        norms = [n for n, _ in on_meta(name).named_parameters() if n.endswith("enorm.weight")]
        assert len(norms) == number
        assert norms[0] == "layers.2.blocks.5.enorm.weight"


def test_stochastic_depth_rates():
    rates = model_config("swin_tiny_patch4_window7_224").drop_path_rates()
    golden = [
        0.0,
        0.018182,
        0.036364,
        0.054545,
        0.072727,
        0.090909,
        0.109091,
        0.127273,
        0.145455,
        0.163636,
        0.181818,
        0.2,
    ]
    assert [r for stage in rates for r in stage] == pytest.approx(golden, abs=1e-6)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    block = random_swin(drop_path_rate=0.5).layers[1].blocks[1].train()
    assert block.drop_path_rate == 0.5
    out = block.drop_path(torch.ones(4000, 2, 3, 4)).flatten(1)
    assert ((out == 0).all(1) | (out == 2).all(1)).all()
    assert out.mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(block.eval().drop_path(torch.ones(2, 1, 1, 1)), torch.ones(2, 1, 1, 1))


@pytest.mark.parametrize("version", [1, 2])
def test_intermediates(version):
    model = random_swin(version, depths=(2, 2, 2), num_heads=(2, 4, 8), img_size=64)
    x = torch.randn(2, 3, 64, 64)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    one = model.forward_intermediates(x, indices=[-1, 0], intermediates_only=True)
    assert torch.equal(one[0], maps[2])
    assert torch.equal(one[1], maps[0])
    two = model.forward_intermediates(x, indices=2, output_fmt="NHWC", norm=True, intermediates_only=True)
    assert torch.equal(two[0].movedim(-1, 1), maps[1])
    assert torch.equal(two[1], last)
    calls = []
    model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    early, only = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert not calls
    assert torch.equal(only[0], maps[1])
    assert early.shape[-1] == 48
    for wrong in ([3], [-4], 0):
        with pytest.raises(UsageError, match="stages 0 to 2"):
            model.forward_intermediates(x, indices=wrong)
    with pytest.raises(UsageError, match="output_fmt='HWC'"):
        model.forward_intermediates(x, output_fmt="HWC")


def test_classifier_is_replaced_and_removed():
    model = random_swin()
    x = torch.randn(1, 3, 32, 32)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert model.config.num_classes == model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("version", [1, 2])
def test_checkpointing_changes_no_gradient(version):
    """R-SPD-6."""
    model = random_swin(version, drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 40, 40)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_parameters_without_weight_decay():
    fields = {"embed_dim": 16, "depths": (1,), "num_heads": (1,), "ape": True}
    names = SwinTransformer(SwinConfig(**fields)).no_weight_decay()
    start = "layers.0.blocks.0.attn."
    cpb = {start + "cpb_mlp.0.weight", start + "cpb_mlp.0.bias", start + "cpb_mlp.2.weight"}
    assert names == {"absolute_pos_embed", start + "logit_scale", *cpb}
    names = SwinTransformer(SwinConfig(version=1, **fields)).no_weight_decay()
    assert names == {"absolute_pos_embed", start + "relative_position_bias_table"}


def test_depth_of_every_parameter():
    """Layer ids for layer-wise decay as in microsoft/SimMIM: a merging layer has the id of the block before it."""
    config = SwinConfig(embed_dim=16, depths=(2, 3), num_heads=(1, 2), ape=True, patch_size=2, img_size=32)
    assert config.num_layers == 6
    expected = {
        "patch_embed.proj.weight": 0,
        "patch_embed.norm.bias": 0,
        "layers.0.blocks.0.attn.qkv.weight": 1,
        "layers.0.blocks.1.mlp.fc2.bias": 2,
        "layers.0.downsample.reduction.weight": 2,
        "layers.0.downsample.norm.weight": 2,
        "layers.1.blocks.0.norm1.weight": 3,
        "layers.1.blocks.2.attn.logit_scale": 5,
        "norm.weight": 6,
        "head.bias": 6,
        "absolute_pos_embed": 6,
    }
    names = {name for name, _ in SwinTransformer(config).named_parameters()}
    assert expected.keys() <= names
    assert {name: config.layer_id(name) for name in expected} == expected
    assert {config.layer_id(name) for name in names} == set(range(7))
