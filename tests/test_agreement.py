"""What a transfer keeps, on pictures and without training (R-RES-4), and the command that writes the new model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from random_models import random_swin
from swinscale import cli
from swinscale.agreement import measure_agreement, transfer_checkpoint
from swinscale.data import open_source
from swinscale.errors import UsageError
from swinscale.tasks.simmim import SimMIM, SimMIMConfig
from swinscale.weights import from_pretrained, read_config, read_metadata, save_pretrained, transfer

CLASSES = ["blue", "green", "red"]
PREPROCESSING = {
    "img_size": [32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "crop_ratio": 1.0,
    "classes": CLASSES,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    record = {"task": {"name": "classify"}, "preprocessing": PREPROCESSING}
    save_pretrained(random_swin(2, num_classes=3), tmp_path / "old", metadata=record)
    return tmp_path / "old"


@pytest.mark.parametrize("version", [1, 2])
def test_the_same_model_agrees_exactly(version: Any, photos: Path) -> None:
    """Exactly: not one rounding error, neither of the model nor of the measures."""
    old = random_swin(version, num_classes=3)
    new, _ = transfer(old)
    a = measure_agreement(old, new, open_source(photos), preprocessing=PREPROCESSING)
    assert (a.images, a.feature_cosine, a.map_cosine, a.kl, a.same_top1, a.worst_cosine) == (24, 1, 1, 0, 1, 1)
    assert a.top1_before == a.top1_after is not None and not a.poor


@torch.no_grad()
def test_the_measures_are_what_they_are_called(tmp_path: Path) -> None:
    """One picture of the old size, so that no resizing stands between it and the models; all numbers by hand."""
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "a.png")
    old, new = random_swin(num_classes=3), random_swin(seed=1, num_classes=3)
    pixels = open_source(tmp_path).read(0)
    assert pixels
    a = measure_agreement(
        old, new, open_source(tmp_path), preprocessing={"crop_ratio": None, "mean": [0.0], "std": [1.0]}
    )
    from swinscale.data import decode_image

    x = decode_image(pixels, "a.png")[None] / 255
    maps = [m.forward_features(x).double() for m in (old, new)]
    assert a.map_cosine == pytest.approx(F.cosine_similarity(*maps, dim=-1).mean().item(), abs=1e-5)
    assert a.feature_cosine == pytest.approx(F.cosine_similarity(*(m.mean((1, 2)) for m in maps)).item(), abs=1e-5)
    p, q = (m(x).double().softmax(-1) for m in (old, new))
    assert a.kl == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-5)
    assert a.same_top1 == float(p.argmax() == q.argmax()) and a.worst == "a.png" and a.images == 1
    assert a.top1_before is None and a.poor


def test_another_model_agrees_less_than_a_transferred_one(photos: Path) -> None:
    old, source = random_swin(num_classes=3), open_source(photos)
    moved, _ = transfer(old, img_size=64, window_size=8)
    near = measure_agreement(old, moved, source, preprocessing=PREPROCESSING)
    far = measure_agreement(old, random_swin(seed=1, img_size=64), source, preprocessing=PREPROCESSING)
    assert 1 > near.feature_cosine > far.feature_cosine and near.map_cosine < 1 and far.kl is None
    assert near.worst_cosine <= near.feature_cosine and near.worst in source.names


def test_limit_takes_pictures_from_the_whole_folder(photos: Path) -> None:
    """The first 6 of 24 would be of one class."""
    old = random_swin(num_classes=3)
    seen = measure_agreement(old, transfer(old)[0], open_source(photos), preprocessing=PREPROCESSING, limit=6)
    assert seen.images == 6 and seen.top1_before is not None and seen.top1_before * 6 <= 2 + 1e-9


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_see_the_same_grey_picture(channels: int, photos: Path) -> None:
    old = random_swin(num_classes=3)
    a = measure_agreement(old, transfer(old, in_chans=channels)[0], open_source(photos), preprocessing=PREPROCESSING)
    assert a.feature_cosine == pytest.approx(1, abs=1e-9) and a.kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("version", [1, 2])
def test_a_video_model_sees_still_clips(version: Any, photos: Path) -> None:
    old = random_swin(version, num_classes=3)
    new, _ = transfer(old, img_size=(8, 32, 32))
    a = measure_agreement(old, new, open_source(photos), preprocessing=PREPROCESSING, limit=4)
    assert a.feature_cosine == pytest.approx(1, abs=1e-9) and a.map_cosine == pytest.approx(1, abs=1e-9)


def test_unreadable_pictures_are_left_out(photos: Path, tmp_path: Path) -> None:
    (photos / "blue" / "0.png").write_bytes(b"\x89PNG broken")
    old = random_swin(num_classes=3)
    assert measure_agreement(old, old, open_source(photos), preprocessing=PREPROCESSING).images == 23
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="None of the 1 images"):
        measure_agreement(old, old, open_source(tmp_path / "broken"))


def test_the_command(checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes a directory that is used as any other, with the record of the old one."""
    out = tmp_path / "new"
    line = ["transfer", str(checkpoint), str(out), "--img-size", "48", "--window", "6", "--data", str(photos)]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    assert "100.00 %" in text and "windows 6×6" in text and "scale of 4×4" in text and "24 pictures" in text
    config = read_config(out)
    assert config is not None and config.past_windows == (((4, 4), (4, 4)),) and config.img_size == (48, 48)
    record = read_metadata(out)
    assert record["task"] == {"name": "classify"} and record["preprocessing"] == PREPROCESSING | {"img_size": [48, 48]}
    stored = json.loads((out / "agreement.json").read_text())
    measured = stored["methods"]["log-extrapolate"]
    assert 0 < measured["feature_cosine"] < 1 and measured["images"] == 24 and "versions" in stored["environment"]
    assert cli.main(["eval", str(out), "--data", str(photos)]) == 0
    assert f"{measured['top1_after']:.4g}" in capsys.readouterr().out


