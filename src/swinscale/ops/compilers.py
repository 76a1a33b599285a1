"""What compilers, tracers and counters of operations get to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Marks a function whose result is a constant to ``torch.compile``: it is called once, when a graph is made."""
    # What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def watched() -> bool:
    """Whether a compiler, a tracer or a counter looks on: it shall see plain operations on whole tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._len_torch_dispatch_stack() > 0
