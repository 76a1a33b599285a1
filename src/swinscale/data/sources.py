"""Where images come from: folders, list files, zip files, tar shards (``shards.py``), and the set inside the package.

A source knows names, labels and bytes; it decodes nothing. It holds no open file when it is sent to a loader process.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

import numpy as np

from swinscale.config import suggest
from swinscale.errors import UsageError

EXTENSIONS = frozenset(["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "gif", "ppm", "pgm", "npy", "npz"])
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
BUNDLED = {"fashion-mnist": "fashion_mnist.zip"}


OnBroken = Literal["raise", "skip"]


class Store(Protocol):
    """Named files that can be read."""

    def names(self) -> list[str]:
        """Names with forward slashes, in natural order."""

    def read(self, name: str) -> bytes:
        """The bytes of one file."""

    def size(self, name: str) -> int:
        """Its size in bytes."""


class FolderStore:
    """Files below a folder."""

    def __init__(self, root: Path):
        self.root = root

    def names(self) -> list[str]:
        found = []
        for folder, subfolders, names in os.walk(self.root, followlinks=True):
            here = Path(folder).resolve()
            subfolders[:] = [
                s for s in subfolders if not _ignored(s) and (Path(folder) / s).resolve() not in (here, *here.parents)
            ]  # a link to a folder above it would never end
            relative = Path(folder).relative_to(self.root)
            found += [(relative / name).as_posix() for name in names if not _ignored(name)]
        return sorted(found, key=_natural)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size


class ZipStore:
    """Files inside a zip archive; every process opens it for itself."""

    def __init__(self, path: Path):
        self.path, self._owner = path, 0
        self._archive: zipfile.ZipFile | None = None

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._owner != os.getpid():
            try:
                self._archive, self._owner = zipfile.ZipFile(self.path), os.getpid()
            except zipfile.BadZipFile:
                raise UsageError(
                    f"{self.path} is not a zip file, or it is cut short. Copy it again, or unpack it."
                ) from None
            except OSError as error:
                raise UsageError(f"{self.path} cannot be opened: {error.strerror}.") from None
        assert self._archive is not None
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_archive": None, "_owner": 0}

    def names(self) -> list[str]:
        entries = {i.filename for i in self._open().infolist() if not i.is_dir()}  # an archive may hold a name twice
        return sorted((n for n in entries if not any(map(_ignored, n.split("/")))), key=_natural)

    def read(self, name: str) -> bytes:
        return self._open().read(name)

    def size(self, name: str) -> int:
        return self._open().getinfo(name).file_size


class Source:
    """A list of image files, with labels or without.

    Attributes:
        labels: one class index per image, or None.
        classes: class names in the order of their indices, or None.
        splits: the parts ("train", "val", "test") that the place it was opened from offers.
    """

    names: Sequence[str]

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        labels: Sequence[int] | None,
        classes: Sequence[str] | None,
        splits: Iterable[str] = (),
    ):
        self.store, self.names = store, list(names)
        self.labels = None if labels is None else [int(label) for label in labels]
        self.classes = None if classes is None else list(classes)
        self.splits = tuple(splits)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def problems(self) -> list[tuple[str, str]]:
        """(file, reason) of what had to be left out when it was opened; empty for everything but tar shards."""
        return list(getattr(self.store, "problems", ()))

    def read(self, index: int) -> bytes:
        """The bytes of image ``index``."""
        return self.store.read(self.names[index])

    def epoch_order(self, random: np.random.Generator) -> np.ndarray:
        """Every index once, int64 (len(self),), in an order that depends on ``random`` alone."""
        return random.permutation(len(self))

    def substitute(self, index: int, step: int) -> int:
        """The image to try in place of ``index`` after ``step`` others could not be read: each one for some step."""
        return (index + step) % len(self)

    def take(self, indices: Iterable[int]) -> Source:
        """The images at ``indices``, classes unchanged."""
        chosen = list(indices)
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return Source(self.store, [self.names[i] for i in chosen], labels, self.classes, self.splits)

    def fingerprint(self) -> str:
        """A hash of names, labels and file sizes, to tell whether two runs saw the same images."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            label = self.labels[index] if self.labels is not None else -1
            digest.update(f"{name}\0{label}\0{self.store.size(name)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def open_source(
    spec: str | Path,
    split: str = "train",
    on_broken_shard: OnBroken = "raise",
    kinds: Collection[str] = EXTENSIONS,
) -> Source:
    """Opens ``spec``.

    * a folder or a zip file: with a folder per class, or without (then there are no labels). If it has ``train``, ``val``
      or ``test`` inside, ``split`` chooses one;
    * a list file (.txt, .csv, .tsv): a path per line, relative to the file, and a label after a comma or tab;
    * tar shards, in the WebDataset layout or with a folder per class: a folder of .tar files (whose names or folders may
      say "train", "val" or "test"), one .tar, ``train-{000000..000146}.tar``, or a glob such as ``shards/*.tar``;
    * ``bundled:fashion-mnist``: 28×28 grey pictures that come with the package.

    Args:
        on_broken_shard: what to do about a tar shard that is cut short or damaged, and about samples in it without a
            label: "raise", or "skip" what cannot be read and list it in ``Source.problems``.
        kinds: extensions of the files to look for in folders and zip files; tar shards hold images alone.

    Raises:
        UsageError: if it is missing, holds no image, has splits but not this one, or if a shard is broken.
    """
    from swinscale.data import shards  # it builds on this module

    text = str(spec)
    if text.startswith("bundled:"):
        name = text.removeprefix("bundled:")
        if name not in BUNDLED:
            raise UsageError(f"Unknown bundled data '{name}'.{suggest(name, BUNDLED)} Available: {', '.join(BUNDLED)}.")
        store = ZipStore(Path(str(files("swinscale.data") / "bundled" / BUNDLED[name])))
        return _from_store(store, store.names(), text, split, EXTENSIONS)
    path = Path(text).expanduser()
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is no path at all
        if shards.is_pattern(text):
            return shards.open_shards(shards.expand_pattern(path), text, split, on_broken_shard)
        if not os.path.isdir(path.parent):
            raise UsageError(f"No such folder or file: {path} ({path.parent} does not exist either).")
        siblings = [p.name for p in path.parent.iterdir()]
        raise UsageError(f"No such folder or file: {path} in {path.parent.resolve()}.{suggest(path.name, siblings)}")
    if path.is_dir():
        folder = FolderStore(path)
        names = folder.names()
        archives = [path / n for n in names if shards.is_archive(n)]
        if any(_extension(n) in kinds for n in names) or not archives:
            return _from_store(folder, names, text, split, kinds)
        return shards.open_shards(archives, text, split, on_broken_shard, folder=path)
    if shards.is_archive(path.name):
        return shards.open_shards([path], text, split, on_broken_shard)
    if path.suffix.lower() in (".txt", ".csv", ".tsv"):
        return _from_list(path)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        store = ZipStore(path)
        return _from_store(store, store.names(), text, split, kinds)
    raise UsageError(
        f"{path} is not a source of images: give a folder, a .zip, .tar shards, or a list file (.txt, .csv, .tsv)."
    )


