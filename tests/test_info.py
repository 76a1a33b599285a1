"""``swinscale info``: one fact a line, for every layout (R-CKPT-6, R-CKPT-7, R-LIC-1)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from random_models import random_swin
from swinscale.cli import main
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.models import create_model
from swinscale.tasks.simmim import SimMIM
from swinscale.weights import convert_state_dict, save_pretrained
from swinscale.weights.detectors import detector_to_mm
from swinscale.weights.layouts import LAYOUTS


def told(path: Path, capsys: Any, *more: str) -> dict[str, str]:
    """What is printed, by the first word of each line."""
    assert main(["info", str(path), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    found: dict[str, str] = {}
    for line in lines:
        name, text = line[:14].strip(), line[14:]
        found[name] = f"{found[name]}\n{text}" if name in found else text
    return found


ONLY_V1 = ("official-dense", "official-video", "torchvision-video", "mm-video")
CASES = [(layout, version) for layout in LAYOUTS for version in (1, 2) if version == 1 or layout not in ONLY_V1]


@pytest.mark.parametrize(("layout", "version"), CASES)
def test_every_layout_is_described(layout: str, version: int, tmp_path: Path, capsys: Any) -> None:
    video = layout.endswith("-video")
    shape: dict[str, Any] = {"patch_size": (2, 4, 4), "img_size": (8, 32, 32)} if video else {}
    bare = layout == "official-dense" or layout.endswith("-simmim")
    model: Any = random_swin(version, **shape, num_classes=0 if bare else 5)
    config = model.config
    if layout.endswith("-simmim"):
        model = SimMIM(model)
    state = convert_state_dict(model.state_dict(), layout, config=config)
    torch.save({"model": state}, tmp_path / "weights.pth")
    found = told(tmp_path / "weights.pth", capsys)
    expected = "transformers" if (layout, version) == ("transformers5", 2) else layout
    assert f"({expected})" in found["layout"]
    assert f"Swin V{version} (embed_dim 24, depths 2-2, heads 2-4" in found["model"]
    count = sum(t.numel() for t in model.state_dict().values())
    assert found["parameters"] == f"{count:,} (float32)"
    stored = version == 1 or layout == "torchvision"
    assert found["windows"].startswith("4×4×4 in" if video else "4×4 in" if stored else "8×8 in every stage (assumed")
    assert ("mask token" in found["task"]) == layout.endswith("-simmim")
    assert found["sha256"] == hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()


def test_a_published_file(tmp_path: Path, capsys: Any) -> None:
    """Provenance, licence and accuracy by the name, windows by the name, and that no hash is published."""
    name = "swinv2_tiny_patch4_window8_256.pth"
    torch.save({"model": create_model("swinv2_tiny_window8_256").state_dict()}, tmp_path / name)
    found = told(tmp_path / name, capsys, "--for", "swinv2_tiny_window8_256")
    assert found["model"].startswith("Swin V2 Tiny") and found["model"].endswith("; swinv2_tiny_window8_256")
    assert found["parameters"].startswith("28,347,154")
    assert "said by the file's name" in found["windows"]
    for words in ("microsoft/Swin-Transformer", "ImageNet-1K", "81.8 %", "under MIT", "no hash of it is published"):
        assert words in found["published"], words
    assert any(line.startswith("for swinv2_tin") for line in found) and "note" not in found


def test_a_hash_in_the_name_is_checked(tmp_path: Path, capsys: Any) -> None:
    model = random_swin(2)
    torch.save(convert_state_dict(model.state_dict(), "torchvision", config=model.config), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    right = (tmp_path / "w.pth").rename(tmp_path / f"swin_v2_t-{digest[:8]}.pth")
    found = told(right, capsys)
    assert f"(its name promises {digest[:8]}…: the same)" in found["sha256"] and "'tiny'" in found["note"]
    wrong = right.rename(tmp_path / "swin_v2_t-b137f0e2.pth")
    assert main(["info", str(wrong)]) == 2
    assert "begins with b137f0e2" in capsys.readouterr().err


def test_windows_of_a_transferred_model(tmp_path: Path, capsys: Any) -> None:
    """R-RES-2: what it was first trained with, and every size since."""
    from swinscale.weights import transfer

    first = random_swin(2, window_size=2, img_size=16)
    second, _ = transfer(first, img_size=32, window_size=4)
    third, _ = transfer(second, img_size=64, window_size=8)
    save_pretrained(third, tmp_path / "third")
    found = told(tmp_path / "third", capsys)
    assert found["windows"] == "8×8 in every stage (recorded beside the weights)"
    assert found["trained"] == (
        "first with windows 2×2 in every stage, which scale the bias; "
        "windows before these: 2×2 in every stage, then 4×4 in every stage"
    )


def test_what_a_run_recorded(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    metadata = {"task": {"name": "classify"}, "preprocessing": {"mean": [0.5] * 3, "classes": list("abcde")}}
    save_pretrained(random_swin(1), run / "best", metadata=metadata)
    recipe = {
        "name": "desk",
        "model": {},
        "task": {},
        "data": {"train": "photos"},
        "train": {"epochs": 3, "batch_size": 8},
    }
    (run / "config.json").write_text(json.dumps(recipe))
    (run / "result.json").write_text(json.dumps({"metrics": {"top1": 0.75, "loss": float("nan")}}))
    found = told(run / "best", capsys)
    assert found["training"] == "recipe desk, 3 epochs, batch 8, data photos, top1 0.75 at the end"
    assert found["preprocessing"] == "mean [0.5, 0.5, 0.5], classes a, b, c, d, e"


def test_whether_it_fits(tmp_path: Path, capsys: Any) -> None:
    """Reshaped tables, a new classifier, another depth, another scale of the position bias, video."""
    save_pretrained(create_model("swin_pico_patch4_window4_32", num_classes=7), tmp_path / "pico")

    def lines(*arguments: str) -> str:
        assert main(["info", *arguments]) == 0
        return capsys.readouterr().out.rpartition("\n\n")[2]

    def fits(name: str) -> str:
        return lines(str(tmp_path / "pico"), "--for", name)

    own = fits("swin_pico_patch4_window4_32")
    assert "for swin_pico_patch4_window4_32: fits\n" in own and "new classifier: 7 classes in the file, 1000" in own
    other = fits("swin_micro_patch2_window4_32")
    assert "does not fit" in other and "mismatched" in other and "missing" in other
    assert "does not fit" in fits("swinv2_pico_patch4_window4_32")
    save_pretrained(create_model("swin_base_patch4_window6_192", num_classes=0, depths=(1, 1, 1, 1)), tmp_path / "w6")
    assert "bias table, window 6×6 → 7×7, bicubic" in lines(
        str(tmp_path / "w6"), "--model", "swin_base_patch4_window7_224"
    )
    save_pretrained(random_swin(2, window_size=2), tmp_path / "v2")
    assert "does not fit" in lines(str(tmp_path / "v2"), "--for", "swinv2_pico_patch4_window4_32")
    assert main(["info", str(tmp_path / "pico"), "--for", "swin_pica"]) == 2
    assert "Unknown model 'swin_pica'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"stages.0.blocks.0.attn.meta_mlp.fc1.weight": torch.zeros(2)}, "swinv2_cr"),
        ({"conv1.weight": torch.zeros(2)}, "not the weights of a Swin Transformer"),
    ],
)
def test_others_are_refused_with_exit_code_2(state: Any, words: str, tmp_path: Path, capsys: Any) -> None:
    torch.save(state, tmp_path / "w.pth")
    assert main(["info", str(tmp_path / "w.pth")]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and "w.pth" in message


def test_a_detector_is_described(tmp_path: Path, capsys: Any) -> None:
    """OpenMMLab's file and ours: the parts of the detector, and whose parameters are counted."""
    model = Detector(random_swin(1, num_classes=0), 5, DetectConfig(channels=8, fc_channels=16))
    torch.save({"meta": {}, "state_dict": detector_to_mm(dict(model.state_dict()), "mm")}, tmp_path / "theirs.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    found = {name: told(tmp_path / f"{name}.pth", capsys) for name in ("theirs", "ours")}
    text = "object detection: Mask R-CNN, 5 classes, pyramid of 8 channels, 3 anchors a place, 1 box head of 2 fully"
    assert all(lines["task"].startswith(text) for lines in found.values())
    count = sum(t.numel() for t in model.backbone.state_dict().values())
    assert all(lines["parameters"] == f"{count:,} (float32) in the backbone" for lines in found.values())
    assert "(mm)" in found["theirs"]["layout"] and "(official)" in found["ours"]["layout"]
