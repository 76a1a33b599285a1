"""The claims as experiments: each in miniature from its steps to its page, the rules of the verdicts, and the pages in docs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinscale import cli
from swinscale.claims import CLAIMS, amplitude, blocks, resolution192, simmim, transfer
from swinscale.claims.base import Step
from swinscale.claims.pages import claim_page, overview
from swinscale.claims.results import read_results
from swinscale.claims.statistics import combine, judge, judge_within
from swinscale.intervals import T_975, Interval

DOCS = Path(__file__).parent.parent / "docs" / "claims"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 24 training and 12 test pictures each, which colour tells apart."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for label, colour in (("red", 0), ("blue", 2)):
            place = root / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels).save(place / f"{index}.png")
    return root


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every desk budget cut to a few batches."""
    monkeypatch.setattr(amplitude, "BATCH", {"desk": 8})
    monkeypatch.setattr(amplitude, "STEPS", {"desk": 10})
    monkeypatch.setattr(amplitude, "RATE_STEPS", {"desk": 2})
    monkeypatch.setattr(amplitude, "RATES", (1e-3,))
    monkeypatch.setattr(amplitude, "SIZES", {"desk": "T"})
    monkeypatch.setattr(amplitude, "KINDS", {k: v for k, v in amplitude.KINDS.items() if "V" in k or k == "post, dot"})
    monkeypatch.setattr(amplitude, "NARROWER", {"desk": 12})
    monkeypatch.setattr(blocks, "IMAGES", {"desk": 32})
    monkeypatch.setattr(transfer, "IMAGES", {"desk": 32})
    monkeypatch.setattr(transfer, "TUNING", {"desk": 32})
    monkeypatch.setattr(transfer, "SIZES", {"desk": (32, 48)})
    monkeypatch.setattr(transfer, "TUNED_SIZE", {"desk": 48})
    monkeypatch.setattr(resolution192, "IMAGES", {"desk": 64})
    monkeypatch.setattr(resolution192, "TUNING", {"desk": 32})
    monkeypatch.setattr(simmim, "SHARES", (0.1, 1.0))
    for name in ("IMAGES", "TUNING", "ABLATION", "ABLATION_TUNING"):
        monkeypatch.setattr(simmim, name, {"desk": 16})


@pytest.mark.slow
@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("name", ["amplitude", "blocks", "transfer", "resolution192", "simmim"])
def test_a_claim_from_its_steps_to_its_page(name: str, pictures: Path, tmp_path: Path):
    places = ["--out", str(tmp_path / "docs"), "--runs", str(tmp_path / "runs")]
    seeds = 1 if name in ("simmim", "amplitude") else 2  # it has many arms
    arguments = ["claims", name, "--data", str(pictures), "--seeds", str(seeds), "--jobs", "1", *places]
    assert cli.main(arguments) == 0
    content = json.loads((tmp_path / f"docs/{name}/desk.json").read_text())
    assert content["seeds"] == seeds and content["verdict"] and content["environment"]["versions"]["torch"]
    assert len(content["findings"]) >= 3
    for figure in content["figures"]:
        for ending in ("svg", "png"):
            assert (tmp_path / f"docs/{name}/desk-{figure['name']}.{ending}").stat().st_size > 1000
    page = (tmp_path / f"docs/{name}/README.md").read_text()
    assert content["sentence"] in page
    assert numbers_not_in(page, content) == []
    # Everything is there: a second call trains nothing and says the same.
    before = sorted(tmp_path.glob("runs/**/log.jsonl"))
    sizes = [path.stat().st_size for path in before]
    assert cli.main(arguments) == 0
    assert [path.stat().st_size for path in before] == sizes
    again = json.loads((tmp_path / f"docs/{name}/desk.json").read_text())
    assert again["findings"] == content["findings"] and again["tables"] == content["tables"]


def numbers_not_in(page: str, content: dict) -> list[str]:
    """Numbers of a page that its file does not have, neither in a text nor as a value with the digits that are shown."""
    text = json.dumps(content, ensure_ascii=False)
    values = [float(f"{v:.4g}") for v in _values(content)]
    found = re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", page)
    return [n for n in found if n not in text and n.lstrip("+") not in text and float(n) not in values]


def _values(content: object) -> list[float]:
    if isinstance(content, dict):
        return [v for value in content.values() for v in _values(value)]
    if isinstance(content, list):
        return [v for value in content for v in _values(value)]
    return [float(content)] if isinstance(content, (int, float)) and math.isfinite(content) else []


def test_every_number_of_the_pages_in_docs_is_in_a_result_file():
    """And the pages are what the files give: nobody has edited them."""
    results = read_results(DOCS)
    assert results, "there are no results"
    for name in {r["name"] for r in results}:
        ours = [r for r in results if r["name"] == name]
        page = (DOCS / name / "README.md").read_text()
        assert page == claim_page(ours)
        assert numbers_not_in(page, {"results": ours}) == []
    page = (DOCS / "README.md").read_text()
    assert page == overview(results, list(CLAIMS))
    assert numbers_not_in(page.partition("| claim |")[2], {"results": results}) == []


