"""``python -m bench video``: speed and memory of 3-D Swins, ours beside torchvision's with the same weights; films decoded; runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench import decoding, runner, tables, video_runs
from bench.contenders import SIZES, Cannot, randomise, receive
from bench.detectors import TRIAL
from bench.runner import Classifier
from bench.speed import Row, speed_table
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
class Speed(runner.Speed):
    """One measurement of video models: one batch of random clips; see ``runner.Speed``.

    Args:
        frames: of a clip.
    """

    kind: ClassVar[str] = "video"
    contenders: ClassVar[tuple[str, ...]] = CONTENDERS
    ours: ClassVar[tuple[str, ...]] = OURS
    same: ClassVar[tuple[str, ...]] = SAME

    frames: int = 16

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Clips (batch, 3, frames, size, size), and their classes (batch,)."""
        draw = torch.Generator().manual_seed(1)
        clips = torch.randn(self.batch, 3, self.frames, self.size, self.size, generator=draw)
        target = torch.randint(CLASSES, (self.batch,), generator=draw)
        return clips.to(self.device), target.to(self.device)

    def build(self, name: str) -> nn.Module:
        """One of ``CONTENDERS``."""
        return build(name, self)

    @property
    def shape(self) -> str:
        """Of a batch."""
        return f"{self.batch} × {self.frames}×{self.size}×{self.size}"


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
