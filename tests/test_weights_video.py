"""Video models of torchvision, Video-Swin and mmaction2: the same outputs, and their files both ways (R-DOWN-6, R-CKPT-2)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openmmlab_files import Shapes, linear
from random_models import random_swin, randomise
from swinscale.cli import main
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer, model_config, position
from swinscale.models.windows import position_code
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import (
    convert_state_dict,
    detect_layout,
    from_official,
    from_pretrained,
    infer_config,
    load_weights,
    read_state_dict,
    save_pretrained,
    to_official,
    transfer_config,
)

ensure_torchvision()
from torchvision.models import video  # noqa: E402

WINDOW = (4, 3, 3)
SMALL: dict[str, Any] = {
    "patch_size": (2, 4, 4), "img_size": (16, 48, 48), "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4),
    "window_size": WINDOW, "num_classes": 5,
}  # fmt: skip


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def pair() -> tuple[SwinTransformer, nn.Module]:
    """Our model in torchvision's convention for padding, and torchvision's, with the same random weights."""
    theirs = randomise(
        video.swin_transformer.SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [*WINDOW], num_classes=5)
    )
    ours = SwinTransformer(SwinConfig(version=1, pad="legacy", **SMALL)).eval()
    assert load_weights(ours, theirs.state_dict()).share == 1
    return ours, theirs


def trained_like(model: nn.Module) -> Any:
    """Random values of the size they have in trained models: with larger ones, rounding alone grows from block to block."""
    with torch.no_grad():
        for name, parameter in randomise(model).named_parameters():
            if parameter.ndim > 1 and "bias_table" not in name:
                parameter.mul_(5 / math.sqrt(parameter[0].numel()))
    return model


def difference(pair: tuple[SwinTransformer, nn.Module], size: tuple[int, int, int]) -> float:
    clips = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(math.prod(size)))
    with torch.no_grad():
        return relative_error(*(model(clips) for model in pair))


SHORT_TIME = [(1, 48, 48), (2, 32, 56), (3, 24, 24), (5, 30, 45), (8, 24, 44)]
LONG = [(9, 48, 24), (16, 32, 56), (7, 52, 41), (11, 26, 63), (23, 44, 20)]


@pytest.mark.parametrize("size", [*SHORT_TIME, *LONG])
def test_torchvision_agrees_where_height_and_width_hold_a_window(pair: Any, size: tuple[int, int, int]) -> None:
    """Maps that are whole windows or padded, time that is shorter than a window or not: one frame, 3 frames, odd sizes."""
    assert difference(pair, size) <= 1e-5


@pytest.mark.parametrize("size", [(8, 8, 48), (8, 4, 48), (8, 48, 4), (4, 40, 12), (9, 12, 12), (1, 8, 8), (9, 24, 12)])
def test_where_they_do_not_torchvision_reads_wrong_rows_of_its_table(
    pair: Any, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a corner of the index of the whole window, whose rows have another length. With that rule we agree again."""
    assert difference(pair, size) > 1e-3

    def corner(window: Any, table: Any, device: Any) -> Tensor:
        return position_code(table, table, device)[: math.prod(window)]

    monkeypatch.setattr(position, "position_code", corner)
    for stage in pair[0].layers:
        for block in stage.blocks:
            block.attn.train(False)  # forgets the bias that it keeps
    assert difference(pair, size) <= 1e-5


@pytest.mark.parametrize("fields", [{"pad": "exact"}, {"small_map": "pad"}, {"small_map": "pad-noshift"}])
def test_only_one_convention_is_torchvisions(pair: Any, fields: dict[str, Any]) -> None:
    """pad="legacy" with small_map="shrink": 30 and 45 pixels are padded, and one frame is less than a window."""
    other = SwinTransformer(dataclasses.replace(pair[0].config, **fields)).eval()
    other.load_state_dict(pair[0].state_dict())
    worst = max(difference((other, pair[1]), size) for size in ((5, 30, 45), (1, 32, 56)))
    assert worst > 0.01


@pytest.mark.parametrize(
    "arch", ["swin3d_t", *(pytest.param(a, marks=pytest.mark.slow) for a in ("swin3d_s", "swin3d_b"))]
)
def test_the_published_sizes_agree_both_ways(arch: str) -> None:
    """≤ 1e-5 at 224 pixels, where every map is whole windows, so that no convention matters; and the file says what it is."""
    config = model_config(arch)
    theirs = trained_like(getattr(video, arch)(weights=None))
    found = infer_config(theirs.state_dict())
    assert found == dataclasses.replace(config, drop_path_rate=found.drop_path_rate)
    ours = SwinTransformer(config).eval()
    clip = torch.randn(1, 3, 3, 224, 224)
    assert load_weights(ours, theirs.state_dict()).plain
    with torch.no_grad():
        assert relative_error(ours(clip), theirs(clip)) <= 1e-5
    assert_same(convert_state_dict(ours.state_dict(), "torchvision", config=config), dict(theirs.state_dict()))


