"""Another size, window, channels, classes, or clips: what stays as it was, and what other code computes (R-RES-1, 2)."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from random_models import random_swin, randomise
from swinscale.config import from_dict, to_dict
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.models.windows import relative_coords
from swinscale.weights import (
    from_pretrained,
    infer_config,
    load_weights,
    save_pretrained,
    to_official,
    transfer,
    transfer_config,
)
from swinscale.weights.resize import bias_methods, geometric_offsets, resize_bias_table, spline_matrix, tabulate_bias
from swinscale.weights.transfer import class_rows


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    """R-RES-2 and microsoft/Swin-Transformer#259: 4 → 6 → 8 keeps 4, and the windows in between are on record."""
    first = random_swin(2, window_size=4, img_size=32)
    second, _ = transfer(first, window_size=6, img_size=48)
    third, _ = transfer(second, window_size=8, img_size=64)
    direct, _ = transfer(first, window_size=8, img_size=64)
    assert third.config.pretrained_window_sizes == ((4, 4), (4, 4)) and third.config == direct.config
    assert change(first, third) <= 1e-6 and change(second, third) <= 1e-6
    assert third.config.past_windows == (((4, 4), (4, 4)), ((6, 6), (6, 6)))
    assert direct.config.past_windows == (((4, 4), (4, 4)),) and first.config.past_windows == ()


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
    old = random_swin(2, window_size=4)
    save_pretrained(old, tmp_path)
    new = from_pretrained(tmp_path, window_size=6, img_size=48)
    assert change(old, new) <= 1e-6
    save_pretrained(new, tmp_path)
    again = from_pretrained(tmp_path, window_size=8, img_size=64).config
    assert again.pretrained_window_sizes == ((4, 4), (4, 4))
    assert again.past_windows == (((4, 4), (4, 4)), ((6, 6), (6, 6)))


def test_the_published_chain() -> None:
    """R-RES-2: 8 → 16 → 24 keeps the scale 8. A published fine-tuned model is known to have had its first windows."""
    config = SwinConfig(img_size=256, window_size=8)
    second = transfer_config(config, img_size=512, window_size=16)
    third = transfer_config(second, img_size=768, window_size=24)
    assert set(third.pretrained_window_sizes) == {(8, 8)}
    assert [set(windows) for windows in third.past_windows] == [{(8, 8)}, {(16, 16)}]
    published = model_config("swinv2_base_window12to16_192to256")
    moved = transfer_config(published, img_size=384, window_size=24)
    assert moved.past_windows == (published.pretrained_window_sizes, published.stage_windows)
    assert moved.pretrained_window_sizes == published.pretrained_window_sizes


def test_the_record_of_windows_is_a_record() -> None:
    """It survives JSON, is normalised and checked, and does not tell models apart."""
    config = transfer_config(random_swin(2).config, window_size=3)
    read = from_dict(SwinConfig, json.loads(json.dumps(to_dict(config))))
    assert read.past_windows == config.past_windows == (((4, 4), (4, 4)),)
    assert dataclasses.replace(config, past_windows=()) == config
    assert "past_windows" in refusal(dataclasses.replace, config, past_windows=[[8, 8, 8]])
    assert "past_windows" in refusal(dataclasses.replace, config, past_windows=[[[8, 8]]])


@torch.no_grad()
@pytest.mark.parametrize("bias", ["log", "linear"])
def test_stretch_reads_the_coordinates_of_the_new_window(bias: str) -> None:
    """The largest offsets keep their bias instead, and the scale is the new window, also where another was recorded."""
    old = random_swin(2, window_size=4, position_bias=bias)
    new, report = transfer(old, window_size=6, img_size=48, cpb="stretch")
    assert report.plain and new.config.pretrained_window_sizes == ((0, 0), (0, 0))
    before, after = bias_by_offset(old, 0), bias_by_offset(new, 0)
    assert torch.allclose(before[3, -3], after[5, -5], atol=1e-6) and change(old, new) > 0.01
    again, _ = transfer(transfer(old, window_size=6, img_size=48)[0], window_size=8, img_size=64, cpb="stretch")
    assert torch.allclose(before[3, -3], bias_by_offset(again, 0)[7, -7], atol=1e-6)


