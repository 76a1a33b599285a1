"""Samples and batches depend on (seed, epoch, index) alone: workers, processes and resuming change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swinscale.data import (
    EpochLoader,
    ImageDataset,
    MaskConfig,
    channel_statistics,
    eval_transform,
    mask_for_sample,
    normalisation,
    open_source,
    simmim_transform,
    train_transform,
)
from swinscale.errors import UsageError

MEAN, STD = normalisation(3)


def dataset(photos, seed=0, mask=True, **more) -> ImageDataset:
    masks = MaskConfig((16, 16), 8, (4, 4)) if mask else None
    return ImageDataset(open_source(photos), train_transform((16, 16), MEAN, STD), seed=seed, mask=masks, **more)


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in ("image", "label", "index", "mask"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_repeat_with_any_number_of_workers_and_from_any_batch(photos, workers):
    """R-OPS-2, R-MIM-5: augmentation and masks too."""
    reference = list(EpochLoader(dataset(photos), 5).batches(3))
    loader = EpochLoader(dataset(photos), 5, num_workers=workers)
    list(loader.batches(1))  # another epoch before does not matter
    again = list(loader.batches(3))
    assert len(again) == len(reference) == 4
    assert all(same(a, b) for a, b in zip(again, reference, strict=True))
    resumed = list(loader.batches(3, start_batch=2))
    assert all(same(a, b) for a, b in zip(resumed, reference[2:], strict=True))
    assert loader.wait_seconds > 0


def test_epochs_seeds_and_the_global_random_state(photos):
    data = dataset(photos)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = data[0, 3]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a["image"], data[0, 3]["image"])
    assert not torch.equal(a["image"], data[1, 3]["image"])
    assert not torch.equal(a["image"], dataset(photos, seed=1)[0, 3]["image"])
    orders = [EpochLoader(data, 24).indices(epoch)[0] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == list(range(24))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 9),
    world=st.integers(1, 4),
    drop=st.booleans(),
    shuffle=st.booleans(),
)
def test_processes_share_the_batches_of_one(count, batch, world, drop, shuffle):
    """The j-th batches of all processes are the j-th batch of one process; without drop_last all images appear once."""

    def loader(size, rank=0, world=1):
        return EpochLoader(range(count), size, shuffle=shuffle, rank=rank, world_size=world, drop_last=drop)

    together = loader(batch * world).indices(7)
    parts = [loader(batch, rank, world).indices(7) for rank in range(world)]
    for j, whole in enumerate(together):
        assert [i for part in parts for i in part[j]] == whole
    if not drop:
        assert sorted(i for whole in together for i in whole) == list(range(count))
    else:
        assert all(len(b) == batch for part in parts for b in part)


def test_unreadable_images_are_replaced_in_training_and_left_out_in_evaluation(photos):
    (photos / "red/0.png").write_bytes(b"broken")
    (photos / "red/7.png").write_bytes(b"")
    train = next(iter(EpochLoader(dataset(photos), 24, shuffle=False).batches(0)))
    assert len(train["image"]) == 24
    assert {n for n, _ in train["skipped"]} == {"red/0.png", "red/7.png"}
    assert train["label"][23] == 0  # the next readable image after the last one is the first
    held = next(
        iter(EpochLoader(dataset(photos, replace_corrupt=False), 24, shuffle=False, drop_last=False).batches(0))
    )
    assert len(held["image"]) == len(held["label"]) == len(held["mask"]) == 22
    assert ("red/7.png", "empty file") in held["skipped"]
    (photos / "red/3.png").unlink()  # vanishes after the source was opened
    data = dataset(photos)
    (photos / "red/4.png").unlink()
    assert data[0, data.source.names.index("red/4.png")]["skipped"][0][0] == "red/4.png"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("more", [{}, {"replace_corrupt": False}], ids=["training", "evaluation"])
def test_only_unreadable_images_end_with_one_line(photos, more, workers):
    """One line from a loader process as well, where torch would wrap a traceback around it."""
    for path in photos.rglob("*.png"):
        path.write_bytes(b"broken")
    loader = EpochLoader(dataset(photos, **more), 5, shuffle=False, drop_last=False, num_workers=workers)
    with pytest.raises(UsageError) as error:
        list(loader.batches(0))
    line = "None of the 24 images can be read; the first: blue/0.png (not an image of a known format)."
    assert str(error.value) == line


@pytest.mark.parametrize(("size", "masked", "cells"), [(192, 22, 36), (224, 30, 49), (256, 39, 64)])
def test_published_mask_counts(size, masked, cells):
    config = MaskConfig((size, size), 32, (4, 4), 0.6)
    mask = mask_for_sample(config, 0, 0, 0)
    assert mask.shape == (size // 4, size // 4)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == masked * 64
    assert math.prod(config.cells) == cells


@pytest.mark.parametrize("mode", ["random", "block"])
def test_masks_are_whole_cells_in_rectangles_too(mode):
    config = MaskConfig((64, 128), 16, (4, 2), 0.5, mode)
    for index in range(20):
        mask = mask_for_sample(config, 0, 0, index)
        assert mask.shape == (16, 64)
        cells = mask.view(4, 4, 8, 8).permute(0, 2, 1, 3).flatten(2)
        assert torch.equal(cells.all(-1), cells.any(-1))
        assert int(cells.any(-1).sum()) == 16
    assert not torch.equal(mask_for_sample(config, 0, 0, 1), mask_for_sample(config, 0, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((100, 96), 32, (4, 4)), "img_size=100 is not a multiple of mask_patch=32. Set img_size=96 or mask_patch="),
        (((96, 96), 30, (4, 4)), "mask_patch=30 is not a multiple of the model's patch_size=4. Set it to 32"),
        (((96, 96), 32, (4, 4), 1.5), "mask_ratio=1.5"),
    ],
)
def test_masks_that_do_not_fit_say_what_does(arguments, words):
    with pytest.raises(UsageError) as error:
        MaskConfig(*arguments)
    assert words in str(error.value)


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_transforms_take_any_channels_and_rectangles(channels, dtype):
    mean, std = normalisation(channels)
    image = torch.randint(0, 255, (channels, 50, 70), dtype=torch.uint8)
    image = image if dtype == torch.uint8 else image.float() / 255
    makers = [
        simmim_transform,
        *(lambda *a, k=k: train_transform(*a, augment=k) for k in ("imagenet", "light", "none")),
    ]
    for make in (*makers, eval_transform, lambda *a: eval_transform(*a, crop_ratio=None)):
        out = make((24, 40), mean, std)(image)
        assert out.shape == (channels, 24, 40)
        assert out.dtype == torch.float32
        assert out.min() > -5 and out.max() < 5


def test_evaluation_crops_the_centre():
    image = torch.zeros(1, 64, 128, dtype=torch.uint8)
    image[:, 16:48, 48:80] = 255
    out = eval_transform((32, 32), (0.0,), (1.0,), crop_ratio=0.5)(image)
    assert out.mean() > 0.99
    assert eval_transform((32, 32), (0.0,), (1.0,), crop_ratio=None)(image).mean().item() == pytest.approx(
        0.125, abs=0.02
    )


def test_normalisation_and_statistics(photos):
    """R-CHAN-2."""
    assert normalisation(1) == ((0.5,), (0.5,))
    assert normalisation(4, (0.1,), (0.2,)) == ((0.1,) * 4, (0.2,) * 4)
    for wrong in (((0.1, 0.2), None), (None, (0.0,))):
        with pytest.raises(UsageError, match="1 or 3 numbers"):
            normalisation(3, *wrong)
    source = open_source(photos)
    mean, std = channel_statistics(source)
    pixels = torch.cat([ImageDataset(source, None).decode(i).flatten(1) / 255 for i in range(24)], 1)
    assert torch.allclose(torch.tensor(mean), pixels.mean(1), atol=1e-5)
    assert torch.allclose(torch.tensor(std), pixels.std(1), atol=1e-4)
