"""Finite outputs and gradients in every precision (R-NUM-1 to R-NUM-3)."""

from __future__ import annotations

import contextlib

import pytest
import torch

from random_models import random_swin
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.swin import MAX_LOGIT_SCALE
from swinscale.models.windows import stage_layouts

PRECISIONS = ["fp32", "bf16", "fp16", "autocast-bf16", "autocast-fp16"]
SIZES = {"unpadded": (32, 32), "padded": (27, 45), "one token": (4, 4)}
IMAGES = {
    "random": lambda *s: torch.randn(*s),
    "zero": lambda *s: torch.zeros(*s),
    "constant": lambda *s: torch.full(s, 0.7),
    "huge": lambda *s: 1e4 * torch.randn(*s),
}


@pytest.mark.parametrize("pad", ["exact", "legacy"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", [1, 2])
def test_outputs_and_gradients_are_finite(version, precision, size, pad):
    """R-NUM-1. Peers give NaN for V2 in fp16 with padding: a zero key over its norm is 0 / 0 there."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    cast = {"autocast-bf16": torch.bfloat16, "autocast-fp16": torch.float16}.get(precision)
    small = "pad" if pad == "legacy" else "shrink"
    model = random_swin(version, window_size=4, pad=pad, small_map=small, drop_path_rate=0.0).train().to(dtype)
    for name, image in IMAGES.items():
        x = image(2, 3, *SIZES[size]).to(dtype).requires_grad_()
        with torch.autocast("cpu", cast) if cast else contextlib.nullcontext():
            y = model(x)
        assert y.isfinite().all(), name
        model.zero_grad()
        y.float().mean().backward()
        assert x.grad.isfinite().all(), name
        for parameter_name, p in model.named_parameters():
            assert p.grad.isfinite().all(), (name, parameter_name)


@pytest.mark.parametrize("version", [1, 2])
def test_low_precision_stays_near(version):
    model = random_swin(version)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x).float()
    assert ((rough - exact).norm() / exact.norm()).item() < 0.05


@pytest.mark.parametrize("dim", [24, 96, 384])
@pytest.mark.parametrize("pad", ["exact", "legacy"])
def test_gradient_through_a_zero_token_is_bounded(pad, dim):
    """R-NUM-3: ≤ 1e3 for a gradient of norm 1 from above, at the highest temperature; with the published epsilon it is 1e10."""
    config = SwinConfig(embed_dim=dim, depths=(2,), num_heads=(dim // 24,), window_size=4, img_size=64, pad=pad)
    attn = SwinTransformer(config).layers[0].blocks[0].attn
    torch.nn.init.constant_(attn.logit_scale, MAX_LOGIT_SCALE)
    _, layout, *_ = stage_layouts(config, 0, (6, 6), torch.device("cpu"))
    x = torch.randn(1, 36, dim)
    x[:, 5] = 0
    x.requires_grad_()
    inside = x.index_select(1, layout.source).unflatten(1, (-1, 16))
    if layout.zero is not None:
        inside = inside.masked_fill(layout.zero, 0)
    out = attn(inside, layout).flatten(1, 2).index_select(1, layout.slot)
    out.backward(torch.nn.functional.normalize(torch.randn_like(out), dim=(1, 2)))
    assert x.grad.isfinite().all()
    assert 0 < x.grad[0, 5].norm() <= 1e3


def test_position_bias_is_computed_in_full_precision_under_autocast():
    """R-NUM-2."""
    attn = random_swin().layers[0].blocks[0].attn
    plain = attn.train().bias((4, 4)).rows()
    with torch.autocast("cpu", torch.bfloat16):
        again = attn.bias((4, 4)).rows()
    assert again.dtype == torch.float32
    assert torch.equal(plain, again)


def test_logit_scale_is_clamped_without_leaving_the_device():
    """R-NUM-2: the temperature stays above 0.01, and nothing is read back to the host (meta has no values to read)."""
    model = random_swin()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model.layers[0].blocks[0].attn.logit_scale.fill_(50.0)
        a = model(x)
        model.layers[0].blocks[0].attn.logit_scale.fill_(torch.log(torch.tensor(100.0)).item())
        assert torch.allclose(model(x), a, atol=1e-5)
    model.to("meta")(x.to("meta"))
