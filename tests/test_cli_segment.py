"""Segmenters on the command line: train, evaluate, predict, and one clear line for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from random_models import random_swin
from segment_files import CLASSES, save, shapes
from small_detectors import small_detector
from swinscale.cli import main
from swinscale.segmentation import load_segmentation
from swinscale.tasks.detect import Detect
from swinscale.weights import read_metadata, save_pretrained
from test_cli import mistake

SETTINGS = [
    "model.embed_dim=8", "model.depths=(1,1,1,1)", "model.num_heads=(1,1,2,2)", "model.window_size=4", "model.img_size=64",
    "task.channels=16", "task.aux_channels=8", "task.test_short=56", "task.test_long=112", "data.crop=(48,48)",
    "data.short=56", "data.long=112", "train.num_workers=0", "train.device=cpu", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and maps, ``data``, four of one's own, ``own``, and a segmenter trained on the first, ``run``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("segmentation")
    shapes(folder / "data", {"training": 8, "validation": 4})
    (folder / "data/classes.txt").write_text(CLASSES)
    shapes(folder / "own", {"": 4}, layout=("images{}", "labels{}"))
    arguments = ["train", "desk_upernet_swinv2", "--data", str(folder / "data"), "--out", str(folder / "run")]
    learn = ["train.epochs=40", "train.batch_size=4", "train.optim.lr=6e-3", "data.augment=light", "task.dropout=0"]
    assert main([*arguments, *SETTINGS, *learn, "train.eval_every=20"]) == 0
    classifier, detector = random_swin(), small_detector()
    save_pretrained(classifier, folder / "classifier")
    preprocessing = {"test_short": 48, "test_long": 80, "mean": None, "std": None, "classes": list("abc")}
    Detect(detector, list("abc"), preprocessing).save_pretrained(folder / "detector")
    return folder


@pytest.fixture
def run(home: Path) -> str:
    return str(home / "run" / "best")


def test_a_run_leaves_a_segmenter_and_its_measures(home):
    result = json.loads((home / "run/result.json").read_text())
    assert result["metrics"]["miou"] > 0.5 and result["metrics"]["aacc"] > 0.8
    assert [row["name"] for row in result["metrics"]["per_class"]] == ["ground", "rectangle", "disc"]
    record = read_metadata(home / "run/best")
    assert record["task"]["name"] == "segment" and record["preprocessing"]["colours"][1] == [220, 40, 40]


def test_your_own_folder_needs_no_list_of_classes(home, tmp_path, capsys):
    """As many as its maps have; a share is held out."""
    arguments = ["train", "desk_upernet_swinv2", "--data", str(home / "own"), "--out", str(tmp_path / "run"), *SETTINGS]
    assert main([*arguments, "train.epochs=1", "train.batch_size=2"]) == 0
    assert "3 training and 1 evaluation images" in capsys.readouterr().out
    assert load_segmentation(tmp_path / "run/best").classes == ["class 0", "class 1", "class 2"]
    again = ["train", "desk_upernet_swinv2", "--data", str(home / "own"), "--out", str(tmp_path / "two"), *SETTINGS]
    assert main([*again, "train.epochs=1", "train.batch_size=2", "data.classes=5"]) == 0  # a number, as it is written
    assert len(load_segmentation(tmp_path / "two/best").classes) == 5


def test_evaluation_without_data_is_that_of_the_run(home, run, capsys):
    assert main(["eval", str(home / "run/last"), "--device", "cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    metrics = json.loads((home / "run/result.json").read_text())["metrics"]
    assert "the evaluation images of its run" in out and "4 images" in out
    assert f"mean IoU {100 * metrics['miou']:.1f}" in out and "rectangle" in out


def test_evaluation_with_another_window_size_and_several_views(home, run, tmp_path, capsys):
    """R-DOWN-5."""
    plain = ["eval", run, "--data", str(home / "data"), "--device", "cpu"]
    assert main([*plain, "--split", "train", "--batch-size", "3", "--window", "8"]) == 0
    assert "on the train part of" in capsys.readouterr().out
    views = ["--scales", "0.75,1", "--flip", "--slide", "48,24", "--img-size", "64", "--out", str(tmp_path / "m.json")]
    assert main([*plain, *views]) == 0
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["images"] == 4 and 0.3 < written["miou"] <= 1 and len(written["confusion"]) == 3
    assert (tmp_path / "m.svg").exists() and "val part" in capsys.readouterr().out


def test_predict_draws_pictures_beside_the_truth_and_writes_maps(home, run, tmp_path, capsys):
    pictures, maps = home / "data/images/validation", home / "data/annotations/validation"
    arguments = ["predict", str(pictures), "--checkpoint", str(home / "run"), "--truth", str(maps), "--maps"]
    assert main([*arguments, "--out", str(tmp_path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "ground " in out and " %" in out and len(list(tmp_path.glob("*_segmented.png"))) == 4
    right = total = 0
    for number in range(4):
        found, truth = (np.asarray(Image.open(p)) for p in (tmp_path / f"{number}_labels.png", maps / f"{number}.png"))
        right, total = right + (found == truth)[truth != 255].sum(), total + (truth != 255).sum()
    metrics = json.loads((home / "run/result.json").read_text())["metrics"]
    assert right / total == pytest.approx(metrics["aacc"], abs=0.05)
    one = ["predict", str(pictures / "0.png"), "--weights", run, "--out", str(tmp_path / "one"), "--flip"]
    assert main([*one, "--scales", "0.5,1", "--truth", str(maps / "0.png"), "--window", "8"]) == 0
    with Image.open(tmp_path / "one/0_segmented.png") as four:
        assert four.width > 900  # picture, prediction, truth, errors


def test_what_cannot_be_read_is_named_and_the_rest_is_done(home, run, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    picture = home / "data/images/validation/0.png"
    assert (
        main(["predict", str(tmp_path / "broken.png"), str(picture), "--weights", run, "--out", str(tmp_path / "o")])
        == 0
    )
    assert "skipped broken.png" in capsys.readouterr().out
    other = save(tmp_path / "maps/0.png", np.zeros((5, 6), dtype=np.uint8))
    said = mistake(["predict", picture, "--weights", run, "--truth", other, "--out", tmp_path / "o"], capsys)
    assert f"{other}: has 5×6 pixels, its picture" in said


def test_the_rest_of_the_commands(home, run, tmp_path, capsys):
    assert main(["info", run]) == 0
    assert "semantic segmentation: UPerNet, 3 classes" in capsys.readouterr().out
    assert main(["report", str(home / "run"), "--out", str(tmp_path / "report.html")]) == 0
    assert "rectangle" in (tmp_path / "report.html").read_text()
    assert main(["export", str(home / "run"), "--out", str(tmp_path / "exported")]) == 0
    one, two = (load_file(d / "model.safetensors") for d in (home / "run/last", tmp_path / "exported"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    shutil.copytree(run, tmp_path / "best")
    assert main(["push", str(tmp_path / "best"), "me/shapes", "--dry-run"]) == 0
    card = (tmp_path / "best/README.md").read_text()
    assert "with a UPerNet for semantic segmentation" in card and 'pipeline_tag: "image-segmentation"' in card
    assert "| segmenter | UPerNet |" in card and "| classes | 3 |" in card and "load_segmentation" in card
    assert "short side 56 pixels, long side at most 112" in card and "predict image.jpg" in card


def test_a_run_goes_on_and_is_repeated_from_its_record(home, tmp_path):
    place = tmp_path / "run"
    arguments = ["train", "desk_upernet_swinv2", "--data", str(home / "own"), "--out", str(place), *SETTINGS]
    arguments += ["train.epochs=1", "train.batch_size=2"]
    assert main(arguments) == 0 and main([*arguments, "--resume"]) == 0
    assert main(["train", str(place / "config.json"), "--out", str(tmp_path / "again")]) == 0
    one, two = (load_file(d / "last/model.safetensors") for d in (place, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_transfer_keeps_the_backbone_alone(home, run, tmp_path, capsys):
    """And says so: what is written claims to be no segmenter."""
    assert main(["transfer", run, str(tmp_path / "wide"), "--window", "8"]) == 0
    assert "task" not in read_metadata(tmp_path / "wide")
    said = mistake(["eval", tmp_path / "wide", "--data", home / "own"], capsys)
    assert "segmenter" not in said


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["explain", "PHOTO", "--checkpoint", "RUN"], "is a segmenter"),
        (["quantize", "RUN", "--out", "OUT"], "is a segmenter"),
        (["export", "RUN", "--format", "onnx", "--out", "OUT"], "'pyramid' (--output). Of a detector or a segmenter"),
        (["eval", "RUN", "--resize", "96"], "--resize belongs to a suite"),
        (["eval", "RUN", "--suite", "coco", "--data", "DATA"], "holds no detector"),
        (["eval", "RUN", "--slide", "32,64"], "is not the side of a window and a stride up to it"),
        (["eval", "RUN", "--scales", "0"], "is not a number above 0"),
        (["eval", "RUN", "--data", "DATA", "--split", "test"], "has no 'test' part, only train, val"),
        (["eval", "CLASSIFIER", "--data", "DATA", "--slide", "32"], "--slide is of no use"),
        (["eval", "DETECTOR", "--data", "DATA"], "has no COCO annotations"),
        (["predict", "PHOTO", "--checkpoint", "CLASSIFIER", "--maps"], "--maps is of use to segmenters alone"),
        (["predict", "PHOTO", "--checkpoint", "DETECTOR", "--truth", "MAP"], "--truth is of use to segmenters alone"),
        (["predict", "PHOTO", "--checkpoint", "RUN", "--top", "3"], "--top is of use to classifiers alone"),
        (["predict", "PHOTO", "--checkpoint", "RUN", "--score", "0.3"], "--score is of use to detectors alone"),
        (["predict", "PHOTO", "--checkpoint", "RUN", "--truth", "nowhere"], "No such file or directory: nowhere"),
        (["predict", "nowhere.mp4", "--checkpoint", "RUN"], "nowhere.mp4 cannot be read as a film"),
        (["predict", "nowhere.png", "--checkpoint", "RUN"], "No such picture: nowhere.png"),
        (["train", "desk_upernet_swinv2", "--out", "OUT"], "add --data PATH, a folder with images and label maps"),
        (["train", "desk_upernet_swinv2", "--out", "OUT", "--data", "DATA", "task.score=1"], "Unknown setting 'task.score'"),
        (["train", "desk_upernet_swinv2", "--out", "OUT", "--data", "DATA", "task.aux_stage=7"], "task.aux_stage=7"),
        (["train", "desk_upernet_swinv2", "--out", "OUT", "--data", "DATA", "task.class_weights=(1,2)"], "2 numbers for 3"),
        (["train", "desk_upernet_swinv2", "--out", "OUT", "--data", "DATA", "--init", "DETECTOR"], "does not fit"),
        (["train", "desk_mask_rcnn_swinv2", "--out", "OUT", "--data", "DATA"], "has no COCO annotations"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_end_in_one_line(home, run, tmp_path, capsys, command, words):
    places = {
        "RUN": run, "DATA": home / "data", "PHOTO": home / "data/images/validation/0.png", "OUT": tmp_path / "out",
        "MAP": home / "data/annotations/validation/0.png", "CLASSIFIER": home / "classifier", "DETECTOR": home / "detector",
    }  # fmt: skip
    assert words in mistake([places.get(word, word) for word in command], capsys)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_the_data(home, run, tmp_path, capsys):
    def changed(name: str) -> Path:
        return Path(shutil.copytree(home / "own", tmp_path / name))

    train = ["train", "desk_upernet_swinv2", "--out", tmp_path / "new", "--data"]
    missing = changed("missing")
    (missing / "labels/2.png").unlink()
    assert "1 of 4 images" in mistake([*train, missing], capsys)
    shutil.rmtree(missing / "labels")
    assert "No label maps for the 4 images" in mistake([*train, missing], capsys)
    assert "No label maps for the 4 images" in mistake(["eval", run, "--data", missing], capsys)
    sizes = changed("sizes")
    save(sizes / "labels/1.png", np.zeros((10, 10), dtype=np.uint8))
    assert "images/1.png has" in mistake([*train, sizes], capsys)
    beyond = changed("beyond")
    with Image.open(beyond / "images/1.png") as image:
        save(beyond / "labels/1.png", np.full((image.height, image.width), 77, dtype=np.uint8))
    assert "the value 77 in row 0, column 0 is no class" in mistake([*train, beyond, "data.classes=3"], capsys)
    assert "the value 77" in mistake(["eval", run, "--data", beyond], capsys)
    assert not (tmp_path / "new").exists()
