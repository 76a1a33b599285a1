"""The training loop: exact resume, accumulation, non-finite losses, checkpoints, one process or two."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swinscale.checkpoint import checkpoint_steps
from swinscale.errors import NonFiniteLoss, UsageError
from swinscale.models import SwinConfig
from swinscale.optim import OptimConfig
from swinscale.parallel import split_batch
from swinscale.recipes import DataConfig, Recipe, build, run
from swinscale.runlog import read_log
from swinscale.tasks import ClassifyConfig, SimMIMConfig
from swinscale.train import TrainConfig, train

MODEL = SwinConfig(
    embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, img_size=32, patch_size=4, num_classes=0,
    drop_path_rate=0.2,
)  # fmt: skip


def recipe(photos: Path, task=None, **how) -> Recipe:
    optim = how.pop("optim", OptimConfig(lr=2e-3, lr_scaling="none", warmup_epochs=1))
    settings = {"epochs": 3, "batch_size": 6, "num_workers": 0, "precision": "fp32", "log_every": 1, "device": "auto"}
    train_config = TrainConfig(optim=optim, **{**settings, **how})
    return Recipe("test", MODEL, task or ClassifyConfig(), DataConfig(str(photos), augment="light"), train_config)


def weights(directory: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(directory / name / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_learns_and_leaves_everything(photos, tmp_path):
    result = run(recipe(photos, epochs=12, ema_decay=0.8), tmp_path / "run")
    assert result.metrics["top1"] > 0.9
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {
        "config.json",
        "manifest.json",
        "log.jsonl",
        "tensorboard",
        "checkpoints",
        "best",
        "last",
        "result.json",
    }
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["effective_batch"] == 6
    assert manifest["scaled_lr"] == pytest.approx(2e-3)
    assert manifest["versions"]["torch"] == torch.__version__
    log = read_log(tmp_path / "run")
    assert [e["step"] for e in log if e["kind"] == "train"] == list(range(1, result.steps + 1))
    recorded = json.loads((tmp_path / "run/best/config.json").read_text())
    assert recorded["preprocessing"]["classes"] == ["blue", "green", "red"]


KILL = """
import os, signal, sys
from pathlib import Path
from swinscale import train as module
from swinscale.recipes import base
from swinscale.recipes.base import recipe_from_dict
import json
recipe = recipe_from_dict(json.loads(Path(sys.argv[1]).read_text()))
step = module._Run._optimizer_step
def kill_later(self, batches):
    done = step(self, batches)
    if self.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
