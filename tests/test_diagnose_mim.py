"""What a SimMIM run says of itself: pictures, rank, probes and warnings; and that asking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.processes import launch

from swinscale.data import ImageDataset, MaskConfig, eval_transform, mask_for_sample, open_source
from swinscale.diagnose.features import feature_rank
from swinscale.diagnose.instrument import View
from swinscale.diagnose.mim import MaskedImageModelling, ProbeData, memorising, pooled_features, signs
from swinscale.errors import UsageError
from swinscale.inference import load_pipeline, predict_files
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.optim import OptimConfig
from swinscale.parallel import World
from swinscale.recipes import DataConfig, Recipe, run
from swinscale.runlog import read_log
from swinscale.tasks import SimMIM, SimMIMConfig
from swinscale.train import TrainConfig

MODEL = SwinConfig(
    version=2, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, img_size=32, patch_size=4, num_classes=0
)
HERE = World(0, 1, torch.device("cpu"))


def a_task() -> SimMIM:
    task = SimMIM(SwinTransformer(MODEL), SimMIMConfig(mask_patch=8), {"mean": [0.5] * 3, "std": [0.25] * 3})
    task.init_weights(3)
    return task


def images_of(folder: Path) -> ImageDataset:
    mask = MaskConfig(MODEL.img_size, 8, MODEL.patch_size)
    return ImageDataset(
        open_source(folder), eval_transform((32, 32), [0.5] * 3, [0.25] * 3), mask=mask, replace_corrupt=False
    )


def view(task: SimMIM, step: int = 10, epoch: float = 1.0, here: World = HERE) -> View:
    return View(task, step, epoch, 100, 5, "fp32", here)


MEASURES = {"loss": 0.5, "mean_predictor_loss": 1.0}


def recipe(photos: Path, **options: float) -> Recipe:
    optim = OptimConfig(lr=1e-3, lr_scaling="none", warmup_epochs=0)
    train = TrainConfig(epochs=3, batch_size=8, optim=optim, num_workers=0, eval_every=1, log_every=1, device="cpu")
    return Recipe(
        "tiny", MODEL, SimMIMConfig(mask_patch=8, **options), DataConfig(str(photos), eval_fraction=0.3), train
    )


def test_a_run_is_watched_and_watching_changes_nothing(photos, tmp_path):
    """R-MIM-6, R-MIM-4: rank at each evaluation, probes every two epochs and at the end, pictures; the same weights without."""
    run(recipe(photos, probe_every=2.0), tmp_path / "watched")
    entries = {e["step"]: e for e in read_log(tmp_path / "watched") if e["kind"] == "mim"}
    assert sorted(entries) == [2, 4, 6]
    assert all(1 < e["effective_rank"] < 7 and 0 < e["largest_share"] < 1 for e in entries.values())
    assert (
        [s for s, e in entries.items() if "knn" in e]
        == [s for s, e in entries.items() if "linear_probe" in e]
        == [4, 6]
    )
    assert entries[6]["probe_images"] == {"train": 18, "evaluation": 6}
    assert entries[6]["linear_probe"] == 1.0, "the colour of the pictures tells their class"
    evaluations = [e for e in read_log(tmp_path / "watched") if e["kind"] == "eval"]
    assert all({"neighbour_loss", "psnr", "neighbour_psnr"} <= e.keys() for e in evaluations)

    pictures = sorted((tmp_path / "watched/reconstructions").iterdir())
    assert [p.name for p in pictures] == [f"step-{step:08d}.png" for step in (2, 4, 6)]
    first, last = (np.asarray(Image.open(pictures[i])) for i in (0, -1))
    assert first.shape == last.shape and first.shape[1] == 4 * 128 + 5 * 8
    column = first.shape[1] // 4
    assert (first[:, : 2 * column] == last[:, : 2 * column]).all(), "the same images with the same masks"
    assert (first[:, 2 * column :] != last[:, 2 * column :]).any(), "another reconstruction"

    run(recipe(photos), tmp_path / "alone")
    assert not any("knn" in e for e in read_log(tmp_path / "alone"))
    watched, alone = (load_file(tmp_path / name / "last/model.safetensors") for name in ("watched", "alone"))
    assert all(torch.equal(watched[name], alone[name]) for name in alone.keys() | watched.keys())


def test_probing_may_change_in_a_resumed_run(photos, tmp_path):
    run(recipe(photos), tmp_path / "run")
    run(recipe(photos, probe_every=1.0), tmp_path / "run", resume=True)


def test_features_are_those_of_images_that_can_be_read(photos):
    (photos / "red/3.png").write_bytes(b"not a picture")
    task = a_task().eval()
    with torch.no_grad():
        features, labels = pooled_features(task, images_of(photos), 100, HERE)
        assert features.shape == (23, 32) and labels.tolist() == [0] * 8 + [1] * 8 + [2] * 7
        image = images_of(photos)[0, 20]["image"]
        assert torch.allclose(features[19], task.encoder(image[None])[0], atol=1e-5)
        few, labels = pooled_features(task, images_of(photos), 6, HERE, stage=0)
    assert few.shape == (6, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_images_are_probed_when_a_period_ends(photos):
    task, data = a_task(), images_of(photos)
    instrument = MaskedImageModelling(photos, data, probe=ProbeData(data, data), probe_every=3, evaluate_every=2)
    due = [e for e in range(2, 20, 2) if instrument._probes_now(view(task, epoch=float(e)))]
    assert due == [4, 6, 10, 12, 16, 18]
    assert instrument._probes_now(view(task, step=100, epoch=13.0)), "and at the end"
    never = MaskedImageModelling(photos, data, probe=None, probe_every=3)
    assert not never._probes_now(view(task, step=100, epoch=13.0)), "there are no labels"


def test_a_full_disk_costs_the_picture_alone(photos, tmp_path):
    (tmp_path / "reconstructions").write_text("in the way")
    reading = MaskedImageModelling(tmp_path, images_of(photos)).after_evaluation(view(a_task()), MEASURES)
    assert [kind for kind, _ in reading.warnings] == ["no_picture"] and reading.scalars["effective_rank"] > 1


def test_the_mode_of_the_model_and_random_numbers_are_left_alone(photos, tmp_path):
    task = a_task().train()
    before = torch.get_rng_state()
    MaskedImageModelling(tmp_path, images_of(photos)).after_evaluation(view(task), MEASURES)
    assert task.training and all(m.training for m in task.modules()) and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in task.parameters())


def test_a_loss_near_the_mean_predictors_is_said_after_the_warm_up(photos, tmp_path):
    """R-MIM-6: within 2 %."""
    instrument = MaskedImageModelling(tmp_path, images_of(photos))

    def kinds(loss: float, step: int) -> list[str]:
        reading = instrument.after_evaluation(view(a_task(), step), {"loss": loss, "mean_predictor_loss": 1.0})
        return [kind for kind, _ in reading.warnings]

    assert kinds(0.985, 10) == ["like_the_mean"] and kinds(1.2, 10) == ["like_the_mean"]
    assert kinds(0.97, 10) == [] and kinds(0.985, 5) == []


def test_a_collapse_is_said():
    [(kind, text)] = signs(MEASURES, {"effective_rank": 1.4}, 512)
    assert kind == "collapse" and "1.40" in text and "512" in text
    assert signs(MEASURES, {"effective_rank": 2.5}, 512) == [] and signs(MEASURES, {}, 0) == []


def test_a_collapsed_encoder_has_a_rank_of_about_one(photos, tmp_path):
    """All features on one line."""
    task = a_task()
    with torch.no_grad():
        task.encoder.norm.weight.zero_()
        task.encoder.norm.weight[5] = 1.0
    reading = MaskedImageModelling(tmp_path, images_of(photos)).after_evaluation(view(task), MEASURES)
    assert reading.scalars["effective_rank"] == pytest.approx(1.0, abs=0.01)
    assert [kind for kind, _ in reading.warnings] == ["collapse"]


def test_memorising_is_an_evaluation_loss_that_rises_while_the_training_loss_falls():
    def log(*values: tuple[float, float]) -> list[dict]:
        """(training, evaluation) losses every 10 steps."""
        entries: list[dict] = []
        for index, (train, held) in enumerate(values):
            entries += [{"kind": "train", "step": 10 * index + 5, "loss": train + 0.01}]
            entries += [{"kind": "train", "step": 10 * index + 10, "loss": train - 0.01}]
            entries += [{"kind": "eval", "step": 10 * index + 10, "loss": held}]
        return entries

    both_fall = log((0.6, 0.6), (0.5, 0.5))
    [(kind, text)] = memorising([*both_fall, *log((9, 9), (9, 9), (0.4, 0.55))[-3:]], 30, 0.55)
    assert kind == "memorising" and "step 20" in text and "0.5000 to 0.5500" in text and "0.5000 to 0.4000" in text
    assert memorising(both_fall, 20, 0.5) == []
    assert memorising(log((0.6, 0.6), (0.5, 0.5), (0.4, 0.502)), 30, 0.502) == [], "less than 1 %"
    assert memorising(log((0.6, 0.6), (0.5, 0.5), (0.55, 0.56)), 30, 0.56) == [], "both rise: the rate is too high"
    assert memorising([], 10, 0.5) == []


def test_predict_says_what_a_reconstruction_is_worth(photos, tmp_path, capsys):
    """R-MIM-4, R-MIM-6: loss and PSNR beside the baselines, for each picture; any three bands."""
    a_task().save_pretrained(tmp_path / "model")
    picture, out = photos / "red/0.png", tmp_path / "out"
    [(path, values)] = predict_files(tmp_path / "model", [picture], out=out, bands=(2, 1, 0), device="cpu")
    assert path == picture
    task, data = a_task().eval(), images_of(photos / "red")
    mask = mask_for_sample(data.mask, 0, 0, 0)[None]
    pipeline = load_pipeline(tmp_path / "model")
    with torch.no_grad():
        expected = task.reconstruct(pipeline.read(picture)[None], mask).loss.item()
    assert dict(values)["loss"] == pytest.approx(expected, rel=1e-4)
    assert {"mean_predictor_loss", "neighbour_loss", "psnr", "neighbour_psnr"} <= dict(values).keys()
    assert f"0.png: loss {expected:.4g}, mean_predictor_loss" in capsys.readouterr().out
    shown = np.asarray(Image.open(out / "0_reconstructed.png"))[100, 40]
    assert shown[2] > shown[0] + 50, "a red picture is blue with bands 2, 1, 0"
    with pytest.raises(UsageError, match="channels 0 to 2"):
        predict_files(tmp_path / "model", [picture], out=out, bands=(0, 1, 3), device="cpu")


SHARDED = """
import json, sys
from pathlib import Path
import torch
from swinscale.evaluation import evaluate
from swinscale.data import EpochLoader
from swinscale.diagnose.mim import MaskedImageModelling, ProbeData
from swinscale.parallel import MemoryConfig, prepare, world
from tests.test_diagnose_mim import MEASURES, a_task, images_of, view
with world("cpu", True) as here:
    task, data = a_task(), images_of(Path(sys.argv[1]))
    prepare(task, MemoryConfig(shard="zero3"), here, "fp32")
    evaluate(task, EpochLoader(data, 4, shuffle=False, drop_last=False, rank=here.rank, world_size=here.size), "fp32", here.device)
    instrument = MaskedImageModelling(Path(sys.argv[2]), data, probe=ProbeData(data, data), probe_every=1)
    reading = instrument.after_evaluation(view(task, here=here), MEASURES)
    print("null" if reading is None else json.dumps(reading.scalars))
"""


def test_processes_that_share_a_model_see_what_one_sees(photos, tmp_path):
    """23 readable images among 2 processes, and every parameter in halves."""
    (photos / "red/3.png").write_bytes(b"not a picture")
    first, second = (json.loads(line) for line in launch(2, SHARDED, photos, tmp_path / "two"))
    data = images_of(photos)
    instrument = MaskedImageModelling(tmp_path / "one", data, probe=ProbeData(data, data), probe_every=1)
    alone = instrument.after_evaluation(view(a_task()), MEASURES)
    assert second is None and first == pytest.approx(dict(alone.scalars), rel=1e-4)
    pictures = [np.asarray(Image.open(next((tmp_path / n / "reconstructions").iterdir()))) for n in ("one", "two")]
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1
    with torch.no_grad():
        features, _ = pooled_features(a_task().eval(), data, 512, HERE)
    assert first["effective_rank"] == pytest.approx(feature_rank(features).effective, rel=1e-4)
