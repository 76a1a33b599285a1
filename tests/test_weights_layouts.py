"""Layouts of other projects: both ways, without loss, and the same outputs from their own models (R-CKPT-1, 2, 4)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from random_models import random_swin, randomise
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.models.windows import relative_coords
from swinscale.tasks.simmim import SimMIM, SimMIMConfig
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import (
    convert_state_dict,
    detect_layout,
    from_official,
    infer_config,
    load_weights,
    to_official,
)

CLASSIFIERS = ("official", "timm", "transformers", "transformers5", "torchvision", "mm")
SIMMIM = ("official-simmim", "swinscale-simmim", "transformers", "transformers5")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def random_simmim(version: int, seed: int = 0) -> SimMIM:
    task = SimMIM(random_swin(version, seed, num_classes=0), SimMIMConfig(mask_patch=8))
    return randomise(task, seed)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", CLASSIFIERS)
@pytest.mark.parametrize("depths", [(2, 2), (1, 3, 2)])
def test_round_trip_is_bit_exact(layout: str, version: int, depths: tuple[int, ...]) -> None:
    """R-CKPT-2: ours → layout → ours changes no bit, and the layout is recognised."""
    model = random_swin(version, depths=depths, num_heads=(2, 4, 8)[: len(depths)], window_size=2)
    ours = model.state_dict()
    theirs = convert_state_dict(ours, layout, config=model.config)
    expected = {"transformers5": "transformers5" if version == 1 else "transformers"}.get(layout, layout)
    assert detect_layout(theirs) == expected
    assert_same(convert_state_dict(theirs, "official"), ours)
    assert_same(convert_state_dict(theirs, "official", frm=expected), ours)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", SIMMIM)
def test_simmim_round_trip_is_bit_exact(layout: str, version: int) -> None:
    """R-CKPT-2 for masked image modelling, mask token and decoder included."""
    ours = random_simmim(version).state_dict()
    assert detect_layout(ours) == "swinscale-simmim"
    theirs = convert_state_dict(ours, layout)
    assert len(theirs) >= len(ours)
    assert_same(convert_state_dict(theirs, "swinscale-simmim"), ours)


def test_published_simmim_keeps_the_mask_token_in_the_encoder() -> None:
    theirs = convert_state_dict(random_simmim(2).state_dict(), "official-simmim")
    assert "encoder.mask_token" in theirs and "decoder.0.weight" in theirs and "mask_token" not in theirs


# --- the models of other projects -----------------------------------------------------------------------------------


def timm_model(version: int, **fields: Any) -> nn.Module:
    ensure_torchvision()
    pytest.importorskip("timm")
    from timm.models.swin_transformer import SwinTransformer as V1
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as V2

    size = {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
    return randomise((V1 if version == 1 else V2)(**{**size, **fields}), 1)


def torchvision_model(version: int) -> nn.Module:
    ensure_torchvision()
    pytest.importorskip("torchvision")
    from torchvision.models import swin_transformer as tv

    v2 = {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2} if version == 2 else {}
    size: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return randomise(tv.SwinTransformer([4, 4], num_classes=5, **size, **v2), 1)


def transformers_model(version: int, kind: str = "ForImageClassification", **fields: Any) -> nn.Module:
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    size = {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    name = "Swin" if version == 1 else "Swinv2"
    config = getattr(transformers, f"{name}Config")(**size, num_labels=5, encoder_stride=8, **fields)
    return randomise(getattr(transformers, f"{name}{kind}")(config), 1)


PEERS = {
    "timm": ("timm", timm_model),
    "torchvision": ("torchvision", torchvision_model),
    "transformers": ("transformers5", transformers_model),
}


def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(images)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_loads_our_export_and_agrees(peer: str, version: int) -> None:
    """R-CKPT-2: strict loading there, the same logits to 1e-5."""
    layout, build = PEERS[peer]
    ours, theirs, images = random_swin(version), build(version), torch.randn(2, 3, 32, 32)
    assert relative_error(run(theirs, images), run(ours, images)) > 0.1
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), layout, config=ours.config), strict=True)
    assert relative_error(run(theirs, images), run(ours, images)) <= 1e-5


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("peer", PEERS)
def test_we_load_a_peers_weights_and_agree(peer: str, version: int) -> None:
    """R-CKPT-2, the other direction; the same configuration is inferred from its tensors (R-CKPT-6)."""
    layout, build = PEERS[peer]
    theirs, ours, images = build(version), random_swin(version), torch.randn(2, 3, 32, 32)
    report = load_weights(ours, theirs.state_dict())
    assert report.layout == (layout if version == 1 else layout.rstrip("5")) and report.share == 1
    assert not report.missing and not report.unexpected and not report.fresh
    assert relative_error(run(ours, images), run(theirs, images)) <= 1e-5
    known = {} if version == 1 or peer == "torchvision" else {"window_size": 4}
    inferred = infer_config(theirs.state_dict(), **known)
    assert inferred == ours.config


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_simmim_reconstructs_the_same(version: int) -> None:
    """R-CKPT-2 for masked image modelling: loss and pixels, both directions."""
    theirs, ours = transformers_model(version, "ForMaskedImageModeling"), random_simmim(version)
    images, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 8, 8) < 0.5

    def compare() -> None:
        with torch.no_grad():
            there = theirs(images, bool_masked_pos=mask.flatten(1))
            here = ours.reconstruct(images, mask)
        assert relative_error(here.prediction, there.reconstruction) <= 1e-5
        assert abs(here.loss - there.loss) <= 1e-5 * there.loss

    with pytest.raises(AssertionError):
        compare()
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), "transformers5"), strict=True)
    compare()
    report = load_weights(ours, randomise(theirs, 7).state_dict())
    assert {"mask_token", "decoder.0.weight", "decoder.0.bias"} <= set(report.matched)
    compare()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["ForImageClassification", "Backbone", "Model", "ForMaskedImageModeling"])
def test_transformers_directories(kind: str, version: int, tmp_path: Any) -> None:
    """R-CKPT-1: what transformers writes to disk has other names than its modules; every kind of model loads."""
    theirs = transformers_model(version, kind)
    theirs.save_pretrained(tmp_path)
    ours = random_swin(version, num_classes=0 if kind != "ForImageClassification" else 5)
    report = load_weights(ours, tmp_path)
    assert report.layout == "transformers" and report.share > 0.99
    assert [name for name in report.missing if not name.startswith("norm.")] == []
    official = to_official(theirs.state_dict())[0]
    for name, tensor in ours.state_dict().items():
        assert name in report.missing or torch.equal(tensor, official[name])


def test_transformers_reads_our_files(tmp_path: Any) -> None:
    """The layout "transformers" is what its from_pretrained expects on disk."""
    from swinscale.weights import write_safetensors

    for version in (1, 2):
        theirs, ours, images = transformers_model(version), random_swin(version), torch.randn(1, 3, 32, 32)
        theirs.save_pretrained(tmp_path)
        written = convert_state_dict(ours.state_dict(), "transformers")
        write_safetensors(tmp_path / "model.safetensors", written)
        loaded, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert relative_error(run(loaded.eval(), images), run(ours, images)) <= 1e-5


def test_timm_pretrained_windows() -> None:
    """The coordinates of a transferred V2 model mean the same in timm."""
    ours = random_swin(2, window_size=4, pretrained_window_sizes=((3, 3), (2, 2)))
    theirs = timm_model(2, pretrained_window_sizes=(3, 2))
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), "timm"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert relative_error(run(theirs, images), run(ours, images)) <= 1e-5


def test_torchvision_keeps_transferred_windows_in_its_buffers() -> None:
    """torchvision knows no pretrained windows, but stores the coordinates, so an export carries them; and back."""
    ours = random_swin(2, window_size=4, pretrained_window_sizes=((3, 3), (2, 2)))
    theirs = torchvision_model(2)
    export = convert_state_dict(ours.state_dict(), "torchvision", config=ours.config)
    assert not export["features.1.0.attn.qkv.bias"][24:48].any()
    theirs.load_state_dict(export, strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert relative_error(run(theirs, images), run(ours, images)) <= 1e-5
    assert infer_config(theirs.state_dict()) == ours.config


VIDEO: dict[str, Any] = {"patch_size": (2, 4, 4), "img_size": (8, 32, 32), "window_size": (4, 4, 4)}


@pytest.mark.parametrize("size", [(8, 32, 32), (16, 32, 64), (6, 40, 40)])
def test_torchvision_video_agrees_both_ways(size: tuple[int, int, int]) -> None:
    """R-CKPT-2 for swin3d: clips whose maps are whole windows, several windows, and padded ones (pad="legacy").

    Where height or width is smaller than the window, torchvision reads wrong rows of its table; only time may be.
    """
    ensure_torchvision()
    video = pytest.importorskip("torchvision.models.video.swin_transformer")
    ours = random_swin(1, pad="legacy", **VIDEO)
    small = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4, 4], "num_classes": 5}
    theirs, clips = randomise(video.SwinTransformer3d([2, 4, 4], **small), 1), torch.randn(1, 3, *size)
    assert relative_error(run(theirs, clips), run(ours, clips)) > 0.1
    export = convert_state_dict(ours.state_dict(), "torchvision", config=ours.config)
    assert detect_layout(export) == "torchvision-video"
    assert_same(convert_state_dict(export, "official"), ours.state_dict())
    theirs.load_state_dict(export, strict=True)
    assert relative_error(run(theirs, clips), run(ours, clips)) <= 1e-5
    randomise(theirs, 3)
    assert load_weights(ours, theirs.state_dict()).share == 1
    assert relative_error(run(theirs, clips), run(ours, clips)) <= 1e-5
    inferred = infer_config(theirs.state_dict(), pad="legacy")
    assert inferred == ours.config


@pytest.mark.parametrize("layout", ["official", "official-video", "mm", "torchvision"])
def test_video_round_trip_is_bit_exact(layout: str) -> None:
    """R-CKPT-2: Video-Swin and mmaction2 keep the published names, and the classifier in cls_head; mmaction2 numbers the norm."""
    model = random_swin(1, **VIDEO)
    theirs = convert_state_dict(model.state_dict(), layout, config=model.config)
    assert detect_layout(theirs) == {"mm": "mm-video", "torchvision": "torchvision-video"}.get(layout, layout)
    assert_same(convert_state_dict(theirs, "official"), model.state_dict())
    published = {f"backbone.{n}": t for n, t in model.state_dict().items() if not n.startswith("head.")}
    published |= {f"cls_head.fc_cls.{n}": t for n, t in model.head.state_dict().items()}
    assert_same(convert_state_dict(published, "official"), model.state_dict())


def test_published_dense_models() -> None:
    """R-CKPT-1: norm{i} per output, a position embedding as a map, heads; both ways."""
    model = random_swin(1, ape=True, num_classes=0)
    theirs = convert_state_dict(model.state_dict(), "official-dense")
    assert detect_layout(theirs) == "official-dense" and "backbone.norm1.weight" in theirs
    assert_same(convert_state_dict(theirs, "official"), model.state_dict())
    table = theirs["backbone.absolute_pos_embed"]
    theirs["backbone.absolute_pos_embed"] = table.transpose(1, 2).unflatten(2, (8, 8))
    theirs |= {"backbone.norm0.weight": torch.ones(24), "rpn_head.rpn_cls.weight": torch.zeros(3, 8, 1, 1)}
    official, notes = to_official(theirs)
    assert_same(official, model.state_dict())
    assert notes == ["2 tensors that belong to no backbone or classifier (norm0, rpn_head)"]


def test_old_timm_is_the_published_layout() -> None:
    """timm before 0.9 kept the downsample where the published code has it."""
    ours = random_swin(1).state_dict()
    assert detect_layout(ours) == "official"
    assert detect_layout(convert_state_dict(ours, "timm")) == "timm"


# --- traps ----------------------------------------------------------------------------------------------------------


def published_file(model: SwinTransformer) -> dict[str, torch.Tensor]:
    """The tensors as the published code stores them, derived buffers included."""
    state = dict(model.state_dict())
    for stage, depth in enumerate(model.config.depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            state[f"{name}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
            if model.config.version == 2:
                window, trained = model.config.stage_windows[stage], model.config.trained_windows[stage]
                coords = relative_coords(window, trained, "log", torch.device("cpu"))
                state[f"{name}.attn.relative_coords_table"] = coords.view(1, 2 * window[0] - 1, 2 * window[1] - 1, 2)
            if block % 2:
                state[f"{name}.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def test_derived_buffers_are_dropped_with_one_line() -> None:
    """R-CKPT-4."""
    model = random_swin(1)
    state, notes = to_official(published_file(model))
    assert_same(state, model.state_dict())
    assert len(notes) == 1 and notes[0].startswith("6 derived buffers (attn_mask, relative_position_index)")


@pytest.mark.parametrize("trained", [0, ((3, 3), (2, 2)), ((6, 6), (4, 4))])
def test_published_v2_files_tell_their_windows(trained: Any) -> None:
    """R-RES-2: window and trained window are read off the stored coordinates, and another scale is refused."""
    model = random_swin(2, pretrained_window_sizes=trained)
    state = published_file(model)
    assert infer_config(state).trained_windows == model.config.trained_windows
    assert infer_config(state).stage_windows == model.config.stage_windows
    assert load_weights(random_swin(2, seed=1, pretrained_window_sizes=trained), state).plain
    with pytest.raises(UsageError, match="was trained with windows"):
        load_weights(random_swin(2, seed=1, pretrained_window_sizes=5), state)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "_orig_mod.", "module.model.", "model.encoder."])
def test_prefixes(prefix: str) -> None:
    """R-CKPT-1: prefixes of wrappers fall away, for every layout."""
    model = random_swin(2)
    for layout in CLASSIFIERS:
        theirs = convert_state_dict(model.state_dict(), layout, config=model.config)
        assert_same(to_official({prefix + name: tensor for name, tensor in theirs.items()})[0], model.state_dict())


def test_momentum_encoders_and_teachers() -> None:
    """R-CKPT-1: MoBY's encoder beside its moving average; a student and a teacher in one file."""
    online, average = random_swin(1, 1).state_dict(), random_swin(1, 2).state_dict()
    moby = {f"encoder.{n}": t for n, t in online.items()} | {f"encoder_k.{n}": t for n, t in average.items()}
    moby |= {"queue1": torch.zeros(8, 4), "projector.linear1.weight": torch.zeros(4, 48)}
    state, notes = to_official(moby)
    assert_same(state, online)
    assert notes == [
        f"{len(online) + 2} tensors that belong to no backbone or classifier (encoder_k, projector, queue1)"
    ]
    both = {f"student.{n}": t for n, t in online.items()} | {f"teacher.{n}": t for n, t in average.items()}
    both["teacher.head.last_layer.weight_g"] = torch.zeros(8, 1)
    state, notes = to_official(both)
    assert_same(state, average)
    assert notes == [f"{len(online) + 1} tensors that belong to no backbone or classifier (head, student)"]


