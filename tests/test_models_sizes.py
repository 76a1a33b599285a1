"""Any input size: no crash, no leak across the cyclic seam, no influence of padding (R-SIZE-1 to R-SIZE-6)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from random_models import random_swin
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, plan
from swinscale.models.windows import stage_layout, window_layout

CPU = torch.device("cpu")
MODELS = {
    (version, patch): random_swin(
        version, patch_size=patch, window_size=(3, 4), embed_dim=8, num_heads=(1, 2), drop_path_rate=0.1
    )
    for version in (1, 2)
    for patch in (1, 2, 4)
}
sizes = st.one_of(st.integers(1, 60), st.sampled_from([97, 128, 251, 256, 600]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    height=sizes, width=sizes, patch=st.sampled_from([1, 2, 4]), version=st.sampled_from([1, 2]), train=st.booleans()
)
def test_every_size_works(height, width, patch, version, train):
    """R-SIZE-1: one model object, another size on every call; outputs have ceil-division shapes and are finite."""
    if height * width > 600 * 60 * patch:
        width = max(1, 36000 * patch // height)
    model = MODELS[version, patch].train(train)
    with torch.set_grad_enabled(train):
        last, maps = model.forward_intermediates(torch.randn(1, 3, height, width))
    for stage, feature in enumerate(maps):
        grid = tuple(math.ceil(math.ceil(n / patch) / 2**stage) for n in (height, width))
        assert feature.shape[2:] == grid
    assert last.isfinite().all()
    if train:
        last.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 20, 17), (9, 33, 8)])
def test_every_clip_size_works(version, size):
    model = random_swin(version, patch_size=(2, 4, 4), window_size=(4, 3, 3), img_size=(8, 32, 32))
    assert model(torch.randn(2, 3, *size)).isfinite().all()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("small_map", ["shrink", "pad", "pad-noshift"])
@pytest.mark.parametrize("size", [(5, 6), (7, 11), (2, 9)])
def test_padding_has_no_influence(version, small_map, size, monkeypatch):
    """R-SIZE-2: whatever padding slots hold, real tokens come out the same in the exact mode (and not in the legacy one)."""
    from swinscale.models import swin as module

    change = {}
    for pad in ("exact", "legacy"):
        model = random_swin(
            version, patch_size=1, window_size=4, pad=pad, small_map=small_map, depths=(4,), num_heads=(2,)
        )
        x = torch.randn(1, 3, *size)
        outputs = []
        for fill in (0.0, 1e4):

            def reorder(t, before, after, fill=fill):
                t = t if before is after else t.index_select(1, module_index(before, after))
                if after is not None:
                    real = torch.zeros(t.shape[1], dtype=torch.bool)
                    real[after.slot] = True
                    noise = fill * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
                    t = torch.where(real[:, None], t, noise)
                    reorder.filled += int((~real).sum())
                return t

            reorder.filled = 0
            monkeypatch.setattr(module, "reorder", reorder)
            with torch.no_grad():
                outputs.append(model.forward_features(x))
            assert reorder.filled > 0 or small_map == "shrink"
        change[pad] = ((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()).item()
    assert change["exact"] <= 1e-6
    assert change["legacy"] <= 1e-6  # padding is zeroed before it enters attention, whatever it held


def module_index(before, after):
    from swinscale.models.windows import _gather_index

    return _gather_index(before, after)


def test_exact_padding_differs_from_legacy():
    """Unmasked padding changes real tokens by several per cent: that is what the exact mode is for."""
    legacy = random_swin(1, patch_size=1, window_size=4, pad="legacy")
    exact = SwinTransformer(dataclasses.replace(legacy.config, pad="exact")).eval()
    exact.load_state_dict(legacy.state_dict())
    x = torch.randn(1, 3, 6, 7)
    a, b = exact.forward_features(x), legacy.forward_features(x)
    assert ((a - b).norm() / a.norm()).item() > 0.01
    whole = torch.randn(1, 3, 8, 8)
    assert torch.allclose(exact(whole), legacy(whole), atol=1e-6)


def sees(size, window, shift):
    """For each position the positions in its window: those on the same side of every window border, by plain loops.

    Borders of shifted windows lie at shift, shift + window, …; nothing wraps around.
    """

    def cell(position):
        return tuple((p + w - s) // w if s else p // w for p, w, s in zip(position, window, shift, strict=True))

    positions = [(y, x) for y in range(size[0]) for x in range(size[1])]
    return {p: {q for q in positions if cell(p) == cell(q)} for p in positions}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("window", [(2, 3), (3, 2)])
def test_gradients_reach_exactly_the_own_window(version, window):
    """R-SIZE-2: for every map up to three windows, a token of a shifted block depends on its window's tokens and no other."""
    model = random_swin(
        version, patch_size=1, window_size=window, depths=(2,), num_heads=(2,), embed_dim=8, img_size=64
    )
    stage = model.layers[0]
    for height in range(1, 3 * window[0] + 1):
        for width in range(1, 3 * window[1] + 1):
            size = (height, width)
            layout = stage_layout(model.config, 0, size, True, CPU)
            shift = tuple(w // 2 if n > w else 0 for n, w in zip(size, window, strict=True))
            expected = sees(size, tuple(map(min, window, size)), shift)
            tokens = torch.randn(1, height * width, 8, requires_grad=True)
            shape = (layout.source.numel() // math.prod(layout.window), math.prod(layout.window))
            inside = tokens.index_select(1, layout.source).unflatten(1, shape)
            out = stage.blocks[1].attn(inside, layout).flatten(1, 2).index_select(1, layout.slot)
            for index in {0, height * width // 2, height * width - 1}:
                (grad,) = torch.autograd.grad(out[0, index].sum(), tokens, retain_graph=True)
                reached = {divmod(int(i), width) for i in grad[0].abs().sum(-1).nonzero()}
                assert reached == expected[divmod(index, width)], (size, index)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_layouts_are_permutations(data):
    """Every token has one slot, and the slot holds it; padding is what is left."""
    rank = data.draw(st.integers(1, 3))
    size, window = (tuple(data.draw(st.integers(1, 9)) for _ in range(rank)) for _ in range(2))
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    for exact in (True, False):
        layout = window_layout(size, window, shift, exact, CPU)
        assert torch.equal(layout.source[layout.slot], torch.arange(math.prod(size)))
        padding = layout.source.numel() - math.prod(size)
        assert (layout.zero is not None) == (padding > 0 and not exact)
        if layout.zero is not None:
            assert int(layout.zero.sum()) == padding
        if exact and padding and layout.regions is not None:
            assert int((layout.regions == -1).sum()) == padding


def test_cached_layouts_are_fit_for_training_whoever_asked_first():
    """Evaluation in inference mode, or on meta, must not leave tensors behind that training cannot use."""
    model = random_swin(2, patch_size=1, window_size=5, img_size=37)
    with torch.inference_mode():
        model(torch.randn(1, 3, 37, 41))
    model.train()(torch.randn(1, 3, 37, 41)).sum().backward()
    with torch.device("meta"):
        copy = SwinTransformer(model.config)
        copy(torch.empty(1, 3, 43, 47))
    model(torch.randn(1, 3, 43, 47)).sum().backward()


def test_small_maps_follow_the_convention_asked_for():
    """R-SIZE-3."""
    config = SwinConfig(depths=(2,), num_heads=(3,), window_size=7, img_size=224)
    cases = {"shrink": ((5, 6), 30, False), "pad": ((7, 7), 49, True), "pad-noshift": ((7, 7), 49, False)}
    for small_map, (window, slots, shifted) in cases.items():
        this = dataclasses.replace(config, small_map=small_map, pad="legacy")
        regular, moved = (stage_layout(this, 0, (5, 6), shift, CPU) for shift in (False, True))
        assert regular.window == moved.window == window
        assert regular.source.numel() == slots
        assert torch.equal(regular.source, moved.source) == (not shifted)


def test_a_larger_input_never_enlarges_a_window():
    model = random_swin(2, window_size=8, img_size=32, patch_size=4)  # last stage: map and window 4
    assert model.config.stage_windows == ((8, 8), (4, 4))
    assert stage_layout(model.config, 1, (20, 20), False, CPU).window == (4, 4)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 32), (1, 3, 0, 32), (1, 3, 4, 32, 32)])
