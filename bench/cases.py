"""One comparison: a network, a batch, a mode; everybody checked for equal outputs, then timed in alternation."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contenders import OURS, Cannot, Contender, OpenVino, Setting, build, reason, reference_weights
from bench.progress import say
from swinscale.models import SizePlan, SwinConfig, SwinTransformer, plan
from swinscale.timing import Call, Clock, Spread, alternate

ROOT = Path(__file__).parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
MODES = ("inference", "training")
CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """What is measured. The first contender that is ours, with the back end "auto", is what ratios refer to.

    Inference is in evaluation mode without gradients, weights in ``dtype``. Training is forward, cross entropy, backward
    and a fused AdamW step, in fp32 or under autocast.
    """

    setting: Setting
    batch: int
    mode: str
    dtype: str
    device: str
    contenders: tuple[Contender, ...]
    repeats: int = 7
    min_seconds: float = 0.1
    memory: bool = True
    name: str = ""
    compiler: str = "inductor"

    def __str__(self) -> str:
        return f"{self.setting} {self.mode} {self.dtype} batch {self.batch} {self.device}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the contenders, who have their own rows."""
        content = dataclasses.asdict(self)
        for key in ("contenders", "memory", "min_seconds", "compiler"):
            del content[key]
        return {**content.pop("setting"), **content, "title": str(self.setting)}


@dataclass
class Entry:
    """A contender on its way: what it calls, what was found about it."""

    contender: Contender
    row: dict[str, Any]
    call: Call | None = None


