"""The benchmark of video: people never cross parts, equal weights give equal numbers, decoders give equal frames, pages show it."""

from __future__ import annotations

import json
import re
import shlex
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import __main__ as bench
from bench import decoding, page, speed, video, video_runs
from bench.runner import Runner, distance, measure, peak_memory
from bench.speed import add_ratios
from bench.video import CONTENDERS, OURS, SAME, Speed, build

from film_files import decoded, numbers_in, write_film, write_sound
from swinscale.errors import UsageError

pytestmark = pytest.mark.usefixtures("compiler_settings")
SMALL = Speed("inference", size=64, batch=1, tiny=True, frames=8)
ACTIONS = Path(__file__).parents[2] / "shared" / "data" / "actions"
WHERE = {
    "machine": {"processor": "a processor", "cpus": 2, "threads": 1, "gpu": None},
    "versions": {"torch": "2.9"},
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "command": "python -m bench video",
}


@pytest.fixture(autouse=True)
def nothing_to_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking through all that other tests left takes longer than what is measured here."""
    monkeypatch.setattr(speed, "free", lambda device: None)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Names as in the films of actions: 9 people, 4 actions, each film twice; nothing is in them."""
    for number in range(72):
        action = "1034"[number % 8 // 2]
        (tmp_path / "films" / action).mkdir(parents=True, exist_ok=True)
        (tmp_path / "films" / action / f"{number:08d}.mp4").touch()
    return tmp_path / "films"


def numbers(names: list[str]) -> set[int]:
    return {int(Path(name).stem) for name in names}


def assert_people_are_apart(folds: list[dict[str, Any]]) -> None:
    for parts, (test, held) in zip(folds, video_runs.FOLDS, strict=True):
        people = {part: {video_runs.person(name) for name in source.names} for part, source in parts.items()}
        assert people == {"test": set(test), "val": {held}, "train": set(range(9)) - {*test, held}}
        of_part = {part: numbers(source.names) for part, source in parts.items()}
        assert [len(of_part[part]) for part in ("train", "val", "test")] == [48, 8, 16]
        for found in of_part.values():  # an odd number is the mirrored film of the even one before it
            assert {number ^ 1 for number in found} == found
        for source in parts.values():
            assert sorted(set(source.labels)) == [0, 1, 2, 3] and source.classes == ["0", "1", "3", "4"]


def test_no_person_is_in_two_parts_and_mirrored_films_stay_with_theirs(films):
    assert_people_are_apart(video_runs.folds(str(films)))


def test_the_shared_films_are_split_by_person():
    if not ACTIONS.is_dir():
        pytest.skip("the films of actions are not here")
    assert_people_are_apart(video_runs.folds(str(ACTIONS)))


def test_lists_of_a_fold_name_films_by_their_place(films, tmp_path):
    places = video_runs.write_folds(str(films), tmp_path / "runs")
    assert [place.name for place in places] == ["fold0", "fold1", "fold2"]
    head, *lines = (places[0] / "test.csv").read_text().splitlines()
    assert head == "path,label" and len(lines) == 16
    path, label = lines[0].split(",")
    assert Path(path).is_file() and Path(path).parent.name == label and int(Path(path).stem) // 8 in (0, 1)


def test_films_without_people_are_refused(films):
    (films / "0" / "00000002.mp4").rename(films / "0" / "walking.mp4")
    with pytest.raises(UsageError, match=r"walking\.mp4: .* number"):
        video_runs.folds(str(films))
    (films / "0" / "walking.mp4").rename(films / "0" / "00000099.mp4")
    with pytest.raises(UsageError, match="people 0 to 8"):
        video_runs.folds(str(films))


def run_row(recipe: str, init: str | None, fold: int, right: int) -> dict[str, Any]:
    """A row of ``right`` correct answers among 16; all wrong ones say the last class."""
    per_class = [min(4, max(0, right - 4 * k)) for k in range(3)]
    confusion = [[0.0] * 4 for _ in range(4)]
    for k, count in enumerate([*per_class, 4]):
        confusion[k][k] += count
        confusion[k][3] += 4 - count
    return {
        "name": f"{recipe}{init}{fold}", "recipe": recipe, "init": init, "fold": f"fold{fold}",
        "test_people": list(video_runs.FOLDS[fold][0]), "parameters": 1_060_000, "train_films": 48, "clip": [16, 64, 64],
        "epochs": 60.0, "steps": 180, "batch": 16, "lr": 1e-3, "minutes": 9.0 + fold, "waiting_for_data": 20.0 + fold,
        "precision": "bf16", "threads": 1, "processor": "any", "views": [4, 1], "top1": round(100 * (right + 4) / 16, 2),
        "loss": 0.1, "unreadable": 0.0, "classes": ["0", "1", "3", "4"], "confusion": confusion, "versions": {},
        "commit": "abc", "date": "2026-01-02T03:04:05",
    }  # fmt: skip


def test_the_table_shows_each_fold_the_mean_and_the_summed_confusion():
    rows = [run_row("desk_video_swin", init, fold, 8 + fold) for init in (None, "cifar") for fold in (2, 0, 1)]
    rows.append(run_row("desk_video_swinv2", None, 0, 12))
    found = video_runs.actions_table(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:]] for line in found.splitlines() if line.startswith("| `")]
    scratch, inflated, unfinished = lines
    assert scratch[1] == "random weights" and inflated[1] == "`cifar`"
    assert (
        scratch[7:11] == ["75.0", "81.2", "87.5", "**81.2**"] and scratch[4] == "9.0–11.0" and scratch[6] == "20–22 %"
    )
    assert unfinished[7:11] == ["100.0", "–", "–", "–"]
    assert "people 6 and 7" in found and "chance is 25" in found and "16 test films" in found
    confused = [line for line in video_runs.confusion_table(rows).splitlines() if line.startswith("|")]
    assert len(confused) == 2 + 3 * 4
    cells = [cell.strip() for cell in confused[4].split("|")[3:]]
    assert cells == ["3", "0", "0", "3", "9"]  # of 12 films: right 0 + 1 + 2 times


