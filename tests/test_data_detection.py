"""Images with boxes and masks: samples, batches, augmentation; boxes and masks keep to the image (R-DOWN-2)."""

from __future__ import annotations

import copy
import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.coco_files import entry, write
from torch import Tensor

from swinscale.data.coco import open_coco
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import (
    IGNORED,
    detection_eval_transform,
    detection_train_transform,
    fitted_size,
    flip,
    pad,
    resample,
)
from swinscale.data.images import CorruptImage
from swinscale.data.instance_paste import fill_holes, mask_boxes, move_instances, touching
from swinscale.errors import UsageError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
PLAIN = detection_eval_transform((0, 0, 0), (1, 1, 1), short=None)
AUGMENT = ("none", "flip", "multiscale", "crop", "large-scale-jitter")


def small(augment: Any, **changes: Any) -> Any:
    settings = {"short": (24, 32, 40), "long": 60, "crop": (16, 30), "jitter_size": (48, 64), "jitter": (0.3, 2.0)}
    return detection_train_transform(MEAN, STD, augment=augment, **(settings | changes))


def scene(height: int = 60, width: int = 80, semantic: bool = True) -> dict[str, Tensor]:
    """Three bright rectangles on black, each of a colour of its own, with exact boxes and masks."""
    boxes = torch.tensor([[5, 6, 25, 26], [40, 10, 70, 30], [30, 40, 50, 58]])
    image, masks = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(3, height, width, dtype=torch.bool)
    classes = torch.full((height, width), 9)
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        image[i, y1:y2, x1:x2] = 200
        masks[i, y1:y2, x1:x2] = True
        classes[y1:y2, x1:x2] = i
    sample = {"image": image, "boxes": boxes.float(), "labels": torch.arange(3), "masks": masks}
    return sample | ({"semantic": classes} if semantic else {})


def images_seen(dataset: DetectionDataset, epoch: int = 0) -> list[Tensor]:
    return [dataset[epoch, index]["image"] for index in range(len(dataset))]


def test_a_sample_holds_the_image_and_what_is_in_it(tmp_path):
    crowd = entry(3, iscrowd=1, bbox=[0, 0, 40, 30])
    source = open_coco(write(tmp_path, [entry(1), entry(2, category_id=3, bbox=[-9, 0, 20, 30]), crowd]), masks=True)
    sample = DetectionDataset(source, PLAIN)[0, 0]
    assert sample["image"].shape == (3, 40, 48) and sample["image"].dtype == torch.float32
    assert torch.equal(sample["boxes"], torch.tensor([[10.0, 10, 30, 26], [0, 0, 11, 30]]))
    assert sample["labels"].tolist() == [1, 0]
    assert sample["masks"].shape == (2, 40, 48) and sample["masks"].dtype == torch.bool
    assert [a["id"] for a in sample["annotations"]] == [1, 2, 3]
    assert sample["image_id"] == 1 and sample["original_size"].tolist() == [40, 48] and sample["index"] == 0
    assert all(type(sample[name]) is Tensor for name in ("image", "boxes", "labels", "masks"))
    empty = DetectionDataset(source, PLAIN, semantic="instances")[0, 1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 40, 48) and empty["annotations"] == []
    assert (empty["semantic"] == 2).all()


@pytest.mark.parametrize("augment", AUGMENT)
def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path, augment):
    source = open_coco(write(tmp_path, [entry(1), entry(2, image_id=2)]), masks=True)
    dataset = DetectionDataset(source, small(augment, paste=0.5), seed=3)
    state, (python, numpy) = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1].copy())
    first = dataset[4, 1]
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()
    torch.manual_seed(99)
    again = pickle.loads(pickle.dumps(dataset))[4, 1]
    for name in ("image", "boxes", "labels", "masks"):
        assert torch.equal(first[name], again[name])
    others = [dataset[epoch, 1]["image"] for epoch in range(20)] + [
        DetectionDataset(source, small(augment))[4, 1]["image"]
    ]
    different = any(other.shape != first["image"].shape or not torch.equal(other, first["image"]) for other in others)
    assert different  # even "none" moves instances, since paste is on


def test_without_masks_no_segmentation_is_needed(tmp_path):
    source = open_coco(write(tmp_path, [entry(1, segmentation=None)]))
    sample = DetectionDataset(source, small("multiscale"), masks=False)[0, 0]
    assert len(sample["boxes"]) == 1 and "masks" not in sample


