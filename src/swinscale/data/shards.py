"""Tar shards: a large set of images as some hundred .tar files, read in any order without unpacking them.

The headers of each tar are gone through once, so that a sample is a place in a file (shard, offset, size) and an epoch an
order of numbers, as with every other source: nothing is streamed, and a run resumes by counting. In the WebDataset layout
the members of a sample share a key, their name up to the first dot of the file name: ``0001.jpg`` and ``0001.cls`` (a
number) or ``0001.json`` (``{"label": 3}``). Names of classes stand in ``classes.txt`` (a line each) or ``classes.json``
(a list) beside the shards. A tar without such labels is read like a zip file, with a folder per class.

A million samples take some 80 MB: nearly all that is kept of one is in numpy arrays, which forked loader processes share.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import overload

import numpy as np

from swinscale.data.shard_index import MOST_CLASSES, ShardIndex, file_stamp, index_shards
from swinscale.data.sources import (
    EXTENSIONS,
    SPLITS,
    OnBroken,
    Source,
    _natural,
    arrange_by_folder,
    check_split,
)
from swinscale.errors import UsageError

SHARDS_TOGETHER = 8  # an epoch reads from so many at a time: enough to mix, few enough for the page cache
MOST_OPEN = 64  # file handles of one process
COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst", ".tzst")


def is_archive(name: str) -> bool:
    """Whether a file of this name is a tar, compressed or not."""
    return name.lower().endswith((".tar", *COMPRESSED))


def is_pattern(spec: str) -> bool:
    """Whether ``spec`` stands for several shards."""
    return is_archive(spec) and any(sign in spec for sign in "{*?[")


def expand_pattern(pattern: Path) -> list[Path]:
    """The shards that ``train-{000000..000146}.tar``, ``{train,val}-0.tar`` or a glob stands for.

    Raises:
        UsageError: for braces that hold no range and no list, and if a shard is missing or none matches.
    """
    words = re.split(r"\{([^{}]*)\}", str(pattern))
    choices = [
        _choices(word, pattern) if inside else [word]
        for word, inside in zip(words, itertools.cycle([0, 1]), strict=False)
    ]
    if (count := math.prod(map(len, choices))) > 10**6:
        raise UsageError(f"{pattern} stands for {count} shards; at most a million are allowed.")
    named = [Path("".join(parts)) for parts in itertools.product(*choices)]
    if any(sign in str(pattern) for sign in "*?["):
        matches = {m for name in named for m in glob(str(name), recursive=True) if os.path.isfile(m)}
        if not matches:
            raise UsageError(f"No shard matches {pattern}.")
        return [Path(m) for m in sorted(matches, key=_natural)]
    missing = [path for path in named if not path.is_file()]
    if missing:
        first = ", ".join(p.name for p in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UsageError(
            f"{len(missing)} of the {len(named)} shards {pattern} are missing: {first}. "
            f"Copy them again, or name only those that there are."
        )
    return list(dict.fromkeys(named))


def _choices(inside: str, pattern: Path) -> Sequence[str]:
    """What stands between braces: every text of a list or a range."""
    if "," in inside:
        return [word.strip() for word in inside.split(",")]
    ends = re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", inside)
    if ends is None or int(ends[1]) > int(ends[2]):
        raise UsageError(
            f"'{{{inside}}}' in {pattern} is no range of shards. Write it as {{000000..000146}}, the smaller number first."
        )
    width = max(map(len, ends.groups())) if any(len(e) > 1 and e.startswith("0") for e in ends.groups()) else 0
    if int(ends[2]) - int(ends[1]) >= 10**6:
        raise UsageError(f"'{{{inside}}}' in {pattern} stands for more than a million shards.")
    return [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]


def open_shards(
    paths: Sequence[Path], spec: str, split: str, on_broken_shard: OnBroken, folder: Path | None = None
) -> ShardSource:
    """Opens the shards at ``paths``; see ``open_source``.

    Args:
        spec: what the user wrote, for messages.
        folder: where ``paths`` were found, if they are all that a folder holds; None if they were named.

    Raises:
        UsageError: for compressed tars, a split that is not there, a broken shard (unless it is to be skipped), no images,
            and labels that do not fit the names of classes.
    """
    if on_broken_shard not in ("raise", "skip"):
        raise UsageError(f"on_broken_shard={on_broken_shard!r} is not allowed: choose 'raise' or 'skip'.")
    plain = [path for path in paths if not path.name.lower().endswith(COMPRESSED)]
    compressed = [path for path in paths if path.name.lower().endswith(COMPRESSED)]
    if compressed and (folder is None or not plain):
        raise UsageError(
            f"{compressed[0]} is compressed, so that its samples cannot be read in any order. Uncompress it to a .tar."
        )
    root = folder or Path(os.path.commonpath([path.parent for path in plain]))
    parts: dict[str | None, list[Path]] = {}
    for path in plain:
        parts.setdefault(_split_of(path.relative_to(root)), []).append(path)
    available: list[str] = [key for key in SPLITS if key in parts]
    if len(available) > 1 or (folder is not None and available and len(parts) == 1):
        plain = parts[check_split(split, available, spec)]
    else:
        available = []

    shards = index_shards(plain)
    store = ShardStore(plain, [path.relative_to(root).as_posix() for path in plain], shards)
    broken = [number for number, shard in enumerate(shards) if shard.problem]
    if broken and (on_broken_shard == "raise" or not len(store)):
        first = f"{store.shards[broken[0]]}: {shards[broken[0]].problem}"
        if len(broken) == len(shards) and not len(store):
            raise UsageError(f"Nothing can be read from {spec}: all {len(broken)} shards are broken, first {first}.")
        raise UsageError(
            f"{len(broken)} of the {len(shards)} shards of {spec} are broken, first {first}. Copy them again, "
            f"or set data.on_broken_shard=skip to leave out what cannot be read."
        )
    if not len(store):
        kinds = ", ".join(sorted(EXTENSIONS))
        raise UsageError(f"No images in the {len(shards)} shards of {spec}: looked for {kinds}.")

    labels: Sequence[int] | None
    classes: list[str] | None
    left_out = np.zeros(len(shards), dtype=np.int64)
    if (store.label >= 0).any():
        rows = np.flatnonzero(store.picked)
        unlabelled = rows[store.label[rows] < 0]
        if len(unlabelled) and on_broken_shard == "raise":
            why = next((s.bad_label for s in shards if s.bad_label), store.name(unlabelled[0]))
            raise UsageError(
                f"{len(unlabelled)} of the {len(rows)} samples of {spec} have no label, first {why}. Give every sample a "
                f".cls or a .json with a label, or set data.on_broken_shard=skip to leave these out."
            )
        left_out = np.bincount(store.shard_of(unlabelled), minlength=len(shards))
        rows = rows[store.label[rows] >= 0]
        known = range(int(store.label.max()) + 1)
        classes = _class_names(_places(plain[0], root), len(known), spec)
        numbers = list(known)  # samples of a class share one number, in place of an object each
        labels = [numbers[label] for label in store.label[rows]]
    else:
        chosen, labels, classes, inner = arrange_by_folder([store.member(r) for r in range(len(store))], spec, split)
        rows, available = np.array(chosen, dtype=np.int64), available or inner
    kept = np.bincount(store.shard_of(rows), minlength=len(shards))
    for number, shard in enumerate(shards):
        if shard.problem:
            store.problems.append((store.shards[number], f"{shard.problem}; {kept[number]} samples are kept"))
        elif left_out[number]:
            why = f" ({shard.bad_label})" if shard.bad_label else ""
            text = f"{left_out[number]} samples without a label are left out{why}; {kept[number]} are kept"
            store.problems.append((store.shards[number], text))
    return ShardSource(store, rows, labels, classes, available)


def _split_of(path: Path) -> str | None:
    """The split that a folder or a word of the file name says: ``val/00.tar``, ``imagenet1k-val-00.tar``."""
    words = [*(part.lower() for part in path.parts[:-1]), *re.split(r"[^a-z]+", path.name.lower())]
    return next((split for word in words for split, names in SPLITS.items() if word in names), None)


def _places(shard: Path, root: Path) -> list[Path]:
    """Folders in which the names of classes may stand: the one of the shards, and the one above ``train``."""
    inside_split = any(shard.parent.name.lower() in names for names in SPLITS.values())
    return list(dict.fromkeys([shard.parent, *([shard.parent.parent] if inside_split else []), root]))


def _class_names(places: Iterable[Path], count: int, spec: str) -> list[str]:
    files = [place / name for place in places for name in ("classes.txt", "classes.json")]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        if count > MOST_CLASSES:
            raise UsageError(f"The labels of {spec} go up to {count - 1}; they must number the classes from 0 on.")
        return [str(number) for number in range(count)]
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = (
            json.loads(text) if file.suffix == ".json" else [n.rstrip("\r") for n in text.rstrip("\r\n").split("\n")]
        )
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{file} is no list of class names: write one name per line, or a JSON list of texts.")
    if len(names) < count:
        raise UsageError(
            f"{file} names {len(names)} classes, but the labels of {spec} go up to {count - 1}. Add the other names."
        )
    return names


class ShardStore:
    """The image members of a list of tar files.

    A row is the number of a member, in the order of the shards and of the members within each. Reading needs no lock and
    no file position, so forked processes may use the handles of their parent; they are not pickled.

    Args:
        shards: names of the files, which begin the names of their members: ``train-000000.tar/0001.jpg``.

    Attributes:
        label, picked: per row; see ``MEMBER``.
        problems: (shard, reason) of what was left out.
    """

    def __init__(self, paths: Sequence[Path], shards: Sequence[str], indices: Sequence[ShardIndex]):
        self.paths, self.shards = list(paths), list(shards)
        self.problems: list[tuple[str, str]] = []
        members = np.concatenate([index.members for index in indices])
        self.label, self.picked = members["label"].copy(), members["picked"].copy()
        self._offset, self._size = members["offset"].copy(), members["size"].copy()
        self._letters = np.concatenate([index.names for index in indices])
        self._name_end = np.cumsum(members["letters"], dtype=np.int64)
        self._first = np.cumsum([0, *(len(index.members) for index in indices)])
        self._stamps = [index.stamp for index in indices]
        self._handles: dict[int, _Handle] = {}
        self._rows: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._offset)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handles": {}, "_rows": None}

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the shards that hold ``rows``: int64, of the same shape."""
        return np.searchsorted(self._first, rows, side="right") - 1

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1

    def member(self, row: int) -> str:
        """The name within its tar."""
        start = self._name_end[row - 1] if row else 0
        return self._letters[start : self._name_end[row]].tobytes().decode(errors="surrogateescape")

    def name(self, row: int) -> str:
        """The name of the shard and the name within it."""
        return f"{self.shards[self._shard(row)]}/{self.member(row)}"

    def names(self) -> list[str]:
        """The names of all rows."""
        return [self.name(row) for row in range(len(self))]

    def read(self, name: str) -> bytes:
        """The bytes of one member. (``read_row`` needs no dictionary of names.)"""
        return self.read_row(self._row(name))

    def size(self, name: str) -> int:
        """Its size in bytes."""
        return int(self._size[self._row(name)])

    def _row(self, name: str) -> int:
        if self._rows is None:
            self._rows = {known: row for row, known in enumerate(self.names())}
        return self._rows[name]

    def read_row(self, row: int) -> bytes:
        """The bytes of one member.

        Raises:
            OSError, EOFError: if its shard is gone, has changed since it was opened, or is cut short.
        """
        number = self._shard(row)
        handle = self._handles.pop(number, None) or _Handle(self.paths[number])
        if handle.stamp() != self._stamps[number]:
            raise OSError(f"the shard {self.paths[number].name} has changed since it was opened")
        self._handles[number] = handle  # the newest last
        if len(self._handles) > MOST_OPEN:
            del self._handles[next(iter(self._handles))]
        return handle.read(int(self._offset[row]), int(self._size[row]))

    def digest(self, rows: np.ndarray) -> bytes:
        """Identifies the names and sizes of ``rows``."""
        hashed = hashlib.sha256("\n".join(self.shards).encode(errors="surrogateescape"))
        for array in (self._letters, self._name_end, self._first, self._size[rows], rows):
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.digest()


