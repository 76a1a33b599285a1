"""The module that first makes a number that is not finite is named, with what went in."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from swinscale.diagnose.nonfinite import first_non_finite


def three_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), nn.Identity())


def test_finite_modules_are_not_accused():
    model = three_layers()
    assert first_non_finite(model, lambda: model(torch.randn(3, 4))) is None


def test_the_innermost_first_module_is_named_with_its_inputs():
    """Later modules and the containers around the culprit are not finite either; the first one counts."""
    model = three_layers()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(7.0)
        model[1][1].weight[0].fill_(float("inf"))
    found = first_non_finite(model, lambda: model(torch.randn(3, 4)))
    assert found is not None
    assert found.startswith("first in 1.1 (Linear): 3 of 6 values")
    assert "its inputs reach 7 in float32" in found


def test_overflow_in_half_precision_names_the_dtype():
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    found = first_non_finite(model, lambda: model(torch.full((1, 1), 256.0, dtype=torch.bfloat16)))
    assert found is not None
    assert "first in 1 (Linear): 1 of 1 values, its inputs reach 256 in bfloat16" in found


def test_the_root_has_no_name_and_integer_outputs_are_passed_over():
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.long()

    root, counts = Root(), Counts()
    assert (first_non_finite(root, lambda: root(torch.ones(2))) or "").startswith("first in the model (Root): 2 of 2")
    assert first_non_finite(counts, lambda: counts(torch.full((2,), float("inf")))) is None


def test_hooks_and_gradients_are_left_as_they_were():
    """The search may happen in the middle of a run."""
    model = three_layers()

    def fail() -> None:
        raise RuntimeError("a forward pass may fail")

    with contextlib.suppress(RuntimeError):
        first_non_finite(model, fail)
    assert not any(module._forward_hooks for module in model.modules())
    first_non_finite(model, lambda: model(torch.randn(1, 4)))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
