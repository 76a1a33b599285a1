"""Weights of an image model in a model of clips: what a still clip gives, and one call from any kind of file (R-DOWN-6)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from film_files import write_film
from random_models import random_swin
from swinscale.cli import main
from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.windows import stage_layouts
from swinscale.recipes import Recipe, get_recipe
from swinscale.recipes.base import build
from swinscale.recipes.video import VideoDataConfig
from swinscale.tasks import VideoConfig
from swinscale.tasks.simmim import SimMIM, SimMIMConfig
from swinscale.weights import (
    convert_state_dict,
    from_pretrained,
    load_weights,
    resize,
    save_pretrained,
    transfer,
)

CPU = torch.device("cpu")


def still(images: Tensor, frames: int) -> Tensor:
    """(B, C, H, W) → (B, C, frames, H, W)"""
    return images[:, :, None].expand(-1, -1, frames, -1, -1)


def assert_still_clips_are_images(clips: SwinTransformer, images: SwinTransformer, frames: int, size: Any) -> None:
    """Every stage's map at every time, the last features and the logits, ≤ 1e-5 (relative to their size)."""
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        last, maps = clips.eval().forward_intermediates(still(x, frames))
        expected_last, expected = images.eval().forward_intermediates(x)
        pairs = [*zip(maps, expected, strict=True), (last.movedim(-1, 1), expected_last.movedim(-1, 1))]
        for found, want in pairs:
            assert found.shape[2] == -(-frames // clips.config.patch_size[0])  # time is never merged
            for time in range(found.shape[2]):
                assert (found[:, :, time] - want).abs().max() <= 1e-5 * max(want.abs().max().item(), 1)
        assert (clips(still(x, frames)) - images(x)).abs().max() <= 1e-5


def shifts_in_time(config: SwinConfig, frames: int, size: Any) -> bool:
    """Whether the shifted windows of the first stage join other times than the regular ones."""
    tokens = config.stage_maps((frames, *size))[0]
    regular, shifted, *_ = stage_layouts(config, 0, tokens, CPU)
    area = tokens[1] * tokens[2]

    def joined(layout: Any) -> set[frozenset[int]]:
        return {frozenset(row.tolist()) for row in (layout.source // area).view(-1, math.prod(layout.window))}

    return joined(regular) != joined(shifted)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("patch_time", [1, 2])
@pytest.mark.parametrize(("time", "tokens", "shifted"), [(1, 3, False), (2, 2, False), (2, 5, True), (8, 19, True)])
@pytest.mark.parametrize("size", [(32, 32), (44, 30)])
def test_a_still_clip_gives_the_maps_of_the_image(
    version: int, patch_time: int, time: int, tokens: int, shifted: bool, size: Any
) -> None:
    """Windows of 1, 2 and 8 tokens along time, one or several of them, whole or padded; sizes with and without padding."""
    images = random_swin(version)
    frames = tokens * patch_time
    clips, report = transfer(images, img_size=(frames, 32, 32), window_size=(time, 4, 4), patch_time=patch_time)
    assert clips.config.stage_windows[0] == (time, 4, 4) and report.share == 1
    assert shifts_in_time(clips.config, frames, size) == shifted
    assert_still_clips_are_images(clips, images, frames, size)


def test_shifted_windows_carry_information_along_time() -> None:
    """Frames 0 and 1 share a window; that frame 0 reaches frame 2 is due to the shift, which a still clip cannot show."""
    clips, _ = transfer(random_swin(1), img_size=(6, 32, 32), window_size=(2, 4, 4), patch_time=1)
    clip = torch.randn(1, 3, 6, 32, 32)
    changed = clip.clone()
    changed[:, :, 0] += 1

    def reached(depth: int) -> list[int]:
        model = SwinTransformer(dataclasses.replace(clips.config, depths=(depth, 2))).eval()
        model.load_state_dict(clips.state_dict(), strict=False)
        with torch.no_grad():
            a, b = (model.forward_intermediates(x, intermediates_only=True)[0] for x in (clip, changed))
        return [time for time in range(6) if not torch.equal(a[:, :, time], b[:, :, time])]

    assert (reached(1), reached(2)) == ([0, 1], [0, 1, 2])


@pytest.mark.parametrize("pad", ["exact", "legacy"])
def test_what_a_still_clip_needs(pad: Any) -> None:
    """Frames that fill their patches; and windows that time fills, unless padding takes no part."""
    images = random_swin(1, pad=pad)
    clips, _ = transfer(images, img_size=(8, 32, 32), window_size=(2, 4, 4))
    assert_still_clips_are_images(clips, images, 8, (32, 32))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        half_a_window = (clips(still(x, 6)) - images(x)).abs().max()
        half_a_patch = (clips(still(x, 7)) - images(x)).abs().max()
    assert (half_a_window <= 1e-5) == (pad == "exact")
    assert half_a_patch > 1e-2


@pytest.mark.parametrize("fields", [{"position_bias": "linear"}, {"position_bias": "paper"}, {"ape": True}])
def test_other_parts_of_a_model_are_inflated_too(fields: dict[str, Any]) -> None:
    """Biases of other coordinates, and position embeddings."""
    images = random_swin(2, **fields)
    clips, _ = transfer(images, img_size=(8, 32, 32), window_size=(2, 4, 4))
    assert_still_clips_are_images(clips, images, 8, (32, 32))


# --- "centre" -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("patch_time", [1, 2, 3])
def test_centre_reads_one_frame_of_each_patch(patch_time: int) -> None:
    """The frame in the middle gives the image's embedding, bit for bit; the others are not seen."""
    images = random_swin(1)
    clips, _ = transfer(images, img_size=(4 * patch_time, 32, 32), inflate="centre", patch_time=patch_time)
    clip = torch.randn(1, 3, 4 * patch_time, 32, 32)
    tokens = clips.embed(clip)
    for token in range(4):
        frame = clip[:, :, token * patch_time + patch_time // 2]
        assert (tokens[:, token] - images.embed(frame)).abs().max() <= 1e-5
    blind = clip.clone()
    for token in range(4):
        for frame in range(patch_time):
            if frame != patch_time // 2:
                blind[:, :, token * patch_time + frame] = 7.0
    assert torch.equal(clips(blind), clips(clip))


@torch.no_grad()
def test_centre_begins_near_the_image_model_frame_by_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other times are e^4.6 = 100 times weaker. Were they infinitely far, each time would have the maps of its own frame, of any
    clip; as it is a clip is close to that. Where a window holds one time nothing is far, and it is exact."""
    images, clip = random_swin(1), torch.randn(1, 3, 12, 32, 32)
    frames = clip[:, :, 1::2]
    expected = torch.stack([images.forward_features(frames[:, :, time]) for time in range(6)], 1)

    def error(time: int, far: float = resize.FAR) -> float:
        monkeypatch.setattr(resize, "FAR", far)
        clips, _ = transfer(images, img_size=(12, 32, 32), window_size=(time, 4, 4), inflate="centre")
        found = clips.eval().forward_features(clip)
        return ((found - expected).norm() / expected.norm()).item()

    assert error(1) <= 1e-5 and error(3, far=-1000.0) <= 1e-5
    assert 1e-3 < error(3) < 0.2 < error(3, far=0.0)


# --- one call from any file -----------------------------------------------------------------------------------------


def sources(version: int, images: SwinTransformer, folder: Path) -> dict[str, Path]:
    """The same classifier as other projects have it, and as ours."""
    save_pretrained(images, folder / "ours", metadata={"task": {"name": "classify"}})
    assert main(["convert", str(folder / "ours"), str(folder / "hf"), "--to", "hf"]) == 0
    assert main(["convert", str(folder / "ours"), str(folder / "timm"), "--to", "timm"]) == 0
    assert main(["convert", str(folder / "ours"), str(folder / "published.pth"), "--to", "official"]) == 0
    found = {name: folder / name for name in ("ours", "hf", "timm", "published.pth")}
    if version == 1:
        torch.save(convert_state_dict(images.state_dict(), "timm"), folder / "timm.pth")
        found["timm.pth"] = folder / "timm.pth"
    return found


@pytest.mark.parametrize("version", [1, 2])
def test_one_call_from_a_classifier_of_any_project(version: int, tmp_path: Path, capsys: Any) -> None:
    """``transfer``, ``from_pretrained`` and ``load_weights`` of directories and files of ours, timm, transformers, microsoft."""
    images = random_swin(version)
    for name, path in sources(version, images, tmp_path).items():
        clips, report = transfer(path, img_size=(16, 32, 32), window_size=(4, 4, 4))
        assert report.share == 1 and not report.fresh, name
        assert_still_clips_are_images(clips, images, 16, (32, 32))
        directly = from_pretrained(path, img_size=(16, 32, 32), window_size=(4, 4, 4))
        loaded = SwinTransformer(clips.config)
        load_weights(loaded, path)
        for other in (directly, loaded):
            assert all(torch.equal(t, clips.state_dict()[n]) for n, t in other.state_dict().items()), name
        assert directly.config == clips.config
    assert all(map(any, clips.config.trained_windows))


@pytest.mark.parametrize("version", [1, 2])
def test_one_call_from_a_simmim_checkpoint(version: int, tmp_path: Path) -> None:
    """R-MIM-8: the encoder, without mask token and decoder, at another size and with a new classifier."""
    encoder = random_swin(version, num_classes=0)
    task = SimMIM(encoder, SimMIMConfig(mask_patch=8))
    save_pretrained(task, tmp_path / "simmim", metadata={"task": {"name": "simmim"}})
    clips, report = transfer(tmp_path / "simmim", img_size=(16, 32, 32), num_classes=4)
    assert clips.num_classes == 4 and set(report.fresh) == {"head.weight", "head.bias"}
    headless, _ = transfer(tmp_path / "simmim", img_size=(16, 32, 32))
    assert_still_clips_are_images(headless, encoder, 16, (32, 32))
    assert all(torch.equal(t, clips.state_dict()[n]) for n, t in headless.state_dict().items())


@pytest.mark.parametrize(("version", "more"), [(1, []), (2, []), (1, ["--inflate", "centre"])])
def test_the_command_line_inflates(version: int, more: list[str], tmp_path: Path, capsys: Any) -> None:
    images = random_swin(version)
    save_pretrained(images, tmp_path / "images")
    line = [
        "transfer",
        str(tmp_path / "images"),
        str(tmp_path / "clips"),
        "--img-size",
        "16x32x32",
        "--window",
        "2x4x4",
    ]
    assert main([*line, *more]) == 0
    assert "inflate='centre'" in capsys.readouterr().out if more else True
    clips = from_pretrained(tmp_path / "clips")
    if more:
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert (clips.embed(still(x, 16)) - images.embed(x)[:, None]).abs().max() <= 1e-5
            assert (clips.eval()(still(x, 16)) - images(x)).abs().max() > 1e-4
    else:
        assert_still_clips_are_images(clips, images, 16, (32, 32))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of two short films."""
    folder = tmp_path_factory.mktemp("films")
    for label in ("jump", "walk"):
        for index in range(2):
            write_film(folder / label / f"{index}.mp4", 20)
    return folder


def recipe_from(images: SwinConfig, init: Path, films: Path, side: int, window: int, **task: Any) -> Recipe:
    """Clips of 8 frames for the architecture of an image model, as the recipes say it: without a scale of the bias."""
    model = dataclasses.replace(
        images, img_size=(8, side, side), patch_size=(2, 4, 4), window_size=(2, window, window), num_classes=0,
        pretrained_window_sizes=0, past_windows=(), drop_path_rate=0.0,
    )  # fmt: skip
    data = VideoDataConfig(train=str(films), eval_fraction=0.5)
    return dataclasses.replace(
        get_recipe("desk_video_swinv2"), model=model, task=VideoConfig(**task), data=data, init=str(init)
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["classifier", "simmim", "transferred", "published"])
def test_a_recipe_that_starts_from_an_image_model(version: int, kind: str, films: Path, tmp_path: Path) -> None:
    """``train --init``: a still clip gives the image model's maps, and V2's recorded scale is that of the first window."""
    images = random_swin(version, num_classes=0 if kind == "simmim" else 5)
    if kind == "transferred":  # its windows are not those whose scale its bias has
        images = transfer(images, img_size=48, window_size=6)[0].eval()
    if kind == "simmim":
        save_pretrained(
            SimMIM(images, SimMIMConfig(mask_patch=8)), tmp_path / "init", metadata={"task": {"name": "simmim"}}
        )
    elif kind == "published":
        save_pretrained(images, tmp_path / "ours")
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "init.pth"), "--to", "official"]) == 0
    else:
        save_pretrained(images, tmp_path / "init")
    side, window = (48, 6) if kind == "transferred" else (32, 4)
    init = tmp_path / ("init.pth" if kind == "published" else "init")
    built = build(recipe_from(images.config, init, films, side, window))
    assert built.loaded is not None and built.loaded.share == 1
    inside: Any = built.task.model
    assert inside.num_classes == 2
    if version == 2:
        space = [window[1:] for window in inside.config.trained_windows]
        assert space == list(images.config.trained_windows)
        assert all(time == 2 for time, *_ in inside.config.trained_windows)
    x = torch.randn(1, 3, side, side)
    inside.eval()
    with torch.no_grad():
        maps = inside.forward_intermediates(still(x, 8), intermediates_only=True)
        for found, want in zip(maps, images.forward_intermediates(x, intermediates_only=True), strict=True):
            assert (found - want[:, :, None]).abs().max() <= 1e-5 * max(want.abs().max().item(), 1)


def test_the_recipe_s_choice_of_inflation(films: Path, tmp_path: Path) -> None:
    """task.inflate="centre" reaches the weights; a V2, which has no table, says what to do."""
    v1, v2 = (random_swin(version) for version in (1, 2))
    save_pretrained(v1, tmp_path / "v1")
    save_pretrained(v2, tmp_path / "v2")
    model: Any = build(recipe_from(v1.config, tmp_path / "v1", films, 32, 4, inflate="centre")).task.model
    assert not model.patch_embed.proj.weight[:, :, 0].any()
    with pytest.raises(UsageError, match="choose inflate='repeat'"):
        build(recipe_from(v2.config, tmp_path / "v2", films, 32, 4, inflate="centre"))


def test_a_scale_that_differs_is_named_with_its_axis_of_time(tmp_path: Path) -> None:
    """Building a V2 with another scale is refused, and what the message says to build it with works."""
    images = random_swin(2, window_size=4, pretrained_window_sizes=2)
    save_pretrained(images, tmp_path)
    config = dataclasses.replace(
        images.config, img_size=(8, 32, 32), patch_size=(2, 4, 4), window_size=(2, 4, 4), pretrained_window_sizes=0
    )
    with pytest.raises(UsageError, match=r"pretrained_window_sizes=\(\(0, 2, 2\), \(0, 2, 2\)\)"):
        load_weights(SwinTransformer(config), tmp_path)
    right = SwinTransformer(dataclasses.replace(config, pretrained_window_sizes=((0, 2, 2), (0, 2, 2))))
    load_weights(right, tmp_path)
    assert_still_clips_are_images(right, images, 8, (32, 32))