def test_a_run_that_is_no_finished_one_of_a_fold_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no finished run of a video classifier"):
        video_runs.row(tmp_path)
    data = {"train": str(tmp_path / "train.csv")}
    config = {"name": "any", "data": data, "task": {"test_clips": 1, "test_crops": 1}, "train": {"epochs": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "result.json").write_text(json.dumps({"metrics": {"top1": 1.0}}))
    with pytest.raises(UsageError, match=r"no .*test\.csv"):
        video_runs.row(tmp_path)


@pytest.mark.parametrize("mode", video.MODES)
def test_the_same_weights_give_the_same_numbers(mode):
    """Logits in use; loss and gradients in training."""
    case = Speed(mode, size=64, batch=2, tiny=True, frames=8)
    ours, theirs = (Runner(case, case.build(name)).check() for name in (OURS[0], SAME[0]))
    assert ours[0].abs().max() > 0.1 and (ours[1] is None) == (mode == "inference")
    assert distance(theirs, ours) <= 1e-5


def test_ours_are_the_published_one_and_a_v2_of_its_size():
    """28.2 M parameters with 400 classes; windows of 8×7×7 that no map is smaller than, without stochastic depth."""
    for version, millions in ((1, 28.2), (2, 27.9)):
        config = video.network(version, Speed("inference", size=video.SIZE, frames=video.FRAMES["cpu"]))
        assert set(config.stage_windows) == {(8, 7, 7)} and config.drop_path_rate == 0
        with torch.device("meta"):
            model = video.SwinTransformer(config)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_whoever_gives_other_numbers_is_not_timed(monkeypatch):
    def tampered(name: str, case: Speed) -> torch.nn.Module:
        model = build(name, case)
        if name == SAME[0]:
            with torch.no_grad():
                model.model.head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(video, "build", tampered)
    rows = {row["name"]: row for row in measure(SMALL, repeats=1, memory=False)["contenders"]}
    assert rows[SAME[0]]["status"] == "cannot" and "outputs differ by 0.0" in rows[SAME[0]]["reason"]
    assert "seconds" in rows[OURS[1]] and "seconds" not in rows[SAME[0]]


def test_a_size_that_torchvision_computes_otherwise_is_a_line():
    small = Speed("inference", size=32, batch=1, tiny=True, frames=8)  # the last map is smaller than a window
    rows = {row["name"]: row for row in measure(small, repeats=1, memory=False)["contenders"]}
    assert rows[SAME[0]]["status"] == "cannot" and "one window" in rows[SAME[0]]["reason"]
    assert rows[OURS[0]]["status"] == "ok"


def test_decoders_are_asked_for_the_same_frames(tmp_path, monkeypatch):
    """The clip in the middle of a film; who reads other frames, or nothing, is told apart from who is slow."""
    monkeypatch.setattr(decoding, "FIT", None)
    long, short = write_film(tmp_path / "a.mp4", 100), write_film(tmp_path / "b.mp4", 20)
    write_sound(tmp_path / "c.mp4")
    clips, unreadable = decoding._clips([long, short, tmp_path / "c.mp4"])
    assert unreadable == ["c.mp4"] and list(clips) == [long, short]
    for path, (wanted, clip) in clips.items():
        assert numbers_in(clip) == wanted and len(wanted) == 32
        assert torch.equal(decoding.READERS[decoding.EVERY](path, wanted), clip)
    assert clips[long][0] == list(range(18, 82, 2)) and max(clips[short][0]) == 18
    monkeypatch.setitem(decoding.READERS, decoding.EVERY, lambda path, wanted: decoded(path)[[n // 2 for n in wanted]])
    _, row = decoding._prepared(decoding.EVERY, clips)
    assert row["other_frames"] == ["a.mp4", "b.mp4"]


def test_torchcodec_is_asked_for_our_frames_and_resized_as_they_are(tmp_path, monkeypatch):
    """torchcodec itself needs libraries of FFmpeg that are not everywhere: here its decoder is one that we wrote."""
    film = write_film(tmp_path / "a.mp4", 40)

    class VideoDecoder:
        def __init__(self, path: str, num_ffmpeg_threads: int):
            assert num_ffmpeg_threads == 1
            self.frames = decoded(Path(path))

        def __len__(self) -> int:
            return len(self.frames)

        def get_frames_at(self, wanted: list[int]) -> Any:
            return types.SimpleNamespace(data=self.frames[wanted])

    monkeypatch.setattr(
        decoding.importlib, "import_module", lambda name: types.SimpleNamespace(VideoDecoder=VideoDecoder)
    )
    clips, _ = decoding._clips([film])
    wanted, clip = clips[film]
    found = decoding.READERS["torchcodec"](film, wanted)
    assert found.shape == clip.shape == (32, 3, 256, 341) and numbers_in(found) == wanted
    assert (found.float() - clip.float()).abs().mean() < decoding.TOLERANCE


def test_films_are_measured_on_one_thread(tmp_path, capsys):
    write_film(tmp_path / "films" / "a.mp4", 70)
    before = torch.get_num_threads()
    command = ["video", "--sections", "decode", "--data", str(tmp_path / "films"), "--repeats", "1"]
    assert bench.main([*command, "--results", str(tmp_path)]) == 0
    assert torch.get_num_threads() == before
    content = json.loads((tmp_path / "video.json").read_text())
    [case] = content["decode"]
    rows = {row["name"]: row for row in case["contenders"]}
    assert rows[decoding.OURS]["status"] == rows[decoding.EVERY]["status"] == "ok"
    assert rows[decoding.EVERY]["other_frames"] == [] and case["environment"]["machine"]["threads"] == 1
    assert case["films"][0] | {"seconds": None} == {
        "name": "a.mp4", "codec": "h264", "size": [48, 64], "frames": 70, "clip": [32, 3, 256, 341], "seconds": None,
    }  # fmt: skip
    assert "clips/s and core" in capsys.readouterr().out


def case(**more: Any) -> dict[str, Any]:
    contenders: list[dict[str, Any]] = [
        {"name": name, "status": "ok", "parameters": 2.82e7, "images_per_s": 0.5, "rounds": [4.0 + i, 4.0 + i],
         "seconds": {"median": 4.0 + i, "q1": 4.0 + i, "q3": 4.0 + i}, "memory_bytes": 2e9}
        for i, name in enumerate(CONTENDERS)
    ]  # fmt: skip
    contenders[2]["difference"] = 2e-6
    add_ratios(contenders, OURS)
    how = {"device": "cpu", "threads": 1, "mode": "inference", "dtype": "fp32", "frames": 16, "size": 224, "batch": 1}
    return {**how, "tiny": False, "contenders": contenders, "environment": WHERE, **more}


def test_the_page_shows_what_was_found_and_under_which_conditions(tmp_path):
    """Between the markers of docs/video.md."""
    rows = [run_row("desk_video_swin", None, fold, 12) for fold in range(3)]
    content = {"kind": "video", "speed": [case(), case(device="cuda", frames=32)], "actions": rows}
    (tmp_path / "video.json").write_text(json.dumps(content))
    file = tmp_path / "video.md"
    names = ("video.actions", "video.confusion", "video.speed", "video.speed-gpu", "video.machine")
    file.write_text("before\n" + "\n".join(f"<!-- bench:{name} -->\nold\n<!-- /bench -->" for name in names))
    assert page.rewrite(file, tmp_path) == list(names)
    text = file.read_text()
    assert text.startswith("before\n") and "\nold\n" not in text
    assert "inference fp32, 1 × 16×224², 1 thread " in text and "inference fp32, 1 × 32×224² " in text
    assert "1.50" in text and "2.0e-06" in text and "clips/s" in text and "images/s" not in text and "**100.0**" in text
    assert set(page.parts(tmp_path, file)) == set(names)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--sections", "actions"], "--data"),
        (["--sections", "actions", "decode", "--data", "films"], "one at a time"),
        (["--sections", "actions", "--data", "FILMS", "--init", "runs/cifar"], "RECIPE=DIR"),
        (["--sections", "actions", "--data", "FILMS", "--only", "desk_video"], "desk_video_swinv2"),
        (["--sections", "actions", "--data", "FILMS", "--set", "train.epoch=3"], "train.epochs"),
        (["--sections", "decode", "--data", "nowhere"], "nowhere"),
        (["--runs", "nowhere"], "no finished run"),
    ],
)
def test_mistakes_are_one_line(arguments, said, films, tmp_path, capsys):
    arguments = [str(films) if word == "FILMS" else word for word in arguments]
    runs, results = tmp_path / "runs", tmp_path / "results"
    assert bench.main(["video", *arguments, "--out", str(runs), "--results", str(results)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not results.exists() and not list(runs.glob("fold?_*"))


def test_command_lines_of_the_page_parse():
    text = (Path(__file__).parents[1] / "docs" / "video.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"python -m bench (video[^`\n]*)", text)
    assert len(lines) == 3
    for line in lines:
        options = bench._parser().parse_args(shlex.split(line))
        assert set(dict(map(bench._pair, options.init))) <= set(video_runs.RECIPES)


@pytest.mark.slow
def test_unseen_people_are_tested_after_training_and_finished_runs_are_not_trained_again(films, tmp_path, capsys):
    """The whole section in miniature, from random weights and from a model that is inflated; then the same runs noted alone."""
    from swinscale.models import create_model
    from swinscale.weights import save_pretrained

    for film in films.glob("*/*.mp4"):
        write_film(film, 6, size=(32, 32))
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    image = create_model("swinv2_pico_patch4_window4_32", num_classes=3, **small)
    save_pretrained(image, tmp_path / "pictures" / "best")
    overrides = [
        "model.embed_dim=8", "model.depths=(1,1)", "model.num_heads=(1,2)", "model.img_size=(4,32,32)", "train.epochs=1",
        "train.optim.warmup_epochs=0.5", "train.device=cpu",
    ]  # fmt: skip
    results = ["--results", str(tmp_path / "results")]
    command = ["video", "--sections", "actions", "--data", str(films), "--only", "desk_video_swinv2", *results]
    command += ["--init", f"desk_video_swinv2={tmp_path / 'pictures' / 'best'}", "--set", *overrides]
    assert bench.main([*command, "--out", str(tmp_path / "runs")]) == 0
    rows = json.loads((tmp_path / "results" / "video.json").read_text())["actions"]
    assert [(row["fold"], row["init"]) for row in rows] == [
        (f"fold{fold}", init) for fold in range(3) for init in (None, "pictures")
    ]
    for row in rows:
        people, _ = video_runs.FOLDS[int(row["fold"][-1])]
        assert row["test_people"] == list(people) and row["train_films"] == 48 and row["views"] == [4, 1]
        assert sum(map(sum, row["confusion"])) == 16 and 0 <= row["waiting_for_data"] <= 100
        right = sum(row["confusion"][k][k] for k in range(4))
        assert row["top1"] == round(100 * right / 16, 2) and row["steps"] == 6
    assert "random weights" in capsys.readouterr().out
    logs = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/log.jsonl")}
    assert bench.main([*command, "--out", str(tmp_path / "runs")]) == 0
    assert {file: file.stat().st_mtime_ns for file in logs} == logs and len(logs) == 6
    noted = [
        "video",
        "--runs",
        str(tmp_path / "runs" / "fold1_desk_video_swinv2_scratch"),
        "--results",
        str(tmp_path / "again"),
    ]
    assert bench.main(noted) == 0
    [row] = json.loads((tmp_path / "again" / "video.json").read_text())["actions"]
    assert row["top1"] == rows[2]["top1"] and row["confusion"] == rows[2]["confusion"]


@pytest.mark.slow
def test_everybody_is_measured_in_the_same_rounds_and_alone_for_memory(tmp_path, capsys):
    command = ["video", "--quick", "--results", str(tmp_path), "--repeats", "2", "--threads", "1"]
    assert bench.main([*command, "--no-memory"]) == 0
    cases = json.loads((tmp_path / "video-quick.json").read_text())["speed"]
    assert [(case["mode"], case["frames"]) for case in cases] == [("training", 8), ("inference", 8)]
    for rows in (case["contenders"] for case in cases):
        assert [row["name"] for row in rows] == list(CONTENDERS)
        assert all(row["status"] == "ok" and len(row["rounds"]) == 2 for row in rows), rows
        assert rows[2]["difference"] <= 1e-4 and rows[0]["ratios"][OURS[0]]["median"] == 1
    assert "torchvision swin3d_t" in capsys.readouterr().out
    found = peak_memory(SMALL, OURS[1])
    assert found is not None and 1e6 < found < 2e9
