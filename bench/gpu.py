"""``python -m bench gpu``: ceilings of the machine, attention alone, models, G's blocks and scaling, within ten minutes.

Sections run in the order of ``SECTIONS``, each within its share of the time, and each is written as soon as it is done. A
second call with ``--sections`` adds to the same file. ``--tiny`` runs the same code on small shapes, also on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import BLOCK_VALUES, Case, free, run_case, warm_compiler
from bench.contenders import Cannot, Contender, Setting, randomise, reason, vit
from bench.progress import say
from bench.scaling import area_curve, window_curve
from swinscale.errors import UsageError
from swinscale.models import plan
from swinscale.models.config import SwinConfig
from swinscale.models.swin import SwinStage
from swinscale.models.variants import GIANT
from swinscale.models.windows import position_code, stage_layouts, window_layout
from swinscale.ops import BACKENDS, PositionBias, choose_backend, window_attention
from swinscale.timing import Budget, Spread, alternate, seconds_per_call

Section = dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """How large everything is."""

    device: str
    compiler: str = "inductor"
    matmuls: tuple[int, ...] = (8192, 4096, 16384)
    copy_bytes: int = 4 << 30
    tokens: int = 1 << 18
    heads: int = 4
    windows: tuple[int, ...] = (8, 16, 12, 24, 7, 32)
    windows_per_side: int = 8
    repeats: int = 7
    min_seconds: float = 0.05
    giant_width: int = 512
    giant_blocks: int = 6
    giant_batch: int = 128
    giant_size: int = 192
    giant_window: int = 12
    models: tuple[tuple[str, Setting, str, int], ...] = (
        ("v2b-256-8", Setting("swinv2_base", 8, 256), "training", 64),
        ("v2b-256-16", Setting("swinv2_base", 16, 256), "training", 64),
        ("v2b-384-24", Setting("swinv2_base", 24, 384), "training", 16),
        ("v2b-256-8", Setting("swinv2_base", 8, 256), "inference", 64),
        ("v2b-256-16", Setting("swinv2_base", 16, 256), "inference", 64),
        ("v2b-384-24", Setting("swinv2_base", 24, 384), "inference", 32),
        ("v2t-256-8", Setting("swinv2_tiny", 8, 256), "inference", 128),
        ("v2t-256-16", Setting("swinv2_tiny", 16, 256), "inference", 128),
        ("v2t-256-8", Setting("swinv2_tiny", 8, 256), "training", 128),
        ("v2l-256-8", Setting("swinv2_large", 8, 256), "training", 32),
        ("v2l-256-8", Setting("swinv2_large", 8, 256), "inference", 64),
    )
    vits: tuple[tuple[str, int, int], ...] = (("small", 256, 128), ("base", 256, 64))
    area_model: str = "swinv2_tiny"
    area_window: int = 8
    area_sizes: tuple[int, ...] = (256, 512, 768, 1024, 1536, 2048)
    curve_size: int = 1024
    curve_windows: tuple[int, ...] = (4, 8, 16, 32)
    curve_batch: int = 4


TINY: dict[str, Any] = {
    "compiler": "eager",  # traces as the real one does, and builds nothing
    "matmuls": (64,),
    "copy_bytes": 1 << 16,
    "tokens": 256,
    "heads": 2,
    "windows": (4,),
    "windows_per_side": 2,
    "repeats": 1,
    "min_seconds": 0.0,
    "giant_width": 16,
    "giant_blocks": 2,
    "giant_batch": 1,
    "giant_size": 64,
    "giant_window": 4,
    "models": (
        ("v2b-256-8", Setting("swinv2_trial", 4, 32), "training", 2),
        ("v2t-256-8", Setting("swinv2_trial", 4, 32), "inference", 2),
    ),
    "vits": (("tiny", 32, 1),),
    "area_model": "swinv2_trial",
    "area_window": 4,
    "area_sizes": (32, 64),
    "curve_size": 32,
    "curve_windows": (2, 4),
    "curve_batch": 1,
}


def shapes(device: str, tiny: bool, models: list[str] | None = None) -> Shapes:
    """The real sizes, or small ones with which all of the code runs in seconds; of the models those named."""
    found = dataclasses.replace(Shapes(device), **TINY) if tiny else Shapes(device)
    if models:
        chosen = [m for m in found.models if any(part in f"{m[0]} {m[2]}" for part in models)]
        if not chosen:
            raise UsageError(f"--models {' '.join(models)}: no model has this in its name.")
        found = dataclasses.replace(found, models=tuple(chosen))
    return found


def ceilings(s: Shapes, budget: Budget) -> Section:
    """What this machine can do at best: the fastest bf16 matrix product and a copy, on random data."""
    best, shape = 0.0, ""
    for n in s.matmuls:
        a, b = (torch.randn(n, n, device=s.device).to(torch.bfloat16) for _ in range(2))
        spread = seconds_per_call(partial(_product, a, b), s.device, s.repeats, s.min_seconds)
        rate = 2 * n**3 / spread.median
        if rate > best:
            best, shape = rate, f"{n}³"
        del a, b
    source = torch.randn(s.copy_bytes // 4, device=s.device)
    target = torch.empty_like(source)
    copied = seconds_per_call(lambda _: target.copy_(source), s.device, s.repeats, s.min_seconds)
    return {
        "matmul_flops_per_s": best,
        "matmul_shape": shape,
        "copy_bytes_per_s": 2 * source.numel() * 4 / copied.median,
        "copy_bytes": s.copy_bytes,
    }


def _product(a: Tensor, b: Tensor, _: int) -> Tensor:
    return a @ b


@dataclass
class AttentionInputs:
    """Random arguments of ``window_attention`` with V2's cosine, and what they cost."""

    qkv: Tensor
    values: Tensor
    code: Tensor
    regions: Tensor | None
    scale: Tensor
    out_grad: Tensor

    @staticmethod
    def make(s: Shapes, window: int, shifted: bool, dtype: torch.dtype, tokens: int) -> AttentionInputs:
        """``tokens`` in all, in whole pictures of ``windows_per_side``² windows."""
        side, n, d = window * s.windows_per_side, window**2, 32
        layout = window_layout((side, side), (window,) * 2, (window // 2 * shifted,) * 2, True, torch.device(s.device))
        images = max(1, tokens // side**2)
        generator = torch.Generator(s.device).manual_seed(2)
        shape = (images, s.windows_per_side**2, n, 3, s.heads, d)
        random = partial(torch.randn, generator=generator, device=s.device)
        return AttentionInputs(
            random(shape).to(dtype).requires_grad_(),
            random(s.heads, (2 * window - 1) ** 2).requires_grad_(),
            position_code((window,) * 2, (window,) * 2, torch.device(s.device)),
            layout.regions,
            (random(s.heads) * 0.1 + math.log(10)).exp().requires_grad_(),
            random(*shape[:3], s.heads * d).to(dtype),
        )

    def run(self, function: Callable[..., Tensor], qkv: Tensor | None = None) -> Tensor:
        qkv = self.qkv if qkv is None else qkv
        return function(qkv, self.values, self.code, self.regions, self.scale)

    def both(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Output and gradients."""
        out = self.run(function)
        return out, *torch.autograd.grad(out, (self.qkv, self.values, self.scale), self.out_grad.to(out.dtype))

    @property
    def flops(self) -> int:
        """Of the forward pass; twice as many in the backward pass."""
        b, w, n, _, a, d = self.qkv.shape
        return 4 * b * w * n * n * a * d

    @property
    def forward_bytes(self) -> int:
        """The least that must be moved: q, k, v in, the result out."""
        return self.qkv.numel() * self.qkv.element_size() * 4 // 3

    @property
    def backward_bytes(self) -> int:
        """The least: q, k, v, the result and its gradient in, three gradients out."""
        return 2 * self.forward_bytes


def attention_function(backend: str, compiler: str = "inductor") -> Callable[..., Tensor]:
    """Attention by one back end; flex is meant to be compiled."""

    def call(qkv: Tensor, values: Tensor, code: Tensor, regions: Tensor | None, scale: Tensor) -> Tensor:
        return window_attention(qkv.flatten(3), PositionBias(values, code), regions, scale, True, 0.0, backend)

    return torch.compile(call, dynamic=False, backend=compiler) if backend == "flex" else call


def check_attention(s: Shapes, backend: str, window: int, function: Callable[..., Tensor]) -> dict[str, float]:
    """Relative distance of outputs and gradients from the reference back end in fp32, with masks, in bf16."""
    tokens = min(s.tokens, 2 * (window * s.windows_per_side) ** 2)
    given = AttentionInputs.make(s, window, True, torch.bfloat16, tokens)
    found = given.both(function)
    exact = dataclasses.replace(given, qkv=given.qkv.detach().float().requires_grad_())
    expected = exact.both(attention_function("eager"))
    names = ("output", "qkv", "bias", "scale")
    return {name: ((f.float() - e).norm() / e.norm()).item() for name, f, e in zip(names, found, expected, strict=True)}


LIMITS = {"output": 2e-2, "qkv": 3e-2, "bias": 3e-2, "scale": 5e-2}


def wrong(s: Shapes, window: int, found: dict[str, float], known: dict[int, dict[str, float]]) -> list[str]:
    """What is farther off than bf16 explains: a fixed limit, or three times what the reference itself loses by bf16."""
    if window not in known:
        known[window] = check_attention(s, "eager", window, attention_function("eager"))
    return [name for name, limit in LIMITS.items() if not found[name] <= max(limit, 3 * known[window][name])]


def check(s: Shapes, budget: Budget) -> Section:
    """Every back end but flex (which is checked where it is timed) against the reference, before anything else."""
    rows: list[dict[str, Any]] = []
    known: dict[int, dict[str, float]] = {}
    for window in s.windows:
        for backend in [name for name in BACKENDS if name != "flex"]:
            row: dict[str, Any] = {"window": window, "backend": backend}
            try:
                choose_backend(backend, s.device, torch.bfloat16, window**2, 32)
                row |= {"distance": check_attention(s, backend, window, attention_function(backend))}
                row["equal"] = not wrong(s, window, row["distance"], known)
            except Exception as error:
                row["reason"] = reason(error)
            rows.append(row)
            free(s.device)
    return {"rows": rows}


def attention(s: Shapes, budget: Budget) -> Section:
    """Time of attention alone, forward and forward with backward, without and with shifted windows."""
    rows: list[dict[str, Any]] = []
    known: dict[int, dict[str, float]] = {}
    for window in s.windows:
        for backend in BACKENDS:
            row: dict[str, Any] = {"window": window, "backend": backend}
            rows.append(row)
            if budget.left < (15 if backend == "flex" else 3):
                row["reason"] = "no time left"
                continue
            try:
                choose_backend(backend, s.device, torch.bfloat16, window**2, 32)
                function = attention_function(backend, s.compiler)
                found = check_attention(s, backend, window, function)
                row["distance"] = found
                if bad := wrong(s, window, found, known):
                    row["reason"] = f"results differ: {', '.join(f'{name} by {found[name]:.2g}' for name in bad)}"
                    continue
                for shifted in (False, True):
                    _time_attention(s, row, "shifted" if shifted else "regular", window, shifted, function)
            except torch.OutOfMemoryError:
                row["reason"] = "out of memory"
            except Exception as error:
                row["reason"] = reason(error)
            say(f"  window {window} {backend}: " + (row.get("reason") or f"{1e3 * row['regular']['both_s']:.2f} ms"))
            free(s.device)
        torch._dynamo.reset()
    return {"rows": rows, "tokens": s.tokens, "heads": s.heads}


def _time_attention(
    s: Shapes, row: dict[str, Any], kind: str, window: int, shifted: bool, function: Callable[..., Tensor]
) -> None:
    given = AttentionInputs.make(s, window, shifted, torch.bfloat16, s.tokens)
    inputs = [given.qkv.detach(), torch.randn_like(given.qkv)]  # taking turns, so that a cache does not hold them

    def forward(index: int) -> object:
        with torch.no_grad():
            return given.run(function, inputs[index % 2])

    once = seconds_per_call(forward, s.device, s.repeats, s.min_seconds / 5).median
    free(s.device)
    before = torch.cuda.memory_allocated() if s.device == "cuda" else 0
    if s.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    both = seconds_per_call(lambda _: given.both(function), s.device, s.repeats, s.min_seconds / 5).median
    row[kind] = {
        "forward_s": once,
        "forward_flops_per_s": given.flops / once,
        "forward_bytes_per_s": given.forward_bytes / once,
        "both_s": both,
        "both_flops_per_s": 3 * given.flops / both,
        "both_bytes_per_s": (given.forward_bytes + given.backward_bytes) / both,
    }
    if s.device == "cuda":
        row[kind]["memory_bytes"] = torch.cuda.max_memory_allocated() - before


def models(s: Shapes, budget: Budget, save: Callable[[Section], None] = lambda _: None) -> Section:
    """Whole networks in bf16 beside timm's, compiled and eager."""
    found: Section = {"cases": []}
    if s.compiler == "inductor":
        warm_compiler(s.device)
    for name, setting, mode, batch in s.models:
        alone = "large" in setting.model
        contenders = [Contender(compiled=True), Contender("timm", compiled=True), Contender(), Contender("timm")]
        if name == "v2b-256-8":
            contenders += [Contender("transformers"), Contender("torchvision")]
        case = Case(
            setting, batch, mode, "bf16", s.device, tuple(contenders[::2][:2] if alone else contenders), s.repeats,
            s.min_seconds, s.device == "cuda", name=f"{name} {mode}", compiler=s.compiler,
        )  # fmt: skip
        if budget.left < 30:
            say(f"  {case.name}: no time left")
            continue
        while True:
            result = run_case(case, enough=lambda: budget.left < 15)
            full = any("out of memory" in row.get("reason", "") for row in result["contenders"])
            if not full or case.batch == 1 or budget.left < 60:
                break
            case = dataclasses.replace(case, batch=case.batch // 2)  # for everybody
            say(f"  out of memory: again with batch {case.batch}")
        found["cases"].append(result)
        save(found)
    return found


def plain_vit(s: Shapes, budget: Budget) -> Section:
    """timm's ViT of like size, compiled, inference in bf16: multiply-accumulates per second."""
    rates: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for size, image, batch in s.vits:
        if budget.left < 15:
            reasons[size] = "no time left"
            continue
        try:
            model, macs = vit(size, image)
            model = model.to(s.device, torch.bfloat16)
            compiled = torch.compile(model, dynamic=False, backend=s.compiler)
            x = torch.randn(batch, 3, image, image, device=s.device).to(torch.bfloat16)

            def call(_: int, compiled: Any = compiled, x: Tensor = x) -> object:
                with torch.inference_mode():
                    return compiled(x)

            rates[size] = macs * batch / seconds_per_call(call, s.device, s.repeats, s.min_seconds).median
        except (Cannot, RuntimeError) as error:
            reasons[size] = reason(error)
        torch._dynamo.reset()
        free(s.device)
    return {"rates": rates, "reasons": reasons, "image": {size: image for size, image, _ in s.vits}}


def giant(s: Shapes, budget: Budget) -> Section:
    """A handful of blocks of G's third stage (42 of them hold nearly all of its cost), a training step in bf16."""
    config = SwinConfig(
        img_size=s.giant_size,
        window_size=s.giant_window,
        embed_dim=s.giant_width,
        depths=(1, 1, s.giant_blocks),
        num_heads=tuple(h * s.giant_width // GIANT["embed_dim"] or 1 for h in GIANT["num_heads"][:3]),
        main_norm_interval=GIANT["main_norm_interval"],
        drop_path_rate=0.0,
    )
    cost = plan(config).stages[-1]
    found: Section = {
        "blocks": s.giant_blocks,
        "width": config.stage_dims[-1],
        "batch": s.giant_batch,
        "rows": [],
        "least_bytes": 0,
    }
    values = BLOCK_VALUES * math.prod(cost.map) * config.stage_dims[-1] * s.giant_blocks * s.giant_batch
    found["least_bytes"] = 3 * 2 * values  # bf16; the backward pass moves twice as much
    stage_layouts(config, 2, cost.map, torch.device(s.device))
    for compiled in (False, True):
        if budget.left < 25:
            found["rows"].append({"name": "compiled" if compiled else "eager", "reason": "no time left"})
            continue
        row: dict[str, Any] = {"name": "compiled" if compiled else "eager"}
        found["rows"].append(row)
        try:
            stage = randomise(SwinStage(config, 2)).to(s.device).train()
            forward = torch.compile(stage, dynamic=False, backend=s.compiler) if compiled else stage
            optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-6, fused=True)
            x = torch.randn(s.giant_batch, *cost.map, config.stage_dims[-1], device=s.device, requires_grad=True)

            def step(_: int, forward: Any = forward, optimizer: Any = optimizer, x: Tensor = x) -> None:
                with torch.autocast(s.device, torch.bfloat16):
                    loss = forward(x).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                x.grad = None

            start = time.perf_counter()
            step(0)
            row["first_batch_s"] = time.perf_counter() - start
            if s.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            spread = Spread.of(alternate([step], s.repeats, s.device, s.min_seconds)[0])
            row |= {"seconds": spread.as_dict(), "flops_per_s": 6 * cost.macs * s.giant_batch / spread.median}
            if s.device == "cuda":
                row["memory_bytes"] = torch.cuda.max_memory_allocated()
            found["flops_per_s"] = max(row["flops_per_s"], found.get("flops_per_s", 0.0))
        except Exception as error:
            row["reason"] = reason(error)
        forward = stage = optimizer = x = step = None  # type: ignore[assignment]
        torch._dynamo.reset()
        free(s.device)
    return found


def scaling(s: Shapes, budget: Budget) -> Section:
    """Curves in bf16, eager: ours and timm's."""
    who = (Contender(), Contender("timm"))
    pixels = 2 * max(s.area_sizes) ** 2 if s.device == "cuda" else max(s.area_sizes) ** 2
    how: dict[str, Any] = {
        "enough": lambda: budget.left < 5, "repeats": s.repeats, "min_seconds": s.min_seconds, "memory": False,
    }  # fmt: skip
    area = partial(area_curve, s.area_model, s.area_window, s.area_sizes, pixels)
    found = {"area": area(who[:1], s.device, "bf16", **how)}
    found["window"] = window_curve(
        s.area_model, s.curve_size, s.curve_windows, s.curve_batch, who, s.device, "bf16", mode="training", **how
    )
    found["area"] += area(who[1:], s.device, "bf16", **how)
    return {**found, "area_window": s.area_window, "model": s.area_model}


SECTIONS: dict[str, tuple[Callable[..., Section], float]] = {
    "ceilings": (ceilings, 25),
    "check": (check, 30),
    "giant": (giant, 60),
    "models": (models, 300),
    "vit": (plain_vit, 60),
    "attention": (attention, 100),
    "scaling": (scaling, 80),
}
"""In order of importance, with the seconds that each may take at most."""


def run_sections(names: list[str], s: Shapes, seconds: float, save: Callable[[str, Section], None]) -> None:
    """Runs sections, hands each result to ``save`` at once; what fails becomes a line."""
    total = Budget(seconds)
    chosen = [name for name in SECTIONS if name in names]
    for place, name in enumerate(chosen):
        function, most = SECTIONS[name]
        if len(chosen) < len(SECTIONS):
            most = seconds  # chosen by hand: as long as there is time, but leave some for those after
        later = sum(SECTIONS[other][1] for other in chosen[place + 1 :]) / 2
        part = total.part(max(min(most, total.left - later), min(10, total.left)))
        if total.left < 5:
            save(name, {"reason": "no time left"})
            continue
        say(f"{name} (at most {part.left:.0f} s)")
        start = time.monotonic()
        try:
            extra = {"save": partial(save, name)} if name == "models" else {}
            found = function(s, part, **extra)
        except Exception as error:
            found = {"reason": reason(error)}
        free(s.device)
        save(name, {**found, "section_seconds": round(time.monotonic() - start, 1)})
