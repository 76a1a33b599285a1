"""The demo on a folder of photos, in miniature: three runs and a report that a browser can open alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from swinscale import demo as module


@pytest.mark.slow
def test_demo_on_own_photos(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTO_BUDGET", 24)
    monkeypatch.chdir(tmp_path)
    report = module.demo("photos")
    assert report == Path("runs/demo-photos/report.html")  # beside the demo on the bundled images, not in its way
    page = report.read_text()
    for words in (
        "SimMIM loss",
        "from scratch",
        "true class",
        "composite",
        "Accuracy on unseen images",
        "effective_batch",
    ):
        assert words in page
    assert not re.findall(r'(?:src|href)="https?://', page)
    logs = {path: path.read_text() for path in report.parent.glob("*/log.jsonl")}
    assert len(logs) == 3
    module.demo("photos")  # a second call trains nothing again
    assert {path: path.read_text() for path in logs} == logs


@pytest.mark.slow
def test_demo_without_class_folders_shows_the_pre_training(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTO_BUDGET", 8)
    flat = tmp_path / "flat"
    shutil.copytree(photos / "red", flat)
    page = module.demo(str(flat), tmp_path / "demo").read_text()
    assert "SimMIM loss" in page
    assert "from scratch" not in page
