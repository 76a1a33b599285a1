"""Memory of detectors in training: predicted for whole recipes, and measured for small ones on annotated pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench import tables
from bench.progress import say, steps
from swinscale.heads import roi
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.heads.rehearsal import OBJECTS
from swinscale.memory import Predictor, card_bytes
from swinscale.models import SwinTransformer, model_config
from swinscale.models.config import format_size
from swinscale.parallel import MemoryConfig, Precision, split_batch
from swinscale.peaks import measure
from swinscale.recipes import get_recipe
from swinscale.show import task_of, trained_size
from swinscale.tasks.base import Batch, Task
from swinscale.tasks.detect import Detect

RECIPES = ("mask_rcnn_swinv2_tiny", "cascade_swin_base_3x", "htc_swinv2_large", "htc_swinv2_giant")
GPUS, CARD = 8, "80GB"
TECHNIQUES: dict[str, dict[str, Any]] = {
    "none": {},
    "block": {"checkpointing": "block"},
    "block, zero3": {"checkpointing": "block", "shard": "zero3"},
}
CLASSES = 20
SMALL: dict[str, Any] = {
    "channels": 64, "fc_channels": 256, "anchor_scale": 4.0, "regions": 128, "proposals": (400, 300),
    "proposals_per_level": (400, 300),
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {"head": "mask_rcnn"},
    "cascade": {"head": "cascade", "box_loss": "giou", "anchors_inside": True},
    "htc": {"head": "htc", "class_agnostic": True, "semantic": True, "global_attention": True},
}
CASES: tuple[tuple[str, int, str, Precision, bool], ...] = (
    ("mask_rcnn", 64, "none", "fp32", True),
    ("cascade", 64, "none", "fp32", True),
    ("htc", 64, "none", "fp32", True),
    ("htc", 64, "block", "fp32", True),
    ("htc", 64, "none", "bf16", True),
    ("htc", 256, "none", "fp32", True),
    ("mask_rcnn", 64, "none", "fp32", False),
    ("cascade", 64, "none", "fp32", False),
    ("htc", 64, "none", "fp32", False),
)
"""Head, channels, checkpointing, precision, and whether pooling takes the memory of the compiled operator."""


class OnObjects(Task):
    """A detector in training on random pictures with ``OBJECTS`` rectangles annotated in each.

    Args:
        size, count: of the pictures in pixels, and how many there are in a batch.
    """

    def __init__(self, task: Detect, size: int, count: int):
        super().__init__()
        self.task, self.sizes = task, torch.tensor([[size, size]] * count)
        self.targets = [_rectangles(size, task.config, seed) for seed in range(count)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found: tuple[Tensor, dict[str, Tensor]] = self.task({**batch, "size": self.sizes, "targets": self.targets})
        return found

    @property
    def backbone(self) -> nn.Module:
        return self.task.backbone

    def annotated(self) -> int:
        """Bytes of the annotations."""
        return sum(t.nbytes for target in self.targets for t in target.values())


def _rectangles(size: int, config: DetectConfig, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(OBJECTS, 2, generator=random) * size * 0.7
    boxes = torch.cat([corners, corners + size * (0.05 + 0.25 * torch.rand(OBJECTS, 2, generator=random))], 1)
    target = {"boxes": boxes, "labels": torch.randint(CLASSES, (OBJECTS,), generator=random)}
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    x, y = torch.arange(size), torch.arange(size)[:, None]
    target["masks"] = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return target | ({"semantic": torch.full((size, size), CLASSES)} if config.semantic else {})


class _Pooled(torch.autograd.Function):
    """Random numbers in the place of pooled regions; keeps what torchvision's compiled operator keeps."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, regions: Tensor, side: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(regions)
        ctx.shape = maps.shape
        return torch.randn(len(regions), maps.shape[1], *side)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.new_zeros(ctx.shape), None, None


@contextmanager
def pooling(compiled: bool) -> Iterator[None]:
    """Meanwhile pooling takes the memory of torchvision's compiled operator, whatever there is here, if ``compiled``."""
    real = roi.roi_align
    if compiled:
        roi.roi_align = lambda maps, regions, side, *_, **__: _Pooled.apply(maps, regions, side)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        roi.roi_align = real


def small_detector(head: str, size: int = 256, **settings: Any) -> Detect:
    """A detector with a backbone of width 48 and narrow heads."""
    config = model_config("swinv2_nano_window8_128", img_size=size, num_classes=0)
    options = DetectConfig(**{**SMALL, **HEADS[head], **settings})
    return Detect(Detector(SwinTransformer(config), CLASSES, options), [str(n) for n in range(CLASSES)])


