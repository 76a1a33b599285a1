"""Whole runs of segmenters: they learn, go on where they stopped, and give the same in any number of processes (R-DOWN-2, R-OPS-2)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import launch
from tests.test_train import equal, weights

from coco_files import rectangles
from segment_files import CLASSES, shapes
from small_detectors import DENSE, PAD, small_config
from small_segmenters import NARROW
from swinscale.config import to_dict
from swinscale.detection import evaluate_detector
from swinscale.export.run import export
from swinscale.heads.config import SegmentConfig
from swinscale.models import SwinConfig
from swinscale.optim import OptimConfig
from swinscale.parallel import MemoryConfig
from swinscale.recipes import Recipe, run
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.recipes.overfit import overfit, overfit_verdict
from swinscale.recipes.segmentation import SegmentationDataConfig
from swinscale.runlog import read_log
from swinscale.segmentation import evaluate_segmenter
from swinscale.train import TrainConfig, _Run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pictures to train on and 5 to evaluate, of 56 to 64 × 64 to 72 pixels, of three classes."""
    folder = shapes(tmp_path_factory.mktemp("shapes") / "data", {"training": 8, "validation": 5})
    (folder / "classes.txt").write_text(CLASSES)
    return folder


def recipe(
    images: Path, version: int = 2, data: dict[str, Any] | None = None, task: dict[str, Any] | None = None, **how: Any
) -> Recipe:
    """Two steps an epoch on crops of 48 pixels, evaluated on whole pictures."""
    optim = how.pop("optim", OptimConfig(lr=2e-3, lr_scaling="none", warmup_epochs=1))
    settings: dict[str, Any] = {
        "epochs": 2, "batch_size": 4, "num_workers": 0, "precision": "fp32", "log_every": 1, "device": "cpu",
        "eval_every": 0, "diagnose_every": 0,
    }  # fmt: skip
    model = SwinConfig(version=version, pad=PAD[version], **DENSE)
    places: dict[str, Any] = {"train": str(images), "crop": (48, 48), "short": 48, "long": 96, **(data or {})}
    train = TrainConfig(optim=optim, **{**settings, **how})
    return Recipe("tiny", model, SegmentConfig(**{**NARROW, **(task or {})}), SegmentationDataConfig(**places), train)


def losses(directory: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(directory) if entry["kind"] == "train"]