def test_all_methods_are_compared_and_the_default_is_written(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"img_size": (48, 32), "window_size": (6, 3), "cpb": "all", "data": str(photos), "limit": 3}
    result = transfer_checkpoint(str(checkpoint), tmp_path / "new", **size)
    assert result is not None and list(result["methods"]) == ["log-extrapolate", "stretch", "bicubic", "geometric"]
    assert "windows that grow" in result["methods"]["geometric"]  # 4 → 3 on one axis
    assert len({m["feature_cosine"] for m in result["methods"].values() if isinstance(m, dict)}) == 3
    config = read_config(tmp_path / "new")
    assert config is not None and config.position_bias == "log" and set(config.pretrained_window_sizes) == {(4, 4)}
    text = capsys.readouterr().out
    assert "geometric is not possible here" in text and "log-extrapolate" in text


def test_poor_agreement_is_said(checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("swinscale.agreement.POOR_COSINE", 1.0)
    transfer_checkpoint(str(checkpoint), tmp_path / "new", img_size=48, data=str(photos), limit=2)
    assert "Poor agreement with log-extrapolate" in capsys.readouterr().out
    transfer_checkpoint(str(checkpoint), tmp_path / "same", data=str(photos), limit=2)
    assert "Poor agreement" not in capsys.readouterr().out


def test_classes_and_channels_on_the_command_line(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recorded class names follow the selection; statistics of other channels, and names of other classes, do not stay."""
    (tmp_path / "keep.txt").write_text("red\nblue\n")
    out = tmp_path / "new"
    line = ["transfer", str(checkpoint), str(out), "--classes", str(tmp_path / "keep.txt"), "--in-chans", "4"]
    assert cli.main([*line, "--data", str(photos)]) == 0
    record = read_metadata(out)["preprocessing"]
    assert record["classes"] == ["red", "blue"] and "mean" not in record and from_pretrained(out).num_classes == 2
    assert json.loads((out / "agreement.json").read_text())["methods"]["log-extrapolate"]["same_top1"] == 1
    assert cli.main(["transfer", str(checkpoint), str(tmp_path / "fresh"), "--num-classes", "7"]) == 0
    assert "new classifier" in capsys.readouterr().out
    assert "classes" not in read_metadata(tmp_path / "fresh")["preprocessing"]


def test_video_on_the_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clips"
    line = ["transfer", str(checkpoint), str(out), "--img-size", "6x32x32", "--window", "2x4x4", "--patch-time", "1"]
    assert cli.main(line) == 0
    model = from_pretrained(out).eval()
    assert model.config.patch_size == (1, 4, 4) and model.config.window_size[0] == (2, 4, 4)
    assert read_metadata(out)["preprocessing"]["img_size"] == [6, 32, 32]
    assert read_metadata(out)["task"]["name"] == "video"
    assert cli.main(["transfer", str(out), str(tmp_path / "larger"), "--img-size", "6x48x48"]) == 0
    assert read_metadata(tmp_path / "larger")["task"]["name"] == "video"
    assert cli.main(["predict", str(tmp_path), "--checkpoint", str(out)]) == 2
    assert "No films in" in capsys.readouterr().err


def test_simmim_gives_its_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = SimMIM(random_swin(num_classes=0), SimMIMConfig(mask_patch=8))
    save_pretrained(task, tmp_path / "old", metadata={"task": {"name": "simmim"}})
    transfer_checkpoint(str(tmp_path / "old"), tmp_path / "new", window_size=6, img_size=48)
    assert "this is the encoder" in capsys.readouterr().out and "task" not in read_metadata(tmp_path / "new")
    assert from_pretrained(tmp_path / "new").config.past_windows == (((4, 4), (4, 4)),)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cpb", "bicubik"], "Did you mean 'bicubic'?"),
        (["--cpb", "linear-extrapolate"], "its coordinates are logarithmic"),
        (["--cpb", "all"], "add --data FOLDER"),
        (["--cpb", "geometric", "--window", "3"], "choose bicubic"),
        (["--img-size", "32x"], "--img-size"),
        (["--img-size", "2x2x2x2"], "more than three axes"),
        (["--window", "2x3x4"], "window_size=(2, 3, 4)"),
        (["--img-size", "8x32x32", "--inflate", "centre"], "cpb='bicubic'"),
        (["--patch-time", "2"], "img_size as (time, height, width)"),
        (["--classes", "missing.txt"], "missing.txt"),
        (["--data", "missing"], "missing"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    """Exit code 2, and nothing is written."""
    assert cli.main(["transfer", str(checkpoint), str(tmp_path / "new"), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_weights_that_are_read_are_never_replaced(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (checkpoint, checkpoint / "model.safetensors"):
        assert cli.main(["transfer", str(source), str(checkpoint), "--window", "3"]) == 2
        assert "Name another directory" in capsys.readouterr().err


def test_the_measured_table_in_the_docs_is_that_of_the_command() -> None:
    root = Path(__file__).parent.parent
    methods = json.loads((root / "bench/results/transfer.json").read_text())["methods"]
    page = (root / "docs/transfer.md").read_text()
    assert "| | " + " | ".join(f"`{name}`" for name in methods) + " |" in page
    for label, name, form in (
        ("features, cosine", "feature_cosine", "{:.4f}"),
        ("last map, cosine", "map_cosine", "{:.4f}"),
        ("classes, KL", "kl", "{:.4f}"),
        ("same top-1", "same_top1", "{:.1%}"),
        ("top-1 before", "top1_before", "{:.1%}"),
        ("top-1 after", "top1_after", "{:.1%}"),
    ):
        cells = [form.format(measured[name]).replace("%", " %") for measured in methods.values()]
        assert f"| {label} | {' | '.join(cells)} |" in page
