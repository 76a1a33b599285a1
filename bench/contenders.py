"""The implementations that are compared, built with the same weights.

A ``Setting`` says which network (size, window, image), a ``Contender`` who computes it and how. Ours is built first, every
parameter gets a random value, and the others receive it through ``swinscale.weights`` in their own layout. Who cannot be
built says why (``Cannot``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, variants
from swinscale.ops import choose_backend
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import from_official
from swinscale.weights.layouts import DERIVED

SIZES: dict[str, dict[str, Any]] = {
    "tiny": variants.TINY,
    "small": variants.SMALL,
    "base": variants.BASE,
    "large": variants.LARGE,
    "femto": variants.FEMTO,
    "nano": variants.NANO,
    "trial": {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)},  # to try the harness itself
}
MODELS = [f"{family}_{size}" for family in ("swinv2", "swin") for size in SIZES]
PEERS = ("timm", "transformers", "torchvision")
OURS = "swinscale"


class Cannot(Exception):
    """An implementation cannot express or run a setting; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """A network: ``model`` is a name of ``MODELS``, the other two are in tokens and pixels."""

    model: str
    window: int
    size: int

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UsageError(
                f"Unknown model '{self.model}'.{suggest(self.model, MODELS)} Allowed: {', '.join(MODELS)}."
            )

    @property
    def config(self) -> SwinConfig:
        """Without stochastic depth. Where windows reach past a map, padding takes part, since the others have it so."""
        family, _, size = self.model.partition("_")
        config = SwinConfig(
            version=2 if family == "swinv2" else 1,
            window_size=self.window,
            img_size=self.size,
            drop_path_rate=0.0,
            **SIZES[size],
        )
        maps = zip(config.stage_maps(), config.stage_windows, strict=True)
        padded = any(n % w for size, window in maps for n, w in zip(size, window, strict=True))
        return dataclasses.replace(config, pad="legacy") if padded else config

    def __str__(self) -> str:
        family, _, size = self.model.partition("_")
        letter = {"tiny": "T", "small": "S", "base": "B", "large": "L"}.get(size, size)
        return f"V{2 if family == 'swinv2' else 1}-{letter} {self.size}/{self.window}"


@dataclass(frozen=True)
class Contender:
    """Who computes: ``project`` is ours, one of ``PEERS``, "official" or "openvino"; ``backend`` is for ours alone."""

    project: str = OURS
    backend: str = "auto"
    compiled: bool = False

    def __str__(self) -> str:
        backend = f" [{self.backend}]" if self.project == OURS and self.backend != "auto" else ""
        return f"{self.project}{backend}{' compiled' if self.compiled else ''}"

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""
        return self.project != OURS


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values of the size that they have in trained models, none of them trivial: a fresh V2 block is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim > 1 and "logit_scale" not in name and "bias_table" not in name
            std = 1 / math.sqrt(parameter[0].numel()) if matrix else 0.3
            values = torch.randn(parameter.shape, generator=generator) * std
            if name.endswith("weight") and parameter.ndim == 1:
                values += 1
            if "logit_scale" in name:
                values += math.log(10)
            parameter.copy_(values)
    return model


@lru_cache(maxsize=2)
def reference_weights(setting: Setting) -> dict[str, Tensor]:
    """The weights that everybody gets, under published names, in fp32 on the CPU."""
    return randomise(SwinTransformer(setting.config)).state_dict()


def build(contender: Contender, setting: Setting, device: str = "cpu", official: Path | None = None) -> nn.Module:
    """The model of a contender in evaluation mode, in fp32, not compiled.

    Raises:
        Cannot: with the reason.
    """
    if contender.project == OURS:
        try:
            choose_backend(contender.backend, device)
        except UsageError as error:
            if "Unknown" in str(error):
                raise
            raise Cannot(str(error)) from error
        with torch.device("meta"):  # without initial values, which would be replaced
            model = SwinTransformer(setting.config)
        model.load_state_dict({name: t.clone() for name, t in reference_weights(setting).items()}, assign=True)
        model.set_attention_backend(contender.backend)
        return model.to(device).eval()
    make, layout = _MAKERS["timm" if contender.project == "openvino" else contender.project]
    if contender.project != "official" and importlib.util.find_spec(contender.project) is None:
        raise Cannot(f"{contender.project} is not installed")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        ensure_torchvision()
        model = make(setting, official)
    receive(model, from_official(reference_weights(setting), layout, setting.config))
    return model.to(device).eval()


