"""OpenMMLab's layouts: names, the channel order of patch merging, and the same outputs from its own backbones
(R-CKPT-1, 2, 3; SPEC 1.8).

The packages are optional. Their ``__init__`` modules import every model they have, some of which need compiled operators
or fail beside a current transformers, so a backbone is imported here without them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from random_models import random_swin, randomise
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import convert_state_dict, detect_layout, from_official, infer_config, load_weights, to_official
from swinscale.weights.arrange import check_merging_order, merging_from_unfold, merging_to_unfold


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- without the packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"version": 1}, {"version": 2}, {"version": 1, "ape": True}, {"main_norm_interval": 2}]
)
@pytest.mark.parametrize("depths", [(2, 2), (1, 3, 2)])
def test_round_trip_is_bit_exact(fields: dict[str, Any], depths: tuple[int, ...]) -> None:
    """R-CKPT-2."""
    model = random_swin(**fields, depths=depths, num_heads=(2, 4, 8)[: len(depths)], window_size=2)
    theirs = convert_state_dict(model.state_dict(), "mm")
    assert detect_layout(theirs) == "mm"
    assert all(name.startswith(("backbone.", "head.fc.")) for name in theirs)
    assert_same(convert_state_dict(theirs, "official"), model.state_dict())


class UnfoldMerging(nn.Module):
    """Patch merging with ``nn.Unfold``, the way OpenMMLab groups channels."""

    def __init__(self, dim: int, post_norm: bool):
        super().__init__()
        self.post_norm = post_norm
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if post_norm else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) → (B, H/2, W/2, 2D)"""
        batch, height, width, _ = x.shape
        x = nn.Unfold(2, stride=2)(x.movedim(-1, 1)).transpose(1, 2)
        x = self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))
        return x.view(batch, height // 2, width // 2, -1)


@pytest.mark.parametrize("version", [1, 2])
def test_the_exported_merging_is_right_for_unfold(version: int) -> None:
    """R-CKPT-3, the trap of the unfold order: the exported tensors give our outputs, ours as they are do not."""
    model = random_swin(version)
    merging, x = UnfoldMerging(24, version == 2), torch.randn(2, 6, 8, 24)
    ours = model.layers[0].downsample
    exported = from_official(model.state_dict(), "mm")
    stage = 0 if version == 1 else 1
    prefix = f"backbone.stages.{stage}.downsample."
    merging.load_state_dict(
        {n.removeprefix(prefix): t for n, t in exported.items() if n.startswith(prefix)}, strict=True
    )
    with torch.no_grad():
        assert relative_error(merging(x), ours(x)) <= 1e-5
        merging.load_state_dict(ours.state_dict())
        assert relative_error(merging(x), ours(x)) > 0.1


@pytest.mark.parametrize("version", [1, 2])
def test_a_dense_model_gives_its_backbone(version: int) -> None:
    """norm3 is the final norm; the norms of the other outputs and all heads are left out with one line."""
    model = random_swin(version, num_classes=0)
    state = convert_state_dict(model.state_dict(), "mm")
    state |= {"backbone.norm0.weight": torch.ones(24), "backbone.norm0.bias": torch.zeros(24)}
    state |= {"neck.lateral_convs.0.conv.weight": torch.zeros(8, 24, 1, 1), "rpn_head.rpn_cls.bias": torch.zeros(3)}
    official, notes = to_official(state)
    assert_same(official, model.state_dict())
    assert notes == ["4 tensors that belong to no backbone or classifier (neck, norm0, rpn_head)"]
    report = load_weights(random_swin(version, seed=1, num_classes=0), state)
    assert report.share == 1 and not report.missing and not report.unexpected and report.layout == "mm"


def trained_merging(dim: int, seed: int = 0) -> SwinTransformer:
    """A model whose merging shows, as trained ones do, that a channel's four neighbours matter alike."""
    model = random_swin(1, seed, embed_dim=dim, num_heads=(2, 4))
    gains = torch.rand(dim, generator=torch.Generator().manual_seed(seed)) + 0.5
    with torch.no_grad():
        model.layers[0].downsample.reduction.weight.mul_(gains.repeat(4))
    return model


def test_names_that_deny_the_channel_order_are_refused() -> None:
    """R-CKPT-3: published names over the unfold order, and the reverse, fail loudly where trained weights show it."""
    model = trained_merging(96)
    right = model.state_dict()
    assert_same(to_official(convert_state_dict(right, "mm"))[0], right)
    with pytest.raises(UsageError, match=r"channel order 'nn\.Unfold"):
        to_official(merging_to_unfold(right))
    renamed_only = convert_state_dict(merging_from_unfold(right), "mm")
    with pytest.raises(UsageError, match="channel order 'concatenated'"):
        to_official(renamed_only)


@pytest.mark.parametrize("gains", [(1.0, 1.0, 1.0, 1.0), (1.0, 1.3, 0.5, 2.0)], ids=["alike", "one counts more"])
def test_random_weights_show_no_channel_order(gains: tuple[float, ...]) -> None:
    """The check never fires by chance, nor where one of the four neighbours counts more than the others."""
    for seed in range(200):
        dim = (24, 96, 192)[seed % 3]
        weight = torch.randn(48, 4, dim, generator=torch.Generator().manual_seed(seed)) * torch.tensor(gains)[:, None]
        check_merging_order({"layers.0.downsample.reduction.weight": weight.flatten(1)}, unfold=False)
        check_merging_order({"layers.0.downsample.reduction.weight": weight.transpose(1, 2).flatten(1)}, unfold=True)


# --- the packages' own models ---------------------------------------------------------------------------------------


@functools.cache
def without_init(package: str) -> bool:
    """Makes the modules of an installed package importable without running its ``__init__`` modules; whether it is there."""
    if any(importlib.util.find_spec(needed) is None for needed in ("mmengine", "mmcv", package)):
        return False
    ensure_torchvision()
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    root = next(iter(spec.submodule_search_locations))
    for inner in ("", ".models", ".models.backbones"):
        bare = types.ModuleType(package + inner)
        bare.__path__ = [root + inner.replace(".", "/")]
        sys.modules[package + inner] = bare
    sys.modules.setdefault("mmcv._ext", _AnyOperator("mmcv._ext"))  # compiled operators, which no backbone here calls
    return True


def backbone_module(package: str, name: str) -> Any:
    """``package.models.backbones.name``; skips the test where the package is not installed."""
    if not without_init(package):
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(f"{package}.models.backbones.{name}")


class _AnyOperator(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def filled(theirs: nn.Module, seed: int) -> nn.Module:
    """Random values; OpenMMLab's ``eval`` returns nothing."""
    randomise(theirs, seed)
    return theirs


SMALL: dict[str, Any] = {"embed_dims": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8]}
OURS: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "img_size": 64, "num_classes": 0}


