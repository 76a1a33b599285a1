"""What a model is, from tensors and from the name of its file; tensors win (R-CKPT-6, R-CKPT-7)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from random_models import random_swin
from swinscale.models import SwinConfig
from swinscale.models.variants import VARIANTS
from swinscale.models.windows import relative_position_index
from swinscale.weights import convert_state_dict, infer_config, load_weights
from swinscale.weights.arrange import window_of_index
from swinscale.weights.filenames import NameHints, read_name
from swinscale.weights.infer import infer
from swinscale.weights.published import PUBLISHED, name_hash, published

TINY: dict[str, Any] = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}


def quiet(state: Any, **known: Any) -> SwinConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return infer_config(state, **known)


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("swin_tiny_patch4_window7_224.pth", NameHints(1, "tiny", 7, 224)),
        ("swin_large_patch4_window12_384_22kto1k.pth", NameHints(1, "large", 12, 384, num_classes=1000)),
        ("swinv2_base_patch4_window12_192_22k.pth", NameHints(2, "base", 12, 192, num_classes=21841)),
        (
            "swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth",
            NameHints(2, "base", 16, 256, 12, 192, num_classes=1000),
        ),
        ("swinv2_large_window12to24_192to384.ms_in22k_ft_in1k", NameHints(2, "large", 24, 384, 12, 192, 1000)),
        ("microsoft/swinv2-tiny-patch4-window8-256/model.safetensors", NameHints(2, "tiny", 8, 256)),
        ("swin_v2_b-781e5279.pth", NameHints(2, "base")),
        ("swin_s-5e29d889.pth", NameHints(1, "small")),
        ("swin3d_b_22k-7c6ae6fa.pth", NameHints(1, "base", rank=3)),
        ("swin_base_patch244_window1677_sthv2.pth", NameHints(1, "base", num_classes=174, rank=3)),
        ("swin_base_patch244_window877_kinetics600_22k.pth", NameHints(1, "base", num_classes=600, rank=3)),
        (
            "swin-tiny-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb_20220930-241016b2.pth",
            NameHints(1, "tiny", num_classes=400, rank=3),
        ),
        ("swin3dv2_tiny_window888_256.pth", NameHints(2, "tiny", None, 256, rank=3)),
        (
            "swinv2-small-w16_3rdparty_in1k-256px_20220803-b707d206.pth",
            NameHints(2, "small", 16, 256, num_classes=1000),
        ),
        ("swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth", NameHints(1, "tiny", None, 224)),
        ("simmim_pretrain__swin_base__img192_window6__800ep.pth", NameHints(1, "base", 6, 192)),
        ("model.safetensors", NameHints()),
        ("resnet50_a1_in1k.pth", NameHints()),
        ("swinv2_cr_tiny_ns_224.pth", NameHints()),
    ],
)
def test_names_of_published_files(name: str, hints: NameHints) -> None:
    assert read_name(name) == hints


def test_v2_windows_come_from_the_name_where_no_tensor_has_them() -> None:
    """R-CKPT-6: and the window of the pre-training, fitted to its map, 6 in the last stage."""
    name = "swinv2_tiny_patch4_window12to16_192to256_22kto1k_ft.pth"
    model = random_swin(
        2, **TINY, img_size=256, window_size=16, pretrained_window_sizes=(12, 12, 12, 6), num_classes=1000
    )
    found = infer(model.state_dict(), name)
    assert found.windows_from == "name" and found.config == model.config and not found.disagreements
    assert quiet(model.state_dict(), name=name) == model.config
    with pytest.warns(UserWarning, match="assuming 8"):
        infer_config(model.state_dict())
    assert quiet(model.state_dict(), name=name, window_size=8).stage_windows[0] == (8, 8)  # the caller wins


def test_tensors_win_over_names() -> None:
    """R-CKPT-6 and mmpretrain#1867: a file whose name says window 7 and whose tables say 6; the warning says both."""
    state = random_swin(1, **TINY, img_size=192, window_size=6, num_classes=10).state_dict()
    with pytest.warns(UserWarning) as said:
        config = infer_config(state, name="swinv2_base_window7_224_22kto1k.pth")
    assert config.stage_windows[0] == (6, 6) and config.version == 1 and config.embed_dim == 96
    texts = " ".join(str(w.message) for w in said)
    for words in (
        "Swin V 2",
        "'base' (embed_dim 128",
        "window 7, the tensors say 6×6",
        "classes 1000, the tensors say 10",
    ):
        assert words in texts, words


def test_v2_buffers_win_over_names() -> None:
    model = random_swin(2, **TINY, img_size=128, window_size=4)
    state = convert_state_dict(model.state_dict(), "torchvision", config=model.config)
    found = infer(state, "swinv2_tiny_window16_256.pth")
    assert found.windows_from == "tensors" and found.config.stage_windows[0] == (4, 4)
    assert any("window 16" in line for line in found.disagreements)