def receive(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Strict loading, except that buffers which follow from the configuration may be missing."""
    for name, tensor in (getattr(model, "model", model)).state_dict().items():
        if name in state and state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} there, {tuple(state[name].shape)} here"
            raise Cannot(f"its {name.rpartition('.')[2]} has another shape ({shapes})")
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not DERIVED.search(name)]
    if missing or unexpected:
        raise Cannot(f"its weights do not fit: {', '.join([*missing, *unexpected][:3])}")


def _timm(setting: Setting, official: Path | None) -> nn.Module:
    module = importlib.import_module(
        "timm.models.swin_transformer_v2" if _v2(setting) else "timm.models.swin_transformer"
    )
    build = module.SwinTransformerV2 if _v2(setting) else module.SwinTransformer
    return build(img_size=setting.size, window_size=setting.window, drop_path_rate=0.0, **_shape(setting))


def _transformers(setting: Setting, official: Path | None) -> nn.Module:
    transformers = importlib.import_module("transformers")
    kind = "Swinv2" if _v2(setting) else "Swin"
    config = getattr(transformers, f"{kind}Config")(
        image_size=setting.size, window_size=setting.window, drop_path_rate=0.0, num_labels=1000, **_shape(setting)
    )
    return _Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


class _Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self.model.load_state_dict(*arguments, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _torchvision(setting: Setting, official: Path | None) -> nn.Module:
    for stage, size in enumerate(setting.config.stage_maps()):
        if min(size) < setting.window:
            raise Cannot(f"torchvision pads the {size[0]}×{size[1]} map of stage {stage} up to its window")
    tv = importlib.import_module("torchvision.models.swin_transformer")
    kinds = {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2} if _v2(setting) else {}
    return tv.SwinTransformer(
        patch_size=[4, 4],
        window_size=[setting.window] * 2,
        stochastic_depth_prob=0.0,
        **_shape(setting),
        **kinds,
    )


def _official(setting: Setting, official: Path | None) -> nn.Module:
    assert official is not None
    name = "swin_transformer_v2" if _v2(setting) else "swin_transformer"
    file = official_checkout(official) / "models" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"official_{name}", file)
    assert spec and spec.loader
    module = sys.modules.get(f"official_{name}")
    if module is None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[f"official_{name}"] = module
    build = module.SwinTransformerV2 if _v2(setting) else module.SwinTransformer
    return build(img_size=setting.size, window_size=setting.window, drop_path_rate=0.0, **_shape(setting))


def official_checkout(path: Path) -> Path:
    """``path`` if it is a checkout of microsoft/Swin-Transformer.

    Raises:
        UsageError: if it is not.
    """
    for name in ("swin_transformer.py", "swin_transformer_v2.py"):
        if not (path / "models" / name).is_file():
            raise UsageError(f"--official {path}: not a checkout of microsoft/Swin-Transformer (no models/{name}).")
    return path


_MAKERS: dict[str, tuple[Callable[[Setting, Path | None], nn.Module], str]] = {
    "timm": (_timm, "timm"),
    "transformers": (_transformers, "transformers5"),
    "torchvision": (_torchvision, "torchvision"),
    "official": (_official, "official"),
}


def _v2(setting: Setting) -> bool:
    return setting.model.startswith("swinv2_")


def _shape(setting: Setting) -> dict[str, Any]:
    shape = SIZES[setting.model.partition("_")[2]]
    return {"embed_dim": shape["embed_dim"], "depths": list(shape["depths"]), "num_heads": list(shape["num_heads"])}


class OpenVino:
    """timm's model as an OpenVINO graph for this CPU, in fp32; the first call converts it."""

    def __init__(self, model: nn.Module):
        if importlib.util.find_spec("openvino") is None:
            raise Cannot("openvino is not installed")
        self.model, self.graph = model, cast(Any, None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.graph is None:
            ov = importlib.import_module("openvino")
            threads = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing says that sizes are fixed, which is meant
                self.graph = ov.compile_model(ov.convert_model(self.model, example_input=x), "CPU", threads)
        return torch.from_numpy(self.graph(x.numpy())[0])


def vit(size: str, image: int) -> tuple[nn.Module, int]:
    """timm's plain ViT with patches of 16 pixels, and its multiply-accumulates for one image, counted as ours are."""
    if importlib.util.find_spec("timm") is None:
        raise Cannot("timm is not installed")
    ensure_torchvision()
    model = importlib.import_module("timm").create_model(f"vit_{size}_patch16_224", img_size=image)
    dim, depth = model.embed_dim, len(model.blocks)
    patches = (image // 16) ** 2
    tokens = patches + model.num_prefix_tokens
    macs = patches * dim * 3 * 16**2 + depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + dim * model.num_classes
    return randomise(model).eval(), macs


def reason(error: BaseException) -> str:
    """The first telling line of an error, without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(/[\w.+-]+){2,}", lambda m: m[0].rsplit("/", 1)[1], lines[0] if lines else "")[:160]
    return text if isinstance(error, Cannot | UsageError) else f"{type(error).__name__}: {text}"
