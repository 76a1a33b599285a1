"""The table of all systems that the articles name, and the speed of LR-Net beside others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench import lrnet, systems
from bench.__main__ import main

from swinscale import cli
from swinscale.errors import UsageError
from swinscale.models.lrnet import LocalRelation
from swinscale.recipes import RECIPES

ROOT = Path(__file__).parent.parent


def finished(folder: Path, recipe: str, **metrics: float) -> Path:
    """The three files that a run leaves, as far as they are read."""
    folder.mkdir()
    config = {"name": recipe, "init": None, "data": {"train": "/somewhere/pictures"}, "train": {"epochs": 2, "seed": 0}}
    config["model"] = {"widths": [8]}
    manifest = {
        "parameters": 1_500_000, "train_images": 3, "eval_images": 2, "machine": {"threads": 1, "processor": "any"},
        "precision": "bf16", "versions": {}, "commit": "abc", "date": "2026-01-02T03:04:05",
    }  # fmt: skip
    result = {"steps": 6, "seconds": 90.0, "metrics": {**metrics, "confusion": [[1]]}}
    for name, content in (("config", config), ("manifest", manifest), ("result", result)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_run_that_is_noted_stands_in_its_row(tmp_path, capsys):
    run = finished(tmp_path / "run", "photos_lrnet", top1=0.6251)
    assert main(["systems", "--runs", str(run), "--out", str(tmp_path)]) == 0
    assert "top-1 62.5 %" in capsys.readouterr().out
    finished(tmp_path / "again", "photos_lrnet", top1=0.75)
    assert main(["systems", "--runs", str(tmp_path / "again"), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "systems.json").read_text())
    assert [one["metrics"] for one in content["runs"]] == [{"top1": 0.75}]  # the same run, done again
    [row] = [line for line in systems.table(content).splitlines() if line.startswith("| LR-Net")]
    assert "pictures: top-1 75.0 %, 2 epochs (one seed)" in row


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no finished run"):
        systems.row(tmp_path)


def test_what_was_not_measured_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(systems, "FOLDER", tmp_path)
    monkeypatch.setattr(systems, "CLAIMS", tmp_path)
    lines = systems.table({"runs": []}).splitlines()[2:]
    assert len(lines) == len(systems.SYSTEMS)
    assert all("not measured" in line for line in lines)


@pytest.mark.parametrize("system", systems.SYSTEMS, ids=lambda s: s.name)
def test_every_system_has_a_command_and_a_test(system):
    """Its command is one that the library knows, and its test exists."""
    words = system.command.split()
    options = cli._options(words[1:])
    if hasattr(options, "recipe"):
        assert options.recipe in RECIPES
    assert (ROOT / system.tests).is_file()
    assert system.published


def test_the_copying_layer_is_ours():
    """What is timed beside our layer gives the same numbers, for widths that groups do not divide and with a stride."""
    torch.manual_seed(0)
    config = lrnet.create_model("lrnet_micro").config
    for dim, stride in ((16, 1), (20, 2)):
        layer = LocalRelation(config, dim, stride)
        x = torch.randn(2, dim, 9, 11)
        expected = layer(x)
        layer.__class__ = lrnet.Unfolded
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_lrnet_is_measured_beside_others(tmp_path, capsys):
    arguments = ["lrnet", "--quick", "--batch", "2", "--repeats", "2", "--no-memory", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert lrnet.RESNET in capsys.readouterr().out
    content = json.loads((tmp_path / "lrnet-quick.json").read_text())
    assert [row["mode"] for row in content["speed"]] == ["training", "inference"]
    for row in content["speed"]:
        by_name = {one["name"]: one for one in row["contenders"]}
        assert all(one["status"] == "ok" for one in row["contenders"]), row["contenders"]
        assert by_name[lrnet.UNFOLDED]["difference"] < 1e-3
