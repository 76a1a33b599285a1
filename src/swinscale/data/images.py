"""Bytes to pixels: every file either becomes a tensor with the channels asked for, or says why it cannot."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 300_000_000  # larger pictures are refused: a small file can claim any size
NUMPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"  # how .npy and .npz files begin


class CorruptImage(ValueError):
    """A file that cannot be read as an image with the channels asked for."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(
    data: bytes, name: str, channels: int = 3, at_least: tuple[int, int] | None = None, orient: bool = True
) -> Tensor:
    """Decodes one image file. The contents decide how, not the name.

    EXIF orientation is applied, palettes and CMYK become RGB, transparency is laid on white (kept for four channels),
    grey becomes RGB or RGB grey as ``channels`` asks. ``.npy`` and ``.npz`` arrays (C, H, W), (H, W, C) or (H, W) and TIFF
    files with one page per channel hold any number of channels. Of an animation the first frame is read.

    Args:
        at_least: (height, width). A JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, several times as fast, as
            long as neither side gets smaller than this, whichever way up the picture is.
        orient: apply the EXIF orientation. False: leave pixels as they are stored, as published evaluations do.

    Returns:
        (channels, height, width): uint8 in 0…255; float32 in [0, 1] for 16-bit files; float32 as they are for arrays of
        other types and for TIFF files with more than 16 bits.

    Raises:
        CorruptImage: for anything that cannot be read, has other channels, or more than 300 million pixels.
    """
    with corrupt_if_it_fails(name):
        if data.startswith((NUMPY, ZIP)):
            pixels = _from_array(data, name, channels)
        else:
            with open_picture(data, name) as picture:
                pixels = _from_picture(picture, name, channels, at_least, orient)
    if pixels.is_floating_point() and not pixels.isfinite().all():
        raise CorruptImage(name, "holds numbers that are not finite")
    if pixels.shape[0] == 1 and channels == 3:
        pixels = pixels.expand(3, -1, -1)
    if pixels.shape[0] != channels:
        raise CorruptImage(name, f"has {pixels.shape[0]} channels where {channels} are needed")
    return pixels.contiguous()


def decode_as_annotated(data: bytes, name: str, channels: int, size: tuple[int, int]) -> Tensor:
    """Decodes an image the way up that its annotations were made for: as it is stored, or as its EXIF orientation says.

    Where both fit (a picture that is turned by 180° or mirrored) it stays as it is stored.

    Args:
        size: height and width that the annotations are for.

    Returns:
        (channels, *size), as ``decode_image`` gives it.

    Raises:
        CorruptImage: if it cannot be read, or has another size either way up.
    """
    pixels = decode_image(data, name, channels, orient=False)
    stored = tuple(pixels.shape[1:])
    if stored != size and stored == size[::-1]:
        pixels = decode_image(data, name, channels, orient=True)
    if tuple(pixels.shape[1:]) != size:
        sizes = f"has {stored[0]}×{stored[1]} pixels, its annotations are for {size[0]}×{size[1]}"
        raise CorruptImage(name, sizes)
    return pixels


@contextmanager
def corrupt_if_it_fails(name: str) -> Iterator[None]:
    """Whatever is raised inside becomes a ``CorruptImage`` of the file ``name``."""
    try:
        yield
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:  # its own message names a Python object
        raise CorruptImage(name, "not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise CorruptImage(name, " ".join(f"{error}".split())[:120] or type(error).__name__) from error


@contextmanager
def any_picture() -> Iterator[None]:
    """Inside, Pillow opens pictures of any size and prints nothing; its own limit of pixels is a global one."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no reason to print a line for each of a million files
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def open_picture(data: bytes, name: str) -> Iterator[Image.Image]:
    """A file as a picture of Pillow, of at most ``MAX_PIXELS``; to be used inside ``corrupt_if_it_fails``."""
    if not data:
        raise CorruptImage(name, "empty file")
    with any_picture(), Image.open(io.BytesIO(data)) as picture:
        _check_size(name, *picture.size)
        yield picture


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise CorruptImage(name, f"{width}×{height} pixels is more than the {MAX_PIXELS // 10**6} million allowed")


def _from_picture(
    picture: Image.Image, name: str, channels: int, at_least: tuple[int, int] | None, orient: bool
) -> Tensor:
    pages = getattr(picture, "n_frames", 1)
    if picture.format == "TIFF" and pages == channels > 1:
        return torch.cat([_page(picture, page, name) for page in range(pages)])
    if at_least is not None and picture.format == "JPEG":
        picture.draft(None, (max(at_least), max(at_least)))
    upright = ImageOps.exif_transpose(picture) if orient else picture
    if upright.mode.startswith(("I", "F")):  # 16 bits and more
        return _deep(picture, upright)
    if channels == 4:
        upright = upright.convert("RGBA")
    elif upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    elif upright.mode not in ("RGB", "L"):
        upright = upright.convert("L" if upright.mode == "1" else "RGB")
    if channels == 1:
        upright = upright.convert("L")
    pixels = np.array(upright)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _page(picture: Image.Image, page: int, name: str) -> Tensor:
    """One page of a TIFF file as float32 (1, H, W)."""
    picture.seek(page)
    _check_size(name, *picture.size)
    if picture.mode.startswith(("I", "F")):
        return _deep(picture, picture)
    if picture.mode not in ("L", "1"):
        raise CorruptImage(name, f"page {page + 1} of {picture.mode} pixels is not a single channel")
    return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)[None]


def _deep(picture: Image.Image, upright: Image.Image) -> Tensor:
    """Grey pixels with more than 8 bits as float32 (1, H, W): 16-bit ones in [0, 1], wider ones as they are."""
    bits_per_sample = 258  # the TIFF tag; the other formats (PNG, PGM) have 16 bits at most
    wide = picture.mode.startswith("F") or getattr(picture, "tag_v2", {}).get(bits_per_sample, (16,))[0] > 16
    return torch.from_numpy(np.asarray(upright).astype(np.float32) / (1 if wide else 65535))[None]


def read_array(data: bytes, name: str, channels: int) -> np.ndarray:
    """The array of a .npy file, or the first one of a .npz file.

    Args:
        channels: that an image of ``MAX_PIXELS`` may have: what would be larger is not unpacked.
    """
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        assert loaded.zip is not None
        members = loaded.zip.infolist()
        _check_size(name, members[0].file_size // (8 * channels), 1)  # before it is unpacked; 8 bytes a number at most
        loaded = loaded[loaded.files[0]]
    if not isinstance(loaded, np.ndarray):
        raise CorruptImage(name, "a zip file without arrays is no image")
    return loaded


def _from_array(data: bytes, name: str, channels: int) -> Tensor:
    array = read_array(data, name, channels)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.size == 0 or array.dtype.kind not in "buif":
        raise CorruptImage(name, f"an array of shape {array.shape} and type {array.dtype} is no image")
    if array.shape[0] != channels and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    _check_size(name, array.shape[2], array.shape[1])
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535
    elif array.dtype != np.uint8:
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))
