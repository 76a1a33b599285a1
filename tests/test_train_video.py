"""Whole runs on films: they learn, go on where they stopped, and give the same in any number of processes (R-DOWN-6, R-OPS-2)."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.processes import launch
from tests.test_train import equal, weights

from swinscale.config import to_dict
from swinscale.data.clips import ClipDataset
from swinscale.errors import UsageError
from swinscale.models import SwinConfig
from swinscale.optim import OptimConfig, decay_table, parameter_groups
from swinscale.parallel import MemoryConfig
from swinscale.recipes import DataConfig, Recipe, base, build, run
from swinscale.recipes.video import VideoDataConfig
from swinscale.runlog import read_log
from swinscale.tasks import VideoConfig
from swinscale.train import TrainConfig, _Run

pytest.importorskip("av")
from film_files import write_film

MODEL = SwinConfig(
    version=2, img_size=(4, 32, 32), patch_size=(2, 4, 4), window_size=(2, 4, 4), embed_dim=16, depths=(1, 1), num_heads=(1, 2),
    num_classes=0, drop_path_rate=0.2,
)  # fmt: skip
SURE, STILL = dataclasses.replace(MODEL, drop_path_rate=0.0), {"head_dropout": 0.0}
"""Nothing is drawn in a step."""
DIRECTIONS = {"left": -1, "right": 1}


def moving(
    direction: int, random: np.random.Generator, count: int = 16, size: tuple[int, int] = (40, 48)
) -> list[np.ndarray]:
    """Pictures of a bright bar that wanders, from a random place on: only its motion tells the class."""
    start, row = int(random.integers(0, size[1])), int(random.integers(0, 20))
    pictures = []
    for number in range(count):
        picture = random.integers(20, 60, (*size, 3), dtype=np.uint8)
        columns = (start + 3 * direction * number + np.arange(8)) % size[1]
        picture[row : row + 20, columns] = 220
        pictures.append(picture)
    return pictures


def write_films(root: Path, train: int, val: tuple[int, int]) -> Path:
    """``train`` films of each of two classes, and ``val``, of 40 × 48 pixels and 12 to 16 frames."""
    random = np.random.default_rng(0)
    for part, counts in (("train", (train, train)), ("val", val)):
        for (label, direction), count in zip(DIRECTIONS.items(), counts, strict=True):
            for number in range(count):
                pictures = moving(direction, random, 12 + number % 5)
                write_film(root / part / label / f"{number}.mp4", pictures, options={"bf": "2", "crf": "12"})
    return root


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 films to train on and 5 to evaluate."""
    return write_films(tmp_path_factory.mktemp("films"), 6, (3, 2))


def recipe(
    films: Path,
    data: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    model: SwinConfig = MODEL,
    **how: Any,
) -> Recipe:
    """Three steps an epoch."""
    optim = how.pop("optim", OptimConfig(lr=2e-3, lr_scaling="none", warmup_epochs=1))
    settings: dict[str, Any] = {
        "epochs": 2, "batch_size": 4, "num_workers": 0, "precision": "fp32", "log_every": 1, "device": "cpu",
        "eval_every": 0, "diagnose_every": 0,
    }  # fmt: skip
    clips = VideoDataConfig(str(films), **{"stride": 2, "short": 36, "area": (0.5, 1.0), "flip": 0.0, **(data or {})})
    train = TrainConfig(optim=optim, **{**settings, **how})
    return Recipe("tiny", model, VideoConfig(**{"head_dropout": 0.1, **(task or {})}), clips, train)


def entries(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in read_log(directory) if entry["kind"] == kind]


def losses(directory: Path) -> list[float]:
    return [entry["loss"] for entry in entries(directory, "train")]