def test_moving_instances_uses_masks_that_the_sample_does_not_hold(tmp_path):
    source = open_coco(write(tmp_path, [entry(1)]))
    sample = DetectionDataset(source, small("none", paste=1.0), masks=False)[0, 0]
    still = DetectionDataset(source, small("none"), masks=False)[0, 0]
    assert "masks" not in sample and not torch.equal(sample["boxes"], still["boxes"])


def test_an_unreadable_image_is_replaced_or_left_out(tmp_path):
    root = write(tmp_path, [entry(1), entry(2, image_id=2)])
    (root / "train2017/1.png").write_bytes(b"no image")
    source = open_coco(root)
    sample = DetectionDataset(source, PLAIN)[0, 0]
    assert sample["image_id"] == 2 and sample["index"] == 0 and [a["id"] for a in sample["annotations"]] == [2]
    assert sample["skipped"] == [("1.png", "not an image of a known format")]
    assert DetectionDataset(source, PLAIN, replace_corrupt=False)[0, 0] == {"skipped": sample["skipped"]}
    (root / "train2017/2.png").unlink()
    both = DetectionDataset(source, PLAIN)[0, 0]
    assert [name for name, _ in both["skipped"]] == ["1.png", "2.png"] and "image" not in both


def test_a_mask_that_cannot_be_decoded_skips_its_image(tmp_path):
    short = {"size": [40, 48], "counts": "02"}
    source = open_coco(write(tmp_path, [entry(8, segmentation=short)]), masks=True)
    sample = DetectionDataset(source, PLAIN, replace_corrupt=False)[0, 0]
    assert sample["skipped"][0][0] == "1.png" and "annotation 8" in sample["skipped"][0][1]


def turned(path: Any, orientation: int, size: tuple[int, int]) -> None:
    """A picture of ``size`` (height, width), red on top, with this EXIF orientation."""
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2, :, 0] = 255
    Image.fromarray(pixels).save(path, exif=exif)


def test_an_image_is_taken_the_way_up_that_its_annotations_fit(tmp_path):
    root = write(tmp_path, [entry(1)], [(40, 48), (40, 48), (40, 48), (40, 48)])
    turned(root / "train2017/1.png", 6, (40, 48))  # annotated as stored
    turned(root / "train2017/2.png", 6, (48, 40))  # annotated upright
    turned(root / "train2017/3.png", 3, (40, 48))  # both fit: as stored
    turned(root / "train2017/4.png", 6, (30, 48))
    dataset = DetectionDataset(open_coco(root), PLAIN, masks=False)
    stored, upright, upside_down = (dataset.decode(i)[0].float() for i in range(3))
    assert stored[:20].mean() == 255 and stored[20:].mean() == 0
    assert upright[:, 24:].mean() == 255 and upright[:, :24].mean() == 0
    assert upside_down[:20].mean() == 255
    with pytest.raises(CorruptImage, match="has 30×48 pixels, its annotations are for 40×48"):
        dataset.decode(3)


def test_a_map_from_instances_has_smaller_ones_on_top_of_larger_ones_and_of_crowds(tmp_path):
    def block(x, y, w, h):
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]

    entries = [
        entry(1, segmentation=block(20, 20, 4, 4), category_id=3),
        entry(2, segmentation=block(10, 10, 20, 20)),
        entry(3, segmentation=block(2, 12, 3, 3), iscrowd=1),
        entry(4, segmentation=block(0, 10, 48, 20), category_id=3, iscrowd=1),
    ]
    source = open_coco(write(tmp_path, entries), masks=True)
    classes = DetectionDataset(source, PLAIN, semantic="instances")[0, 0]["semantic"]
    assert classes.shape == (40, 48) and classes.dtype == torch.int64
    found = [int(classes[y, x]) for x, y in ((21, 21), (15, 15), (3, 13), (40, 15), (1, 1))]
    assert found == [0, 1, 1, 0, 2]  # dog on cat, cat, a crowd of cats on one of dogs, dogs, background