# --- files ----------------------------------------------------------------------------------------------------------


def video_swin(config: SwinConfig, numbered_norm: bool) -> Shapes:
    """The tensors of a Video-Swin recognizer, name by name; mmaction2 numbers the last norm."""
    tokens = math.prod(config.window_size[0])
    shapes = linear("backbone.patch_embed.proj", config.embed_dim, 3, *config.patch_size)
    shapes |= linear("backbone.patch_embed.norm", config.embed_dim)
    last = len(config.depths) - 1
    for stage, depth in enumerate(config.depths):
        dim, layer = config.embed_dim << stage, f"backbone.layers.{stage}"
        for number in range(depth):
            block = f"{layer}.blocks.{number}"
            shapes |= linear(f"{block}.norm1", dim) | linear(f"{block}.norm2", dim)
            shapes |= linear(f"{block}.attn.qkv", 3 * dim, dim) | linear(f"{block}.attn.proj", dim, dim)
            offsets = math.prod(2 * w - 1 for w in config.window_size[0])
            shapes[f"{block}.attn.relative_position_bias_table"] = (offsets, config.num_heads[stage])
            shapes[f"{block}.attn.relative_position_index"] = (tokens, tokens)
            shapes |= linear(f"{block}.mlp.fc1", 4 * dim, dim) | linear(f"{block}.mlp.fc2", dim, 4 * dim)
        if stage < last:
            shapes |= linear(f"{layer}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
            shapes |= linear(f"{layer}.downsample.norm", 4 * dim)
    shapes |= linear(f"backbone.norm{last}" if numbered_norm else "backbone.norm", config.num_features)
    return shapes | linear("cls_head.fc_cls", config.num_classes, config.num_features)


TARGETS = [("official", "official-video"), ("mm", "mm-video"), ("torchvision", "torchvision-video")]


@pytest.mark.parametrize(("to", "layout"), TARGETS)
def test_a_video_model_goes_out_and_comes_back(to: str, layout: str, tmp_path: Path, capsys: Any) -> None:
    """``swinscale convert`` and ``info``; the names and shapes are those of the other project's own recognizer."""
    model = random_swin(1, **{**SMALL, "window_size": (4, 2, 3)})  # sides that a table alone does not tell apart
    save_pretrained(model, tmp_path / "ours")
    out = tmp_path / "theirs.pth"
    assert main(["convert", str(tmp_path / "ours"), str(out), "--to", to]) == 0
    printed = capsys.readouterr().out
    assert "all" in printed and "numbers return unchanged" in printed
    written = torch.load(out, weights_only=True)
    if to == "torchvision":
        theirs = video.swin_transformer.SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [4, 2, 3], num_classes=5)
        theirs.load_state_dict(written, strict=True)
    else:
        there = {name: tuple(tensor.shape) for name, tensor in written["state_dict"].items()}
        assert there == video_swin(model.config, numbered_norm=to == "mm")
    assert main(["info", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"({layout})" in told and "video Swin V1" in told and "4×2×3 in every stage (read off the tensors)" in told
    assert main(["convert", str(out), str(tmp_path / "again"), "--to", "swinscale"]) == 0
    assert_same(read_state_dict(tmp_path / "again")[0], dict(model.state_dict()))
    again = from_pretrained(tmp_path / "again")
    clip = torch.randn(1, 3, 8, 32, 36)
    with torch.no_grad():
        assert torch.equal(again.eval()(clip), model(clip))


@pytest.mark.parametrize("numbered_norm", [False, True])
def test_a_recognizer_of_the_published_size_is_read(numbered_norm: bool, tmp_path: Path, capsys: Any) -> None:
    """Every tensor of Video-Swin's tiny model, or mmaction2's, has a place here, and ``info`` names model and origin."""
    config = model_config("swin3d_t")
    shapes = video_swin(config, numbered_norm)
    state = {name: torch.zeros(shape) for name, shape in shapes.items() if "position_index" not in name}
    assert detect_layout(state) == ("mm-video" if numbered_norm else "official-video")
    official, notes = to_official(state)
    with torch.device("meta"):
        own = {name: tensor.shape for name, tensor in SwinTransformer(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in official.items()} == own and not notes
    name = "swin-tiny-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb_20220930" if numbered_norm else ""
    path = tmp_path / f"{name or 'swin_tiny_patch244_window877_kinetics400_1k'}.pth"
    torch.save({"state_dict": state, "meta": {"epoch": 30}}, path)
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "swin3d_tiny_patch244_window877_224" in told and "32×224×224 pixels" in told
    assert "Kinetics-400" in told and ("mmaction2" if numbered_norm else "Video-Swin-Transformer") in told
    assert "8×7×7 in every stage" in told and "note" not in told and "last map" not in told


def test_what_no_video_project_has_is_refused() -> None:
    for layout in ("official-video", "mm", "torchvision"):
        v2 = random_swin(2, **SMALL)
        with pytest.raises(UsageError, match="has no Swin V2"):
            from_official(v2.state_dict(), layout, v2.config)
    with pytest.raises(UsageError, match="has no Swin Transformer for images"):
        from_official(random_swin(1).state_dict(), "mm-video")


def test_a_v2_video_model_keeps_its_windows_in_a_file_with_published_names(tmp_path: Path) -> None:
    """Nobody has published one: it has the published V2's names, and coordinates of three axes that say its windows."""
    model = random_swin(2, **{**SMALL, "pretrained_window_sizes": (2, 3, 3)})
    save_pretrained(model, tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "v2.pth"), "--to", "official"]) == 0
    state = read_state_dict(tmp_path / "v2.pth")[0]
    assert detect_layout(state) == "official"
    found = infer_config(state, img_size=SMALL["img_size"])
    assert (found.stage_windows, found.trained_windows) == (model.config.stage_windows, model.config.trained_windows)
    assert_same(convert_state_dict(state, "official"), dict(model.state_dict()))


# --- sizes of video models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_one_number_means_height_and_width(version: int, tmp_path: Path) -> None:
    """A video model at 64 pixels with window 4 keeps its frames, also when its file records nothing."""
    model = random_swin(version, **SMALL)
    config = transfer_config(model.config, img_size=64, window_size=4)
    assert config.img_size == (16, 64, 64) and config.window_size == ((4, 4, 4), (4, 4, 4))
    assert transfer_config(model.config, window_size=(2, 4, 4)).window_size[0] == (2, 4, 4)
    assert transfer_config(model.config, window_size=(4, 5)).window_size == ((4, 4, 5), (4, 4, 5))
    save_pretrained(model, tmp_path / "ours")
    assert from_pretrained(tmp_path / "ours", img_size=64, window_size=4).config == config
    if version == 1:
        torch.save(convert_state_dict(model.state_dict(), "mm"), tmp_path / "theirs.pth")
        there = from_pretrained(tmp_path / "theirs.pth", img_size=64, window_size=4)
        assert there.config.window_size == config.window_size and there.config.img_size[1:] == (64, 64)
        assert_same(dict(there.state_dict()), dict(from_pretrained(tmp_path / "ours", window_size=4).state_dict()))


@torch.no_grad()
def test_from_kinetics_to_something_something_the_time_window_doubles() -> None:
    """(8, 7, 7) → (16, 7, 7), SPEC 7.3: the table is interpolated along time and stays as it is in space."""
    from swinscale.weights import transfer

    old = random_swin(1, **{**SMALL, "img_size": (8, 48, 48)})
    assert old.config.stage_windows[0] == (4, 3, 3)
    new, report = transfer(old, img_size=(16, 48, 48), window_size=(8, 3, 3), num_classes=3)
    assert new.config.stage_windows == ((8, 3, 3), (8, 3, 3)) and report.share == 1
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    before, after = (m.state_dict()[name].view(-1, 25, 2) for m in (old, new))
    assert (len(before), len(after)) == (7, 15)
    # Along time it is linear interpolation between cell centres, worked out by hand.
    for t in range(15):
        place = min(max((t + 0.5) * 7 / 15 - 0.5, 0), 6)
        low = min(int(place), 5)
        expected = before[low] + (place - low) * (before[low + 1] - before[low])
        assert (after[t] - expected).abs().max() <= 1e-6
    assert "window 4×3×3 → 8×3×3" in str(report)


@torch.no_grad()
def test_v2_at_larger_sizes_keeps_the_bias_of_every_offset() -> None:
    """256/16 → 320/20 → 384/24 in small: the scale of the first window stays through both, and frames keep theirs."""
    from swinscale.weights import transfer

    first = random_swin(2, **{**SMALL, "img_size": (16, 64, 64), "window_size": (8, 4, 4)})
    second, _ = transfer(first, img_size=80, window_size=5)
    third, _ = transfer(second, img_size=96, window_size=6)
    assert [m.config.window_size[0] for m in (first, second, third)] == [(8, 4, 4), (8, 5, 5), (8, 6, 6)]
    assert third.config.img_size == (16, 96, 96)
    assert third.config.trained_windows == second.config.trained_windows == first.config.stage_windows
    for stage in range(2):
        grids = []
        for model in (first, second, third):
            attn = model.layers[stage].blocks[1].attn
            bias = attn.bias(attn.window).values
            grids.append(bias.reshape(-1, *(2 * w - 1 for w in attn.window)))
        for grid in grids[1:]:
            margin = (grid.shape[2] - grids[0].shape[2]) // 2
            inner = grid[:, :, margin : grid.shape[2] - margin, margin : grid.shape[3] - margin]
            assert (inner - grids[0]).abs().max() <= 1e-5
    clip = torch.randn(1, 3, 5, 30, 45)
    assert third.eval()(clip).isfinite().all()