def test_inputs_that_do_not_fit_are_named(shape):
    """R-SIZE-6."""
    with pytest.raises(UsageError) as error:
        random_swin()(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "3 channels" in str(error.value)


@pytest.mark.parametrize(
    ("name", "giga_macs"),
    [
        ("swin_tiny_patch4_window7_224", 4.49),
        ("swin_small_patch4_window7_224", 8.75),
        ("swin_base_patch4_window7_224", 15.44),
        ("swin_base_patch4_window12_384", 47.11),
        ("swin_large_patch4_window12_384", 103.95),
        ("swinv2_tiny_window8_256", 5.93),
        ("swinv2_tiny_window16_256", 6.61),
        ("swinv2_base_window12_192", 11.76),
        ("swinv2_base_window16_256", 21.80),
        ("swinv2_base_window12to24_192to384", 54.75),
        ("swinv2_huge", 85.75),
        ("swinv2_giant_window12to40_192to640", 4639),
    ],
)
def test_costs_are_the_published_ones(name, giga_macs):
    """R-OPS-5: multiply–accumulates as the published counter has them (it adds norms: 0.2 % at most)."""
    from swinscale.models import model_config

    assert plan(model_config(name)).macs / 1e9 == pytest.approx(giga_macs, rel=2e-3)


def test_costs_against_a_counter_of_operations():
    """R-OPS-5: the plan counts what runs, padding included, at a size that pads everywhere."""
    from torch.utils.flop_counter import FlopCounterMode

    model = random_swin(1, window_size=7, img_size=224)
    model.set_attention_backend("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 90, 130))
    assert counter.get_total_flops() == plan(model.config, (90, 130)).flops


def test_much_padding_is_warned_of_with_advice():
    """R-SIZE-4."""
    config = SwinConfig(depths=(2, 2), num_heads=(3, 6), window_size=7, img_size=224)
    found = plan(config, (36, 36))
    assert found.stages[0].map == (9, 9)
    assert found.stages[0].padding == pytest.approx(1 - 81 / 196)
    assert "stage 0: 59 % of its slots are padding" in found.warnings[0]
    assert "window of 5×5" in found.warnings[0]
    assert plan(config, (56, 56)).warnings == ()
    with pytest.raises(UsageError, match="2 positive integers"):
        plan(config, (1, 2, 3))
