"""Whole runs of detectors: they learn, go on where they stopped, and give the same in any number of processes (R-DOWN-2, R-OPS-2)."""

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
from small_detectors import DENSE, PAD, small_config
from swinscale.config import to_dict
from swinscale.detection import evaluate_detector
from swinscale.export.run import export
from swinscale.models import SwinConfig
from swinscale.optim import OptimConfig
from swinscale.parallel import MemoryConfig
from swinscale.recipes import Recipe, run
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.recipes.overfit import overfit, overfit_verdict
from swinscale.runlog import read_log
from swinscale.train import TrainConfig, _Run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rectangles(tmp_path_factory.mktemp("pictures") / "coco")


def recipe(
    pictures: Path, kind: str = "mask_rcnn", version: int = 2, data: dict[str, Any] | None = None, **how: Any
) -> Recipe:
    """Three steps an epoch on 12 pictures of 64 pixels, evaluated on all of them."""
    optim = how.pop("optim", OptimConfig(lr=2e-3, lr_scaling="none", warmup_epochs=1))
    settings: dict[str, Any] = {
        "epochs": 2, "batch_size": 4, "num_workers": 0, "precision": "fp32", "log_every": 1, "device": "cpu",
        "eval_every": 0, "diagnose_every": 0,
    }  # fmt: skip
    model = SwinConfig(version=version, pad=PAD[version], **DENSE)
    same = str(pictures / "annotations/instances_train2017.json")
    images = {"train": str(pictures), "eval": same, "short": (64,), "long": 96, "test_short": 64, "test_long": 96}
    images |= {"augment": "flip"} | (data or {})
    train = TrainConfig(optim=optim, **{**settings, **how})
    return Recipe("tiny", model, small_config(kind, regions=16), DetectionDataConfig(**images), train)


def losses(directory: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(directory) if entry["kind"] == "train"]


