"""What is looked at when images with label maps are opened: sizes of all pairs, and labels of some maps."""

from __future__ import annotations

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image

from swinscale.data.images import NUMPY, ZIP, CorruptImage, any_picture
from swinscale.data.label_maps import IGNORED
from swinscale.data.sources import FolderStore, Store
from swinscale.errors import UsageError

if TYPE_CHECKING:
    from swinscale.data.segments import SegmentSource

CHECKED = 200
"""Maps whose labels are looked at."""
THREADS = 8
"""They wait for disks and networks most of the time."""
ORIENTATION = 274
BLACK_AND_WHITE = (
    "If 255 is a class and not ignored, list the classes in a file with the lines 'background,0,0,0' and "
    "'object,255,255,255'."
)
Size = tuple[int, int]


def check_sizes(source: SegmentSource) -> None:
    """Compares the sizes of images and maps, of which only the first bytes are read. Unreadable files are passed over.

    Raises:
        UsageError: naming the first image whose map has another size, and both sizes.
    """

    def differs(pair: tuple[str, str]) -> tuple[str, str, Size, Size] | None:
        image, label_map = pair
        seen, wanted = _sizes(source.store, image), _sizes(source.map_store, label_map)
        if seen and wanted and not set(seen) & set(wanted):
            return image, label_map, seen[0], wanted[0]
        return None

    with any_picture(), ThreadPoolExecutor(THREADS) as pool:
        wrong = [found for found in pool.map(differs, zip(source.names, source.maps, strict=True)) if found]
    if wrong:
        image, label_map, seen, needed = wrong[0]
        raise UsageError(
            f"{len(wrong)} of {len(source)} images have another size than their label map; the first: {image} has "
            f"{seen[0]}×{seen[1]} pixels (height×width), {label_map} {needed[0]}×{needed[1]}."
        )


def _sizes(store: Store, name: str) -> list[Size]:
    """Heights and widths that the file may have, by its first bytes; none if these say nothing."""
    try:
        with _first_bytes(store, name) as file:
            start = file.read(8)
            file.seek(0)
            if start.startswith(ZIP):
                with zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as member:
                    return _array_sizes(member)
            if start.startswith(NUMPY):
                return _array_sizes(file)
            with Image.open(file) as picture:
                width, height = picture.size
                return [(height, width), (width, height)] if _turned(picture) else [(height, width)]
    except Exception:  # the data set says what is wrong with it when it comes to it
        return []


def _first_bytes(store: Store, name: str) -> IO[bytes]:
    """An open file, of which not all need be read."""
    return (store.root / name).open("rb") if isinstance(store, FolderStore) else io.BytesIO(store.read(name))


def _array_sizes(file: IO[bytes]) -> list[Size]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    *first, width = read(file)[0]  # (H, W), (C, H, W) or (H, W, C)
    return [(first[-1], width), (first[0], first[1])] if len(first) == 2 else [(first[0], width)]


def _turned(picture: Image.Image) -> bool:
    """Whether its EXIF orientation lays it on its side."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return False  # Pillow would read all of the file to look for it at the end
    return picture.getexif().get(ORIENTATION, 1) > 4


def check_labels(source: SegmentSource, where: str) -> None:
    """Looks at the labels of up to 200 maps, evenly spread. Unreadable maps are passed over, unless all are such.

    Args:
        where: the place of the maps, for messages.

    Raises:
        UsageError: for labels that no class has, and if not one pixel counts.
    """
    count = min(CHECKED, len(source))
    chosen = [index * len(source) // count for index in range(count)]
    unreadable: list[CorruptImage] = []
    counted, black, white = False, True, False
    for index in chosen:
        try:
            values = source.read_map(index)
        except CorruptImage as error:
            unreadable.append(error)
            continue
        try:
            labels = source.rule.to_labels(values, source.maps[index])
        except CorruptImage as error:
            raise UsageError(f"{where}: {error}. Set classes, ignore_index or reduce_zero_label.") from None
        counted = counted or bool((labels != IGNORED).any())
        black = black and bool((labels <= 0).all())
        white = white or bool((values == 255).any())
    if len(unreadable) == count:
        raise UsageError(f"None of {count} label maps of {where} can be read; the first: {unreadable[0]}.")
    if not counted:
        raise UsageError(
            f"Every pixel of {count} label maps of {where} is ignored: check ignore_index and reduce_zero_label."
        )
    plain = source.rule.classes.colours is None and not source.rule.reduce_zero_label
    if black and white and plain and source.rule.ignore_index == 255:
        raise UsageError(f"The {count} label maps of {where} that were looked at have class 0 alone. {BLACK_AND_WHITE}")
