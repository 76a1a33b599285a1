"""COCO files: layouts, checks, masks in each of the three forms, and the mistakes people make (R-DOWN-2)."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.coco_files import SQUARE, content, entry, write

from swinscale.data.coco import instance_mask, open_coco
from swinscale.errors import UsageError


def test_a_folder_in_coco_layout(tmp_path):
    source = open_coco(write(tmp_path, [entry(1), entry(5, image_id=2, category_id=3)]), masks=True)
    assert source.names == ["1.png", "2.png"]
    assert source.classes == ["dog", "cat"] and source.category_ids == [3, 7]
    assert [image.id for image in source.images] == [1, 2] and source.images[0].height == 40
    assert [a["label"] for i in range(2) for a in source.annotations[i]] == [1, 0]
    assert source.read(1) == (tmp_path / "train2017/2.png").read_bytes()
    assert source.splits == ("train",) and source.problems == []
    assert sorted(source.epoch_order(np.random.default_rng(0))) == [0, 1] and source.substitute(1, 1) == 0


def test_a_split_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="no 'val' part, only train"):
        open_coco(write(tmp_path, [entry(1)]), "val")


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("annotations/val.json", "images"),
        ("valid.json", "."),
        ("valid/_annotations.coco.json", "valid"),
        ("annotations/instances_validation.json", "images/val"),
    ],
)
def test_layouts_of_folders(tmp_path, file, images):
    root = write(tmp_path / "source", [entry(1)])
    (tmp_path / "data" / images).mkdir(parents=True, exist_ok=True)
    (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
    for picture in (root / "train2017").iterdir():
        shutil.copy(picture, tmp_path / "data" / images)
    shutil.copy(root / "annotations/instances_train2017.json", tmp_path / "data" / file)
    (tmp_path / "data" / file).with_name("captions_val2017.json").write_text("{}")  # another kind of file, left alone
    source = open_coco(tmp_path / "data", "val")
    assert source.read(0) == (root / "train2017/1.png").read_bytes()
    assert source.splits == ("val",)


@pytest.mark.parametrize("images", [".", "images", "birds", "train"])
def test_a_json_file_finds_its_images(tmp_path, images):
    write(tmp_path / "source", [entry(1)])
    shutil.copytree(tmp_path / "source/train2017", tmp_path / images, dirs_exist_ok=True)
    shutil.move(tmp_path / "source/annotations/instances_train2017.json", tmp_path / "birds.json")
    shutil.rmtree(tmp_path / "source")
    assert len(open_coco(tmp_path / "birds.json").read(0)) > 0


def test_images_and_annotations_in_two_places(tmp_path):
    root = write(tmp_path / "a", [entry(1)])
    shutil.move(root / "annotations/instances_train2017.json", tmp_path / "labels.json")
    source = open_coco(root / "train2017", annotations=tmp_path / "labels.json")
    assert source.read(0) == (root / "train2017/1.png").read_bytes()


def test_several_files_for_a_split_are_listed(tmp_path):
    write(tmp_path, [entry(1)])
    shutil.copy(tmp_path / "annotations/instances_train2017.json", tmp_path / "annotations/instances_train2014.json")
    with pytest.raises(
        UsageError, match=r"instances_train2014\.json, annotations/instances_train2017\.json\. Name one"
    ):
        open_coco(tmp_path)


def test_taking_and_sending_a_source(tmp_path):
    source = open_coco(write(tmp_path, [entry(1), entry(2, image_id=2), entry(3, image_id=2)]))
    second = pickle.loads(pickle.dumps(source.take([1])))
    assert second.names == ["2.png"] and [a["id"] for a in second.annotations[0]] == [2, 3]
    assert second.classes == source.classes and second.images[0].id == 2
    assert second.read(0) == source.read(1)
    assert len({source.fingerprint(), second.fingerprint(), source.take([0]).fingerprint()}) == 3
    with pytest.raises(IndexError):
        second.annotations[1]


def test_many_annotations_are_few_objects_to_send(tmp_path):
    """Beside the bytes of the annotations, what is sent to a loader process does not grow with them."""
    few = open_coco(write(tmp_path / "few", [entry(1)]))
    many = open_coco(write(tmp_path / "many", [entry(i) for i in range(1, 400)]))
    assert len(many.annotations[0]) == 399
    stored = len(many.annotations._blob) - len(few.annotations._blob)
    assert len(pickle.dumps(many)) - len(pickle.dumps(few)) < stored + 200


def test_the_fingerprint_depends_on_the_annotations(tmp_path):
    a = open_coco(write(tmp_path / "a", [entry(1)])).fingerprint()
    assert a == open_coco(write(tmp_path / "b", [entry(1)])).fingerprint()
    assert a != open_coco(write(tmp_path / "c", [entry(1, bbox=[10, 10, 20, 15])])).fingerprint()


def uncompressed(mask: np.ndarray) -> dict[str, object]:
    """The run-length code of a mask: lengths of runs down the columns, zeros first."""
    flat = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    return {"size": list(mask.shape), "counts": counts}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_masks_of_both_run_length_codes_are_exact(height, width, seed):
    from faster_coco_eval.core import mask as api

    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    code = uncompressed(mask)
    assert torch.equal(instance_mask({"segmentation": code}, height, width), torch.from_numpy(mask))
    short = api.frPyObjects(code, height, width)["counts"].decode()
    for counts in (short, short.encode()):
        decoded = instance_mask({"segmentation": {"size": [height, width], "counts": counts}}, height, width)
        assert torch.equal(decoded, torch.from_numpy(mask))


def test_the_mask_of_polygons_is_their_union():
    expected = torch.zeros(40, 48, dtype=torch.bool)
    expected[10:26, 10:30] = True
    assert torch.equal(instance_mask({"segmentation": SQUARE}, 40, 48), expected)
    assert torch.equal(instance_mask({"segmentation": SQUARE[0]}, 40, 48), expected)
    expected[30:35, 2:8] = True
    two = [*SQUARE, [2, 30, 8, 30, 8, 35, 2, 35]]
    assert torch.equal(instance_mask({"segmentation": two}, 40, 48), expected)


def test_a_polygon_far_outside_is_cut_and_costs_nothing():
    mask = instance_mask({"segmentation": [[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]]}, 40, 48)
    assert mask.all()


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, float("nan"), 2, 3, 3]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4]],
        {"size": [40, 48], "counts": [3, 4]},
        {"size": [40, 48], "counts": "02"},
        {"size": [40, 48], "counts": "zzz"},
        {"size": [40, 48]},
        {"size": [48, 40], "counts": [1920]},
        None,
    ],
)
def test_a_mask_that_cannot_be_decoded_names_its_annotation(segmentation):
    with pytest.raises(UsageError, match="nnotation 12 "):
        instance_mask({"id": 12, "segmentation": segmentation}, 40, 48)


def test_crowds_and_images_without_annotations_stay(tmp_path):
    crowd = entry(1, iscrowd=1, segmentation={"size": [40, 48], "counts": [100, 50, 1770]})
    source = open_coco(write(tmp_path, [crowd]), masks=True)
    assert source.annotations[0][0]["iscrowd"] == 1 and source.annotations[1] == []
    assert instance_mask(source.annotations[0][0], 40, 48).sum() == 50


def test_boxes_without_masks(tmp_path):
    root = write(tmp_path, [entry(4, segmentation=None, area=None, iscrowd=None)])
    annotation = open_coco(root).annotations[0][0]
    assert annotation["area"] == 320 and annotation["iscrowd"] == 0
    with pytest.raises(UsageError, match=r"annotation 4 of 1\.png has no segmentation.*task\.masks=false"):
        open_coco(root, masks=True)


def test_the_area_that_is_not_given_is_that_of_the_mask(tmp_path):
    triangle = [[10, 10, 30, 10, 10, 26]]
    annotation = open_coco(write(tmp_path, [entry(1, segmentation=triangle, area=None)]), masks=True).annotations[0][0]
    assert annotation["area"] == instance_mask(annotation, 40, 48).sum() < 200


def test_boxes_beyond_the_image_are_clipped_and_counted(tmp_path):
    entries = [entry(1, bbox=[-5, 10, 20, 100]), entry(2, bbox=[40, 0, 20, 10]), entry(3, bbox=[0, 0, 48.4, 40])]
    source = open_coco(write(tmp_path, entries))
    assert [a["bbox"] for a in source.annotations[0]] == [[0, 10, 15, 30], [40, 0, 8, 10], [0, 0, 48.4, 40]]
    [(what, reason)] = source.problems
    assert what == "2 annotations" and "clipped" in reason and "annotation 1 of 1.png" in reason


def test_what_has_no_area_is_left_out_and_counted(tmp_path):
    line, dot = [[10, 10, 30, 10]], [[1, 1]]
    entries = [
        *(entry(1, bbox=[10, 10, 0, 5]), entry(2, bbox=[60, 10, 5, 5]), entry(3, segmentation=line)),
        entry(4, segmentation=[*line, *SQUARE, *dot]),
    ]
    source = open_coco(write(tmp_path, entries), masks=True)
    [left] = source.annotations[0]
    assert left["id"] == 4 and left["segmentation"] == SQUARE
    problems = {what + " " + reason for what, reason in source.problems}
    assert problems == {
        "2 annotations have a box without area in the image and are left out; the first: annotation 1 of 1.png",
        "2 annotations have polygons of fewer than 3 points, which are left out; the first: annotation 3 of 1.png",
    }
    assert [a["id"] for a in open_coco(tmp_path).annotations[0]] == [3, 4]  # without masks, polygons do not matter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 5}, r"annotation 9 of 1\.png is of category_id 5,"),
        ({"category_id": [7]}, r"annotation 9 of 1\.png is of category_id \[7\],"),
        ({"image_id": 77}, "annotation 9 is of image_id 77,"),
        ({"image_id": "1"}, "annotation 9 is of image_id '1',"),
        ({"bbox": None}, r"annotation 9 of 1\.png has no 'bbox' of 4 numbers"),
        ({"bbox": [1, 2, 3]}, "has no 'bbox' of 4 numbers.*1, 2, 3"),
        ({"bbox": [1, 2, 3, float("nan")]}, "has no 'bbox' of 4 numbers"),
        ({"segmentation": {"size": [48, 40], "counts": [1920]}}, r"mask of size \[48, 40\], its image is \[40, 48\]"),
        ({"segmentation": {"size": [40, 48], "counts": [5, 5]}}, "'counts' that do not fit"),
        ({"segmentation": {"size": [40, 48], "counts": "é"}}, "'counts' that do not fit"),
        ({"segmentation": {"size": [40, 48]}}, "'counts' that do not fit"),
        ({"segmentation": [["1", "2", "3", "4", "5", "6"]]}, "neither polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "neither polygons"),
        ({"segmentation": "mask.png"}, "neither polygons"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path, changes, message):
    root = write(tmp_path, [entry(1), entry(9, **changes)])
    with pytest.raises(UsageError, match=message) as error:
        open_coco(root, masks=True)
    assert "\n" not in str(error.value) and "instances_train2017.json" in str(error.value)


def test_ids_that_are_missing_or_repeated_are_named(tmp_path):
    root = write(tmp_path, [entry(1), entry(1)])
    with pytest.raises(UsageError, match="2 annotation entries have the id 1"):
        open_coco(root)
    file = root / "annotations/instances_train2017.json"
    for kind, name in (("images", "image"), ("categories", "category")):
        made = content([(40, 48)], [])
        made[kind] = made[kind] * 2
        file.write_text(json.dumps(made))
        with pytest.raises(UsageError, match=f"2 {name} entries have the id"):
            open_coco(root)
    made = content([(40, 48)], [])
    del made["images"][0]["id"]
    file.write_text(json.dumps(made))
    with pytest.raises(UsageError, match="image number 1 of 1 has no 'id'"):
        open_coco(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "is no COCO detection file: it has no list 'images'"),
        ('{"images": [], "categories": []}', "no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "category 1 has no 'name'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lists no images"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "image 1 needs a 'file_name', and 'height'",
        ),
    ],
)
def test_a_file_of_another_kind_says_so(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_coco(tmp_path / "a.json")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UsageError, match="is not a JSON file"):
        open_coco(tmp_path / "a.json")


def test_missing_files_are_counted_and_the_first_is_named(tmp_path):
    root = write(tmp_path, [entry(1)], [(40, 48)] * 4)
    (root / "train2017/2.png").unlink()
    (root / "train2017/4.png").unlink()
    with pytest.raises(UsageError, match=r"2 of the 4 images of .* are not in .*train2017; the first: 2\.png"):
        open_coco(root)
    shutil.rmtree(root / "train2017")
    with pytest.raises(UsageError, match=r"None of the 4 images .* is there: 1\.png is not in"):
        open_coco(root)
    with pytest.raises(UsageError, match=r"No such folder or JSON file: .*Did you mean"):
        open_coco(root / "annotations/instances_train2071.json")
    with pytest.raises(UsageError, match="has no COCO annotations"):
        open_coco(Path(__file__).parent)


def test_without_the_package_for_masks_boxes_still_open(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    root = write(tmp_path, [entry(1)])
    annotation = open_coco(root).annotations[0][0]
    with pytest.raises(UsageError, match=r"pip install 'swinscale\[detect\]'"):
        instance_mask(annotation, 40, 48)


def test_real_coco_opens_and_its_masks_fit_their_boxes_and_areas(shared_data):
    if not (shared_data / "coco").is_dir():
        pytest.skip("COCO is not beside this checkout")
    source = open_coco(shared_data / "coco", "val", masks=True)
    assert len(source) == 49 and len(source.classes) == 80 and source.category_ids[-1] == 90
    assert source.splits == ("train", "val") and source.problems == []
    off = []
    for index, image in enumerate(source.images):
        for annotation in source.annotations[index]:
            mask = instance_mask(annotation, image.height, image.width)
            if annotation["area"] < 200 or annotation["iscrowd"]:
                continue
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            x, y, width, height = annotation["bbox"]
            off.append((found - torch.tensor([x, y, x + width, y + height])).abs().max())
            assert abs(mask.sum() - annotation["area"]) < 0.2 * annotation["area"]
    assert len(off) > 250 and torch.stack(off).quantile(0.95) < 1.01  # the thin tips of some cover no pixel