def test_load_weights_reports_what_the_name_denies(tmp_path: Path) -> None:
    model = random_swin(1)
    torch.save(model.state_dict(), tmp_path / "swin_base_patch4_window7_224.pth")
    report = load_weights(random_swin(1, 1), tmp_path / "swin_base_patch4_window7_224.pth")
    assert len(report.disagreements) == 2 and not report.plain and "name        the name says 'base'" in str(report)


def test_names_that_agree_say_nothing() -> None:
    """No published name is at odds with the model it names."""
    for entry in PUBLISHED:
        config = VARIANTS[entry.model]
        hints = read_name(f"{entry.name}.pth")
        assert (hints.version, hints.size is not None, hints.rank or 2) == (config.version, True, config.rank)
        if hints.window:
            assert config.stage_windows[0][0] == hints.window and config.img_size[0] == hints.img_size


@pytest.mark.parametrize("window", [(8, 7, 7), (4, 4, 4), (5, 4, 4), (2, 3, 3), (16, 7, 7)])
def test_video_windows_from_tables(window: tuple[int, int, int]) -> None:
    """2535 = 15·13·13 is (8, 7, 7); without stored indices."""
    size = (2 * window[0], 8 * window[1], 8 * window[2])
    model = random_swin(1, patch_size=(2, 4, 4), img_size=size, window_size=window)
    config = quiet(model.state_dict())
    assert config.stage_windows == (window, window) and config.rank == 3 and config == model.config


@pytest.mark.parametrize("window", [(4, 2), (2, 4), (3, 5), (2, 3, 4), (8, 7, 7), (1, 2, 2), (4, 1)])
def test_windows_from_stored_indices(window: tuple[int, ...]) -> None:
    index = relative_position_index(window, window, torch.device("cpu"))
    assert window_of_index(index, len(window)) in (window, window[::-1] if 1 in window else window)
    assert window_of_index(index.view(int(index.numel() ** 0.5), -1), len(window)) is not None
    assert window_of_index(index.flip(0), len(window)) is None


def test_rectangular_windows_from_stored_indices() -> None:
    """A table of (2·2-1)(2·4-1) rows has two shapes; the index of torchvision tells which."""
    for window in ((2, 4), (4, 2)):
        model = random_swin(1, window_size=window)
        state = convert_state_dict(model.state_dict(), "torchvision", config=model.config)
        assert quiet(state, img_size=32) == model.config


def test_published_files_are_known_by_name() -> None:
    """R-CKPT-7: source, licence, data and accuracy; copies under other projects' names are the same files."""
    for name, top1 in (
        ("swin_tiny_patch4_window7_224.pth", 81.2),
        ("swin_v2_t-b137f0e2.pth", 82.072),
        ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth", 86.2),
        ("swinv2_base_window12to16_192to256.ms_in22k_ft_in1k", 86.2),
        ("swinv2_tiny_window8_256.ms_in1k", 81.8),
        ("microsoft/swinv2-tiny-patch4-window16-256/model.safetensors", 82.8),
        ("swinv2-large-w24_in21k-pre_3rdparty_in1k-384px_20220803-3b36c165.pth", 87.6),
        ("swin_large_patch4_window7_224.ms_in22k_ft_in1k", 86.3),
        ("swin_base_patch244_window877_kinetics400_22k.pth", 82.7),
        ("swin-large-p244-w877_in22k-pre_16xb8-amp-32x2x1-30e_kinetics700-rgb_20220930-f8d74db7.pth", 75.92),
    ):
        entry = published(name)
        licences = ("MIT", "BSD-3-Clause", "Apache-2.0")
        assert entry is not None and entry.top1 == top1 and entry.licence in licences, name
    assert published("swin_tiny_patch4_window7_224_mine.pth") is None


def test_published_numbers_are_torchvisions_own() -> None:
    """Accuracy and file names against the installed package; the digits in the names are what is checked."""
    from swinscale.torchvision_cpu import ensure_torchvision

    ensure_torchvision()
    models = pytest.importorskip("torchvision.models")
    seen = 0
    for kind in (f"{a}_{b}" for a in ("swin", "swin_v2") for b in "tsb"):
        for weights in models.get_model_weights(kind):
            file = weights.url.rpartition("/")[2]
            entry = published(file)
            assert entry is not None and entry.top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
            assert name_hash(Path(file)) == file[-12:-4]
            seen += 1
    for kind in ("swin3d_t", "swin3d_s", "swin3d_b"):
        for weights in models.get_model_weights(kind):
            entry = published(weights.url.rpartition("/")[2])
            assert entry is not None and entry.top1 == weights.meta["_metrics"]["Kinetics-400"]["acc@1"]
            seen += 1
    assert seen == 10
