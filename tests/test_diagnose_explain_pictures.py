"""Explanations as pictures: position bias and temperatures, ``swinscale explain``, and what mistakes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.random_models import CLIP, model_and_input, random_swin

from swinscale.cli import main
from swinscale.data import normalisation
from swinscale.diagnose.explain import (
    attention,
    attention_distance,
    cam,
    deletion,
    integrated_gradients,
    position_bias,
    rollout,
    temperatures,
)
from swinscale.diagnose.explain_pictures import (
    draw_attention_distance,
    draw_bias_curves,
    draw_position_bias,
    draw_temperatures,
)
from swinscale.diagnose.explain_position import log_offsets
from swinscale.errors import UsageError
from swinscale.tasks import Classify, SimMIM


@pytest.mark.parametrize("version", [1, 2])
def test_position_bias_is_the_attention_of_equal_tokens(version: int):
    """With queries and keys of zero, attention is the softmax of the bias, and says where each key is."""
    model = random_swin(version=version, img_size=32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name or "q_bias" in name:
                p.zero_()
    found = attention(model, torch.randn(1, 3, 32, 32), 0, 0, (4, 8))[0]  # the token in row 1, column 2
    bias = position_bias(model, 0, 0)
    assert bias.shape == (2, 7, 7)
    expected = bias[:, 3 - 1 : 3 + 3, 3 - 2 : 3 + 2].flatten(1).softmax(1).unflatten(1, (4, 4))
    torch.testing.assert_close(found[:, :4, :4], expected, rtol=1e-4, atol=1e-6)


def test_log_offsets_and_temperatures():
    model = random_swin(version=2)
    rows, columns = log_offsets(model, 0)
    expected = torch.arange(-3, 4)
    expected = expected.sign() * torch.log2(1 + 8 * expected.abs() / 3) / 3
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(columns, expected)
    found = temperatures(model)
    assert list(found) == [f"layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
    scale = model.layers[1].blocks[0].attn.logit_scale.detach().flatten()
    torch.testing.assert_close(found["layers.1.blocks.0"], scale.clamp(max=np.log(100)).exp())
    with pytest.raises(UsageError, match="V1"):
        temperatures(random_swin(version=1))


def test_weights_are_drawn(tmp_path: Path):
    model = random_swin(version=2, num_heads=(2, 8))
    drawings = {
        "bias": draw_position_bias(model, 1, 0),
        "few": draw_bias_curves(model, 0, 0),
        "many": draw_bias_curves(model, 1, 0),
        "temperatures": draw_temperatures(model),
        "distance": draw_attention_distance(attention_distance(model, torch.randn(1, 3, 32, 32))),
    }
    for name, drawing in drawings.items():
        drawing.save(tmp_path / name)
        assert Image.open(tmp_path / f"{name}.png").width > 500
    assert "8 maps" in drawings["bias"].description
    assert "head 1, columns" in (tmp_path / "few.svg").read_text()
    assert "20 heads" in drawings["temperatures"].description
    with pytest.raises(UsageError, match="three axes"):
        draw_position_bias(random_swin(**CLIP), 0, 0)


def test_mistakes_say_what_is_allowed():
    model, x = model_and_input("V1")
    for wrong, said in (
        (lambda: attention(model, x, 2, 0, (0, 0)), "stage=2 .*stages 0 to 1"),
        (lambda: attention(model, x, 1, 5, (0, 0)), "block=5 .*stage 1 .*blocks 0 to 1"),
        (lambda: attention(model, x, 0, 0, (37, 0)), "query=37,0 .*37×22.*row 0 to 36, column 0 to 21"),
        (lambda: attention(model, x, 0, 0, (0, 0, 0)), "query=0,0,0"),
        (lambda: attention(torch.nn.Linear(2, 2), x, 0, 0, (0, 0)), "Linear is not a Swin"),
        (lambda: rollout(model, x, residual=1.5), "residual=1.5"),
        (lambda: rollout(model, x, (0, 22)), "column 0 to 21"),
        (lambda: cam(model, x, 5), "target=5 .*0 to 4"),
        (lambda: cam(model, x, [1, 2, 3]), "one for each of 2 images"),
        (lambda: cam(model, x, method="best"), "grad-cam, exact"),
        (lambda: cam(model, x, method="exact", point="embed"), "point='embed'"),
        (lambda: cam(random_swin(num_classes=0), x), "no classifier"),
        (lambda: integrated_gradients(model, x, steps=0), "steps=0"),
        (lambda: deletion(model, x, torch.zeros(2, 5, 3)), "one value per pixel"),
        (lambda: deletion(model, x, torch.zeros(2, 37, 22), cell=0), "cell=0"),
    ):
        with pytest.raises(UsageError, match=said):
            wrong()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier of three named classes, and a SimMIM model."""
    folder = tmp_path_factory.mktemp("explain")
    mean, std = normalisation(3)
    preprocessing = {"mean": list(mean), "std": list(std), "crop_ratio": 0.875}
    model = random_swin(version=2, num_classes=3)
    Classify(model, 3, preprocessing={**preprocessing, "classes": ["blue", "green", "red"]}).save_pretrained(
        folder / "c"
    )
    SimMIM(random_swin(version=1, num_classes=0), preprocessing=preprocessing).save_pretrained(folder / "m")
    return {"classifier": folder / "c", "simmim": folder / "m"}


