"""Finds the module that first makes a number that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_non_finite(root: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Runs ``forward`` and describes the first module of ``root`` whose output is not finite.

    Args:
        root: the module whose parts are watched.
        forward: repeats the forward pass in question (same batch, same random seed).

    Returns:
        For example ``"first in encoder.layers.2.blocks.3.attn.proj (Linear): 12 of 4096 values, its inputs reach
        6.1e+04 in float16"``, or None when every module's output is finite.
    """
    names = {module: name for name, module in root.named_modules()}
    found: list[str] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if found or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        bad = int((~output.isfinite()).sum())
        if bad:
            given = [i for i in inputs if isinstance(i, Tensor) and i.is_floating_point() and i.numel()]
            reach = max((float(i.abs().max()) for i in given), default=float("nan"))
            found.append(
                f"first in {names[module] or 'the model'} ({type(module).__name__}): {bad} of {output.numel()} values, "
                f"its inputs reach {reach:.3g} in {str(output.dtype).removeprefix('torch.')}"
            )

    handles = [module.register_forward_hook(hook) for module in names]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled modules have no hooks
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
