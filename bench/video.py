"""``python -m bench video``: speed and memory of 3-D Swins, ours beside torchvision's with the same weights; films decoded; runs."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import decoding, segment, tables, video_runs
from bench.cases import TOLERANCE, distance, give_back_freed_memory, own_process, reset_peak, resident_peak
from bench.contenders import SIZES, Cannot, randomise, receive
from bench.detectors import TRIAL
from bench.progress import say
from bench.segment import Found, Runner
from bench.speed import Row, compared, speed_table
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import from_official

SECTIONS = ("actions", "speed", "decode")
MODES = ("training", "inference")
CLASSES = 400
OURS = ("swinscale V1-T", "swinscale V2-T")
SAME = ("torchvision swin3d_t",)
"""With the weights of the first of ours."""
CONTENDERS = (*OURS, *SAME)
BASES = {1: "swin3d_tiny_patch244_window877_224", 2: "swin3dv2_tiny_window888_256"}
FRAMES = {"cpu": 16, "cuda": 32}
SIZE = 224
"""Side of the frames. On smaller ones maps are smaller than a window, and torchvision takes other rows of its bias table."""
KEYS = ("device", "threads", "mode", "dtype", "frames", "size", "batch")
"""What a result is the result of."""


@dataclass(frozen=True)
class Speed(segment.Speed):
    """One measurement: ``CONTENDERS`` on one batch of random clips; see ``segment.Speed``.

    Args:
        frames: of a clip.
    """

    frames: int = 16

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Clips (batch, 3, frames, size, size), and their classes (batch,)."""
        draw = torch.Generator().manual_seed(1)
        clips = torch.randn(self.batch, 3, self.frames, self.size, self.size, generator=draw)
        target = torch.randint(CLASSES, (self.batch,), generator=draw)
        return clips.to(self.device), target.to(self.device)

    def build(self, name: str) -> nn.Module:
        """One of ``CONTENDERS`` in the mode that is measured."""
        return build(name, self).to(self.device).train(self.mode == "training")


