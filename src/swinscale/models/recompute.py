"""Activation checkpointing: memory for time, block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "selective", "block"]

_aten = torch.ops.aten
EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose results "selective" keeps: linear layers, and attention that never has its logits in memory.

The products of attention that does (``bmm``) are computed again: their results are the logits themselves.
"""


def recompute(mode: Checkpointing, run: Callable[..., Any], *inputs: Any) -> Any:
    """``run(*inputs)``, whose intermediate results are kept for the backward pass or computed there again.

    Args:
        mode: "none" keeps everything, "block" nothing but the inputs, "selective" the results that are expensive to compute
            (``EXPENSIVE`` and our fused attention), so that norms, activations and residuals alone run twice.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return run(*inputs)
    if mode == "block":
        return checkpoint(run, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    ours = cast(str, getattr(op, "name", str)()).startswith("swinscale::window_attention")
    return CheckpointPolicy.MUST_SAVE if ours or op in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
