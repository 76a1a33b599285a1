"""Window attention: the reference against plain loops, every other back end against the reference."""

from __future__ import annotations

import pytest
import torch

from swinscale.errors import UsageError
from swinscale.ops import BACKENDS, Backend, choose_backend, window_attention

SHAPES = [(1, 1, 1, 1, 4), (2, 3, 4, 2, 8), (1, 6, 9, 3, 16), (3, 4, 49, 2, 32)]


def inputs(shape, dtype=torch.float32, regions=True):
    B, W, N, A, d = shape
    torch.manual_seed(sum(shape))
    q, k, v = (torch.randn(B, W, N, 3, A, d, dtype=dtype).unbind(3)[i].detach().requires_grad_() for i in range(3))
    bias = torch.randn(A, N, N, dtype=dtype, requires_grad=True)
    scale = (torch.rand(A) * 5 + 1).requires_grad_()
    where = torch.randint(0, 3, (W, N)) if regions else None
    return q, k, v, bias, where, scale


def by_loops(q, k, v, bias, regions, scale, cosine):
    B, W, N, A, d = q.shape
    out = torch.zeros(B, W, N, A, d, dtype=q.dtype)
    for b in range(B):
        for w in range(W):
            for a in range(A):
                for i in range(N):
                    logits = []
                    for j in range(N):
                        s = (q[b, w, i, a] * k[b, w, j, a]).sum()
                        if cosine:
                            s = s / q[b, w, i, a].norm() / k[b, w, j, a].norm()
                        s = s * (scale if isinstance(scale, float) else scale[a]) + bias[a, i, j]
                        if regions is not None and regions[w, i] != regions[w, j]:
                            s = torch.tensor(float("-inf"))
                        logits.append(s)
                    p = torch.stack(logits).softmax(0)
                    out[b, w, i, a] = sum(p[j] * v[b, w, j, a] for j in range(N))
    return out.flatten(-2)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_reference_is_the_formula(shape, regions, cosine):
    q, k, v, bias, where, scale = inputs(shape, regions=regions)
    with torch.no_grad():
        found = window_attention(q, k, v, bias, where, scale, cosine, backend="eager")
        assert torch.allclose(found, by_loops(q, k, v, bias, where, scale, cosine), atol=1e-5)
        plain = window_attention(q, k, v, bias, where, 0.3, False, backend="eager")
        assert torch.allclose(plain, by_loops(q, k, v, bias, where, 0.3, False), atol=1e-5)


def outputs_and_gradients(backend, shape, regions, cosine, learned_bias, dtype=torch.float32):
    """The output, and the gradients of q, k, v, bias and scale."""
    q, k, v, bias, where, scale = inputs(shape, dtype, regions)
    with torch.no_grad():
        scale *= (
            1 if cosine else 0.1
        )  # logits of the size they have in models: rounding grows with them in any back end
    bias.requires_grad_(learned_bias)  # PyTorch picks another kernel on the CPU when the mask needs no gradient
    out = window_attention(q, k, v, bias, where, scale, cosine, backend=backend)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach().float(), *(t.grad.float() for t in (q, k, v, bias, scale) if t.grad is not None)]


OTHERS = [n for n in BACKENDS if n != "eager"]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("learned_bias", [True, False])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_back_ends_equal_the_reference(shape, regions, cosine, learned_bias, backend):
    """R-SPD-1: outputs and gradients in fp32, ≤ 3e-6 of the largest value."""
    results = [outputs_and_gradients(n, shape, regions, cosine, learned_bias) for n in ("eager", backend)]
    assert len(results[0]) == (6 if learned_bias else 5)
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 3e-6 * max(1.0, a.abs().max().item())


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("learned_bias", [True, False])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.015)])
def test_gradients_in_low_precision(dtype, tolerance, cosine, learned_bias, backend):
    """Outputs and gradients, loosely: rounding differs between kernels."""
    exact = outputs_and_gradients("eager", (3, 4, 49, 2, 32), True, cosine, learned_bias, dtype)
    found = outputs_and_gradients(backend, (3, 4, 49, 2, 32), True, cosine, learned_bias, dtype)
    for a, b in zip(exact, found, strict=True):
        assert b.isfinite().all()
        assert ((a - b).norm() / a.norm()).item() < tolerance


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 1e-2), (torch.float64, 1e-6)])
@pytest.mark.parametrize("size", [1.0, 400.0])
def test_other_precisions(size, dtype, tolerance, backend):
    """R-NUM-2. Cosine attention does not depend on the length of its vectors, though 400² overflows in fp16."""
    q, k, v, bias, where, scale = inputs((2, 3, 16, 2, 8))
    with torch.no_grad():
        q, k = q * size, k * size
        exact = window_attention(q, k, v, bias, where, scale, True, backend="eager")
        given = [t.to(dtype) for t in (q, k, v)]
        found = window_attention(*given, bias, where, scale, True, backend=backend)
    assert found.dtype == dtype
    assert ((found.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("regions", [False, True])
def test_dropout_keeps_the_mean(regions, backend):
    q, k, v, bias, where, _ = inputs((64, 4, 9, 2, 8), regions=regions)
    with torch.no_grad():
        v = torch.ones_like(v)
        out = window_attention(q, k, v, bias, where, 1.0, False, 0.5, backend)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert out.std().item() > 0.1


def test_names_never_fall_back(monkeypatch):
    with pytest.raises(UsageError, match=r"'flsh'.*auto, sdpa, eager"):
        choose_backend("flsh")
    monkeypatch.setitem(BACKENDS, "broken", Backend(BACKENDS["eager"].run, lambda: "it needs another card"))
    with pytest.raises(UsageError, match=r"'broken' cannot run here: it needs another card"):
        window_attention(*inputs(SHAPES[0]), True, backend="broken")
    assert choose_backend("auto") == "sdpa"
    assert choose_backend("eager") == "eager"