class Classifier(nn.Module):
    """A model of clips as ``Runner`` calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) → logits (B, K)."""
        logits: Tensor = self.model(clips)
        return logits

    def losses(self, clips: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy."""
        return {"loss": nn.functional.cross_entropy(self(clips).float(), target)}


def network(version: int, speed: Speed) -> SwinConfig:
    """Swin-T without stochastic depth; V2 has the windows of V1, so that both have as many tokens to compare."""
    window = (2, 2, 2) if speed.tiny else (8, 7, 7)
    size = (speed.frames, speed.size, speed.size)
    shape = TRIAL if speed.tiny else SIZES["tiny"]
    return model_config(
        BASES[version], img_size=size, window_size=window, num_classes=CLASSES, drop_path_rate=0.0, **shape
    )


def build(name: str, speed: Speed) -> Classifier:
    """One of ``CONTENDERS``, no parameter of it trivial; torchvision's has the weights of the first of ours.

    Raises:
        Cannot: with the reason.
    """
    config = network(2 if name == OURS[1] else 1, speed)
    ours = randomise(SwinTransformer(config))
    if name in OURS:
        return Classifier(ours)
    ensure_torchvision()
    try:
        video = importlib.import_module("torchvision.models.video.swin_transformer")
    except ImportError as error:
        raise Cannot(f"torchvision is not installed, or has no video models: {error}") from error
    theirs = video.SwinTransformer3d(
        list(config.patch_size),
        config.embed_dim,
        list(config.depths),
        list(config.num_heads),
        list(config.stage_windows[0]),
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )
    receive(theirs, from_official(ours.state_dict(), "torchvision", config))
    return Classifier(theirs)


def measure(speed: Speed, repeats: int, memory: bool) -> Row:
    """Everybody on the same batch in alternation, after those with the same weights have given the same numbers."""
    threads = torch.get_num_threads()
    say(f"{speed.mode} {speed.dtype}, {speed.batch} × {speed.frames}×{speed.size}×{speed.size}, {threads} threads")
    expected: dict[str, Found] = {}
    rows = compared(
        CONTENDERS,
        lambda name: _prepared(speed, name, expected, memory),
        ours=OURS,
        device=speed.device,
        batch=speed.batch,
        repeats=repeats,
        warm_up=int(speed.mode == "training"),  # everybody has made a call, but no step
        memory=(lambda name: peak_memory(speed, name)) if memory and speed.device == "cpu" else None,
    )
    return {**dataclasses.asdict(speed), "threads": threads, "contenders": rows}


def _prepared(speed: Speed, name: str, expected: dict[str, Found], memory: bool) -> tuple[Runner, Row]:
    """A contender after its first call, and what that showed; on a GPU also its memory while it runs alone.

    Args:
        expected: what the first of ours gave, which this fills in.
    """
    gpu = speed.device == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    model = speed.build(name)
    start = time.perf_counter()
    runner = Runner(speed, model)
    found = runner.check()
    if gpu:
        torch.cuda.synchronize()
    row: Row = {"first_batch_s": round(time.perf_counter() - start, 3)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    if name == OURS[0]:
        expected[name] = found
    elif name in SAME:
        if OURS[0] not in expected:
            raise Cannot(f"{OURS[0]} gave nothing to compare with")
        row["difference"] = float(f"{distance(found, expected[OURS[0]]):.3g}")
        if row["difference"] > TOLERANCE[speed.dtype]:
            raise Cannot(f"outputs differ by {row['difference']:.2g}")
    if gpu and memory:
        runner(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        runner(1)
        torch.cuda.synchronize()
        row["memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return runner, row


def peak_memory(speed: Speed, name: str) -> int | None:
    """Bytes by which one contender's peak rises above its built model, alone in a fresh process; None if that failed."""
    found = own_process({"video": name, **dataclasses.asdict(speed)})
    return found["bytes"] if found else None


def run_alone(spec: dict[str, Any]) -> dict[str, Any]:
    """What ``peak_memory`` runs in its own process."""
    spec = dict(spec)
    torch.set_num_threads(spec.pop("threads"))
    name, speed = spec.pop("video"), Speed(**spec)
    model = speed.build(name)
    gc.collect()
    give_back_freed_memory()
    before = reset_peak()
    runner = Runner(speed, model)
    for index in range(2 if speed.mode == "training" else 1):  # a second step has the optimizer's moments
        runner(index)
    return {"bytes": resident_peak() - before}


def parts(content: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """What a page can show: ``actions`` and ``confusion``, ``speed``, ``speed-gpu``, ``decode``, and ``machine`` of the last three."""
    made: dict[str, Callable[[], str]] = {}
    if runs := content.get("actions"):
        made["actions"] = lambda: video_runs.actions_table(runs)
        made["confusion"] = lambda: video_runs.confusion_table(runs)
    for name, device in (("speed", "cpu"), ("speed-gpu", "cuda")):
        cases = [case for case in content.get("speed", []) if case["device"] == device]
        if cases:
            made[name] = lambda cases=cases: table(cases)  # type: ignore[misc]
    decoded = content.get("decode", [])
    if decoded:
        made["decode"] = lambda: decoding.table(decoded)
    rows = [*content.get("speed", []), *decoded]
    if rows:
        made["machine"] = lambda: "\n\n".join(dict.fromkeys(tables.machine(row["environment"]) for row in rows))
    return made


def table(cases: Sequence[Row]) -> str:
    """A row per contender of each case, and below what is the same for all of them."""
    found = speed_table(cases, OURS, title).replace("images/s", "clips/s ", 1)
    return (
        f"{found}\n\nRandom weights and random clips, {CLASSES} classes, windows of 8×7×7 tokens. Training is forward, cross entropy, "
        f"backward and an AdamW step, without stochastic depth. `{'`, `'.join(SAME)}` has the weights of `{OURS[0]}`; "
        f'"difference" is that of their logits, or of loss and gradients. Nobody else has a V2 for clips: neither torchvision, timm '
        f"nor transformers."
    )


def title(case: Row) -> str:
    """Mode, precision, clips and threads of a measurement."""
    where = f", {case['threads']} thread{'s' * (case['threads'] > 1)}" if case["device"] == "cpu" else ""
    return f"{case['mode']} {case['dtype']}, {case['batch']} × {case['frames']}×{case['size']}²{where}"