def test_the_command_writes_the_picture(checkpoints: dict[str, Path], photos: Path, tmp_path: Path, capsys):
    arguments = [
        "explain",
        str(photos / "red/0.png"),
        "--checkpoint",
        str(checkpoints["classifier"]),
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--target", "green", "--query", "5,6", "--stage", "0", "--block", "1", "--head", "1"]) == 0
    said = capsys.readouterr().out
    assert "green" in said
    assert "8 random orders" in said
    svg = (tmp_path / "0_explained.svg").read_text()
    for text in (
        "For “green”",
        "Attention of ×, head 1",
        "row 5, column 6",
        "stage 0, block 1",
        "Rollout",
        "random order",
    ):
        assert text in svg, text
    image = np.asarray(Image.open(tmp_path / "0_explained.png").convert("RGB"))
    assert image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500
    assert main([*arguments, "--target", "2", "--method", "grad-cam"]) == 0
    assert "red" in capsys.readouterr().out


def test_a_model_without_classes_is_explained_too(checkpoints: dict[str, Path], photos: Path, tmp_path: Path, capsys):
    arguments = [
        "explain",
        str(photos / "red/0.png"),
        "--checkpoint",
        str(checkpoints["simmim"]),
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    assert "row 16, column 16" in capsys.readouterr().out  # the centre
    svg = (tmp_path / "0_explained.svg").read_text()
    assert "Rollout" in svg
    assert "Deletion" not in svg


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "gren"], "Did you mean 'green'"),
        (["--target", "3"], "0 to 2"),
        (["--method", "lime"], "integrated-gradients, grad-cam, exact"),
        (["--query", "32,0"], "row 0 to 31"),
        (["--query", "7"], "row and column"),
        (["--stage", "2"], "stages 0 to 1"),
        (["--block", "2"], "blocks 0 to 1"),
        (["--head", "4"], "heads 0 to 1"),
        (["--head", "-1"], "whole number"),
    ],
)
def test_wrong_values_end_in_one_line(checkpoints: dict[str, Path], photos: Path, capsys, more: list[str], said: str):
    arguments = ["explain", str(photos / "red/0.png"), "--checkpoint", str(checkpoints["classifier"]), *more]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("swinscale: ")
    assert error.count("\n") == 1
    assert said in error


def test_missing_pictures_and_classes_end_in_one_line(
    checkpoints: dict[str, Path], photos: Path, tmp_path: Path, capsys
):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    simmim = ["--checkpoint", str(checkpoints["simmim"])]
    for arguments, said in (
        ([str(tmp_path / "none.jpg"), *simmim], "No such picture"),
        ([str(broken), *simmim], "broken.jpg"),
        ([str(photos / "red/0.png"), *simmim, "--target", "red"], "no classes"),
    ):
        assert main(["explain", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
