"""Finished runs of segmenters as rows of a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import segment_runs

from swinscale.errors import UsageError


def finished(folder: Path, init: str | None, limit: int, miou: float) -> Path:
    """The three files that a run leaves, as far as they are read."""
    folder.mkdir()
    data = {"eval_split": "test", "limit": limit, "crop": [8, 8], "short": 8}
    config = {
        "name": "tiny",
        "init": init,
        "data": data,
        "task": {"channels": 4, "test_short": 8},
        "train": {"epochs": 2},
    }
    machine = {"threads": 1, "processor": "any"}
    manifest = {
        "parameters": 1_500_000, "train_images": 3, "eval_images": 2, "effective_batch": 1, "scaled_lr": 0.001,
        "machine": machine, "precision": "bf16", "versions": {}, "commit": "abc", "date": "2026-01-02T03:04:05",
    }  # fmt: skip
    per_class = [
        {"name": "sky", "iou": miou, "acc": 1.0, "pixels": 5},
        {"name": "sea", "iou": None, "acc": None, "pixels": 0},
    ]
    metrics = {"miou": miou, "macc": 0.9, "aacc": 0.8, "per_class": per_class}
    result = {"steps": 6, "seconds": 90.0, "metrics": metrics}
    for name, content in (("config", config), ("manifest", manifest), ("result", result)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_runs_stand_in_the_table_of_their_kind(tmp_path: Path):
    heart = segment_runs.row(finished(tmp_path / "heart", None, 3, 0.961))
    scratch = segment_runs.row(finished(tmp_path / "scratch", None, 0, 0.377))
    tuned = segment_runs.row(finished(tmp_path / "tuned", "runs/simmim/last", 0, 0.4))
    by_heart, scenes = segment_runs.heart_table([heart, scratch]), segment_runs.scenes_table([heart, scratch, tuned])
    assert "96.1" in by_heart and "37.7" not in by_heart and "| bf16" in by_heart and "| yes" in by_heart
    assert "37.7" in scenes and "96.1" not in scenes and "`simmim`" in scenes and "–" in scenes


def test_a_run_that_is_no_finished_segmenter_is_refused(tmp_path: Path):
    unfinished = finished(tmp_path / "run", None, 0, 0.5)
    (unfinished / "result.json").unlink()
    with pytest.raises(UsageError, match="holds no finished run of a segmenter"):
        segment_runs.row(unfinished)
