"""Window attention: the reference against plain loops, every other back end against the reference."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swinscale.errors import UsageError
from swinscale.models.windows import position_code, relative_position_index, window_layout
from swinscale.ops import BACKENDS, Backend, PositionBias, choose_backend, window_attention

CPU = torch.device("cpu")
SHAPES = [
    (1, 1, (1,), 1, 4),
    (2, 3, (2, 2), 2, 8),
    (1, 6, (3, 3), 3, 16),
    (3, 4, (7, 7), 2, 32),
    (2, 3, (2, 3, 2), 2, 24),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def inputs(shape, dtype=torch.float32, regions=True, device="cpu"):
    """qkv, bias values, their code, regions and a scale per head, all random."""
    B, W, window, A, d = shape
    N = math.prod(window)
    generator = torch.Generator().manual_seed(B + W + N + A + d)
    qkv = torch.randn(B, W, N, 3, A, d, generator=generator).to(device, dtype).requires_grad_()
    values = torch.randn(A, math.prod(2 * w - 1 for w in window), generator=generator).to(device).requires_grad_()
    scale = (torch.rand(A, generator=generator) * 5 + 1).to(device).requires_grad_()
    where = torch.randint(0, 3, (W, N), generator=generator).to(device) if regions else None
    return qkv, values, position_code(window, window, torch.device(device)), where, scale


def by_loops(qkv, bias, regions, scale, cosine):
    q, k, v = qkv.unbind(3)
    B, W, N, A, d = q.shape
    out = torch.zeros(B, W, N, A, d, dtype=q.dtype)
    for b, w, a, i in itertools.product(range(B), range(W), range(A), range(N)):
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
@pytest.mark.parametrize("shape", [*SHAPES[:3], SHAPES[4]])
def test_reference_is_the_formula(shape, regions, cosine):
    qkv, values, code, where, scale = inputs(shape, regions=regions)
    window = shape[2]
    with torch.no_grad():
        bias = PositionBias(values, code)
        pairs = values[:, relative_position_index(window, window, CPU)].view(values.shape[0], *[math.prod(window)] * 2)
        assert torch.equal(bias.rows(), pairs)
        found = window_attention(qkv.flatten(3), bias, where, scale, cosine, backend="eager")
        assert torch.allclose(found, by_loops(qkv, pairs, where, scale, cosine), atol=1e-5)
        plain = window_attention(qkv.flatten(3), bias, where, 0.3, False, backend="eager")
        assert torch.allclose(plain, by_loops(qkv, pairs, where, 0.3, False), atol=1e-5)


def outputs_and_gradients(backend, shape, regions, cosine, dtype=torch.float32, learned_bias=True, device="cpu"):
    """The output, and the gradients of qkv, the bias values and the scale."""
    qkv, values, code, where, scale = inputs(shape, dtype, regions, device)
    with torch.no_grad():  # logits of the size they have in models: rounding grows with them in any back end
        scale *= 1 if cosine else 0.1
    values.requires_grad_(learned_bias)  # PyTorch picks another kernel on the CPU when the mask needs no gradient
    out = window_attention(qkv.flatten(3), PositionBias(values, code), where, scale, cosine, backend=backend)
    (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
    return [out.detach().float(), *(t.grad.float() for t in (qkv, values, scale) if t.grad is not None)]


OTHERS = [*(n for n in BACKENDS if n != "eager"), "sequential:1", "sequential:5", "sequential:1000"]


def skip_unless_it_runs(backend, device, dtype=torch.float32):
    if reason := BACKENDS[backend.partition(":")[0]].why_not(device, dtype, 49, 32, 0.0):
        pytest.skip(reason)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("learned_bias", [True, False])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_back_ends_equal_the_reference(shape, regions, cosine, learned_bias, backend, device):
    """R-SPD-1: outputs and gradients in fp32, ≤ 3e-6 of the largest value; 1e-5 for the scale's, a sum over everything."""
    skip_unless_it_runs(backend, device)
    arguments = (shape, regions, cosine, torch.float32, learned_bias, device)
    results = [outputs_and_gradients(n, *arguments) for n in ("eager", backend)]
    assert len(results[0]) == (4 if learned_bias else 3)
    for name, a, b in zip(("output", "qkv", *(["bias"] if learned_bias else []), "scale"), *results, strict=True):
        tolerance = 3e-6 if device == "cpu" and name != "scale" else 1e-5
        assert (a - b).abs().max() <= tolerance * max(1.0, a.abs().max().item()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_back_ends_equal_the_reference_in_inference(shape, regions, backend, device):
    """R-SPD-1. Some back ends take another way without gradients, or run only so."""
    qkv, values, code, where, scale = inputs(shape, regions=regions, device=device)
    with torch.no_grad():
        skip_unless_it_runs(backend, device)
        for cosine in (False, True):
            bias = PositionBias(values, code)
            expected, found = (
                window_attention(qkv.flatten(3), bias, where, scale, cosine, backend=n) for n in ("eager", backend)
            )
            assert (expected - found).abs().max() <= 3e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("learned_bias", [True, False])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.015)])
