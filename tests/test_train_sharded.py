"""Whole runs whose parameters are spread over processes: the same results, files and commands as of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.processes import finish, launch, start
from tests.test_train import MODEL, equal, recipe, weights

from swinscale import cli
from swinscale.checkpoint import checkpoint_steps
from swinscale.config import to_dict
from swinscale.errors import UsageError
from swinscale.optim import OptimConfig
from swinscale.parallel import MemoryConfig
from swinscale.recipes import run
from swinscale.runlog import read_log
from swinscale.tasks import SimMIMConfig

TRAIN = "import sys; from swinscale.cli import main; sys.exit(main(sys.argv[1:]))"
STEADY = OptimConfig(lr=1e-3, lr_scaling="none", warmup_epochs=0, eps=1e-3)


def sharded(photos: Path, memory: MemoryConfig, **how: object):
    """A run whose result does not depend on the number of processes: no stochastic depth."""
    whole = recipe(photos, optim=how.pop("optim", STEADY), memory=memory, **{"epochs": 3, "ema_decay": 0.8, **how})
    return dataclasses.replace(whole, model=dataclasses.replace(MODEL, drop_path_rate=0.0))


def write(whole: object, folder: Path) -> Path:
    (folder / "recipe.json").write_text(json.dumps(to_dict(whole)))
    return folder / "recipe.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory", [MemoryConfig(shard="zero3", checkpointing="selective"), MemoryConfig(shard="zero2")]
)
def test_a_sharded_run_equals_a_plain_one(photos, tmp_path, capsys, memory):
    """Losses, measures, averaged weights; three processes, whose shares of a batch and of the evaluation are unequal."""
    plain = sharded(photos, MemoryConfig(), batch_size=7)
    reference = run(plain, tmp_path / "one")
    file = write(sharded(photos, memory, batch_size=7), tmp_path)
    launch(3, TRAIN, "train", file, "--out", tmp_path / "three")
    result = json.loads((tmp_path / "three/result.json").read_text())
    assert result["metrics"]["confusion"] == reference.metrics["confusion"]
    assert result["metrics"]["loss"] == pytest.approx(reference.metrics["loss"], abs=1e-5)
    losses = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"] for d in ("one", "three")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name in ("best", "last"):
        one, three = (weights(tmp_path / d, name) for d in ("one", "three"))
        assert max((one[k] - three[k]).abs().max().item() for k in one) <= 1e-5
    # What three processes wrote, one reads.
    assert cli.main(["export", str(tmp_path / "three"), "--out", str(tmp_path / "exported")]) == 0
    assert equal(weights(tmp_path / "three"), weights(tmp_path, "exported"))
    assert (tmp_path / "exported/config.json").read_text() == (tmp_path / "three/last/config.json").read_text()
    steps = checkpoint_steps(tmp_path / "three/checkpoints")
    trained = ["export", str(tmp_path / "three"), "--trained", "--step", str(steps[0]), "--out", str(tmp_path / "raw")]
    assert cli.main(trained) == 0
    assert not equal(weights(tmp_path, "raw"), weights(tmp_path, "exported"))
    assert cli.main(["export", str(photos), "--out", str(tmp_path / "none")]) == 2
    assert "is not a run" in capsys.readouterr().err


@pytest.mark.slow
def test_sharded_from_a_checkpoint(photos, tmp_path):
    """Fine-tuning after pre-training, with nothing but shares and the mapped file: the same first losses as one process."""
    pretrained = sharded(photos, MemoryConfig(shard="zero3"), task=SimMIMConfig(mask_patch=8), epochs=1)
    launch(2, TRAIN, "train", write(pretrained, tmp_path), "--out", tmp_path / "simmim")
    tuned = dataclasses.replace(sharded(photos, MemoryConfig(), epochs=1), init=str(tmp_path / "simmim/last"))
    run(tuned, tmp_path / "one")
    spread = dataclasses.replace(tuned, train=dataclasses.replace(tuned.train, memory=MemoryConfig(shard="zero1")))
    launch(2, TRAIN, "train", write(spread, tmp_path), "--out", tmp_path / "two")
    losses = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"] for d in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_a_number_that_is_not_finite_in_one_share(photos, tmp_path):
    """Every process hears of it, none waits for another, and the message names the module."""
    exploding = OptimConfig(lr=1e30, lr_scaling="none", warmup_epochs=0, clip_grad=0)
    file = write(sharded(photos, MemoryConfig(shard="zero3"), optim=exploding), tmp_path)
    results = finish(start(2, TRAIN, "train", file, "--out", tmp_path / "run"), timeout=120)
    assert [code for code, _, _ in results] == [2, 2]
    assert "is not finite; first in " in results[0][2] and "Traceback" not in results[0][2] + results[1][2]


@pytest.mark.slow
def test_eight_bits(photos, tmp_path):
    """Moments in 8 bits: a run learns as with 32, and one killed after a checkpoint repeats itself to the last bit."""
    pytest.importorskip("torchao")
    wide = dataclasses.replace(MODEL, embed_dim=64, num_heads=(2, 4), drop_path_rate=0.0)
    memory = MemoryConfig(optimizer_bits=8)
    small = dataclasses.replace(
        recipe(photos, memory=memory, epochs=4, checkpoint_every=2, keep_checkpoints=9), model=wide
    )
    file = write(small, tmp_path)
    launch(1, TRAIN, "train", file, "--out", tmp_path / "whole")
    half = tmp_path / "half"
    launch(1, TRAIN, "train", file, "--out", half)
    last = checkpoint_steps(half / "checkpoints")[-1]
    subprocess.run(["rm", "-r", half / f"checkpoints/step-{last:08d}"], check=True)
    launch(1, TRAIN, "train", file, "--out", half, "--resume")
    assert equal(weights(tmp_path / "whole"), weights(half))
    file = write(dataclasses.replace(small, train=dataclasses.replace(small.train, memory=MemoryConfig())), tmp_path)
    launch(1, TRAIN, "train", file, "--out", tmp_path / "full")
    finals = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"][-1] for d in ("whole", "full")]
    assert finals[0] == pytest.approx(finals[1], abs=0.05)
    # Spread over two processes, some of which hold nothing of the smallest tensors.
    spread = dataclasses.replace(small.train, memory=MemoryConfig(shard="zero3", optimizer_bits=8), epochs=1)
    file = write(dataclasses.replace(small, train=spread), tmp_path)
    launch(2, TRAIN, "train", file, "--out", tmp_path / "two")
    losses = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"] for d in ("whole", "two")]
    assert losses[1] == pytest.approx(losses[0][: len(losses[1])], abs=0.02)


@pytest.mark.slow
def test_compiled_block_by_block(photos, tmp_path):
    """Every block has its graph, sharding and checkpointing included, and none falls back for having too many."""
    memory = MemoryConfig(shard="zero3", checkpointing="selective")
    plain = sharded(photos, memory, epochs=1)
    compiled = dataclasses.replace(plain, train=dataclasses.replace(plain.train, compile=True))
    launch(2, TRAIN, "train", write(plain, tmp_path), "--out", tmp_path / "plain")
    launch(2, TRAIN, "train", write(compiled, tmp_path), "--out", tmp_path / "compiled", timeout=500)
    losses = [[e["loss"] for e in read_log(tmp_path / d) if e["kind"] == "train"] for d in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_settings_that_cannot_work(photos, tmp_path, capsys):
    file = write(recipe(photos), tmp_path)
    with pytest.raises(UsageError, match=r"offload=True needs train\.memory\.shard to be"):
        MemoryConfig(offload=True)
    for override, words in (
        ("train.memory.attention=triton", "cannot run here"),
        ("train.memory.attention=('auto','auto','auto')", "one per stage"),
        ("train.memory.checkpointing=full", "expected one of 'none', 'selective', 'block' or several"),
        ("train.memory.shard=zero4", "Did you mean"),
    ):
        assert cli.main(["train", str(file), override, "--out", str(tmp_path / "run")]) == 2, override
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message
    memory = MemoryConfig(shard="zero3", replicas=2)
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe(photos, memory=memory))))
    command = [sys.executable, "-m", "swinscale", "train", file, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "does not divide the 1 processes" in done.stderr
    assert torch.distributed.is_initialized() is False