def mmpretrain_backbone(version: int, **fields: Any) -> nn.Module:
    arch = dict(SMALL) if version == 1 else {**SMALL, "extra_norm_every_n_blocks": fields.pop("extra_norm", 0)}
    name = "swin_transformer" if version == 1 else "swin_transformer_v2"
    module = backbone_module("mmpretrain", name)
    kind = module.SwinTransformer if version == 1 else module.SwinTransformerV2
    trained = {} if version == 1 else {"pretrained_window_sizes": fields.pop("trained", [0, 0, 0])}
    return filled(kind(arch=arch, img_size=64, window_size=4, out_indices=(2,), **trained, **fields), 1)


def load_backbone(theirs: nn.Module, export: dict[str, Tensor]) -> None:
    """Strict loading of what belongs to a backbone; only buffers that the peer computes itself may be missing."""
    state = {name.removeprefix("backbone."): t for name, t in export.items() if name.startswith("backbone.")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(n.rpartition(".")[2] in ("relative_position_index", "relative_coords_table") for n in missing)


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {}),
    (1, {"use_abs_pos_embed": True}, {"ape": True}),
    (2, {}, {}),
    (2, {"extra_norm": 2}, {"main_norm_interval": 2}),
    (2, {"trained": [3, 3, 2]}, {"pretrained_window_sizes": ((3, 3), (3, 3), (2, 2))}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("version", "there", "here"), CASES)
