"""The page about a run: of one that finished, one that was killed, one without vital signs, and of nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.test_diagnose_report import Page
from tests.test_train import recipe

from swinscale import cli
from swinscale.diagnose.run_report import other_drawings, run_report
from swinscale.errors import UsageError
from swinscale.recipes import run
from swinscale.runlog import read_log

VITAL = ["Amplitudes", "Attention", "Position bias", "Gradients and updates"]


@pytest.fixture
def finished(photos, tmp_path) -> Path:
    """A classifier's run."""
    run(recipe(photos, epochs=2, diagnose_every=2), tmp_path / "run")
    return tmp_path / "run"


def page(directory: Path) -> tuple[str, Page, list[str]]:
    """The file, its elements, and its headings."""
    html = run_report(directory).read_text(encoding="utf-8")
    read = Page(html)
    ends = [i for i, (tag, _) in enumerate(read.elements) if tag == "h2"]
    assert len(ends) == len(read.all("section"))
    return html, read, headings_of(read)


def headings_of(read: Page) -> list[str]:
    texts = [text.strip() for text in read.text]
    known = ["Training", "Measures on held-out images", *VITAL, "Warnings and events", "What ran"]
    return [heading for heading in known if texts.count(heading) >= 2]  # in the contents and as a heading


def test_a_finished_run(finished):
    html, read, headings = page(finished)
    assert headings == ["Training", "Measures on held-out images", *VITAL, "Warnings and events", "What ran"]
    assert "It finished after 6 steps." in html and "Recipe test." in html
    for drawn in (
        *("Loss", "Learning rate", "Speed", "Residual stream after each block", "What the branches add, at step 6"),
        *("Residual stream over time", "Attention entropy, mean over heads", "Heads at step 6", "Logit scales"),
        *("Position bias along the height", "Position bias of block 1.0 at step 6", "Gradient norms"),
        *("Update over weight", "True against predicted class"),
    ):
        assert any((svg.get("aria-label") or "").startswith(drawn) for svg in read.all("svg")), drawn
    assert '"effective_batch": 6' in "".join(read.text)


def test_a_killed_run_and_its_warnings(finished, photos):
    """Half a last line, no result; what the run was warned of is said, with every character of it."""
    (finished / "result.json").unlink()
    (finished / "manifest.json").write_text('{"total_st')
    said = "Activations of <b>layers.0.blocks.0</b> grew & grew."
    lines = (finished / "log.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "eval" and json.loads(line)["step"] <= 4]
    event = json.dumps({"kind": "amplitude_growth", "step": 4, "text": said})
    (finished / "log.jsonl").write_text("\n".join([*kept, event, '{"kind": "train", "st']))
    html, read, headings = page(finished)
    assert headings == ["Training", *VITAL, "Warnings and events", "What ran"]
    assert "its log ends at step 4" in html
    assert said in read.text and "<b>" not in html and "amplitude growth" in read.text


def test_a_run_without_vitals_by_the_command_and_what_is_no_run(photos, tmp_path, capsys):
    run(recipe(photos, epochs=1, diagnose_every=0), tmp_path / "run")
    out = tmp_path / "pages/run.html"
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert f"Open {out}" in capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    assert headings_of(Page(html)) == ["Training", "Measures on held-out images", "Warnings and events", "What ran"]
    assert "None." in html
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no log.jsonl: name the directory of a run" in capsys.readouterr().err
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UsageError, match="has no entries yet"):
        run_report(tmp_path)


def test_readings_of_other_instruments_are_drawn():
    """By their scalars; those that begin alike share a plot."""
    log = [
        {"kind": "probe", "step": step, "accuracy/train": 0.5, "accuracy/test": 0.4, "rank": 3.0, "seen": [1, 2]}
        for step in (2, 4)
    ]
    said = [
        drawing.description for drawing in other_drawings([*log, {"kind": "train", "step": 1, "loss": 1.0}], "probe")
    ]
    assert said == ["Accuracy. Last values: train 0.5, test 0.4.", "Rank. Last values: rank 3."]


@pytest.mark.slow
def test_a_run_on_real_photos_is_drawn_and_warns_of_nothing(shared_data, tmp_path):
    """A few steps of masked pre-training on photographs, at 64 pixels."""
    from swinscale.config import override
    from swinscale.recipes import get_recipe

    small = ("model.img_size=64", "model.window_size=4", "task.mask_patch=8", "train.batch_size=16")
    how = (
        "train.epochs=0.1",
        "train.diagnose_every=5",
        "train.num_workers=0",
        f"data.train={shared_data / 'clothing'}",
    )
    photographs = override(get_recipe("photos_simmim"), *small, *how)
    run(photographs, tmp_path / "run")
    _, _, headings = page(tmp_path / "run")
    assert set(VITAL) < set(headings)
    kinds = {entry["kind"] for entry in read_log(tmp_path / "run") if "text" in entry}
    assert not kinds & {"amplitude_growth", "amplitude_spread", "attention_collapse", "gradient_jump", "update_ratio"}
    shutil.rmtree(tmp_path / "run")