def test_timm_features_only() -> None:
    """R-CKPT-1: stages named layers_0 …, without the final norm and the classifier."""
    ensure_torchvision()
    timm = pytest.importorskip("timm")
    for name, version in (("swin_tiny_patch4_window7_224", 1), ("swinv2_tiny_window8_256", 2)):
        theirs = randomise(timm.create_model(name, features_only=True, img_size=64, window_size=2), 1)
        state = theirs.state_dict()
        assert detect_layout(state) == "timm"
        ours = random_swin(
            version,
            img_size=64,
            window_size=2,
            embed_dim=96,
            depths=(2, 2, 6, 2),
            num_heads=(3, 6, 12, 24),
            num_classes=0,
        )
        report = load_weights(ours, state)
        assert report.missing == ["norm.weight", "norm.bias"] and not report.unexpected
        images = torch.randn(1, 3, 64, 64).double()  # twelve random blocks magnify the rounding of single precision
        with torch.no_grad():
            mine = ours.double().forward_intermediates(images, intermediates_only=True, output_fmt="NHWC")
            for here, there in zip(mine, theirs.double()(images), strict=True):
                assert relative_error(here, there) <= 1e-5


def test_early_torchvision_v2_names() -> None:
    """SPEC 1.8: the first V2 files of torchvision call it v2_logit_scale."""
    model = random_swin(2)
    theirs = convert_state_dict(model.state_dict(), "torchvision", config=model.config)
    early = {name.replace("attn.logit_scale", "attn.v2_logit_scale"): tensor for name, tensor in theirs.items()}
    assert set(early) != set(theirs)
    assert_same(to_official(early)[0], model.state_dict())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.2.blocks.1.mlp._moe_layer.experts.batched_fc1_w", "Swin-MoE"),
        ("layers.0.blocks.0.spatial_mlp.weight", "SwinMLP"),
        ("stages.0.blocks.0.attn.meta_mlp.fc1.weight", "swinv2_cr"),
        ("stages.0.blocks.0.window_attention.meta_network.0.weight", "Christoph Reich"),
        ("swinViT.layers1.0.blocks.0.attn.qkv.weight", "MONAI"),
        ("layers.2.blocks.1.mlp.norm.weight", "Feature-Distillation model with a norm inside the MLP"),
        ("layers.0.rel_pos_bias.rpe_mlp.0.weight", "share one position bias network"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_relatives_are_refused_with_their_reason(name: str, words: str, prefix: str) -> None:
    """R-CKPT-1: alone, and inside a file that otherwise has the published names."""
    for state in ({}, random_swin(2).state_dict()):
        state = {prefix + n: t for n, t in {**state, name: torch.zeros(1)}.items()}
        with pytest.raises(UsageError, match=words) as error:
            to_official(state)
        assert "\n" not in str(error.value)


def test_the_real_swinv2_cr_is_refused() -> None:
    ensure_torchvision()
    timm = pytest.importorskip("timm")
    with pytest.raises(UsageError, match="swinv2_cr"):
        detect_layout(timm.create_model("swinv2_cr_tiny_ns_224", img_size=64).state_dict())


def test_head_outside_the_prefix() -> None:
    """A dense model's backbone.* beside heads of its own."""
    model = random_swin(1, num_classes=0)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    state["decode_head.conv_seg.weight"] = torch.zeros(3, 48, 1, 1)
    report = load_weights(random_swin(1, seed=3, num_classes=0), state)
    assert report.share == 1 and not report.unexpected
    assert report.left_out == ["1 tensors that belong to no backbone or classifier (decode_head)"]


@pytest.mark.parametrize("old", ["rpe_mlp", "norm3"])
def test_older_names(old: str) -> None:
    """SPEC 1.4: rpe_mlp is cpb_mlp; norm3 of a block is enorm."""
    model = random_swin(2, main_norm_interval=2)
    new = {"rpe_mlp": "cpb_mlp", "norm3": "enorm"}[old]
    state = {name.replace(new, old): tensor for name, tensor in model.state_dict().items()}
    assert set(state) != set(model.state_dict())
    assert_same(to_official(state)[0], model.state_dict())


def fused_bias(k_bias: float) -> dict[str, torch.Tensor]:
    """A V2 state with one bias for q, k and v, under published names."""
    state = dict(random_swin(2).state_dict())
    for name in [name for name in state if name.endswith("q_bias")]:
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.full_like(q, k_bias), v))
    return state


