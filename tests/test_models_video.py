"""Clips of any length and size: the windowed network against a plain one with a mask over all pairs of tokens (R-SIZE-1, 2, 3).

The reference keeps tokens in raster order, never rolls, pads or partitions, and reads each pair's bias from its offset.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from random_models import random_swin
from swinscale.models import SwinTransformer
from swinscale.models.windows import Layout, stage_layouts

WINDOW = (4, 3, 3)
SHAPE: dict[str, Any] = {
    "patch_size": (2, 4, 4), "img_size": (16, 48, 48), "window_size": WINDOW, "embed_dim": 8, "num_heads": (1, 2),
}  # fmt: skip
MODELS = {version: random_swin(version, **SHAPE) for version in (1, 2)}


def bias_of_offsets(attn: Any, offsets: Tensor) -> Tensor:
    """(L, L, 3) distances in time, height and width → (L, L, heads), zeros where they reach beyond a window."""
    window = torch.tensor(attn.window)
    inside = (offsets.abs() < window).all(-1)
    offsets = offsets.where(inside[..., None], 0)
    if attn.position_bias == "table":
        table = attn.relative_position_bias_table.view(*(2 * w - 1 for w in attn.window), -1)
        values = table[tuple((offsets + window - 1).unbind(-1))]
    else:
        scaled = 8 * offsets / (window - 1).clamp(min=1)  # these models were trained with their own windows
        values = 16 * attn.cpb_mlp(scaled.sign() * (scaled.abs() + 1).log2() / 3).sigmoid()
    return values * inside[..., None]


def attend(attn: Any, x: Tensor, together: Tensor, offsets: Tensor) -> Tensor:
    """Attention of (L, D) tokens within ``together`` (L, L)."""
    heads = attn.num_heads
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if attn.cosine:
        bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
    q, k, v = (x @ weight.t() + bias).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
    if attn.cosine:
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        q = q * attn.logit_scale.clamp(max=math.log(100)).exp()
    else:
        q = q / math.sqrt(q.shape[-1])
    scores = q @ k.mT + bias_of_offsets(attn, offsets).permute(2, 0, 1)
    scores = scores.masked_fill(~together, -math.inf)
    return attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def in_one_window(places: Tensor, size: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> Tensor:
    """(L, L): pairs that no border separates. Borders lie at multiples of the window, moved by half of it where shifted; on an
    axis that one window covers there is none."""
    same = torch.ones(len(places), len(places), dtype=torch.bool)
    for axis, (n, w) in enumerate(zip(size, window, strict=True)):
        if n > w:
            cell = (places[:, axis] + (w - w // 2 if shifted else 0)) // w
            same &= cell[:, None] == cell
    return same


def reference(model: SwinTransformer, clip: Tensor) -> list[Tensor]:
    """(C, T, H, W) → the map (*size, D) of each stage."""
    x, maps = model.embed(clip[None])[0], []
    for stage in model.layers:
        size = tuple(x.shape[:-1])
        places = torch.tensor(list(itertools.product(*map(range, size))))
        offsets = places[:, None] - places
        tokens = x.flatten(0, 2)
        for index, block in enumerate(stage.blocks):
            together = in_one_window(places, size, block.attn.window, shifted=index % 2 == 1)
            if model.config.version == 1:
                tokens = tokens + attend(block.attn, block.norm1(tokens), together, offsets)
                tokens = tokens + block.mlp(block.norm2(tokens))
            else:
                tokens = tokens + block.norm1(attend(block.attn, tokens, together, offsets))
                tokens = tokens + block.norm2(block.mlp(tokens))
        x = tokens.unflatten(0, size)
        maps.append(x)
        x = stage.downsample(x[None])[0]
    return maps


def assert_as_reference(model: SwinTransformer, size: tuple[int, ...]) -> None:
    clip = torch.randn(3, *size, generator=torch.Generator().manual_seed(sum(size)))
    with torch.no_grad():
        expected = reference(model, clip)
        last, found = model.forward_intermediates(clip[None])
        for ours, plain in zip(found, expected, strict=True):
            assert ours.shape[2:] == plain.shape[:3]
            assert (ours[0].movedim(0, -1) - plain).norm() <= 1e-5 * plain.norm(), size
        assert (last[0] - model.norm(expected[-1])).norm() <= 1e-5 * last.norm()
        logits = model.head(model.norm(expected[-1]).flatten(0, 2).mean(0))
        assert (model(clip[None])[0] - logits).norm() <= 1e-5 * logits.norm()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("frames", range(1, 18))
def test_every_number_of_frames(version: int, frames: int) -> None:
    """1 to 17 frames of 28×21 pixels: 1 to 9 times in windows of 4, maps of 7×6 and 4×3 tokens in windows of 3."""
    assert_as_reference(MODELS[version], (frames, 28, 21))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "size", [(8, 24, 24), (5, 30, 45), (7, 9, 50), (9, 50, 9), (3, 4, 4), (17, 1, 33), (2, 64, 5), (20, 13, 13)]
)
def test_every_size(version: int, size: tuple[int, int, int]) -> None:
    """Whole windows; padded ones; maps that one axis, or two, or all are smaller than a window on."""
    assert_as_reference(MODELS[version], size)


@settings(max_examples=8, deadline=None)
@given(size=st.tuples(st.integers(1, 19), st.integers(1, 34), st.integers(1, 34)), version=st.sampled_from([1, 2]))
def test_any_size(size: tuple[int, int, int], version: int) -> None:
    assert_as_reference(MODELS[version], size)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("window", [(1, 3, 3), (8, 2, 2), (2, 5, 3), ((4, 3, 3), (3, 2, 4))])
def test_other_windows(version: int, window: Any) -> None:
    """A single time, long and low windows, even and odd sides, and one window for each stage."""
    model = random_swin(version, **{**SHAPE, "window_size": window})
    for size in ((13, 30, 21), (5, 18, 40)):
        assert_as_reference(model, size)


def with_the_first(layout: Layout, size: tuple[int, ...], axis: int) -> set[int]:
    """The positions on an axis that the token in the first corner attends to."""
    window, own = divmod(int(layout.slot[0]), math.prod(layout.window))
    row = layout.source.view(-1, math.prod(layout.window))[window]
    if layout.regions is not None:
        row = row[layout.regions[window] == layout.regions[window][own]]
    return set((row // math.prod(size[axis + 1 :]) % size[axis]).tolist())


def test_window_and_shift_shrink_axis_by_axis() -> None:
    """On the axes that a window covers it becomes the map and is not shifted; on the others it keeps its side and its shift."""
    for size in itertools.product((3, 4, 9), (2, 3, 7), (1, 3, 8)):
        regular, shifted, *_ = stage_layouts(MODELS[1].config, 0, size, torch.device("cpu"))
        assert regular.window == shifted.window == tuple(map(min, WINDOW, size))
        for axis, (n, w) in enumerate(zip(size, WINDOW, strict=True)):
            assert with_the_first(regular, size, axis) == set(range(min(w, n)))
            assert with_the_first(shifted, size, axis) == set(range(n if n <= w else w // 2)), (size, axis)


@pytest.mark.parametrize("version", [1, 2])
def test_maps_keep_their_time(version: int) -> None:
    """R-DOWN-6: strides are (2, 4, 4) and (2, 8, 8); channels first or last, chosen stages, the last one normalised."""
    model, clip = MODELS[version], torch.randn(2, 3, 11, 30, 45)
    with torch.no_grad():
        last, maps = model.forward_intermediates(clip)
        assert [tuple(f.shape) for f in maps] == [(2, 8, 6, 8, 12), (2, 16, 6, 4, 6)] and last.shape == (2, 6, 4, 6, 16)
        (only,) = model.forward_intermediates(clip, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
        assert torch.equal(only, last)
    assert [info["num_chs"] for info in model.feature_info] == [8, 16]
    assert model.config.stage_strides() == [(2, 4, 4), (2, 8, 8)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(1, 20, 20), (5, 30, 45), (16, 48, 48)])
def test_bf16_is_near_fp32(version: int, size: tuple[int, int, int]) -> None:
    """Under autocast, and with weights in bf16, forward and backward."""
    clip = torch.randn(1, 3, *size)
    exact = MODELS[version](clip)
    model = SwinTransformer(MODELS[version].config).eval()
    model.load_state_dict(MODELS[version].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(clip)
    mixed.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    half = model.to(torch.bfloat16)(clip.bfloat16())
    for found in (mixed, half):
        assert ((found.float() - exact).norm() / exact.norm()).item() <= 0.05


def test_a_model_made_for_short_clips_is_not_shifted_along_time_until_they_are_longer() -> None:
    """8 frames are 4 times, one window; 16 frames are two, and only the shift joins them."""
    model = dataclasses.replace(MODELS[1].config, img_size=(8, 48, 48))
    assert model.stage_windows == MODELS[1].config.stage_windows
    whole, shifted, *_ = stage_layouts(model, 0, (4, 3, 3), torch.device("cpu"))
    assert whole is shifted
    whole, shifted, *_ = stage_layouts(model, 0, (8, 3, 3), torch.device("cpu"))
    assert whole is not shifted
