"""Reading pickles of NumPy arrays, as detectron2 and its descendants publish weights, without running what they ask for.

A pickle is a program that may call anything by name. Here it finds only the few names with which NumPy stores arrays, and
behind each name a function of this module that builds an array from bytes and a numeric type. NumPy's own functions are
never called by a file, nothing is imported for one, and every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""PyTorch's checkpoints of before 2020 are several pickles; the first one is this number."""


class _Type:
    """Stands for ``numpy.dtype``: a code of kind and width, such as ``f4``, and the order of its bytes."""

    def __init__(self, code: Any, *_: Any):
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1)", text):
            raise pickle.UnpicklingError(f"an array of type {text!r}")
        self.code, self.order = text.lstrip("<>|="), text[0] if text[0] in "<>" else "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1] if state[1] in "<>" else "<"

    def array(self, content: Any, shape: Any, column_major: bool) -> Tensor:
        """A tensor of its own memory, in C order."""
        if isinstance(content, str):  # bytes, as Python 2 wrote them
            content = content.encode("latin1")
        if not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array without bytes")
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise pickle.UnpicklingError(f"an array of shape {shape!r}")
        stored = np.dtype(self.order + self.code)
        if math.prod(shape) * stored.itemsize != len(content):
            raise pickle.UnpicklingError(f"an array of shape {shape} in {len(content)} bytes")
        flat = np.frombuffer(content, stored).reshape(shape, order="F" if column_major else "C")
        return torch.from_numpy(np.array(flat, stored.newbyteorder("="), order="C"))


class _Array:
    """Stands for ``numpy.ndarray`` while its state is still to come."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, tuple() as shape, _Type() as kind, column_major, content):
                self.tensor = kind.array(content, shape, bool(column_major))
            case _:
                raise pickle.UnpicklingError("an array of an unknown form")


def _names() -> dict[str, Callable[..., Any]]:
    """What a pickle may ask for → what it gets. Made anew for each file, so that none can change it for the next."""

    class Array(_Array):
        pass

    class Type(_Type):
        pass

    def reconstruct(*_: Any) -> Any:
        return Array()

    def scalar(kind: Any, content: Any = b"") -> Any:
        return kind.array(content, (), False) if isinstance(kind, Type) else None

    def from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> Any:
        if not isinstance(kind, Type):
            raise pickle.UnpicklingError("an array without a type")
        return kind.array(content, shape, order == "F")

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"a text in the encoding {encoding!r}")
        return text.encode("latin1")

    def no_bytes() -> bytes:
        return b""

    def ordered(*_: Any) -> dict[Any, Any]:
        return {}

    names: dict[str, Callable[..., Any]] = {
        "numpy.ndarray": Array,
        "numpy.dtype": Type,
        "_codecs.encode": encode,
        "__builtin__.bytes": no_bytes,
        "builtins.bytes": no_bytes,
        "collections.OrderedDict": ordered,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
        names[f"{core}.multiarray._reconstruct"] = reconstruct
        names[f"{core}.multiarray.scalar"] = scalar
        names[f"{core}.numeric._frombuffer"] = from_buffer
    return names


class _Reader(pickle.Unpickler):
    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")  # Python 2 wrote bytes as texts
        self.names = _names()

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.names:
            raise ForbiddenName(f"{module}.{name}")
        return self.names[f"{module}.{name}"]


class ForbiddenName(pickle.UnpicklingError):
    """A pickle asks for something that arrays do not need; the message is its name."""


def is_plain_pickle(start: bytes) -> bool:
    """Whether a file that begins so is a pickle, and not one of PyTorch's."""
    return start[:1] == b"\x80" and not start[2:].startswith(TORCH_MAGIC)


def read_pickle(file: BinaryIO) -> Any:
    """The content of a pickle of mappings, lists, texts, numbers and NumPy arrays; arrays become tensors.

    Raises:
        ForbiddenName: if it asks for anything else.
        pickle.UnpicklingError, or what damaged bytes cause: if it cannot be read.
    """
    return _tensors(_Reader(io.BytesIO(file.read())).load())


def _tensors(value: Any, depth: int = 0) -> Any:
    if isinstance(value, _Array):
        return value.tensor
    if isinstance(value, dict) and depth < 8:  # a pickle can hold itself
        return {name: _tensors(entry, depth + 1) for name, entry in value.items()}
    return value
