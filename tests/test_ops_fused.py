"""The fused window attention kernels against the formula in double precision.

Without a GPU the kernels run in Triton's interpreter, in processes of their own: it must be chosen before Triton is
imported, and would otherwise serve every later test of this process. It never sees bfloat16, whose products it gets wrong.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from swinscale.models.windows import position_code, relative_position_index
from swinscale.ops import fused
from swinscale.ops.compilers import constant

LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 7e-3}
NAMES = ("output", "gradient of qkv", "gradient of the table", "gradient of the scale")


@dataclass(frozen=True)
class Case:
    """Windows to compare on. ``regions``: 0 none; else how many regions a window has at most, one of them padding."""

    window: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    cosine: bool = True
    regions: int = 0
    d: int = 16
    A: int = 2
    B: int = 1
    W: int = 2
    table: tuple[int, ...] | None = None  # window that the table is made for, if larger

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor | None, Tensor]:
        """[qkv, table, scale], code, regions, and a gradient of the output."""
        N, made_for = math.prod(self.window), self.table or self.window
        qkv = torch.randn(self.B, self.W, N, 3, self.A, self.d)
        qkv[0, 0, 0] = 0  # a zero token
        qkv[-1, -1, -1] *= 1e-4  # shorter than the smallest norm that cosine attention divides by
        table = torch.randn(self.A, math.prod(2 * w - 1 for w in made_for))
        scale = torch.rand(self.A) * 4 + 1 if self.cosine else torch.rand(self.A) + 0.1
        regions = None
        if self.regions:
            regions = torch.randint(self.regions, (self.W, N)).sort(1).values  # whole blocks of keys can be far
            regions[-1, N // 2 :] = -1
        grad = torch.randn(self.B, self.W, N, self.A * self.d)
        learned = [t.to(device).requires_grad_() for t in (qkv.to(self.dtype), table, scale)]
        code = position_code(self.window, made_for, torch.device(device)).int()
        return learned, code, regions if regions is None else regions.to(device), grad.to(device, self.dtype)

    def reference(self, learned: list[Tensor], regions: Tensor | None) -> Tensor:
        """The formula, with the table's rows found from coordinates instead of codes."""
        qkv, table, scale = learned
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, W, A, N, d) each
        if self.cosine:
            q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-3) for x in (q, k))
        index = relative_position_index(self.window, self.table or self.window, qkv.device)
        logits = q @ k.mT * scale[:, None, None] + table[:, index].unflatten(1, (q.shape[3], -1))
        if regions is not None:
            logits = logits.masked_fill((regions[:, :, None] != regions[:, None])[None, :, None], -torch.inf)
        return (logits.softmax(-1) @ v).transpose(2, 3).flatten(-2)

    def errors(self, device: str = "cpu") -> list[str]:
        """What differs from the reference, in words. float32: largest error; else error in norm; both relative."""
        torch.manual_seed(hash((self.window, self.d, self.cosine, self.regions)) % 1000)
        learned, code, regions, grad = self.inputs(device)
        exact = [t.detach().double().requires_grad_() for t in learned]
        expected = self.reference(exact, regions)
        grad = (grad + 2 * expected.detach()).to(self.dtype)  # else the terms of the scale's gradient cancel out
        out = fused.fused_window_attention(learned[0], learned[1], code, regions, learned[2], self.cosine)
        found = (out, *torch.autograd.grad(out, learned, grad))
        wrong = []
        exact = (expected, *torch.autograd.grad(expected, exact, grad.double()))
        for name, a, b in zip(NAMES, exact, found, strict=True):
            difference, size = a - b, a
            if name == "gradient of qkv" and self.cosine:  # that of a short vector is 1000 times as large
                weight = torch.linalg.vector_norm(learned[0].detach().float(), dim=-1, keepdim=True).clamp(max=1)
                difference, size = difference * weight, size * weight
            if self.dtype == torch.float32:
                error = (difference.abs().max() / size.abs().max().clamp(min=1)).item()
            else:
                error = (difference.norm() / size.norm()).item()
            if not error <= LIMITS[self.dtype] * (1 if device == "cpu" else 3):  # a GPU approximates exp
                wrong.append(f"{self}: {name}, error {error:.1e}")
            if not (a.shape == b.shape and b.isfinite().all()):
                wrong.append(f"{self}: {name} has shape {tuple(b.shape)}, finite: {bool(b.isfinite().all())}")
        return wrong


