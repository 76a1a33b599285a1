"""Speed and memory of Mask R-CNN, ours beside torchvision's: one training step, and one look at a batch of photos."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, give_back_freed_memory, own_process, reset_peak, resident_peak
from bench.contenders import SIZES
from bench.detectors import TRIAL, SwinPyramid, TorchvisionDetector, resnet_pyramid, torchvision_task
from bench.progress import say
from bench.speed import compared
from swinscale import torchvision_cpu
from swinscale.data import normalisation
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import detection_eval_transform
from swinscale.errors import UsageError
from swinscale.evaluation import to_device
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.models import SwinTransformer
from swinscale.recipes.detection import DetectionDataConfig, open_detection_sources
from swinscale.recipes.parts import dense_model
from swinscale.tasks.base import Batch
from swinscale.tasks.detect import Detect

CANDIDATES = 1000
"""Pairs of region and class per image that pass the score: an untrained detector would find nothing, or everything."""
OURS = ("swinscale V1-T", "swinscale V2-T")
CONTENDERS = (*OURS, "torchvision ResNet-50", "torchvision Swin-T", "torchvision Swin V2-T")


@dataclass(frozen=True)
class Speed:
    """One measurement: ``CONTENDERS`` on one batch of photos. JSON-ready, for a process of its own.

    Args:
        mode: "training" (forward, backward, AdamW step) or "inference" (masks of the whole images included).
        dtype: "fp32", or another of ``DTYPES`` under autocast.
        size: short side of the photos.
        tiny: small backbones and heads, to try the code.
    """

    data: str
    mode: str
    dtype: str = "fp32"
    device: str = "cpu"
    size: int = 320
    batch: int = 2
    tiny: bool = False

    @property
    def config(self) -> DetectConfig:
        """Ours by default: as torchvision, 2000 or 1000 anchors per level compete; 1000 proposals and 512 regions."""
        if not self.tiny:
            return DetectConfig()
        small = {"channels": 16, "fc_channels": 32, "regions": 32}
        return DetectConfig(proposals=(60, 60), proposals_per_level=(100, 100), **small)

    def photos(self) -> tuple[Batch, list[str]]:
        """The first ``batch`` training photos that are wider than high and have objects, and the names of all classes."""
        source, _ = open_detection_sources(DetectionDataConfig(train=self.data), self.config, 0)
        chosen = [
            i
            for i, image in enumerate(source.images)
            if image.width > image.height and any(not thing["iscrowd"] for thing in source.annotations[i])
        ][: self.batch]
        if len(chosen) < self.batch:
            raise UsageError(
                f"--batch {self.batch}, but {Path(self.data).name} has {len(chosen)} wide photos with objects."
            )
        transform = detection_eval_transform(*normalisation(3), short=self.size, long=round(self.size * 1333 / 800))
        dataset = DetectionDataset(source, transform)
        batch = dataset.collate([dataset[0, i] for i in chosen])
        return to_device(batch, torch.device(self.device)), source.classes

    def build(self, name: str, classes: Sequence[str]) -> Detect:
        """One of ``CONTENDERS`` with random weights; nothing is dropped at random."""
        shape, config = TRIAL if self.tiny else SIZES["tiny"], self.config
        torch.manual_seed(0)
        if name in OURS:
            base = {"swinscale V1-T": "swin_tiny_patch4_window7_224", "swinscale V2-T": "swinv2_tiny_window8_256"}[name]
            swin = dataclasses.replace(dense_model(base, 0.0), **shape)
            task = Detect(Detector(SwinTransformer(swin), len(classes), config), classes)
            task.init_weights(0)
        elif name == "torchvision ResNet-50":
            task = torchvision_task(resnet_pyramid(18 if self.tiny else 50, config.channels), classes, config)
        else:
            version = {"torchvision Swin-T": 1, "torchvision Swin V2-T": 2}[name]
            task = torchvision_task(SwinPyramid(version, shape, config.channels), classes, config)
        return task.to(self.device).train(self.mode == "training")


class Runner:
    """A detector as something to call: one training step, or one look at the batch."""

    def __init__(self, speed: Speed, task: Detect, batch: Batch):
        self.speed, self.task, self.batch = speed, task, batch
        self.sizes = [(int(height), int(width)) for height, width in batch["size"].tolist()]
        if speed.mode == "training":
            fused = speed.device == "cuda"
            self.optimizer = torch.optim.AdamW(task.parameters(), lr=1e-5, weight_decay=0.05, fused=fused or None)
        else:
            settle(task, batch["image"])
            set_score(task, float(self._threshold()))

    def __call__(self, index: int) -> Any:
        """Training: the loss. Inference: the masks (n, h, w) bool of each image."""
        if self.speed.mode == "inference":
            with torch.inference_mode(), self._autocast():
                return self._masks()
        with self._autocast():
            loss, _ = self.task(self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _masks(self) -> list[Tensor]:
        model, images = self.task.model, self.batch["image"]
        if isinstance(model, TorchvisionDetector):
            return model.pictures(images, self.sizes)
        found = model.detect(images, self.sizes)
        return [f.full_masks(*size) for f, size in zip(found, self.sizes, strict=True)]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.speed.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.speed.device, DTYPES[self.speed.dtype])

    def _threshold(self) -> Tensor:
        """The score that ``CANDIDATES`` pairs of region and class per image reach."""
        seen: list[Tensor] = []
        model = self.task.model
        theirs = isinstance(model, TorchvisionDetector)
        layer = model.net.roi_heads.box_predictor.cls_score if theirs else model.roi.box_heads[0].classify
        set_score(self.task, 0.999)
        handle = layer.register_forward_hook(lambda *call: seen.append(call[2].float().softmax(-1)))
        try:
            with torch.inference_mode(), self._autocast():
                model.detect(self.batch["image"], self.sizes)
        finally:
            handle.remove()
        scores = torch.cat([s[:, 1:] if theirs else s[:, :-1] for s in seen]).flatten()
        return scores.topk(min(CANDIDATES * len(self.sizes), len(scores))).values[-1]


def settle(task: Detect, images: Tensor) -> None:
    """Batch norms take the statistics of ``images``: with those that they begin with, values double from block to block."""
    norms = [module for module in task.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = None  # the mean over all batches, of which there is one
    with torch.no_grad():
        task.backbone(images)
    for norm in norms:
        norm.eval()


def set_score(task: Detect, score: float) -> None:
    """Detections need this score from now on."""
    if isinstance(task.model, TorchvisionDetector):
        task.model.net.roi_heads.score_thresh = score
    else:
        task.model.roi.config = dataclasses.replace(task.model.roi.config, score=score)


def measure(speed: Speed, repeats: int, min_seconds: float, memory: bool) -> dict[str, Any]:
    """Everybody on the same batch in alternation; a row each, whatever became of it."""
    say(f"{speed.mode} {speed.dtype}, short side {speed.size}")
    batch, classes = speed.photos()
    own = memory and speed.device == "cpu"
    rows = compared(
        CONTENDERS,
        lambda name: _prepared(speed, name, classes, batch, memory),
        ours=OURS,
        device=speed.device,
        batch=speed.batch,
        repeats=repeats,
        min_seconds=min_seconds,
        memory=(lambda name: peak_memory(speed, name)) if own else None,
    )
    plain = torchvision_cpu._library is not None
    config = speed.config
    return {
        **{key: value for key, value in dataclasses.asdict(speed).items() if key not in ("data", "tiny")},
        "data": Path(speed.data).name,
        "inputs": list(batch["image"].shape[-2:]),
        "objects": sum(len(target["boxes"]) for target in batch["targets"]),
        "classes": len(classes),
        "channels": config.channels,
        "proposals": list(config.proposals),
        "regions": config.regions,
        "operators": "plain PyTorch" if plain else "torchvision's compiled ones",
        "contenders": rows,
    }


def _prepared(
    speed: Speed, name: str, classes: Sequence[str], batch: Batch, memory: bool
) -> tuple[Runner, dict[str, Any]]:
    """A contender after its first call, and what that showed; on a GPU also its memory while it runs alone."""
    gpu = speed.device == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    task = speed.build(name, classes)
    start = time.perf_counter()
    runner = Runner(speed, task, batch)
    first = runner(0)
    if gpu:
        torch.cuda.synchronize()
    row: dict[str, Any] = {"first_batch_s": round(time.perf_counter() - start, 3)}
    row["parameters"] = sum(p.numel() for p in task.parameters())
    if speed.mode == "training":
        row["loss"] = float(first)
        if not math.isfinite(row["loss"]):
            raise ValueError(f"the loss is {row['loss']}")
    else:
        row["detections"] = [len(masks) for masks in first]
    if gpu and memory:
        torch.cuda.reset_peak_memory_stats()
        runner(1)
        torch.cuda.synchronize()
        row["memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return runner, row


def peak_memory(speed: Speed, name: str) -> int | None:
    """Bytes by which one contender's peak rises above its built model, alone in a fresh process; None if that failed."""
    found = own_process({"detector": name, **dataclasses.asdict(speed)})
    return found["bytes"] if found else None


def run_alone(spec: dict[str, Any]) -> dict[str, Any]:
    """What ``peak_memory`` runs in its own process."""
    spec = dict(spec)
    torch.set_num_threads(spec.pop("threads"))
    name, speed = spec.pop("detector"), Speed(**spec)
    batch, classes = speed.photos()
    task = speed.build(name, classes)
    if speed.mode == "inference":
        runner = Runner(speed, task, batch)  # its first look sets the score
    gc.collect()
    give_back_freed_memory()
    before = reset_peak()
    if speed.mode == "training":
        runner = Runner(speed, task, batch)
    for index in range(2):
        runner(index)
    return {"bytes": resident_peak() - before}
