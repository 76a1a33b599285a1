"""The benchmark of detection: torchvision's detector in our loop, what is written of a run, and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench import __main__ as bench
from bench import detection, page
from bench.detection_speed import CONTENDERS, OURS, Speed, peak_memory
from bench.detectors import STRIDES, TRIAL, SwinPyramid, TorchvisionDetector, resnet_pyramid, torchvision_task
from bench.speed import add_ratios
from tests import coco_files
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.recipes import get_recipe

pytestmark = pytest.mark.usefixtures("compiler_settings")
SMALL = DetectConfig(
    channels=8,
    fc_channels=16,
    regions=16,
    proposals=(20, 20),
    proposals_per_level=(30, 30),
    anchor_scale=4.0,
    score=0.0,
)
WHERE = {
    "machine": {"processor": "a processor", "cpus": 2, "threads": 1, "gpu": None},
    "versions": {"torch": "2.9"},
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "command": "python -m bench detect",
}


class Maps(nn.Module):
    """Five maps with the strides of a pyramid, in a moment."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, images):
        return {str(s): nn.functional.avg_pool2d(self.conv(images), s, ceil_mode=True) for s in STRIDES}


def small_detector(classes: int = 3) -> TorchvisionDetector:
    detector = TorchvisionDetector(Maps(), classes, SMALL)
    for pool in (detector.net.roi_heads.box_roi_pool, detector.net.roi_heads.mask_roi_pool):
        pool.featmap_names = ["4", "8", "16", "32"]
    return detector


def photos(root: Path, count: int = 5) -> Path:
    entries = [coco_files.entry(i, i) for i in range(1, count + 1)]
    return coco_files.write(root / "coco", entries, [(40, 48)] * count)


def test_the_peer_at_our_defaults_is_torchvisions_own():
    """Same names and shapes as ``maskrcnn_resnet50_fpn``, same anchors, same limits but for the number of proposals."""
    with torch.device("meta"):
        ours = TorchvisionDetector(resnet_pyramid(50, 256), 80, DetectConfig()).net
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    expected = {name: p.shape for name, p in theirs.state_dict().items()}
    assert {name: p.shape for name, p in ours.state_dict().items()} == expected
    assert all(p.requires_grad for p in ours.parameters())
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.rpn._pre_nms_top_n == theirs.rpn._pre_nms_top_n
    for name in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(ours.roi_heads, name) == getattr(theirs.roi_heads, name)
    assert ours.roi_heads.fg_bg_sampler.batch_size_per_image == 512 == DetectConfig().regions


def test_detections_are_those_of_torchvisions_own_forward():
    detector = small_detector().eval()
    detector.net.transform = GeneralizedRCNNTransform(64, 64, [0.0] * 3, [1.0] * 3)  # 64 pixels stay 64
    images = torch.randn(2, 3, 64, 64)
    mine = detector.detect(images, [(64, 64)] * 2)
    whole = detector.pictures(images, [(64, 64)] * 2)
    with torch.no_grad():
        theirs = detector.net(list(images))
    for found, masks, expected in zip(mine, whole, theirs, strict=True):
        assert len(found) > 0 and torch.equal(found.labels, expected["labels"] - 1)
        assert torch.equal(found.boxes, expected["boxes"]) and torch.equal(found.scores, expected["scores"])
        assert torch.equal(masks, expected["masks"][:, 0] >= 0.5)


def test_labels_count_from_zero_in_training():
    """From equal logits an object of our class 1 pulls up torchvision's logit 2, and no other but background's."""
    detector = small_detector().train()
    nn.init.zeros_(detector.net.roi_heads.box_predictor.cls_score.weight)
    nn.init.zeros_(detector.net.roi_heads.box_predictor.cls_score.bias)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.zeros(1, 64, 64, dtype=torch.bool)
    target["masks"][:, 8:40, 8:40] = True
    losses = detector(torch.randn(1, 3, 64, 64), [(64, 64)], [target])
    assert all(loss.isfinite() for loss in losses.values()) and len(losses) == 5
    losses["loss_classifier"].backward()
    gradient = detector.net.roi_heads.box_predictor.cls_score.bias.grad
    assert gradient[1] == gradient[3] == pytest.approx(0.25) and gradient[2] < 0.25
    assert target["labels"].tolist() == [1]


