"""What a model costs at an input size: the published numbers, what really runs, and advice that holds (R-SIZE-4, R-OPS-5)."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from random_models import random_swin
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, model_config, plan

PUBLISHED = {  # 10⁹ multiply–accumulates
    "swin_tiny_patch4_window7_224": 4.49,
    "swin_small_patch4_window7_224": 8.75,
    "swin_base_patch4_window7_224": 15.44,
    "swin_base_patch4_window12_384": 47.11,
    "swin_large_patch4_window7_224": 34.49,
    "swin_large_patch4_window12_384": 103.95,
    "swinv2_tiny_window8_256": 5.93,
    "swinv2_tiny_window16_256": 6.61,
    "swinv2_small_window8_256": 11.51,
    "swinv2_small_window16_256": 12.65,
    "swinv2_base_window12_192": 11.76,
    "swinv2_base_window8_256": 20.29,
    "swinv2_base_window16_256": 21.80,
    "swinv2_base_window12to24_192to384": 54.75,
    "swinv2_large_window12_192": 25.96,
    "swinv2_large_window12to16_192to256": 47.49,
    "swinv2_large_window12to24_192to384": 115.42,
    "swinv2_huge_window12_192": 85.75,
    "swinv2_huge_window12to14_192to224": 117.6,
    "swinv2_huge_window12to32_192to512": 686.5,
    "swinv2_giant_window12_192": 370.7,
    "swinv2_giant_window12to40_192to640": 4639,
}


@pytest.mark.parametrize(("name", "giga_macs"), PUBLISHED.items())
def test_costs_are_the_published_ones(name, giga_macs):
    """R-OPS-5. The published counter adds the norms: 0.2 % at most."""
    macs = plan(model_config(name)).macs / 1e9
    assert macs == pytest.approx(giga_macs, rel=2e-3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(90, 130), (224, 224), (20, 61)])
@pytest.mark.parametrize("small_map", ["shrink", "pad"])
def test_costs_against_a_counter_of_operations(version, size, small_map):
    """R-OPS-5: the plan counts what runs, padding, position bias and head included."""
    model = random_swin(version, window_size=7, img_size=224, small_map=small_map)
    model.set_attention_backend("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, *size))
    found = plan(model.config, size)
    assert counter.get_total_flops() == found.flops + 2 * found.position_bias_macs
    assert found.flops == 2 * found.macs
    assert (found.position_bias_macs > 0) == (version == 2)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_costs_of_video():
    model = random_swin(2, patch_size=(2, 4, 4), window_size=(4, 3, 3), img_size=(8, 32, 32))
    model.set_attention_backend("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 5, 30, 44))
    found = plan(model.config, (5, 30, 44))
    assert counter.get_total_flops() == found.flops + 2 * found.position_bias_macs


def test_rows_and_print():
    found = plan(model_config("swin_tiny_patch4_window7_224"), 240)
    assert found.rows()[0][:6] == ["0", "60×60", "7×7", "3×3", "81", "9.3"]
    assert found.rows()[3][:6] == ["3", "8×8", "7×7", "3×3", "4", "67.3"]
    lines = str(found).splitlines()
    assert lines[0].startswith("28,288,354 parameters; one forward pass at 240×240: ")
    assert f"{found.macs / 1e9:.2f} GMAC = {found.flops / 1e9:.2f} GFLOP" in lines[0]
    assert lines[1].split()[:3] == ["stage", "map", "window"]
    assert lines[-1].startswith("stage 3: 67 % of its slots are padding")


def test_much_padding_is_warned_of_with_advice():
    """R-SIZE-4."""
    config = SwinConfig(depths=(2, 2), num_heads=(3, 6), window_size=7, img_size=224)
    found = plan(config, (36, 36))
    assert found.stages[0].map == (9, 9)
    assert found.stages[0].padding == pytest.approx(1 - 81 / 196)
    assert found.warnings[0] == (
        "stage 0: 59 % of its slots are padding (map 9×9, window 7×7); "
        "an input of 28×28 or a window of 5×5 there is cheaper"
    )
    assert plan(config, (56, 56)).warnings == ()
    with pytest.raises(UsageError, match="2 positive integers"):
        plan(config, (1, 2, 3))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    window=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    small_map=st.sampled_from(["shrink", "pad"]),
)
def test_the_advice_is_cheaper(size, window, small_map):
    """R-SIZE-4: following either piece of advice lowers the cost and the stage named has little padding."""
    config = SwinConfig(
        embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=window, img_size=200, small_map=small_map
    )
    before = plan(config, size)
    for line in before.warnings:
        stage = int(line[6])
        if found := re.search(r"an input of (\d+)×(\d+)", line):
            after = plan(config, (int(found[1]), int(found[2])))
            assert after.stages[stage].padding == 0
            assert after.macs < before.macs
        if found := re.search(r"a window of (\d+)×(\d+)", line):
            windows = list(config.window_size)
            windows[stage] = (int(found[1]), int(found[2]))
            after = plan(dataclasses.replace(config, window_size=tuple(windows)), size)
            assert after.stages[stage].padding < before.stages[stage].padding
            assert after.macs < before.macs
        assert line.endswith("is cheaper")
        assert "an input of" in line or "a window of" in line