module._Run._optimizer_step = kill_later
base.run(recipe, Path(sys.argv[2]))
"""


@pytest.mark.parametrize("kind", ["classify", "simmim"])
def test_killed_and_resumed_equals_uninterrupted(photos, tmp_path, kind):
    """R-OPS-2: kill -9 between checkpoints, resume; parameters, EMA, metrics and log are bit-identical."""
    from swinscale.config import to_dict

    task = ClassifyConfig(mixup=0.5, cutmix=1.0) if kind == "classify" else SimMIMConfig(mask_patch=8)
    whole = recipe(photos, task, ema_decay=0.9, epochs=4, eval_every=2)
    reference = run(whole, tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(whole)))
    done = subprocess.run(
        [sys.executable, "-c", KILL, tmp_path / "recipe.json", tmp_path / "killed"],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # sums depend on the number of threads, which is 1 in tests
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not (tmp_path / "killed/result.json").exists()
    resumed = run(whole, tmp_path / "killed", resume=True)
    assert resumed.metrics == reference.metrics
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert equal(weights(tmp_path / "whole", "best"), weights(tmp_path / "killed", "best"))
    file = f"checkpoints/step-{reference.steps:08d}/shard-00001-model-00001-of-00001.safetensors"
    whole, killed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
    assert {name.split(".")[0] for name in whole} == {"task", "ema", "optimizer"}
    assert equal(whole, killed)
    losses = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"] for d in ("whole", "killed")]
    assert losses[0] == losses[1]


def wait_for_steps(log: Path) -> None:
    """Returns when the run that writes ``log`` has done a few steps, or after two minutes."""
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") > 2:
            return
        time.sleep(0.1)


def test_a_stop_signal_saves(photos, tmp_path):
    """SIGTERM ends the run after the current step with a checkpoint of that step."""
    from swinscale.config import to_dict

    endless = recipe(photos, epochs=400, checkpoint_every=0, eval_every=0)
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(endless)))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path / "recipe.json", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for_steps(tmp_path / "run/log.jsonl")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    stop = re.search(rb"Stopped at step (\d+)", error)
    assert stop, error
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [int(stop[1])]


def test_accumulation_equals_one_large_batch(photos, tmp_path):
    """R-MIM-3: micro-batches with clipping give the same parameters as one batch, ≤ 1e-6."""
    sgd_like = OptimConfig(lr=1e-3, lr_scaling="none", warmup_epochs=0, clip_grad=0.05, eps=1e-3)
    for task in (ClassifyConfig(), SimMIMConfig(mask_patch=8)):
        results = []
        for micro in (6, 3, 2):
            this = recipe(photos, task, micro_batch=micro, optim=sgd_like, epochs=2)
            this = dataclasses.replace(this, model=dataclasses.replace(MODEL, drop_path_rate=0.0))
            home = tmp_path / f"{type(task).__name__}{micro}"
            run(this, home)
            results.append(weights(home))
        for other in results[1:]:
            assert max((other[k] - results[0][k]).abs().max().item() for k in other) <= 1e-6


def test_a_directory_with_a_run_is_not_overwritten(photos, tmp_path):
    run(recipe(photos, epochs=1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"already holds a run.*Resume"):
        run(recipe(photos, epochs=1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"train\.epochs: 1 then, 2 now"):
        run(recipe(photos, epochs=2), tmp_path / "run", resume=True)


def test_a_resumed_run_may_run_elsewhere(photos, tmp_path):
    """Where a run executes and how often it reports may change; what it learns stays the same, bit for bit."""
    whole = run(recipe(photos, epochs=2), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    last = max((tmp_path / "moved/checkpoints").glob("step-*"))
    shutil.rmtree(last)
    record = json.loads((tmp_path / "moved/config.json").read_text())
    del (
        record["model"]["past_windows"],
        record["model"]["similarity"],
    )  # as of an older version, which had no such setting
    (tmp_path / "moved/config.json").write_text(json.dumps(record))
    elsewhere = recipe(photos, epochs=2, num_workers=1, log_every=1, device="cpu", keep_checkpoints=1)
    moved = run(elsewhere, tmp_path / "moved", resume=True)
    assert moved.steps == whole.steps
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "moved"))


def test_a_directory_with_a_model_is_not_overwritten(photos, tmp_path):
    run(recipe(photos, epochs=1), tmp_path / "run")
    before = (tmp_path / "run/last/config.json").read_text()
    with pytest.raises(UsageError, match="holds a model, not a run"):
        run(recipe(photos, epochs=1), tmp_path / "run/last")
    assert (tmp_path / "run/last/config.json").read_text() == before


def test_a_run_without_a_checkpoint_begins_again(photos, tmp_path):
    """What it had logged is not mixed with the new run's."""
    with pytest.raises(NonFiniteLoss):
        poisoned(photos, tmp_path / "run", "raise", at=0)
    run(recipe(photos, epochs=1), tmp_path / "run")
    assert "non_finite" not in [e["kind"] for e in read_log(tmp_path / "run")]


def test_batches_that_cannot_work_are_said(photos, tmp_path):
    with pytest.raises(UsageError, match=r"batch_size=100 is larger than the training set \(21 images\)"):
        run(recipe(photos, batch_size=100), tmp_path / "a")
    with pytest.raises(UsageError, match=r"batch_size=6 is less than the number of processes \(8\)"):
        split_batch(6, None, processes=8, images=100)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "passes"),
    [(6, None, 1, 1), (6, 4, 1, 2), (6, 1, 1, 6), (64, 8, 3, 3), (7, 1, 4, 1)],
)
def test_a_batch_is_divided_into_as_few_passes_as_fit(batch, micro, processes, passes):
    """No share is empty; one image more than asked for only where there are not enough for another pass each."""
    assert split_batch(batch, micro, processes, images=100) == passes