@pytest.mark.slow
def test_a_detector_learns_its_images_by_heart(pictures, tmp_path):
    """R-DOWN-2: box AP above 0.9 on synthetic COCO, through the test that ``swinscale train RECIPE --overfit 12`` is."""
    chosen = overfit(recipe(pictures, version=1), 12)
    optim = dataclasses.replace(chosen.train.optim, lr=4e-3, warmup_lr=4e-5, min_lr=8e-5, warmup_epochs=5)
    train = dataclasses.replace(chosen.train, epochs=100, optim=optim)
    chosen = dataclasses.replace(chosen, train=train, task=small_config(channels=32, fc_channels=64))
    result = run(chosen, tmp_path / "run")
    assert result.metrics["box_ap"] > 0.9 and result.metrics["mask_ap"] > 0.9
    assert {row["name"]: row["instances"] for row in result.metrics["per_class"]} == {"dog": 9, "cat": 6}
    assert all(row["box_ap"] > 0.85 for row in result.metrics["per_class"])
    assert "Learned by heart: box_ap 0.9" in overfit_verdict(chosen, result)


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("kind", ["mask_rcnn", pytest.param("htc", marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(pictures, tmp_path, monkeypatch, kind):
    """R-OPS-2: weights, averages, statistics of batch norms, measures and log are bit-identical, with all that is random in a
    detector's step: augmentation, pasted objects, stochastic depth, sampled anchors and regions."""
    data = {"augment": "crop", "short": (48, 64), "crop": (30, 60), "paste": 0.5}
    whole = recipe(pictures, kind, data=data, epochs=2, ema_decay=0.5)
    whole = dataclasses.replace(whole, model=dataclasses.replace(whole.model, drop_path_rate=0.3))
    reference = run(whole, tmp_path / "whole")
    step = _Run._optimizer_step

    def until_the_fourth(self: _Run, batches: Any) -> bool:
        if self.step == 4:  # the newest checkpoint is that of step 3
            raise Killed
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_optimizer_step", until_the_fourth)
        with pytest.raises(Killed):
            run(whole, tmp_path / "killed")
    resumed = run(whole, tmp_path / "killed", resume=True)
    assert resumed.metrics == reference.metrics and losses(tmp_path / "whole") == losses(tmp_path / "killed")
    for name in ("best", "last"):
        assert equal(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))
    file = f"step-{reference.steps:08d}"
    one, two = (_checkpoint(tmp_path / d / "checkpoints" / file) for d in ("whole", "killed"))
    assert {name.split(".")[0] for name in one} == {"task", "ema", "optimizer"} and equal(one, two)
    statistics = [name for name in one if name.startswith("task") and name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == (0 if kind == "mask_rcnn" else 24)
    assert all((one[name] != (0 if name.endswith("mean") else 1)).any() for name in statistics)  # they have moved
    averaged = [name for name in statistics if (one[name] != one[name.replace("task.", "ema.module.", 1)]).any()]
    assert averaged == statistics


def _checkpoint(place: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(place.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_loaders_in_other_processes_change_nothing(pictures, tmp_path):
    """Targets of any number and size reach the main process as they are."""
    data = {"augment": "crop", "short": (48, 64), "crop": (30, 60), "paste": 0.5}
    for name, workers in (("here", 0), ("there", 1)):
        run(recipe(pictures, "htc", data=data, epochs=1, num_workers=workers), tmp_path / name)
    assert equal(weights(tmp_path / "here"), weights(tmp_path / "there"))


def test_micro_batches(pictures, tmp_path):
    """Each divides by its own number of anchors and regions, so they do not add up to one large batch, but near to it."""
    plain = recipe(pictures, epochs=2)
    for name, micro in (("one", None), ("four", 1)):
        result = run(
            dataclasses.replace(plain, train=dataclasses.replace(plain.train, micro_batch=micro)), tmp_path / name
        )
        assert result.steps == 6
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert four != one and four == pytest.approx(one, rel=0.35)
    assert json.loads((tmp_path / "four/manifest.json").read_text())["effective_batch"] == 4


def test_lower_precision(pictures, tmp_path):
    """bf16 learns as fp32 does for a few steps; what is written is fp32."""
    for name in ("fp32", "bf16"):
        run(recipe(pictures, "cascade", precision=name, epochs=1), tmp_path / name)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.2)
    written = weights(tmp_path / "bf16")
    assert {t.dtype for n, t in written.items() if not n.endswith("num_batches_tracked")} == {torch.float32}


def test_the_backbone_has_its_own_rate(pictures, tmp_path):
    """So small here that nothing moves but the rest."""
    still = OptimConfig(lr=1e-3, lr_scaling="none", warmup_epochs=0, min_lr=0.0, backbone_lr=1e-9)
    chosen = recipe(pictures, optim=still, epochs=1)
    run(chosen, tmp_path / "run")
    run(dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, epochs=1 / 3)), tmp_path / "step")
    one, many = weights(tmp_path / "step"), weights(tmp_path / "run")
    moved = {name for name in one if (one[name] - many[name]).abs().max() > 1e-6}
    assert moved and not [name for name in moved if name.startswith("body.backbone.")]
    assert "rpn.head.conv.0.0.weight" in moved and "body.norms.0.weight" in moved


def test_frozen_stages_stay_as_they_were(pictures, tmp_path):
    chosen = recipe(pictures, "cascade", epochs=1)
    chosen = dataclasses.replace(chosen, task=dataclasses.replace(chosen.task, frozen_stages=2))
    run(chosen, tmp_path / "run")
    run(dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, epochs=1 / 3)), tmp_path / "step")
    one, many = weights(tmp_path / "step"), weights(tmp_path / "run")
    still = {name for name in one if torch.equal(one[name], many[name])}
    frozen = (
        "body.backbone.patch_embed.",
        "body.backbone.layers.0.",
        "body.backbone.layers.1.",
        "body.norms.0.",
        "body.norms.1.",
    )
    assert {name for name in one if name.startswith(frozen)} <= still
    assert "body.backbone.layers.2.blocks.0.mlp.fc1.weight" not in still


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade", "htc"])
def test_steps_without_any_object(pictures, tmp_path, kind):
    """One of twelve images has some, so two of three steps have none."""
    rare = tmp_path / "rare"
    (rare / "annotations").mkdir(parents=True)
    content = json.loads((pictures / "annotations/instances_train2017.json").read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] == 12]
    (rare / "annotations/instances_train2017.json").write_text(json.dumps(content))
    (rare / "train2017").symlink_to(pictures / "train2017")
    result = run(recipe(rare, kind, epochs=1), tmp_path / "run")
    entries = [entry for entry in read_log(tmp_path / "run") if entry["kind"] == "train"]
    name = "mask" if kind == "mask_rcnn" else "mask0"
    assert sorted(entry[name] > 0 for entry in entries) == [False, False, True]
    assert all(0 < entry["loss"] < 100 for entry in entries) and 0 <= result.metrics["box_ap"] <= 1