@pytest.mark.slow
def test_a_model_learns_which_way_things_move(tmp_path):
    """What no single frame shows: films that it has not seen are told right; the checkpoint says how to see films as it does."""
    films = write_films(tmp_path / "films", 16, (8, 8))
    model = dataclasses.replace(SURE, depths=(2, 2), embed_dim=24)
    optim = OptimConfig(lr=3e-3, lr_scaling="none", warmup_epochs=3)
    result = run(
        recipe(films, {"area": (0.8, 1.0)}, STILL, model, epochs=30, batch_size=8, optim=optim), tmp_path / "run"
    )
    assert result.metrics["top1"] > 0.9
    recorded = json.loads((tmp_path / "run/best/config.json").read_text())
    assert recorded["task"]["name"] == "video"
    assert recorded["preprocessing"] == {
        "img_size": [4, 32, 32], "sampling": {"sample": "stride", "stride": 2, "rate": 0.0},
        "mean": pytest.approx([0.485, 0.456, 0.406]), "std": pytest.approx([0.229, 0.224, 0.225]), "classes": ["left", "right"],
    }  # fmt: skip


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("version", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(films, tmp_path, monkeypatch, version):
    """R-OPS-2: weights, averages, measures and log are bit-identical, with all that is random in a step: the start of a clip, crop,
    flip, colours, erasing, mixup, stochastic depth and dropout."""
    data = {"flip": 0.5, "jitter": 0.4, "randaugment": (2, 7), "erase": 0.5}
    model, task = dataclasses.replace(MODEL, version=version), {"mixup": 0.8, "label_smoothing": 0.1}
    whole = recipe(films, data, task, model, epochs=3, ema_decay=0.5, checkpoint_every=1)
    reference = run(whole, tmp_path / "whole")
    step = _Run._optimizer_step

    def until_the_sixth(self: _Run, batches: Any) -> bool:
        if self.step == 5:
            raise Killed
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_optimizer_step", until_the_sixth)
        with pytest.raises(Killed):
            run(whole, tmp_path / "killed")
    resumed = run(
        dataclasses.replace(whole, train=dataclasses.replace(whole.train, num_workers=1)),
        tmp_path / "killed",
        resume=True,
    )
    assert reference.steps == 9 and losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert resumed.metrics == reference.metrics and len(set(losses(tmp_path / "whole"))) == 9
    for name in ("best", "last"):
        assert equal(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))


def test_the_share_of_waiting_for_films_is_in_the_log(films, tmp_path, monkeypatch):
    """The share of all time so far, with each step: near 1 where reading a film takes long."""
    read = ClipDataset.decode

    def slowly(*arguments: Any) -> torch.Tensor:
        time.sleep(0.1)
        return read(*arguments)

    chosen = recipe(films, epochs=1)
    run(chosen, tmp_path / "fast")
    monkeypatch.setattr(ClipDataset, "decode", slowly)
    run(chosen, tmp_path / "slow")
    fast, slow = ([e["waiting_for_data"] for e in entries(tmp_path / d, "train")] for d in ("fast", "slow"))
    assert len(fast) == len(slow) == 3 and all(0 < share < 1 for share in fast + slow)
    assert slow[-1] > 0.5 and slow[-1] > fast[-1]


def test_lower_precision(films, tmp_path):
    """bf16 learns as fp32 does for a few steps; what is written is fp32."""
    for name in ("fp32", "bf16"):
        run(recipe(films, precision=name), tmp_path / name)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.1)
    assert {t.dtype for t in weights(tmp_path / "bf16").values()} == {torch.float32}


def test_accumulation_and_checkpointing_change_nothing(films, tmp_path):
    """A batch in four parts, and one whose blocks are computed twice, give the same steps but for rounding."""
    memory = MemoryConfig(checkpointing="block")
    for name, how in (("plain", {}), ("parts", {"micro_batch": 1}), ("memory", {"memory": memory})):
        run(recipe(films, task=STILL, model=SURE, epochs=1, **how), tmp_path / name)
    for name in ("parts", "memory"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_a_linear_probe_moves_the_classifier_alone(films, tmp_path):
    whole = recipe(films, task={"linear_probe": True})
    before = build(whole).task.state_dict()
    run(whole, tmp_path / "run")
    after = {f"model.{name}": tensor for name, tensor in weights(tmp_path / "run").items()}
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"model.head.weight", "model.head.bias"}