def _from_store(store: Store, names: list[str], spec: str, split: str, kinds: Collection[str]) -> Source:
    chosen, labels, classes, available = arrange_by_folder(names, spec, split, kinds)
    return Source(store, [names[i] for i in chosen], labels, classes, available)


def arrange_by_folder(
    everything: list[str], spec: str, split: str, kinds: Collection[str] = EXTENSIONS
) -> tuple[list[int], list[int] | None, list[str] | None, list[str]]:
    """What folder names say about the files ``everything`` of ``spec``.

    Returns:
        The positions of the images of ``split``, their labels and the classes (None without a folder per class), and
        the splits that there are.
    """
    chosen = [i for i, n in enumerate(everything) if _extension(n) in kinds]
    if not chosen:
        what, wanted = "images" if kinds is EXTENSIONS else "films", ", ".join(sorted(kinds))
        raise UsageError(f"No {what} in {spec}: looked for {wanted}; found {len(everything)} other files.")
    names = _skip_single_folder([everything[i] for i in chosen])
    tops = {n.split("/")[0]: n.split("/")[0].lower() for n in names if "/" in n}
    available = {
        key: top for key, words in SPLITS.items() for top, lower in tops.items() if lower in words
    }  # fmt: skip
    if len(available) > 1 or (available and len(tops) == len(available)):
        prefix = available[check_split(split, available, spec)] + "/"
        inside = [(i, n.removeprefix(prefix)) for i, n in zip(chosen, names, strict=True) if n.startswith(prefix)]
        chosen, names = [i for i, _ in inside], [n for _, n in inside]
    else:
        available = {}
    folders = [n.split("/")[0] if "/" in n else None for n in names]
    classes = sorted({f for f in folders if f is not None}, key=_natural)  # one folder, or loose images: no classes
    if None in folders or len(classes) < 2:
        return chosen, None, None, list(available)
    index = {name: i for i, name in enumerate(classes)}
    return chosen, [index[f] for f in folders if f is not None], classes, list(available)