@torch.no_grad()
def test_stretch_is_what_timm_does() -> None:
    """R-RES-1: outputs of ``set_input_size`` of a random timm V2, ≤ 1e-5; the default differs from it."""
    timm = pytest.importorskip("timm")
    small = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
    peer = timm.models.swin_transformer_v2.SwinTransformerV2(img_size=32, window_size=4, **small)
    randomise(peer)
    ours = SwinTransformer(SwinConfig(img_size=32, window_size=4, **small)).eval()
    ours.load_state_dict(to_official(peer.state_dict())[0])
    images = torch.randn(2, 3, 48, 48)
    peer.set_input_size(img_size=(48, 48), window_size=(6, 6))
    stretched, _ = transfer(ours, img_size=48, window_size=6, cpb="stretch")
    assert (stretched(images) - peer(images)).abs().max() <= 1e-5
    kept, _ = transfer(ours, img_size=48, window_size=6)
    assert (kept(images) - peer(images)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("bias", ["linear", "paper"])
def test_every_continuous_bias_is_kept_by_default(bias: str) -> None:
    """R-RES-3: on the axis of its own coordinates."""
    old = random_swin(2, window_size=4, position_bias=bias)
    new, _ = transfer(old, window_size=6, img_size=48, cpb=bias_methods(old.config)[0])
    assert change(old, new) <= 1e-5  # without a sigmoid the bias of "paper" reaches 10


def test_impossible_methods_are_refused_with_the_reason() -> None:
    table, log = random_swin(1).config, random_swin(2).config
    assert "a table with an entry per offset" in refusal(transfer_config, table, cpb="log-extrapolate")
    assert "bicubic, geometric" in refusal(transfer_config, table, cpb="stretch")
    assert "logarithmic" in refusal(transfer_config, log, cpb="linear-extrapolate")
    assert "no scale" in refusal(transfer_config, dataclasses.replace(log, position_bias="paper"), cpb="stretch")
    assert "Did you mean 'stretch'?" in refusal(transfer_config, log, cpb="strech")
    assert "transfer='stretched'" in refusal(
        load_weights, random_swin(), random_swin().state_dict(), transfer="stretched"
    )


@torch.no_grad()
@pytest.mark.parametrize("bias", ["log", "linear", "paper"])
def test_a_table_made_of_a_continuous_bias_computes_the_same(bias: str, tmp_path: Path) -> None:
    """V2 with a table works from end to end: forward, saving, loading, and the next transfer."""
    old = random_swin(2, window_size=(3, 4), position_bias=bias).double()
    new, report = transfer(old, cpb="bicubic")
    assert new.config.position_bias == "table" and "tables were made" in str(report) and report.share == 1
    images = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    assert (new(images) - old(images)).abs().max() <= 1e-10
    save_pretrained(new, tmp_path)
    read = from_pretrained(tmp_path).double().eval()
    assert (read(images) - old(images)).abs().max() <= 1e-4  # read in single precision
    larger, report = transfer(read, img_size=48, window_size=6, cpb="geometric")
    assert "3×4 → 6×6, geometric" in str(report) and larger(images).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("how", ["bicubic", "geometric"])
def test_tables_of_a_continuous_bias_are_resized(how: Any) -> None:
    old = random_swin(2, window_size=4)
    new, _ = transfer(old, img_size=48, window_size=6, cpb=how)
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    want = resize_bias_table(transfer(old, cpb=how)[0].state_dict()[name], (4, 4), (6, 6), how)
    assert torch.equal(new.state_dict()[name], want) and new.config.past_windows == (((4, 4), (4, 4)),)
    assert "pass config" in refusal(load_weights, new, old.state_dict(), transfer=how)
    load_weights(new, old.state_dict(), transfer=how, config=old.config)
    assert torch.equal(new.state_dict()[name], want)


@pytest.mark.parametrize(
    ("old", "new", "ratio"),
    [(6, 7, 1.091281), (6, 12, 1.402629), (7, 12, 1.240724), (12, 14, 1.032893), (12, 24, 1.139649), (8, 16, 1.248416)],
)
def test_geometric_ratios(old: int, new: int, ratio: float) -> None:
    """SPEC 10."""
    places = geometric_offsets(old, new)
    assert (places[old + 1] - places[old]).item() == pytest.approx(ratio, abs=2e-6)
    assert places[-1].item() == pytest.approx(new - 1) and len(places) == 2 * old - 1
    assert torch.equal(places, -places.flip(0))
    if (old, new) == (6, 7):
        assert places[6:].tolist() == pytest.approx([1, 2.0913, 3.2822, 4.5818, 6.0], abs=1e-4)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((3, 6), (8, 7)), ((4, 5), (4, 9))])
