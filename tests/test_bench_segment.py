"""The benchmark of segmentation: everybody's weights are ours, outputs are compared first, and the page shows what was found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from bench import __main__ as bench
from bench import page, segment, segmenters
from bench.runner import Runner, distance, peak_memory
from bench.segment import Speed, measure
from bench.segmenters import CLASSES, CONTENDERS, OURS, SAME, build
from bench.speed import add_ratios
from torch import nn

from swinscale.heads.upernet import Segmenter

pytestmark = pytest.mark.usefixtures("compiler_settings")
SMALL = Speed("inference", size=64, batch=1, tiny=True)
WHERE = {
    "machine": {"processor": "a processor", "cpus": 2, "threads": 1, "gpu": None},
    "versions": {"torch": "2.9"},
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "command": "python -m bench segment",
}


@pytest.mark.parametrize("name", CONTENDERS)
def test_everybody_gives_logits_of_the_whole_picture_and_trains(name):
    model = build(name, tiny=True).train()
    images, target = torch.randn(2, 3, 64, 96), torch.randint(CLASSES, (2, 64, 96))
    assert model.eval()(images).shape == (2, CLASSES, 64, 96)
    torch.stack(list(model.train().losses(images, target).values())).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all("backbone.swin.layernorm" in name for name in without)  # transformers has a norm that nothing reads


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("mode", segment.MODES)
def test_the_same_weights_give_the_same_numbers(name, mode):
    """Logits in use; loss and gradients in training, batch statistics included."""
    speed = Speed(mode, size=72, batch=2, tiny=True)
    ours, theirs = (Runner(speed, speed.ready(one)).check() for one in (OURS[0], name))
    assert ours[0].abs().max() > 0.1 and (ours[1] is None) == (mode == "inference")
    assert distance(theirs, ours) <= 1e-5


def test_whoever_gives_other_numbers_is_not_timed(monkeypatch):
    real = build

    def tampered(name: str, tiny: bool) -> nn.Module:
        model = real(name, tiny)
        if name == SAME[0]:
            with torch.no_grad():
                model.model.decode_head.classifier.weight.mul_(1.01)
        return model

    monkeypatch.setattr(segment, "build", tampered)
    rows = {row["name"]: row for row in measure(SMALL, repeats=1, memory=False)["contenders"]}
    assert rows[SAME[0]]["status"] == "cannot" and "outputs differ by 0.0" in rows[SAME[0]]["reason"]
    assert rows[SAME[1]]["status"] == "ok" and rows[SAME[1]]["difference"] <= 1e-5
    assert "seconds" not in rows[SAME[0]]


def test_without_ours_nobody_is_compared(monkeypatch):
    def fails(name: str, tiny: bool) -> nn.Module:
        if name == OURS[0]:
            raise RuntimeError("broken")
        return build(name, tiny)

    monkeypatch.setattr(segment, "build", fails)
    monkeypatch.setattr(Speed, "contenders", (OURS[0], SAME[1], CONTENDERS[-1]))
    rows = measure(SMALL, repeats=1, memory=False)["contenders"]
    assert [row["status"] for row in rows] == ["cannot", "cannot", "ok"]
    assert (
        rows[0]["reason"] == "RuntimeError: broken"
        and rows[1]["reason"] == "swinscale V1-T gave nothing to compare with"
    )


def test_a_package_that_is_missing_is_a_line(monkeypatch):
    monkeypatch.setattr(segmenters.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(Speed, "contenders", (OURS[0], CONTENDERS[-1]))
    rows = measure(SMALL, repeats=1, memory=False)["contenders"]
    assert rows[1]["reason"] == "segmentation_models_pytorch is not installed" and "seconds" in rows[0]


def test_ours_is_the_published_one_at_full_size():
    """60 M parameters with the auxiliary head (P1), no dropout, no stochastic depth."""
    with torch.device("meta"):
        model = Segmenter(segmenters.our_segmenter(1, tiny=True).backbone, CLASSES, segmenters.heads(False))
    assert model.config.channels == 512 and model.config.aux_channels == 256 and model.config.dropout == 0
    built = build(OURS[0], tiny=False)
    assert round(sum(p.numel() for p in built.parameters()) / 1e6) == 60
    assert not any(isinstance(m, nn.Dropout | nn.Dropout2d) and m.p for m in built.modules())


def case(**more: Any) -> dict[str, Any]:
    contenders: list[dict[str, Any]] = [
        {"name": name, "status": "ok", "parameters": 6e7, "images_per_s": 0.5, "rounds": [4.0 + i, 4.0 + i],
         "seconds": {"median": 4.0 + i, "q1": 4.0 + i, "q3": 4.0 + i}, "memory_bytes": 2e9}
        for i, name in enumerate(CONTENDERS)
    ]  # fmt: skip
    contenders[2]["difference"] = 2e-6
    contenders[-1] = {"name": CONTENDERS[-1], "status": "cannot", "reason": "no room"}
    add_ratios(contenders, OURS)
    how = {"device": "cpu", "threads": 1, "mode": "inference", "dtype": "fp32", "size": 512, "batch": 1}
    return {
        **how,
        "tiny": False,
        "classes": 150,
        "channels": 512,
        "contenders": contenders,
        "environment": WHERE,
        **more,
    }


def test_the_page_shows_what_was_found_and_under_which_conditions(tmp_path):
    """Between the markers of docs/segmentation.md."""
    content = {"kind": "segment", "speed": [case(), case(threads=2, mode="training"), case(device="cuda")]}
    (tmp_path / "segment.json").write_text(json.dumps(content))
    file = tmp_path / "segmentation.md"
    names = ("segment.speed", "segment.machine")
    file.write_text(
        "before\n" + "\n".join(f"<!-- bench:{name} -->\nold\n<!-- /bench -->" for name in names) + "\nafter\n"
    )
    assert page.rewrite(file, tmp_path) == list(names)
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert "inference fp32, 1 × 512², 1 thread " in text and "training fp32, 1 × 512², 2 threads" in text
    assert "1.50" in text and "no room" in text and "2,000" in text and "2.0e-06" in text and "512 channels" in text
    assert text.count("a processor") == 1
    assert set(page.parts(tmp_path, file)) == {"segment.speed", "segment.speed-gpu", "segment.machine"}


def test_mistakes_are_one_line(tmp_path, capsys):
    assert bench.main(["segment", "--quick", "--out", str(tmp_path / "out"), "--modes", "flying"]) == 2
    said = capsys.readouterr().err
    assert "flying" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_everybody_is_measured_in_the_same_rounds(tmp_path, capsys):
    """With one thread and with two; a second call replaces rows of the same kind and keeps the others."""
    command = ["segment", "--quick", "--out", str(tmp_path), "--repeats", "2", "--no-memory"]
    assert bench.main([*command, "--threads", "1"]) == 0
    assert bench.main([*command, "--threads", "1", "2", "--modes", "inference"]) == 0
    cases = json.loads((tmp_path / "segment-quick.json").read_text())["speed"]
    kinds = [(case["threads"], case["mode"], case["batch"]) for case in cases]
    assert kinds == [(1, "training", 2), (1, "inference", 1), (2, "inference", 1)]
    assert [case["environment"]["machine"]["threads"] for case in cases] == [1, 1, 2]
    for rows in (case["contenders"] for case in cases):
        assert [row["name"] for row in rows] == list(CONTENDERS)
        assert all(row["status"] == "ok" and len(row["rounds"]) == 2 for row in rows), rows
        assert all(set(row["ratios"]) == set(OURS) for row in rows) and rows[0]["ratios"][OURS[0]]["median"] == 1
        assert all(row["difference"] <= 1e-4 for row in rows if row["name"] in SAME)
    assert "segmentation_models_pytorch ResNet-50" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_that_of_one_contender_in_its_own_process():
    found = peak_memory(Speed("training", size=64, tiny=True), OURS[1])
    assert found is not None and 1e7 < found < 2e9
