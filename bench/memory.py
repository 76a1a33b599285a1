"""``python -m bench memory``: gigabytes of a training step under each technique, predicted, and measured where it fits.

The article (arXiv 2111.09883, section 3.4) names the techniques and gives no table of what each saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from bench import memory_detect, tables
from bench.progress import say, steps
from swinscale.memory import Predictor
from swinscale.models import SwinConfig, create_model, model_config
from swinscale.models.config import format_size
from swinscale.parallel import MemoryConfig, Precision, World
from swinscale.peaks import measure
from swinscale.tasks import Classify, Task

SECTIONS = ("predicted", "cpu", "gpu", "detectors", "detectors-cpu")
PROCESSES = 8
MODELS = {"L": "swinv2_large_window12_192", "H": "swinv2_huge_window12_192", "G": "swinv2_giant_window12_192"}
SIZES: dict[str, dict[str, Any]] = {
    "192, window 12": {},
    "192, window 12, 64 images": {},
    "640, window 40": {"img_size": 640, "window_size": 40},
    "1536, window 32": {"img_size": 1536, "window_size": 32},
    # 8 tokens of time: 16 frames, two to a patch
    "320²×8, window 20²×8": {"img_size": (16, 320, 320), "patch_size": (2, 4, 4), "window_size": (8, 20, 20)},
}

_SEQUENTIAL = ("sequential", "sequential", "eager", "eager")
_SHARE = {"attention": "eager", "shard": "zero3"}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "none": {"attention": "eager"},
    "selective checkpointing": {"attention": "eager", "checkpointing": "selective"},
    "block checkpointing": {"attention": "eager", "checkpointing": "block"},
    "sequential attention, stages 1 and 2": {"attention": _SEQUENTIAL},
    "PyTorch's fused attention": {"attention": "sdpa"},
    "our fused attention": {"attention": "auto"},
    "zero1": {**_SHARE, "shard": "zero1"},
    "zero2": {**_SHARE, "shard": "zero2"},
    "zero3": _SHARE,
    "8-bit moments": {"attention": "eager", "optimizer_bits": 8},
    "zero3, offloaded": {**_SHARE, "offload": True},
    "the article's: zero1, block, sequential": {"attention": _SEQUENTIAL, "checkpointing": "block", "shard": "zero1"},
    "ours: zero3, block, fused": {"checkpointing": "block", "shard": "zero3"},
    "all: and 8-bit, offloaded": {"checkpointing": "block", "shard": "zero3", "optimizer_bits": 8, "offload": True},
}
"""Each alone, added to what "none" has: every tensor per pair of tokens in memory (eager attention), and DDP."""

IMAGES = {"192, window 12, 64 images": 64}
"""Per GPU and pass; one at the other sizes."""

CPU_CASES = (
    ("swinv2_tiny_window8_256", 128, 4),
    ("swin_tiny_patch4_window7_224", 112, 4),
    ("swinv2_small_window8_256", 256, 1),
    ("swin_base_patch4_window7_224", 224, 1),
    ("swinv2_base_window16_256", 256, 1),
)
GPU_CASES = (
    ("swin_tiny_patch4_window7_224", 224, 64),
    ("swinv2_tiny_window8_256", 256, 64),
    ("swinv2_small_window16_256", 256, 32),
    ("swinv2_base_window16_256", 256, 32),
    ("swinv2_large_window12_192", 192, 32),
    ("swinv2_large_window12to24_192to384", 384, 4),
)
TRIAL = (("swinv2_micro_patch2_window4_32", 32, 4),)


def predicted(models: Sequence[str], sizes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each model, size and technique, on 8 GPUs in bf16."""
    cases = [(model, size) for model in models for size in sizes]
    for model, size in steps(cases, "predicted"):
        config = configuration(model, size)
        predictor = Predictor(config, micro_batch=IMAGES.get(size, 1))
        say(f"  {model} {size}: {sum(predictor.sizes) / 1e6:,.0f} M parameters")
        for technique, settings in TECHNIQUES.items():
            plan = predictor.plan(MemoryConfig(**settings), processes=PROCESSES)
            yield {"model": model, "size": size, "technique": technique, **dataclasses.asdict(plan)}


def configuration(model: str, size: str) -> SwinConfig:
    """The bare backbone: a head or a decoder depends on the task."""
    changes = {"pretrained_window_sizes": 0, "num_classes": 0, **SIZES[size]}
    return dataclasses.replace(model_config(MODELS[model]), **changes)


