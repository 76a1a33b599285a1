"""Files of results: JSON with the machine, the versions and the command, rewritten as a whole whenever something is added."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from swinscale.manifest import environment as run_environment

FOLDER = Path(__file__).parent / "results"
MORE = ("transformers", "openvino", "onnxruntime", "triton")


def environment(arguments: Sequence[str]) -> dict[str, Any]:
    """Date, versions, machine, commit and command line, with paths shortened to their last part."""
    found = run_environment()
    for name in MORE:
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found["versions"][name] = None
    words = [Path(word).name if os.sep in word else word for word in arguments]
    found["command"] = " ".join(["python -m bench", *words])
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["machine"] |= {"gpu_memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def write(file: Path, content: dict[str, Any]) -> None:
    """In one step, so that a stop never leaves half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


def read(file: Path) -> dict[str, Any] | None:
    """An earlier file, if there is one that can be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
