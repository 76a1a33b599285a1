"""Checkpoints that a kill at any moment cannot spoil, and from which a run goes on exactly.

``checkpoints/step-00000120`` appears by one rename once everything in it is on disk: it is there and whole, or not there.
Random states are not stored: every random choice of a run depends on counters alone (``seeding.py``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swinscale.config import differences
from swinscale.errors import UsageError

PREFIX = "step-"


def claim_directory(
    directory: Path, record: dict[str, Any], resume: bool, write: bool, may_change: Collection[str] = ()
) -> bool:
    """Takes a run directory for the run described by ``record``; True if it holds a checkpoint to go on from.

    Args:
        write: give a new directory its ``config.json``; in one process only.
        may_change: names of settings that may differ from those the run was started with.

    Raises:
        UsageError: if it holds a run and ``resume`` is off, a run with other settings, or something that is no run.
    """
    steps = checkpoint_steps(directory / "checkpoints")
    if not steps:
        if (directory / "config.json").exists() and not (directory / "checkpoints").exists():
            raise UsageError(f"{directory} holds a model, not a run. Choose another directory with --out.")
        if write:
            # A run that ended before its first checkpoint begins again, and what it said is no part of the new one.
            (directory / "log.jsonl").unlink(missing_ok=True)
            shutil.rmtree(directory / "tensorboard", ignore_errors=True)
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_atomically(directory / "config.json", json.dumps(record, indent=2))
        return False
    if not resume:
        raise UsageError(
            f"{directory} already holds a run (step {steps[-1]}). Resume it, or choose another directory with --out."
        )
    written = json.loads((directory / "config.json").read_text())
    changed = [
        f"{name}: {before} then, {now} now"
        for name, before, now in differences(written, json.loads(json.dumps(record)))
        if name.rpartition(".")[2] not in may_change
    ]
    if changed:
        raise UsageError(
            f"{directory} was started with other settings ({'; '.join(changed[:3])}). "
            f"Resume it with the same ones, or choose another directory with --out."
        )
    return True


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in ``directory``, ascending."""
    names = (p.name.removeprefix(PREFIX) for p in directory.glob(PREFIX + "*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def save_checkpoint(
    directory: Path, step: int, modules: dict[str, nn.Module], state: dict[str, Any], keep: int
) -> Path:
    """Writes the modules' tensors (safetensors) and ``state`` (tensors, numbers, text) and drops old checkpoints.

    Args:
        modules: by file name; ``{"task": task, "ema": ema}``.
        state: what ``torch.load(weights_only=True)`` can read: optimiser state, counters.
        keep: how many checkpoints stay.
    """
    final = directory / f"{PREFIX}{step:08d}"
    temporary = directory / f".writing-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, module in modules.items():
            tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        torch.save({"step": step, **state}, temporary / "state.pt")
        for path in [*temporary.iterdir(), temporary]:
            _to_disk(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(
            f"Could not write the checkpoint {final}: {error}. Earlier checkpoints are untouched."
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _to_disk(directory)
    for old in checkpoint_steps(directory)[: -max(keep, 1)]:
        shutil.rmtree(directory / f"{PREFIX}{old:08d}", ignore_errors=True)
    return final


def load_checkpoint(
    directory: Path, modules: dict[str, nn.Module], device: torch.device, step: int | None = None
) -> dict[str, Any]:
    """Fills ``modules`` from the newest checkpoint (or that of ``step``) and returns its state.

    Raises:
        UsageError: if there is none, or it belongs to another model.
    """
    steps = checkpoint_steps(directory)
    if not steps or (step is not None and step not in steps):
        raise UsageError(
            f"No checkpoint {'' if step is None else f'of step {step} '}in {directory}; found steps: {steps}."
        )
    path = directory / f"{PREFIX}{steps[-1] if step is None else step:08d}"
    for name, module in modules.items():
        try:
            module.load_state_dict(load_file(path / f"{name}.safetensors"), strict=True)
        except (RuntimeError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"{path} was written by another model or recipe ({reason}). Choose another --out."
            ) from error
    return torch.load(path / "state.pt", map_location=device, weights_only=True)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file in one step."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    _to_disk(temporary)
    temporary.replace(path)


def _to_disk(path: Path) -> None:
    """Waits until the file or directory entry is on disk; systems that cannot sync directories are left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
