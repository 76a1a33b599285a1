"""Running a block on a few windows at a time, so that what it computes on the way stays in the processor's cache.

Windows do not see each other, so a block may take them in any portions. On a CPU a whole map's hidden layer does not fit the
cache, and memory fresh from the operating system costs more than the arithmetic of a narrow layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from swinscale.models.windows import Layout, layout_part, repeat_layout
from swinscale.ops.compilers import watched

TOKENS = 2048
"""Tokens of a chunk; anything from 1,024 to 8,192 serves about as well (docs/performance.md)."""


def in_chunks(block: nn.Module, run: Callable[[Tensor, Layout], Tensor], x: Tensor, layout: Layout) -> Tensor:
    """``run(x, layout)`` for (B, W, N, D), on some windows after the other where that is faster and cannot be noticed.

    That is: in evaluation, without gradients, on a CPU, with no compiler or tracer looking on, and when no hook in
    ``block`` would see the parts of a tensor. To an exported graph the windows of all images are those of one, (B*W, N, D),
    which keeps symbols out of all strides and so the time to trace within bounds.
    """
    B, W, N, D = x.shape
    if torch.compiler.is_exporting():
        return run(x.reshape(B * W, N, D), repeat_layout(layout, B)).reshape(B, W, N, D)
    if watched() or x.device.type != "cpu" or B * W * N <= TOKENS or not _unnoticed(block):
        return run(x, layout)
    windows = max(1, min(W, TOKENS // N))
    images = 1 if windows < W else max(1, TOKENS // (W * N))
    out: Tensor | None = None
    for image in range(0, B, images):
        for start in range(0, W, windows):
            stop = min(start + windows, W)
            part = layout if stop - start == W else layout_part(layout, start, stop)
            done = run(x[image : image + images, start:stop], part)
            out = done.new_empty(x.shape) if out is None else out
            out[image : image + images, start:stop] = done
    return run(x, layout) if out is None else out  # nothing to do for an empty batch


def _unnoticed(block: nn.Module) -> bool:
    if block.training or torch.is_grad_enabled() or torch_module._has_any_global_hook():
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