@pytest.mark.parametrize("version", [1, 2])
def test_torchvisions_swin_gives_the_levels_of_a_pyramid(version):
    maps = SwinPyramid(version, TRIAL, 16)(torch.randn(1, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    sizes = [(1, 16, -(-64 // s), -(-96 // s)) for s in STRIDES]
    assert [tuple(m.shape) for m in maps.values()] == sizes


def test_position_biases_of_a_peer_do_not_decay():
    task = torchvision_task(SwinPyramid(2, TRIAL, 8), ["a", "b"], SMALL)
    exempt = task.no_weight_decay()
    assert any(name.endswith("logit_scale") for name in exempt) and not any("fpn" in name for name in exempt)


def test_a_row_replaces_that_of_the_same_name():
    rows = [{"name": "a", "x": 1}, {"name": "b", "x": 2}]
    assert detection.merged(rows, {"name": "a", "x": 3}, ("name",)) == [{"name": "a", "x": 3}, rows[1]]
    assert detection.merged(rows, {"name": "c", "x": 3}, ("name",)) == [*rows, {"name": "c", "x": 3}]
    assert rows[0]["x"] == 1


def test_every_desk_recipe_is_among_those_learned_by_heart():
    assert len(detection.DESK) == 6
    for name in detection.DESK:
        assert get_recipe(name).name == name


def test_the_first_wide_photos_with_objects_are_measured(tmp_path):
    """An upright photo and one without objects are passed over."""
    things = [coco_files.entry(1, 1), coco_files.entry(2, 3), coco_files.entry(3, 4)]
    data = coco_files.write(tmp_path / "coco", things, [(60, 48), (40, 48), (40, 48), (40, 48), (40, 48)])
    speed = Speed(str(data), "training", size=64, tiny=True)
    found = open_all(speed)
    assert set(found["image_id"]) <= {3, 4} and len(found["image_id"]) == 2
    assert found["size"].tolist() == [[64, 77]] * 2


def open_all(speed: Speed) -> dict:
    """The batch; one of five photos is held out, so that seeds decide which are left."""
    batch, classes = speed.photos()
    assert len(classes) == 2
    return batch


def row(name: str, **more) -> dict:
    measures = dict.fromkeys(detection.MEASURES, 0.01234)
    start = {
        "name": name,
        "parameters": 12_300_000,
        "steps": 66,
        "minutes": 4.2,
        "commit": "abc",
        "date": WHERE["date"],
    }
    how = {
        "channels": 64,
        "fc_channels": 256,
        "anchor_scale": 4.0,
        "regions": 128,
        "short": [224, 320],
        "test_short": 256,
    }
    counts = {
        "images": 88,
        "heldout_images": 49,
        "epochs": 3,
        "batch": 4,
        "lr": 5e-4,
        "objects": 90,
        "smallest": 16,
        "learned": True,
    }
    return {**start, **measures, **how, **counts, "environment": WHERE, **more}


def case(**more) -> dict:
    contenders = [
        {"name": name, "status": "ok", "parameters": 5e7, "images_per_s": 0.5, "rounds": [4.0 + i, 4.0 + i],
         "seconds": {"median": 4.0 + i, "q1": 4.0 + i, "q3": 4.0 + i}, "detections": [100, 98], "memory_bytes": 2e9}
        for i, name in enumerate(CONTENDERS)
    ]  # fmt: skip
    contenders[-1] = {"name": CONTENDERS[-1], "status": "cannot", "reason": "no room"}
    add_ratios(contenders, OURS)
    how = {"device": "cpu", "mode": "inference", "dtype": "fp32", "size": 320, "batch": 2, "inputs": [320, 512]}
    same = {"objects": 7, "classes": 80, "channels": 256, "proposals": [1000, 1000], "regions": 512}
    return {**how, **same, "operators": "plain PyTorch", "contenders": contenders, "environment": WHERE, **more}


def test_tables_show_what_was_found_and_under_which_conditions(tmp_path):
    content = {
        "kind": "detect",
        "speed": [case(), case(device="cuda", mode="training")],
        "heldout": [row("desk_mask_rcnn_swin"), row(detection.PEER, mask_ap=None)],
        "overfit": [row("desk_htc_swin", box_ap=0.95, mask_ap=0.91)],
    }
    (tmp_path / "detect.json").write_text(json.dumps(content))
    made = {name: make() for name, make in page.parts(tmp_path, tmp_path / "page.md").items()}
    assert set(made) == {f"detect.{name}" for name in ("speed", "speed-gpu", "heldout", "overfit", "machine")}
    speed = made["detect.speed"]
    assert "1.50" in speed and "no room" in speed and "2,000" in speed and "98 to 100 detections" in speed
    assert "nms and roi_align are plain PyTorch for everybody" in speed and "320×512" in speed
    assert all(f"times {ours.split()[1]} of ours" in speed for ours in OURS)
    heldout = made["detect.heldout"]
    assert "1.23" in heldout and "–" in heldout and "12.3 M" in heldout and "on 49 held-out photos" in heldout
    assert "95.0" in made["detect.overfit"] and "span 16 pixels" in made["detect.overfit"]
    assert "yes" in made["detect.overfit"] and "abc" in made["detect.overfit"]
    assert made["detect.machine"].count("a processor") == 1


def test_a_section_that_was_not_run_has_no_part():
    assert set(detection.parts({"overfit": [row("desk_htc_swin")]})) == {"overfit", "machine"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--sections", "fly"], "--help"),
        (["--sections", "overfit", "--only", "desk_mask_rcnn"], "desk_mask_rcnn_swin, desk_mask_rcnn_swinv2"),
        (["--sections", "heldout", "--only", detection.PEER], "--epochs"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(more, expected, tmp_path, capsys):
    command = ["detect", "--tiny", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *more]
    assert bench.main(command) == 2
    said = capsys.readouterr().err
    assert expected in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_photos_learned_by_heart_have_neither_crowds_nor_small_objects(tmp_path):
    """Of four photos the first has a crowd, the second a small object; the third is empty."""
    small = {"bbox": [10, 10, 6, 6], "segmentation": [[10, 10, 16, 10, 16, 16, 10, 16]]}
    crowd = {"iscrowd": 1, "segmentation": {"counts": [0, 4, 1916], "size": [40, 48]}}
    things = [coco_files.entry(1, 1, **crowd), coco_files.entry(2, 2, **small), coco_files.entry(3, 2)]
    things += [coco_files.entry(4, 4), coco_files.entry(5, 4)]
    data = coco_files.write(tmp_path / "coco", things, [(40, 48)] * 4)
    sizes = detection.shrunk(get_recipe("desk_mask_rcnn_swin")).data
    few = detection.Settings(str(data), images=1, smallest=16)
    chosen, objects = detection.clear_photos(sizes, few, tmp_path / "photos")
    assert objects == 2 and [f.name for f in (tmp_path / "photos" / "train").iterdir()] == ["4.png"]
    assert [image["id"] for image in json.loads(Path(chosen.train).read_text())["images"]] == [4]
    with pytest.raises(UsageError, match="has 1 such photos, not 2"):
        detection.clear_photos(sizes, detection.Settings(str(data), images=2), tmp_path / "more")


@pytest.mark.slow
def test_photos_by_heart_one_recipe_at_a_time(tmp_path, capsys):
    """A second call adds its row; a third one replaces it."""
    out = tmp_path / "out"
    command = ["detect", "--tiny", "--data", str(photos(tmp_path)), "--out", str(out), "--threads", "1"]
    command += ["--sections", "overfit", "--images", "2", "--only"]
    for name, epochs in (("desk_htc_swinv2", "1"), ("desk_mask_rcnn_swin", "1"), ("desk_mask_rcnn_swin", "2")):
        assert bench.main([*command, name, "--epochs", epochs]) == 0
    text = (out / "detect-tiny.json").read_text()
    rows = json.loads(text)["overfit"]
    assert [(row["name"], row["steps"]) for row in rows] == [("desk_htc_swinv2", 1), ("desk_mask_rcnn_swin", 2)]
    assert all(row["date"] and "commit" in row and not row["learned"] and row["images"] == 2 for row in rows)
    assert str(tmp_path) not in text and "`desk_htc_swinv2`" in capsys.readouterr().out


@pytest.mark.slow
def test_everybody_trains_on_the_same_photos(tmp_path):
    out, runs = tmp_path / "out", tmp_path / "runs"
    command = ["detect", "--tiny", "--data", str(photos(tmp_path)), "--out", str(out), "--threads", "1"]
    assert bench.main([*command, "--sections", "heldout", "--runs", str(runs)]) == 0
    rows = json.loads((out / "detect-tiny.json").read_text())["heldout"]
    assert [row["name"] for row in rows] == list(detection.HELDOUT)
    same = ("epochs", "steps", "images", "heldout_images", "batch", "lr", "channels", "fc_channels", "regions", "short")
    assert all({name: row[name] for name in same} == {name: rows[0][name] for name in same} for row in rows)
    assert len({row["parameters"] for row in rows}) == 3 and all(0 <= row["box_ap"] <= 1 for row in rows)
    assert len(list(runs.iterdir())) == 3


@pytest.mark.slow
def test_speed_of_everybody_is_measured_in_the_same_rounds(tmp_path):
    out = tmp_path / "out"
    command = ["detect", "--tiny", "--data", str(photos(tmp_path)), "--out", str(out), "--threads", "1"]
    assert bench.main([*command, "--repeats", "2", "--no-memory"]) == 0
    cases = json.loads((out / "detect-tiny.json").read_text())["speed"]
    assert [case["mode"] for case in cases] == ["training", "inference"]
    for rows in (case["contenders"] for case in cases):
        assert [row["name"] for row in rows] == list(CONTENDERS)
        assert all(row["status"] == "ok" and len(row["rounds"]) == 2 for row in rows), rows
        assert all(set(row["ratios"]) == set(OURS) for row in rows)
        assert rows[0]["ratios"][OURS[0]]["median"] == 1
    assert all(min(row["detections"]) > 0 for row in cases[1]["contenders"])
    assert all(row["loss"] > 0 for row in cases[0]["contenders"])


@pytest.mark.slow
def test_memory_is_that_of_one_contender_in_its_own_process(tmp_path):
    found = peak_memory(Speed(str(photos(tmp_path)), "training", size=64, tiny=True), OURS[1])
    assert found is not None and 2e7 < found < 2e9
