"""Samples and batches depend on (seed, epoch, index) alone: workers, processes and resuming change nothing."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import time
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.transforms import InterpolationMode, v2

from swinscale.data import (
    EpochLoader,
    ImageDataset,
    MaskConfig,
    channel_statistics,
    collate,
    eval_transform,
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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_may_be_left_and_another_one_begun(photos, workers):
    """What the loader processes had prepared of the first one does not turn up in the second."""
    reference = list(EpochLoader(dataset(photos), 3).batches(1))
    loader = EpochLoader(dataset(photos), 3, num_workers=workers)
    next(iter(loader.batches(0)))
    again = list(loader.batches(1))
    assert len(again) == len(reference) == len(loader) == 8
    assert all(same(a, b) for a, b in zip(again, reference, strict=True))
    assert list(loader.batches(1, start_batch=8)) == []


def test_a_loader_that_is_left_within_an_epoch_ends_its_processes_at_once(photos):
    """Reference counting frees it: in a cycle, torch waits 5 seconds for each process."""
    loader = EpochLoader(dataset(photos), 3, num_workers=2)
    batches = loader.batches(0)
    next(batches)
    inner = weakref.ref(loader._loader._iterator)
    gc.disable()
    started = time.perf_counter()
    try:
        del batches, loader
        assert inner() is None
    finally:
        gc.enable()
    assert time.perf_counter() - started < 4


@pytest.fixture
def quick_to_notice(monkeypatch):
    """PyTorch looks after its loader processes ten times a second instead of every 5 seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


def test_loader_processes_that_are_killed_are_started_again(photos, quick_to_notice):
    """Nothing is lost or served twice, and no other code is interrupted when a loader process dies (as PyTorch would)."""
    reference = list(EpochLoader(dataset(photos), 3).batches(1))
    loader = EpochLoader(dataset(photos), 3, num_workers=2)
    before = signal.getsignal(signal.SIGCHLD)
    served = []
    for number, batch in enumerate(loader.batches(1)):
        served.append(batch)
        if number in (0, 5):
            victims = list(loader._loader._iterator._workers)
            for victim in victims[: 1 if number else 2]:
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
            time.sleep(0.05)  # the signal of its death has come
    assert signal.getsignal(signal.SIGCHLD) == before
    assert 1 <= len(loader.restarts) <= 2 and "DataLoader worker" in loader.restarts[0]
    assert len(served) == len(reference) == 8
    assert all(same(a, b) for a, b in zip(served, reference, strict=True))
    again = list(loader.batches(1, start_batch=2))
    assert all(same(a, b) for a, b in zip(again, reference[2:], strict=True))


def test_a_loader_process_that_dies_between_epochs(photos, quick_to_notice):
    reference = list(EpochLoader(dataset(photos), 3).batches(1))
    loader = EpochLoader(dataset(photos), 3, num_workers=2)
    list(loader.batches(0))
    os.kill(loader._loader._iterator._workers[1].pid, signal.SIGKILL)
    assert all(same(a, b) for a, b in zip(loader.batches(1), reference, strict=True))
    assert len(loader.restarts) == 1


class Deadly(ImageDataset):
    """Its loader processes are killed at one image, as when it takes all memory."""

    def __getitem__(self, item):
        if item[1] == 7 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)


