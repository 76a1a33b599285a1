"""Video models on the command line: train, evaluate, predict, explain, and one clear line for each mistake (R-DOWN-6)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from random_models import random_swin
from small_video_models import moving, save_simmim
from swinscale.cli import main
from swinscale.diagnose.explain import attention, cam, rollout
from swinscale.explain import explain_picture
from swinscale.video import load_video
from swinscale.weights import read_metadata, save_pretrained
from test_cli import mistake

pytest.importorskip("av")
from film_files import write_film

SETTINGS = [
    "model.img_size=(4,32,32)", "model.embed_dim=16", "model.depths=(1,1)", "model.num_heads=(1,2)", "model.window_size=(2,4,4)",
    "train.num_workers=0", "train.device=cpu", "train.precision=fp32", "train.epochs=2", "train.batch_size=6",
    "task.test_crops=3", "task.test_clips=2",
]  # fmt: skip
ON_CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films, ``data``, a classifier trained on them, ``run``, SimMIM, ``simmim``, and a classifier of pictures, ``pictures``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("video")
    for label, step in (("left", -3), ("right", 3)):
        for number in range(6):
            part = "train" if number < 4 else "test"
            film = moving(12, (36, 44 + 4 * number), step, seed=number)
            write_film(folder / "data" / part / label / f"{number}.mp4", film)
    arguments = ["train", "desk_video_swinv2", "--data", str(folder / "data"), "--out", str(folder / "run"), *SETTINGS]
    assert main(arguments) == 0
    save_pretrained(random_swin(), folder / "pictures")
    save_simmim(folder / "simmim")
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder


@pytest.fixture
def film(home: Path) -> Path:
    return home / "data/test/left/4.mp4"


def test_evaluation_without_data_is_that_of_the_run(home, tmp_path, capsys):
    assert main(["eval", str(home / "run/best"), *ON_CPU, "--out", str(tmp_path / "m.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the evaluation films of its run" in out and ": 4 films" in out and "2 × 3 views of 4×32×32" in out
    assert "│ left │ 2 │" in out and json.loads((tmp_path / "m.json").read_text())["films"] == 4
    assert main(["eval", str(home / "run/last"), *ON_CPU, "--clips", "1", "--crops", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    trained = json.loads((home / "run/result.json").read_text())["metrics"]
    assert "1 × 1 views" in said and f"│ {100 * trained['top1']:.1f} │" in said and f"{trained['loss']:.4g}" in said


def test_evaluation_with_other_films_windows_and_views(home, tmp_path, capsys):
    plain = ["eval", "--weights", str(home / "run/best"), "--data", str(home / "data"), *ON_CPU]
    assert main([*plain, "--split", "train", "--batch-size", "3", "--workers", "1"]) == 0
    assert "the train part of" in capsys.readouterr().out
    assert main([*plain, "--split", "test", "--clips", "2", "--crops", "5", "--img-size", "48", "--window", "6"]) == 0
    out = capsys.readouterr().out
    assert "2 × 5 views of 4×48×48" in out


def test_predict_prints_the_classes_and_writes_the_film_with_them(home, film, tmp_path, capsys):
    arguments = ["predict", str(film), "--weights", str(home / "run")]
    assert main([*arguments, *ON_CPU]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{film}: ") and "left" in said and "right" in said and said.count("%") == 2
    again = [*arguments, "--top", "1", "--clips", "4", "--crops", "1", "--window", "8", "--img-size", "64"]
    assert main([*again, "--out", str(tmp_path / "out"), *ON_CPU]) == 0
    assert capsys.readouterr().out.count("%") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["4_predicted.mp4", "4_predicted.png"]


def test_a_folder_is_searched_for_films_and_broken_ones_are_named(home, tmp_path, capsys):
    folder = tmp_path / "films"
    write_film(folder / "a/one.mp4", moving(9))
    write_film(folder / "b/one.mp4", moving(9))
    (folder / "broken.mp4").write_bytes(b"")
    arguments = ["predict", str(folder), "--weights", str(home / "run/best"), *ON_CPU, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "skipped broken.mp4: " in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert names == ["one_predicted.mp4", "one_predicted_2.mp4"]


def test_explain_draws_a_frame_of_the_clip(home, film, tmp_path, capsys):
    """What belongs to that frame alone, of attention and rollout that go through all of them."""
    arguments = ["explain", str(film), "--checkpoint", str(home / "run/best"), "--out", str(tmp_path), *ON_CPU]
    assert main([*arguments, "--method", "exact", "--query", "3,20,8", "--stage", "1", "--head", "1"]) == 0
    assert "%. Area under the deletion curve" in capsys.readouterr().out
    assert Image.open(tmp_path / "4_explained.png").width > 900 and (tmp_path / "4_explained.svg").exists()
    options = {"query": (3, 20, 8), "stage": 1, "method": "exact", "target": "right", "device": "cpu", "out": tmp_path}
    found = explain_picture(film, home / "run/best", **options)
    pipeline = load_video(home / "run/best")
    clip = pipeline.read(film)[None]
    assert found.name == "4.mp4, frame 3 of 4" and found.query == (20, 8) and found.picture.shape == (32, 32, 3)
    whole = attention(pipeline.backbone, clip, 1, 0, (3, 20, 8))[0]
    assert whole.shape == (2, 2, 4, 4) and np.allclose(found.attention, whole[:, 1])
    through = rollout(pipeline.backbone, clip)[0]
    assert np.allclose(found.rollout, 2 * through[1], atol=1e-6) and found.rollout.shape == (8, 8)
    speaks = cam(pipeline.backbone, clip, 1, method="exact")[0]
    assert np.allclose(found.classified.values, speaks[3], atol=1e-6) and found.classified.label == "right"
    by_patches = explain_picture(film, home / "run/best", device="cpu", out=tmp_path)
    assert by_patches.classified.values.shape == (32, 32) and by_patches.classified.method == "integrated-gradients"


def test_simmim_of_clips_predicts_evaluates_and_explains(home, film, tmp_path, capsys):
    place = str(home / "simmim")
    assert main(["predict", str(film), "--weights", place, "--out", str(tmp_path), *ON_CPU]) == 0
    assert "loss" in capsys.readouterr().out and (tmp_path / "4_reconstructed.png").exists()
    assert main(["eval", place, "--data", str(home / "data"), "--split", "test", *ON_CPU]) == 0
    assert "one clip of 4×32×32" in capsys.readouterr().out
    assert main(["explain", str(film), "--checkpoint", place, "--out", str(tmp_path), *ON_CPU]) == 0
    assert "attention of frame 2, row 16, column 16" in capsys.readouterr().out


def test_the_run_records_what_use_needs(home):
    record = read_metadata(home / "run/best")
    assert record["task"]["name"] == "video" and record["preprocessing"]["classes"] == ["left", "right"]
    assert record["preprocessing"]["sampling"] == {"sample": "stride", "stride": 2, "rate": 0.0}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["predict", "PHOTO", "--weights", "RUN"], "is a picture, and this model reads films"),
        (["predict", "FILM", "--weights", "PICTURES"], "is a film, and this model reads pictures: films need a video model"),
        (["predict", "nowhere.mp4", "--weights", "RUN"], "No such film: nowhere.mp4"),
        (["predict", "FILM", "--weights", "RUN", "--bands", "2,1,0"], "--bands: the channels of films are colours"),
        (["predict", "FILM", "--weights", "RUN", "--maps"], "--maps is of use to segmenters alone"),
        (["predict", "FILM", "--weights", "RUN", "--score", "0.3"], "--score is of use to detectors alone"),
        (["predict", "FILM", "--weights", "RUN", "--flip"], "--flip is of no use to these weights (video)"),
        (["predict", "FILM", "--weights", "RUN", "--crops", "0"], "is not a whole number of at least 1"),
        (["predict", "FILM", "--weights", "SIMMIM", "--top", "3"], "--top is of use to classifiers alone"),
        (["predict", "FILM", "--weights", "SIMMIM", "--crops", "3"], "--crops is of no use to these weights (simmim)"),
        (["predict", "PHOTO", "--weights", "PICTURES", "--clips", "3"], "--clips is of no use to these weights (classify)"),
        (["eval", "PICTURES", "--data", "DATA", "--crops", "3"], "--crops is of no use"),
        (["eval", "PICTURES", "--data", "DATA", "--workers", "3"], "--workers belongs to a suite"),
        (["eval", "RUN", "--suite", "imagenet", "--data", "DATA", "--clips", "3"], "--clips and --crops are views of films"),
        (["eval", "RUN", "--data", "DATA", "--scales", "1,2"], "--scales is of no use"),
        (["eval", "RUN", "--data", "DATA"], "has no 'val' part, only test, train"),
        (["eval", "RUN", "--data", "nowhere"], "nowhere"),
        (["explain", "PHOTO", "--checkpoint", "RUN"], "is a picture, and this model reads films"),
        (["explain", "FILM", "--checkpoint", "PICTURES"], "is a film, and this model reads pictures"),
        (["explain", "FILM", "--checkpoint", "RUN", "--query", "3,4"], "query=3,4 is not a pixel of this 4×32×32 input"),
        (["explain", "FILM", "--checkpoint", "RUN", "--query", "3,4,5,6"], "of a film its frame before them"),
        (["explain", "FILM", "--checkpoint", "RUN", "--target", "up"], "--target up is not a class of this model"),
        (["quantize", "RUN", "--out", "OUT"], "reads films"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_end_in_one_line(home, film, tmp_path, capsys, command, words):
    places = {
        "RUN": home / "run/best", "SIMMIM": home / "simmim", "PICTURES": home / "pictures", "PHOTO": home / "photo.png",
        "FILM": film, "DATA": home / "data", "OUT": tmp_path / "out",
    }  # fmt: skip
    assert words in mistake([places.get(word, word) for word in command], capsys)
    assert not (tmp_path / "out").exists()
