"""int8 models: they are written, they agree with the original, and mistakes are told."""

from __future__ import annotations

import json

import pytest
import torch

from swinscale.cli import main

pytest.importorskip("openvino")
pytest.importorskip("nncf")


@pytest.fixture
def trained(photos, tmp_path):
    """A tiny classifier trained on photos, whose run directory it returns."""
    out = tmp_path / "run"
    model = ["--model", "swinv2_pico_patch4_window4_32", "model.embed_dim=32", "model.depths=(1,1)"]
    train = ["train.epochs=3", "train.batch_size=6", "train.num_workers=0", "train.device=cpu"]
    assert main(["train", "photos_scratch", "--data", str(photos), "--out", str(out), *model, *train]) == 0
    return out


@pytest.mark.slow
def test_int8_model_agrees_and_says_what_it_costs(trained, tmp_path, capsys):
    out = tmp_path / "int8"
    assert main(["quantize", str(trained / "best"), "--out", str(out), "--calibration", "8"]) == 0
    printed = capsys.readouterr().out
    assert "top-1" in printed and "same prediction" in printed
    result = json.loads((out / "quantization.json").read_text())
    assert result["calibration_images"] == 8
    assert result["same_prediction"] >= 80
    assert result["megabytes"]["int8"] < 0.6 * result["megabytes"]["float32"]

    import openvino

    compiled = openvino.Core().compile_model(out / "model.xml", "CPU")
    for batch in (1, 3):  # the batch is free
        assert compiled(torch.zeros(batch, 3, 32, 32).numpy())[0].shape == (batch, 3)

    assert main(["quantize", str(trained / "best"), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_int8_takes_any_size(trained, tmp_path, capsys):
    """R-EXP-1, R-EXP-4: integers with batch, height and width open; accuracy and speed are shown, deviations too."""
    out = tmp_path / "int8"
    command = ["export", str(trained / "best"), "--format", "openvino-int8", "--dynamic", "hw", "--check"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "top-1" in printed and "images per second" in printed and "rounded" in printed

    import openvino

    compiled = openvino.Core().compile_model(out / "model.xml", "CPU")
    for shape in ((1, 3, 32, 32), (3, 3, 45, 70), (2, 3, 5, 9)):
        logits = compiled(torch.randn(shape).numpy())[0]
        assert logits.shape == (shape[0], 3) and torch.from_numpy(logits).isfinite().all()


def test_mistakes_are_told(tmp_path, capsys):
    assert main(["quantize", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "nothing" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
