"""Window attention in Triton kernels, one forward and few backward: no logits, bias or mask per pair in memory.

Reads queries, keys and values where the projection left them, normalises them in registers, takes each bias from the table
of offsets, and writes the output, and later the gradients, in the layout that the neighbouring projections want. Between
the passes it keeps one number per query and head. The kernels are in ``fused_kernels.py``; this file needs PyTorch alone.

Shape letters: B batch, W windows, N tokens of a window, A heads, d channels of a head, O offsets in a window.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from swinscale.ops.compilers import constant
from swinscale.ops.dense import eager
from swinscale.ops.position import PositionBias

LARGEST_WINDOW = 1024
LARGEST_HEAD = 64
WHOLE = 64
"""Tokens of the largest window that is processed in one tile."""

LARGEST_BUFFER = 1 << 24
"""Entries of the largest buffer for gradients per pair of tokens: 64 MiB. More heads than fit are processed in turn."""


def fused_window_attention(
    qkv: Tensor, table: Tensor, code: Tensor, regions: Tensor | None, scale: Tensor | float, cosine: bool
) -> Tensor:
    """Softmax attention inside windows.

    Args:
        qkv: (B, W, N, 3, A, d), queries, keys and values as one projection gives them.
        table: (A, O), the position bias of each head and offset.
        code: (N,) distinct integers; the offset of query i from key j has the index ``code[i] - code[j] + (O - 1) // 2``.
        regions: (W, N) integers or None. Tokens attend only to tokens of the same region; None: to the whole window.
        scale: factor of the logits; a number, or a tensor (A,) with one per head.
        cosine: logits from cosine similarity instead of the dot product. Vectors shorter than 1e-3 are divided by 1e-3.

    Returns:
        (B, W, N, A*d) in the dtype of ``qkv``. Differentiable once with respect to qkv, table and scale.
    """
    if not isinstance(scale, Tensor):
        scale = qkv.new_full((table.shape[0],), scale, dtype=torch.float32)
    table, scale = table.float().contiguous(), scale.float().contiguous()
    regions = None if regions is None else regions.contiguous()
    out, _ = window_attention_forward(qkv.contiguous(), table, code.contiguous(), regions, scale, cosine)
    return out


@torch.library.custom_op("swinscale::window_attention_forward", mutates_args=())
def window_attention_forward(
    qkv: Tensor, table: Tensor, code: Tensor, regions: Tensor | None, scale: Tensor, cosine: bool
) -> tuple[Tensor, Tensor]:
    """The output (B, W, N, A*d), and log(sum(exp(logits))) of each query, (B*W, A, N) in single precision."""
    return launch_forward(qkv, table, code, regions, scale, cosine)


@window_attention_forward.register_fake
def _(
    qkv: Tensor, table: Tensor, code: Tensor, regions: Tensor | None, scale: Tensor, cosine: bool
) -> tuple[Tensor, Tensor]:
    B, W, N, _, A, d = qkv.shape
    return qkv.new_empty((B, W, N, A * d)), qkv.new_empty((B * W, A, N), dtype=torch.float32)


@torch.library.custom_op("swinscale::window_attention_backward", mutates_args=())
def window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    code: Tensor,
    regions: Tensor | None,
    scale: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cosine: bool,
    learned_table: bool,
    learned_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, table and scale; those of a table or a scale that is not learned are empty."""
    return launch_backward(grad, qkv, table, code, regions, scale, out, log_sum, cosine, learned_table, learned_scale)


