"""The demo on a folder of photos, in miniature: three runs and a report that a browser can open alone."""

from __future__ import annotations

import re
import shutil

import pytest

from swinscale import demo as module


@pytest.mark.slow
def test_demo_on_own_photos(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTO_BUDGET", 24)
    report = module.demo(str(photos), tmp_path / "demo")
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
    stamp = (tmp_path / "demo/finetuned/result.json").stat().st_mtime
    module.demo(str(photos), tmp_path / "demo")  # a second call trains nothing again
    assert (tmp_path / "demo/finetuned/checkpoints").exists()
    assert (tmp_path / "demo/finetuned/result.json").stat().st_mtime >= stamp


@pytest.mark.slow
def test_demo_without_class_folders_shows_the_pre_training(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTO_BUDGET", 8)
    flat = tmp_path / "flat"
    shutil.copytree(photos / "red", flat)
    page = module.demo(str(flat), tmp_path / "demo").read_text()
    assert "SimMIM loss" in page
    assert "from scratch" not in page