def test_gradients_in_low_precision(dtype, tolerance, cosine, learned_bias, backend, device):
    """Outputs and gradients, loosely: rounding differs between kernels."""
    skip_unless_it_runs(backend, device, dtype)
    results = [
        outputs_and_gradients(n, SHAPES[3], True, cosine, dtype, learned_bias, device) for n in ("eager", backend)
    ]
    for a, b in zip(*results, strict=True):
        assert b.isfinite().all()
        assert ((a - b).norm() / a.norm()).item() < tolerance


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 1e-2), (torch.float64, 1e-6)])
@pytest.mark.parametrize("size", [1.0, 400.0])
def test_other_precisions(size, dtype, tolerance, backend):
    """R-NUM-2. Cosine attention does not depend on the length of its vectors, though 400² overflows in fp16."""
    qkv, values, code, where, scale = inputs((2, 3, (4, 4), 2, 8))
    bias = PositionBias(values, code)
    with torch.no_grad():
        skip_unless_it_runs(backend, "cpu", dtype)
        qkv[:, :, :, :2] *= size
        exact = window_attention(qkv.flatten(3), bias, where, scale, True, backend="eager")
        found = window_attention(qkv.to(dtype).flatten(3), bias, where, scale, True, backend=backend)
    assert found.dtype == dtype
    assert ((found.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("regions", [False, True])
def test_dropout_keeps_the_mean_or_is_refused(regions, backend):
    qkv, values, code, where, _ = inputs((64, 4, (3, 3), 2, 8), regions=regions)
    with torch.no_grad():
        qkv[:, :, :, 2] = 1
        arguments = (qkv.flatten(3), PositionBias(values, code), where, 1.0, False, 0.5)
        if BACKENDS[backend].why_not("cpu", torch.float32, 9, 8, 0.5):
            with pytest.raises(UsageError, match=f"'{backend}' cannot run here"):
                window_attention(*arguments, backend)
            return
        out = window_attention(*arguments, backend)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert out.std().item() > 0.1


def test_names_never_fall_back(monkeypatch):
    with pytest.raises(UsageError, match=r"'flsh'.*auto, .*sdpa, .*eager"):
        choose_backend("flsh")
    for name in ("sequential:0", "sequential:x", "sdpa:2"):
        with pytest.raises(UsageError, match=f"'{name}'.*sequential:8"):
            choose_backend(name)
    monkeypatch.setitem(BACKENDS, "broken", Backend(BACKENDS["eager"].run, lambda *_: "it needs another card"))
    qkv, values, code, where, scale = inputs(SHAPES[0])
    with pytest.raises(UsageError, match=r"'broken' cannot run here: it needs another card"):
        window_attention(qkv.flatten(3), PositionBias(values, code), where, scale, True, backend="broken")
    assert choose_backend("auto") == "sdpa"
    assert choose_backend("eager") == "eager"
    assert choose_backend("sequential:3") == "sequential:3"


MODEL_IN_THE_INTERPRETER = """
import sys; sys.path.insert(0, "tests")
import torch
from random_models import random_swin
from swinscale.ops import choose_backend
assert choose_backend("auto") == "triton"
for version in (1, 2):
    model = random_swin(version, depths=(2,), num_heads=(2,), drop_path_rate=0.0)
    x, results = torch.randn(1, 3, 30, 34), []
    for name in ("eager", "triton"):
        model.zero_grad()
        model.set_attention_backend(name)
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7, (a.shape, (a - b).norm(), a.norm())
print("equal")
"""


def test_a_model_with_the_fused_kernels():
    """Shifted and padded windows, all parameters' gradients; in Triton's interpreter, where "auto" takes the kernels."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", MODEL_IN_THE_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def saved_bytes(backend, regions):
    """Bytes that autograd keeps between forward and backward."""
    qkv, values, code, where, scale = inputs((2, 4, (8, 8), 4, 16), regions=regions)
    held = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        window_attention(qkv.flatten(3), PositionBias(values, code), where, scale, True, backend=backend)
    return sum(held.values())


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("regions", [False, True])
def test_parts_save_memory_forward_and_backward(regions):
    """R-SPD-5: the largest tensor shrinks with the number of parts, and the logits are not kept for the backward pass."""
    largest = []
    for parts in (1, 2, 8, 32, 128):
        qkv, values, code, where, scale = inputs((2, 4, (8, 8), 4, 16), regions=regions)
        with LargestTensor() as seen:
            out = window_attention(
                qkv.flatten(3), PositionBias(values, code), where, scale, True, backend=f"sequential:{parts}"
            )
            out.sum().backward()
        largest.append(seen.size)
    logits = 2 * 4 * 4 * 64 * 64
    assert largest[0] == logits
    assert all(a >= b for a, b in itertools.pairwise(largest))
    assert largest[-1] <= qkv.numel()
    assert saved_bytes("sequential:8", regions) <= saved_bytes("eager", regions) - logits * 4


def test_a_dense_bias_is_made_once_unless_it_learns():
    """R-SPD-2."""
    _, values, code, where, _ = inputs(SHAPES[3])
    learning, kept = PositionBias(values, code), PositionBias(values.detach(), code)
    assert learning.dense() is not learning.dense()
    assert kept.dense() is kept.dense()
    assert kept.dense(torch.float32, where) is kept.dense(torch.float32, where)
    assert kept.dense(torch.float32, where) is not kept.dense(torch.float32, where.clone())
    assert torch.equal(
        kept.dense(torch.float32, where) > -torch.inf,
        (where[:, None] == where[..., None])[:, None].expand(-1, 2, -1, -1),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_does_not_fall_to_the_math_kernel(dtype):
    """R-SPD-1: PyTorch's fused kernels accept what we give them, at the shapes of published models."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for window, heads in ((7, 3), (8, 6), (16, 4), (24, 4)):
        qkv, values, code, where, scale = inputs((2, 4, (window, window), heads, 32), dtype, True, "cuda")
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            window_attention(
                qkv.flatten(3), PositionBias(values, code), where, scale, True, backend="sdpa"
            ).sum().backward()


def test_layouts_put_windows_with_masks_last():
    layout = window_layout((16, 16), (4, 4), (2, 2), True, CPU)
    several = (layout.regions != layout.regions[:, :1]).any(1)
    assert several.tolist() == [False] * 9 + [True] * 7
