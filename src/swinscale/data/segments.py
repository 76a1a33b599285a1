"""Images with label maps: opening them, samples by (epoch, index), and batches of them."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.config import suggest
from swinscale.data.class_lists import MOST, ClassList, class_list, numbered_classes, parse_class_list
from swinscale.data.dataset import EpochDataset, Sample
from swinscale.data.images import CorruptImage, decode_as_annotated, decode_image
from swinscale.data.label_maps import IGNORED, LabelRule, decode_map, read_map
from swinscale.data.segment_checks import BLACK_AND_WHITE, check_labels, check_sizes
from swinscale.data.segment_layouts import find_pairs, part_lists
from swinscale.data.sources import FolderStore, Source, Store, ZipStore
from swinscale.errors import UsageError

log = logging.getLogger(__name__)
LIST_FILE = "classes.txt"
__all__ = ["IGNORED", "LabelRule", "SegmentDataset", "SegmentSource", "decode_map", "open_segments"]


class SegmentSource(Source):
    """A list of image files with a label map each; it has no label per image.

    Attributes:
        names: image files.
        maps: their label maps, in ``map_store``; empty if it was opened with images only.
        rule: how the values in these become classes.
        classes: the names of the K classes.
        splits: the parts ("train", "val", "test") that the place it was opened from offers.
    """

    classes: list[str]

    def __init__(
        self,
        store: Store,
        names: list[str],
        map_store: Store,
        maps: list[str],
        rule: LabelRule,
        splits: Iterable[str] = (),
    ):
        super().__init__(store, names, None, rule.classes.names, splits)
        self.map_store, self.maps, self.rule = map_store, maps, rule

    def take(self, indices: Iterable[int]) -> SegmentSource:
        """The images at ``indices``, classes unchanged."""
        chosen = [int(index) for index in indices]
        names, maps = [self.names[i] for i in chosen], [self.maps[i] for i in chosen if self.maps]
        return SegmentSource(self.store, names, self.map_store, maps, self.rule, self.splits)

    def fingerprint(self) -> str:
        """A hash of the rule and of names and file sizes of images and maps: did two runs see the same?"""
        digest = hashlib.sha256(repr(self.rule).encode())
        for store, names in ((self.store, self.names), (self.map_store, self.maps)):
            for name in names:
                digest.update(f"{name}\0{store.size(name)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def read_map(self, index: int) -> np.ndarray:
        """The label map of image ``index`` as its file has it, see ``decode_map``.

        Raises:
            CorruptImage: if it cannot be read.
        """
        return read_map(self.map_store, self.maps[index])


def open_segments(
    spec: str | Path,
    split: str = "train",
    *,
    maps: str | Path = "",
    classes: str | ClassList = "",
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    image_suffix: str = "",
    map_suffix: str = "",
    only_images: bool = False,
) -> SegmentSource:
    """Opens images and their label maps.

    An image and its map have the same path but for the extension and the folders that say what they are. These are
    found by themselves: ``images/training`` + ``annotations/training`` (ADE20K), ``train`` + ``trainannot`` (CamVid),
    ``leftImg8bit/train`` + ``gtFine/train`` (Cityscapes), ``images/train`` + ``labels/train`` (or masks, annotations,
    maps, gt), ``train/images`` + ``train/labels``, ``images`` + ``labels``, and Pascal VOC's ``JPEGImages`` +
    ``SegmentationClass``, of which ``ImageSets/Segmentation/train.txt`` and ``val.txt`` say what belongs to which part.

    The sizes of all pairs are compared, and the labels of up to 200 maps, evenly spread, are looked at. A file that
    cannot be read at all is passed over here; the data set reports it.

    Args:
        spec: a folder or a zip file with the images.
        split: which part, where there are parts.
        maps: a folder or a zip file with the maps, if these are not in ``spec``; with the same parts inside, or with
            none.
        classes: a list, or see ``class_list``. "": the file ``classes.txt`` in ``spec`` or beside the maps; else all maps are
            read once, and the largest label decides.
        ignore_index: the value of pixels that do not count.
        reduce_zero_label: pixels of value 0 do not count either, and class k has the value k + 1. ``ignore_index`` is
            looked at first.
        image_suffix, map_suffix: ends of names, before the extension, of images and of maps (Cityscapes:
            "_leftImg8bit" and "_gtFine_labelTrainIds"). Files whose names end differently are passed over.
        only_images: there need be no maps.

    Raises:
        UsageError: if images, maps or the part are missing, for images without map and maps without image, for sizes
            that do not fit, and for labels that no class has.
    """
    store = map_store = _open_store(spec)
    names = map_names = store.names()
    if maps:
        map_store = _open_store(maps)
        map_names = map_store.names()
        names = _outside(names, spec, maps)
    suffixes = (image_suffix, map_suffix)
    parts = part_lists(names, store.read)
    pairs = find_pairs(names, map_names if maps else None, str(spec), split, suffixes, only_images, parts)
    places = {str(spec): (store, names), str(maps or spec): (map_store, map_names)}
    given = class_list(classes) if classes and isinstance(classes, str) else classes
    listed = given if isinstance(given, ClassList) else _list_file(places)
    rule = LabelRule(listed or ClassList(()), ignore_index, reduce_zero_label)
    if listed is None and not only_images:
        rule = replace(rule, classes=_found_classes(map_store, pairs.all_maps, rule, str(maps or spec)))
    source = SegmentSource(store, pairs.images, map_store, pairs.maps, rule, pairs.splits)
    if not only_images:
        check_sizes(source)
        check_labels(source, str(maps or spec))
    return source


def _open_store(spec: str | Path) -> Store:
    path = Path(spec).expanduser()
    if path.is_dir():
        return FolderStore(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ZipStore(path)
    if path.exists():
        raise UsageError(f"{path} is neither a folder nor a zip file: give one with images and label maps.")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UsageError(f"No such folder or zip file: {path}.{suggest(path.name, siblings)}")


def _outside(names: list[str], spec: str | Path, maps: str | Path) -> list[str]:
    """The files of ``spec`` that are not in the folder ``maps``."""
    inner, outer = (Path(place).expanduser().resolve() for place in (maps, spec))
    if not inner.is_relative_to(outer):
        return names
    return [name for name in names if not name.startswith(f"{inner.relative_to(outer).as_posix()}/")]


def _list_file(places: dict[str, tuple[Store, list[str]]]) -> ClassList | None:
    """The classes in ``classes.txt``, of the first place that has one, at its top or in a folder there."""
    for place, (store, names) in places.items():
        for name in names:
            if name == LIST_FILE or (name.endswith(f"/{LIST_FILE}") and name.count("/") == 1):
                return parse_class_list(store.read(name), f"{place}/{name}")
    return None


def _found_classes(store: Store, maps: list[str], rule: LabelRule, where: str) -> ClassList:
    """As many classes as these maps have; those of all parts, which must agree."""
    log.info("Reading %d label maps of %s to count their classes; classes=FILE or a number saves it.", len(maps), where)
    largest = -1
    for name in maps:
        try:
            values = read_map(store, name)
        except CorruptImage:
            continue
        if values.ndim == 3:
            raise UsageError(
                f"{name} in {where} is a map of colours: give a list of classes with colours (classes=FILE)."
            )
        counted = values[values != rule.ignore_index]
        largest = max(largest, int(counted.max()) if counted.size else -1)
    count = largest + (0 if rule.reduce_zero_label else 1)
    if not 2 <= count <= MOST:
        raise UsageError(
            f"The largest label in {len(maps)} maps of {where} is {largest}, without {rule.ignore_index}, which is "
            f"ignored: say which classes there are (classes=FILE). {BLACK_AND_WHITE}"
        )
    return numbered_classes(count)


class SegmentDataset(EpochDataset):
    """Decoded and transformed images with the class of each pixel.

    Args:
        transform: maps a dict of ``image`` (C, H, W) and ``target`` (H, W) to one whose image is float32, see
            ``segment_transforms``.
        replace_corrupt: see ``EpochDataset``.

    An item holds ``image`` (C, h, w) float32, ``target`` (h, w) int64 (0 … K-1, or ``IGNORED``; everywhere
    ``IGNORED`` if the source has images only), ``name`` of the image file, ``index`` and ``skipped``. An image whose
    EXIF orientation turns it is taken the way up that its map was made for.
    """

    def __init__(
        self,
        source: SegmentSource,
        transform: Any,
        channels: int = 3,
        seed: int = 0,
        replace_corrupt: bool = True,
    ):
        super().__init__(source, transform, channels, seed, replace_corrupt)

    def sample(self, chosen: int, epoch: int, index: int) -> Sample:
        image, target = self.decode(chosen)
        after = self.transformed({"image": image, "target": target}, epoch, index)
        return {"image": after["image"], "target": after["target"], "name": self.source.names[chosen]}

    def decode(self, index: int) -> tuple[Tensor, Tensor]:
        """The pixels (C, H, W) of one image and their classes (H, W) int64, untransformed.

        Raises:
            CorruptImage: naming the image or the map, if it cannot be read, if their sizes differ, or for a label
            that no class has.
        """
        if not self.source.maps:
            pixels = decode_image(*self.read(index), self.channels)
            return pixels, torch.full(pixels.shape[1:], IGNORED)
        name = self.source.maps[index]
        values = self.source.read_map(index)
        pixels = decode_as_annotated(*self.read(index), self.channels, (values.shape[0], values.shape[1]))
        return pixels, self.source.rule.to_labels(values, name)

    @staticmethod
    def collate(samples: list[Sample]) -> dict[str, Any]:
        """Stacks samples into a batch; ones without an image (unreadable) only add to ``skipped``.

        Returns:
            ``image`` (B, C, H, W), padded with zeros at the right and bottom to the largest of the batch; ``target``
            (B, H, W) int64, padded with ``IGNORED``; ``size`` (B, 2) int64 height and width without padding;
            ``name``: a list of B; ``index`` (B,) int64; ``skipped``.
        """
        read = [sample for sample in samples if "image" in sample]
        sizes = torch.tensor([sample["image"].shape[-2:] for sample in read], dtype=torch.int64).reshape(-1, 2)
        batch: dict[str, Any] = {"image": torch.empty(0), "target": torch.empty(0, dtype=torch.int64), "size": sizes}
        if read:
            height, width = sizes.amax(0).tolist()
            borders = [(0, width - w, 0, height - h) for h, w in sizes.tolist()]
            batch["image"] = torch.stack([F.pad(s["image"], b) for s, b in zip(read, borders, strict=True)])
            targets = [F.pad(s["target"], b, value=IGNORED) for s, b in zip(read, borders, strict=True)]
            batch["target"] = torch.stack(targets)
        batch["name"] = [sample["name"] for sample in read]
        batch["index"] = torch.tensor([sample["index"] for sample in read], dtype=torch.int64)
        batch["skipped"] = [entry for sample in samples for entry in sample["skipped"]]
        return batch
