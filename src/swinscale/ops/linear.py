"""A linear layer, with GELU in the same pass over memory where the processor's library offers it."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.ops.compilers import watched

_ONEDNN = platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias`` over the last axis, then GELU.

    Inference in single precision on an x86 CPU goes through oneDNN, which is faster there than what ``F.linear`` calls
    (docs/performance.md) and applies GELU to the product while it is in the cache.
    """
    plain_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if (
        plain_cpu
        and _ONEDNN
        and not watched()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel()
    ):
        pointwise: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *pointwise)
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """``layer(x)``, then GELU. A layer that is not a plain ``nn.Linear`` (quantised, adapted, hooked) is called as it is."""
    if type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks):
        return affine(x, layer.weight, layer.bias, gelu)
    return F.gelu(layer(x)) if gelu else layer(x)