def poisoned(photos: Path, directory: Path, policy: str, at: int):
    built = build(recipe(photos, on_non_finite=policy, epochs=2, checkpoint_every=1 / 3))
    model = built.task.model
    model.layers[1] = _poison_stage(model.layers[1], at)
    return train(built.task, built.train_data, built.eval_data, built.recipe.train, directory)


def _poison_stage(stage, at):
    class Stage(type(stage)):
        def forward(self, x):
            if self.training and torch.is_grad_enabled():
                self.calls = getattr(self, "calls", 0) + 1
            bad = self.training and getattr(self, "calls", 0) == at + 1
            return super().forward(x) * (float("nan") if bad else 1.0)

    stage.__class__ = Stage
    return stage


def test_a_non_finite_loss_names_the_module(photos, tmp_path):
    """R-NUM-4, policy raise."""
    with pytest.raises(NonFiniteLoss) as error:
        poisoned(photos, tmp_path / "run", "raise", at=2)
    assert "Step 2" in str(error.value)
    assert "model.layers.1 (Stage)" in str(error.value)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_policies_for_non_finite_losses(photos, tmp_path, policy):
    """R-NUM-4: the run goes on without that step, and says so."""
    result = poisoned(photos, tmp_path / "run", policy, at=2)
    assert result.steps == 6
    kinds = [e["kind"] for e in read_log(tmp_path / "run")]
    assert "non_finite" in kinds
    assert ("rewound" in kinds) == (policy == "rewind")
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_unreadable_images_are_counted_and_named(photos, tmp_path):
    """A broken file never ends a run; it is named once and counted in the result."""
    (photos / "red" / "broken.png").write_bytes(b"not a picture")
    run(recipe(photos, epochs=2, batch_size=4), tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    seen = [*result["unreadable"], *(["eval"] if result["metrics"]["unreadable"] else [])]
    assert seen
    texts = [e["text"] for e in read_log(tmp_path / "run") if e["kind"] == "unreadable"]
    assert all("red/broken.png" in t for t in texts)


RUN = "import sys, json; from pathlib import Path; from swinscale.recipes.base import run, recipe_from_dict\n"
RUN += "run(recipe_from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))\n"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.slow
def test_a_stop_signal_to_one_process_stops_all(photos, tmp_path):
    """R-OPS-1. The processes agree on the step they stop after; one that stopped alone would leave the others waiting."""
    from swinscale.config import to_dict

    endless = recipe(photos, epochs=400, checkpoint_every=0, eval_every=0)
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(endless)))
    script = tmp_path / "run.py"
    tell = "import os, pathlib; pathlib.Path(f'pid{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\n"
    script.write_text(tell + RUN)
    process = subprocess.Popen(
        [*TORCHRUN, script, tmp_path / "recipe.json", tmp_path / "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for_steps(tmp_path / "run/log.jsonl")
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    stops = dict(re.findall(rb"\[rank(\d)\]: swinscale.errors.Stopped: Stopped at step (\d+)", error))
    assert stops.keys() == {b"0", b"1"}
    assert stops[b"0"] == stops[b"1"]
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [int(stops[b"0"])]


@pytest.mark.slow
def test_two_processes_equal_one(photos, tmp_path):
    """Two processes under torchrun (gloo) see the same images per step as one, and learn the same, ≤ 1e-5."""
    from swinscale.config import to_dict

    plain = recipe(photos, epochs=2, optim=OptimConfig(lr=1e-3, lr_scaling="none", warmup_epochs=0, eps=1e-3))
    plain = dataclasses.replace(plain, model=dataclasses.replace(MODEL, drop_path_rate=0.0))
    single = run(plain, tmp_path / "one")
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(plain)))
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, script, tmp_path / "recipe.json", tmp_path / "two"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[k] - two[k]).abs().max().item() for k in one) <= 1e-5
    metrics = json.loads((tmp_path / "two/result.json").read_text())["metrics"]
    assert metrics["confusion"] == single.metrics["confusion"]
    assert json.loads((tmp_path / "two/manifest.json").read_text())["processes"] == 2
