"""Relative positions and windows: golden values, and the bias that survives a change of window."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from random_models import random_swin
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.models.swin import MAX_LOGIT_SCALE
from swinscale.models.windows import relative_coords, relative_position_index

CPU = torch.device("cpu")
LOG = {  # (window, pretrained window) → coordinate of the offsets 1, 2, w // 2, w - 1 (published code)
    (7, 7): (0.40746, 0.62482, 0.77398, 1.05664),
    (8, 8): (0.36651, 0.57207, 0.82602, 1.05664),
    (12, 12): (0.26283, 0.43182, 0.80774, 1.05664),
    (16, 8): (0.36651, 0.57207, 1.11413, 1.39378),
    (14, 12): (0.26283, 0.43182, 0.86889, 1.12869),
    (16, 12): (0.26283, 0.43182, 0.92313, 1.19133),
    (24, 12): (0.26283, 0.43182, 1.09401, 1.38263),
    (32, 12): (0.26283, 0.43182, 1.21984, 1.51913),
    (40, 12): (0.26283, 0.43182, 1.31947, 1.62532),
    (7, 6): (0.45950, 0.69013, 0.84535, 1.13533),
    (8, 6): (0.45950, 0.69013, 0.96251, 1.20294),
    (12, 6): (0.45950, 0.69013, 1.13533, 1.40574),
}


@pytest.mark.parametrize(("windows", "expected"), LOG.items())
def test_log_coordinates(windows, expected):
    w, trained = windows
    table = relative_coords((w, w), (trained, trained), "log", CPU).view(2 * w - 1, 2 * w - 1, 2)
    for offset, value in zip((1, 2, w // 2, w - 1), expected, strict=True):
        assert table[w - 1 + offset, w - 1, 0].item() == pytest.approx(value, abs=1e-5)
        assert table[w - 1, w - 1 - offset, 1].item() == pytest.approx(-value, abs=1e-5)
    assert table[w - 1, w - 1].abs().max() == 0


def test_linear_and_printed_coordinates():
    """The article's formula is sign(x) ln(1 + |x|) of the plain offset: 8 → 2.079 to 16 → 2.773."""
    linear = relative_coords((16, 16), (8, 8), "linear", CPU)
    assert linear.max().item() == pytest.approx(15 / 7)
    for w, top in ((8, 2.079), (16, 2.773)):
        assert relative_coords((w, w), (8, 8), "paper", CPU).max().item() == pytest.approx(top, abs=1e-3)


def test_constants():
    assert pytest.approx(4.605170, abs=1e-6) == MAX_LOGIT_SCALE
    assert relative_coords((8, 8), (8, 8), "log", CPU).max().item() == pytest.approx(math.log2(9) / 3, abs=1e-6)


def test_relative_index():
    index = relative_position_index((2, 2), (2, 2), CPU).view(4, 4)
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    small = relative_position_index((1, 2), (2, 3), CPU).view(2, 2)  # a smaller window reads the middle of the table
    assert small.tolist() == [[7, 6], [8, 7]]


@pytest.mark.parametrize(
    ("name", "windows", "trained"),
    [
        ("swin_tiny_patch4_window7_224", (7, 7, 7, 7), (7, 7, 7, 7)),
        ("swinv2_tiny_window16_256", (16, 16, 16, 8), (16, 16, 16, 8)),
        ("swinv2_base_window12_192", (12, 12, 12, 6), (12, 12, 12, 6)),
        ("swinv2_base_window12to24_192to384", (24, 24, 24, 12), (12, 12, 12, 6)),
    ],
)
def test_windows_are_fitted_to_the_map(name, windows, trained):
    config = model_config(name)
    assert tuple(w[0] for w in config.stage_windows) == windows
    assert tuple(w[0] for w in config.trained_windows) == trained


@pytest.mark.parametrize("kind", ["log", "linear", "paper"])
def test_a_larger_window_keeps_the_bias_of_every_old_offset(kind):
    """R-RES-1: ≤ 1e-6."""
    small = random_swin(position_bias=kind, window_size=4, img_size=32, patch_size=2)
    config = dataclasses.replace(small.config, img_size=64, window_size=8, pretrained_window_sizes=4)
    large = SwinTransformer(config)
    large.load_state_dict(small.state_dict())
    old = small.layers[0].blocks[0].attn.bias((4, 4)).rows().view(-1, 4, 4, 4, 4)
    new = large.layers[0].blocks[0].attn.bias((8, 8)).rows().view(-1, 8, 8, 8, 8)
    assert (new[:, :4, :4, :4, :4] - old).abs().max() <= 1e-6
    assert (new[:, 2:6, 3:7, 2:6, 3:7] - old).abs().max() <= 1e-6


@pytest.mark.parametrize("version", [1, 2])
def test_a_smaller_map_keeps_the_bias_of_the_offsets_that_remain(version):
    attn = random_swin(version, window_size=4, img_size=32, patch_size=2).layers[0].blocks[0].attn
    whole, part = attn.bias((4, 4)).rows().view(-1, 4, 4, 4, 4), attn.bias((2, 3)).rows().view(-1, 2, 3, 2, 3)
    assert torch.allclose(part, whole[:, :2, :3, :2, :3], atol=1e-6)


def test_bias_depends_on_the_offset_alone_and_stays_in_range():
    bias = random_swin(window_size=4, patch_size=2).layers[0].blocks[0].attn.bias((4, 4)).rows().view(-1, 4, 4, 4, 4)
    assert torch.allclose(bias[:, 0, 0, 1, 2], bias[:, 2, 1, 3, 3])
    assert not torch.allclose(bias[:, 1, 2, 0, 0], bias[:, 0, 0, 1, 2])
    assert bias.min() > 0
    assert bias.max() < 16


@pytest.mark.parametrize("kind", ["table", "log", "linear", "paper"])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_window_of_one_token_is_finite(kind, rank):
    """Its only offset is 0, and the division by (window - 1) must not be 0 / 0 (huggingface/transformers#28675)."""
    model = random_swin(position_bias=kind, window_size=1, patch_size=(4,) * rank, img_size=16)
    x = torch.randn(1, 3, *(16,) * rank, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_absolute_positions_follow_the_size():
    model = random_swin(ape=True)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    assert model(torch.randn(1, 3, 50, 70)).isfinite().all()


def test_per_stage_and_rectangular_windows():
    """R-SIZE-5."""
    config = SwinConfig(
        embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=((2, 8), (4, 4), 3), img_size=64
    )
    assert config.stage_windows == ((2, 8), (4, 4), (3, 3))
    assert SwinTransformer(config)(torch.randn(1, 3, 64, 128)).shape == (1, 1000)
    two = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "img_size": 128}
    assert SwinConfig(window_size=(3, 7), **two).stage_windows == ((3, 7), (3, 7))  # as many axes as stages: one size
    assert SwinConfig(window_size=(3, (2, 8)), **two).stage_windows == ((3, 3), (2, 8))