HALF = torch.float16
INTERPRETED = {
    "whole": [
        Case((1,), W=1, A=1),
        Case((1, 1), cosine=False, B=2, regions=1),
        Case((3, 3), B=2, W=3, regions=3, d=24),
        Case((4, 4), cosine=False, W=5, regions=2, d=32),
        Case((3, 5), table=(5, 5), A=3, d=24),
        Case((2, 2, 2), cosine=False, B=3, regions=2),
        Case((7, 7), regions=3, d=32),
        Case((7, 7), cosine=False, A=1, B=2),
        Case((8, 8), A=1, W=3, B=2, regions=4, d=24),
    ],
    "blocks": [
        Case((12, 12), A=1, W=2, regions=3, d=32),
        Case((12, 12), A=2, W=1, cosine=False, d=24),
        Case((9, 9), A=1, B=2, W=1, d=16, table=(12, 12)),
        Case((14, 14), A=1, W=1, regions=8),
    ],
    "half": [
        Case((3, 3), HALF, B=2, W=3, regions=2, d=24),
        Case((7, 7), HALF, cosine=False, A=1, regions=2, d=32),
        Case((7, 7), HALF, A=1, d=16),
        Case((12, 12), HALF, A=1, W=1, regions=3, d=32),
    ],
}


def compare(group: str) -> None:
    wrong = [line for case in INTERPRETED[group] for line in case.errors()]
    assert not wrong, "\n".join(wrong)


def parts() -> None:
    """Inputs that need no gradient, scales that are numbers, strided and empty inputs, repetition bit for bit."""
    (qkv, table, scale), code, regions, grad = Case((3, 3), W=3, regions=2).inputs()

    def attend(qkv: Tensor, table: Tensor, scale: Tensor | float) -> Tensor:
        return fused.fused_window_attention(qkv, table, code, regions, scale, False)

    def gradients(*learned: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(qkv, table, scale), learned, grad)

    exact = gradients(qkv, table, scale)
    assert all(torch.equal(a, b) for a, b in zip(exact, gradients(qkv, table, scale), strict=True))
    table.requires_grad_(False)
    assert torch.equal(gradients(qkv, scale)[0], exact[0])
    scale.requires_grad_(False)
    assert torch.equal(gradients(qkv)[0], exact[0])
    number = attend(qkv, table, 0.25)
    assert torch.equal(number, attend(qkv, table, torch.full_like(scale, 0.25)))
    strided = qkv.detach().transpose(3, 4).contiguous().transpose(3, 4)
    assert not strided.is_contiguous()
    assert torch.equal(attend(strided, table, 0.25), number)
    for shape in ((0, 3), (2, 0)):
        empty = torch.empty(*shape, 9, 3, 2, 16, requires_grad=True)
        learned = (empty, table.requires_grad_(), scale.requires_grad_())
        none = regions[: shape[1]] if shape[1] else None
        out = fused.fused_window_attention(empty, table, code, none, scale, True)
        assert out.shape == (*shape, 9, 32)
        found = torch.autograd.grad(out.sum(), learned)
        assert [t.shape for t in found] == [t.shape for t in learned]
        assert not any(t.any() for t in found)
    few = {"backward_bias": fused.Tiles(32, 32, 4, 1)}  # a share of the windows, and of the heads, at a time
    fused.LARGEST_BUFFER = 2 * 81**2
    (qkv, table, scale), code, regions, grad = Case((9, 9), A=3, B=2, W=1).inputs()
    with torch.no_grad():
        inputs = (qkv, table, code, regions, scale)
        out, log_sum = fused.launch_forward(*inputs, True)
        found = fused.launch_backward(grad, *inputs, out, log_sum, True, True, True, few)
    fused.LARGEST_BUFFER = 1 << 24
    with torch.no_grad():
        again = fused.launch_backward(grad, *inputs, out, log_sum, True, True, True)
    for a, b in zip(found, again, strict=True):
        assert (a - b).abs().max() <= 3e-6 * a.abs().max()


