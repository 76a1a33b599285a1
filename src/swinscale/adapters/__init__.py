"""Our backbones inside other libraries: one small module per library, which is imported by name and needs that library.

``swinscale.adapters.timm`` · ``.transformers`` · ``.torchvision`` · ``.segmentation_models``. See ``docs/interoperate.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from swinscale.errors import UsageError
from swinscale.torchvision_cpu import ensure_torchvision

REQUIREMENTS = {
    "timm": "timm>=1.0.31",
    "transformers": "transformers>=5.23",
    "torchvision": "torchvision>=0.26",
    "segmentation_models_pytorch": "segmentation-models-pytorch>=0.6",
}


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Around imports of another library: a missing or too old one is a ``UsageError`` that says how to install it."""
    try:
        ensure_torchvision()
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        wanted = REQUIREMENTS[package]
        raise UsageError(f"This adapter needs {wanted} ({error.msg}): pip install '{wanted}'") from error
