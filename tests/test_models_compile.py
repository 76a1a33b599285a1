"""torch.compile: one graph for every variant, few graphs for many sizes."""

from __future__ import annotations

import pytest
import torch

from random_models import random_swin

VARIANTS = {
    "v1": (1, {}),
    "v2": (2, {}),
    "v1 with absolute positions": (1, {"ape": True}),
    "v1 without biases": (1, {"qkv_bias": False, "patch_norm": False}),
    "v2 without biases": (2, {"qkv_bias": False}),
    "v2 with a table": (2, {"position_bias": "table"}),
    "v1 with the linear continuous bias": (1, {"position_bias": "linear"}),
    "v2 with the printed formula": (2, {"position_bias": "paper"}),
    "v2 with main norms": (2, {"main_norm_interval": 1}),
    "v2 with drop": (2, {"drop_rate": 0.1, "attn_drop_rate": 0.1}),
    "dense": (1, {"pad": "legacy", "small_map": "pad"}),
    "dense v2": (2, {"pad": "legacy", "small_map": "pad-noshift"}),
    "video v1": (1, {"patch_size": (2, 4, 4), "img_size": (8, 32, 32), "window_size": (2, 4, 4)}),
    "video v2": (2, {"patch_size": (2, 4, 4), "img_size": (8, 32, 32), "window_size": (2, 4, 4)}),
}


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_one_graph(variant, training):
    """R-SPD-4: fullgraph, outputs and gradients as without the compiler; stochastic parts apart.

    Only the tracing is at stake here; generated code is tested below.
    """
    version, fields = VARIANTS[variant]
    model = random_swin(version, drop_path_rate=0.0, **fields).train(training)
    x = torch.randn(2, 3, *((5, 37, 45) if "video" in variant else (37, 45)))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if not training:
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
        return
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    if "drop" not in variant:
        for a, b in zip(*gradients, strict=True):
            assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pad", "small_map", "dynamic"),
    [("exact", "shrink", None), ("exact", "shrink", True), ("legacy", "pad", None)],
)
def test_twenty_sizes_make_at_most_two_more_graphs(pad, small_map, dynamic):
    """R-SPD-4. Odd sizes, maps smaller than a window and sizes that need no padding share a graph.

    A fourth graph is an error here: that is what ``recompile_limit`` does together with ``fullgraph``.
    """
    model = random_swin(2, pad=pad, small_map=small_map)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    generator = torch.Generator().manual_seed(0)
    sizes = [(32, 32), (64, 64), (33, 47), (12, 100), *torch.randint(9, 130, (16, 2), generator=generator).tolist()]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
        for size in sizes:
            x = torch.randn(2, 3, *size)
            expected = model(x)
            assert (compiled(x) - expected).norm() <= 1e-5 * expected.norm(), size


def test_the_limit_of_graphs_is_enforced():
    """What the test above relies on: with a limit of one, a second size of a static model is an error."""
    compiled = torch.compile(random_swin(2), fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        compiled(torch.randn(1, 3, 32, 32))
        with pytest.raises(Exception, match="Hard failure due to fullgraph"):
            compiled(torch.randn(1, 3, 64, 64))


def test_autocast_does_not_recompile():
    """R-SPD-4 (pytorch/pytorch#128134): the second call under autocast uses the graph of the first."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = random_swin(2, drop_path_rate=0.0).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            compiled(torch.randn(2, 3, 32, 32)).float().sum().backward()
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_inductor_computes_the_same(version):
    """The default compiler, forward and backward."""
    model = random_swin(version, drop_path_rate=0.0)
    x = torch.randn(2, 3, 40, 56)
    compiled = torch.compile(model, fullgraph=True)
    expected = model(x)
    found = compiled(x)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    found.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.square().sum().backward()
    for a, p in zip(gradients, model.parameters(), strict=True):
        assert (a - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6