@pytest.mark.slow
def test_a_segmenter_learns_its_images_by_heart(images, tmp_path):
    """R-DOWN-2: mIoU above 0.95 on synthetic shapes, through the test that ``swinscale train RECIPE --overfit 4`` is."""
    chosen = overfit(recipe(images, task={"dropout": 0.1, "test_short": 56, "test_long": 96, "channels": 32}), 4)
    optim = dataclasses.replace(chosen.train.optim, lr=4e-3, warmup_lr=4e-5, min_lr=8e-5, warmup_epochs=5)
    chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, optim=optim))
    assert (chosen.task.dropout, chosen.train.batch_size, chosen.data.limit) == (0, 2, 4)
    result = run(chosen, tmp_path / "run")
    assert result.metrics["miou"] > 0.95 and result.metrics["aacc"] > 0.97
    assert [row["name"] for row in result.metrics["per_class"]] == ["ground", "rectangle", "disc"]
    assert "Learned by heart: miou 0.9" in overfit_verdict(chosen, result)


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("version", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(images, tmp_path, monkeypatch, version):
    """R-OPS-2: weights, averages, statistics of batch norms, measures and log are bit-identical, with all that is random in a
    segmenter's step: scale, crop, flip, distortion, stochastic depth, dropout."""
    whole = recipe(images, version, task={"dropout": 0.2}, epochs=3, ema_decay=0.5)
    whole = dataclasses.replace(whole, model=dataclasses.replace(whole.model, drop_path_rate=0.3))
    reference = run(whole, tmp_path / "whole")
    step = _Run._optimizer_step

    def until_the_fourth(self: _Run, batches: Any) -> bool:
        if self.step == 4:
            raise Killed
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_optimizer_step", until_the_fourth)
        with pytest.raises(Killed):
            run(whole, tmp_path / "killed")
    resumed = run(whole, tmp_path / "killed", resume=True)
    assert reference.steps == 6 and losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert resumed.metrics == reference.metrics and len(set(losses(tmp_path / "whole"))) == 6
    for name in ("best", "last"):
        assert equal(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))
    file = f"step-{reference.steps:08d}"
    one, two = (_checkpoint(tmp_path / d / "checkpoints" / file) for d in ("whole", "killed"))
    assert {name.split(".")[0] for name in one} == {"task", "ema", "optimizer"} and equal(one, two)
    statistics = [name for name in one if name.startswith("task") and name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 2 * 13
    assert all((one[name] != (0 if name.endswith("mean") else 1)).any() for name in statistics)  # they have moved


def _checkpoint(place: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(place.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_loaders_in_other_processes_change_nothing(images, tmp_path):
    for name, workers in (("here", 0), ("there", 1)):
        run(recipe(images, epochs=1, num_workers=workers), tmp_path / name)
    assert equal(weights(tmp_path / "here"), weights(tmp_path / "there"))


def test_one_image_at_a_time(images, tmp_path):
    """The map pooled to one cell has a single value per channel then; evaluation goes by the same statistics as training."""
    for name, micro in (("one", None), ("four", 1)):
        result = run(recipe(images, micro_batch=micro), tmp_path / name)
        assert result.steps == 4 and 0 < result.metrics["aacc"] < 1
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert four != one and four == pytest.approx(one, rel=0.5)
    state = weights(tmp_path / "four", "last")
    assert (state["decode.pooling.branches.0.1.running_var"] == 1).all()
    assert (state["decode.pooling.branches.1.1.running_var"] != 1).any()


def test_lower_precision(images, tmp_path):
    """bf16 learns as fp32 does for a few steps; what is written is fp32."""
    for name in ("fp32", "bf16"):
        run(recipe(images, precision=name), tmp_path / name)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.2)
    written = weights(tmp_path / "bf16")
    assert {t.dtype for n, t in written.items() if not n.endswith("num_batches_tracked")} == {torch.float32}


def test_a_share_of_the_images_is_held_out_where_there_is_no_other(tmp_path):
    folder = shapes(tmp_path / "all", {"": 8}, layout=("images{}", "labels{}"))
    run(recipe(folder, epochs=1, data={"classes": "3", "eval_fraction": 0.25}), tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["train_images"], manifest["eval_images"]) == (6, 2)
    measured = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    again = evaluate_segmenter(tmp_path / "run/last", device="cpu")
    assert again["confusion"] == measured["confusion"] and len(again["per_class"]) == 3


def test_a_segmenter_that_is_spread_over_processes_starts_alike(images, tmp_path):
    """Built on ``meta`` with ZeRO-3 in one process: the same steps, statistics of batch norms and measures as a plain run."""
    plain = recipe(images, epochs=1)
    spread = dataclasses.replace(plain.train, memory=MemoryConfig(shard="zero3"))
    one = run(plain, tmp_path / "plain")
    two = run(dataclasses.replace(plain, train=spread), tmp_path / "spread")
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "spread")
    assert before.keys() == after.keys()
    assert max((before[name].float() - after[name].float()).abs().max().item() for name in before) <= 1e-4
    assert two.metrics["aacc"] == pytest.approx(one.metrics["aacc"], abs=2e-3)
    export(tmp_path / "spread", tmp_path / "exported")
    assert equal(weights(tmp_path, "exported"), after)


RUN = """
import json, sys
from pathlib import Path
from swinscale.recipes.base import recipe_from_dict, run
place = Path(sys.argv[1], sys.argv[2])
run(recipe_from_dict(json.loads(place.with_suffix(".json").read_text())), place)
"""


@pytest.mark.slow
def test_two_processes(images, tmp_path):
    """Copies of the segmenter, and ZeRO-3: the run of one process that takes the same micro-batches, and one measure of all images.

    In evaluation pictures of several sizes are looked at with a sliding window, twice, so that processes need different
    numbers of forward passes; and the last picture is that of one process alone.
    """
    views = {"test_crop": 32, "test_stride": 8, "test_flip": True, "test_ratios": (0.5, 1.0)}
    plain = recipe(images, epochs=1, task={**views, "dropout": 0.0}, micro_batch=2)
    alone = run(plain, tmp_path / "alone")
    for name, memory in (("copies", MemoryConfig()), ("shares", MemoryConfig(shard="zero3"))):
        this = dataclasses.replace(plain, train=dataclasses.replace(plain.train, memory=memory))
        (tmp_path / f"{name}.json").write_text(json.dumps(to_dict(this)))
        launch(2, RUN, tmp_path, name, timeout=120)
    first = weights(tmp_path / "alone", "last")
    for name in ("copies", "shares"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["processes"] == 2 and manifest["eval_images"] == 5
        state = weights(tmp_path / name, "last")
        for key, value in first.items():
            # Statistics of batch norms are means over processes, or over one micro-batch after another.
            if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                assert (state[key] - value).abs().max() <= 1e-4, key
        measured = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        again = evaluate_segmenter(tmp_path / name / "last", device="cpu")
        pixels = [row["pixels"] for row in again["per_class"]]
        assert [row["pixels"] for row in measured["per_class"]] == pixels and min(pixels) > 0
        assert pixels == [row["pixels"] for row in alone.metrics["per_class"]]
        assert measured["aacc"] == pytest.approx(again["aacc"], abs=1e-3)


@pytest.mark.slow
def test_two_processes_with_a_detector_that_looks_at_several_scales(tmp_path):
    """ZeRO-3 and an odd number of images: the process without the last one takes part in its forward passes."""
    pictures = rectangles(tmp_path / "coco")
    plain = recipe(pictures, epochs=1)
    file = str(pictures / "annotations/instances_train2017.json")
    data = DetectionDataConfig(str(pictures), file, short=(64,), long=96, test_short=64, test_long=96, eval_limit=5)
    train = dataclasses.replace(plain.train, memory=MemoryConfig(shard="zero3"))
    task = small_config(regions=16, test_short=(48, 64), test_flip=True)
    this = dataclasses.replace(plain, data=data, task=task, train=train)
    (tmp_path / "shares.json").write_text(json.dumps(to_dict(this)))
    launch(2, RUN, tmp_path, "shares", timeout=120)
    measured = json.loads((tmp_path / "shares/result.json").read_text())["metrics"]
    again = evaluate_detector(tmp_path / "shares/last", device="cpu")
    assert sum(row["instances"] for row in measured["per_class"]) == sum(row["instances"] for row in again["per_class"])
    assert again["box_ar100"] == pytest.approx(measured["box_ar100"], abs=1e-4) and measured["box_ar100"] > 0