def test_mixed_clips_and_smoothed_labels(films, tmp_path, monkeypatch):
    """Mixup and CutMix take clips as they take images: the losses of a run with them are finite and others than without."""
    for name, task in (("plain", {}), ("mixed", {"mixup": 0.8, "cutmix": 1.0}), ("smoothed", {"label_smoothing": 0.2})):
        run(recipe(films, task=task, epochs=1), tmp_path / name)
        assert np.isfinite(losses(tmp_path / name)).all()
    first = [losses(tmp_path / name)[0] for name in ("plain", "mixed", "smoothed")]
    assert len(set(first)) == 3
    task = build(recipe(films, task={"mixup": 0.8, "cutmix": 1.0})).task
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(task, "logits", lambda clips: seen.append(clips) or torch.zeros(2, 2))
    clips = torch.arange(2.0)[:, None, None, None, None].expand(2, 3, 4, 32, 32)
    for seed in range(8):
        torch.manual_seed(seed)
        task({"image": clips.contiguous(), "label": torch.tensor([0, 1])})
    assert all(mixed.shape == clips.shape and (mixed == mixed[:, :, :1]).all() for mixed in seen)  # alike in all frames
    assert len({round(mixed[0].mean().item(), 3) for mixed in seen}) > 4


def test_the_classifier_learns_at_the_full_rate(films):
    """Published: the backbone has a tenth of its rate; norms and biases of both are not decayed."""
    task = build(recipe(films)).task
    optim = OptimConfig(backbone_lr=0.1, weight_decay=0.02)
    rows = {name: (scale, decay) for name, _, scale, decay in decay_table(parameter_groups(task, optim))}
    assert rows["model.head.weight"] == (1.0, 0.02) and rows["model.head.bias"] == (1.0, 0.0)
    others = {name: row for name, row in rows.items() if "head." not in name}
    assert {scale for scale, _ in others.values()} == {0.1} and {decay for _, decay in others.values()} == {0.0, 0.02}
    assert len(rows) == len(list(task.named_parameters()))


def test_films_that_are_broken_or_gone(films, tmp_path):
    """Before and during a run: training takes others in their place, evaluation leaves them out, and both are counted."""
    place = tmp_path / "films"
    shutil.copytree(films, place)
    (place / "train/left/0.mp4").write_text("no film")
    (place / "val/left/1.mp4").write_bytes(b"")
    chosen = recipe(place, epochs=3)
    gone, step = place / "train/right/2.mp4", _Run._optimizer_step

    def without(self: _Run, batches: Any) -> bool:
        if self.step == 3:
            gone.unlink()
        return step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_optimizer_step", without)
        result = run(chosen, tmp_path / "run")
    assert result.steps == 9 and np.isfinite(losses(tmp_path / "run")).all() and result.metrics["unreadable"] == 1
    assert np.array(result.metrics["confusion"]).sum() == 4
    told = json.dumps(read_log(tmp_path / "run"))
    assert (
        "train/left/0.mp4" in told
        and "Invalid data found" in told
        and "train/right/2.mp4" in told
        and "the file is gone" in told
    )
    counted = json.loads((tmp_path / "run/result.json").read_text())["unreadable"]
    assert set(counted) == {"train/left/0.mp4", "train/right/2.mp4"}


def test_films_of_a_table_that_are_not_there_are_told(films, tmp_path):
    """As with Kinetics: the run goes on without them and says so in its log."""
    rows = ["label,youtube_id,time_start,time_end"]
    for label in DIRECTIONS:
        for number in range(6):
            target = tmp_path / "data" / label / f"{label}{number}_000000_000010.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(films / "train" / label / f"{number}.mp4", target)
            rows.append(f"{label},{label}{number},0,10")
    rows.append("left,lost,0,10")
    (tmp_path / "data/train.csv").write_text("\n".join(rows))
    run(recipe(tmp_path / "data", epochs=1, data={"eval_fraction": 0.34}), tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["train_images"], manifest["eval_images"]) == (8, 4)
    text = json.dumps(read_log(tmp_path / "run"))
    assert "broken_train_data" in text and "lost_000000_000010.mp4 (named in train.csv, but not there)" in text