def test_a_share_of_the_images_is_held_out_where_there_is_no_other(pictures, tmp_path):
    chosen = recipe(pictures, epochs=1, batch_size=9)
    chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, eval=None, eval_fraction=0.25))
    run(chosen, tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["train_images"], manifest["eval_images"]) == (9, 3)
    again = evaluate_detector(tmp_path / "run/last", device="cpu")
    assert sum(row["instances"] for row in again["per_class"]) < 15


@pytest.mark.parametrize("kind", ["mask_rcnn", "htc"])
def test_a_detector_that_is_spread_over_processes_starts_alike(pictures, tmp_path, kind):
    """Built on ``meta`` with ZeRO-3 in one process: the same steps, statistics of batch norms and measures as a plain run."""
    plain = recipe(pictures, kind, epochs=1)
    spread = dataclasses.replace(plain.train, memory=MemoryConfig(shard="zero3"))
    one = run(plain, tmp_path / "plain")
    two = run(dataclasses.replace(plain, train=spread), tmp_path / "spread")
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "spread")
    assert before.keys() == after.keys()
    assert max((before[name].float() - after[name].float()).abs().max().item() for name in before) <= 1e-4
    assert two.metrics["box_ar100"] == pytest.approx(one.metrics["box_ar100"], abs=1e-3)
    export(tmp_path / "spread", tmp_path / "exported")
    assert equal(weights(tmp_path, "exported"), after)


RUNS = """
import json, sys
from pathlib import Path
from swinscale.recipes.base import recipe_from_dict, run
for name in sys.argv[2:]:
    run(recipe_from_dict(json.loads(Path(sys.argv[1], name + ".json").read_text())), Path(sys.argv[1], name))
"""


@pytest.mark.slow
def test_two_processes(pictures, tmp_path):
    """Copies of the detector with ``find_unused_parameters=False``, and ZeRO-3: the same run, and one measure of all images.

    An image without objects may be all that a process has in a step; shares of the evaluation are unequal.
    """
    plain = recipe(pictures, epochs=1, batch_size=2, data={"eval_limit": 11, "augment": "none"})
    for name, memory in (("copies", MemoryConfig()), ("shares", MemoryConfig(shard="zero3"))):
        this = dataclasses.replace(plain, train=dataclasses.replace(plain.train, memory=memory))
        (tmp_path / f"{name}.json").write_text(json.dumps(to_dict(this)))
        launch(
            2, RUNS, tmp_path, name
        )  # one after the other: a second group of the same processes may not come together
    assert len(losses(tmp_path / "copies")) == 6
    assert losses(tmp_path / "shares") == pytest.approx(losses(tmp_path / "copies"), rel=1e-4)
    for name in ("copies", "shares"):
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        state = load_file(tmp_path / name / "last" / "model.safetensors")
        assert all(t.isfinite().all() for t in state.values())
        assert manifest["processes"] == 2 and manifest["eval_images"] == 11
        measured = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        again = evaluate_detector(tmp_path / name / "last", device="cpu")
        assert again["per_class"][0]["instances"] == measured["per_class"][0]["instances"] > 0
        assert again["box_ar100"] == pytest.approx(measured["box_ar100"], abs=1e-4) and measured["box_ar100"] > 0
