"""Local relation without copies of the map: equal to plain unfolding, values and gradients, in parts of any size."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.ops import local_relation as module
from swinscale.ops.local_relation import local_relation

SHARED = 4
CASES = [  # height, width, channels, kernel, stride
    (5, 7, 8, 3, 1),
    (6, 9, 10, 7, 2),  # the last group is partial
    (1, 1, 4, 7, 1),
    (1, 1, 3, 3, 2),
    (7, 2, 13, 5, 3),
    (2, 11, 4, 1, 2),
]


def unfolded(x: Tensor, query: Tensor, key: Tensor, prior: Tensor, k: int, similarity: str, stride: int) -> Tensor:
    """The definition: every neighbourhood is copied out."""
    (B, C, H, W), (G, h, w) = x.shape, query.shape[1:]
    channels = torch.cat([x, x.new_zeros(B, G * SHARED - C, H, W)], 1)
    how: dict[str, Any] = {"kernel_size": k, "padding": k // 2, "stride": stride}
    values = F.unfold(channels, **how).view(B, G, SHARED, k * k, h * w)
    keys, queries = F.unfold(key, **how).view(B, G, k * k, h * w), query.flatten(2)[:, :, None]
    inside = F.unfold(torch.ones(1, 1, H, W, dtype=x.dtype), **how).view(1, 1, k * k, h * w) > 0
    logits = {
        "product": queries * keys,
        "squared": -((queries - keys) ** 2),
        "absolute": -(queries - keys).abs(),
    }[similarity]
    weights = (logits + prior[None, :, :, None]).masked_fill(~inside, -math.inf).softmax(2)
    return (values * weights[:, :, None]).sum(3).reshape(B, G * SHARED, h, w)[:, :C]


def make(H: int, W: int, C: int, k: int, stride: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator, G = torch.Generator().manual_seed(H * 100 + W), math.ceil(C / SHARED)
    shapes = ((2, C, H, W), (2, G, math.ceil(H / stride), math.ceil(W / stride)), (2, G, H, W), (G, k * k))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("places", [1 << 14, 5])
@pytest.mark.parametrize("similarity", ["product", "squared", "absolute"])
@pytest.mark.parametrize(("H", "W", "C", "k", "stride"), CASES)
def test_it_is_unfolding(
    H: int, W: int, C: int, k: int, stride: int, similarity: Any, places: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(module.PLACES, "cpu", places)
    inputs = make(H, W, C, k, stride)
    found = local_relation(*inputs, k, SHARED, similarity, stride)  # type: ignore[misc]
    expected = unfolded(*inputs, k, similarity, stride)  # type: ignore[misc]
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-12)
    upstream = torch.randn(found.shape, dtype=found.dtype)
    pairs = zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    assert all(torch.allclose(one, other, atol=1e-11) for one, other in pairs)


@pytest.mark.parametrize("similarity", ["product", "squared", "absolute"])
def test_gradients_are_those_of_differences(similarity: Any):
    inputs = make(4, 3, 6, 3, 2)
    assert torch.autograd.gradcheck(lambda *t: local_relation(*t, 3, SHARED, similarity, 2), inputs)


def test_a_constant_map_stays_constant():
    """Also at the borders: weights add up to one over the neighbours that exist."""
    x, query, key, prior = make(6, 5, 8, 5, 1)
    out = local_relation(torch.full_like(x, 3.0), query, key, prior, 5, SHARED)
    assert torch.allclose(out, torch.full_like(out, 3.0))


def test_memory_that_is_not_contiguous_serves():
    x, *rest = make(6, 5, 8, 3, 1)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    assert torch.equal(local_relation(last, *rest, 3, SHARED), local_relation(x, *rest, 3, SHARED))
    out = local_relation(x, *rest, 3, SHARED)
    spread = torch.randn(out.shape[::-1], dtype=out.dtype).permute(3, 2, 1, 0)
    one = torch.autograd.grad(out, x, spread, retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(out, x, spread.contiguous())[0])


def test_half_precision_is_summed_in_single():
    exact = make(9, 8, 16, 7, 1, torch.float32)
    half = [t.detach().bfloat16().requires_grad_() for t in exact]
    expected = local_relation(*(t.detach().float() for t in half), 7, SHARED)  # type: ignore[misc]
    found = local_relation(*half, 7, SHARED)  # type: ignore[misc]
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
    found.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 and t.grad.isfinite().all() for t in half)


def test_a_compiled_function_gives_the_same():
    """To the compiler the loop is one operation in each direction."""
    inputs = make(6, 9, 10, 3, 2)

    def around(*t: Tensor) -> Tensor:
        return local_relation(*(v * 2 for v in t), 3, SHARED, "product", 2) + 1  # type: ignore[misc]

    outs = [f(*inputs) for f in (around, torch.compile(around, backend="aot_eager", fullgraph=True))]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    assert torch.equal(*outs) and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_meta_tensors_have_the_shape():
    inputs = [t.detach().to("meta") for t in make(6, 9, 10, 7, 2)]
    assert local_relation(*inputs, 7, SHARED, "product", 2).shape == (2, 10, 3, 5)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("index", "shape", "kernel"),
    [(1, (2, 3, 5, 7), 3), (2, (2, 2, 5, 6), 3), (3, (2, 8), 3), (3, (2, 4), 2)],
)
def test_shapes_that_do_not_fit_are_named(index: int, shape: tuple[int, ...], kernel: int):
    inputs: Any = make(5, 7, 8, 3, 1)
    inputs[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(UsageError, match="belong to"):
        local_relation(*inputs, kernel, SHARED)


MEMORY = """
import resource, torch
from swinscale.ops.local_relation import local_relation
torch.set_num_threads(1)
x, q, k = (torch.randn(4, c, 64, 64, requires_grad=True) for c in (64, 8, 8))
prior = torch.randn(8, 49, requires_grad=True)
local_relation(x[:1, :, :8, :8], q[:1, :, :8, :8], k[:1, :, :8, :8], prior, 7, 8).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
local_relation(x, q, k, prior, 7, 8).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (x.numel() * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_training_needs_a_few_maps_and_not_one_per_offset():
    """Unfolding needs 49 copies for the forward pass alone."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 12
