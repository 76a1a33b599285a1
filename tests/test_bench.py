"""The benchmark harness: its statistics, its check of equal outputs, its tables, and each command on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import __main__ as bench
from bench import export, goals, page, tables
from bench.cases import Case, peak_memory, run_case
from bench.contenders import PEERS, Contender, Setting, build, vit
from bench.results import environment

from swinscale.timing import Budget, Spread, alternate

ROOT = Path(__file__).parent.parent
TRIAL = Setting("swinv2_trial", 4, 32)
QUICK = {"repeats": 2, "min_seconds": 0.0, "memory": False}


pytestmark = pytest.mark.usefixtures("compiler_settings")


def trial(*contenders: Contender, **more) -> Case:
    return Case(
        TRIAL, 2, **{"mode": "inference", "dtype": "fp32", "device": "cpu", **QUICK, **more}, contenders=contenders
    )


def test_spread():
    assert Spread.of([5.0]) == Spread(5, 5, 5)
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3, 2, 4)


def test_ratio_is_taken_within_rounds():
    """A machine that becomes ten times slower half-way changes no ratio."""
    ours, theirs = [1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0]
    assert Spread.ratio(theirs, ours) == Spread(2, 2, 2)
    assert Spread.ratio([1, 2, 3, 4, 5], [1, 1, 1, 1, 1]) == Spread(3, 2, 4)


def test_everybody_takes_turns():
    """Each round has everybody once and begins with another one."""
    log: list[str] = []
    calls = [lambda _, name=name: log.append(name) for name in "abc"]
    times = alternate(calls, repeats=3, device="cpu", min_seconds=0, warm_up=0)
    assert [len(t) for t in times] == [3, 3, 3]
    assert "".join(log[3:]) == "abc" + "bca" + "cab"


def test_rounds_end_when_there_is_enough():
    times = alternate([lambda _: None], 50, "cpu", 0, enough=lambda: True)
    assert len(times[0]) == 3
    assert Budget(-1).left < 0 < Budget(60).part(10).left <= 10


def test_deviation_from_a_line_through_zero():
    assert goals.deviation([(1, 2), (2, 4), (4, 8)]) == 0
    assert goals.deviation([(1, 1.1), (2, 1.8)]) == pytest.approx(0.1)


def test_linearity_sees_through_drift_and_single_slow_calls():
    """Twice the pixels, twice the time, on a machine that becomes three times slower and has one slow call per size."""
    rounds = [[(1 + r) * 1.0, (1 + r) * 2.0] for r in range(7)]
    assert goals.linearity([1, 2], rounds).median == pytest.approx(0)
    rounds[2][0] *= 1.5
    rounds[4][1] *= 1.5
    assert goals.linearity([1, 2], rounds).median == pytest.approx(0)
    bent = goals.linearity([1, 2], [[1.0, 2.5]] * 3)
    assert bent.median == bent.q1 == bent.q3 == pytest.approx(1 / 9)


def test_a_goal_is_reached_by_the_median():
    assert goals.goal("fast", 1.5, Spread(1.5, 1.2, 1.9))["reached"]
    assert not goals.goal("small", 0.7, 0.71, at_most=True)["reached"]
    assert goals.goal("later", 1, None, "not measured")["reached"] is None


def test_peers_give_our_outputs_and_are_timed():
    case = trial(Contender(), *[Contender(p) for p in PEERS], Contender("openvino"))
    result = run_case(case)
    rows = {row["name"]: row for row in result["contenders"]}
    for name in ("swinscale", *PEERS):
        assert rows[name]["status"] == "ok" and rows[name]["difference"] < 1e-5, rows[name]
        assert len(rows[name]["rounds"]) == 2 and rows[name]["images_per_s"] > 0
    assert rows["openvino"]["status"] == "ok" or rows["openvino"]["reason"] == "openvino is not installed"
    assert rows["timm"]["ratio"]["median"] > 0
    found = goals.against_fastest("all", 0, result, False)
    assert found["reached"] and found["detail"].removeprefix("fastest: ") in PEERS
    assert "not installed" in goals.openvino_goal("ov", result)["detail"] or rows["openvino"]["status"] == "ok"


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_wrong_peer_is_found_and_not_timed(mode):
    def tamper(contender: Contender, model: torch.nn.Module) -> None:
        if contender.project == "timm":
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "qkv.weight" in n).mul_(1.5)

    result = run_case(trial(Contender(), Contender("timm"), Contender("torchvision"), mode=mode), tamper=tamper)
    ours, wrong, right = result["contenders"]
    assert (ours["status"], wrong["status"], right["status"]) == ("ok", "differs", "ok")
    assert wrong["reason"].startswith("outputs differ by") and "seconds" not in wrong
    assert wrong["reason"] in tables.cases_table([result])


def test_half_precision_training_and_back_ends():
    """bf16 under autocast; a back end that cannot run here says why."""
    who = [Contender(backend=name) for name in ("auto", "eager", "sequential:2", "flex")]
    rows = run_case(trial(*who, mode="training", dtype="bf16"))["contenders"]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "cannot"]
    assert "flex" in rows[3]["reason"]


def test_who_cannot_says_why():
    small = Setting("swin_trial", 7, 32)  # the second map is 4x4
    rows = run_case(Case(small, 1, "inference", "fp32", "cpu", (Contender(), *map(Contender, PEERS)), **QUICK))[
        "contenders"
    ]
    reasons = {row["name"]: row.get("reason", "") for row in rows}
    assert "pads the 4×4 map" in reasons["torchvision"]
    assert not reasons["swinscale"]


def test_padding_is_computed_as_the_others_do():
    assert Setting("swinv2_tiny", 8, 256).config.pad == "exact"
    assert Setting("swinv2_tiny", 8, 224).config.pad == "legacy"
    assert str(Setting("swinv2_base", 24, 384)) == "V2-B 384/24"


def test_every_parameter_is_random():
    model = build(Contender(), TRIAL)
    assert all(p.std() > 0 for p in model.parameters() if p.numel() > 1)


def test_vit_costs():
    """4.6 GMAC at 224, as published."""
    with torch.device("meta"):
        model, macs = vit("small", 224)
    assert macs == pytest.approx(4.6e9, rel=0.02) and model.num_classes == 1000


def test_memory_is_that_of_one_contender_alone():
    """In a process of its own; more pictures need more."""
    case = Case(Setting("swinv2_trial", 4, 64), 32, "training", "fp32", "cpu", (Contender(backend="eager"),))
    found = peak_memory(case, {"project": "swinscale", "backend": "eager", "compiled": False})
    assert found is not None and 2e7 < found < 1e9


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own count")
def test_freed_memory_is_counted_when_it_is_used_again():
    """What building a model leaves to the allocator must not make the calls after it look small."""
    peak = """if True:
        import torch
        from bench import cases
        def fill():
            return [torch.ones(25_000) for _ in range(600)]  # 100 kB each: from the heap, not mapped one by one
        kept = fill()[-1]  # at the end of the heap, where it keeps the rest from going back by itself
        cases.give_back_freed_memory()
        before = cases.reset_peak()
        again = fill()
        print(cases.resident_peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", peak], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50e6


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return [
        "run", "--models", "swinv2_trial", "--windows", "4", "--sizes", "32", "--batch", "1", "2", "--repeats", "2",
        "--min-seconds", "0", "--no-memory", "--out", str(tmp_path), *more,
    ]  # fmt: skip


def test_a_slice_and_its_page(tmp_path, capsys):
    """The command writes JSON, a picture and a table; the page takes its figures from the JSON alone."""
    assert bench.main(arguments(tmp_path, "--peers", "timm", "--backends", "auto", "eager")) == 0
    printed = capsys.readouterr().out
    assert "V2-trial 32/4 inference fp32, batch 2" in printed and "timm" in printed
    content = json.loads((tmp_path / "run.json").read_text())
    assert len(content["cases"]) == 2 and content["environment"]["versions"]["timm"]
    assert str(tmp_path) not in (tmp_path / "run.json").read_text()
    assert (tmp_path / "run-ratios.png").stat().st_size > 1000

    text = "# Speed\n\nBefore <!-- bench:run.cases -->\nold 1.23\n<!-- /bench --> after\n"
    text += "<!-- bench:run.machine -->\n<!-- /bench -->\n<!-- bench:run-ratios.picture -->\n<!-- /bench -->\n"
    (tmp_path / "performance.md").write_text(text)
    command = ["page", "--page", str(tmp_path / "performance.md"), "--results", str(tmp_path)]
    assert bench.main(command) == 0
    once = (tmp_path / "performance.md").read_text()
    assert "old 1.23" not in once and once.startswith("# Speed\n\nBefore") and "<!-- /bench --> after" in once
    assert f"{content['cases'][0]['contenders'][0]['images_per_s']:.4g}" in once
    assert "![run-ratios](run-ratios.png)" in once and "python -m bench run" in once
    assert bench.main(command) == 0 and (tmp_path / "performance.md").read_text() == once
    assert bench.main([*command, "--list"]) == 0 and "run.cases" in capsys.readouterr().out


def test_a_page_is_made_where_there_is_none(tmp_path, capsys):
    assert bench.main(["scaling", "--model", "swinv2_trial", "--window", "4", "--sizes", "32", "64", "--size", "32",
                       "--windows", "2", "4", "--peers", "--repeats", "1", "--no-memory", "--out", str(tmp_path)]) == 0  # fmt: skip
    assert "per pixel" in capsys.readouterr().out
    assert bench.main(["page", "--page", str(tmp_path / "docs/p.md"), "--results", str(tmp_path)]) == 0
    made = (tmp_path / "docs/p.md").read_text()
    assert "64²" in made and "](../scaling-curves.png)" in made
    assert page.parts(tmp_path, tmp_path / "docs/p.md").keys() >= {"scaling.area", "scaling.window", "scaling.goals"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["run", "--models", "swinv2_tiney"], "swinv2_tiny"),
        (["run", "--official", "."], "not a checkout"),
        (["run", "--peers", "timn"], "timm"),
        (["run", "--backends", "fast"], "Unknown attention back end"),
        (["run", "--windows", "0"], "whole number"),
        (["run", "--no-eager"], "nothing to measure"),
        (["gpu", "--sections", "ceiling"], "ceilings"),
        (["cpu", "--only", "nothing-like-this"], "no case"),
        (["page", "--page", "page.md", "--results", "."], "bench:nowhere"),
        (["fly"], "--help"),
        pytest.param(
            ["run", "--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one"),
        ),
        pytest.param(["gpu"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(command, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("<!-- bench:nowhere -->\n<!-- /bench -->\n")
    assert bench.main(command) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


@pytest.mark.slow
def test_gpu_command_on_small_shapes(tmp_path):
    """All sections run and are written; a second call with one section keeps the others."""
    command = [sys.executable, "-m", "bench", "gpu", "--tiny", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    content = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert list(content["sections"]) == ["ceilings", "check", "giant", "models", "vit", "attention", "scaling"]
    assert not any("reason" in section for section in content["sections"].values()), content["sections"]
    assert all(row["equal"] for row in content["sections"]["check"]["rows"] if "equal" in row)
    lines = done.stdout.strip().splitlines()
    assert "G's blocks" in lines[-2] and len(lines) < 110
    assert len(list(tmp_path.iterdir())) <= 8
    assert bench.main([*command[3:], "--sections", "ceilings"]) == 0
    assert json.loads((tmp_path / "gpu-tiny.json").read_text())["sections"].keys() == content["sections"].keys()


def test_where_the_time_goes(tmp_path, capsys):
    assert bench.main(["where", "--tiny", "--repeats", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "GFLOP/s over all" in printed
    assert "the whole map at a time" in printed
    content = json.loads((tmp_path / "where.json").read_text())
    for profile in content["profiles"].values():
        assert 0 < sum(row["share"] for row in profile["rows"]) <= 1.0001
    assert set(page.parts(tmp_path, tmp_path / "page.md")) == {
        "where.inference",
        "where.training",
        "where.choices",
        "where.machine",
    }


@pytest.mark.slow
def test_files_for_other_runtimes(tmp_path):
    """Each case has a process of its own; the page shows what was found; rows of other projects stay."""
    kept = {"model": "V2-T", "project": "timm", "format": "torch", "failed": "not done", "environment": environment([])}
    (tmp_path / "export-tiny.json").write_text(json.dumps({"kind": "export", "rows": [kept]}))
    command = [sys.executable, "-m", "bench", "export", "--tiny", "--repeats", "2", "--out", str(tmp_path)]
    subprocess.run([*command, "--projects", "swinscale"], cwd=ROOT, capture_output=True, text=True, check=True)
    first, row = json.loads((tmp_path / "export-tiny.json").read_text())["rows"]
    assert first == kept
    assert row["seconds"] > 0 and len(row["sizes"]) == 4 and all(size["agrees"] for size in row["sizes"])
    assert [speed["batch"] for speed in row["speed"]] == [1, 8]
    made = export.parts({"rows": [kept, row]})
    assert (
        "4 of 4" in made["ours"]() and "not done" in made["peers"]() and "python -m bench export" in made["machine"]()
    )


def test_the_page_on_exports_is_what_its_results_make_of_it(tmp_path):
    written = ROOT / "docs" / "export.md"
    again = tmp_path / "docs" / "export.md"
    again.parent.mkdir()
    again.write_text(written.read_text())
    page.rewrite(again, ROOT / "bench" / "results")
    assert again.read_text() == written.read_text()
