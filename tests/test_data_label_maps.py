"""Lists of classes, files of label maps, and the values in them (R-DOWN-2, R-CHAN-4)."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinscale.data.class_lists import ClassList, class_list, numbered_classes
from swinscale.data.images import CorruptImage
from swinscale.data.label_maps import IGNORED, LabelRule, decode_map
from swinscale.errors import UsageError

SHARED = Path(__file__).parents[2] / "shared" / "data"
VALUES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4


def png(pixels: np.ndarray, **options: object) -> bytes:
    return stored(Image.fromarray(pixels), "PNG", **options)


def stored(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def text_file(folder: Path, text: str) -> str:
    path = folder / "list.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_lists_that_come_with_the_package():
    ade, camvid = class_list("ade20k"), class_list("camvid")
    assert len(ade) == 150 and ade.colours is None
    assert (ade.names[0], ade.names[12], ade.names[149]) == ("wall", "person", "flag")
    assert camvid.names[:4] == ("sky", "building", "pole", "road") and camvid.names[10] == "bicyclist"
    assert camvid.colours is not None and len(camvid.colours) == 11 and camvid.colours[8] == (64, 0, 128)


def test_ade20k_has_the_order_of_its_authors():
    table = SHARED / "ade20k-sample" / "objectInfo150.csv"
    if not table.is_file():
        pytest.skip("no shared data")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    for row, name in zip(rows, class_list("ade20k").names, strict=True):
        assert row["Name"].startswith(name.replace(" ", ";")), row


def test_a_number_and_the_three_forms_of_a_line(tmp_path):
    assert class_list("3") == numbered_classes(3) == ClassList(("class 0", "class 1", "class 2"))
    assert class_list(text_file(tmp_path, "# mine\nsky\n\n  tall tree \n")) == ClassList(("sky", "tall tree"))
    coloured = ClassList(("sky", "tall tree"), ((1, 2, 3), (0, 0, 255)))
    assert class_list(text_file(tmp_path, "\ufeffname,r,g,b\nsky,1,2,3\ntall tree, 0, 0, 255\n")) == coloured
    assert class_list(text_file(tmp_path, "1 2 3\t\tsky\n0 0 255 tall tree\n")) == coloured


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky\ntree\nsky\n", "line 3: 'sky' is there twice, first in line 1"),
        ("sky,1,2,3\ntree,1,2,3\n", r"line 2: colour \(1, 2, 3\) is there twice, first in line 1"),
        ("sky,1,2,3\n# no colour\ntree\n", "line 3: some classes have a colour and some have not"),
        ("sky\ntree,1,2,3\n", "line 2: some classes have a colour"),
        ("sky,1,2\ntree,1,2,3\n", "line 1: 'sky,1,2' is not"),
        ("sky,1,2,x\n", "line 1: 'sky,1,2,x' is not"),
        ("sky,1,2,256\n", r"line 1: colour \(1, 2, 256\) is not allowed"),
        ("# nothing\n", "has 0 classes"),
        ("sky\n", "has 1 classes"),
    ],
)
def test_a_list_with_a_mistake_names_file_and_line(tmp_path, text, message):
    with pytest.raises(UsageError, match=f"list.txt.*{message}"):
        class_list(text_file(tmp_path, text))


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"'camvd'.*Did you mean 'camvid'"):
        class_list("camvd")
    with pytest.raises(UsageError, match="classes=1 is not allowed"):
        class_list("1")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UsageError, match=r"a\.txt is not a text file in UTF-8"):
        class_list(str(tmp_path / "a.txt"))


def palette(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray(values).convert("P")
    picture.putdata(values.flatten().tolist())
    picture.putpalette([9, 8, 7, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    return picture


def array_bytes(values: np.ndarray, compressed: bool = False) -> bytes:
    file = io.BytesIO()
    if compressed:
        np.savez_compressed(file, values)
    else:
        np.save(file, values)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        png(VALUES),
        png(VALUES.astype(np.uint16)),
        stored(palette(VALUES), "PNG"),
        stored(palette(VALUES), "PNG", bits=2),
        stored(palette(VALUES), "GIF"),
        stored(Image.fromarray(VALUES), "BMP"),
        stored(Image.fromarray(VALUES), "TIFF"),
        stored(Image.fromarray(VALUES.astype(np.uint16)), "TIFF"),
        stored(Image.fromarray(VALUES.astype(np.int32)), "TIFF", compression="tiff_lzw"),
        stored(Image.merge("LA", [Image.fromarray(VALUES), Image.new("L", (4, 3), 255)]), "PNG"),
        array_bytes(VALUES),
        array_bytes(VALUES.astype(np.int64)[None]),
        array_bytes(VALUES.astype(np.uint16), compressed=True),
    ],
    ids=lambda data: data[:4].hex(),
)
def test_every_kind_of_file_gives_the_same_values(data):
    values = decode_map(data, "map")
    assert values.dtype.kind in "iu" and np.array_equal(values, VALUES)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_pixels_of_few_bits_are_not_stretched(bits):
    """Programs that make PNG files smaller store labels below 16 this way, and Pillow makes 0 … 255 of them."""
    import struct
    import zlib

    values = np.arange(8, dtype=np.uint8).reshape(2, 4) % 2**bits
    rows = b"".join(
        b"\0" + int("".join(f"{v:0{bits}b}" for v in row).ljust(16, "0"), 2).to_bytes(2, "big")[: -(-4 * bits // 8)]
        for row in values
    )

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode_map(data, "map"), values)


def test_colours_stay_colours():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    opaque = np.dstack([pixels, np.full((3, 4), 255, dtype=np.uint8)])
    for data in (png(pixels), png(opaque), array_bytes(pixels)):
        assert np.array_equal(decode_map(data, "map"), pixels)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"no picture", "not an image of a known format"),
        (png(np.random.default_rng(0).integers(0, 99, (60, 60), dtype=np.uint8))[:400], "truncated|broken|cannot"),
        (stored(Image.fromarray(VALUES), "JPEG"), "JPEG file, whose compression changes labels"),
        (stored(Image.fromarray(VALUES.astype(np.float32)), "TIFF"), "mode F"),
        (png(np.zeros((3, 4, 4), dtype=np.uint8)), "transparent"),
        (array_bytes(VALUES / 2), "float64 is no label map"),
        (array_bytes(np.zeros((2, 3, 4), dtype=np.uint8)), r"\(2, 3, 4\)"),
        (
            stored(Image.fromarray(VALUES), "TIFF", save_all=True, append_images=[Image.fromarray(VALUES)]),
            "has 2 pages",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_label_map_says_why(data, reason):
    with pytest.raises(CorruptImage, match=f"map: .*({reason})"):
        decode_map(data, "map")


def test_values_become_classes():
    values = np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8)
    labels = LabelRule(numbered_classes(4)).to_labels(values, "map")
    assert labels.dtype == torch.int64 and labels.tolist() == [[0, 1, 2], [3, IGNORED, 0]]
    reduced = LabelRule(numbered_classes(3), reduce_zero_label=True).to_labels(values, "map")
    assert reduced.tolist() == [[IGNORED, 0, 1], [2, IGNORED, IGNORED]]
    other = LabelRule(numbered_classes(300), ignore_index=3, reduce_zero_label=True).to_labels(values, "map")
    assert other.tolist() == [[IGNORED, 0, 1], [IGNORED, 254, IGNORED]]  # ignore_index is looked at first
    wide = LabelRule(numbered_classes(60_000), ignore_index=65_535)
    assert wide.to_labels(np.array([[255, 59_999, 65_535]], dtype=np.uint16), "map").tolist() == [
        [255, 59_999, IGNORED]
    ]


def test_a_value_that_no_class_has_is_named_with_its_place():
    values = np.array([[0, 1, 2], [3, 4, 0]], dtype=np.uint8)
    with pytest.raises(
        CorruptImage, match=r"a\.png: the value 4 in row 1, column 1 is no class: classes are 0 … 3, 255 is"
    ):
        LabelRule(numbered_classes(4)).to_labels(values, "a.png")
    with pytest.raises(CorruptImage, match=r"the value 4 .* classes are 1 … 3, 9 is ignored, and 0 is ignored"):
        LabelRule(numbered_classes(3), 9, reduce_zero_label=True).to_labels(values, "a.png")
    with pytest.raises(CorruptImage, match="the value -2 in row 0, column 0"):
        LabelRule(numbered_classes(3)).to_labels(np.array([[-2]], dtype=np.int16), "a.png")


def test_colours_are_looked_up():
    rule = LabelRule(class_list("camvid"))
    assert rule.classes.colours is not None
    labels = torch.randint(-1, 11, (20, 30), generator=torch.Generator().manual_seed(0))
    pixels = np.array([*rule.classes.colours, (0, 0, 0)], dtype=np.uint8)[labels.numpy()]
    assert torch.equal(rule.to_labels(pixels, "map"), labels)
    pixels[3, 4] = 1, 2, 3
    with pytest.raises(CorruptImage, match=r"the colour \(1, 2, 3\) in row 3, column 4 is no class"):
        rule.to_labels(pixels, "map")
    indices = np.where(labels < 0, 255, labels.numpy()).astype(np.uint8)
    assert torch.equal(rule.to_labels(indices, "map"), labels)  # a list with colours serves maps of indices too


def test_black_counts_where_it_is_the_colour_of_a_class():
    rule = LabelRule(ClassList(("ground", "house"), ((0, 0, 0), (255, 255, 255))))
    mask = np.array([[0, 255]], dtype=np.uint8)
    assert rule.to_labels(np.dstack([mask] * 3), "map").tolist() == [[0, 1]]
    assert rule.to_labels(mask, "map").tolist() == [[0, 1]]  # a list of greys is for grey masks too
    with pytest.raises(CorruptImage, match="the value 1 in row 0, column 0"):
        rule.to_labels(np.array([[1]], dtype=np.uint8), "map")


def test_three_equal_channels_are_one():
    rule = LabelRule(numbered_classes(3))
    same = np.dstack([np.array([[0, 2, 255]], dtype=np.uint8)] * 3)
    assert rule.to_labels(same, "map").tolist() == [[0, 2, IGNORED]]
    same[0, 0, 1] = 1
    with pytest.raises(CorruptImage, match="map of colours, but the list of classes gives no colours"):
        rule.to_labels(same, "map")
