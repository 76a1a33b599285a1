"""Which files of a folder are pictures and which are their label maps, told by the names of folders and files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from swinscale.data.sources import EXTENSIONS, SPLITS, check_split
from swinscale.errors import UsageError

Kind = Literal["image", "map"]
IMAGE_WORDS = ("images", "image", "imgs", "img", "leftimg8bit", "jpegimages")
MAP_WORDS = (
    *("annotations", "annotation", "annot", "ann", "labels", "label", "masks", "mask", "maps", "map"),
    *("gt", "gtfine", "gtcoarse", "groundtruth", "segmentationclass"),
)
FILLERS = ("", "dir", "set")
KINDS: dict[str, Kind] = {**dict.fromkeys(IMAGE_WORDS, "image"), **dict.fromkeys(MAP_WORDS, "map")}
PARTS = {word: split for split, words in SPLITS.items() for word in words}
LOOKED_FOR = (
    "images/training + annotations/training, images/train + labels/train (or masks, annotations, maps, gt), "
    "train + trainannot, train/images + train/labels, images + labels, JPEGImages + SegmentationClass"
)
PART_LIST = re.compile(r"(?:.*/)?ImageSets/Segmentation/(\w+)\.txt")


class Place(NamedTuple):
    """A file, and what its folders say about it."""

    name: str
    """As its store knows it."""
    kind: Kind | None
    split: str
    """ "train", "val", "test", or "" where no folder says so."""
    key: str
    """What a picture and its map have in common: the rest of the path, without extension."""


class Pairs(NamedTuple):
    """Pictures and their maps, in the same order."""

    images: list[str]
    maps: list[str]
    """Empty if no maps were asked for."""
    splits: list[str]
    all_maps: list[str]
    """Those of all parts."""


def part_lists(names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, str]:
    """Name of a picture, without extension → its part, from lists as Pascal VOC has them; empty where there are none.

    Args:
        names: of all files.
        read: the bytes of one.
    """
    found = ((match[1], name) for name in names if (match := PART_LIST.fullmatch(name)))
    lists = [(PARTS[word], read(name).decode(errors="replace")) for word, name in found if word in PARTS]
    return {
        PurePosixPath(line.split()[0]).name: part for part, text in lists for line in text.splitlines() if line.split()
    }


def find_pairs(
    images: Sequence[str],
    maps: Sequence[str] | None,
    spec: str,
    split: str,
    suffixes: tuple[str, str] = ("", ""),
    only_images: bool = False,
    listed: Mapping[str, str] | None = None,
) -> Pairs:
    """Pairs pictures with label maps.

    Args:
        images: names of files, with forward slashes.
        maps: the same of the maps, if these are elsewhere; None: they are among ``images``.
        spec: where they are, for messages.
        split: which part, if there are parts.
        suffixes: ends of the names, before the extension, of pictures and of maps. Other files are passed over.
        only_images: do not look for maps.
        listed: parts of files by their names without extension; others are passed over. Empty or None: folders say it.

    Raises:
        UsageError: if pictures or maps are missing, if two have the same name, or if there is no such part.
    """
    everything = _places(images, suffixes, listed, apart=maps is not None)
    if not everything:
        kinds = ", ".join(sorted(EXTENSIONS))
        ends = f" whose names end in '{suffixes[0]}'" if suffixes[0] else ""
        raise UsageError(f"No images in {spec}: looked for {kinds}{ends}; found {len(images)} other files.")
    pictures = _most_certain(everything, "image")
    if not pictures:
        raise UsageError(
            f"No images in {spec}, only label maps such as {everything[0].name}. Name the folder above both."
        )
    parts = _parts(pictures)
    if only_images:
        chosen = _of_part(pictures, check_split(split, parts, spec) if parts else "")
        return Pairs([place.name for place in chosen], [], parts, [])
    if maps is None:
        found = [place for place in everything if place.kind == "map"]
    else:
        found = _most_certain(_places(maps, suffixes, listed, apart=None), "map")
    if not found:
        raise UsageError(
            f"No label maps for the {len(pictures)} images of {spec}: looked for {LOOKED_FOR}. Name the folder above "
            f"both, or the folder of the maps (maps=PATH)."
        )
    map_parts = _parts(found)
    splits = [part for part in SPLITS if part in (parts or map_parts) and part in (map_parts or parts)]
    if parts and map_parts and split not in splits and split in parts + map_parts:
        has, lacks = ("images", "label maps") if split in parts else ("label maps", "images")
        raise UsageError(
            f"The '{split}' part of {spec} has {has} but no {lacks}; both: {', '.join(splits) or 'no part'}."
        )
    if splits:
        check_split(split, splits, spec)
    mine = _by_key(_of_part(pictures, split if parts else ""), "images")
    theirs = _by_key(_of_part(found, split if map_parts else ""), "maps")
    there = {PurePosixPath(key).name for key in mine}
    if gone := [name for name, part in (listed or {}).items() if part == split and name not in there]:
        raise UsageError(
            f"{len(gone)} pictures of the '{split}' part of {spec}, which its list names, are not there; the first: {gone[0]}."
        )
    known = set(theirs) if parts or not map_parts else {place.key for place in found}
    if missing := [place.name for key, place in mine.items() if key not in known]:
        raise UsageError(
            f"{len(missing)} of {len(mine)} images of {spec} have no label map; the first: {missing[0]} (a map: "
            f"{found[0].name}). Names match without extension; say image_suffix and map_suffix where they end "
            f"differently."
        )
    known = set(mine) if map_parts or not parts else {place.key for place in pictures}
    if left := [place.name for key, place in theirs.items() if key not in known]:
        raise UsageError(
            f"{len(left)} of {len(theirs)} label maps of {spec} have no image; the first: {left[0]}. Add the images, or "
            f"move these maps away."
        )
    keys = [key for key in mine if key in theirs]
    names = [mine[key].name for key in keys], [theirs[key].name for key in keys]
    return Pairs(*names, splits, [place.name for place in found])


def _places(
    names: Iterable[str], suffixes: tuple[str, str], listed: Mapping[str, str] | None, apart: bool | None
) -> list[Place]:
    """What the paths of the files say.

    Args:
        apart: True: these are pictures without maps among them; False: pictures and maps; None: maps.
    """
    paths = [PurePosixPath(name) for name in names]
    paths = [path for path in paths if path.suffix.lower().removeprefix(".") in EXTENSIONS]
    skipped = _common_folders(paths)
    places = []
    for path in paths:
        kind, split, rest = _read_folders(path.parts[skipped:-1])
        if apart is None or (apart is False and kind is None and suffixes[1] and path.stem.endswith(suffixes[1])):
            kind = kind or "map"
        suffix = suffixes[kind == "map"]
        if listed:
            split = listed.get(path.stem.removesuffix(suffix), "")
        if path.stem.endswith(suffix) and (split or not listed):
            places.append(Place(str(path), kind, split, "/".join([*rest, path.stem.removesuffix(suffix)])))
    return places


def _common_folders(paths: Sequence[PurePosixPath]) -> int:
    """How many folders to pass over that hold everything and say nothing: archives often have one or two.

    Not if the folders in them say nothing either: then all of a path counts, or maps elsewhere might not fit.
    """
    folders = [path.parts[:-1] for path in paths]
    for count in range(min(map(len, folders), default=0)):
        here = {parts[count] for parts in folders}
        if any(_words(folder) is not None for folder in here):
            return count
        if len(here) > 1:
            break
    return 0


def _words(folder: str) -> list[str] | None:
    """The words in a folder's name if all of them speak of parts, pictures or maps: "trainannot", "val_labels"."""
    lower = folder.lower()
    if lower in KINDS:
        return [lower]
    words = [word for word in re.split("[^a-z]+", re.sub("annot$", "_annot", lower)) if word not in FILLERS]
    return words if words and all(word in KINDS or word in PARTS for word in words) else None


