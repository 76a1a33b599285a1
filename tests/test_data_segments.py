"""Images with label maps: which files belong together, what is checked, samples and batches (R-DOWN-2, R-CHAN-4)."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.segment_files import CLASSES, pair, save, shapes

from swinscale.data.images import CorruptImage
from swinscale.data.loader import EpochLoader
from swinscale.data.segment_transforms import segment_eval_transform, segment_train_transform
from swinscale.data.segments import IGNORED, SegmentDataset, open_segments
from swinscale.data.sources import split_source
from swinscale.errors import UsageError

SHARED = Path(__file__).parents[2] / "shared" / "data"
PLAIN = segment_eval_transform((0, 0, 0), (1, 1, 1))
LABELS = [[0, 1, 2, 255], [2, 2, 1, 0]]


@pytest.mark.parametrize(
    ("image", "label_map"),
    [
        ("images/training/x.jpg", "annotations/training/x.png"),
        ("train/x.jpg", "trainannot/x.png"),
        ("train/x.jpg", "train_labels/x.png"),
        ("images/train/x.jpg", "labels/train/x.png"),
        ("images/train/x.jpg", "masks/train/x.tif"),
        ("images/train/x.jpg", "gt/train/x.npy"),
        ("train/images/x.jpg", "train/labels/x.png"),
        ("img_dir/train/x.jpg", "ann_dir/train/x.png"),
        ("Challenge2016/images/training/x.jpg", "Challenge2016/annotations/training/x.png"),
        ("leftImg8bit/train/bonn/x.png", "gtFine/train/bonn/x.png"),
        ("images/x.jpg", "maps/x.png"),
        ("x.jpg", "labels/x.png"),
    ],
)
def test_layouts_are_found(tmp_path, image, label_map):
    pair(tmp_path, image, label_map, LABELS)
    splits = ("train",) if "rain" in image else ()
    if splits:
        pair(
            tmp_path, *(p.replace("training", "validation").replace("train", "val") for p in (image, label_map)), LABELS
        )
    source = open_segments(tmp_path, classes="3")
    assert (source.names, source.maps) == ([image], [label_map])
    assert source.splits == (("train", "val") if splits else ())
    assert SegmentDataset(source, PLAIN)[0, 0]["target"].tolist() == [[0, 1, 2, IGNORED], [2, 2, 1, 0]]
    if splits:
        assert open_segments(tmp_path, "val", classes="3").names != source.names


def test_lists_of_pascal_voc_say_the_parts(tmp_path):
    voc = tmp_path / "VOCdevkit/VOC2012"
    parts = {
        "train": ["2007_1", "2008_2"],
        "val": ["2009_3"],
        "trainval": ["2007_1", "2008_2", "2009_3"],
        "test": ["2010_5"],
    }
    for name in ("2007_1", "2008_2", "2009_3"):
        pair(voc, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", LABELS)
        save(voc / f"SegmentationObject/{name}.png", np.full((2, 4), 9, np.uint8))
    for name in ("2010_5", "2011_of_detection"):
        save(voc / f"JPEGImages/{name}.jpg", np.zeros((2, 4, 3), np.uint8))
    for part, names in parts.items():
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(names) + "\n")
    source = open_segments(tmp_path / "VOCdevkit", classes="3")
    assert [Path(name).stem for name in source.names] == [Path(name).stem for name in source.maps] == parts["train"]
    assert source.splits == ("train", "val") and all("SegmentationClass" in name for name in source.maps)
    assert (
        len(open_segments(voc, "val", classes="3")) == 1
        and len(open_segments(voc, "test", only_images=True, classes="3")) == 1
    )
    with pytest.raises(UsageError, match=r"The 'test' part of .* has images but no label maps"):
        open_segments(voc, "test", classes="3")
    (voc / "JPEGImages/2008_2.jpg").unlink()
    with pytest.raises(
        UsageError,
        match=r"1 pictures of the 'train' part of .*, which its list names, are not there; the first: 2008_2",
    ):
        open_segments(voc, classes="3")


def test_suffixes_choose_among_the_files_of_cityscapes(tmp_path):
    for city in ("bonn", "ulm"):
        pair(
            tmp_path,
            f"leftImg8bit/train/{city}/1_leftImg8bit.png",
            f"gtFine/train/{city}/1_gtFine_labelTrainIds.png",
            LABELS,
        )
        save(tmp_path / f"gtFine/train/{city}/1_gtFine_color.png", np.zeros((2, 4, 3), np.uint8))
        save(tmp_path / f"gtFine/train/{city}/1_gtFine_labelIds.png", np.full((2, 4), 33, np.uint8))
    source = open_segments(tmp_path, classes="3", image_suffix="_leftImg8bit", map_suffix="_gtFine_labelTrainIds")
    assert source.maps == [f"gtFine/train/{city}/1_gtFine_labelTrainIds.png" for city in ("bonn", "ulm")]
    with pytest.raises(
        UsageError, match=r"2 of 2 images .* have no label map; the first: .*image_suffix and map_suffix"
    ):
        open_segments(tmp_path, classes="3")


def test_suffixes_tell_maps_from_images_in_one_folder(tmp_path):
    pair(tmp_path, "train/1_sat.jpg", "train/1_mask.png", LABELS)
    source = open_segments(tmp_path, classes="3", image_suffix="_sat", map_suffix="_mask")
    assert (source.names, source.maps) == (["train/1_sat.jpg"], ["train/1_mask.png"])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("parts", [True, False])
def test_maps_in_another_place(tmp_path, inside, parts):
    """A folder with the same parts inside, or with the maps of all parts."""
    place = tmp_path / ("data/truth" if inside else "truth")
    for part, name in (("train", "a"), ("val", "b")):
        where = place / part if parts else place
        pair(tmp_path, f"data/{part}/{name}.jpg", str((where / f"{name}.png").relative_to(tmp_path)), LABELS)
    source = open_segments(tmp_path / "data", "val", maps=place, classes="3")
    assert source.names == ["val/b.jpg"] and source.maps == ["val/b.png" if parts else "b.png"]
    assert source.splits == ("train", "val")


def test_a_zip_file_is_as_good_as_a_folder(tmp_path):
    shapes(tmp_path / "a" / "set")
    shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path / "a")
    folder, archive = open_segments(tmp_path / "a"), open_segments(tmp_path / "b.zip")
    assert folder.names == archive.names and len(archive) == 8
    first, second = (SegmentDataset(pickle.loads(pickle.dumps(s)), PLAIN)[0, 3] for s in (folder, archive))
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["target"], second["target"])


def test_parts_of_maps_are_those_of_images_without_parts(tmp_path):
    pair(tmp_path, "images/a.jpg", "labels/train/a.png", LABELS)
    pair(tmp_path, "images/b.jpg", "labels/val/b.png", LABELS)
    source = open_segments(tmp_path, "val", classes="3")
    assert source.names == ["images/b.jpg"] and source.splits == ("train", "val")


def test_a_part_without_maps_is_none(tmp_path):
    shapes(tmp_path)
    save(tmp_path / "images/test/0.png", np.zeros((5, 5, 3), np.uint8))
    assert open_segments(tmp_path).splits == ("train", "val")
    with pytest.raises(UsageError, match=r"The 'test' part of .* has images but no label maps; both: train, val"):
        open_segments(tmp_path, "test")
    only = open_segments(tmp_path, "test", only_images=True, classes="3")
    assert only.names == ["images/test/0.png"] and only.maps == [] and only.splits == ("train", "val", "test")
    assert (SegmentDataset(only, PLAIN)[0, 0]["target"] == IGNORED).all()


def test_classes_come_from_a_file_or_from_the_maps_of_all_parts(tmp_path, caplog):
    shapes(tmp_path, {"training": 2})
    pair(tmp_path, "images/validation/0.jpg", "annotations/validation/0.png", [[0, 5]])
    with caplog.at_level(logging.INFO):
        training, held = open_segments(tmp_path), open_segments(tmp_path, "val")
    assert training.classes == held.classes == [f"class {i}" for i in range(6)]
    assert "Reading 3 label maps" in caplog.text
    assert len(open_segments(tmp_path, reduce_zero_label=True).classes) == 5
    (tmp_path / "classes.txt").write_text(CLASSES + "a,1,1,2\nb,1,1,3\nc,1,1,4\n")
    assert open_segments(tmp_path).classes == ["ground", "rectangle", "disc", "a", "b", "c"]
    assert open_segments(tmp_path, classes="9").classes[-1] == "class 8"


def test_what_is_missing_is_counted_and_named(tmp_path):
    shapes(tmp_path)
    (tmp_path / "annotations/training/3.png").unlink()
    with pytest.raises(UsageError, match=r"1 of 8 images of .* have no label map; the first: images/training/3\.png"):
        open_segments(tmp_path)
    (tmp_path / "images/training/3.png").unlink()
    (tmp_path / "images/training/5.png").unlink()
    with pytest.raises(
        UsageError, match=r"1 of 7 label maps of .* have no image; the first: annotations/training/5\.png"
    ):
        open_segments(tmp_path)
    assert len(open_segments(tmp_path, "val")) == 4  # the other part is as it should be


def test_two_files_for_one_are_a_mistake(tmp_path):
    shapes(tmp_path)
    shutil.copy(tmp_path / "images/training/1.png", tmp_path / "images/training/1.jpg")
    with pytest.raises(UsageError, match=r"1 images have the same name .*training/1\.jpg and images/training/1\.png"):
        open_segments(tmp_path)


def test_images_without_maps_say_what_was_looked_for(tmp_path):
    save(tmp_path / "photos/a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(
        UsageError, match=r"No label maps for the 1 images .*looked for images/training .*trainannot.*maps=PATH"
    ):
        open_segments(tmp_path / "photos")
    assert len(open_segments(tmp_path / "photos", only_images=True)) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="No images in"):
        open_segments(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"No such folder or zip file: .*foto\. Did you mean 'photos'"):
        open_segments(tmp_path / "foto")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="neither a folder nor a zip file"):
        open_segments(tmp_path / "a.txt")
    pair(tmp_path, "data/train/a.jpg", "data/trainannot/a.png", LABELS)
    with pytest.raises(UsageError, match="has no 'val' part, only train"):
        open_segments(tmp_path / "data", "val")


def test_sizes_that_differ_are_found_at_opening(tmp_path):
    shapes(tmp_path)
    save(tmp_path / "annotations/training/6.png", np.zeros((30, 40), np.uint8))
    save(tmp_path / "images/training/6.png", np.zeros((40, 30, 3), np.uint8))
    message = r"1 of 8 images .* images/training/6\.png has 40×30 .* annotations/training/6\.png 30×40"
    with pytest.raises(UsageError, match=message):
        open_segments(tmp_path)


def test_labels_that_no_class_has_are_found_at_opening(tmp_path):
    shapes(tmp_path)
    with pytest.raises(
        UsageError, match=r"annotations/training/1\.png: the value 2 .* classes are 0 … 1, 255 is ignored"
    ):
        open_segments(tmp_path, classes="2")
    with pytest.raises(UsageError, match=r"the value 255 .* 7 is ignored"):
        open_segments(tmp_path, classes="3", ignore_index=7)


def test_maps_of_0_and_255_are_not_taken_for_one_class(tmp_path):
    """R-DOWN-2: masks of an image editor; by default every pixel of the object would be ignored."""
    for name in "ab":
        pair(tmp_path, f"images/{name}.png", f"masks/{name}.png", [[0, 255], [255, 0]])
    for classes in ("", "2"):
        with pytest.raises(UsageError, match="lines 'background,0,0,0' and 'object,255,255,255'"):
            open_segments(tmp_path, classes=classes)
    (tmp_path / "classes.txt").write_text("background,0,0,0\nobject,255,255,255\n")
    assert SegmentDataset(open_segments(tmp_path), PLAIN)[0, 0]["target"].tolist() == [[0, 1], [1, 0]]


def test_maps_without_a_pixel_that_counts_are_refused(tmp_path):
    pair(tmp_path, "images/a.png", "masks/a.png", [[255, 255]])
    with pytest.raises(UsageError, match=r"Every pixel of 1 label maps .* is ignored"):
        open_segments(tmp_path, classes="3")


def test_maps_of_colours_need_a_list(tmp_path):
    save(tmp_path / "images/a.png", np.zeros((1, 3, 3), np.uint8))
    save(tmp_path / "labels/a.png", np.array([[(220, 40, 40), (40, 80, 220), (0, 0, 0)]], np.uint8))
    with pytest.raises(UsageError, match=r"labels/a\.png .* is a map of colours: give a list of classes with colours"):
        open_segments(tmp_path)
    (tmp_path / "classes.txt").write_text(CLASSES)
    assert SegmentDataset(open_segments(tmp_path), PLAIN)[0, 0]["target"].tolist() == [[1, 2, IGNORED]]


def test_a_map_that_fails_later_is_replaced_or_left_out(tmp_path):
    root = shapes(tmp_path, {"train": 4})
    (root / "annotations/train/1.png").write_bytes(b"no map")
    (root / "images/train/2.png").write_bytes(b"no image")
    source = open_segments(root, classes="3")
    sample = SegmentDataset(source, PLAIN)[0, 1]
    assert sample["name"] == "images/train/3.png" and sample["index"] == 1
    assert [name for name, _ in sample["skipped"]] == ["annotations/train/1.png", "images/train/2.png"]
    left_out = SegmentDataset(source, PLAIN, replace_corrupt=False)[0, 1]
    assert list(left_out) == ["skipped"]
    save(root / "annotations/train/1.png", np.full((5, 5), 77, np.uint8))  # after the look at labels
    with pytest.raises(CorruptImage, match=r"annotations/train/1\.png: the value 77|5×5"):
        SegmentDataset(source, PLAIN).decode(1)
    (root / "annotations/train/0.png").unlink()
    with pytest.raises(CorruptImage, match=r"annotations/train/0\.png: .*No such file"):
        SegmentDataset(source, PLAIN).decode(0)
    for name in ("0", "1", "2", "3"):
        save(root / f"images/train/{name}.png", np.zeros((5, 5, 3), np.uint8))
        save(root / f"annotations/train/{name}.jpg", np.zeros((5, 5), np.uint8))
        (root / f"annotations/train/{name}.png").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"None of 4 label maps .* can be read; the first: .*JPEG"):
        open_segments(root, classes="3")


def test_an_image_is_taken_the_way_up_that_fits_its_map(tmp_path):
    """The annotation may have been made on the stored pixels or on the turned picture (R-DOWN-2)."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90° to the right
    for name, size in (("stored", (6, 10)), ("turned", (10, 6))):
        path = save(tmp_path / f"images/{name}.png", pixels)
        Image.fromarray(pixels).save(path, exif=exif)
        save(tmp_path / f"labels/{name}.png", np.ones(size, np.uint8))
    dataset = SegmentDataset(open_segments(tmp_path, classes="2"), PLAIN)
    stored, turned = (dataset.decode(index)[0] for index in range(2))
    assert torch.equal(stored, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(turned, stored.transpose(1, 2).flip(2))
    save(tmp_path / "labels/turned.png", np.ones((10, 7), np.uint8))
    with pytest.raises(UsageError, match=r"turned\.png has 6×10 .* 10×7"):
        open_segments(tmp_path, classes="2")


def test_arrays_of_many_channels(tmp_path):
    """R-CHAN-4: whichever axis holds the channels."""
    for name, shape in (("a", (5, 7, 9)), ("b", (7, 9, 5))):
        save(tmp_path / f"images/{name}.npy", np.random.default_rng(0).random(shape, dtype=np.float32))
        save(tmp_path / f"labels/{name}.npy", np.ones((7, 9), np.int32))
    source = open_segments(tmp_path, classes="2")
    dataset = SegmentDataset(source, segment_eval_transform((0.5,) * 5, (1.0,) * 5), channels=5)
    assert all(dataset[0, i]["image"].shape == (5, 7, 9) and dataset[0, i]["target"].shape == (7, 9) for i in range(2))
    save(tmp_path / "labels/b.npy", np.ones((9, 7), np.int32))
    with pytest.raises(UsageError, match=r"images/b\.npy .* labels/b\.npy 9×7"):
        open_segments(tmp_path, classes="2")


def test_a_choice_and_a_split_keep_pairs_together(tmp_path):
    source = open_segments(shapes(tmp_path), classes="3")
    few = source.take([5, 2])
    assert [Path(n).stem for n in few.names] == [Path(m).stem for m in few.maps] == ["5", "2"]
    assert few.rule == source.rule and few.classes == source.classes
    training, held = split_source(source, 0.25, seed=1)
    assert len(training) == 6 and len(held) == 2 and not set(training.maps) & set(held.maps)
    assert [Path(n).stem for n in held.names] == [Path(m).stem for m in held.maps]


def test_the_fingerprint_knows_files_sizes_and_rule(tmp_path):
    shapes(tmp_path)
    first = open_segments(tmp_path, classes="3")
    assert first.fingerprint() == open_segments(tmp_path, classes="3").fingerprint()
    seen = {first.fingerprint(), first.take([0]).fingerprint(), open_segments(tmp_path, classes="4").fingerprint()}
    seen.add(open_segments(tmp_path, classes="3", reduce_zero_label=True).fingerprint())
    map_file = tmp_path / "annotations/training/0.png"
    map_file.write_bytes(map_file.read_bytes() + b"\0")
    seen.add(open_segments(tmp_path, classes="3").fingerprint())
    assert len(seen) == 5


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    source = open_segments(shapes(tmp_path), classes="3")
    augmented = segment_train_transform((0.5,) * 3, (0.2,) * 3, augment="published", crop=(32, 40), short=48, long=96)
    dataset = SegmentDataset(source, augmented, seed=3)
    state = torch.get_rng_state()
    first = dataset[4, 1]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = pickle.loads(pickle.dumps(dataset))[4, 1]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["target"], again["target"])
    assert not any(torch.equal(dataset[epoch, 1]["image"], first["image"]) for epoch in range(4))
    assert not torch.equal(SegmentDataset(source, augmented, seed=4)[4, 1]["image"], first["image"])


