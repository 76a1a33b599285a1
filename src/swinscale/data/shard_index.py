"""What is in a tar: where each image lies, its label, and whether the file is whole; kept in a file beside the shards.

The members are gone through by their headers alone. A tar that is cut short or damaged gives what stands before the damage,
and says what is wrong. See ``shards.py`` for what is made of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from swinscale.data.sources import EXTENSIONS, _extension, _ignored

MOST_PADDING = 2**20  # bytes after the end mark of a tar; writers pad to 10 KiB
MOST_LABEL_BYTES = 2**20
MOST_CLASSES = 2**20
CACHE_FORMAT = 1
MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("letters", "<i4"), ("picked", "?")])
"""An image member: where its bytes are, its label (-1: none), the bytes of its name, whether it is its key's picture."""


@dataclass(frozen=True)
class ShardIndex:
    """What the headers of one tar say."""

    stamp: tuple[int, int]
    """Size and time of change of the file; (-1, -1) if it could not be read, which another time it may."""
    problem: str
    """What is wrong with it, or an empty text. Its members are the ones before."""
    bad_label: str
    """The first label that is no class index, and why, or an empty text."""
    members: np.ndarray
    """One ``MEMBER`` per image."""
    names: np.ndarray
    """Their names, end to end: uint8."""


def file_stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def index_shards(paths: Sequence[Path]) -> list[ShardIndex]:
    """What is in the shards: from a file beside them that an earlier run has left, where it fits, else by reading them.

    Several processes may do this at once: each writes the same, and puts it in place by a rename.
    """
    found: dict[Path, ShardIndex] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        here = [path for path in paths if path.parent == folder]
        code = hashlib.sha256("\n".join(p.name for p in here).encode(errors="surrogateescape")).hexdigest()[:12]
        cache = folder / f".swinscale-index-{code}.npz"
        known = _load_index(cache)
        shards = {path.name: _still(known.get(path.name), path) or _read_headers(path) for path in here}
        if any(shard is not known.get(name) for name, shard in shards.items()):
            _save_index(cache, {name: shard for name, shard in shards.items() if shard.stamp != (-1, -1)})
        found |= {path: shards[path.name] for path in here}
    return [found[path] for path in paths]


def _still(shard: ShardIndex | None, path: Path) -> ShardIndex | None:
    """``shard`` if the file is the one it describes."""
    try:
        return shard if shard is not None and shard.stamp == file_stamp(path.stat()) else None
    except OSError:
        return None


def _read_headers(path: Path) -> ShardIndex:
    stamp, contents = (-1, -1), _Contents()
    try:
        with open(path, "rb") as file:
            stamp = file_stamp(os.fstat(file.fileno()))
            problem = _scan(file, stamp[0], contents)
    except OSError as error:
        stamp, contents, problem = (-1, -1), _Contents(), f"it cannot be read ({error.strerror or error})"
    return contents.shard(stamp, problem)


class _Contents:
    """The members of one tar that matter, as they are met."""

    def __init__(self) -> None:
        self.images: dict[str, tuple[int, int]] = {}  # of members with one name, the last counts, as when unpacking
        self.labels: dict[str, int] = {}
        self.bad_label = ""

    def add(self, info: tarfile.TarInfo, file: BinaryIO) -> None:
        name = info.name.removeprefix("./")
        if any(map(_ignored, name.split("/"))):
            return
        key, extension = _key(name)
        if _extension(name) in EXTENSIONS:
            if info.isreg():
                self.images[name] = info.offset_data, info.size
            elif info.islnk() and (original := info.linkname.removeprefix("./")) in self.images:
                self.images[name] = self.images[original]  # how tar stores a second name of one file
        elif info.isreg() and extension in ("cls", "json") and info.size <= MOST_LABEL_BYTES:
            file.seek(info.offset_data)
            label = _read_label(extension, file.read(info.size))
            if isinstance(label, str):
                self.bad_label = self.bad_label or f"{name}: {label}"
            elif label is not None and (extension == "cls" or key not in self.labels):
                self.labels[key] = label

    def shard(self, stamp: tuple[int, int], problem: str) -> ShardIndex:
        members = np.zeros(len(self.images), dtype=MEMBER)
        names = [name.encode(errors="surrogateescape") for name in self.images]
        best: dict[str, tuple[bool, bool, int]] = {}
        for row, name in enumerate(self.images):
            key, extension = _key(name)
            rank = "." in extension, extension in ("npy", "npz"), row  # 1.jpg before 1.depth.png and 1.npy
            best[key] = min(rank, best.get(key, rank))
            members[row] = (*self.images[name], self.labels.get(key, -1), len(names[row]), False)
        members["picked"][[row for *_, row in best.values()]] = True
        return ShardIndex(stamp, problem, self.bad_label, members, np.frombuffer(b"".join(names), dtype=np.uint8))


