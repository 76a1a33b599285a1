"""Checkpoints are whole or not there."""

from __future__ import annotations

import os

import pytest
import torch

from swinscale import checkpoint
from swinscale.checkpoint import checkpoint_steps, load_checkpoint, save_checkpoint, write_atomically
from swinscale.errors import UsageError

CPU = torch.device("cpu")


def linear(value: float) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, value)
    return module


def test_round_trip_and_retention(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"task": linear(step)}, {"seconds": 1.5 * step, "left_out": [step]}, keep=2)
    assert checkpoint_steps(tmp_path) == [2, 3]
    target = linear(0)
    state = load_checkpoint(tmp_path, {"task": target}, CPU)
    assert (state["step"], state["seconds"], state["left_out"]) == (3, 4.5, [3])
    assert target.weight.unique().tolist() == [3]
    load_checkpoint(tmp_path, {"task": target}, CPU, step=2)
    assert target.weight.unique().tolist() == [2]


@pytest.mark.parametrize("moment", ["save_file", "torch.save", "rename"])
def test_a_failure_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path, 1, {"task": linear(1)}, {}, keep=1)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "save_file":
            patch.setattr(checkpoint, "save_file", fail)
        elif moment == "torch.save":
            patch.setattr(torch, "save", fail)
        else:
            patch.setattr("pathlib.Path.rename", fail)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, {"task": linear(2)}, {}, keep=1)
    assert checkpoint_steps(tmp_path) == [1]
    target = linear(0)
    load_checkpoint(tmp_path, {"task": target}, CPU)
    assert target.weight.unique().tolist() == [1]
    save_checkpoint(tmp_path, 2, {"task": linear(2)}, {}, keep=1)
    assert checkpoint_steps(tmp_path) == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UsageError, match=r"No space left.*Earlier checkpoints are untouched"):
        save_checkpoint(tmp_path, 2, {"task": linear(2)}, {}, keep=1)
    assert checkpoint_steps(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_checkpoints(tmp_path):
    with pytest.raises(UsageError, match="No checkpoint"):
        load_checkpoint(tmp_path, {}, CPU)
    save_checkpoint(tmp_path, 1, {"task": torch.nn.Linear(3, 3)}, {}, keep=1)
    with pytest.raises(UsageError, match="another model or recipe"):
        load_checkpoint(tmp_path, {"task": linear(0)}, CPU)


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
