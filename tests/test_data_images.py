"""Every odd file is read right or refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from swinscale.data import CorruptImage, decode_image
from swinscale.data import images as module


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


COLOUR = Image.new("RGB", (6, 4), (200, 100, 50))


def pixel(data: bytes, name: str = "a.png", channels: int = 3) -> list[int]:
    image = decode_image(data, name, channels)
    assert image.shape == (channels, 4, 6)
    assert image.dtype == torch.uint8
    return image[:, 1, 2].tolist()


def test_rgb():
    assert pixel(encoded(COLOUR, "PNG")) == [200, 100, 50]


def test_cmyk_jpeg_becomes_rgb():
    found = pixel(encoded(COLOUR.convert("CMYK"), "JPEG", quality=100), "a.jpg")
    assert np.abs(np.array(found) - [200, 100, 50]).max() <= 6


def test_palette_and_transparency():
    assert pixel(encoded(COLOUR.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")) == [200, 100, 50]
    clear = Image.new("RGBA", (6, 4), (200, 100, 50, 0))
    assert pixel(encoded(clear, "PNG")) == [255, 255, 255]
    assert pixel(encoded(clear, "PNG"), channels=4) == [200, 100, 50, 0]
    half = Image.new("LA", (6, 4), (0, 128))
    assert abs(pixel(encoded(half, "PNG"))[0] - 127) <= 1
    palette = COLOUR.convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(encoded(palette, "PNG", transparency=0)) == [255, 255, 255]


def test_grey_and_colour_follow_the_channels_asked_for():
    assert pixel(encoded(Image.new("L", (6, 4), 77), "PNG")) == [77, 77, 77]
    assert pixel(encoded(COLOUR, "PNG"), channels=1) == [124]
    assert pixel(encoded(Image.new("1", (6, 4), 1), "PNG"), channels=1) == [255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    deep = Image.fromarray(np.full((4, 6), 32768, np.uint16))
    image = decode_image(encoded(deep, kind), "a", 1)
    assert image.dtype == torch.float32
    assert image.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert decode_image(encoded(deep, kind), "a", 3).shape == (3, 4, 6)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    left = Image.new("RGB", (6, 4))
    left.paste((255, 255, 255), (0, 0, 3, 4))
    image = decode_image(encoded(left, "JPEG", exif=exif, quality=100), "a.jpg")
    assert image.shape == (3, 6, 4)
    assert image[:, 0].float().mean() > 200
    assert image[:, -1].float().mean() < 50


def test_many_channels():
    """R-CHAN-4: arrays in either order, several dtypes, and TIFF files with a page per channel."""
    random = np.random.default_rng(0)
    bands = random.integers(0, 255, (13, 4, 6)).astype(np.uint8)
    for array in (bands, bands.transpose(1, 2, 0)):
        assert np.array_equal(decode_image(array_bytes(array), "a.npy", 13).numpy(), bands)
    deep = decode_image(array_bytes(bands.astype(np.uint16) * 257), "a.npy", 13)
    assert torch.allclose(deep, torch.from_numpy(bands) / 255, atol=1e-4)
    pages = [Image.fromarray(b) for b in bands[:5]]
    tiff = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert torch.allclose(decode_image(tiff, "a.tif", 5), torch.from_numpy(bands[:5]) / 255)
    buffer = io.BytesIO()
    np.savez(buffer, bands)
    assert decode_image(buffer.getvalue(), "a.npz", 13).shape == (13, 4, 6)


@pytest.mark.parametrize(
    ("data", "name", "channels", "reason"),
    [
        (b"", "a.jpg", 3, "empty file"),
        (b"<html>not found</html>", "a.jpg", 3, "not an image"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:-400], "a.jpg", 3, "truncated"),
        (encoded(Image.effect_noise((64, 64), 90), "PNG")[:-900], "a.png", 3, ""),
        (encoded(COLOUR, "PNG"), "a.png", 5, "has 3 channels where 5 are needed"),
        (array_bytes(np.zeros((2, 4, 6), np.uint8)), "a.npy", 5, "2 channels where 5"),
        (array_bytes(np.zeros(5)), "a.npy", 1, "shape (5,)"),
        (array_bytes(np.full((1, 2, 2), np.nan)), "a.npy", 1, "not finite"),
        (array_bytes(np.array([{"a": 1}], dtype=object)), "a.npy", 1, "pickle"),
        (b"not an array", "a.npy", 1, ""),
    ],
)
def test_broken_files_say_why(data, name, channels, reason):
    with pytest.raises(CorruptImage) as error:
        decode_image(data, name, channels)
    assert error.value.name == name
    assert reason in error.value.reason
    assert str(error.value).startswith(name + ": ")
    assert "\n" not in str(error.value)


def test_a_file_that_lies_about_its_kind_is_read():
    assert pixel(encoded(COLOUR, "PNG"), "a.jpg") == [200, 100, 50]


def test_huge_pictures_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 20)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(CorruptImage, match="6×4 pixels"):
        decode_image(encoded(COLOUR, "PNG"), "a.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_real_photos(shared_data):
    from swinscale.data import open_source

    source = open_source(shared_data / "clothing", "test")
    assert len(source) == 372
    image = decode_image(source.read(0), source.names[0])
    assert min(image.shape[1:]) == 320