def test_geometric_is_the_spline_of_fitpack(old: tuple[int, int], new: tuple[int, int]) -> None:
    """R-RES-1, SPEC 5.4: to 1e-4 (here 1e-6) the bivariate spline through the table on the geometric grid."""
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 3)
    places = [
        geometric_offsets(a, b).numpy() if a != b else np.arange(1.0 - a, a) for a, b in zip(old, new, strict=True)
    ]
    at = [np.arange(1 - b, b) for b in new]
    want = []
    for head in table.t():
        grid = head.reshape(2 * old[0] - 1, 2 * old[1] - 1).numpy()
        want.append(interpolate.RectBivariateSpline(*places, grid, kx=3, ky=3, s=0)(*at).ravel())
    got = resize_bias_table(table, old, new, "geometric")
    assert np.abs(got.t().numpy() - np.stack(want)).max() <= 1e-6


def test_a_cubic_spline_reproduces_cubics() -> None:
    """Without SciPy: the interpolation of a cubic polynomial on any grid is the polynomial."""
    places, at = torch.tensor([-4.0, -1, 0, 0.5, 2, 5]).double(), torch.linspace(-4, 5, 19).double()
    cubic = lambda x: 2 - x + 0.5 * x**2 - 0.25 * x**3  # noqa: E731
    assert (spline_matrix(places, at) @ cubic(places) - cubic(at)).abs().max() <= 1e-10


def test_geometric_resizing_knows_its_limits() -> None:
    table = torch.randn(25, 2)
    assert "windows that grow" in refusal(resize_bias_table, table, (3, 3), (2, 4), "geometric")
    assert "at least 3 tokens" in refusal(resize_bias_table, table[:9], (2, 2), (4, 4), "geometric")
    assert torch.equal(resize_bias_table(table, (3, 3), (3, 3), "geometric"), table)


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("frames", "window", "patch_time"),
    [(2, None, 2), (8, None, 2), (20, None, 2), (10, (3, 4, 4), 2), (7, (2, 4, 4), 1)],
)
def test_a_still_clip_gives_the_image_s_logits(version: Any, frames: int, window: Any, patch_time: int) -> None:
    """R-DOWN-6, ≤ 1e-5: shrunk, whole, shifted and padded windows along time; the map is padded in space too."""
    image_model = random_swin(version, img_size=40, ape=True)
    size = {"img_size": (frames, 40, 40), "window_size": window, "patch_time": patch_time}
    video_model, report = transfer(image_model, **size)
    assert report.share == 1 and not report.mismatched and video_model.config.past_windows == (((4, 4), (4, 4)),)
    images = torch.randn(2, 3, 40, 40)
    clip = images[:, :, None].expand(-1, -1, frames, -1, -1)
    assert (video_model(clip) - image_model(images)).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
def test_clips_at_another_window(version: Any) -> None:
    """SPEC 7.2: first the spatial window, as for images, then time; a clip is then worth the transferred image model."""
    old = random_swin(version)
    still, _ = transfer(old, img_size=48, window_size=6)
    video, _ = transfer(old, img_size=(8, 48, 48), window_size=6)
    assert video.config.window_size == ((8, 6, 6), (8, 6, 6)) and video.config.stage_windows[0] == (4, 6, 6)
    images = torch.randn(1, 3, 48, 48)
    assert (video(images[:, :, None].expand(-1, -1, 8, -1, -1)) - still(images)).abs().max() <= 1e-5
    clip = torch.randn(1, 3, 8, 48, 48)
    longer, report = transfer(video, img_size=(16, 48, 48))
    assert longer.config.stage_windows[0] == (8, 6, 6) and longer(clip).shape == (1, 5)
    assert ("trilinear" in str(report)) == (version == 1)
    assert video.config.past_windows == (((4, 4), (4, 4)),)
    assert longer.config.past_windows == (((4, 4), (4, 4)), ((4, 6, 6), (4, 6, 6)))
    if version == 2:  # offsets in time and space that both have keep their bias
        a, b = (m.layers[0].blocks[0].attn.bias((4, 6, 6)).rows() for m in (video, longer))
        assert (a - b).abs().max() <= 1e-6


