"""Where and with what something ran: versions, machine, commit. Written into every run and every measured figure."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swinscale.config import to_dict
from swinscale.optim import decay_table

PACKAGES = ("swinscale", "torch", "torchvision", "timm", "numpy", "safetensors", "torchmetrics")


def environment() -> dict[str, Any]:
    """Date, versions, machine and command line; nothing that names a host or a user."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "torch": torch.__version__,  # says which build it is
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "commit": _commit(),
        "command": " ".join(["swinscale", *sys.argv[1:]]) if Path(sys.argv[0]).name == "swinscale" else None,
    }


def describe_run(run: Any) -> dict[str, Any]:
    """What a run (``train._Run``) is: code, machine, data, effective batch and rates; JSON-ready."""
    config = run.config
    return {
        **environment(),
        **subject(run.task, train=run.train_loader.dataset, eval=run.eval_loader.dataset),
        **config.optim.in_steps(config.batch_size, run.steps_per_epoch),
        "seed": config.seed,
        "micro_batch": math.ceil(config.batch_size / run.world.size / run.accumulate),
        "accumulation": run.accumulate,
        "processes": run.world.size,
        "total_steps": run.total_steps,
        "precision": run.precision,
        "device": str(run.world.device),
        "memory": to_dict(config.memory),
        "parameter_groups": decay_table(run.groups),
    }


def changed_data(run: Any) -> list[tuple[str, str]]:
    """A warning if a resumed run sees other images than it began with."""
    try:
        before = json.loads((run.directory / "manifest.json").read_text())["data"]
    except (OSError, ValueError, KeyError):
        return []
    now = subject(run.task, train=run.train_loader.dataset, eval=run.eval_loader.dataset)["data"]
    parts = [part for part in now if part in before and now[part] != before[part]]
    text = f"The {' and '.join(parts)} images are not those that the run began with; it goes on with what is there now."
    return [("changed_data", text)] if parts else []


def broken_data(**data: Any) -> list[tuple[str, str]]:
    """A warning for each part ("train", "eval") of which something could not be opened."""
    warnings: list[tuple[str, str]] = []
    for part, images in data.items():
        problems: list[tuple[str, str]] = getattr(images, "problems", [])
        told = "; ".join(f"{name} ({reason})" for name, reason in problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        if problems and told not in (text for _, text in warnings):
            warnings.append((f"broken_{part}_data", f"Left out of the {part} images: {told}{more}"))
    return warnings


def subject(model: nn.Module, **data: Any) -> dict[str, Any]:
    """How many parameters learn, and from which images: data sets by their part ("train", "eval")."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **{f"{part}_images": len(images) for part, images in data.items()},
        "data": {part: images.fingerprint() for part, images in data.items()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """The commit of the checkout that this package is imported from, if it is one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
