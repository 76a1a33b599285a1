"""What a Swin looks at: attention maps and rollout against a dense reference, distances, feature maps by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.random_models import VARIETY, model_and_input, random_swin
from torch import Tensor

from swinscale.diagnose.explain import (
    attention,
    attention_distance,
    intermediate_names,
    intermediates,
    rollout,
)
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer


def dense_attention(model: SwinTransformer, x: Tensor, stage: int, block: int) -> Tensor:
    """(B, A, L, L) between tokens in raster order by the definition, from coordinates instead of layouts."""
    config = model.config
    size = config.stage_maps(tuple(x.shape[2:]))[stage]
    window = config.stage_windows[stage]
    shift = [w // 2 for w in window]
    if config.small_map == "shrink":
        shift = [s if n > w else 0 for s, n, w in zip(shift, size, window, strict=True)]
        window = tuple(map(min, window, size))
    axes = torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], -1)
    apart = torch.zeros(len(places), len(places), dtype=torch.bool)
    for axis, (w, s) in enumerate(zip(window, shift, strict=True)):
        cut = (places[:, axis] + (w - s if block % 2 and s else 0)) // w  # shifted windows begin s tokens earlier
        apart |= cut[:, None] != cut
    attn = model.layers[stage].blocks[block].attn
    names = (f"layers.{stage}.blocks.{block - 1}", "embed") if block else (f"layers.{stage - 1}", "embed")
    points = intermediates(model, x, names if stage or block else ["embed"], "NHWC")
    tokens = points["embed"] if not stage and not block else points[names[0]]
    if stage and not block:
        tokens = model.layers[stage - 1].downsample(tokens)
    tokens = tokens.flatten(1, -2)
    if config.norm_placement in ("pre", "sandwich"):
        tokens = model.layers[stage].blocks[block].norm1(tokens)
    bias = attn.qkv.bias if not attn.cosine else torch.cat((attn.q_bias, 0 * attn.q_bias, attn.v_bias))
    q, k, _ = (tokens @ attn.qkv.weight.t() + bias).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    if attn.cosine:
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        scale = attn.logit_scale.clamp(max=np.log(100)).exp()
    else:
        scale = q.shape[-1] ** -0.5
    table = attn.bias(window).values  # over query minus key, the last axis fastest
    trained = attn.window if attn.position_bias == "table" else window
    offset = (places[:, None] - places + torch.tensor([t - 1 for t in trained])).clamp(min=0)
    index = torch.zeros(apart.shape, dtype=torch.int64)
    for axis, t in enumerate(trained):
        index = index * (2 * t - 1) + offset[..., axis].clamp(max=2 * t - 2)
    logits = torch.einsum("bnad,bmad->banm", q, k) * scale + table[:, index]
    return logits.masked_fill(apart, -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", VARIETY)
@torch.no_grad()
def test_attention_is_the_row_of_the_softmax(name: str):
    """For regular and shifted windows, padded, on maps smaller than a window; in raster order, and 0 where nothing is seen."""
    model, x = model_and_input(name)
    for stage in range(2):
        for block in range(2):
            expected = dense_attention(model, x, stage, block)
            sizes = model.config.stage_maps(tuple(x.shape[2:]))[stage]
            strides = model.config.stage_strides()[stage]
            for token in (0, expected.shape[-1] // 2 + 1, expected.shape[-1] - 1):
                place = np.unravel_index(token, sizes)
                query = [int(p * s) for p, s in zip(place, strides, strict=True)]
                found = attention(model, x, stage, block, query)
                assert found.shape[2:] == sizes
                torch.testing.assert_close(found.flatten(2), expected[:, :, token], rtol=1e-4, atol=1e-6)
                assert (found.flatten(2)[expected[:, :, token] == 0] == 0).all()
                torch.testing.assert_close(found.flatten(2).sum(-1), torch.ones(found.shape[:2]))


def test_every_pixel_of_a_token_has_its_attention_and_no_other():
    model, x = model_and_input("V2")
    found = [attention(model, x, 0, 1, query) for query in ((8, 4), (11, 7), (12, 7))]
    assert found[0].equal(found[1])
    assert not found[1].equal(found[2])


def test_legacy_padding_takes_attention_from_the_map():
    model = random_swin(version=1, pad="legacy")
    x = torch.randn(1, 3, 20, 20)  # 5×5 tokens: the last window has one real column
    within, beside = (attention(model, x, 0, 0, query).sum((2, 3)) for query in ((0, 0), (19, 19)))
    torch.testing.assert_close(within, torch.ones(1, 2))
    assert (beside < 0.9).all()


@pytest.mark.parametrize("name", VARIETY)
@torch.no_grad()
def test_rollout_is_the_product_of_the_matrices(name: str):
    """And so it conserves what it hands on."""
    model, x = model_and_input(name)
    maps = model.config.stage_maps(tuple(x.shape[2:]))
    last = torch.eye(maps[-1][0] * maps[-1][1] * (maps[-1][2] if len(maps[-1]) > 2 else 1)).expand(2, -1, -1)
    for stage in (1, 0):
        for block in (1, 0):
            mean = dense_attention(model, x, stage, block).mean(1)
            last = last @ (0.5 * mean + 0.5 * torch.eye(mean.shape[-1]))
        if stage:
            places = torch.stack(torch.meshgrid(*[torch.arange(n) for n in maps[0]], indexing="ij"), -1).flatten(0, -2)
            places[:, -2:] //= 2
            parent = torch.from_numpy(np.ravel_multi_index(tuple(places.t().numpy()), maps[1]))
            merged = torch.nn.functional.one_hot(parent, last.shape[-1]).t().float()
            last = last @ (merged / merged.sum(1, keepdim=True))
    torch.testing.assert_close(rollout(model, x).flatten(1), last.mean(1), rtol=1e-4, atol=1e-6)
    corner = [s - 1 for s in x.shape[2:]]
    torch.testing.assert_close(rollout(model, x, corner).flatten(1), last[:, -1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rollout(model, x).flatten(1).sum(1), torch.ones(2))


def test_large_attention_is_taken_in_portions(monkeypatch: pytest.MonkeyPatch):
    model, x = model_and_input("V2")
    whole, distances = rollout(model, x), attention_distance(model, x)
    monkeypatch.setattr("swinscale.diagnose.explain_attention.ENTRIES", 1500)
    torch.testing.assert_close(rollout(model, x), whole)
    for name, values in attention_distance(model, x).items():
        torch.testing.assert_close(values, distances[name])


@pytest.mark.parametrize("name", ["V1", "V2", "padded to small maps"])
@torch.no_grad()
def test_attention_distance_is_in_pixels(name: str):
    model, x = model_and_input(name)
    found = attention_distance(model, x)
    assert list(found) == [f"layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
    for stage, size in enumerate(model.config.stage_maps((37, 22))):
        places = torch.stack(torch.meshgrid(*[torch.arange(n) * 4.0 * 2**stage for n in size], indexing="ij"), -1)
        distances = torch.cdist(places.flatten(0, -2), places.flatten(0, -2))
        for block in range(2):
            expected = (dense_attention(model, x, stage, block) * distances).sum(-1).mean((0, 2))
            torch.testing.assert_close(found[f"layers.{stage}.blocks.{block}"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIETY)
@torch.no_grad()
def test_intermediates_are_those_of_the_forward_pass(name: str):
    model, x = model_and_input(name)
    names = intermediate_names(model)
    assert [n for n in names if "norm" not in n] == [
        "embed", "layers.0.blocks.0", "layers.0.blocks.1", "layers.0", "layers.1.blocks.0", "layers.1.blocks.1",
        "layers.1", "pre_pool",
    ]  # fmt: skip
    found = intermediates(model, x, names)
    last, stages = model.forward_intermediates(x)
    for stage in range(2):
        torch.testing.assert_close(found[f"layers.{stage}"], stages[stage])
        torch.testing.assert_close(found[f"layers.{stage}.blocks.1"], stages[stage])
    torch.testing.assert_close(found["pre_pool"].movedim(1, -1), last)
    channels_last = intermediates(model, x, names, "NHWC")
    torch.testing.assert_close(channels_last["embed"], model.embed(x))
    for point, value in found.items():
        assert channels_last[point].equal(value.movedim(1, -1))
    if model.config.norm_placement == "pre":
        # What the second block adds to the first one's output, without its attention: the MLP of norm2.
        block = model.layers[0].blocks[1]
        added = block.mlp(channels_last["layers.0.blocks.1.norm2"])
        without = channels_last["layers.0.blocks.1"] - added
        torch.testing.assert_close(block.norm2(without), channels_last["layers.0.blocks.1.norm2"], rtol=1e-4, atol=1e-4)


def test_intermediates_carry_gradients_and_leave_no_hook():
    model, x = model_and_input("V1")
    intermediates(model, x, "layers.0.blocks.1")["layers.0.blocks.1"].sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(UsageError, match=r"'layers\.0\.block\.1'.*Did you mean"):
        intermediates(model, x, ["layers.0.block.1"])
    with pytest.raises(UsageError, match="NCHW"):
        intermediates(model, x, ["embed"], "NLC")
