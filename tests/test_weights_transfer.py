"""Another window or image size: V2 keeps the bias of every offset, V1 tables are resized bicubically (R-RES-1, 2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from random_models import random_swin
from swinscale.models import SwinTransformer, model_config
from swinscale.weights import load_weights, save_pretrained, transfer, transfer_config


def bias_by_offset(model: SwinTransformer, stage: int) -> dict[tuple[int, int], Tensor]:
    """(Δrow, Δcolumn) → the bias of each head, read off the (heads, N, N) bias of a whole window."""
    window = model.config.stage_windows[stage]
    bias = model.layers[stage].blocks[0].attn.bias(window).rows()
    rows, columns = window
    place = [(r, c) for r in range(rows) for c in range(columns)]
    return {(q[0] - k[0], q[1] - k[1]): bias[:, i, j] for i, q in enumerate(place) for j, k in enumerate(place)}


def change(old: SwinTransformer, new: SwinTransformer) -> float:
    """Largest change of the bias over all stages and the offsets that both have."""
    worst = 0.0
    for stage in range(len(old.config.depths)):
        a, b = bias_by_offset(old, stage), bias_by_offset(new, stage)
        assert set(a) & set(b)
        worst = max(worst, max((a[o] - b[o]).abs().max().item() for o in set(a) & set(b)))
    return worst


@pytest.mark.parametrize(
    "to", [{"window_size": 6}, {"window_size": 8, "img_size": 64}, {"img_size": 96}, {"window_size": (2, 6)}]
)
@torch.no_grad()
def test_v2_keeps_the_bias_of_every_offset(to: dict[str, Any]) -> None:
    """R-RES-1, ≤ 1e-6; a plain change of the window would not."""
    old = random_swin(2, window_size=5)
    new, report = transfer(old, **to)
    assert report.plain and new.config.stage_windows != old.config.stage_windows
    assert change(old, new) <= 1e-6


@torch.no_grad()
def test_a_plain_change_of_the_window_would_stretch_the_bias() -> None:
    """The trap that other libraries fall into, so that the test above can fail."""
    old = random_swin(2, window_size=4)
    stretched = random_swin(2, window_size=8, img_size=64)
    load_weights(stretched, old.state_dict())
    assert change(old, stretched) > 0.1


@torch.no_grad()
def test_a_chain_of_transfers_keeps_the_first_window() -> None:
    """R-RES-2 and microsoft/Swin-Transformer#259: 4 → 6 → 8 keeps 4."""
    first = random_swin(2, window_size=4, img_size=32)
    second, _ = transfer(first, window_size=6, img_size=48)
    third, _ = transfer(second, window_size=8, img_size=64)
    direct, _ = transfer(first, window_size=8, img_size=64)
    assert third.config.pretrained_window_sizes == ((4, 4), (4, 4)) and third.config == direct.config
    assert change(first, third) <= 1e-6 and change(second, third) <= 1e-6


def test_the_trained_window_is_the_fitted_one() -> None:
    """A model trained at 192 with window 12 has window 6 in its last stage: 12, 12, 12, 6 as in the published configs."""
    base = model_config("swinv2_base_window12_192")
    moved = transfer_config(base, img_size=256, window_size=16)
    published = model_config("swinv2_base_window12to16_192to256")
    assert moved.pretrained_window_sizes == published.pretrained_window_sizes
    assert moved.stage_windows == published.stage_windows


def test_a_transfer_that_changes_no_window_records_nothing() -> None:
    config = random_swin(2).config
    assert transfer_config(config, num_classes=3).pretrained_window_sizes == config.pretrained_window_sizes
    assert transfer_config(config) == config


@torch.no_grad()
def test_v1_tables_are_resized_bicubically() -> None:
    """SPEC 1.7: view (1, heads, side, side), bicubic, align_corners off."""
    old = random_swin(1, window_size=4)
    new, report = transfer(old, window_size=7, img_size=56)
    assert len(report.reshaped) == 4 and "window 4×4 → 7×7" in str(report)
    for name, table in old.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            grid = table.t().reshape(1, -1, 7, 7)
            want = F.interpolate(grid, (13, 13), mode="bicubic", align_corners=False)
            assert torch.equal(new.state_dict()[name], want.reshape(-1, 169).t())
        else:
            assert torch.equal(new.state_dict()[name], table)


@torch.no_grad()
def test_rectangular_v1_tables() -> None:
    """(2, 6) and (6, 2) have tables of the same length; the configuration tells them apart."""
    old = random_swin(1, window_size=(2, 4))
    new, report = transfer(old, window_size=(4, 2))
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    want = F.interpolate(old.state_dict()[name].t().reshape(1, -1, 3, 7), (7, 3), mode="bicubic", align_corners=False)
    assert torch.equal(new.state_dict()[name], want.reshape(-1, 21).t()) and len(report.reshaped) == 4


@torch.no_grad()
def test_v1_loads_at_another_window_from_a_file_without_a_record() -> None:
    old, new = random_swin(1, window_size=4), random_swin(1, seed=1, window_size=7, img_size=56)
    assert len(load_weights(new, old.state_dict()).reshaped) == 4
    assert torch.equal(new.state_dict()[next(iter(old.state_dict()))], next(iter(old.state_dict().values())))


@torch.no_grad()
def test_absolute_position_embedding_is_resized() -> None:
    old = random_swin(1, ape=True)
    new, _ = transfer(old, img_size=64)
    grid = old.absolute_pos_embed.reshape(1, 8, 8, 24).permute(0, 3, 1, 2)
    want = F.interpolate(grid, (16, 16), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(new.absolute_pos_embed, want)


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_an_unchanged_size_gives_the_same_outputs(version: int) -> None:
    old = random_swin(version).double()
    new, report = transfer(old, num_classes=3)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(new.forward_features(images), old.forward_features(images))
    assert new.head.out_features == 3 and "head.weight" in report.fresh and not new.training


@torch.no_grad()
def test_channels() -> None:
    new, report = transfer(random_swin(2), in_chans=4, in_chans_init="mean")
    assert new.config.in_chans == 4 and "in_chans_init='mean'" in str(report)


@torch.no_grad()
def test_transferred_windows_survive_saving(tmp_path: Any) -> None:
    """R-RES-2: the trained windows are stored in the checkpoint, and a transfer from disk keeps the bias."""
    from swinscale.weights import from_pretrained

    old = random_swin(2, window_size=4)
    save_pretrained(old, tmp_path)
    new = from_pretrained(tmp_path, window_size=6, img_size=48)
    assert change(old, new) <= 1e-6
    save_pretrained(new, tmp_path)
    assert from_pretrained(tmp_path, window_size=8, img_size=64).config.pretrained_window_sizes == ((4, 4), (4, 4))