@torch.no_grad()
def test_centre_inflation_of_a_table() -> None:
    """SPEC 7.2: the middle frame carries the filter, and other times begin far away; times see themselves alone."""
    old = random_swin(1)
    new, report = transfer(old, img_size=(8, 32, 32), inflate="centre")
    filters = new.patch_embed.proj.weight
    assert torch.equal(filters[:, :, 1], old.patch_embed.proj.weight) and filters[:, :, 0].abs().max() == 0
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    table = new.state_dict()[name].reshape(7, 7, 7, -1)
    assert torch.equal(table[3].flatten(0, 1), old.state_dict()[name])
    assert (table[[0, 1, 2, 4, 5, 6]] == -4.6).all() and "inflate='centre'" in str(report)
    assert "cpb='bicubic'" in refusal(transfer, random_swin(2), img_size=(8, 32, 32), inflate="centre")
    with_table, _ = transfer(random_swin(2), img_size=(8, 32, 32), inflate="centre", cpb="bicubic")
    assert (with_table.state_dict()[name].reshape(7, 49, -1)[0] == -4.6).all()
    assert "inflate='twice'" in refusal(transfer, old, img_size=(8, 32, 32), inflate="twice")


def test_what_has_no_time_is_refused() -> None:
    assert "img_size as (time, height, width)" in refusal(transfer, random_swin(), patch_time=2)
    assert "img_size" in refusal(transfer, random_swin(img_size=(8, 32, 32)), img_size=(32, 32))


@torch.no_grad()
def test_a_file_of_an_image_model_loads_into_a_video_model() -> None:
    """Also from a state dict that says nothing of its windows (R-MIM-8)."""
    for version in (1, 2):
        old = random_swin(version)
        direct, _ = transfer(old, img_size=(8, 32, 32))
        loaded = SwinTransformer(direct.config)
        load_weights(loaded, old.state_dict())
        assert all(torch.equal(t, direct.state_dict()[n]) for n, t in loaded.state_dict().items())
        assert "does not fit" in refusal(load_weights, loaded, old.state_dict(), transfer=False)


@torch.no_grad()
@pytest.mark.parametrize("how", [("red", "blue"), (2, 0), "names", "indices"])
def test_classes_are_selected(how: Any, tmp_path: Path) -> None:
    """The map from 22K to 1K classes is a file of indices; names are looked up in what the weights record."""
    model = random_swin(num_classes=3)
    save_pretrained(model, tmp_path / "model", metadata={"preprocessing": {"classes": ["blue", "green", "red"]}})
    (tmp_path / "names").write_text("red\n\nblue\n")
    (tmp_path / "indices").write_text("2\n0\n")
    new, report = transfer(tmp_path / "model", classes=tmp_path / how if isinstance(how, str) else how)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(new.eval()(images), model(images)[:, [2, 0]], atol=1e-6)
    assert new.num_classes == 2 and "2 of 3 classes" in str(report) and report.source.endswith("model")


def test_wrong_classes_are_named_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("0\n\n3\n")
    assert f"{file}, line 3: there is no class 3" in refusal(class_rows, file, 3, None)
    file.write_text("-1\n")
    assert "line 1: there is no class -1" in refusal(class_rows, file, 3, None)
    file.write_text("red\ngreeen\n")
    names = ["blue", "green", "red"]
    assert "line 2: there is no class 'greeen'. Did you mean 'green'?" in refusal(class_rows, file, 3, names)
    assert "no class names are recorded" in refusal(class_rows, file, 3, None)
    assert "entry 2" in refusal(class_rows, [0, 5], 3, names)
    file.write_bytes(b"\xff\xfe\x00")
    assert "not text" in refusal(class_rows, file, 3, names)
    assert "cannot be read" in refusal(class_rows, tmp_path / "none.txt", 3, names)
    file.write_text("\n")
    assert "empty" in refusal(class_rows, file, 3, names)
    assert "this model has none" in refusal(transfer, random_swin(num_classes=0), classes=[0])
    assert "leave num_classes out" in refusal(transfer, random_swin(), classes=[0, 1], num_classes=3)


@torch.no_grad()
def test_a_map_of_bands() -> None:
    """R-CHAN-1: each new channel says which old one it takes; a permutation is exact, copies share a filter."""
    old = random_swin()
    images = torch.randn(2, 3, 32, 32)
    blue_first, report = transfer(old, in_chans_init=(2, 1, 0))
    assert (blue_first(images.flip(1)) - old(images)).abs().max() <= 1e-5 and "(2, 1, 0)" in str(report)
    four, _ = transfer(old, in_chans_init=(0, 1, 2, None))
    more = torch.cat((images, torch.randn(2, 1, 32, 32)), 1)
    assert four.config.in_chans == 4 and (four(more) - old(images)).abs().max() <= 1e-5
    doubled, _ = transfer(old, in_chans_init=[0, 0, 1, 2])
    assert (doubled(images[:, [0, 0, 1, 2]]) - old(images)).abs().max() <= 1e-5
    assert "0 to 2" in refusal(transfer, old, in_chans_init=(0, 1, 3))
    assert "one entry for each of the 4" in refusal(transfer, old, in_chans=4, in_chans_init=(0, 1, 2))