def test_a_map_from_a_folder_moves_with_the_image(tmp_path):
    root = write(tmp_path, [entry(1)])
    (tmp_path / "maps").mkdir()
    with pytest.raises(UsageError, match=r"2 of 2 images have no map .*the first: 1\.png for 1\.png"):
        DetectionDataset(open_coco(root), PLAIN, semantic=tmp_path / "maps")
    for number in (1, 2):
        pixels = np.full((40, 48), IGNORED, np.uint8)
        pixels[10:26, 10:30] = 17
        Image.fromarray(pixels).save(tmp_path / f"maps/{number}.png")
    for augment in AUGMENT:
        dataset = DetectionDataset(open_coco(root), small(augment), semantic=tmp_path / "maps")
        for epoch in range(4):
            sample = dataset[epoch, 0]
            if len(sample["masks"]):
                assert torch.equal(sample["semantic"] == 17, sample["masks"][0])
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "maps/1.png")
    skipped = DetectionDataset(open_coco(root), PLAIN, semantic=tmp_path / "maps", replace_corrupt=False)[0, 0][
        "skipped"
    ]
    assert "is 40×40, not one class for each of 40×48 pixels" in skipped[0][1]
    with pytest.raises(UsageError, match="semantic='stuff' is not allowed"):
        DetectionDataset(open_coco(root), PLAIN, semantic="stuff")  # type: ignore[arg-type]


def test_a_batch_is_padded_to_multiples_of_32_with_zeros(tmp_path):
    root = write(tmp_path, [entry(1), entry(2, image_id=3)], [(40, 48), (70, 20), (33, 64)])
    (root / "train2017/2.png").write_bytes(b"")
    dataset = DetectionDataset(open_coco(root), PLAIN, replace_corrupt=False, semantic="instances")
    batch = DetectionDataset.collate([dataset[0, index] for index in range(3)])
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["size"].tolist() == batch["original_size"].tolist() == [[40, 48], [33, 64]]
    assert batch["image"][0, :, 40:].eq(0).all() and batch["image"][0, :, :, 48:].eq(0).all()
    assert torch.equal(batch["image"][0, :, :40, :48], dataset[0, 0]["image"])
    assert [target["masks"].shape for target in batch["targets"]] == [(1, 40, 48), (1, 33, 64)]
    assert set(batch["targets"][0]) == {"boxes", "labels", "masks", "semantic"}
    assert batch["image_id"] == [1, 3] and batch["index"].tolist() == [0, 2] and len(batch["annotations"]) == 2
    assert batch["skipped"] == [("2.png", "empty file")]
    nothing = DetectionDataset.collate([dataset[0, 1]])
    assert nothing["image"].shape == (0,) and nothing["size"].shape == nothing["original_size"].shape == (0, 2)
    assert len(nothing["index"]) == 0 and nothing["targets"] == nothing["image_id"] == nothing["annotations"] == []


def test_what_a_data_set_says_of_its_source(tmp_path):
    source = open_coco(write(tmp_path, [entry(1, bbox=[0, 0, 0, 0])]))
    dataset = DetectionDataset(source, PLAIN)
    assert len(dataset) == 2 and dataset.fingerprint() == source.fingerprint() and dataset.problems == source.problems
    assert sorted(dataset.epoch_order(np.random.default_rng(0)).tolist()) == [0, 1]


def test_transforms_of_torchvision_will_do(tmp_path):
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomHorizontalFlip(1), v2.Resize((80, 96)), v2.ToDtype(torch.float32, scale=True)])
    sample = DetectionDataset(open_coco(write(tmp_path, [entry(1)])), steps)[0, 0]
    assert torch.equal(sample["boxes"], torch.tensor([[36.0, 20, 76, 52]]))
    assert torch.equal(mask_boxes(sample["masks"]), sample["boxes"])


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((200, 640), 800, 1333, (417, 1333)),
        ((640, 200), 800, 1333, (1333, 417)),
        ((1, 900), 8, 10, (1, 10)),
    ],
)
def test_the_short_side_is_met_unless_the_long_one_is_too_long(size, short, long, expected):
    assert fitted_size(size, short, long) == expected


def test_evaluation_resizes_and_normalises():
    sample = scene(semantic=False)
    sample["image"] = torch.full((3, 60, 80), 255, dtype=torch.uint8)
    made = detection_eval_transform(MEAN, STD, short=30, long=100)(sample)
    assert made["image"].shape == (3, 30, 40) and torch.equal(made["boxes"], sample["boxes"] / 2)
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(made["image"], expected[:, None, None].expand(3, 30, 40))
    still = detection_eval_transform(MEAN, STD, short=None)(sample)
    assert still["image"].shape == (3, 60, 80) and torch.equal(still["masks"], sample["masks"])


