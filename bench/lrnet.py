"""``python -m bench lrnet``: speed and memory of LR-Net, its layers with and without copies of their neighbourhoods, beside a Swin."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import segment, tables
from bench.cases import TOLERANCE, distance, give_back_freed_memory, own_process, reset_peak, resident_peak
from bench.contenders import Cannot
from bench.progress import say
from bench.segment import Found, Runner
from bench.speed import Row, compared, speed_table
from bench.video import Classifier
from swinscale.models import create_model
from swinscale.models.lrnet import LocalRelation
from swinscale.torchvision_cpu import ensure_torchvision

NAMES = {False: ("lrnet50", "swin_tiny_patch4_window7_224"), True: ("lrnet_micro", "swin_micro_patch2_window4_32")}
OURS = ("swinscale LR-Net",)
UNFOLDED, SWIN, RESNET = "LR-Net, neighbourhoods copied", "swinscale Swin V1-T", "timm ResNet-50"
CONTENDERS = (*OURS, UNFOLDED, SWIN, RESNET)
CLASSES = 1000
KEYS = ("device", "threads", "mode", "dtype", "size", "batch")
"""What a result is the result of."""


@dataclass(frozen=True)
class Speed(segment.Speed):
    """One measurement: ``CONTENDERS`` on one batch of random images; see ``segment.Speed``."""

    size: int = 224

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, size, size), and their classes (batch,)."""
        draw = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=draw)
        return images.to(self.device), torch.randint(CLASSES, (self.batch,), generator=draw).to(self.device)

    def build(self, name: str) -> nn.Module:
        """One of ``CONTENDERS`` in the mode that is measured."""
        return Classifier(build(name, self.tiny)).to(self.device).train(self.mode == "training")


class Unfolded(LocalRelation):
    """The same layer, with the neighbours of each place side by side in memory, as a plain implementation has them."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ceil(H / stride), ceil(W / stride))"""
        k, step, groups = self.kernel_size, self.stride, self.query.out_channels
        query, key = self.query(x[:, :, ::step, ::step]), self.key(x)
        size = query.shape[-2:]

        def near(maps: Tensor, empty: float) -> Tensor:
            padded = F.pad(maps, (k // 2,) * 4, value=empty)
            return F.unfold(padded, k, stride=step).unflatten(1, (maps.shape[1], k * k)).unflatten(-1, size)

        inside = near(torch.ones_like(key[:1, :1]), 0.0)
        keys, q = near(key, 0.0), query[:, :, None]
        kinds = {
            "product": lambda: q * keys,
            "squared": lambda: -((q - keys) ** 2),
            "absolute": lambda: -(q - keys).abs(),
        }
        logits = kinds[self.similarity]() + self.geometry()[..., None, None]
        weights = logits.float().masked_fill(inside == 0, -torch.inf).softmax(2).to(x.dtype)
        values = near(F.pad(x, (0, 0, 0, 0, 0, groups * self.shared - x.shape[1])), 0.0).unflatten(1, (groups, -1))
        out = torch.einsum("bgkhw,bgmkhw->bgmhw", weights, values).flatten(1, 2)[:, : x.shape[1]]
        return self.proj(out)


def build(name: str, tiny: bool) -> nn.Module:
    """One of ``CONTENDERS``; both kinds of LR-Net have the same weights.

    Raises:
        Cannot: with the reason.
    """
    torch.manual_seed(0)
    lrnet, swin = NAMES[tiny]
    if name == SWIN:
        return create_model(swin, num_classes=CLASSES, drop_path_rate=0.0)
    if name == RESNET:
        ensure_torchvision()
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise Cannot(f"timm is not installed: {error}") from error
        return timm.create_model("resnet50", num_classes=CLASSES)
    model = create_model(lrnet, num_classes=CLASSES)
    if name == UNFOLDED:
        for module in model.modules():
            if isinstance(module, LocalRelation):
                module.__class__ = Unfolded
    return model


def measure(speed: Speed, repeats: int, memory: bool) -> Row:
    """Everybody on the same batch in alternation, after both kinds of LR-Net have given the same numbers."""
    threads = torch.get_num_threads()
    say(f"{speed.mode} {speed.dtype}, {speed.batch} × {speed.size}×{speed.size}, {threads} threads")
    expected: dict[str, Found] = {}
    rows = compared(
        CONTENDERS,
        lambda name: _prepared(speed, name, expected),
        ours=OURS,
        device=speed.device,
        batch=speed.batch,
        repeats=repeats,
        memory=(lambda name: peak_memory(speed, name)) if memory and speed.device == "cpu" else None,
    )
    return {**dataclasses.asdict(speed), "threads": threads, "contenders": rows}


def _prepared(speed: Speed, name: str, expected: dict[str, Found]) -> tuple[Runner, Row]:
    start, runner = time.perf_counter(), Runner(speed, speed.build(name))
    found = runner.check()
    row: Row = {"first_batch_s": round(time.perf_counter() - start, 3)}
    row["parameters"] = sum(p.numel() for p in runner.model.parameters())
    if name in OURS:
        expected[name] = found
    elif name == UNFOLDED:
        row["difference"] = float(f"{distance(found, expected[OURS[0]]):.3g}")
        if row["difference"] > TOLERANCE[speed.dtype]:
            raise Cannot(f"outputs differ by {row['difference']:.2g}")
    return runner, row


def peak_memory(speed: Speed, name: str) -> int | None:
    """Bytes by which one contender's peak rises above its built model, alone in a fresh process; None if that failed."""
    found = own_process({"lrnet": name, **dataclasses.asdict(speed)})
    return found["bytes"] if found else None


def run_alone(spec: dict[str, Any]) -> dict[str, Any]:
    """What ``peak_memory`` runs in its own process."""
    spec = dict(spec)
    torch.set_num_threads(spec.pop("threads"))
    name, speed = spec.pop("lrnet"), Speed(**spec)
    model = speed.build(name)
    gc.collect()
    give_back_freed_memory()
    before = reset_peak()
    runner = Runner(speed, model)
    for index in range(2 if speed.mode == "training" else 1):  # a second step has the optimizer's moments
        runner(index)
    return {"bytes": resident_peak() - before}


def parts(content: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """What a page can show."""
    rows = content["speed"]
    return {
        "speed": lambda: table(rows),
        "machine": lambda: "\n\n".join(dict.fromkeys(tables.machine(row["environment"]) for row in rows)),
    }


def table(cases: list[Row]) -> str:
    """A row per contender, and below what is compared."""
    return (
        f"{speed_table(cases, OURS, segment.title)}\n\nLR-Net-50, Swin V1-T and timm's ResNet-50 from random weights on random images. Training is "
        f"forward, cross entropy, backward and an AdamW step. `{UNFOLDED}` has the same weights and copies the 49 neighbours of each "
        f'place side by side, as a plain implementation does; "difference" is that of its logits, or of loss and gradients.'
    )
