"""The claim about the memory recipe: steps run, and verdicts follow from results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swinscale.claims import memory
from swinscale.claims.memory import BLOCK, NONE, RECIPE, SEQUENTIAL, Settings
from swinscale.claims.results import drawing
from swinscale.memory import Predictor

REPRODUCED, REFUTED, OPEN = "reproduced", "not reproduced", "not decided at this scale"


def test_steps_at_every_scale():
    for scale in ("desk", "gpu", "paper"):
        made = memory.steps(scale, "", 1)  # type: ignore[arg-type]
        assert all(s.name.isascii() for s in made)
        assert [s.name for s in made if s.alone] == ["measured"] and len(made) == 1 + len(memory.PLACES)
        json.dumps([s.described() for s in made])
        settings = made[-1].arguments["settings"]
        assert settings.model.depths == (2, 2, 42, 4) and settings.model.main_norm_interval == 6
        assert str(settings.size) in memory.settings(scale)  # type: ignore[arg-type]
    assert settings.model.stage_dims == (512, 1024, 2048, 4096)


def test_the_gpu_scale_fits_a_card_of_80_gb_without_a_technique():
    settings = memory.SETTINGS["gpu"]
    plan = Predictor(settings.model, micro_batch=settings.count).plan(memory.TECHNIQUES[NONE])
    assert 20e9 < plan.peak < 70e9


def test_giant_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "PREDICTED", {name: memory.PREDICTED[name] for name in (NONE, "ZeRO-1")})
    found = memory.predict_place(tmp_path, "192/12")
    assert found["parameters"] == 2_997_843_680  # SPEC: backbone without head
    assert found["techniques"][NONE]["states"] == 16 * found["parameters"]
    assert found["techniques"]["ZeRO-1"]["states"] == pytest.approx(16 * found["parameters"] / 8, rel=0.01)
    assert all(t["peak"] > t["states"] for t in found["techniques"].values())


def test_techniques_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "GIANT", {**memory.GIANT, "depths": (2, 2, 3, 2)})
    found = memory.measure_techniques(tmp_path, Settings(width=8, size=64, window=8, count=1, rounds=2))
    assert list(found["peaks"]) == list(found["seconds"]) == list(memory.TECHNIQUES) and not found["missing"]
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    peaks = found["peaks"]
    assert found["held"] < peaks[BLOCK] < peaks["selective checkpointing"] < peaks[NONE]
    assert peaks["block and sequential"] < peaks[SEQUENTIAL] < peaks[NONE]


def constructed(
    block: float = 0.2, slower: float = 1.2, sequential: float = 1.02, recipe: float = 23.0, states: float = 48.0
) -> dict[str, Any]:
    """Results in which block checkpointing keeps such a share, and so on; times with a noise of a hundredth."""
    noise, held = (0.99, 1.0, 1.01), 100_000_000
    factors = dict.fromkeys(memory.TECHNIQUES, 1.1) | {NONE: 1.0, BLOCK: slower, SEQUENTIAL: sequential}
    peaks = dict.fromkeys(memory.TECHNIQUES, 900_000_000) | {NONE: 1_100_000_000, BLOCK: held + int(block * 1e9)}
    techniques = {name: {"states": int(states * 1e9), "peak": int(50e9)} for name in memory.PREDICTED}
    techniques[RECIPE]["peak"] = int(recipe * 1e9)
    seconds = {name: [f * n if name != NONE else 1.0 for n in noise] for name, f in factors.items()}
    return {
        **{memory.predicted_step(p): {"parameters": 3, "techniques": techniques} for p in memory.PLACES},
        "measured": {"held": held, "peaks": peaks, "seconds": seconds, "missing": []},
    }


def verdicts(**changes: float) -> list[str]:
    return [finding.verdict for finding in memory.read("desk", constructed(**changes)).findings]


def test_verdicts_follow_from_results():
    assert verdicts() == [REPRODUCED] * 6
    assert verdicts(states=47.2)[0] == REFUTED
    assert verdicts(block=0.6)[1] == REFUTED
    assert [verdicts(slower=s)[2] for s in (1.3, 1.6)] == [OPEN, REFUTED]
    assert [verdicts(sequential=s)[3] for s in (0.9, 1.1, 1.4)] == [REPRODUCED, OPEN, REFUTED]
    assert verdicts(recipe=39.0)[4:] == [REFUTED] * 2  # 40 GB are not all for tensors


def test_a_technique_that_needs_too_much_memory_decides_nothing():
    results = constructed()
    for part in ("peaks", "seconds"):
        del results["measured"][part][NONE]
    results["measured"]["missing"] = [NONE]
    outcome = memory.read("gpu", results)
    assert [f.verdict for f in outcome.findings] == [REPRODUCED, OPEN, OPEN, OPEN, REPRODUCED, REPRODUCED]
    assert any("more memory than this machine" in note for note in outcome.notes)
    assert "nan" not in " ".join(f.measured for f in outcome.findings)


def test_pictures_are_drawn(tmp_path: Path):
    for figure in memory.read("desk", constructed()).figures:
        drawing(figure).save(tmp_path / figure.name)
        assert (tmp_path / f"{figure.name}.png").stat().st_size > 5000