@pytest.mark.parametrize("augment", AUGMENT)
def test_image_boxes_masks_and_map_stay_together(augment):
    """Where a mask is, the image has the colour of its instance, and boxes enclose masks as closely as before."""
    transform, seen = small(augment), set()
    for seed in range(30):
        torch.manual_seed(seed)
        before = scene()
        kept = copy.deepcopy(before)
        made = transform(before)
        assert all(torch.equal(before[name], kept[name]) for name in kept)  # the sample itself is not changed
        image = made["image"] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        height, width = image.shape[-2:]
        assert made["masks"].shape == (len(made["boxes"]), height, width) and made["semantic"].shape == (height, width)
        assert len(made["labels"]) == len(made["boxes"])
        for box, label, mask in zip(made["boxes"], made["labels"].tolist(), made["masks"], strict=True):
            seen.add(label)
            assert (box[2:] - box[:2] >= 1).all() and (box >= 0).all()
            assert box[2] <= width and box[3] <= height
            assert torch.equal(made["semantic"] == label, mask)
            if not mask.any():
                continue
            assert (mask_boxes(mask[None])[0] - box).abs().max() <= 2
            # Antialiasing mixes pixels near edges; well inside the colour is the instance's own.
            inside = torch.nn.functional.avg_pool2d(mask[None].float(), 5, 1, 2)[0] == 1
            assert (image[label][inside] > 0.7).all()
    assert seen == {0, 1, 2}


def test_a_flip_is_its_own_inverse():
    sample = scene()
    once, twice = flip(sample), flip(flip(sample))
    assert torch.equal(once["boxes"][0], torch.tensor([55.0, 6, 75, 26]))
    assert all(torch.equal(twice[name], sample[name]) for name in sample)


@pytest.mark.parametrize("augment", ["flip", "multiscale", "crop", "large-scale-jitter"])
def test_half_of_the_images_are_flipped(augment):
    transform = small(augment, crop=(1000, 1000), jitter=(1.0, 1.0))
    flips = 0
    for seed in range(200):
        torch.manual_seed(seed)
        boxes = transform(scene())["boxes"]
        flips += bool(boxes[0, 0] > boxes[2, 0])  # the first rectangle is left of the third
    assert 75 < flips < 125


def test_the_crop_recipe_draws_sides_from_its_range():
    transform = detection_train_transform(MEAN, STD, augment="crop", short=(64,), long=1000, crop=(100, 160))
    sizes = []
    for seed in range(120):
        torch.manual_seed(seed)
        sizes.append(tuple(transform(scene())["image"].shape[-2:]))
    whole = sizes.count((64, 85))
    assert 40 < whole < 80  # half of them are not cropped
    ratios = [w / h for h, w in sizes if (h, w) != (64, 85)]
    assert min(ratios) < 0.8 and max(ratios) > 1.25 and all(99 / 161 < r < 161 / 99 for r in ratios)


def test_crops_without_an_instance_are_allowed():
    transform = detection_train_transform(MEAN, STD, augment="crop", short=(40,), long=60, crop=(10, 14))
    counts = []
    for seed in range(60):
        torch.manual_seed(seed)
        made = transform(scene())
        counts.append(len(made["boxes"]))
        assert made["masks"].shape[0] == counts[-1] and made["boxes"].shape == (counts[-1], 4)
    assert 0 in counts and 3 in counts


def test_large_scale_jitter_fills_its_size_exactly():
    transform, areas = small("large-scale-jitter", jitter=(0.1, 2.0)), []
    for seed in range(60):
        torch.manual_seed(seed)
        sample = scene()
        sample["image"] += 50
        made = transform(sample)
        assert made["image"].shape == (3, 48, 64) and made["semantic"].shape == made["masks"].shape[1:] == (48, 64)
        empty = (made["image"] == 0).all(0)
        assert torch.equal(empty, made["semantic"] == IGNORED)
        areas.append(1 - empty.float().mean().item())
    assert min(areas) < 0.1 and areas.count(1.0) > 20  # scales of a half and less, and of 1 and more