def test_a_batch_is_padded_and_knows_the_sizes(tmp_path):
    root = shapes(tmp_path, {"train": 4})
    (root / "images/train/2.png").write_bytes(b"no image")
    dataset = SegmentDataset(open_segments(root), PLAIN, replace_corrupt=False)
    batch = next(EpochLoader(dataset, 4, shuffle=False, drop_last=False).batches(0))
    samples = [dataset[0, i] for i in (0, 1, 3)]
    height, width = (max(s["target"].shape[i] for s in samples) for i in range(2))
    assert batch["image"].shape == (3, 3, height, width) and batch["target"].shape == (3, height, width)
    assert batch["size"].tolist() == [list(s["target"].shape) for s in samples]
    assert batch["name"] == [f"images/train/{i}.png" for i in (0, 1, 3)] and batch["index"].tolist() == [0, 1, 3]
    assert [name for name, _ in batch["skipped"]] == ["images/train/2.png"]
    for image, target, sample in zip(batch["image"], batch["target"], samples, strict=True):
        h, w = sample["target"].shape
        assert torch.equal(image[:, :h, :w], sample["image"]) and torch.equal(target[:h, :w], sample["target"])
        assert not image[:, h:].any() and not image[:, :, w:].any()
        assert (target[h:] == IGNORED).all() and (target[:, w:] == IGNORED).all()
    nothing = SegmentDataset.collate([{"skipped": [("a", "b")]}])
    assert nothing["image"].numel() == 0 and nothing["target"].numel() == 0 and nothing["name"] == []
    assert nothing["size"].shape == (0, 2) and nothing["skipped"] == [("a", "b")]


