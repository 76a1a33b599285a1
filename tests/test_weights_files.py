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

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from random_models import random_swin
from swinscale.errors import UsageError
from swinscale.weights import load_weights, read_state_dict, write_safetensors
from swinscale.weights.files import atomic
from swinscale.weights.hashes import sha256


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


# --- pickles of arrays ------------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "c.order": rng.standard_normal((3, 4)).astype(np.float32),
        "fortran.order": np.asfortranarray(rng.standard_normal((3, 4, 5)).astype(np.float32)),
        "half": rng.standard_normal(5).astype(np.float16),
        "double": rng.standard_normal((2, 0, 3)),
        "scalar": np.array(7, np.int64),
        "bool": np.array([True, False]),
        "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "big.endian": rng.standard_normal((2, 3)).astype(">f4"),
    }


def detectron2(model: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "__author__": "third_party", "matching_heuristics": True}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays(protocol: int, tmp_path: Path) -> None:
    """R-CKPT-1: files of detectron2 and Mask2Former; every type, order of bytes and order of axes."""
    content = detectron2(arrays() | {"count": np.float64(3.5)})
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol))
    found, metadata = read_state_dict(tmp_path / "model.pkl")
    assert metadata == {"__author__": "third_party", "matching_heuristics": True}
    for name, array in arrays().items():
        assert found[name].dtype == torch.from_numpy(np.array(array, array.dtype.newbyteorder("="))).dtype
        assert np.array_equal(found[name].numpy(), array) and found[name].is_contiguous()


def test_pickles_of_older_numpy_and_python(tmp_path: Path) -> None:
    """NumPy 1 had other module names, and a pickle of Python 2 stores bytes as texts."""
    new = pickle.dumps(detectron2({"w": arrays()["c.order"]}), 2)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"_codecs" in old and b"numpy.core.multiarray" in old
    (tmp_path / "old.pkl").write_bytes(old)
    assert np.array_equal(read_state_dict(tmp_path / "old.pkl")[0]["w"].numpy(), arrays()["c.order"])
    raw = arrays()["c.order"].tobytes()
    python2 = (
        b"\x80\x02}U\x05modelcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x03K\x04\x86"
        b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    python2 += b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    # {"model": {"w": array}}: the array is on the stack above the key, so wrap it
    (tmp_path / "py2.pkl").write_bytes(python2.replace(b"}U\x05model", b"}U\x05model}U\x01w", 1) + b"ss.")
    assert np.array_equal(read_state_dict(tmp_path / "py2.pkl")[0]["w"].numpy(), arrays()["c.order"])


def test_a_detectron2_file_is_loaded(tmp_path: Path) -> None:
    """Mask2Former's files: published names as arrays."""
    model = random_swin(1, num_classes=0)
    names = {f"backbone.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps(detectron2(names)))
    loaded = random_swin(1, seed=1, num_classes=0)
    assert load_weights(loaded, tmp_path / "swin.pkl").share == 1
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "system"), (eval, "eval"), (__import__, "__import__"), (np.load, "load")]
)
def test_an_attack_is_refused_by_name(function: Any, name: str, protocol: int, tmp_path: Path) -> None:
    """R-CKPT-5: nothing runs, neither as a value nor inside an array, and the message names what was asked for."""
    trace = tmp_path / "trace"
    attack = Hostile(function, f"open({str(trace)!r}, 'w')" if function is eval else f"touch {trace}")
    for content in (detectron2({"w": attack}), attack, {"model": arrays(), "x": [attack]}):
        (tmp_path / "attack.pkl").write_bytes(pickle.dumps(content, protocol))
        assert f"{name}'" in refusal(tmp_path / "attack.pkl")
        assert not trace.exists()


def test_a_file_cannot_change_the_reader_for_the_next(tmp_path: Path) -> None:
    raw = b"\x80\x02cnumpy\ndtype\n(N}U\x05arrayK\x01stb."  # BUILD on the class itself: state (None, {"array": 1})
    (tmp_path / "attack.pkl").write_bytes(raw)
    refusal(tmp_path / "attack.pkl")
    raw = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(N}U\x0c__defaults__K\x01\x85stb."
    (tmp_path / "attack.pkl").write_bytes(raw)
    refusal(tmp_path / "attack.pkl")
    test_pickles_of_arrays(4, tmp_path)


@pytest.mark.parametrize("kind", [np.dtype("O"), np.dtype("U3"), np.dtype([("a", "f4")])])
def test_arrays_of_other_types_are_refused(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(detectron2({"w": np.zeros(2, kind)})))
    assert "an array of type" in refusal(tmp_path / "model.pkl") or "damaged" in refusal(tmp_path / "model.pkl")


def test_damaged_pickles(tmp_path: Path) -> None:
    whole = pickle.dumps(detectron2({"w": np.ones((3, 4), np.float32)}), 2)
    for content in (
        whole[: len(whole) // 2],
        whole.replace(b"K\x03K\x04\x86", b"K\x03K\x05\x86"),
        b"\x80\x02.",
        b"\x80\x04K\x01.",
    ):
        (tmp_path / "model.pkl").write_bytes(content)
        refusal(tmp_path / "model.pkl")


# --- published files --------------------------------------------------------------------------------------------------


def test_a_published_file_must_have_the_hash_in_its_name(state: Any, tmp_path: Path) -> None:
    """R-CKPT-7: torchvision and OpenMMLab write the beginning of the SHA-256 into the name."""
    torch.save(state, tmp_path / "w.pth")
    digest = sha256(tmp_path / "w.pth")[:8]
    for name in ("swin_v2_t-{}.pth", "swinv2-tiny-w8_3rdparty_in1k-256px_20220803-{}.pth", "swin3d_t-{}.pth"):
        right, wrong = tmp_path / name.format(digest), tmp_path / name.format("0123abcd")
        for path in (right, wrong):
            path.write_bytes((tmp_path / "w.pth").read_bytes())
        assert_same(read_state_dict(right)[0], state)
        assert "begins with 0123abcd" in refusal(wrong)
    for name in ("my_swin-0123abcd.pth", "swin_v2_t.pth", "swin_v2_t-20240101x.pth"):  # promises nothing
        (tmp_path / name).write_bytes((tmp_path / "w.pth").read_bytes())
        assert_same(read_state_dict(tmp_path / name)[0], state)