def test_a_number_that_no_file_has_is_found():
    assert numbers_not_in("81.7 and 0.123 (−4.00), 12 %", {"a": "81.7", "b": [0.12304, 12]}) == ["4.00"]


def test_intervals():
    from scipy import stats

    assert [round(float(stats.t.ppf(0.975, n)), 3) for n in range(1, len(T_975) + 1)] == list(T_975)
    one = Interval.of([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=np.mean([1, 2, 4]), scale=stats.sem([1, 2, 4]))
    assert (one.low, one.high) == pytest.approx((low, high), rel=1e-3)
    many = Interval.of(list(range(40)))
    low, high = stats.t.interval(0.95, 39, loc=19.5, scale=stats.sem(range(40)))
    assert (many.low, many.high) == pytest.approx((low, high), rel=0.01)
    assert not Interval.of([3.0]).known and not Interval.of([1.0, math.nan]).known
    assert Interval.of_difference([3, 4, 5], [2, 3, 4]).estimate == 1


def test_verdicts():
    def interval(low: float, high: float) -> Interval:
        return Interval((low + high) / 2, low, high, 3)

    reproduced, refuted, undecided = "reproduced", "not reproduced", "not decided at this scale"
    assert judge(interval(0.1, 2), "above") == reproduced
    assert judge(interval(-2, -0.1), "above") == refuted
    assert judge(interval(-1, 2), "above") == undecided
    assert judge(interval(0.1, 0.9), "below", 1.0) == reproduced
    assert judge(interval(1.1, 2), "below", 1.0) == refuted
    assert judge(Interval.of([5.0]), "above") == undecided
    assert judge_within(interval(-0.5, 0.4), 1) == reproduced
    assert judge_within(interval(1.5, 3), 1) == refuted
    assert judge_within(interval(-0.5, 1.4), 1) == undecided
    assert combine([reproduced, reproduced]) == reproduced
    assert combine([reproduced, undecided]) == undecided
    assert combine([reproduced, undecided, refuted]) == refuted
    assert combine([]) == undecided


@pytest.mark.parametrize("name", list(CLAIMS))
def test_every_scale_can_be_planned(name: str, pictures: Path):
    """The steps of all scales can be built, have names of their own, and need only steps before them."""
    claim = CLAIMS[name]
    for scale in ("desk", "gpu", "paper"):
        steps = claim.steps(scale, str(pictures), 2)  # type: ignore[arg-type]
        names = [step.name for step in steps]
        assert len(set(names)) == len(names) > 1
        assert all(set(step.after) <= set(names[:index]) for index, step in enumerate(steps))
        assert all(json.dumps(step.described()) for step in steps)
        assert claim.settings(scale)  # type: ignore[arg-type]


def test_mistakes(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def complaint(*arguments: str) -> str:
        assert cli.main(["claims", *arguments, "--out", str(tmp_path / "docs"), "--runs", str(tmp_path / "runs")]) == 2
        return capsys.readouterr().err

    assert "Did you mean 'blocks'?" in complaint("bloks")
    assert "need train and test" in complaint("blocks", "--data", str(pictures / "train"))
    (tmp_path / "docs/mine").mkdir(parents=True)
    (tmp_path / "docs/mine/other.json").write_text("{}")
    assert "is not a result" in complaint("blocks", "--data", str(pictures))


def forty_two(directory: Path, times: int) -> dict:
    """A step that leaves a trace of each call."""
    with (directory / "calls").open("a") as calls:
        calls.write("x")
    return {"value": 42 * times}


def failing(directory: Path, words: str) -> dict:
    from swinscale.errors import UsageError

    raise UsageError(words)


@pytest.mark.parametrize("jobs", [1, 2])
def test_steps_run_once_and_in_order(jobs: int, tmp_path: Path):
    from rich.console import Console

    from swinscale.claims.runner import run_steps
    from swinscale.errors import UsageError

    steps = [Step("a", forty_two, {"times": 1}), Step("b/c", forty_two, {"times": 2}, ("a",), alone=True)]
    quiet = Console(quiet=True)
    assert run_steps(steps, tmp_path, jobs, quiet) == {"a": {"value": 42}, "b/c": {"value": 84}}
    assert run_steps(steps, tmp_path, jobs, quiet)["a"] == {"value": 42}
    assert (tmp_path / "b/c/calls").read_text() == "x"
    with pytest.raises(UsageError, match="another version of this step"):
        run_steps([Step("a", forty_two, {"times": 3})], tmp_path, jobs, quiet)
    with pytest.raises(UsageError, match="bad luck"):
        run_steps([*steps, Step("d", failing, {"words": "bad luck"})], tmp_path, jobs, quiet)
