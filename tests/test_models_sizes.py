"""Any input size: no crash, no leak across the cyclic seam, no influence of padding (R-SIZE-1 to R-SIZE-6)."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from random_models import random_swin
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.swin import SwinBlock
from swinscale.models.windows import stage_layouts, window_layout

CPU = torch.device("cpu")
MODELS = {
    (version, patch): random_swin(
        version, patch_size=patch, window_size=((3, 4), (5, 2)), embed_dim=8, num_heads=(1, 2), drop_path_rate=0.1
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


CLIPS = {
    version: random_swin(version, patch_size=(2, 4, 4), window_size=(4, 3, 3), img_size=(8, 32, 32))
    for version in (1, 2)
}


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(1, 11), st.integers(1, 40), st.integers(1, 40)), version=st.sampled_from([1, 2]))
def test_every_clip_size_works(size, version):
    """R-SIZE-1 with three axes: time is never merged."""
    with torch.no_grad():
        _, maps = CLIPS[version].forward_intermediates(torch.randn(2, 3, *size))
    first = tuple(math.ceil(n / p) for n, p in zip(size, (2, 4, 4), strict=True))
    assert [f.shape[2:] for f in maps] == [first, (first[0], -(-first[1] // 2), -(-first[2] // 2))]
    assert all(f.isfinite().all() for f in maps)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("small_map", ["shrink", "pad", "pad-noshift"])
@pytest.mark.parametrize("size", [(5, 6), (7, 11), (2, 9)])
def test_padding_has_no_influence(version, small_map, size, monkeypatch):
    """R-SIZE-2: whatever padding slots hold, real tokens come out the same; in the legacy mode because zeros replace it."""
    change, run, filled = {}, SwinBlock.forward, 0
    for pad in ("exact", "legacy"):
        model = random_swin(
            version, patch_size=1, window_size=4, pad=pad, small_map=small_map, depths=(4,), num_heads=(2,)
        )
        x = torch.randn(1, 3, *size)
        outputs = []
        for fill in (0.0, 1e4):

            def with_noise_in_padding(self, t, layout, fill=fill):
                nonlocal filled
                real = torch.zeros(layout.source.numel(), 1, dtype=torch.bool)
                real[layout.slot] = True
                filled += int((~real).sum())
                noise = fill * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
                return run(self, torch.where(real.view(*t.shape[1:3], 1), t, noise), layout)

            monkeypatch.setattr(SwinBlock, "forward", with_noise_in_padding)
            with torch.no_grad():
                outputs.append(model.forward_features(x))
        assert filled > 0
        change[pad] = ((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()).item()
    assert change["exact"] <= 1e-6
    assert change["legacy"] <= 1e-6


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

    positions = list(itertools.product(*map(range, size)))
    return [[cell(p) == cell(q) for q in positions] for p in positions]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("window", [(2, 3), (3, 2), (2, 2, 3)])
@pytest.mark.parametrize(
    ("pad", "small_map"), [("exact", "shrink"), ("exact", "pad"), ("legacy", "pad"), ("legacy", "pad-noshift")]
)
def test_gradients_reach_exactly_the_own_window(version, window, pad, small_map):
    """R-SIZE-2: a token of a shifted block depends on its window's tokens and no other, on every map up to 3 windows.

    timm pads after the roll, so there the first row depends on the last (huggingface/pytorch-image-models#2438).
    """
    model = random_swin(
        version, patch_size=(1,) * len(window), window_size=window, depths=(2,), num_heads=(2,), embed_dim=8,
        img_size=64, pad=pad, small_map=small_map,
    )  # fmt: skip
    attention = model.layers[0].blocks[1].attn
    for size in itertools.product(*(range(1, (3 if len(window) == 2 else 2) * w + 1) for w in window)):
        shift = tuple(w // 2 if n > w or small_map == "pad" else 0 for n, w in zip(size, window, strict=True))
        fitted = tuple(map(min, window, size)) if small_map == "shrink" else window
        layout, count = stage_layouts(model.config, 0, size, CPU)[1], math.prod(size)
        tokens = torch.randn(1, count, 8).repeat(count, 1, 1).requires_grad_()  # one copy for each token asked about
        inside = tokens.index_select(1, layout.source).unflatten(1, (-1, math.prod(layout.window)))
        if layout.zero is not None:
            inside = inside.masked_fill(layout.zero, 0)
        out = attention(inside, layout).flatten(1, 2).index_select(1, layout.slot)
        out.sum(-1).diagonal().sum().backward()
        assert torch.equal(tokens.grad.abs().sum(-1) > 0, torch.tensor(sees(size, fitted, shift))), size


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
    """Evaluation in inference mode, on meta or in an export must not leave tensors behind that training cannot use."""
    model = random_swin(2, patch_size=1, window_size=5, img_size=37)
    with torch.inference_mode():
        model(torch.randn(1, 3, 37, 41))
    model.train()(torch.randn(1, 3, 37, 41)).sum().backward()
    with torch.device("meta"):
        copy = SwinTransformer(model.config)
        copy(torch.empty(1, 3, 43, 47))
    model(torch.randn(1, 3, 43, 47)).sum().backward()
    torch.export.export(model.eval(), (torch.randn(1, 3, 45, 51),))
    assert type(model(torch.randn(1, 3, 45, 51))) is torch.Tensor


def test_small_maps_follow_the_convention_asked_for():
    """R-SIZE-3."""
    config = SwinConfig(depths=(2,), num_heads=(3,), window_size=7, img_size=224)
    cases = {"shrink": ((5, 6), 30, False), "pad": ((7, 7), 49, True), "pad-noshift": ((7, 7), 49, False)}
    for small_map, (window, slots, shifted) in cases.items():
        this = dataclasses.replace(config, small_map=small_map, pad="legacy")
        regular, moved, *_ = stage_layouts(this, 0, (5, 6), CPU)
        assert regular.window == moved.window == window
        assert regular.source.numel() == slots
        assert torch.equal(regular.source, moved.source) == (not shifted)


def test_a_larger_input_never_enlarges_a_window():
    model = random_swin(2, window_size=8, img_size=32, patch_size=4)  # last stage: map and window 4
    assert model.config.stage_windows == ((8, 8), (4, 4))
    assert stage_layouts(model.config, 1, (20, 20), CPU)[0].window == (4, 4)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 32), (1, 3, 0, 32), (1, 3, 4, 32, 32)])
def test_inputs_that_do_not_fit_are_named(shape):
    """R-SIZE-6."""
    with pytest.raises(UsageError) as error:
        random_swin()(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "3 channels" in str(error.value)