def test_instances_under_a_pixel_are_left_out():
    sample = scene()
    sample["boxes"] = torch.tensor([[5.0, 6, 6.9, 26], [40, 10, 70, 30], [30, 40, 50, 41.9]])
    made = resample(sample, (30, 40))
    assert made["labels"].tolist() == [1] and made["masks"].shape == (1, 30, 40)
    window = resample(sample, (60, 80), (0, 69, 60, 11))
    assert torch.equal(window["boxes"], torch.tensor([[0.0, 10, 1, 30]]))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_number_of_channels(channels, dtype):
    for augment in AUGMENT:
        settings = {"short": (24, 32), "long": 60, "crop": (16, 30), "jitter_size": (48, 64), "paste": 1.0}
        transform = detection_train_transform([0.5] * channels, [0.5] * channels, augment=augment, **settings)
        sample = scene()
        sample["image"] = (torch.rand(channels, 60, 80) * (255 if dtype == torch.uint8 else 1)).to(dtype)
        made = transform(sample)["image"]
        assert made.shape[0] == channels and made.dtype == torch.float32 and made.abs().max() <= 1.0001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "multi-scale"}, r"augment='multi-scale' is unknown\. Did you mean 'multiscale'"),
        ({"short": ()}, "short"),
        ({"short": (800,), "long": 700}, "long=700"),
        ({"crop": (600, 384)}, "crop="),
        ({"jitter": (0, 2)}, "jitter="),
        ({"paste": 2.0}, "paste=2"),
    ],
)
def test_settings_that_make_no_image_are_named(changes, message):
    with pytest.raises(UsageError, match=message):
        detection_train_transform(MEAN, STD, **({"augment": "flip"} | changes))


def test_padding_leaves_boxes_alone():
    made = pad(scene(), (64, 96))
    assert torch.equal(made["boxes"], scene()["boxes"]) and made["masks"][:, 60:].sum() == 0
    assert (made["semantic"][60:] == IGNORED).all() and made["image"].shape == (3, 64, 96)


# Moving instances


def test_holes_are_filled_smoothly_from_around_them():
    ramp = (torch.arange(64.0)[:, None] + torch.arange(48.0)).expand(2, 64, 48)
    known = torch.ones(64, 48, dtype=torch.bool)
    known[20:36, 10:30] = False
    filled = fill_holes(ramp * known, known)
    assert torch.equal(filled[:, known], ramp[:, known])
    assert (filled - ramp)[:, ~known].abs().max() < 12  # the ramp rises by 36 across the hole
    single = torch.zeros(7, 5, dtype=torch.bool)
    single[2, 3] = True
    assert torch.allclose(fill_holes(torch.full((1, 7, 5), 3.0), single), torch.tensor(3.0))


def test_moved_instances_are_where_their_masks_and_boxes_say():
    for seed in range(30):
        torch.manual_seed(seed)
        before = scene()
        kept = copy.deepcopy(before)
        made = move_instances(before, IGNORED, colour=0)
        assert all(torch.equal(before[name], kept[name]) for name in kept)
        assert made["labels"].tolist() == [0, 1, 2] and made["image"].dtype == torch.uint8
        assert torch.equal(mask_boxes(made["masks"]), made["boxes"])
        for label, mask in enumerate(made["masks"]):
            assert (made["image"][label][mask] >= 99).all()  # half of 200, at the soft edge
            assert torch.equal(made["semantic"] == label, mask)
            others = made["image"][[i for i in range(3) if i != label]]
            assert others[:, mask].max() < 101
        outside = ~made["masks"].any(0)
        assert made["image"].max(0).values[outside].max() < 101
        vacated = kept["masks"].any(0) & outside
        assert (made["semantic"][vacated] == IGNORED).all()
        assert (made["semantic"][outside & ~kept["masks"].any(0)] == 9).all()


