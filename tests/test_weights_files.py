"""Weight files: every kind is read, nothing in them runs, every damaged one ends in one clear line (R-CKPT-5)."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from random_models import random_swin
from swinscale.errors import UsageError
from swinscale.weights import load_weights, read_state_dict, write_safetensors
from swinscale.weights.files import atomic


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return random_swin(2).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        read_state_dict(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_ema", "module"])
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_are_unwrapped(wrapper: str | None, legacy: bool, state: Any, tmp_path: Path) -> None:
    content = state if wrapper is None else {wrapper: state, "epoch": 7, "note": "x", "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    found, metadata = read_state_dict(tmp_path / "w.pth")
    assert_same(found, state)
    assert metadata == ({} if wrapper is None else {"epoch": 7, "note": "x"})


def test_model_is_preferred_to_its_average(state: Any, tmp_path: Path) -> None:
    torch.save({"model_ema": {n: t + 1 for n, t in state.items()}, "model": state}, tmp_path / "w.pth")
    assert_same(read_state_dict(tmp_path / "w.pth")[0], state)


def test_safetensors_and_shards(state: Any, tmp_path: Path) -> None:
    names = sorted(state)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for shard, part in parts.items():
        save_file({name: state[name].contiguous() for name in part}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read_state_dict(tmp_path)[0], state)
    index["weight_map"]["x"] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="not a file beside it"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_does_not_run(legacy: bool, state: Any, tmp_path: Path) -> None:
    """R-CKPT-5: refused in one line that names what it wanted, and nothing has run."""
    witness = tmp_path / "ran"
    for function, arguments, name in (
        (os.system, (f"touch {witness}",), "system"),
        (exec, (f"open({str(witness)!r}, 'w')",), "exec"),
        (os.mkdir, (str(witness),), "mkdir"),
    ):
        path = tmp_path / "bad.pth"
        torch.save(
            {"model": state, "config": Hostile(function, *arguments)}, path, _use_new_zipfile_serialization=not legacy
        )
        message = refusal(path)
        assert name in message and "save the state dict alone" in message
        assert not witness.exists()
    path.write_bytes(pickle.dumps(Hostile(os.system, f"touch {witness}"), protocol=2))
    refusal(path)
    assert not witness.exists()


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as yacs.config.CfgNode and betrays itself when it is made again."""

    class CfgNode(dict):  # type: ignore[type-arg]
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.__dict__["__immutable__"] = False
            self.__dict__["__deprecated_keys__"] = set()

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("unpickled")

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


@pytest.mark.parametrize("installed", [False, True])
def test_published_file_with_its_settings(
    installed: bool, yacs: Any, state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-CKPT-5: the published code pickles a CfgNode beside the model; it is neither needed nor built."""
    settings = yacs({"MODEL": yacs({"TYPE": "swinv2", "DEPTHS": [2, 2]}), "TAG": "default"})
    content = {
        "model": state,
        "config": settings,
        "max_accuracy": 81.8,
        "epoch": 299,
        "args": argparse.Namespace(lr=1.0),
    }
    torch.save(content, tmp_path / "ckpt.pth")
    if not installed:
        monkeypatch.delitem(sys.modules, "yacs")
        monkeypatch.delitem(sys.modules, "yacs.config")
    found, metadata = read_state_dict(tmp_path / "ckpt.pth")
    assert_same(found, state)
    assert metadata == {"max_accuracy": 81.8, "epoch": 299}
    report = load_weights(random_swin(2, seed=5), tmp_path / "ckpt.pth")
    assert report.share == 1


def test_numpy_scalars_beside_the_model(state: Any, tmp_path: Path) -> None:
    import numpy as np

    torch.save({"model": state, "best": np.float64(0.5), "seen": {1, 2}}, tmp_path / "w.pth")
    assert_same(read_state_dict(tmp_path / "w.pth")[0], state)


def test_stand_ins_run_nothing(yacs: Any, state: Any, tmp_path: Path) -> None:
    """A file that abuses the allowed name: whatever it is called or built with, it stays an inert dictionary."""
    torch.save({"model": state, "config": Hostile(yacs, {"a": 1}, [2])}, tmp_path / "w.pth")
    assert_same(read_state_dict(tmp_path / "w.pth")[0], state)
    assert "_Settings" not in str(torch.serialization.get_safe_globals())


def test_damaged_and_wrong_files(state: Any, tmp_path: Path) -> None:
    """Each ends in one line that says what the file is."""
    path = tmp_path / "w.pth"
    assert "no weight file" in refusal(path)
    for content, words in (
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n<html>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"hello world, this is text", "not a weight file"),
        (b"\x80\x02garbage", "damaged"),
        (b"PK\x03\x04 not a zip", "damaged"),
    ):
        path.write_bytes(content)
        assert words in refusal(path), content
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "best").mkdir()
    assert f"Did you mean {tmp_path / 'best'}?" in refusal(tmp_path)
    torch.save({"model": [1, 2]}, path)
    assert "holds no state dict" in refusal(path)
    torch.save([1, 2], path)
    assert "holds no state dict" in refusal(path)


@pytest.mark.parametrize("kind", ["pth", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_files(kind: str, share: float, state: Any, tmp_path: Path) -> None:
    path = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        write_safetensors(path, state)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "pth")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "damaged" in refusal(path)


def test_writing_is_atomic(state: Any, tmp_path: Path) -> None:
    """A failed write leaves the old file and no litter."""
    path = tmp_path / "w.safetensors"
    write_safetensors(path, state, {"a": "b"})
    found, metadata = read_state_dict(path)
    assert_same(found, state)
    assert metadata == {"format": "pt", "a": "b"}
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


def test_shared_and_strided_tensors_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    write_safetensors(tmp_path / "w.safetensors", {"a": whole, "b": whole[1], "c": whole.t()})
    assert_same(read_state_dict(tmp_path / "w.safetensors")[0], {"a": whole, "b": whole[1], "c": whole.t()})
