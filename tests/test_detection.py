"""Trained detectors in use: pictures of any kind, evaluation with other windows and scales, and one clear line for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coco_files import rectangles
from small_detectors import DENSE, small_config, small_detector
from swinscale.cli import main
from swinscale.data.coco import open_coco
from swinscale.detection import DetectionPipeline, detect_files, evaluate_detector, load_detection
from swinscale.errors import UsageError
from swinscale.heads.detections import Detections
from swinscale.tasks.detect import Detect
from swinscale.weights import read_metadata, save_pretrained

SETTINGS = [
    "model.embed_dim=8", "model.depths=(1,1,1,1)", "model.num_heads=(1,1,2,2)", "model.window_size=4", "model.img_size=64",
    "task.channels=16", "task.fc_channels=32", "task.regions=16", "task.mask_size=14", "task.proposals=(40,40)",
    "task.proposals_per_level=(60,60)", "data.short=(64,)", "data.long=96", "data.test_short=64", "data.test_long=96",
    "data.limit=12", "train.optim.lr=4e-3", "train.optim.warmup_epochs=2", "train.epochs=16", "train.num_workers=0",
    "train.device=cpu", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, ``coco``, and a detector trained on them by the command line, ``run``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("detection")
    rectangles(folder / "coco")
    arguments = ["train", "desk_mask_rcnn_swinv2", "--data.train", str(folder / "coco"), "--out", str(folder / "run")]
    assert main([*arguments, *SETTINGS]) == 0
    return folder


@pytest.fixture
def run(home: Path) -> str:
    return str(home / "run" / "best")


def mistake(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command ends with."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swinscale: ") and error.count("\n") == 1 and "Traceback" not in error, error
    return error


def photo(path: Path, height: int, width: int, mode: str = "RGB") -> Path:
    draw = np.random.default_rng(height * 1000 + width)
    if mode == "I;16":
        Image.fromarray(draw.integers(0, 65536, (height, width), dtype=np.uint16)).save(path)
        return path
    Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(path)
    return path


def test_a_run_leaves_a_detector_and_its_measures(home):
    result = json.loads((home / "run/result.json").read_text())
    assert result["metrics"]["box_ap50"] > 0.2 and result["best"] == result["metrics"]["box_ap"]
    assert [row["name"] for row in result["metrics"]["per_class"]] == ["dog", "cat"]
    record = read_metadata(home / "run/best")
    assert record["task"]["name"] == "detect" and record["task"]["head"] == "mask_rcnn"
    assert record["preprocessing"]["classes"] == ["dog", "cat"] and record["preprocessing"]["test_short"] == 64


def test_evaluation_repeats_what_the_run_measured(home, run, capsys):
    measured = json.loads((home / "run/result.json").read_text())["metrics"]
    again = evaluate_detector(run, batch_size=4, device="cpu")
    assert measured["box_ap"] > 0 and {name: again[name] for name in measured} == measured
    out = capsys.readouterr().out
    assert "12 images" in out and "AP50" in out and "dog" in out


def test_evaluation_with_another_window_and_at_several_scales(home, run, capsys):
    """R-DOWN-5: as for the published Swin V2 detectors, which are tested with windows 48 after training with 32."""
    plain = ["eval", run, "--device", "cpu"]
    assert main([*plain, "--window", "8", "--data", str(home / "coco"), "--split", "train"]) == 0
    assert "on the train part of" in capsys.readouterr().out
    assert main([*plain, "--scales", "48,64", "--flip", "--out", str(home / "eval/scales.json")]) == 0
    assert "the evaluation images of its run" in capsys.readouterr().out
    written = json.loads((home / "eval/scales.json").read_text())
    assert written["images"] == 12 and 0 < written["box_ap50"] <= 1 and (home / "eval/scales.svg").exists()


def test_a_larger_window_keeps_the_position_bias(run):
    plain, wide = load_detection(run), load_detection(run, window_size=8)
    for stage in range(4):
        small, large = (p.task.backbone.layers[stage].blocks[0].attn for p in (plain, wide))
        before = small.bias((4, 4)).values.unflatten(1, (7, 7))
        after = large.bias((8, 8)).values.unflatten(1, (15, 15))
        assert (after[:, 4:-4, 4:-4] - before).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("height", "width", "mode"),
    [(1, 1, "RGB"), (1, 700, "RGB"), (2000, 3000, "RGB"), (70, 50, "L"), (70, 50, "I;16"), (70, 50, "RGBA"), (70, 50, "P"), (70, 50, "1")],
    ids=str,
)  # fmt: skip
def test_predict_draws_pictures_of_any_size_and_kind(run, tmp_path, capsys, height, width, mode):
    path = photo(tmp_path / "photo.png", height, width, mode)
    assert main(["predict", str(path), "--weights", run, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert f"{path}: " in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "photo_detected.png") as drawn:
        factor = drawn.width // width  # small ones are enlarged
        assert drawn.mode == "RGB" and drawn.size == (factor * width, factor * height)


def test_predict_says_what_it_found(home, run, tmp_path, capsys):
    pictures = sorted((home / "coco/train2017").glob("*.png"))[:3]
    assert main(["predict", *map(str, pictures), "--weights", run, "--score", "0.02", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"{path}: " in out and f"{path.stem}_detected.png" in out for path in pictures)
    assert "dog 0." in out or "cat 0." in out
    assert main(["predict", str(pictures[0]), "--weights", run, "--score", "0.9999", "--out", str(tmp_path)]) == 0
    assert "nothing with a score of at least 0.9999" in capsys.readouterr().out


def test_the_least_score_may_be_below_that_of_evaluation(home, run, tmp_path):
    picture = home / "coco/train2017/1.png"
    [(_, many)] = detect_files(run, [picture], out=tmp_path, score=0.001, device="cpu")
    assert many.scores.min() < 0.05 and (many.scores >= 0.001).all()
    [(_, few)] = detect_files(run, [picture], out=tmp_path, score=0.1, device="cpu")
    assert torch.equal(few.boxes, many.boxes[many.scores >= 0.1])


def test_predict_takes_a_run_a_folder_and_views(home, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        shutil.copy(home / "coco/train2017" / name, folder)
    arguments = ["predict", str(folder), "--weights", str(home / "run"), "--scales", "48,64", "--flip", "--window", "8"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1_detected.png", "2_detected.png"]


def test_what_cannot_be_read_is_named_and_the_rest_is_done(home, run, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    picture = str(home / "coco/train2017/1.png")
    assert main(["predict", str(broken), picture, "--weights", run, "--out", str(tmp_path / "out")]) == 0
    assert "skipped broken.png" in capsys.readouterr().out
    assert "None of the 1 pictures can be read" in mistake(["predict", broken, "--weights", run], capsys)
    assert "No such" in mistake(["predict", tmp_path / "nowhere.png", "--weights", run], capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "PHOTO", "--checkpoint", "RUN"],
        ["quantize", "RUN", "--out", "OUT"],
        ["export", "RUN", "--format", "torch", "--out", "OUT"],
        ["eval", "RUN", "--img-size", "96"],
        ["eval", "RUN", "--resize", "96"],
    ],
    ids=lambda command: " ".join(command[:1] + command[2:4]),
)
def test_what_detectors_cannot_do_is_said_in_one_line(run, tmp_path, capsys, command):
    places = {"PHOTO": photo(tmp_path / "photo.png", 40, 40), "RUN": run, "OUT": tmp_path / "out"}
    said = mistake([places.get(word, word) for word in command], capsys)
    assert any(words in said for words in ("detector", "has no classifier", "belongs to a suite"))
    assert not (tmp_path / "out").exists()


def test_mistakes_with_data(home, run, tmp_path, capsys):
    train = ["train", "desk_mask_rcnn_swinv2", "--out", tmp_path / "new"]
    assert "add --data PATH" in mistake(train, capsys)
    assert "No such folder or JSON file" in mistake([*train, "--data", tmp_path / "nowhere.json"], capsys)
    (tmp_path / "empty").mkdir()
    assert "has no COCO annotations" in mistake([*train, "--data", tmp_path / "empty"], capsys)
    assert "data.limit=99, but there are 12 images" in mistake(
        [*train, "--data", home / "coco", "data.limit=99"], capsys
    )
    (tmp_path / "text.json").write_text("[]")
    assert "no COCO detection file" in mistake([*train, "--data", tmp_path / "text.json"], capsys)
    assert not (tmp_path / "new").exists()
    classifier = [
        "train",
        "photos_scratch",
        "--data",
        home / "coco/annotations/instances_train2017.json",
        "--out",
        tmp_path / "new",
    ]
    mistake(classifier, capsys)
    assert "train" in mistake(["eval", run, "--data", home / "coco", "--device", "cpu"], capsys)  # it has no part "val"


def test_other_categories_are_named(home, run, tmp_path, capsys):
    shutil.copytree(home / "coco", tmp_path / "other")
    file = tmp_path / "other/annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "horse"
    file.write_text(json.dumps(content))
    said = mistake(["eval", run, "--data", tmp_path / "other", "--split", "train"], capsys)
    assert "cat, horse" in said and "2 categories" in said
    both = ["train", "desk_mask_rcnn_swinv2", "--data", home / "coco", f"data.eval={file}", "--out", tmp_path / "new"]
    assert "different categories (in one alone: cat, horse)" in mistake(both, capsys)


def test_weights_without_a_run_need_images(run, home, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "alone")
    assert "add --data PATH" in mistake(["eval", tmp_path / "alone"], capsys)
    assert main(["eval", str(tmp_path / "alone"), "--data", str(home / "coco"), "--split", "train"]) == 0


def test_a_classifier_is_no_detector(tmp_path, capsys):
    from random_models import random_swin

    save_pretrained(random_swin(), tmp_path / "classifier")
    with pytest.raises(UsageError, match="holds no detector: name a run of a detection recipe"):
        load_detection(tmp_path / "classifier")
    with pytest.raises(UsageError):
        load_detection(tmp_path / "nowhere")


def test_a_checkpoint_of_the_run_becomes_a_detector(home, tmp_path):
    """``swinscale export RUN --out`` writes what ``last`` holds."""
    assert main(["export", str(home / "run"), "--out", str(tmp_path / "exported")]) == 0
    one, two = (load_file(d / "model.safetensors") for d in (home / "run/last", tmp_path / "exported"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert load_detection(tmp_path / "exported").classes == ["dog", "cat"]


def test_a_run_of_a_detector_is_reported(home, tmp_path, capsys):
    assert main(["report", str(home / "run"), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "box_ap" in page or "box AP" in page


def pipeline(kind: str = "mask_rcnn", version: int = 2, **fields: Any) -> DetectionPipeline:
    detector = small_detector(kind, version, score=0.2, **fields).eval()
    preprocessing = {
        "test_short": 48,
        "test_long": 80,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "classes": ["a", "b", "c"],
    }
    task = Detect(detector, ["a", "b", "c"], preprocessing)
    from swinscale.data.detection_transforms import detection_eval_transform

    return DetectionPipeline(task, detection_eval_transform([0.5] * 3, [0.25] * 3, 48, 80))


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)


def same(a: Detections, b: Detections) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("boxes", "scores", "labels", "masks"))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade", "htc"])
def test_a_detector_that_was_saved_finds_the_same(tmp_path, kind, version):
    before = pipeline(kind, version)
    before.task.save_pretrained(tmp_path / "saved")
    after = load_detection(tmp_path / "saved")
    assert after.task.config == before.task.config and after.classes == ["a", "b", "c"]
    assert after.task.backbone.config == before.task.backbone.config
    pictures = [picture(60, 90), picture(37, 20)]
    pairs = list(zip(before(pictures), after(pictures), strict=True))
    assert all(same(a, b) for a, b in pairs) and len(pairs[0][0]) > 3
    again = Detect(after.task.model, after.classes, after.task.preprocessing)
    again.save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_pictures_do_not_depend_on_each_other():
    find = pipeline()
    pictures = [picture(60, 90), picture(50, 120, 1), picture(8, 8, 2)]
    assert all(same(a, find([p])[0]) for a, p in zip(find(pictures), pictures, strict=True))
    assert find([]) == []


def test_detections_are_in_pixels_of_the_picture():
    """The same picture at twice the size has its objects at twice the place; both become the same input."""
    find = pipeline()
    small = picture(48, 64)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    one, two = find([small, large])
    assert len(one) > 3 and torch.allclose(two.boxes[0], 2 * one.boxes[0], atol=4) and two.labels[0] == one.labels[0]
    assert (one.boxes[:, [0, 2]] <= 64).all() and (one.boxes[:, [1, 3]] <= 48).all()
    assert one.full_masks(48, 64).shape == (len(one), 48, 64)


def test_pixels_may_be_bytes_or_floats():
    find = pipeline()
    whole = picture(48, 64)
    one, two = find([whole, whole.float() / 255])
    assert torch.allclose(one.boxes, two.boxes, atol=1e-3) and torch.equal(one.labels, two.labels)


def test_settings_of_use_may_change(tmp_path):
    pipeline().task.save_pretrained(tmp_path)
    assert len(load_detection(tmp_path, limit=2)([picture(60, 90)])[0]) == 2
    strict = load_detection(tmp_path, score=0.9)
    assert (strict([picture(60, 90)])[0].scores > 0.9).all() and strict.task.config.score == 0.9
    with pytest.raises(TypeError):
        load_detection(tmp_path, scores=0.9)


def test_a_detector_of_other_channels_reads_its_kind_of_picture(tmp_path):
    """One channel; the drawing is grey."""
    detector = small_detector(backbone={**DENSE, "in_chans": 1}, score=0.2)
    preprocessing = {"test_short": 48, "test_long": 80, "mean": None, "std": None, "classes": ["a", "b", "c"]}
    Detect(detector, ["a", "b", "c"], preprocessing).save_pretrained(tmp_path / "grey")
    path = photo(tmp_path / "photo.png", 50, 60, "I;16")
    [(_, found)] = detect_files(tmp_path / "grey", [path], out=tmp_path / "out", score=0.2, device="cpu")
    assert load_detection(tmp_path / "grey").read(path).shape == (1, 50, 60) and len(found) > 0
    assert (tmp_path / "out/photo_detected.png").exists()


def test_real_photos_are_looked_at(shared_data, run, tmp_path, capsys):
    folder = shared_data / "coco"
    if not folder.is_dir():
        pytest.skip("the real COCO images are not beside this checkout")
    source = open_coco(folder, "val", masks=False)
    paths = [Path(source.store.root) / name for name in source.names[:2]]
    assert main(["predict", *map(str, paths), "--weights", run, "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*_detected.png"))) == 2
    assert small_config().limit == 100
