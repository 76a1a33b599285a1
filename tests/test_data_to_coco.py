"""Pascal VOC and mask files as COCO files, and what is said about those that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinscale.data.coco import instance_mask, open_coco
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import detection_eval_transform
from swinscale.data.to_coco import Counts, to_coco
from swinscale.errors import UsageError

CAR = "<object><name>car</name><bndbox><xmin>1</xmin><ymin>3</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>"
DOG = (
    "<object><name>dog</name><difficult>1</difficult><part><name>head</name><bndbox><xmin>6</xmin></bndbox></part>"
    "<bndbox><xmin>5.5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>"
)


def picture(path: Path, height: int = 30, width: int = 40, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, exif=exif)


def voc(
    root: Path, objects: str, name: str = "a", size: tuple[int, int] = (30, 40), folder: str = "Annotations"
) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    file = root / folder / f"{name}.xml"
    file.write_text(
        f"<annotation><filename>{name}.jpg</filename><size><width>{size[1]}</width><height>{size[0]}</height>"
        f"<depth>3</depth></size>{objects}</annotation>"
    )
    return file


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def blocks(*values: int, dtype: type = np.uint8) -> np.ndarray:
    """A map of 30×40 with a square of 6×5 pixels for each value, at (2, 3), (12, 3) …"""
    made = np.zeros((30, 40), dtype)
    for i, value in enumerate(values):
        made[3:8, 2 + 10 * i : 8 + 10 * i] = value
    return made


def test_voc_corners_become_boxes_that_hold_both(tmp_path):
    voc(tmp_path, CAR + DOG)
    voc(tmp_path, "", "b")
    for name in "ab":
        picture(tmp_path / f"JPEGImages/{name}.jpg")
    out = tmp_path / "annotations" / "all.json"
    assert to_coco(tmp_path, out) == Counts(images=2, annotations=2, classes=2, left_out=0)
    source = open_coco(out)
    assert source.classes == ["car", "dog"] and len(source) == 2 and source.annotations[1] == []
    first, second = source.annotations[0]
    assert first["bbox"] == [0, 2, 10, 18] and first["area"] == 180 and second["bbox"] == [4.5, 4, 35.5, 26]
    assert (first["difficult"], second["difficult"]) == (0, 1) and "segmentation" not in first
    assert source.read(0) == (tmp_path / "JPEGImages/a.jpg").read_bytes()
    sample = DetectionDataset(source, detection_eval_transform((0.5,), (0.5,), None), masks=False)[0, 0]
    assert torch.equal(sample["boxes"][0], torch.tensor([0.0, 2, 10, 20]))
    assert to_coco(tmp_path, out, skip_difficult=True) == Counts(images=2, annotations=1, classes=1, left_out=1)
    assert [file.name for file in out.parent.iterdir()] == ["all.json"]


@pytest.mark.parametrize(("xml", "images"), [("Annotations", "images"), ("Annotations", "Annotations"), (".", ".")])
def test_where_voc_images_may_be(tmp_path, xml, images):
    voc(tmp_path / "data", CAR, folder=xml)
    picture(tmp_path / "data" / images / "a.jpg")
    out = tmp_path / "elsewhere" / "cars.json"
    to_coco(tmp_path / "data", out)
    assert open_coco(out).read(0) == (tmp_path / "data" / images / "a.jpg").read_bytes()


def test_a_turned_photo_has_the_size_that_its_boxes_were_drawn_on(tmp_path):
    voc(tmp_path, CAR, size=(40, 30))
    picture(tmp_path / "JPEGImages/a.jpg", 30, 40, orientation=6)
    to_coco(tmp_path, tmp_path / "a.json")
    source = open_coco(tmp_path / "a.json")
    assert source.images[0][1:] == (40, 30)
    assert DetectionDataset(source, None).decode(0).shape == (3, 40, 30)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (CAR.replace("<xmax>10", "<xmax>ten"), r"a\.xml: <bndbox/xmax> should be a number, not 'ten'"),
        (CAR.replace("<xmin>1</xmin>", ""), r"a\.xml: <bndbox/xmin> should be a number, not None"),
        (CAR.replace("<ymax>20", "<ymax>2"), r"a\.xml: object 'car' has the corners 1, 3 and 10, 2"),
        (CAR.replace("car", " "), r"a\.xml: an <object> has no <name>"),
        ("<object>", r"a\.xml is not an XML file"),
        ("", "there is no annotation in any of 1 images"),
    ],
)
def test_a_wrong_voc_file_is_named(tmp_path, objects, message):
    voc(tmp_path, objects)
    picture(tmp_path / "JPEGImages/a.jpg")
    with pytest.raises(UsageError, match=message):
        to_coco(tmp_path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_voc_file_without_its_image_or_with_another_size_is_named(tmp_path):
    file = voc(tmp_path, CAR, size=(31, 40))
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(UsageError, match=r"a\.xml: its image is in none of .*JPEGImages"):
        to_coco(tmp_path, tmp_path / "out.json")
    picture(tmp_path / "JPEGImages/a.jpg")
    with pytest.raises(UsageError, match=r"a\.xml is for 31×40 pixels, .*a\.jpg has 30×40"):
        to_coco(tmp_path, tmp_path / "out.json")
    voc(tmp_path, CAR, size=(0, 0))  # some tools leave it out
    assert to_coco(tmp_path, tmp_path / "out.json").annotations == 1
    file.write_text("<html></html>")
    with pytest.raises(UsageError, match="no Pascal VOC annotation: its outer element is <html>"):
        to_coco(tmp_path, tmp_path / "out.json")
    (tmp_path / "JPEGImages/b.jpg").write_bytes(b"broken")
    voc(tmp_path, CAR)
    voc(tmp_path, CAR, "b")
    with pytest.raises(UsageError, match=r"b\.jpg cannot be read as an image"):
        to_coco(tmp_path, tmp_path / "out.json")


def test_masks_one_instance_or_one_per_value(tmp_path):
    for name in ("a", "a-b", "c"):
        picture(tmp_path / f"images/{name}.jpg")
    save(tmp_path / "masks/cat/a.png", blocks(255))
    save(tmp_path / "masks/cat/a-b-2.png", blocks(1, 2, 1))
    save(tmp_path / "masks/dog/a-left.png", blocks(0, 7, 300, dtype=np.uint16))
    save(tmp_path / "masks/dog/a-right.png", blocks(0, 0, 0))
    out = tmp_path / "annotations.json"
    assert to_coco(tmp_path, out) == Counts(images=3, annotations=5, classes=2, left_out=1)
    source = open_coco(out, masks=True)
    assert source.names == ["images/a-b.jpg", "images/a.jpg", "images/c.jpg"] and source.problems == []
    both, cat_and_dogs, nothing = source.annotations
    assert [(a["label"], a["bbox"], a["area"]) for a in both] == [(0, [2, 3, 26, 5], 60), (0, [12, 3, 6, 5], 30)]
    assert [(a["label"], a["bbox"][0]) for a in cat_and_dogs] == [(0, 2), (1, 12), (1, 22)] and nothing == []
    assert isinstance(both[0]["segmentation"]["counts"], str)
    assert torch.equal(instance_mask(both[0], 30, 40), torch.from_numpy(blocks(1, 0, 1) > 0))
    json.loads(out.read_text())


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "LA"])
def test_masks_in_the_modes_that_programs_save(tmp_path, mode):
    picture(tmp_path / "images/a.jpg")
    (tmp_path / "masks/cat").mkdir(parents=True)
    Image.fromarray(blocks(255)).convert(mode).save(tmp_path / "masks/cat/a.png")
    to_coco(tmp_path, tmp_path / "out.json", "masks")
    [annotation] = open_coco(tmp_path / "out.json", masks=True).annotations[0]
    assert torch.equal(instance_mask(annotation, 30, 40), torch.from_numpy(blocks(1) > 0))


def test_wrong_mask_files_are_named(tmp_path):
    picture(tmp_path / "images/a.jpg")
    mask, out = tmp_path / "masks/cat/a.png", tmp_path / "out.json"
    save(mask, blocks(1)[:20])
    with pytest.raises(UsageError, match=r"cat/a\.png has 20×40 pixels, its image .*a\.jpg 30×40"):
        to_coco(tmp_path, out)
    save(mask, blocks(3, 128, 255))
    with pytest.raises(UsageError, match=r"cat/a\.png has 3 values up to 255, like a mask with soft edges"):
        to_coco(tmp_path, out)
    save(mask, np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    with pytest.raises(UsageError, match=r"cat/a\.png is a coloured picture"):
        to_coco(tmp_path, out)
    mask.write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"cat/a\.png cannot be read"):
        to_coco(tmp_path, out)
    mask.rename(mask.with_name("b-1.png"))
    with pytest.raises(UsageError, match=r"b-1\.png: there is no image of this name"):
        to_coco(tmp_path, out)


def test_folders_of_no_known_kind(tmp_path):
    with pytest.raises(UsageError, match="holds neither"):
        to_coco(tmp_path, tmp_path / "out.json")
    with pytest.raises(UsageError, match="No such folder"):
        to_coco(tmp_path / "nowhere", tmp_path / "out.json")
    with pytest.raises(UsageError, match="no name of a JSON file"):
        to_coco(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="kind='yolo' is unknown"):
        to_coco(tmp_path, tmp_path / "out.json", "yolo")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds no XML files"):
        to_coco(tmp_path, tmp_path / "out.json", "voc")
    with pytest.raises(UsageError, match="has no folder 'images'"):
        to_coco(tmp_path, tmp_path / "out.json", "masks")


def test_real_coco_masks_survive_the_way_through_files(shared_data, tmp_path):
    """COCO → a mask file per instance → COCO: boxes follow from masks, masks are the same bit for bit."""
    if not (shared_data / "coco").is_dir():
        pytest.skip("COCO is not beside this checkout")
    source = open_coco(shared_data / "coco", "val", masks=True).take(range(4))
    before = {}
    for index, name in enumerate(source.names):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(source.read(index))
        for annotation in source.annotations[index]:
            mask = instance_mask(annotation, *source.images[index][1:])
            label = source.classes[annotation["label"]]
            if mask.any():
                before[name, label, annotation["id"]] = mask
                save(
                    tmp_path / f"masks/{label}/{Path(name).stem}-{annotation['id']}.png", mask.numpy().astype(np.uint8)
                )
    assert to_coco(tmp_path, tmp_path / "out.json").annotations == len(before) > 5
    again = open_coco(tmp_path / "out.json", masks=True)
    for index, name in enumerate(again.names):
        found = [
            (again.classes[a["label"]], instance_mask(a, *again.images[index][1:])) for a in again.annotations[index]
        ]
        kept = [(label, mask) for (of, label, _), mask in before.items() if of == Path(name).name]
        assert len(found) == len(kept)
        assert all(any(label == other and torch.equal(mask, same) for other, same in found) for label, mask in kept)