def compared(
    task: Detect, size: int, count: int, memory: MemoryConfig, precision: Precision, compiled: bool
) -> dict[str, int]:
    """Bytes at the peak of a step on the CPU, predicted and measured, and those between two steps."""
    predictor = Predictor(task, micro_batch=count, img_size=size, precision=precision, device="cpu")
    found, annotated = predictor.plan(memory), OnObjects(task, size, count)
    with pooling(compiled):
        peak, held = measure(annotated, size, count, memory, precision)
    more = annotated.annotated()  # which came before the allocator was watched
    return {"predicted": found.peak, "measured": peak + more, "held": held + more}


def predicted_recipes(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each recipe of ``names``: bytes at the peak on each of eight GPUs under each technique, and the advice."""
    for name in steps(names, "detectors"):
        recipe = get_recipe(name)
        train = recipe.train
        passes = split_batch(train.batch_size, train.micro_batch, GPUS, train.batch_size)
        images = math.ceil(train.batch_size / GPUS / passes)
        size = trained_size(recipe, images)
        predictor = Predictor(task_of(recipe), micro_batch=images, img_size=size)
        step: dict[str, Any] = {"processes": GPUS, "accumulate": passes, "ema": bool(train.ema_decay)}
        own = predictor.plan(train.memory, **step)
        peaks = {how: predictor.plan(MemoryConfig(**more), **step).peak for how, more in TECHNIQUES.items()}
        say(f"  {name}: {own.peak / 1e9:.1f} GB")
        yield {
            "recipe": name, "parameters": sum(predictor.sizes), "size": size, "images": images, "passes": passes,
            "checkpointing": train.memory.checkpointing, "shard": train.memory.shard, "own": own.peak, "rest": own.rest,
            "blocks": sum(own.activations), "where": own.where, "peaks": peaks,
            "advice": str(predictor.advise(card_bytes(CARD), train.memory, **step)),
        }  # fmt: skip


def measured_detectors(cases: Sequence[tuple[str, int, str, Precision, bool]]) -> Iterator[dict[str, Any]]:
    """Predicted and measured peak of a later training step of small detectors on two annotated pictures."""
    for head, channels, checkpointing, precision, compiled in steps(cases, "detectors measured"):
        memory = MemoryConfig(checkpointing=checkpointing)  # type: ignore[arg-type]
        row = compared(small_detector(head, channels=channels), 256, 2, memory, precision, compiled)
        say(f"  {head} {channels} {checkpointing}: {row['predicted'] / 1e6:.0f} of {row['measured'] / 1e6:.0f} MB")
        yield {
            "head": head, "channels": channels, "checkpointing": checkpointing, "precision": precision,
            "compiled": compiled, **row,
        }  # fmt: skip


def recipes_table(section: dict[str, Any]) -> str:
    """Gigabytes of whole recipes."""
    body = []
    for r in section["rows"]:
        settings = ", ".join(s for s in (r["checkpointing"], r["shard"]) if s != "none") or "none"
        body.append((
            f"{r['recipe']}, {r['parameters'] / 1e6:,.0f} M", f"{r['passes']} × {r['images']} of {format_size(r['size'])}",
            f"{r['own'] / 1e9:.1f} ({settings})", *(f"{r['peaks'][how] / 1e9:.1f}" for how in TECHNIQUES),
            f"{r['blocks'] / 1e9:.1f} · {r['rest'] / 1e9:.1f}", r["where"],
        ))  # fmt: skip
    heads = ("recipe", "images per GPU", "as it is", *TECHNIQUES, "kept by blocks · the rest", "the peak is in the")
    advice = "\n".join(f"* {r['recipe']}, {CARD}: {r['advice']}" for r in section["rows"])
    return f"{tables.table(heads, body)}\n\n{advice}\n\n{tables.machine(section['environment'])}"


def measured_table(section: dict[str, Any]) -> str:
    """Predicted beside measured."""
    body = []
    for r in section["rows"]:
        beyond = [r[key] - r["held"] for key in ("predicted", "measured")]
        body.append((
            f"{r['head']}, {r['channels']} channels, {r['precision']}", r["checkpointing"],
            "compiled" if r["compiled"] else "plain PyTorch", f"{r['measured'] / 1e6:,.0f}",
            f"{r['predicted'] / 1e6:,.0f}", f"{100 * (r['predicted'] / r['measured'] - 1):+.1f} %",
            f"{100 * (beyond[0] / beyond[1] - 1):+.1f} %",
        ))  # fmt: skip
    heads = (
        "case", "checkpointing", "pooling like", "measured MB", "predicted MB", "off by", "off by, without what stays",
    )  # fmt: skip
    worst = max(abs(r["predicted"] / r["measured"] - 1) for r in section["rows"] if r["compiled"])
    line = f"The largest deviation with pooling like the compiled operator is {100 * worst:.1f} %."
    return f"{tables.table(heads, body)}\n\n{line}\n\n{tables.machine(section['environment'])}"
