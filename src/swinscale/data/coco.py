"""Images with boxes, classes and masks as a COCO file (instances JSON) lists them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from swinscale.config import suggest
from swinscale.data.coco_annotations import (
    Annotation,
    ImageRecord,
    instance_mask,
    read_annotations,
    read_categories,
    read_images,
)
from swinscale.data.sources import SPLITS, FolderStore, Source, Store, check_split
from swinscale.errors import UsageError

OTHER_KINDS = ("captions", "keypoints", "panoptic", "stuff", "image_info")  # COCO files without boxes of instances
ROBOFLOW = "_annotations.coco.json"
__all__ = ["AnnotationTable", "CocoSource", "ImageRecord", "instance_mask", "open_coco"]


class AnnotationTable:
    """The annotations of each image; ``table[i]`` is a list of dicts, made anew each time.

    They are held as bytes in tensors: millions of Python objects would be copied into every loader process, by being sent
    or by their reference counts, and tensors are shared.
    """

    def __init__(self, blob: Tensor, starts: Tensor, ends: Tensor):
        self._blob, self._starts, self._ends = blob, starts, ends

    @classmethod
    def pack(cls, lists: Iterable[list[Annotation]]) -> AnnotationTable:
        parts = [pickle.dumps(annotations, pickle.HIGHEST_PROTOCOL) for annotations in lists]
        sizes = torch.tensor([len(part) for part in parts])
        blob = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        return cls(blob, sizes.cumsum(0) - sizes, sizes.cumsum(0))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> list[Annotation]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        found: list[Annotation] = pickle.loads(self._blob[self._starts[index] : self._ends[index]].numpy().tobytes())
        return found

    def take(self, indices: list[int]) -> AnnotationTable:
        return AnnotationTable(self._blob, self._starts[indices], self._ends[indices])


class CocoSource(Source):
    """A list of image files with their annotations; it has no label per image.

    Attributes:
        names: file names as the file gives them, below the image folder.
        images: their ids and sizes.
        annotations: a list of dicts per image: what the file says, and always ``bbox`` (x, y, width, height in pixels),
            ``iscrowd``, ``area`` and ``label`` (0 … K-1).
        classes: the K category names, in the order of their ids.
        category_ids: the ids, in the same order: ``category_ids[label]``.
        splits: the parts ("train", "val", "test") that the place it was opened from offers.
    """

    classes: list[str]

    def __init__(
        self,
        store: Store,
        names: list[str],
        images: list[ImageRecord],
        annotations: AnnotationTable,
        classes: list[str],
        category_ids: list[int],
        problems: list[tuple[str, str]],
        splits: Iterable[str] = (),
        digest: str = "",
    ):
        super().__init__(store, names, None, classes, splits)
        self.images, self.annotations, self.category_ids = images, annotations, category_ids
        self._problems, self._digest = problems, digest

    @property
    def problems(self) -> list[tuple[str, str]]:
        """(what, reason) of all that was left out or changed."""
        return self._problems

    def take(self, indices: Iterable[int]) -> CocoSource:
        """The images at ``indices``, classes unchanged."""
        chosen = [int(index) for index in indices]
        return CocoSource(
            self.store,
            [self.names[i] for i in chosen],
            [self.images[i] for i in chosen],
            self.annotations.take(chosen),
            self.classes,
            self.category_ids,
            self._problems,
            self.splits,
            self._digest,
        )

    def fingerprint(self) -> str:
        """A hash of the annotation file and of names, ids and file sizes: did two runs see the same images?"""
        digest = hashlib.sha256(self._digest.encode())
        for name, image in zip(self.names, self.images, strict=True):
            digest.update(f"{name}\0{image.id}\0{self.store.size(name)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def open_coco(
    spec: str | Path, split: str = "train", annotations: str | Path | None = None, masks: bool = False
) -> CocoSource:
    """Opens a COCO detection data set.

    Args:
        spec: a folder: ``annotations/instances_train2017.json`` beside ``train2017/``, or other JSON files whose names say
            "train", "val" or "test", or ``train/_annotations.coco.json``; or a JSON file. Images are looked for beside the
            JSON file, in ``images/``, and in folders named after the file or the split.
        split: which part of a folder that has parts.
        annotations: the JSON file; ``spec`` then holds the images.
        masks: segmentations are needed: every annotation must have one, and all of them are checked.

    Boxes that reach beyond the image by more than a pixel are clipped. Annotations whose box has no area, and with
    ``masks`` polygons of fewer than 3 points, are left out. ``problems`` counts both.

    Raises:
        UsageError: if a file is missing or is no COCO detection file, for unknown or repeated ids, and for annotations
            without a box (with ``masks`` also: without a segmentation).
    """
    path = Path(spec).expanduser()
    splits: list[str] = []
    if annotations is not None:
        file = Path(annotations).expanduser()
    elif path.is_dir():
        file, splits = _find_file(path, split)
    else:
        file = path
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UsageError(f"No such folder or JSON file: {file}.{suggest(file.name, siblings)}")
    try:
        data = file.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # also bytes that are no UTF-8
        raise UsageError(f"{file} is not a JSON file: {error}.") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UsageError(
                f"{file} is no COCO detection file: it has no list '{key}'. It needs images, annotations, categories."
            )
    category_ids, classes = read_categories(content["categories"], file)
    names, images = read_images(content["images"], file)
    lists, problems = read_annotations(content["annotations"], names, images, category_ids, masks, file)
    folder = _find_images(file, path if path.is_dir() else None, split, names)
    return CocoSource(
        FolderStore(folder),
        names,
        images,
        AnnotationTable.pack(lists),
        classes,
        category_ids,
        problems,
        splits,
        hashlib.sha256(data).hexdigest(),
    )


def _split_of(name: str) -> str | None:
    """The part that a file's or folder's name speaks of: "instances_train2017" of "train"."""
    words = re.split("[^a-z]+", name.lower())
    return next((key for key, known in SPLITS.items() if not set(words).isdisjoint(known)), None)


def _find_file(root: Path, split: str) -> tuple[Path, list[str]]:
    """The annotation file of ``split`` in a folder, and the splits that there are."""
    found: dict[str | None, list[Path]] = defaultdict(list)
    for file in sorted([*root.glob("annotations/*.json"), *root.glob("*.json"), *root.glob(f"*/{ROBOFLOW}")]):
        if not any(kind in file.name for kind in OTHER_KINDS):
            found[_split_of(file.parent.name if file.name == ROBOFLOW else file.stem)].append(file)
    if not found:
        raise UsageError(
            f"{root} has no COCO annotations: looked for annotations/*.json, *.json and */{ROBOFLOW}. Name the JSON file."
        )
    splits = [key for key in SPLITS if key in found]
    files = found[check_split(split, splits, str(root))] if splits else found[None]
    files = [f for f in files if f.name.startswith("instances")] or files
    if len(files) > 1:
        listed = ", ".join(file.relative_to(root).as_posix() for file in files)
        raise UsageError(f"{root} has several annotation files for '{split}': {listed}. Name one of them.")
    return files[0], splits


def _find_images(file: Path, given: Path | None, split: str, names: list[str]) -> Path:
    """The folder below which the files ``names`` are, all of them."""
    stem = file.stem.removeprefix("instances_")
    part = _split_of(stem) or split
    bases = [base for base in (given, file.parent, file.parent.parent) if base is not None]
    if file.parent.name != "annotations" and file.parent.parent != given:
        bases.remove(file.parent.parent)
    bases += [base / "images" for base in bases]
    places = [place for base in bases for place in (base / stem, base / file.stem, base)]
    for base in filter(Path.is_dir, bases):
        places += [p for p in sorted(base.iterdir()) if _split_of(p.name) == part and p.is_dir()]
    some = names[:: max(1, len(names) // 32)]
    folder = max(places, key=lambda place: sum(os.path.isfile(place / name) for name in some))
    listings: dict[Path, set[str]] = {}
    missing = []
    for name in names:  # a listing per folder rather than a question per file
        parent = (folder / name).parent
        if parent not in listings:
            listings[parent] = set(os.listdir(parent)) if parent.is_dir() else set()
        if Path(name).name not in listings[parent]:
            missing.append(name)
    if len(missing) == len(names):
        looked = ", ".join(dict.fromkeys(str(place) for place in places if place.is_dir()))
        raise UsageError(f"None of the {len(names)} images of {file} is there: {names[0]} is not in {looked}.")
    if missing:
        raise UsageError(
            f"{len(missing)} of the {len(names)} images of {file} are not in {folder}; the first: {missing[0]}."
        )
    return folder
