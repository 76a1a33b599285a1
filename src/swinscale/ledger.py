"""A run on tensors without memory, and a ledger of the memory it would take.

PyTorch's fake tensors have shapes, types and storages, but no bytes. A forward and a backward pass on them takes
milliseconds however large the tensors are, and every tensor is made and dropped by the same Python and autograd code as in
a real run. The ``Ledger`` writes down when storages come and go. ``Unit`` is what it finds about one part of a model.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from swinscale.ops.fused import LARGEST_BUFFER

GRANULE = 512
"""Bytes that PyTorch's allocator for GPUs rounds every tensor up to."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of living storages that were made under it.

    Gradients of parameters are counted apart from everything else, once they are in ``.grad``.

    Args:
        granule: sizes are rounded up to a multiple of this.
    """

    def __init__(self, granule: int = 1):
        super().__init__()
        self.granule = granule
        self.live = self.copies = self.grads = 0
        self.peak = self.peak_with_grads = 0
        self.constants: dict[int, int] = {}
        """Bytes of real tensors that were read, such as layouts, by the address of their storage."""
        self.attention = 0
        """The most that was alive inside window attention beyond what was alive when it began."""
        self._size: dict[int, int] = {}
        self._kind: dict[int, str] = {}
        self._parameters: set[int] = set()
        self._attention_from: int | None = None
        self._counting = True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if not self._counting:
            return out
        source = args[0] if args and isinstance(args[0], FakeTensor) else None
        is_copy = "_to_copy" in str(op) and source is not None and source.untyped_storage()._cdata in self._parameters
        for tensor in tree_iter(out):
            if isinstance(tensor, FakeTensor):
                self._enter(tensor, "copies" if is_copy else "live")
        for tensor in tree_iter(args):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self.constants[storage.data_ptr()] = storage.nbytes()
        self.bump(_kernel_workspace(op, args))
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing that is made meanwhile counts."""
        peaks = self.peak, self.peak_with_grads
        self._counting = False
        try:
            yield
        finally:
            self._counting = True
            self.peak, self.peak_with_grads = peaks

    def know(self, module: nn.Module) -> None:
        """Parameters of ``module`` are not counted; their gradients are, in ``grads``, as soon as they are complete."""
        for parameter in module.parameters():
            storage = parameter.untyped_storage()
            self._parameters.add(storage._cdata)
            self._size[storage._cdata] = 0
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_gradient)

    def _enter(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._size:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        self._size[key], self._kind[key] = size, kind
        self.live += size
        self.copies += size if kind == "copies" else 0
        weakref.finalize(storage, self._leave, key).atexit = False
        self.bump()

    def _leave(self, key: int) -> None:
        size, kind = self._size.pop(key), self._kind.pop(key)
        if kind == "grads":
            self.grads -= size
        else:
            self.live -= size
            self.copies -= size if kind == "copies" else 0

    def _keep_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if self._kind[key] == "live":
            self._kind[key] = "grads"
            self.live -= self._size[key]
            self.grads += self._size[key]

    def size(self, tensor: Tensor) -> int:
        """Bytes that a living tensor counts."""
        return self._size[tensor.untyped_storage()._cdata]

    def bump(self, workspace: int = 0) -> None:
        """Updates the peaks; ``workspace`` more bytes are alive for a moment."""
        self.peak = max(self.peak, self.live + workspace)
        self.peak_with_grads = max(self.peak_with_grads, self.live + self.grads + workspace)
        if self._attention_from is not None:
            self.attention = max(self.attention, self.live + workspace - self._attention_from)

    def restart(self) -> None:
        """Peaks are those of what comes from here on."""
        self.peak, self.peak_with_grads = self.live, self.live + self.grads

    def enter_attention(self) -> None:
        self._attention_from = self.live

    def leave_attention(self) -> None:
        self._attention_from = None


def _kernel_workspace(op: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the fused kernels' backward pass takes inside one operation: gradients of the bias per pair of tokens."""
    if getattr(op, "_opname", "") != "window_attention_backward":
        return 0
    B, W, N, _, A, _ = args[1].shape
    sums = 4 * min(A * N * N, LARGEST_BUFFER)
    return 4 * min(B * W * A * N * N, LARGEST_BUFFER) + sums + 4 * B * W * A * N


class _Mark(torch.autograd.Function):
    """The identity; tells when it is passed on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Callable[[], None]) -> Tensor:
        ctx.back = back
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.back()
        return grad, None


def watch_attention(ledger: Ledger, run: Callable[..., Tensor], qkv: Tensor, *rest: Any) -> Tensor:
    """``run(qkv, *rest)``, with the ledger told when it begins and ends, in both directions."""
    qkv = cast(Tensor, _Mark.apply(qkv, ledger.leave_attention))
    ledger.enter_attention()
    out = run(qkv, *rest)
    ledger.leave_attention()
    return cast(Tensor, _Mark.apply(out, ledger.enter_attention))


class _LikeCuda(TorchFunctionMode):
    """Does to a CPU's fake tensors what autocast and the choice of attention kernels do on CUDA.

    Fake tensors on "cuda" need a PyTorch built for CUDA. The two autocasts agree on matrix products; CUDA's also runs these
    functions in single precision (PyTorch, "Automatic Mixed Precision", op-specific behaviour).
    """

    SINGLE = (
        F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, F.cross_entropy, F.l1_loss, F.mse_loss,
        F.smooth_l1_loss,
    )  # fmt: skip

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _memory_efficient_attention(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            if function in self.SINGLE:
                with torch.autocast("cpu", enabled=False):
                    args = tuple(_single(a) for a in args)
                    return function(*args, **{k: _single(v) for k, v in kwargs.items()})
            if function in (torch.sum, Tensor.sum) and not kwargs.get("dtype") and args[0].is_floating_point():
                return function(*args, **{**kwargs, "dtype": torch.float32})
        return function(*args, **kwargs)


def _single(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _memory_efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's kernel for attention with a learned bias on CUDA; it wants rows of the bias aligned to 16 bytes."""
    mask = attn_mask
    if mask is not None:
        mask = mask.to(q.dtype)
        keys = mask.shape[-1]
        if keys % 16:
            mask = F.pad(mask, (0, -keys % 16))[..., :keys]
        mask = mask.expand(*q.shape[:2], q.shape[2], keys)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout, False, scale=scale)
    return cast(Tensor, out[0])


@contextmanager
def emulate(device: str, dtype: torch.dtype | None) -> Iterator[Callable[[], Any]]:
    """Fake tensors of a ``device`` type; gives the context of forward passes under autocast to ``dtype``."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _LikeCuda() if device == "cuda" else ExitStack():
        yield lambda: torch.autocast("cpu", dtype) if dtype else ExitStack()


def fake_copy(module: nn.Module, dtype: torch.dtype | None = None, instead: dict[int, Any] | None = None) -> nn.Module:
    """``module`` with fake parameters and buffers, in training mode, without tensors that it keeps in dicts.

    Args:
        dtype: of the parameters; None: as they are.
        instead: what stands in the copy for objects of these ids.
    """
    memo = dict(instead or {})
    for p in module.parameters():
        new = torch.empty(p.shape, dtype=dtype or p.dtype, device="cpu")
        memo[id(p)] = nn.Parameter(new, requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
    for part in module.modules():
        for name, kept in vars(part).items():  # made once for a size, such as anchors; the copy makes its own
            own = isinstance(kept, dict) and name not in ("_parameters", "_buffers", "_modules")
            if own and any(isinstance(value, Tensor) for value in tree_iter(kept)):
                memo[id(kept)] = {}
    copied = copy.deepcopy(module, memo)
    for (
        part
    ) in copied.modules():  # train() may leave frozen parts in evaluation mode, where they keep values between calls
        part.training = True
    return copied


class _Source(torch.autograd.Function):
    """A tensor from nothing; on the way back it drops the gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        return anchor.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, None


class _Sink(torch.autograd.Function):
    """The end of a pass, which keeps nothing; on the way back it makes a gradient and then calls ``back``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Callable[[], None]) -> Tensor:
        ctx.like, ctx.back = (x.shape, x.dtype), back
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        made = grad.new_empty(ctx.like[0], dtype=ctx.like[1])
        ctx.back()
        return made, None


def backward_pass(end: Tensor, inputs: tuple[Tensor, ...] = ()) -> Any:
    """``end.backward()``, or the gradients of ``inputs``; the method would hide what is computed again from ``_LikeCuda``."""
    engine = torch.autograd.Variable._execution_engine
    start = torch.ones_like(end)
    return engine.run_backward(
        (end,), (start,), False, False, inputs, allow_unreachable=True, accumulate_grad=not inputs
    )


@dataclass(frozen=True)
class Unit:
    """Bytes of one part of a model, for one input. Peaks are beyond what is alive when the pass over it begins."""

    forward: int
    """Peak of the forward pass."""
    saved: int
    """What stays for the backward pass, with low-precision copies of weights and without the output."""
    copies: int
    """Low-precision copies of weights among what stays."""
    cached: int
    """Further copies, which autocast keeps until the whole forward pass is over."""
    backward: int
    """Peak of the backward pass without finished gradients of parameters."""
    backward_with_grads: int
    """The same with them."""
    attention: int
    """The most that window attention takes beyond what is alive when it begins."""


def measure_unit(
    unit: nn.Module,
    ledger: Ledger,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rest: tuple[Any, ...],
    context: Callable[[], Any],
    learns: bool,
) -> Unit:
    """Runs ``unit(x, *rest)`` forward and backward.

    Args:
        unit: a fake copy.
        shape, dtype: of x.
        context: makes the context of the forward pass.
        learns: whether x needs gradients.
    """
    ledger.know(unit)
    anchor = torch.zeros((), requires_grad=learns)
    before_backward = 0

    def turn() -> None:
        nonlocal before_backward
        ledger.restart()
        before_backward = ledger.live

    with ledger:
        inputs = [cast(Tensor, _Source.apply(anchor, shape, dtype))]
        start = ledger.live
        ledger.restart()
        with context():
            out = unit(inputs[0], *rest)
            forward = ledger.peak - start
            inputs.clear()  # the caller drops it now
            end = cast(Tensor, _Sink.apply(out, turn)) if out.requires_grad else None
            del out
            with_cache = ledger.live
        saved, copies = ledger.live, ledger.copies
        backward = backward_with_grads = 0
        if end is not None:
            backward_pass(end)
            backward, backward_with_grads = ledger.peak - before_backward, ledger.peak_with_grads - before_backward
    return Unit(forward, saved, copies, with_cache - saved, backward, backward_with_grads, ledger.attention)