def test_moves_stay_in_their_ranges_and_fill_them():
    moves, sizes = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        before = scene()
        for name in ("boxes", "labels", "masks"):
            before[name] = before[name][1:2]  # 30 wide, 20 high
        box, old = move_instances(before, IGNORED, colour=0)["boxes"][0], before["boxes"][0]
        moves.append((box[:2] + box[2:] - old[:2] - old[2:]) / 2)
        sizes.append((box[2:] - box[:2]) / (old[2:] - old[:2]))
    most = torch.stack(moves).abs().amax(0)
    assert 1.4 < most[0] <= 2 + 1 and 0.9 < most[1] <= 20 / 15 + 1  # a pixel for rounding
    width = torch.stack(sizes)[:, 0]
    assert 0.75 < width.min() < 0.87 and 1.13 < width.max() < 1.27


def test_without_a_move_only_what_is_ignored_changes():
    made = move_instances(scene(), IGNORED, scale=(1, 1), shift=0, degrees=0, colour=0)
    for name, value in scene().items():
        assert torch.equal(made[name], value)


def test_covered_pixels_are_lost_and_covered_instances_dropped():
    sample = scene(semantic=False)
    sample["masks"][2] = False
    sample["masks"][2, 32:38, 50:54] = True  # below the second rectangle, a cell of 4 pixels apart
    lost = dropped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        made = move_instances(sample, IGNORED, scale=(2.0, 2.0), shift=0.2, degrees=0)
        assert made["masks"].sum(0).max() == 1
        sides = made["boxes"][:, 2:] - made["boxes"][:, :2]
        lost += bool((made["masks"].sum((1, 2)) < sides.prod(1)).any())  # a rectangle no more
        gone = move_instances(sample, IGNORED, scale=(0.02, 0.02), shift=0.2)
        assert len(gone["labels"]) == len(gone["boxes"]) == len(gone["masks"])
        assert gone["masks"].flatten(1).any(1).all()
        dropped += len(gone["labels"]) < 3
    assert lost > 20 and dropped > 30


def test_instances_that_touch_move_together():
    masks = torch.zeros(4, 40, 40, dtype=torch.bool)
    masks[0, 0:9, 0:9], masks[1, 8:20, 8:20], masks[2, 20:24, 18:22], masks[3, 32:40, 32:40] = True, True, True, True
    assert touching(masks) == [[0, 1, 2], [3]]
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    sample = {"image": image, "masks": masks, "labels": torch.arange(4), "boxes": mask_boxes(masks)}
    torch.manual_seed(1)
    made = move_instances(sample, IGNORED, scale=(1, 1), shift=0.3, degrees=0, colour=0)
    moved = made["boxes"] - sample["boxes"]
    assert (moved[1] - moved[2]).abs().max() <= 1 < moved[1].abs().max()
    assert (moved[3] - moved[1]).abs().max() > 1


def test_images_without_instances_or_background_are_left_alone():
    full = torch.ones(1, 8, 8, dtype=torch.bool)
    for masks in (full, full[:0]):
        sample = {
            "image": torch.rand(3, 8, 8),
            "masks": masks,
            "labels": torch.zeros(len(masks)),
            "boxes": mask_boxes(masks),
        }
        made = move_instances(sample, IGNORED)
        assert torch.equal(made["image"], sample["image"]) and torch.equal(made["masks"], masks)


@pytest.mark.parametrize("augment", AUGMENT)
def test_real_photos_through_every_augmentation(shared_data, augment):
    if not (shared_data / "coco").is_dir():
        pytest.skip("COCO is not beside this checkout")
    source = open_coco(shared_data / "coco", "train", masks=True)
    settings = {"short": (160, 192), "long": 320, "crop": (128, 200), "jitter_size": (192, 256)}
    transform = detection_train_transform(MEAN, STD, augment=augment, paste=0.5, **settings)
    dataset = DetectionDataset(source, transform, semantic="instances")
    batch = dataset.collate([dataset[0, index] for index in range(0, 88, 11)])
    assert batch["skipped"] == [] and math.prod(batch["image"].shape[-2:]) % 32**2 == 0
    outside = total = 0.0
    for target, (height, width) in zip(batch["targets"], batch["size"].tolist(), strict=True):
        assert target["masks"].shape[1:] == target["semantic"].shape == (height, width)
        assert set(target["semantic"].unique().tolist()) <= {*range(81), IGNORED}
        y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].tolist(), strict=True):
            out = (x < x1 - 1) | (x > x2 + 1) | (y < y1 - 1) | (y > y2 + 1)
            outside, total = outside + float((mask & out).sum()), total + float(mask.sum())
    assert total > 5000 and outside <= 0.001 * total
