"""swinscale: Swin Transformer V1 and V2, pre-trained, scaled, transferred and fine-tuned in plain PyTorch.

``swinscale.create_model("swinv2_tiny_window8_256")``, ``swinscale.from_pretrained("runs/demo/finetuned/best")``.
Names are loaded when they are first used, so that ``import swinscale`` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "UsageError": "swinscale.errors",
    "SwinConfig": "swinscale.models",
    "SwinTransformer": "swinscale.models",
    "create_model": "swinscale.models",
    "list_models": "swinscale.models",
    "from_pretrained": "swinscale.weights",
    "load_weights": "swinscale.weights",
    "push_to_hub": "swinscale.hub",
    "save_pretrained": "swinscale.weights",
    "transfer": "swinscale.weights",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'swinscale' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