def test_loader_processes_that_keep_dying_end_with_advice(photos, quick_to_notice):
    data = Deadly(open_source(photos), train_transform((16, 16), MEAN, STD))
    loader = EpochLoader(data, 3, num_workers=1, shuffle=False)
    served = []
    with pytest.raises(UsageError, match=r"killed 4 times in a row.*set train\.num_workers to less than 1"):
        served.extend(batch["index"].tolist() for batch in loader.batches(0))
    # The process works ahead: what it had ready may go with it.
    assert served in ([[0, 1, 2]], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_global_random_state(photos, workers):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    list(EpochLoader(dataset(photos), 12, num_workers=workers).batches(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_processes_see_the_pictures_of_one(photos):
    """The images themselves, not only their numbers."""
    for whole, *parts in zip(
        EpochLoader(dataset(photos), 6).batches(2),
        *(EpochLoader(dataset(photos), 6, rank=rank, world_size=2).batches(2) for rank in range(2)),
        strict=True,
    ):
        for name in ("image", "label", "index", "mask"):
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


@pytest.mark.slow
def test_loader_processes_that_start_from_nothing(photos):
    """Everything that a process started by "spawn" needs can be pickled, a zip file that is open included."""
    archive = shutil.make_archive(str(photos), "zip", photos)
    data = dataset(archive)
    data[0, 0]
    processes = DataLoader(
        data, batch_sampler=[[(0, 1), (0, 2)]], num_workers=1, multiprocessing_context="spawn", collate_fn=collate
    )
    assert same(next(iter(processes)), collate([data[0, 1], data[0, 2]]))


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


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 30),
    world=st.integers(1, 4),
    micro=st.integers(1, 3),
    drop=st.booleans(),
    shuffle=st.booleans(),
)
def test_processes_and_micro_batches_share_the_batches_of_one(count, batch, world, micro, drop, shuffle):
    """Whatever the number of processes, a batch holds the same images; shares differ by at most one image."""

    def loader(rank=0, world=1, micro=1):
        places = {"rank": rank, "world_size": world, "micro_batches": micro}
        return EpochLoader(range(count), batch, shuffle=shuffle, drop_last=drop, **places)

    together = loader().indices(7)
    parts = [loader(rank, world, micro).indices(7) for rank in range(world)]
    assert all(len(part) == len(together) * micro for part in parts)
    for j, whole in enumerate(together):
        mine = [parts[rank][j * micro + m] for m in range(micro) for rank in range(world)]
        assert [i for part in mine for i in part] == whole
        assert max(map(len, mine)) - min(map(len, mine)) <= 1
    served = sorted(i for whole in together for i in whole)
    assert len(set(served)) == len(served) == (count // batch * batch if drop else count)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_reported_by_loader_processes(photos, workers):
    for name, content in (("blue/2.png", b""), ("green/5.png", b"\x89PNG\r\n\x1a\nbroken")):
        (photos / name).write_bytes(content)
    loader = EpochLoader(dataset(photos), 5, drop_last=False, num_workers=workers)
    batches = list(loader.batches(0))
    assert sum(len(b["image"]) for b in batches) == 24
    assert {name for b in batches for name, _ in b["skipped"]} == {"blue/2.png", "green/5.png"}
    held = EpochLoader(dataset(photos, replace_corrupt=False), 5, drop_last=False, num_workers=workers)
    batches = list(held.batches(0))
    assert sorted(i for b in batches for i in b["index"].tolist()) == [i for i in range(24) if i not in (2, 13)]
    assert sorted(name for b in batches for name, _ in b["skipped"]) == ["blue/2.png", "green/5.png"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(broken=st.sets(st.integers(0, 23), min_size=1, max_size=23), batch=st.integers(1, 24))
def test_an_epoch_survives_any_unreadable_files(photos, broken, batch):
    """Whatever is broken: full batches in training; in evaluation every readable image once, batches without one too."""
    data = dataset(photos)
    names, read = data.source.names, data.source.store.read
    store = type("Damaged", (), {"read": lambda _, n: b"" if names.index(n) in broken else read(n)})()
    data.source.store = store
    for got in EpochLoader(data, batch).batches(0):
        assert len(got["image"]) == batch
    data.replace_corrupt = False
    seen = [i for got in EpochLoader(data, batch, drop_last=False).batches(0) for i in got["index"].tolist()]
    assert sorted(seen) == sorted(set(range(24)) - broken)


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
    line = str(error.value)
    del error  # its traceback holds the loader processes
    assert line == "None of the 24 images can be read; the first: blue/0.png (not an image of a known format)."


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_all_gone_within_an_epoch_end_with_one_line(photos, workers):
    loader = EpochLoader(dataset(photos), 3, num_workers=workers)
    batches = loader.batches(0)
    next(batches)
    shutil.rmtree(photos)
    with pytest.raises(UsageError, match=r"None of the 24 images can be read.*No such file"):
        list(batches)


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


def test_the_published_augmentation():
    """RandAugment at 9/10 of its strength where its colours exist; a rectangle of noise in a quarter of the images."""
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    for channels, expected in ((1, 2), (3, 2), (4, 0), (13, 0)):
        steps = train_transform((32, 32), *normalisation(channels)).transforms
        found = [s.transforms[0] for s in steps if isinstance(s, v2.RandomApply)]
        assert [(f.num_ops, f.magnitude / (f.num_magnitude_bins - 1)) for f in found] == [(1, 0.9)] * expected
    erase = train_transform((32, 32), MEAN, STD).transforms[-1]
    constant = torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    results = [erase(constant) for _ in range(400)]
    erased = [r[r != 0] for r in results if r.any()]
    assert 0.18 < len(erased) / 400 < 0.32
    noise = torch.cat(erased)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    outputs = [train_transform((32, 32), MEAN, STD)(image) for _ in range(30)]
    assert len({o.sum().item() for o in outputs}) > 5


@pytest.mark.parametrize("make", [simmim_transform, train_transform, lambda *a: train_transform(*a, augment="light")])
def test_a_photo_decoded_smaller_still_has_two_pixels_for_one(make):
    """The smallest crop of a picture decoded at ``decode_size`` is at least twice as large as what it becomes."""
    transform = make((32, 48), MEAN, STD)
    crop = transform.transforms[0]
    height, width = transform.decode_size
    for picture in (torch.empty(3, height, height), torch.empty(3, width, width), torch.empty(3, width, 2 * width)):
        for _ in range(200):
            params = crop.make_params([picture])
            assert params["height"] >= 2 * 32 - 2
            if picture.shape[1] == width:
                assert params["width"] >= 2 * 48 - 2
    assert train_transform((32, 48), MEAN, STD, augment="none").decode_size is None
    assert pickle.loads(pickle.dumps(transform)).decode_size == (height, width)


def test_large_photos_are_decoded_at_a_smaller_scale_in_training_alone(tmp_path, monkeypatch):
    Image.linear_gradient("L").resize((1600, 1200)).convert("RGB").save(tmp_path / "a.jpg")
    seen = []
    source = open_source(tmp_path)
    for transform in (simmim_transform((64, 64), MEAN, STD), eval_transform((64, 64), MEAN, STD)):
        data = ImageDataset(source, transform)
        monkeypatch.setattr(data, "decode", lambda *a, d=data.decode: (seen.append(d(*a)), seen[-1])[1])
        assert data[0, 0]["image"].shape == (3, 64, 64)
    assert [tuple(s.shape) for s in seen] == [(3, 300, 400), (3, 1200, 1600)]


def test_square_evaluation_crops_are_those_of_torchvision():
    image = torch.randint(0, 255, (3, 80, 80), dtype=torch.uint8)
    reference = v2.Compose(
        [
            v2.Resize(36, InterpolationMode.BICUBIC),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    assert torch.equal(eval_transform((32, 32), MEAN, STD)(image), reference(image))


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
    reads: list[str] = []
    source.store = type("Counted", (), {"read": lambda _, n: (reads.append(n), (photos / n).read_bytes())[1]})()
    channel_statistics(source, limit=13)
    assert len(reads) <= 13 and len({n.split("/")[0] for n in reads}) == 3


def test_an_epoch_of_real_photos(shared_data):
    """R-OPS-2 on files from cameras: two processes with two loader processes each against one with none."""
    data = ImageDataset(
        open_source(shared_data / "clothing", "test"),
        train_transform((64, 64), MEAN, STD),
        mask=MaskConfig((64, 64), 16, (4, 4)),
    )
    whole = EpochLoader(data, 62).batches(4, start_batch=3)
    parts = [EpochLoader(data, 62, rank=r, world_size=2, num_workers=2).batches(4, start_batch=3) for r in range(2)]
    count = 0
    for one, *others in zip(whole, *parts, strict=True):
        for name in ("image", "label", "index", "mask"):
            assert torch.equal(one[name], torch.cat([o[name] for o in others]))
        count += len(one["index"])
    assert count == 3 * 62
