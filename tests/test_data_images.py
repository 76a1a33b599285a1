"""Every odd file is read right or refused with a reason."""

from __future__ import annotations

import io
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swinscale.data import CorruptImage, decode_image, open_source
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
    assert image.is_contiguous()
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


def test_wider_numbers_stay_as_they_are():
    for array in (np.full((4, 6), 1_500_000, np.int32), np.full((4, 6), -1.25, np.float32)):
        for data in (encoded(Image.fromarray(array), "TIFF"), array_bytes(array)):
            image = decode_image(data, "a", 1)
            assert image.dtype == torch.float32
            assert torch.equal(image[0], torch.from_numpy(array).float())


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    left = Image.new("RGB", (6, 4))
    left.paste((255, 255, 255), (0, 0, 3, 4))
    image = decode_image(encoded(left, "JPEG", exif=exif, quality=100), "a.jpg")
    assert image.shape == (3, 6, 4)
    assert image[:, 0].float().mean() > 200
    assert image[:, -1].float().mean() < 50
    deep = encoded(Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6)), "PNG", exif=exif)
    assert decode_image(deep, "a.png", 1).mul(65535).round().int()[0, 0].tolist() == [18, 12, 6, 0]


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
    white = encoded(Image.new("1", (6, 4), 1), "TIFF", save_all=True, append_images=[Image.new("1", (6, 4), 0)])
    assert decode_image(white, "a.tif", 2).mean((1, 2)).tolist() == [1.0, 0.0]
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
        (b"not an array", "a.npy", 1, "not an image"),
        (array_bytes(np.zeros((1, 4, 6), complex)), "a.npy", 1, "type complex128"),
        (array_bytes(np.zeros((1, 40, 60)))[:-99], "a.npy", 1, ""),
        (encoded(Image.fromarray(np.full((4, 6), np.inf, np.float32)), "TIFF"), "a.tif", 1, "not finite"),
        (encoded(COLOUR, "TIFF", save_all=True, append_images=[COLOUR]), "a.tif", 2, "page 1 of RGB pixels"),
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
    assert pixel(encoded(COLOUR, "PNG"), "a.npy") == [200, 100, 50]
    array = np.array(COLOUR).transpose(2, 0, 1)
    assert pixel(array_bytes(array), "a.png") == [200, 100, 50]


def test_a_zip_file_that_holds_no_array_is_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("word/document.xml", "<text/>")
    with pytest.raises(CorruptImage, match="without arrays"):
        decode_image(buffer.getvalue(), "letter.npz")


def test_of_an_animation_the_first_frame_is_read():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "a.gif") == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "NPY", "NPZ"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_of_any_kind_is_an_image_or_a_reason(kind, data):
    """Cut files and flipped bytes never raise anything else, and leave no warning and no changed setting of Pillow."""
    random = np.random.default_rng(0).integers(0, 255, (24, 20, 3)).astype(np.uint8)
    if kind in ("NPY", "NPZ"):
        buffer = io.BytesIO()
        (np.save if kind == "NPY" else np.savez)(buffer, random)
        whole = buffer.getvalue()
    else:
        whole = encoded(Image.fromarray(random), kind)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=4)) if damaged else ():
        damaged[place] = data.draw(st.integers(0, 255))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = decode_image(bytes(damaged), "a")
        except CorruptImage as error:
            assert "\n" not in str(error)
        else:
            assert image.ndim == 3 and image.shape[0] == 3
    assert before == Image.MAX_IMAGE_PIXELS


@given(
    width=st.integers(64, 400),
    height=st.integers(64, 400),
    least=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    orientation=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_a_jpeg_is_never_decoded_smaller_than_asked(width, height, least, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.linear_gradient("L").resize((width, height)).convert("RGB"), "JPEG", exif=exif, quality=95)
    full, small = decode_image(data, "a.jpg"), decode_image(data, "a.jpg", at_least=least)
    for axis in (1, 2):
        assert small.shape[axis] >= min(least[axis - 1], full.shape[axis])
    halves = [torch.nn.functional.adaptive_avg_pool2d(image.float(), 2) for image in (small, full)]
    assert (halves[0] - halves[1]).abs().max() < 20  # the same way up: the other way differs by 128
    if min(width, height) >= 2 * max(least):
        assert small.shape[1] <= -(-full.shape[1] // 2)


def test_huge_pictures_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 20)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(CorruptImage, match="6×4 pixels"):
        decode_image(encoded(COLOUR, "PNG"), "a.png")
    assert before == Image.MAX_IMAGE_PIXELS
    buffer = io.BytesIO()
    np.savez_compressed(buffer, np.zeros((1, 50, 50)))
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("it was unpacked"))
    for data in (buffer.getvalue(), array_bytes(np.zeros((1, 5, 5)))):
        with pytest.raises(CorruptImage, match="pixels is more than"):
            decode_image(data, "a.npy", 1)


def test_real_photos(shared_data):
    source = open_source(shared_data / "clothing", "test")
    assert len(source) == 372
    image = decode_image(source.read(0), source.names[0])
    assert min(image.shape[1:]) == 320