def _scan(file: BinaryIO, length: int, contents: _Contents) -> str:
    """Goes through the headers of a tar of ``length`` bytes; returns what is wrong with it.

    ``tarfile`` takes a damaged header for the end and ignores what follows an end mark. Here both count as damage, as they
    would lose samples without a word; and so does a missing end mark, by which a shard cut between members is known.
    """
    if not length:
        return "it is an empty file"
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (it closes nothing)
    except Exception:  # malformed headers raise nearly anything
        file.seek(0)
        start = file.read(512)
        packed = start.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"))
        if packed:
            return "it is a compressed file; uncompress it"
        return f"it is cut short at byte {length}" if len(start) < 512 else "it is no tar file"
    end, members = 0, 0
    while True:
        file.seek(end)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)  # tar.next() would keep every header in memory
        except Exception as error:  # the end mark, too
            reason = " ".join(str(error).split()) or type(error).__name__
            break
        if info.size < 0 or tar.offset <= info.offset:
            return f"it is damaged at byte {info.offset}: a header with a size below 0"
        if info.issparse():
            return f"{info.name} at byte {info.offset} is stored in pieces; write the shard without sparse files"
        if info.isreg() and info.offset_data + info.size > length:
            return f"it is cut short at byte {length}, within {info.name}"
        contents.add(info, file)
        end, members = tar.offset, members + 1
    if end + 512 > length:
        return f"it is cut short at byte {length}, before its end mark"
    file.seek(end)
    rest = file.read(MOST_PADDING + 1)
    if any(rest[:512]):
        return f"it is damaged at byte {end}: {reason}"
    if len(rest) > MOST_PADDING or any(rest):
        return f"{length - end} bytes follow its end mark at byte {end}"
    return "" if members else "it holds no file"


def _key(name: str) -> tuple[str, str]:
    """The key of a member and its extension: what stands before and after the first dot of the file name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}", extension.lower()


def _read_label(extension: str, data: bytes) -> int | str | None:
    """The class index in a .cls or .json file; None if there is none, a text about one that is none."""
    if extension == "cls":
        value: object = data.decode(errors="replace").strip()
    else:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return None
        value = found.get("label") if isinstance(found, dict) else None
        if value is None:
            return None
    text = str(value)
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    return f"holds {text[:40]!r}, not the number of a class"


def _load_index(path: Path) -> dict[str, ShardIndex]:
    shards: dict[str, ShardIndex] = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            about, members, names = (stored[key] for key in ("about", "members", "names"))
        kind, entries = json.loads(about.tobytes())
        if kind != CACHE_FORMAT or members.dtype != MEMBER or names.dtype != np.uint8:
            return {}
        for name, size, time, problem, bad_label, count in entries:
            mine, members = members[:count], members[count:]
            letters = int(mine["letters"].sum())
            text, names = names[:letters], names[letters:]
            ends = mine["offset"] + mine["size"]
            if len(mine) != count or len(text) != letters or (mine["offset"] < 0).any() or (ends > size).any():
                return {}
            shards[name] = ShardIndex((size, time), problem, bad_label, mine, text)
    except Exception:  # whatever is wrong with it: the shards themselves are there
        return {}
    return shards


def _save_index(path: Path, shards: Mapping[str, ShardIndex]) -> None:
    if not shards:
        return
    about = [[n, *s.stamp, s.problem, s.bad_label, len(s.members)] for n, s in shards.items()]
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps([CACHE_FORMAT, about]).encode(), dtype=np.uint8),
                members=np.concatenate([shard.members for shard in shards.values()]),
                names=np.concatenate([shard.names for shard in shards.values()]),
            )
        os.replace(temporary, path)
    except OSError:  # a folder that cannot be written to, a full disk: the next run reads the headers again
        with contextlib.suppress(OSError):
            temporary.unlink()
