"""Bytes to pixels: every file either becomes a tensor with the channels asked for, or says why it cannot."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 300_000_000  # larger pictures are refused: a small file can claim any size


class CorruptImage(ValueError):
    """A file that cannot be read as an image with the channels asked for."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(data: bytes, name: str, channels: int = 3) -> Tensor:
    """Decodes one image file.

    EXIF orientation is applied, palettes and CMYK become RGB, transparency is laid on white (kept for four channels),
    grey becomes RGB or RGB grey as ``channels`` asks. ``.npy`` and ``.npz`` arrays and TIFF files with one page per
    channel hold any number of channels.

    Returns:
        (channels, height, width), uint8 in 0…255, or float32 in [0, 1] for 16-bit files (float arrays as they are).

    Raises:
        CorruptImage: for anything that cannot be read or has other channels.
    """
    try:
        if name.lower().endswith((".npy", ".npz")):
            return _from_array(data, name, channels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size and EXIF warnings; sizes are checked below
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                with Image.open(io.BytesIO(data)) as picture:
                    return _from_picture(picture, name, channels)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except CorruptImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        reason = "empty file" if not data else " ".join(f"{error}".split())[:120] or type(error).__name__
        raise CorruptImage(name, reason) from error


def _from_picture(picture: Image.Image, name: str, channels: int) -> Tensor:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise CorruptImage(name, f"{width}×{height} pixels is more than the {MAX_PIXELS // 10**6} million allowed")
    pages = getattr(picture, "n_frames", 1)
    if picture.format == "TIFF" and pages == channels > 1:
        return torch.cat([_page(picture, page, name) for page in range(pages)])
    if picture.mode.startswith(("I", "F")):  # 16 bits and more
        grey = _deep(np.asarray(picture))
        return _to_channels(torch.from_numpy(grey)[None], name, channels)
    upright = ImageOps.exif_transpose(picture)
    if channels == 4:
        upright = upright.convert("RGBA")
    elif upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        upright = Image.alpha_composite(white, layer).convert("RGB")
    elif upright.mode not in ("RGB", "L"):
        upright = upright.convert("L" if upright.mode == "1" else "RGB")
    if channels == 1 and upright.mode != "L":
        upright = upright.convert("L")
    pixels = np.array(upright)
    tensor = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
    return _to_channels(tensor, name, channels)


def _page(picture: Image.Image, page: int, name: str) -> Tensor:
    picture.seek(page)
    pixels = np.asarray(picture)
    if pixels.ndim != 2:
        raise CorruptImage(name, "its pages are not single channels")
    return torch.from_numpy(_deep(pixels) if pixels.dtype != np.uint8 else pixels.astype(np.float32) / 255)[None]


def _deep(pixels: np.ndarray) -> np.ndarray:
    """Pixels with more than 8 bits as float32 in [0, 1]; floats as they are."""
    if np.issubdtype(pixels.dtype, np.floating):
        return pixels.astype(np.float32)
    return pixels.astype(np.float32) / 65535


def _to_channels(pixels: Tensor, name: str, channels: int) -> Tensor:
    if pixels.shape[0] == channels:
        return pixels.contiguous()
    if pixels.shape[0] == 1 and channels == 3:
        return pixels.expand(3, -1, -1).contiguous()
    raise CorruptImage(name, f"has {pixels.shape[0]} channels where {channels} are needed")


def _from_array(data: bytes, name: str, channels: int) -> Tensor:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    array = loaded[loaded.files[0]] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.size == 0:
        raise CorruptImage(name, f"an array of shape {array.shape} is no image")
    if array.shape[0] != channels and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535
    elif array.dtype != np.uint8:
        array = array.astype(np.float32)
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise CorruptImage(name, "holds numbers that are not finite")
    return _to_channels(torch.from_numpy(np.ascontiguousarray(array)), name, channels)