def check_split(split: str, available: Iterable[str], spec: str) -> str:
    """``split``, or a UsageError if it is not ``available``."""
    if split not in available:
        raise UsageError(f"{spec} has no '{split}' part, only {', '.join(sorted(available))}. Choose one of these.")
    return split


def _skip_single_folder(names: list[str]) -> list[str]:
    """Archives often hold one folder with everything inside; look into it when it holds more than one folder."""
    tops = {n.split("/")[0] for n in names}
    if len(tops) == 1 and all(n.count("/") >= 2 for n in names):
        prefix = tops.pop() + "/"
        if len({n.split("/")[1] for n in names}) > 1:
            return [n.removeprefix(prefix) for n in names]
    return names


def _from_list(path: Path) -> Source:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    names, texts = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file in UTF-8; a list file has one path per line.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = (cell.strip() for cell in next(csv.reader([line], delimiter=delimiter)))
        if not os.path.isfile(path.parent / name):
            if number == 1 and not _extension(name):
                continue  # a header such as path,label
            raise UsageError(f"{path}, line {number}: there is no file {name} (paths are relative to the list file).")
        names.append(name)
        texts.append(rest[0] if rest else "")
    if not names:
        raise UsageError(
            f"{path} names no image: write one path per line, and a label after a comma if there are labels."
        )
    if not any(texts):
        return Source(FolderStore(path.parent), names, None, None)
    if not all(texts):
        raise UsageError(
            f"{path}: {texts.count('')} of {len(texts)} lines have no label. Give every line one, or none."
        )
    classes = sorted(set(texts), key=_natural)
    index = {name: i for i, name in enumerate(classes)}
    return Source(FolderStore(path.parent), names, [index[t] for t in texts], classes)


def subset_per_class(source: Source, count: int, seed: int) -> Source:
    """``count`` random images of each class, the same ones for the same seed.

    Raises:
        UsageError: if a class has fewer.
    """
    chosen: list[int] = []
    for label, members in _by_class(source, "labels_per_class").items():
        if len(members) < count:
            name = (source.classes or [])[label]
            raise UsageError(f"labels_per_class={count}, but class '{name}' has {len(members)} images. Ask for fewer.")
        order = np.random.default_rng([seed, label]).permutation(len(members))
        chosen += sorted(members[i] for i in order[:count])
    return source.take(chosen)


def split_source(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Two parts, the second with a share ``fraction`` of every class (of all images when there are no labels).

    Raises:
        UsageError: for a fraction outside (0, 1), or if a part would be empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"A share of {fraction} of the images cannot be held out: it must lie between 0 and 1.")
    groups = _by_class(source, "a split") if source.labels is not None else {0: list(range(len(source)))}
    kept: list[int] = []
    held: list[int] = []
    for label, members in groups.items():
        order = np.random.default_rng([seed, label]).permutation(len(members))
        count = round(fraction * len(members))
        count = min(max(count, 1), len(members) - 1) if len(members) > 1 else count  # both parts see every class
        held += [members[i] for i in order[:count]]
        kept += [members[i] for i in order[count:]]
    if not kept or not held:
        raise UsageError(f"{len(source)} images cannot be split with fraction {fraction}: one part would be empty.")
    return source.take(sorted(kept)), source.take(sorted(held))


def _by_class(source: Source, purpose: str) -> dict[int, list[int]]:
    if source.labels is None:
        raise UsageError(f"The images have no labels, which {purpose} needs: use one folder per class.")
    members = defaultdict(list)
    for index, label in enumerate(source.labels):
        members[label].append(index)
    return dict(sorted(members.items()))


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts ``img2`` before ``img10``; names that differ in leading zeros alone by the name itself."""
    parts = re.split(r"([0-9]+)", name)
    numbers = [part.lstrip("0") for part in parts[1::2]]
    key = [(1, 0, part) for part in parts]
    key[1::2] = [(0, len(number), number) for number in numbers]
    return key, name