def measured(device: str, cases: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """Predicted and measured peak of a later training step, for every checkpointing and back end of attention.

    On a CPU, which takes its time, the larger models run with one back end.
    """
    precision: Precision = "bf16" if device == "cuda" else "fp32"
    every = ("triton", "sdpa", "sequential", "eager") if device == "cuda" else ("sdpa", "sequential", "eager")
    for name, size, count in steps(cases, f"measured on {device}"):
        for attention in every if device == "cuda" or "_tiny_" in name or "_micro_" in name else every[:1]:
            for checkpointing in ("none", "selective", "block"):
                memory = MemoryConfig(attention, cast(Any, checkpointing))
                task = classifier(name, size)
                predictor = Predictor(task, micro_batch=count, precision=precision, device=device)
                peak, held = measure(task, size, count, memory, precision, here=World(0, 1, torch.device(device)))
                plan = predictor.plan(memory)
                say(f"  {name} {attention} {checkpointing}: {plan.peak / 1e9:.3f} of {peak / 1e9:.3f} GB")
                yield {
                    "model": name, "size": size, "images": count, "precision": precision, "attention": attention,
                    "checkpointing": checkpointing, "predicted": plan.peak, "measured": peak, "held": held,
                }  # fmt: skip


def detectors(section: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows of a section about detectors."""
    if section == "detectors":
        return memory_detect.predicted_recipes(memory_detect.RECIPES[: 1 if tiny else None])
    return memory_detect.measured_detectors(memory_detect.CASES[: 1 if tiny else None])


def classifier(name: str, size: int) -> Task:
    """With ten classes, so that the backbone is what counts."""
    return Classify(create_model(name, img_size=size, num_classes=10), 10)


def parts(content: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """What ``docs/memory.md`` shows of the file."""
    rows = content["predicted"]["rows"]
    made: dict[str, Callable[[], str]] = {
        model: lambda model=model: saved_table([r for r in rows if r["model"] == model])  # type: ignore[misc]
        for model in dict.fromkeys(r["model"] for r in rows)
    }
    made["bytes"] = lambda: bytes_table(rows)
    made["stages"] = lambda: stages_table(rows)
    made["cpu"] = lambda: measured_table(content.get("cpu"))
    made["gpu"] = lambda: measured_table(content.get("gpu"))
    made["machine"] = lambda: tables.machine(content["predicted"]["environment"])
    for section, table in (
        ("detectors", memory_detect.recipes_table),
        ("detectors-cpu", memory_detect.measured_table),
    ):
        if section in content:
            made[section] = lambda section=section, table=table: table(content[section])  # type: ignore[misc]
    return made


def saved_table(rows: Sequence[dict[str, Any]]) -> str:
    """Peak and what a technique saves, a column for each size."""
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    peaks = {(r["technique"], r["size"]): r["peak"] / 1e9 for r in rows}
    body = []
    for technique in dict.fromkeys(r["technique"] for r in rows):
        cells = []
        for size in sizes:
            peak, before = peaks[technique, size], peaks["none", size]
            cells.append(f"{peak:,.1f}" if technique == "none" else f"{peak:,.1f} ({peak - before:+,.1f})")
        body.append((technique, *cells))
    return tables.table(("technique", *sizes), body)


def bytes_table(rows: Sequence[dict[str, Any]]) -> str:
    """Parameters, gradients, moments and copies of the largest model at its smallest size."""
    chosen = [r for r in rows if (r["model"], r["size"]) == (rows[-1]["model"], rows[0]["size"])]
    names = ("parameters", "gradients", "optimizer", "copies")
    body = [(r["technique"], *(f"{r[name] / 1e9:.1f}" for name in names)) for r in chosen]
    heads = (chosen[0]["model"], "parameters", "gradients", "moments", "copies in use")
    return tables.table(heads, [row for row in body if "checkpointing" not in row[0] and "attention" not in row[0]])


def stages_table(rows: Sequence[dict[str, Any]]) -> str:
    """Activations that each stage keeps, and the most that the attention of one block takes at once."""
    wanted = ("none", "block checkpointing", "sequential attention, stages 1 and 2", "our fused attention")
    body = []
    for r in rows:
        if r["model"] == rows[-1]["model"] and r["technique"] in wanted:
            kept, attention = (" · ".join(f"{n / 1e9:.1f}" for n in r[key]) for key in ("activations", "attention"))
            body.append((r["size"], r["technique"], kept, attention))
    heads = (f"{rows[-1]['model']}", "technique", "kept by stages 1 · 2 · 3 · 4", "attention of one block at once")
    return tables.table(heads, body)


def measured_table(section: dict[str, Any] | None) -> str:
    """Predicted beside measured."""
    if section is None:
        return "Not measured: no GPU was at hand. The command is `python -m bench memory --sections gpu`."
    body = []
    for r in section["rows"]:
        case = f"{r['model']}, {r['images']} × {format_size((r['size'],) * 2)}, {r['precision']}"
        beyond = [r[key] - r["held"] for key in ("predicted", "measured")]
        body.append((
            case, r["attention"], r["checkpointing"], f"{r['measured'] / 1e6:,.0f}", f"{r['predicted'] / 1e6:,.0f}",
            f"{100 * (r['predicted'] / r['measured'] - 1):+.1f} %", f"{100 * (beyond[0] / beyond[1] - 1):+.1f} %",
        ))  # fmt: skip
    heads = (
        "case",
        "attention",
        "checkpointing",
        "measured MB",
        "predicted MB",
        "off by",
        "off by, without what stays",
    )
    worst = max(abs(r["predicted"] / r["measured"] - 1) for r in section["rows"])
    line = f"The largest deviation of {len(body)} cases is {100 * worst:.1f} %."
    return f"{tables.table(heads, body)}\n\n{line}\n\n{tables.machine(section['environment'])}"