def test_mistakes_are_said(films, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(3):
        shutil.copy(films / "train/left" / f"{number}.mp4", flat)
    other = tmp_path / "other"
    for label in ("left", "up"):
        (other / label).mkdir(parents=True)
        shutil.copy(films / "train/left/0.mp4", other / label)
    image = SwinConfig(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=0)
    for chosen, told in (
        (recipe(flat), "has no labels: classification needs one folder per class"),
        (recipe(films, {"eval": str(other)}), r"different classes \(in one alone: right, up\)"),
        (recipe(films, model=image), "The model reads images of 32×32, but tiny has films"),
        (dataclasses.replace(recipe(films), data=VideoDataConfig()), "No films are named"),
        (dataclasses.replace(recipe(films), data=DataConfig(str(films))), "but tiny has images"),
    ):
        with pytest.raises(UsageError, match=told):
            build(chosen)


def views(clips: int, crops: int) -> Any:
    """``build``, but evaluation looks at so many clips and crops of each film."""

    def several(recipe: Recipe) -> base.Built:
        built = build(recipe)
        built.eval_data.clips, built.task.crops = clips, crops  # type: ignore[assignment]
        return built

    return several


def test_a_spread_model_evaluates_with_several_views(films, tmp_path, monkeypatch):
    """ZeRO-3 in one process: the steps of a plain run, and the same measures of 3 clips × 2 crops, which are not those of one."""
    plain = recipe(films, epochs=1, task=STILL)
    spread = dataclasses.replace(plain, train=dataclasses.replace(plain.train, memory=MemoryConfig(shard="zero3")))
    alone = run(plain, tmp_path / "one view")
    monkeypatch.setattr(base, "build", views(3, 2))
    one, two = run(plain, tmp_path / "plain"), run(spread, tmp_path / "spread")
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert two.metrics["confusion"] == one.metrics["confusion"]
    assert (
        two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        and one.metrics["loss"] != alone.metrics["loss"]
    )


RUN = """
import json, sys
from pathlib import Path
from swinscale.recipes import base
build = base.build
def several(recipe):
    built = build(recipe)
    built.eval_data.clips, built.task.crops = 2, 3
    return built
base.build = several
place = Path(sys.argv[1], sys.argv[2])
base.run(base.recipe_from_dict(json.loads(place.with_suffix(".json").read_text())), place)
"""


@pytest.mark.slow
def test_two_processes(films, tmp_path, monkeypatch):
    """Copies of the model, and ZeRO-3: the run of one process that takes the same micro-batches, and one measure of all films.

    Evaluation looks at 2 clips × 3 crops of 5 films, so that the last one is that of one process alone.
    """
    plain = recipe(films, epochs=1, task=STILL, model=SURE, micro_batch=2)
    names = {"copies": MemoryConfig(), "shares": MemoryConfig(shard="zero3")}
    for name, memory in names.items():
        this = dataclasses.replace(plain, train=dataclasses.replace(plain.train, memory=memory))
        (tmp_path / f"{name}.json").write_text(json.dumps(to_dict(this)))
        launch(2, RUN, tmp_path, name)
    monkeypatch.setattr(base, "build", views(2, 3))
    alone, first = run(plain, tmp_path / "alone").metrics, weights(tmp_path / "alone")
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["processes"] == 2 and manifest["eval_images"] == 5
        state = weights(tmp_path / name)
        assert max((state[key] - value).abs().max().item() for key, value in first.items()) <= 1e-4
        measured = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        assert measured["confusion"] == alone["confusion"] and np.array(measured["confusion"]).sum() == 5
        assert measured["loss"] == pytest.approx(alone["loss"], rel=1e-4)