class _Handle:
    """An open file, closed when nobody refers to it any more."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def stamp(self) -> tuple[int, int]:
        """Size and time of change, by which a file is recognised."""
        return file_stamp(os.fstat(self._file))

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes, or EOFError."""
        data = b""
        while len(data) < size:  # a read may return less, at 2 GiB for one
            if hasattr(os, "pread"):
                more = os.pread(self._file, size - len(data), offset + len(data))
            else:  # Windows, where processes share no handle
                os.lseek(self._file, offset + len(data), os.SEEK_SET)
                more = os.read(self._file, size - len(data))
            if not more:
                raise EOFError(f"the shard ends {size - len(data)} bytes before the end of this member")
            data += more
        return data


class ShardSource(Source):
    """Images in tar shards, without Python objects per image but for a pointer to its label.

    Names are made when they are asked for: as a list of str they would cost 100 bytes each, in every loader process
    (which gets a copy of every page on which it counts a reference).
    """

    def __init__(
        self,
        store: ShardStore,
        rows: np.ndarray,
        labels: Sequence[int] | None,
        classes: Sequence[str] | None,
        splits: Iterable[str] = (),
    ):
        super().__init__(store, (), labels, classes, splits)
        self._store, self._rows = store, rows
        self.names = _Names(store, rows)

    def read(self, index: int) -> bytes:
        return self._store.read_row(self._rows[index])

    def take(self, indices: Iterable[int]) -> ShardSource:
        chosen = np.fromiter(indices, dtype=np.int64)
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return ShardSource(self._store, self._rows[chosen], labels, self.classes, self.splits)

    def epoch_order(self, random: np.random.Generator) -> np.ndarray:
        """As ``Source.epoch_order``, a few shards after the other: shuffled shards, and shuffled images within each group
        of at most ``SHARDS_TOGETHER``."""
        present, shard = np.unique(self._store.shard_of(self._rows), return_inverse=True)
        groups = -(-len(present) // SHARDS_TOGETHER)
        group = random.permutation(len(present)) * groups // max(1, len(present))  # sizes differ by one shard at most
        order = random.permutation(len(self))
        return order[np.argsort(group.astype(np.min_scalar_type(groups))[shard[order]], kind="stable")]

    def substitute(self, index: int, step: int) -> int:
        """As ``Source.substitute``, far away: where one image is lost, often its whole shard is."""
        count = len(self)
        stride = next(s for s in itertools.count(max(1, int(0.618 * count))) if math.gcd(s, count) == 1)
        return (index + step * stride) % count

    def fingerprint(self) -> str:
        """A hash of shards, names, labels and sizes, to tell whether two runs saw the same images."""
        digest = hashlib.sha256(self._store.digest(self._rows))
        digest.update(b"" if self.labels is None else np.array(self.labels, dtype="<i4").tobytes())
        return digest.hexdigest()[:16]


class _Names(Sequence[str]):
    """The names of some rows of a store."""

    def __init__(self, store: ShardStore, rows: np.ndarray):
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> _Names: ...
    def __getitem__(self, index: int | slice) -> str | _Names:
        if isinstance(index, slice):
            return _Names(self._store, self._rows[index])
        return self._store.name(self._rows[index])

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (list, _Names)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]
