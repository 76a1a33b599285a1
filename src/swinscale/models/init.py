"""Initial values of all parameters: each a function of a seed and the parameter's name.

So a model has the same values whether it is initialised whole, layer by layer, or by processes that keep a share of each
tensor, and in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swinscale.seeding import derive_seed

NORMAL = ("mask_token", "absolute_pos_embed", "relative_position_bias_table")


def initial_values(root: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and first value (fp32, on the CPU) of every parameter of ``root``, one at a time; ``root`` may be on ``meta``.

    Values are those of the published code: linear layers and embeddings truncated normal (0.02), convolutions PyTorch's
    own, gains 1, biases 0, logit scales log 10. A module names in ``initially_zero`` what must start at 0 instead, in
    ``initially_normal`` the deviation of what starts normally distributed, and in ``initially_constant`` any other value.
    """
    zero = {
        f"{path}.{name}".lstrip(".")
        for path, module in root.named_modules()
        for name in getattr(module, "initially_zero", ())
    }
    normal = {
        f"{path}.{name}".lstrip("."): deviation
        for path, module in root.named_modules()
        for name, deviation in getattr(module, "initially_normal", {}).items()
    }
    constant = {
        f"{path}.{name}".lstrip("."): number
        for path, module in root.named_modules()
        for name, number in getattr(module, "initially_constant", {}).items()
    }
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            generator = torch.Generator().manual_seed(derive_seed(seed, full))
            value = torch.zeros(parameter.shape, device="cpu")
            if full in constant:
                value.fill_(constant[full])
            elif full in normal:
                value.normal_(0, normal[full], generator=generator)
            elif full not in zero:
                value = _fill(value, module, name, generator)
            yield full, value


def reset_statistics(root: nn.Module) -> None:
    """Running means and variances of batch norms start at 0 and 1; ``to_empty`` leaves them without values."""
    for module in root.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()


def _fill(value: Tensor, module: nn.Module, name: str, generator: torch.Generator) -> Tensor:
    if name in NORMAL or (isinstance(module, nn.Linear) and name == "weight"):
        return nn.init.trunc_normal_(value, std=0.02, generator=generator)
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        bound = 1 / math.sqrt(module.weight[0].numel())  # of the layer's inputs
        return value.uniform_(-bound, bound, generator=generator)
    if isinstance(module, (nn.LayerNorm, _BatchNorm)) and name == "weight":
        return value.fill_(1)
    if name == "logit_scale":
        return value.fill_(math.log(10))
    assert name in ("bias", "q_bias", "v_bias"), f"{type(module).__name__}.{name} has no initial value"
    return value
