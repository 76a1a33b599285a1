"""Reading and writing weight files. Nothing in a file is ever executed.

Files are recognised by their first bytes, not by their names.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swinscale.errors import UsageError
from swinscale.weights.pickles import ForbiddenName, is_plain_pickle, read_pickle
from swinscale.weights.published import check_hash

State = dict[str, Tensor]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a directory of weights may hold, in the order of preference."""

WRAPPERS = (
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "net",
    "model_ema",
    "state_dict_ema",
    "teacher",
    "student",
)
"""Entries of a checkpoint under which projects keep the parameters, in the order of preference."""


class _Settings:
    """Stands for a pickled settings object: an ordered dict that takes its entries, whatever it is called with."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _Unneeded:
    """Stands for a pickled value that is not needed: takes anything and keeps nothing."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


# Published checkpoints hold more than tensors: the run's settings and its best accuracy. These names, and no others,
# are replaced while reading by stand-ins that execute nothing; the packages themselves are neither needed nor imported.
STAND_INS: dict[str, Callable[..., Any]] = {
    "yacs.config.CfgNode": _Settings,  # microsoft/Swin-Transformer, utils.py: save_checkpoint
    "argparse.Namespace": _Settings,  # timm's training script
    "builtins.set": _Unneeded,
    "__builtin__.set": _Unneeded,
    "mmengine.logging.history_buffer.HistoryBuffer": _Unneeded,  # OpenMMLab's runs
    "numpy.dtype": _Unneeded,
    "numpy.ndarray": _Unneeded,
    "numpy.core.multiarray._reconstruct": _Unneeded,
    "numpy._core.multiarray._reconstruct": _Unneeded,
    "numpy.core.multiarray.scalar": _Unneeded,
    "numpy._core.multiarray.scalar": _Unneeded,
}


def read_state_dict(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any]]:
    """Reads the tensors of a safetensors file, a PyTorch checkpoint, a pickle of arrays, or a directory that holds one.

    A checkpoint that wraps its parameters (``{"model": …, "epoch": …}``) is unwrapped. Tensors are on the CPU and, where
    the format allows it, mapped from the file. Names are left as they are.

    Returns: the tensors by name, and the texts and numbers the file holds beside them; "classes" is a list of names.

    Raises:
        UsageError: for a file that is missing, empty, damaged, something else, or that would run code when unpickled, and
            for a published one whose SHA-256 is not the one that its name carries.
    """
    path = find_weights(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UsageError(f"{path} is empty. Download or copy it again.")
    if start.lstrip()[:1] == b"<":
        raise UsageError(f"{path} is a web page, not a weight file: the download failed. Download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a Git LFS pointer, not the weights themselves. Run 'git lfs pull' beside it.")
    check_hash(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if is_plain_pickle(start):
        return _read_pickle(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _read_checkpoint(path)
    raise UsageError(
        f"{path} ({size} bytes) is not a weight file. Give a .safetensors file or a PyTorch checkpoint (.pth, .pt, .bin)."
    )


def find_weights(path: str | os.PathLike[str]) -> Path:
    """The weight file that ``path`` is, or that lies in the directory ``path``.

    Raises:
        UsageError: if there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if found is None:
            best = f" Did you mean {path / 'best'}?" if (path / "best").is_dir() else ""
            raise UsageError(f"{path} holds no weights: expected one of {', '.join(WEIGHT_FILES)} in it.{best}")
        path = found
    if not path.is_file():
        raise UsageError(f"There is no weight file {path}. Check the path.")
    return path


def _read_shards(index: Path) -> tuple[State, dict[str, Any]]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"{index} is not an index of weight files. Copy the directory again.") from error
    state: State = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UsageError(f"{index} names {shard!r}, which is not a file beside it.")
        state.update(read_state_dict(index.parent / shard)[0])
    return state, {}


def _read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged or cut short ({_one_line(error)}). Copy or download it again.") from error


def _read_checkpoint(path: Path) -> tuple[State, dict[str, Any]]:
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise UsageError(f"{path} is damaged or not a weight file. Copy or download it again.") from error
        raise _refuse_to_run(path, wanted[1]) from error
    except Exception as error:  # the reader fails in many ways on damaged bytes
        raise UsageError(f"{path} is damaged or cut short ({_one_line(error)}). Copy or download it again.") from error
    return _unwrap(path, content)


def _read_pickle(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            content = read_pickle(file)
    except ForbiddenName as error:
        raise _refuse_to_run(path, str(error)) from error
    except Exception as error:  # the reader fails in many ways on damaged bytes
        raise UsageError(f"{path} is damaged or no pickle of arrays ({_one_line(error)}).") from error
    return _unwrap(path, content)


def _refuse_to_run(path: Path, name: str) -> UsageError:
    return UsageError(
        f"{path} was not read: it asks to run '{name}', which tensors do not need. Open it only where it came "
        f"from and save the state dict alone, torch.save(model.state_dict(), ...), or as safetensors."
    )


def _unwrap(path: Path, content: Any) -> tuple[State, dict[str, Any]]:
    state = _find_tensors(content)
    if state is None:
        raise UsageError(f"{path} holds no state dict: no tensors by name, at the top or under {', '.join(WRAPPERS)}.")
    plain = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, (str, int, float))}
    return state, {**plain, **_class_names(content)}


def _class_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """``classes``, a list of names, where a checkpoint of OpenMMLab has them: each version has another place for them."""
    meta = content.get("meta")
    places: list[Any] = [meta, meta.get("dataset_meta")] if isinstance(meta, Mapping) else []
    found = (place.get(key) for place in places if isinstance(place, Mapping) for key in ("CLASSES", "classes"))
    for names in found:
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return {"classes": list(names)}
    return {}


def _find_tensors(content: Any) -> State | None:
    """The named tensors in a checkpoint, unwrapped, or None."""
    if not isinstance(content, Mapping):
        return None
    if any(isinstance(value, Tensor) for value in content.values()):
        return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    found = (_find_tensors(content.get(wrapper)) for wrapper in WRAPPERS)
    return next((state for state in found if state is not None), None)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what was written there replaces ``path`` in one step, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: str | os.PathLike[str], state: State, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors and ``metadata`` as a safetensors file, in one step: a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Tensors that share memory would be refused, and views would drag their whole storage along.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            if code := re.search(r"\(os error (\d+)\)", str(error)):  # such as a full disk
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
            raise
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Orders the texts in a safetensors header, in place. The writer's order is random, but equal contents are to have
    equal hashes.
    """
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # else texts were escaped in another way, and the header stays as it is
            file.seek(8)
            file.write(text)