def test_mmpretrain_agrees_both_ways(version: int, there: dict[str, Any], here: dict[str, Any]) -> None:
    """R-CKPT-2: its backbone with our export gives our features, and ours with its weights gives its own."""
    theirs = mmpretrain_backbone(version, **there)
    ours = random_swin(version, **OURS, window_size=4, **here)
    images = torch.randn(2, 3, 64, 64)

    def compare() -> float:
        with torch.no_grad():
            return relative_error(theirs(images)[-1], ours.forward_features(images).movedim(-1, 1))

    assert compare() > 0.1
    load_backbone(theirs, convert_state_dict(ours.state_dict(), "mm"))
    assert compare() <= 1e-5
    filled(theirs, 5)
    report = load_weights(ours, {f"backbone.{n}": t for n, t in theirs.state_dict().items()})
    assert report.share == 1 and report.layout == "mm" and not report.missing and not report.unexpected
    assert compare() <= 1e-5
    assert infer_config(theirs.state_dict()) == ours.config  # R-CKPT-6: windows too, V2 from its buffers


@pytest.mark.filterwarnings("ignore")
def test_mmdetection_agrees_on_the_pyramid() -> None:
    """R-CKPT-2 for the dense model, at a size that needs padding: all outputs before their own norms."""
    module = backbone_module("mmdet", "swin")
    theirs = filled(module.SwinTransformer(**SMALL, window_size=7, strides=(4, 2, 2), out_indices=(0, 1, 2)), 1)
    ours = random_swin(1, **OURS, window_size=7, pad="legacy", small_map="pad")
    load_weights(ours, {f"backbone.{n}": t for n, t in theirs.state_dict().items()})
    images = torch.randn(1, 3, 76, 100)
    with torch.no_grad():
        mine = ours.forward_intermediates(images, intermediates_only=True, output_fmt="NHWC")
        for stage, (out, raw) in enumerate(zip(theirs(images), mine, strict=True)):
            norm = getattr(theirs, f"norm{stage}")
            assert relative_error(norm(raw).movedim(-1, 1), out) <= 1e-5
    load_backbone(filled(theirs, 3), {**convert_state_dict(ours.state_dict(), "mm"), **_outer_norms(theirs)})
    with torch.no_grad():
        assert relative_error(theirs(images)[-1], ours.forward_features(images).movedim(-1, 1)) <= 1e-5


def _outer_norms(theirs: nn.Module) -> dict[str, Tensor]:
    return {f"backbone.{n}": t for n, t in theirs.state_dict().items() if n.startswith(("norm0", "norm1"))}


VIDEO: dict[str, Any] = {
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "patch_size": (2, 4, 4),
    "img_size": (8, 32, 32),
    "window_size": (4, 4, 4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(8, 32, 32), (16, 32, 64), (6, 40, 40)])
def test_mmaction_agrees_both_ways(size: tuple[int, int, int]) -> None:
    """R-CKPT-2 for Video-Swin: clips whose maps are whole windows, several windows, and padded ones."""
    module = backbone_module("mmaction", "swin")
    arch = {"embed_dims": 24, "depths": [2, 2], "num_heads": [2, 4]}
    theirs = filled(module.SwinTransformer3D(arch, window_size=(4, 4, 4), out_indices=(1,), pretrained2d=False), 1)
    ours = randomise(SwinTransformer(SwinConfig(version=1, num_classes=3, pad="legacy", **VIDEO)))
    clips = torch.randn(1, 3, *size)

    def compare() -> float:
        with torch.no_grad():
            return relative_error(theirs(clips), ours.forward_features(clips).movedim(-1, 1))

    export = convert_state_dict(ours.state_dict(), "mm")
    assert detect_layout(export) == "mm-video" and "cls_head.fc_cls.weight" in export
    load_backbone(theirs, export)
    assert compare() <= 1e-5
    filled(theirs, 4)
    head = {"cls_head.fc_cls.weight": torch.randn(3, 48), "cls_head.fc_cls.bias": torch.randn(3)}
    report = load_weights(ours, {**{f"backbone.{n}": t for n, t in theirs.state_dict().items()}, **head})
    assert report.share == 1 and not report.missing and not report.fresh and compare() <= 1e-5
    assert torch.equal(ours.head.weight, head["cls_head.fc_cls.weight"])