def _read_folders(folders: Sequence[str]) -> tuple[Kind | None, str, list[str]]:
    """What the first folders of a path say: pictures or maps, which part; and the folders after these."""
    kind: Kind | None = None
    split = ""
    for position, folder in enumerate(folders):
        words = _words(folder) or []
        kinds = [KINDS[word] for word in words if word in KINDS]
        splits = [PARTS[word] for word in words if word in PARTS]
        if not words or (kinds and kind) or (splits and split):
            return kind, split, list(folders[position:])
        kind, split = kinds[0] if kinds else kind, splits[0] if splits else split
    return kind, split, []


def _most_certain(places: list[Place], kind: Kind) -> list[Place]:
    """The files in folders that say they are of ``kind``; if none are, those in folders that do not speak of it."""
    certain = [place for place in places if place.kind == kind]
    return certain or [place for place in places if place.kind is None]


def _parts(places: list[Place]) -> list[str]:
    there = {place.split for place in places}
    return [split for split in SPLITS if split in there]


def _of_part(places: list[Place], split: str) -> list[Place]:
    """Those of a part; "": all."""
    return [place for place in places if split in ("", place.split)]


def _by_key(places: list[Place], what: str) -> dict[str, Place]:
    found: dict[str, Place] = {}
    doubles = []
    for place in places:
        if found.setdefault(place.key, place) is not place:
            doubles.append((found[place.key].name, place.name))
    if doubles:
        raise UsageError(
            f"{len(doubles)} {what} have the same name but for the extension or folder; the first: "
            f"{' and '.join(doubles[0])}. Keep one of each."
        )
    return found