@torch.no_grad()
def test_everything_at_once(tmp_path: Path) -> None:
    """One call: size, window, channels, classes and video."""
    save_pretrained(random_swin(1), tmp_path)
    new, report = transfer(
        tmp_path, img_size=(4, 48, 64), window_size=(2, 6, 8), in_chans=4, classes=[4, 0], cpb="geometric"
    )
    assert new.config.window_size[0] == (2, 6, 8) and new(torch.randn(1, 4, 4, 48, 64)).shape == (1, 2)
    assert report.share == 1 and not report.fresh


@pytest.mark.parametrize(
    ("window", "trained", "offsets", "want"),
    [
        (16, 8, [1, 2, 8, 15], [0.36651, 0.57207, 1.11413, 1.39378]),
        (24, 12, [1, 2, 12, 23], [0.26283, 0.43182, 1.09401, 1.38263]),
        (12, 6, [1, 2, 6, 11], [0.45950, 0.69013, 1.13533, 1.40574]),
    ],
)
def test_coordinates_after_a_transfer(window: int, trained: int, offsets: list[int], want: list[float]) -> None:
    """SPEC 10: what the network reads."""
    coords = relative_coords((window, window), (trained, trained), "log", torch.device("cpu"))
    row = coords.reshape(2 * window - 1, 2 * window - 1, 2)[window - 1, :, 1]
    assert row[[o + window - 1 for o in offsets]].tolist() == pytest.approx(want, abs=1e-5)


def test_the_table_of_coordinates_in_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "transfer.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| \d+ \| \d+ \|", line)]
    assert len(rows) == 4
    for window, trained, *values in ([float(cell) for cell in row] for row in rows):
        w, t = int(window), int(trained)
        axis = relative_coords((w, w), (t, t), "log", torch.device("cpu"))[w - 1 :: 2 * w - 1, 0][w - 1 :]
        assert axis[[1, 2, w // 2, w - 1]].tolist() == pytest.approx(values, abs=5.1e-5)


@torch.no_grad()
def test_no_random_numbers_are_drawn_for_tables() -> None:
    """Making a table of a bias does not change what a later dropout draws."""
    model = random_swin()
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    tabulate_bias(model.state_dict(), model.config)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_that_starts_from_a_checkpoint_goes_on_with_its_windows(
    version: Any, tmp_path: Path, photos: Path
) -> None:
    """R-RES-2: ``train --init`` records them as a transfer does; the scale only where there is one to keep."""
    from swinscale.data import open_source
    from swinscale.recipes import get_recipe
    from swinscale.recipes.base import _fit_model

    old, _ = transfer(random_swin(version), window_size=3)
    save_pretrained(old, tmp_path)
    model = dataclasses.replace(
        old.config, num_classes=0, img_size=48, window_size=6, pretrained_window_sizes=0, past_windows=()
    )
    recipe = dataclasses.replace(get_recipe("desk_finetune"), model=model, init=str(tmp_path))
    fitted = _fit_model(recipe, open_source(photos).classes)
    assert fitted.past_windows == (((4, 4), (4, 4)), ((3, 3), (3, 3))) and fitted.num_classes == 3
    assert fitted.pretrained_window_sizes == (((0, 0),) * 2 if version == 1 else ((4, 4),) * 2)
    other = dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            model, depths=(2, 2, 2), num_heads=(2, 4, 8), window_size=6, pretrained_window_sizes=0
        ),
    )
    assert _fit_model(other, open_source(photos).classes).past_windows == ()  # loading says that it does not fit


@torch.no_grad()
def test_a_v2_with_a_table_is_recognised_by_its_tensors() -> None:
    new, _ = transfer(random_swin(2), cpb="bicubic")
    config = infer_config(new.state_dict())
    assert (config.version, config.position_bias, config.stage_windows) == (2, "table", ((4, 4), (4, 4)))
    copy = SwinTransformer(config).eval()
    load_weights(copy, new.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(copy(images), new(images))