class Runner:
    """A model as something to call: ``run(i)`` does one inference or one training step on input set ``i``."""

    def __init__(self, case: Case, model: nn.Module, forward: Callable[[Tensor], Tensor], inputs: list[Tensor]):
        self.case, self.model, self.forward, self.inputs = case, model, forward, inputs
        self.labels = [torch.arange(len(x), device=x.device) % CLASSES for x in inputs]
        self.training = case.mode == "training"
        if self.training:
            weights = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.05, fused=True)
            self.scaler = torch.amp.GradScaler(case.device, enabled=case.dtype == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, in training."""
        if self.case.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.case.device, DTYPES[self.case.dtype])

    def check(self) -> tuple[Tensor, float | None]:
        """Logits of the first inputs and, in training, the norm of all gradients; changes no weight."""
        if not self.training:
            with torch.inference_mode():
                return self.forward(self.inputs[0]).float(), None
        with self.autocast():
            logits = self.forward(self.inputs[0])
        F.cross_entropy(logits.float(), self.labels[0]).backward()
        norms = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return logits.detach().float(), torch.stack(norms).norm().item()

    def __call__(self, index: int) -> object:
        x, labels = self.inputs[index % len(self.inputs)], self.labels[index % len(self.inputs)]
        if not self.training:
            with torch.inference_mode():
                return self.forward(x)
        with self.autocast():
            logits = self.forward(x)
            loss = F.cross_entropy(logits.float(), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return None


def make_inputs(case: Case, sets: int) -> list[Tensor]:
    """Random pictures, the same for everybody; weights stay in fp32 in training, and so do they."""
    generator = torch.Generator().manual_seed(1)
    dtype = DTYPES[case.dtype] if case.mode == "inference" else torch.float32
    shape = (case.batch, 3, case.setting.size, case.setting.size)
    return [torch.randn(shape, generator=generator).to(case.device, dtype) for _ in range(sets)]


def make_runner(case: Case, contender: Contender, inputs: list[Tensor], official: Path | None) -> Runner:
    """A contender ready for its first call, compiled if it is to be (compilation itself happens in that call)."""
    if contender.project == "openvino" and (case.device, case.mode, case.dtype) != ("cpu", "inference", "fp32"):
        raise Cannot("openvino is measured for inference in fp32 on a CPU")
    with torch.set_grad_enabled(case.mode == "training"):  # some back ends run without gradients alone
        model = build(contender, case.setting, case.device, official)
    if case.mode == "training":
        model.train()
    elif case.dtype != "fp32":
        model.to(DTYPES[case.dtype])
    forward: Callable[[Tensor], Tensor] = model
    if contender.project == "openvino":
        forward = OpenVino(model)
    elif contender.compiled:
        forward = torch.compile(model, dynamic=False, backend=case.compiler)
    return Runner(case, model, forward, inputs)


def reference(case: Case, x: Tensor, labels: Tensor, part: int = 2) -> tuple[Tensor, float | None]:
    """What everybody's first call must give: our plainest attention in fp32, two pictures at a time."""
    exact = {"backend": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        model = SwinTransformer(case.setting.config).eval().to(case.device)
        model.load_state_dict(reference_weights(case.setting))
        model.set_attention_backend("eager")
        logits = []
        training = case.mode == "training"
        with torch.set_grad_enabled(training):
            for images, targets in zip(x.float().split(part), labels.split(part), strict=True):
                logits.append(model(images))
                if training:
                    (F.cross_entropy(logits[-1], targets) * len(images) / len(x)).backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return torch.cat(logits).detach(), torch.stack(norms).norm().item() if training else None
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = exact["backend"], exact["cudnn"]


def distance(found: tuple[Tensor, float | None], expected: tuple[Tensor, float | None]) -> float:
    """Relative difference of the outputs, or of the gradients' norms if that is larger. NaN counts as infinite."""
    value = ((found[0] - expected[0]).norm() / expected[0].norm()).item()
    if found[1] is not None and expected[1] is not None:
        value = max(value, abs(found[1] - expected[1]) / expected[1])
    return value if value == value else float("inf")


def run_case(
    case: Case,
    official: Path | None = None,
    enough: Callable[[], bool] = lambda: False,
    tamper: Callable[[Contender, nn.Module], None] | None = None,
) -> dict[str, Any]:
    """Builds, checks and times; a row per contender, whatever became of it.

    Args:
        enough: ends the rounds early, and leaves out contenders that are not built yet.
        tamper: changes a built model, for tests of the check.
    """
    say(f"{case.name or case}")
    inputs = make_inputs(case, 4 if case.device == "cuda" else 2)
    labels = torch.arange(case.batch, device=inputs[0].device) % CLASSES
    expected = reference(case, inputs[0], labels)
    free(case.device)
    entries = [
        Entry(contender, {"name": str(contender), **dataclasses.asdict(contender)}) for contender in case.contenders
    ]
    for entry in entries:
        if enough():
            entry.row |= {"status": "cannot", "reason": "no time left"}
        else:
            _prepare(case, entry, inputs, expected, official, tamper)
        row = entry.row
        say(f"  {row['name']}: " + (row.get("reason") or f"first batch after {row['first_batch_s']:.2f} s"))
    timed = [entry for entry in entries if entry.call is not None]
    times: list[list[float]] = []
    while timed:
        try:
            times = alternate([e.call for e in timed if e.call], case.repeats, case.device, case.min_seconds, enough)
            break
        except torch.OutOfMemoryError:  # all of them together need more than one alone
            largest = max(timed, key=lambda e: (e.contender.is_peer, e.row.get("memory_bytes") or 0))
            largest.row |= {"status": "cannot", "reason": f"out of memory at batch {case.batch}"}
            largest.call = None
            timed.remove(largest)
            free(case.device)
    for entry, seconds in zip(timed, times, strict=True):
        spread = Spread.of(seconds)
        entry.row |= {
            "status": "ok",
            "seconds": spread.as_dict(),
            "images_per_s": float(f"{case.batch / spread.median:.6g}"),
            "rounds": [float(f"{s:.6g}") for s in seconds],
        }
    cost = plan(case.setting.config, case.setting.size)
    result = {
        **case.as_dict(),
        "macs_per_image": cost.macs,
        "least_values_per_image": least_values(case.setting.config, cost),
        "parameters": cost.parameters,
        "contenders": [entry.row for entry in entries],
    }
    add_ratios(result)
    for entry in entries:
        entry.call = None
    del timed, entries
    torch._dynamo.reset()
    free(case.device)
    if case.memory and case.device == "cpu":
        for row in result["contenders"]:
            if row["status"] == "ok" and not row["compiled"] and not enough():
                row["memory_bytes"] = peak_memory(case, row, official)
    for row in result["contenders"]:
        if row["status"] == "ok":
            say(f"  {row['name']}: {row['images_per_s']:.4g} images/s")
    return result


def _prepare(
    case: Case,
    entry: Entry,
    inputs: list[Tensor],
    expected: tuple[Tensor, float | None],
    official: Path | None,
    tamper: Callable[[Contender, nn.Module], None] | None,
) -> None:
    """Builds a contender, makes its first call, checks it, and on a GPU takes its memory while it runs alone."""
    row = entry.row
    try:
        before = torch.cuda.memory_allocated() if case.device == "cuda" else 0
        runner = make_runner(case, entry.contender, inputs, official)
        if tamper:
            tamper(entry.contender, runner.model)
        start = time.perf_counter()
        found = runner.check()
        if case.device == "cuda":
            torch.cuda.synchronize()
        row["first_batch_s"] = round(time.perf_counter() - start, 4)
        row["difference"] = float(f"{distance(found, expected):.3g}")
        if row["difference"] > TOLERANCE[case.dtype]:
            row |= {"status": "differs", "reason": f"outputs differ by {row['difference']:.2g}"}
            return
        if case.device == "cuda":
            runner(0)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            runner(1)
            torch.cuda.synchronize()
            row["memory_bytes"] = torch.cuda.max_memory_allocated() - before
        entry.call = runner
    except torch.OutOfMemoryError:
        row |= {"status": "cannot", "reason": f"out of memory at batch {case.batch}"}
    except Exception as error:  # whatever goes wrong in somebody's code is a line in the table
        row |= {"status": "cannot", "reason": reason(error)}
    finally:
        free(case.device)


BLOCK_VALUES = 24


def least_values(config: SwinConfig, cost: SizePlan) -> int:
    """Activations that the blocks' forward pass must move for one image if only linear layers and attention touch memory.

    Per token and channel ``BLOCK_VALUES``: qkv reads 1 and writes 3, attention the reverse, the projection 1 and 1, the two
    linear layers of the MLP 1 and 4 and the reverse, and both residual sums read and write 1 more.
    """
    slots = [stage.windows * math.prod(stage.window) for stage in cost.stages]
    return sum(BLOCK_VALUES * n * d * k for n, d, k in zip(slots, config.stage_dims, config.depths, strict=True))


def prepare_device(device: str, threads: int | None = None) -> None:
    """Settings of PyTorch that hold for everybody, and a first compilation, whose costs are nobody's."""
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never eager in silence


def warm_compiler(device: str) -> None:
    """Starts the compiler's processes, so that the first contender does not pay for them."""
    x = torch.ones(64, 64, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x @ x).sin().sum(), dynamic=False)(x).backward()
    except Exception as error:  # said again by each contender
        say(f"torch.compile does not work here: {reason(error)}")


def free(device: str) -> None:
    """Gives memory of what is no longer used back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def ours_in(result: dict[str, Any], compiled: bool) -> dict[str, Any] | None:
    """Our row with the back end "auto"."""
    for row in result["contenders"]:
        if (row["project"], row["backend"], row["compiled"], row["status"]) == (OURS, "auto", compiled, "ok"):
            return row
    return None


def peers_in(result: dict[str, Any], compiled: bool) -> list[dict[str, Any]]:
    """Timed rows of timm, transformers, torchvision and the official code, the fastest first."""
    rows = [
        row
        for row in result["contenders"]
        if row["project"] not in (OURS, "openvino") and row["compiled"] == compiled and row["status"] == "ok"
    ]
    return sorted(rows, key=lambda row: row["seconds"]["median"])


def add_ratios(result: dict[str, Any]) -> None:
    """How many times as long as ours each took, in the same rounds; compiled to compiled."""
    for row in result["contenders"]:
        ours = ours_in(result, row["compiled"]) or ours_in(result, not row["compiled"])
        if row["status"] == "ok" and ours:
            row["ratio"] = Spread.ratio(row["rounds"], ours["rounds"]).as_dict()


def peak_memory(case: Case, row: dict[str, Any], official: Path | None = None) -> int | None:
    """Bytes by which one contender's peak rises above its built model, alone in a fresh process; None if that failed."""
    found = alone(case, row, official)
    return found["bytes"] if found else None


def alone(
    case: Case, row: dict[str, Any], official: Path | None = None, calls: int = 2, choice: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Median seconds of ``calls`` calls and bytes of peak memory of one contender in a fresh process; None if that failed.

    Args:
        row: says who it is: "project", "backend", "compiled".
        choice: module variables of ours to change there, by name, such as ``{"swinscale.models.chunks.TOKENS": 512}``.
    """
    spec = {
        **{key: value for key, value in case.as_dict().items() if key not in ("title", "name")},
        "contender": {key: row[key] for key in ("project", "backend", "compiled")},
        "official": str(official) if official else None,
        "calls": calls,
        "choice": choice or {},
    }
    return own_process(spec)


def own_process(spec: dict[str, Any]) -> dict[str, Any] | None:
    """What ``python -m bench alone`` finds for ``spec`` in a fresh process with as many threads; None if that failed."""
    spec = {**spec, "threads": torch.get_num_threads()}
    python_path = os.pathsep.join(p for p in (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-m", "bench", "alone", json.dumps(spec)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
    )
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None


def run_alone(spec: dict[str, Any]) -> dict[str, Any]:
    """What ``alone`` runs in its own process."""
    torch.set_num_threads(spec["threads"])
    for name, value in spec["choice"].items():
        module, _, variable = name.rpartition(".")
        assert hasattr(importlib.import_module(module), variable), name
        setattr(importlib.import_module(module), variable, value)
    setting = Setting(spec["model"], spec["window"], spec["size"])
    contender = Contender(**spec["contender"])
    case = Case(setting, spec["batch"], spec["mode"], spec["dtype"], "cpu", (contender,))
    inputs = make_inputs(case, 1)
    official = Path(spec["official"]) if spec["official"] else None
    runner = make_runner(case, contender, inputs, official)
    reference_weights.cache_clear()
    gc.collect()
    give_back_freed_memory()
    before = reset_peak()
    runner(0)
    seconds = [Clock("cpu")(runner, 0, 1) for _ in range(spec["calls"] - 1)]
    return {"seconds": Spread.of(seconds).median, "bytes": resident_peak() - before}


def give_back_freed_memory() -> None:
    """Hands what the allocator keeps after ``free`` back to the system: a call that reuses it would seem to need less.

    Building a model and filling it with weights leaves hundreds of megabytes, more for some projects than for others.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc; elsewhere peaks are too low by what is reused


def reset_peak() -> int:
    """Bytes resident now; from here on ``resident_peak`` counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return resident_peak()


def resident_peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(field)