def test_camvid_opens_as_it_is():
    root = SHARED / "camvid"
    if not root.is_dir():
        pytest.skip("no shared data")
    source = open_segments(root, "test", classes="camvid", ignore_index=11)
    assert len(source) == 233 and source.splits == ("train", "val", "test")
    sample = SegmentDataset(source, PLAIN)[0, 17]
    assert sample["image"].shape == (3, 360, 480) and sample["target"].shape == (360, 480)
    assert set(sample["target"].unique().tolist()) <= set(range(-1, 11))
    with pytest.raises(UsageError, match=r"the value 11 .* classes are 0 … 10, 255 is ignored"):
        open_segments(root, "test", classes="camvid")


def test_ade20k_opens_as_it_is():
    root = SHARED / "ade20k-sample"
    if not root.is_dir():
        pytest.skip("no shared data")
    source = open_segments(root, classes="ade20k", reduce_zero_label=True)
    target = SegmentDataset(source, PLAIN)[0, 0]["target"]
    shares = {source.classes[label]: int((target == label).sum()) for label in target.unique().tolist() if label >= 0}
    assert set(shares) == {"wall", "building", "sky", "tree", "road", "grass", "plant"}
    assert sorted(shares, key=lambda name: -shares[name])[:2] == [
        "sky",
        "building",
    ]  # a house of stone below a blue sky
