"""Label maps: files to arrays of whole numbers, and the values in files to classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swinscale.data.class_lists import ClassList
from swinscale.data.images import NUMPY, ZIP, CorruptImage, corrupt_if_it_fails, open_picture, read_array
from swinscale.data.sources import Store

IGNORED = -1
"""The class of pixels that do not count."""


@dataclass(frozen=True)
class LabelRule:
    """How the values in the files of label maps become classes 0 … K-1.

    Args:
        classes: the K classes.
        ignore_index: the value of pixels that do not count. A value that is no label means: none is.
        reduce_zero_label: pixels of value 0 do not count either, and class k has the value k + 1.

    Maps of colours (red, green, blue) are looked up in the colours of the classes; black pixels do not count, unless
    black is the colour of a class. If the colours of all classes are grey, grey maps are looked up too: masks of 0
    and 255. ``reduce_zero_label`` does not concern maps that are looked up.
    """

    classes: ClassList
    ignore_index: int = 255
    reduce_zero_label: bool = False

    def to_labels(self, values: np.ndarray, name: str) -> Tensor:
        """Classes (H, W) int64, ``IGNORED`` where pixels do not count.

        Args:
            values: what ``decode_map`` gives.
            name: the file, for messages.

        Raises:
            CorruptImage: naming the first value that no class has, its place, and what is allowed.
        """
        if values.ndim == 3 and self.classes.colours is None:
            if (values != values[..., :1]).any():
                raise CorruptImage(name, "is a map of colours, but the list of classes gives no colours ('name,r,g,b')")
            values = values[..., 0]
        by_colour = values.ndim == 3 or all(len(set(c)) == 1 for c in self.classes.colours or [(0, 1, 2)])
        labels, known = self._look_up(values) if by_colour else self._count(values)
        if not known.all():
            row, column = (int(i) for i in np.argwhere(~known)[0])
            value = values[row, column]
            raise CorruptImage(
                name, f"{self._unknown(value)} in row {row}, column {column} is no class: {self._allowed(by_colour)}"
            )
        return torch.from_numpy(labels)

    def _count(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of values that are labels, and which of them are known."""
        labels = values.astype(np.int64)
        ignored = labels == self.ignore_index
        if self.reduce_zero_label:
            labels -= 1
            ignored |= labels == -1
        known = (labels >= 0) & (labels < len(self.classes)) | ignored
        labels[ignored] = IGNORED
        return labels, known

    def _look_up(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of colours, and which of them are known."""
        assert self.classes.colours is not None
        if values.ndim == 2:
            codes, ignored = values.astype(np.int64) * 0x010101, values == self.ignore_index
        else:
            codes = values.astype(np.int64) @ np.array([0x010000, 0x000100, 0x000001])
            ignored = codes == 0
        mine = np.array(self.classes.colours) @ np.array([0x010000, 0x000100, 0x000001])
        order = np.argsort(mine)
        labels = order[np.searchsorted(mine[order], codes).clip(max=len(mine) - 1)]
        found = mine[labels] == codes
        labels[~found] = IGNORED
        return labels, found | ignored

    def _unknown(self, value: np.ndarray) -> str:
        return f"the colour {tuple(int(v) for v in value)}" if value.ndim else f"the value {value}"

    def _allowed(self, by_colour: bool) -> str:
        if by_colour:
            return f"the list of {len(self.classes)} classes has other colours"
        first = int(self.reduce_zero_label)
        zero = ", and 0 is ignored (reduce_zero_label)" if self.reduce_zero_label else ""
        return f"classes are {first} … {len(self.classes) - 1 + first}, {self.ignore_index} is ignored{zero}"


def read_map(store: Store, name: str) -> np.ndarray:
    """A file of ``store``, see ``decode_map``.

    Raises:
        CorruptImage: if it is gone, or cannot be decoded.
    """
    with corrupt_if_it_fails(name):
        data = store.read(name)
    return decode_map(data, name)


def decode_map(data: bytes, name: str) -> np.ndarray:
    """Decodes the file of a label map. The contents decide how, not the name.

    Returns:
        (H, W) whole numbers: the grey values of a picture of 1 to 16 bits or of a TIFF file of 32 bits, the indices
        of a palette, or an array of whole numbers from a .npy or .npz file; (H, W, 3) uint8 for a picture of colours.

    Raises:
        CorruptImage: for anything else: JPEG files, whose compression changes labels, fractions, transparency,
        several pages.
    """
    with corrupt_if_it_fails(name):
        if data.startswith((NUMPY, ZIP)):
            return _from_array(read_array(data, name, 1), name)
        with open_picture(data, name) as picture:
            return _from_picture(picture, name, _grey_bits(picture, data))


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    colours = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if array.dtype.kind not in "bui" or array.size == 0 or not (array.ndim == 2 or colours):
        raise CorruptImage(
            name, f"an array of shape {array.shape} and type {array.dtype} is no label map: it has (H, W) whole numbers"
        )
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


def _grey_bits(picture: Image.Image, data: bytes) -> int:
    """Bits of a grey pixel in the file. Pillow stretches 2 and 4 of them to 0 … 255."""
    if picture.format == "PNG":
        return data[24]  # its header, of one form, comes first
    bits_per_sample = 258
    return int(getattr(picture, "tag_v2", {}).get(bits_per_sample, (8,))[0])


def _from_picture(picture: Image.Image, name: str, bits: int) -> np.ndarray:
    if picture.format in ("JPEG", "MPO"):
        raise CorruptImage(name, "is a JPEG file, whose compression changes labels: save label maps as PNG")
    if picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1:
        raise CorruptImage(name, f"has {getattr(picture, 'n_frames', 1)} pages, a label map has one")
    values = np.array(picture)
    if picture.mode in ("RGBA", "LA", "PA"):
        if (values[..., -1] != 255).any():
            raise CorruptImage(name, "has transparent pixels: save label maps without transparency")
        values = values[..., 0] if picture.mode != "RGBA" else values[..., :3]
    elif picture.mode not in ("1", "L", "P", "RGB", "I") and not picture.mode.startswith("I;16"):
        raise CorruptImage(name, f"has pixels of mode {picture.mode}: a label map has whole numbers or RGB colours")
    if picture.mode == "1":
        return values.astype(np.uint8)
    if picture.mode == "L" and bits in (2, 4):
        return values // np.uint8(85 if bits == 2 else 17)
    return values