def graph() -> None:
    """The operators as PyTorch's own checks and torch.compile see them, sizes known and unknown; the check of itself."""
    (qkv, table, scale), code, regions, grad = Case((3, 3), W=3, regions=2).inputs()
    torch.library.opcheck(fused.window_attention_forward, (qkv, table, code, regions, scale, True))
    torch.library.opcheck(fused.window_attention_forward, (qkv, table, code, None, scale, False))
    with torch.no_grad():
        out, log_sum = fused.window_attention_forward(qkv, table, code, regions, scale, True)
        inputs = (grad, qkv, table, code, regions, scale, out, log_sum, True)
        torch.library.opcheck(
            fused.window_attention_backward,
            (*(t.detach() if isinstance(t, Tensor) else t for t in inputs), True, False),
        )
    expected = fused.fused_window_attention(qkv, table, code, regions, scale, True)
    gradients = torch.autograd.grad(expected, (qkv, table, scale), grad)
    for dynamic in (False, True):
        compiled = torch.compile(fused.fused_window_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        found = compiled(qkv, table, code, regions, scale, True)
        assert torch.equal(found, expected)
        for a, b in zip(gradients, torch.autograd.grad(found, (qkv, table, scale), grad), strict=True):
            assert torch.equal(a, b)

    @constant
    def checked(dtype: torch.dtype) -> str | None:  # as ``why_not`` does it for a GPU
        return fused.self_check(torch.device("cpu"), dtype, 3, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def reason(x: Tensor) -> Tensor:
        reasons = (fused.why_not(x.device.type, x.dtype, 9, 16, 0.0), checked(x.dtype))
        return x + 1 if reasons == (None, None) else x

    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
        assert torch.equal(reason(torch.zeros(1, device="cpu")), torch.ones(1, device="cpu"))
    for side, dtype in ((3, HALF), (7, HALF), (12, torch.float32)):
        assert fused.self_check(torch.device("cpu"), dtype, side, 16) is None
    fused._TOLERANCES[torch.float32] = 0.0
    said = fused.self_check(torch.device("cpu"), torch.float32, 4, 16)
    assert said is not None and said.startswith("the output of the fused kernels is wrong on this GPU"), said


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("task", [*INTERPRETED, "parts", "graph"])
def test_in_the_interpreter(task: str):
    """R-SPD-1: float32 within 3e-6 of the largest value, output and gradients."""
    done = subprocess.run(
        [sys.executable, __file__, task], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]


def test_reasons(monkeypatch):
    bf16 = torch.bfloat16
    assert "no dropout, and attn_drop_rate is 0.1" in fused.why_not("cuda", bf16, 49, 32, 0.1)
    assert "not in float64" in fused.why_not("cuda", torch.float64, 49, 32, 0.0)
    assert "at most 1024 tokens, not 1225" in fused.why_not("cuda", bf16, 1225, 32, 0.0)
    assert "at most 64 channels, not 96" in fused.why_not("cuda", bf16, 49, 96, 0.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "interpreter" in fused.why_not("cpu", bf16, 49, 32, 0.0)
    assert "not for mps" in fused.why_not("mps", bf16, 49, 32, 0.0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fused.why_not("cuda", bf16, 49, 32, 0.0) == "there is no CUDA device"

    def on_a_gpu(installed: bool, capability: tuple[int, int]) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
        monkeypatch.setattr(fused, "self_check", lambda *case: f"{case}")
        try:
            return fused.why_not("cuda", bf16, 49, 32, 0.0)
        finally:
            fused._why_not_on_gpu.cache_clear()

    assert on_a_gpu(False, (9, 0)) == "Triton is not installed (pip install triton)"
    assert "capability 8.0" in on_a_gpu(True, (7, 5))
    assert on_a_gpu(True, (9, 0)) == str((torch.device("cuda", 0), bf16, 8, 32))


WINDOWS = [(3, 5), (7, 7), (8, 8), (12, 12), (14, 14), (16, 16), (24, 24), (32, 32), (8, 7, 7), (8, 8, 8)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d", [16, 32, 48, 64])
@pytest.mark.parametrize("window", WINDOWS)
def test_on_a_gpu(window: tuple[int, ...], d: int, dtype: torch.dtype):
    many = max(1, 4096 // math.prod(window) ** 2)  # a program gets several windows
    for cosine in (True, False):
        for regions in (0, 4):
            case = Case(window, dtype, cosine, regions, d, A=3, B=2 * many, W=4)
            assert not (wrong := case.errors("cuda")), "\n".join(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_on_a_gpu(backend: str):
    (qkv, table, scale), code, regions, grad = Case((7, 7), torch.bfloat16, regions=3, W=4).inputs("cuda")
    assert fused.why_not("cuda", torch.bfloat16, 49, 16, 0.0) is None
    results = []
    for attend in (
        fused.fused_window_attention,
        torch.compile(fused.fused_window_attention, fullgraph=True, backend=backend),
    ):
        out = attend(qkv, table, code, regions, scale, True)
        results.append([out, *torch.autograd.grad(out, (qkv, table, scale), grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = sys.argv[1]
    {"parts": parts, "graph": graph}.get(task, lambda: compare(task))()