@window_attention_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    code: Tensor,
    regions: Tensor | None,
    scale: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cosine: bool,
    learned_table: bool,
    learned_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(qkv),
        torch.empty_like(table) if learned_table else table.new_empty(0),
        torch.empty_like(scale) if learned_scale else scale.new_empty(0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, code, regions, scale, cosine = inputs
    ctx.save_for_backward(qkv, table, code, regions, scale, *output)
    ctx.cosine = cosine


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table, code, regions, scale, out, log_sum = ctx.saved_tensors
    learned = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
    qkv_grad, table_grad, scale_grad = window_attention_backward(
        grad.contiguous(), qkv, table, code, regions, scale, out, log_sum, ctx.cosine, *learned
    )
    return qkv_grad, table_grad if learned[0] else None, None, None, scale_grad if learned[1] else None, None


window_attention_forward.register_autograd(_differentiate, setup_context=_keep)


class Tiles(NamedTuple):
    """How a kernel is launched: tokens of a tile, warps that work on it, and loads that are under way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_tiles(kernel: str, tokens: int, head_dim: int, itemsize: int) -> Tiles:
    """Tiles of a kernel, named as in ``fused_kernels``, for windows of ``tokens`` and elements of ``itemsize`` bytes."""
    single = itemsize == 4  # computed outside the matrix units, with far more registers for each product
    wide = head_dim > 32
    if kernel.endswith("whole"):
        tile = max(16, _power_of_two(tokens))
        warps = {16: 1, 32: 2, 64: 4}[tile] * (1 if not single else 4 if wide else 2)
        return Tiles(tile, tile, warps, 1 if single else 2)
    if single:
        return Tiles(32, 32, 4, 1)
    return Tiles(32, 64, 4, 2) if kernel == "backward_keys" else Tiles(64, 32, 4, 2)


class _Launcher:
    """Launches kernels on one set of inputs. ``tiles`` replaces those of ``choose_tiles`` for the kernels it names."""

    def __init__(self, qkv: Tensor, cosine: bool, tiles: dict[str, Tiles] | None):
        self.qkv, self.cosine, self.given = qkv, cosine, tiles or {}
        self.tokens, self.head_dim = qkv.shape[2], qkv.shape[5]

    def tiles(self, kernel: str) -> Tiles:
        return self.given.get(kernel) or choose_tiles(kernel, self.tokens, self.head_dim, self.qkv.element_size())

    def blocks(self, kernel: str) -> tuple[int, int]:
        """Blocks of queries and blocks of keys that cover a window."""
        tiles = self.tiles(kernel)
        return -(-self.tokens // tiles.queries), -(-self.tokens // tiles.keys)

    def shares(self, kernel: str, windows: int, others: int, at_most: int) -> int:
        """Into how many equal shares to divide the windows, with ``others`` programs for each share."""
        if self.qkv.device.type == "cpu":
            programs = 4  # the interpreter: programs with several windows are what a test should see
        else:  # a few times as many as run at once; a share in the backward pass costs a tile of gradients in memory
            warps = 64 if kernel == "forward_whole" else 32
            programs = _multiprocessors(self.qkv.device) * warps // self.tiles(kernel).warps
        shares = max(1, min(windows, programs // others, at_most))
        return -(-windows // -(-windows // shares))

    def __call__(self, kernel: str, programs: int, *arguments: Tensor | int | None) -> None:
        from swinscale.ops import fused_kernels  # needs Triton

        assert all(t.is_contiguous() for t in arguments if isinstance(t, Tensor))
        tiles = self.tiles(kernel)
        constants = {"D": self.head_dim, "D_TILE": max(16, _power_of_two(self.head_dim)), "COSINE": self.cosine}
        if kernel.endswith("whole"):
            constants |= {"TILE": tiles.queries}
        else:
            constants |= {"QUERIES": tiles.queries, "KEYS": tiles.keys}
        with torch.cuda.device_of(self.qkv):
            getattr(fused_kernels, kernel)[(programs,)](
                *arguments, **constants, num_warps=tiles.warps, num_stages=tiles.stages
            )


def launch_forward(
    qkv: Tensor,
    table: Tensor,
    code: Tensor,
    regions: Tensor | None,
    scale: Tensor,
    cosine: bool,
    tiles: dict[str, Tiles] | None = None,
) -> tuple[Tensor, Tensor]:
    """``window_attention_forward``, with ``tiles`` in place of those of ``choose_tiles`` for some kernels."""
    B, W, N, _, A, d = qkv.shape
    out = qkv.new_empty((B, W, N, A * d))
    log_sum = qkv.new_empty((B * W, A, N), dtype=torch.float32)
    assert len(table) == A and code.shape == (N,) and scale.shape == (A,)
    assert regions is None or regions.shape == (W, N)
    if not out.numel():
        return out, log_sum
    launch = _Launcher(qkv, cosine, tiles)
    tensors = (qkv, table, code, regions, scale, out, log_sum)
    sizes = (W, N, A, table.shape[1])
    if N <= WHOLE:
        launch("forward_whole", launch.shares("forward_whole", B * W, A, B * W) * A, *tensors, B * W, *sizes)
    else:
        launch("forward_blocks", B * W * launch.blocks("forward_blocks")[0] * A, *tensors, *sizes)
    return out, log_sum


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    code: Tensor,
    regions: Tensor | None,
    scale: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cosine: bool,
    learned_table: bool,
    learned_scale: bool,
    tiles: dict[str, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``window_attention_backward``, with ``tiles`` in place of those of ``choose_tiles`` for some kernels."""
    B, W, N, _, A, _ = qkv.shape
    qkv_grad = torch.empty_like(qkv)
    table_grad = torch.zeros_like(table) if learned_table else table.new_empty(0)
    scale_parts = scale.new_empty((0, A)) if learned_scale else None  # of each program
    if qkv.numel():
        launch = _Launcher(qkv, cosine, tiles)
        tensors = (qkv, table, code, regions, scale)
        sizes = (W, N, A, table.shape[1])
        some = max(1, min(A, LARGEST_BUFFER // N**2))  # heads whose gradients per pair of tokens fit in a buffer
        limit = max(1, LARGEST_BUFFER // (some * N**2))
        if N <= WHOLE:
            shares = launch.shares("backward_whole", B * W, A, limit)
            pairs = table.new_empty((shares, A, N, N)) if learned_table else None
            scale_parts = scale.new_empty((shares, A)) if learned_scale else None
            grads = (qkv_grad, pairs, scale_parts)
            launch("backward_whole", shares * A, *tensors, log_sum, grad, *grads, B * W, *sizes)
            if pairs is not None:
                _add_up(pairs, code, table_grad)
        else:
            blocks = launch.blocks("backward_queries")[0]
            inner = torch.empty_like(log_sum)
            scale_parts = scale.new_empty((B * W * blocks, A)) if learned_scale else None
            grads = (inner, qkv_grad, scale_parts)
            launch("backward_queries", B * W * blocks * A, *tensors, out, log_sum, grad, *grads, *sizes)
            known = (*tensors, log_sum, grad, inner)
            launch("backward_keys", B * W * launch.blocks("backward_keys")[1] * A, *known, qkv_grad, *sizes)
            for first in range(0, A if learned_table else 0, some):
                heads = min(some, A - first)
                programs = math.prod(launch.blocks("backward_bias")) * heads
                shares = launch.shares("backward_bias", B * W, programs, limit)
                pairs = table.new_empty((shares, heads, N, N))
                launch("backward_bias", shares * programs, *known, pairs, B * W, *sizes, first, heads)
                _add_up(pairs, code, table_grad[first : first + heads])
    scale_grad = scale.new_empty(0) if scale_parts is None else scale_parts.sum(0)
    return qkv_grad, table_grad, scale_grad


def _add_up(pairs: Tensor, code: Tensor, table_grad: Tensor) -> None:
    """Gradients (shares, A, N, N) per pair of tokens, summed up in ``table_grad`` (A, O), always in the same order."""
    from swinscale.ops import fused_kernels  # needs Triton

    A, offsets = table_grad.shape
    token_at = torch.full((offsets,), -1, dtype=torch.int32, device=code.device)
    tokens = torch.arange(len(code), dtype=torch.int32, device=code.device)
    token_at[(code - code[0] + (offsets - 1) // 2).long()] = tokens
    pairs = pairs.sum(0) if len(pairs) > 1 else pairs[0]
    with torch.cuda.device_of(pairs):
        fused_kernels.bias_to_table[(-(-offsets // 16), A)](
            pairs, code, token_at, table_grad, len(code), offsets, QUERIES=64, OFFSETS=16, num_warps=4
        )


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def why_not(device_type: str, dtype: torch.dtype, tokens: int, head_dim: int, dropout: float) -> str | None:
    """The reason, in words, why ``fused_window_attention`` cannot run; None if it can."""
    if dropout:
        return f"the fused kernels have no dropout, and attn_drop_rate is {dropout}"
    if dtype not in _TOLERANCES:
        return f"the fused kernels compute in bfloat16, float16 and float32, not in {str(dtype).removeprefix('torch.')}"
    if tokens > LARGEST_WINDOW:
        return f"the fused kernels take windows of at most {LARGEST_WINDOW} tokens, not {tokens}"
    if head_dim > LARGEST_HEAD:
        return f"the fused kernels take heads of at most {LARGEST_HEAD} channels, not {head_dim}"
    return _why_not_on(device_type, dtype, tokens, head_dim)


@constant
def _why_not_on(device_type: str, dtype: torch.dtype, tokens: int, head_dim: int) -> str | None:
    """``why_not``, as far as it depends on the machine."""
    if device_type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
        return (
            None if interpreted else "Triton compiles for GPUs; on a CPU it needs its interpreter (TRITON_INTERPRET=1)"
        )
    if device_type != "cuda" or torch.version.hip:
        return f"the fused kernels are written for CUDA, not for {'ROCm' if torch.version.hip else device_type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    side = next((s for s in (4, 5, 8) if tokens <= s * s), 12)
    return _why_not_on_gpu(torch.device("cuda", torch.cuda.current_device()), dtype, side, head_dim)


@cache
def _why_not_on_gpu(device: torch.device, dtype: torch.dtype, side: int, head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernels need a GPU of compute capability 8.0 or higher, such as an A100 or an RTX 3060"
    return self_check(device, dtype, side, head_dim)


@cache
def self_check(
    device: torch.device, dtype: torch.dtype = torch.float32, side: int = 7, head_dim: int = 32
) -> str | None:
    """Compares output and gradients on some windows of side × side tokens with the reference, once for each case.

    A kernel that a compiler got wrong must not serve in silence. The case takes the tiles, and so the compiled kernels,
    of all windows of about that size.

    Returns:
        None if they agree, else what differs, in words.
    """
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.device("cpu"),
    ):
        B, W, N, A = 2, 2, side * side, 2
        random = torch.Generator().manual_seed(0)
        place = torch.arange(N)
        code = (place // side * (2 * side - 1) + place % side).to(device)
        regions = torch.randint(2, (W, N), generator=random).to(device)
        qkv, grad = (torch.randn(s, generator=random) for s in ((B, W, N, 3, A, head_dim), (B, W, N, A * head_dim)))
        table = torch.randn(A, (2 * side - 1) ** 2, generator=random)
        qkv, grad = qkv.to(device, dtype), grad.to(device, dtype)
        learned = [t.to(device) for t in (qkv, table, torch.tensor([2.0, 4.0]))]
        exact = [t.double().requires_grad_() for t in learned]
        learned = [t.requires_grad_() for t in learned]
        out = eager(exact[0], PositionBias(exact[1], code), regions, exact[2], True, 0.0)
        grad = (grad + 2 * out.detach()).to(dtype)  # along the output, so that the scale's gradient does not cancel out
        expected = (out.detach(), *torch.autograd.grad(out, exact, grad.double()))
        try:
            out = fused_window_attention(learned[0], learned[1], code, regions, learned[2], True)
            found = (out.detach(), *torch.autograd.grad(out, learned, grad))
        except Exception as reason:  # of the compiler, the driver or the launch
            return f"the fused kernels do not run on this GPU ({reason})"
        names = ("output", "gradient of qkv", "gradient of the bias", "gradient of the scale")
        for name, a, b in zip(names, expected, found, strict=True):
            error = ((a - b).norm() / a.norm()).item()
            if not error <= _TOLERANCES[dtype]:  # also if it is no number
                return f"the {name} of the fused kernels is wrong on this GPU (relative error {error:.1e})"
    return None


_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest error of a self-check, relative in norm: some four times that of correct kernels."""