def test_bias_of_the_keys_is_never_lost_in_silence() -> None:
    """SPEC 1.3: under cosine attention it does not cancel."""
    assert_same(to_official(fused_bias(0.0))[0], random_swin(2).state_dict())
    with pytest.raises(UsageError, match=r"largest 0\.25.*drop_k_bias=True"):
        to_official(fused_bias(0.25))
    state, notes = to_official(fused_bias(0.25), drop_k_bias=True)
    assert_same(state, random_swin(2).state_dict())
    assert "0.25" in notes[0]


def test_torchvision_zeroes_the_bias_of_the_keys_itself() -> None:
    theirs = torchvision_model(2)
    assert theirs.features[1][0].attn.qkv.bias[24:48].abs().max() > 0
    _, notes = to_official(theirs.state_dict())
    assert any("torchvision sets it to zero at run time" in note for note in notes)


@pytest.mark.parametrize(
    ("fields", "layout", "words"),
    [
        ({"main_norm_interval": 2}, "timm", "main_norm_interval"),
        ({"version": 1, "ape": True}, "timm", "absolute_pos_embed"),
        ({"version": 2, "ape": True}, "transformers", "ape"),
        ({"version": 1, "position_bias": "log"}, "torchvision", "position bias"),
        ({"version": 2, "position_bias": "paper"}, "timm", "position bias"),
        ({"window_size": ((4, 4), (2, 2))}, "torchvision", "one window for all stages"),
        ({}, "official-simmim", "mask token"),
        ({}, "timn", "Did you mean 'timm'"),
        ({"version": 1, "main_norm_interval": 2}, "mm", "main_norm_interval"),
        ({"version": 1}, "official-dense", "no place for 'head.weight'"),
        ({"version": 2, "num_classes": 0}, "official-dense", "no Swin V2"),
        ({"version": 1, **VIDEO}, "timm", "no Swin Transformer for video"),
        ({"version": 1, **VIDEO}, "transformers", "no Swin Transformer for video"),
        ({"version": 2, **VIDEO}, "torchvision", "no Swin V2"),
        ({"version": 1}, "official-video", "images"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(fields: dict[str, Any], layout: str, words: str) -> None:
    model = random_swin(**fields)
    with pytest.raises(UsageError, match=re.escape(words)) as error:
        from_official(model.state_dict(), layout, model.config)
    assert "\n" not in str(error.value)


def test_absolute_position_embedding_reaches_transformers() -> None:
    ours = random_swin(1, ape=True)
    theirs = transformers_model(1, use_absolute_embeddings=True)
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), "transformers5"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert relative_error(run(theirs, images), run(ours, images)) <= 1e-5


def test_other_models_are_refused_in_one_line() -> None:
    """R-CKPT-3: a ResNet, a MobileNet, nothing at all."""
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    mobilenet = {"features.0.0.weight": torch.zeros(8, 3, 3, 3), "features.1.conv.0.0.weight": torch.zeros(8, 1, 3, 3)}
    cr = {"stages.0.blocks.0.attn.meta_mlp.fc1.weight": torch.zeros(384, 2)}
    for state, words in (
        (resnet, "conv1.weight"),
        (mobilenet, "not the weights"),
        (cr, "swinv2_cr"),
        ({}, "nothing"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            detect_layout(state)
        assert "\n" not in str(error.value)


def test_wrong_layout_by_name_is_refused() -> None:
    with pytest.raises(UsageError, match="have the layout 'official', not 'torchvision'"):
        to_official(random_swin(1).state_dict(), "torchvision")


def test_the_order_of_query_key_and_value_matters() -> None:
    """R-CKPT-3, a trap: with q and k exchanged the outputs differ, so the parity tests above can fail."""
    ours, images = random_swin(1), torch.randn(2, 3, 32, 32)
    theirs = convert_state_dict(ours.state_dict(), "transformers")
    exchanged = {n.replace("query", "x").replace("key", "query").replace("x", "key"): t for n, t in theirs.items()}
    other = random_swin(1)
    load_weights(other, exchanged)
    assert relative_error(run(other, images), run(ours, images)) > 1e-3
