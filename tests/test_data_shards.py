"""Tar shards: layouts, an order that reads few files at a time, exact resuming, and every way in which a shard breaks."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swinscale.data import (
    EpochLoader,
    ImageDataset,
    Source,
    eval_transform,
    normalisation,
    open_source,
    shard_index,
    shards,
    split_source,
    subset_per_class,
)
from swinscale.data.pack import pack
from swinscale.errors import UsageError
from swinscale.recipes.base import DataConfig, open_sources

TRANSFORM = eval_transform((16, 16), *normalisation(3))


def picture(shade: int) -> bytes:
    """A PNG file that no other shade gives."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade % 256, shade // 256, 7)).save(file, "png")
    return file.getvalue()


def write(path: Path, members: dict[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(start: int, count: int) -> dict[str, bytes]:
    """Samples ``start``, … with the label number % 3."""
    numbers = range(start, start + count)
    return {f"{i:04d}.{kind}": data for i in numbers for kind, data in (("cls", b"%d" % (i % 3)), ("png", picture(i)))}


def shard_set(folder: Path, shards: int = 4, each: int = 6, name: str = "train-{:06d}.tar") -> Path:
    for number in range(shards):
        write(folder / name.format(number), samples(number * each, each))
    return folder


def contents(source: Source) -> list[bytes]:
    return [source.read(i) for i in range(len(source))]


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob(".swinscale-index-*"))


# --- what is in a shard ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, None])
def test_packed_images_come_back(tmp_path, photos, seed):
    source = open_source(photos)
    said = []
    paths = pack(source, tmp_path / "out", 5, "train", seed, progress=lambda done, total: said.append((done, total)))
    assert [p.name for p in paths] == [f"train-{n:06d}.tar" for n in range(5)]
    assert said == [(5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]
    again = open_source(tmp_path / "out")
    assert again.classes == source.classes
    assert again.splits == ("train",)
    assert again.problems == []
    keys = [int(name.rpartition("/")[2].split(".")[0]) for name in again.names]
    assert sorted(keys) == list(range(24))
    assert (keys == list(range(24))) == (seed is None)
    assert contents(again) == [source.read(k) for k in keys]
    assert again.labels == [source.labels[k] for k in keys]
    assert again.fingerprint() != source.fingerprint()

    more = pack(source, tmp_path / "more", 5, "train", seed)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in more]
    assert open_source(tmp_path / "more").fingerprint() == again.fingerprint()
    assert sorted(p.name for p in (tmp_path / "more").iterdir() if p.suffix != ".npz") == [
        "classes.txt",
        *(p.name for p in paths),
    ]


def test_packing_other_sources(tmp_path, photos):
    flat = open_source(photos / "red")
    pack(flat, tmp_path / "flat")
    assert open_source(tmp_path / "flat").labels is None
    assert not (tmp_path / "flat/classes.txt").exists()
    (photos / "without").write_bytes(picture(3))
    np.save(photos / "array.npy", np.zeros((3, 4, 4), np.uint8))
    (photos / "array.npy").rename(photos / "numbers")
    (photos / "list.csv").write_text("without,1\nnumbers,0\nred/0.png,0\n")
    listed = open_source(photos / "list.csv")
    pack(listed, tmp_path / "list", prefix="val", seed=None)
    assert open_source(tmp_path / "list", "val").names == [
        f"val-000000.tar/{n:08d}.{kind}" for n, kind in enumerate(("png", "npy", "png"))
    ]
    pack(open_source(tmp_path / "list", "val"), tmp_path / "again", prefix="val", seed=None)
    assert (tmp_path / "again/val-000000.tar").read_bytes() == (tmp_path / "list/val-000000.tar").read_bytes()


def test_mistakes_in_packing_leave_nothing_behind(tmp_path, photos):
    source, out = open_source(photos), tmp_path / "out"
    for more, said in (({"samples_per_shard": 0}, "at least 1"), ({"prefix": "a/b"}, "use letters")):
        with pytest.raises(UsageError, match=said):
            pack(source, out, **more)
    with pytest.raises(UsageError, match="no images"):
        pack(source.take([]), out)
    with pytest.raises(UsageError, match="is a file"):
        pack(source, photos / "red/0.png")
    (photos / "red/7.png").unlink()
    with pytest.raises(UsageError, match=r"red/7\.png cannot be read, so nothing is packed"):
        pack(source, out, samples_per_shard=4)
    assert [p.name for p in out.iterdir()] == ["classes.txt"]
    (photos / "broken").write_bytes(b"?")
    (photos / "list.txt").write_text("broken\n")
    with pytest.raises(UsageError, match="broken has no extension of an image"):
        pack(open_source(photos / "list.txt"), tmp_path / "x")
    kept = source.take(range(20))
    pack(kept, out)
    with pytest.raises(UsageError, match=r"already holds 1 shards train-\*\.tar"):
        pack(kept, out)
    pack(kept, out, prefix="val")
    with pytest.raises(UsageError, match=r"classes\.txt names other classes"):
        pack(Source(kept.store, kept.names, kept.labels, ["x", "y", "z"]), out, prefix="test")
    with pytest.raises(UsageError, match="cannot stand on a line"):
        pack(Source(kept.store, kept.names, kept.labels, ["a", "b\n", "c"]), tmp_path / "y")


def test_labels_in_the_webdataset_layout(tmp_path):
    picks = {
        "./a/1.jpg": b"a1",  # the key is a/1
        "./a/1.cls": b" 2\n",
        "a/1.json": b'{"label": 0}',  # .cls decides
        "b/1.json": json.dumps({"label": 1, "width": 3}).encode(),
        "b/1.depth.png": b"depth",  # not the picture where there is a plain one
        "b/1.npy": b"array",
        "b/1.PNG": b"b1",
        "c.seg.png": b"c",
        "c.txt": b"a caption",
        "c.cls": b"0",
        ".hidden.png": b"",
        "__MACOSX/._c.png": b"",
        "d.json": b'{"label": "4"}',
        "d.webp": b"d",
        "no picture.cls": b"3",
    }
    source = open_source(write(tmp_path / "x.tar", picks))
    assert source.names == ["x.tar/a/1.jpg", "x.tar/b/1.PNG", "x.tar/c.seg.png", "x.tar/d.webp"]
    assert contents(source) == [b"a1", b"b1", b"c", b"d"]
    assert source.labels == [2, 1, 0, 4]
    assert source.classes == list("01234")
    assert source.splits == ()


def test_names_of_classes(tmp_path):
    path = write(tmp_path / "train" / "x.tar", samples(0, 6))
    assert open_source(path).classes == ["0", "1", "2"]
    (tmp_path / "classes.json").write_text('["ü", "crane", "crane", "more"]')
    for spec in (path, tmp_path, tmp_path / "train/*.tar"):  # beside the split, too
        assert open_source(spec).classes == ["ü", "crane", "crane", "more"]
    (tmp_path / "train/classes.txt").write_bytes(b"a b\r\nc\r\nd\r\n\r\n")
    assert open_source(path).classes == ["a b", "c", "d"]
    for text, said in (("a\nb\n", "names 2 classes, but the labels .* go up to 2"), (b"\xff\xfe", "no list of class")):
        (tmp_path / "train/classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UsageError, match=said):
            open_source(path)
    (tmp_path / "train/classes.txt").unlink()
    for text in ("{}", "[1, 2, 3]", "["):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(UsageError, match=r"classes\.json is no list of class names"):
            open_source(path)
    many = write(tmp_path / "many/x.tar", {"1.png": b"", "1.cls": b"999999999"})
    with pytest.raises(UsageError, match="go up to 999999999; they must number the classes"):
        open_source(many)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"2.txt": b"3"}, r"1 of the 2 samples .* have no label, first x\.tar/2\.png"),
        ({"2.cls": b"cat"}, r"first 2\.cls: holds 'cat', not the number of a class"),
        ({"2.cls": b"-1"}, "holds '-1'"),
        ({"2.cls": b""}, "holds ''"),
        ({"2.json": b'{"label": true}'}, "holds 'True'"),
        ({"2.json": b'{"label": 1.5}'}, r"holds '1\.5'"),
        ({"2.json": b"{"}, "have no label"),
        ({"2.json": b"[" * 100_000}, "have no label"),
        ({"2.json": b"[1]"}, "have no label"),
    ],
)
def test_samples_without_a_label(tmp_path, labels, said):
    path = write(tmp_path / "x.tar", {"1.png": b"a", "1.cls": b"0", "2.png": b"b", **labels})
    with pytest.raises(UsageError, match=said):
        open_source(path)
    source = open_source(path, on_broken_shard="skip")
    assert contents(source) == [b"a"]
    ((shard, reason),) = source.problems
    assert shard == "x.tar"
    assert reason.startswith("1 samples without a label are left out")
    assert reason.endswith("; 1 are kept")


def test_tars_without_labels_are_read_like_zip_files(tmp_path, photos):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(photos, "photos")
    source, folder = open_source(tmp_path / "all.tar"), open_source(photos)
    assert source.classes == ["blue", "green", "red"]
    assert sorted(zip(source.labels, contents(source), strict=True)) == sorted(
        zip(folder.labels, contents(folder), strict=True)
    )
    write(tmp_path / "parts/0.tar", {"train/x/a.b.png": b"0", "train/y/a.c.png": b"1", "val/y/1.png": b"2"})
    write(tmp_path / "parts/1.tar", {"train/y/2.png": b"3", "val/x/1.png": b"4"})
    train, val = open_source(tmp_path / "parts"), open_source(tmp_path / "parts", "val")
    assert train.splits == val.splits == ("train", "val")
    assert (train.labels, contents(train)) == ([0, 1, 1], [b"0", b"1", b"3"])
    assert (val.labels, contents(val)) == ([1, 0], [b"2", b"4"])
    captions = {"0.jpg": b"0", "0.txt": b"a cat", "0.json": b'{"width": 3}', "1.jpg": b"1"}
    flat = open_source(write(tmp_path / "flat.tar", captions))
    assert (flat.labels, flat.classes, contents(flat)) == (None, None, [b"0", b"1"])


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_kinds_of_tar(tmp_path, kind):
    long = "x" * (90 if kind == tarfile.USTAR_FORMAT else 300)
    members = {f"ä/{long}.png": b"long", "empty.png": b"", "even.png": b"e" * 512, "ä/2.png": b"2"}
    path = write(tmp_path / "x.tar", members, format=kind, encoding="utf-8")
    with tarfile.open(path, "a", format=kind) as tar:
        link, folder = tarfile.TarInfo("same.png"), tarfile.TarInfo("folder.png")
        link.type, link.linkname, folder.type = tarfile.LNKTYPE, "even.png", tarfile.DIRTYPE
        tar.addfile(link)
        tar.addfile(folder)
        twice = tarfile.TarInfo("ä/2.png")
        twice.size = 3
        tar.addfile(twice, io.BytesIO(b"new"))  # what "tar -u" appends takes the place of the first one
    source = open_source(path)
    assert source.names == [f"x.tar/{name}" for name in [*members, "same.png"]]
    assert contents(source) == [b"long", b"", b"e" * 512, b"new", b"e" * 512]


# --- which shards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["{}-{:06d}.tar", "imagenet1k-{}-{:04d}.tar", "{}/{:03d}.tar", "data/{}_{}.tar"])
def test_splits_by_folder_or_name(tmp_path, layout):
    names = {"train": "train", "val": "validation", "test": "test"}
    for part, (split, word) in enumerate(names.items()):
        for number in range(2):
            write(tmp_path / layout.format(word, number), samples(100 * part + 3 * number, 3))
        assert len(open_source(tmp_path, split)) == 6
    write(tmp_path / "other.tar", samples(900, 3))  # belongs to none
    for part, split in enumerate(names):
        source = open_source(tmp_path, split)
        assert source.splits == ("train", "val", "test")
        assert contents(source) == [picture(100 * part + i) for i in range(6)]
    for path in tmp_path.rglob("*.tar"):
        if "test" in path.as_posix().removeprefix(str(tmp_path)):
            path.unlink()
    with pytest.raises(UsageError, match="no 'test' part, only train, val"):
        open_source(tmp_path, "test")


def test_braces_and_globs(tmp_path):
    shard_set(tmp_path / "set", 12, 2)
    write(tmp_path / "set/val-000000.tar", samples(90, 2))
    base = f"{tmp_path}/set"

    def numbers(spec: str, split: str = "train") -> list[int]:
        return [int(name.split("/")[-1].split(".")[0]) for name in open_source(spec, split).names]

    assert numbers(f"{base}/train-{{000003..000010}}.tar") == list(range(6, 22))
    assert numbers(f"{base}/train-00000{{3..5}}.tar") == list(range(6, 12))
    assert numbers(f"{base}/train-{{000003,000001,000003}}.tar") == [6, 7, 2, 3]
    assert numbers(f"{base}/train-0000{{0..1}}{{0,1}}.tar") == [0, 1, 2, 3, 20, 21, 22, 23]
    assert numbers(f"{base}/train-*.tar") == list(range(24))
    assert numbers(f"{base}/*.tar", "val") == numbers(f"{base}/val-*.tar", "train") == [90, 91]
    assert numbers(f"{base}/{{train,val}}-000000.tar", "train") == [0, 1]
    assert numbers(f"{tmp_path}/**/train-00000[12].tar") == [2, 3, 4, 5]
    assert open_source(f"{base}/train-*.tar").splits == ()

    for name, said in (
        ("train-{000009..000020}.tar", r"9 of the 12 shards .* are missing: train-000012\.tar.*014\.tar, …"),
        ("train-{000011..000012}.tar", r"1 of the 2 shards .* are missing: train-000012\.tar\. Copy"),
        ("train-{3..1}.tar", "'{3..1}' in .* is no range"),
        ("train-{a..c}.tar", "'{a..c}' in .* is no range"),
        ("train-{}.tar", "is no range"),
        ("train-{0..9999999}.tar", "more than a million"),
        ("train-{0..9999}{0..999}.tar", "10000000 shards; at most"),
        ("test-*.tar", r"No shard matches .*test-\*\.tar"),
        ("train-000099.tar", "No such folder or file"),
        ("train-{000000..000001}.zip", "No such folder or file"),
    ):
        with pytest.raises(UsageError, match=said):
            open_source(f"{base}/{name}")


def test_shards_named_in_another_way(tmp_path, monkeypatch):
    monkeypatch.chdir(shard_set(tmp_path, 2, 3))
    assert open_source("train-000001.tar").names[0] == "train-000001.tar/0003.png"
    assert len(open_source("train-{000000..000001}.tar")) == len(open_source("*.tar")) == len(open_source(".")) == 6
    (tmp_path / "{odd}.tar").write_bytes((tmp_path / "train-000000.tar").read_bytes())
    assert len(open_source("{odd}.tar")) == 3  # a file of that name comes first
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("~/train-*.tar")) == 6


def test_mistakes_name_the_thing(tmp_path, photos):
    path = shard_set(tmp_path / "set", 1) / "train-000000.tar"
    packed = tmp_path / "packed" / "a.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for spec in (packed, packed.parent, f"{packed.parent}/*.tar.gz"):
        with pytest.raises(UsageError, match=r"a\.tar\.gz is compressed.*Uncompress it"):
            open_source(spec)
    shutil.copy(packed, path.parent)  # beside shards it is just another file
    assert len(open_source(path.parent)) == 6
    with pytest.raises(UsageError, match="choose 'raise' or 'skip'"):
        open_source(path, on_broken_shard="ignore")
    with pytest.raises(UsageError, match=r"No images in the 1 shards of .*text\.tar: looked for .*jpg"):
        open_source(write(tmp_path / "text.tar", {"a.txt": b"x", "1.cls": b"0"}))
    (path.parent / "train-000001.tar").mkdir()
    assert len(open_source(f"{path.parent}/*.tar")) == len(open_source(path.parent)) == 6  # a folder is no shard
    shutil.copy(path, photos / "old.tar")
    assert len(open_source(photos)) == 24  # a folder with pictures is a folder of pictures


# --- order and loading ----------------------------------------------------------------------------------------------


def dataset(source: Source, **more) -> ImageDataset:
    return ImageDataset(source, TRANSFORM, seed=3, **more)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_over_processes_and_workers(tmp_path, world, workers):
    source = open_source(shard_set(tmp_path, 5, 5))

    def served(epoch: int) -> list[list[tuple[int, int]]]:
        result = []
        for rank in range(world):
            loader = EpochLoader(
                dataset(source), 6, seed=1, rank=rank, world_size=world, num_workers=workers, drop_last=False
            )
            batches = list(loader.batches(epoch))
            assert not any(batch["skipped"] for batch in batches)
            result.append(
                [pair for b in batches for pair in zip(b["index"].tolist(), b["label"].tolist(), strict=True)]
            )
        return result

    first = served(0)
    assert sorted(pair for part in first for pair in part) == [(i, i % 3) for i in range(25)]
    assert served(0) == first
    assert served(1) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_within_an_epoch(tmp_path, workers):
    shard_set(tmp_path, 5, 5)
    whole = list(EpochLoader(dataset(open_source(tmp_path)), 4).batches(2))
    resumed = list(EpochLoader(dataset(open_source(tmp_path)), 4, num_workers=workers).batches(2, start_batch=2))
    assert len(whole) == len(resumed) + 2 == 6
    for a, b in zip(whole[2:], resumed, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["index"], b["index"])


def fake(counts: list[int]) -> Source:
    """A source of shards that do not exist, with so many images each."""
    parts = []
    for count in counts:
        members = np.zeros(count, dtype=shard_index.MEMBER)
        members["letters"] = 3
        parts.append(shard_index.ShardIndex((0, 0), "", "", members, np.frombuffer(b"1.a" * count, dtype=np.uint8)))
    names = [f"{n}.tar" for n in range(len(counts))]
    store = shards.ShardStore([Path(name) for name in names], names, parts)
    return shards.ShardSource(store, np.arange(sum(counts)), None, None)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=40), seed=st.integers(0, 2**32), data=st.data())
def test_an_order_is_a_permutation_that_reads_few_shards_at_a_time(counts, seed, data):
    source = fake(counts)
    part = source.take(data.draw(st.permutations(range(len(source))))[: data.draw(st.integers(0, len(source)))])
    for some in (source, part):
        order = some.epoch_order(np.random.default_rng(seed))
        assert sorted(order.tolist()) == list(range(len(some)))
        assert order.tolist() == some.epoch_order(np.random.default_rng(seed)).tolist()
        visited = [some.names[i].split("/")[0] for i in order]
        last = {name: place for place, name in enumerate(visited)}
        first = {name: place for place, name in reversed(list(enumerate(visited)))}
        for place in range(len(visited)):
            assert sum(first[n] <= place <= last[n] for n in last) <= shards.SHARDS_TOGETHER
        if len(some) > 1:
            assert sorted(some.substitute(1, step) for step in range(len(some))) == list(range(len(some)))


def test_an_order_mixes_within_a_group_and_differs_between_epochs():
    source = fake([100] * 32)
    order = source.epoch_order(np.random.default_rng(0))
    again = source.epoch_order(np.random.default_rng(1))
    assert (order != again).mean() > 0.9
    for start in range(0, 3200, 800):
        assert len({i // 100 for i in order[start : start + 800].tolist()}) == 8
        assert len({i // 100 for i in order[start : start + 60].tolist()}) == 8  # each batch, too
    assert {i // 100 for i in order[:800].tolist()} != {i // 100 for i in again[:800].tolist()}
    assert dataset(source).epoch_order(np.random.default_rng(0)).tolist() == order.tolist()


def test_other_sources_are_shuffled_as_before(photos):
    source = open_source(photos)
    order = dataset(source).epoch_order(np.random.default_rng(4))
    assert order.tolist() == np.random.default_rng(4).permutation(24).tolist()
    assert source.problems == source.take([1]).problems == []


def test_parts_of_shards(tmp_path):
    source = open_source(shard_set(tmp_path))
    few = subset_per_class(source, 2, seed=0)
    assert few.labels == [0, 0, 1, 1, 2, 2]
    kept, held = split_source(source, 0.25, seed=0)
    assert sorted([*kept.names, *held.names]) == source.names
    assert list(kept.names[2:4]) == list(kept.names)[2:4]
    for part in (few, kept, held):
        assert part.classes == ["0", "1", "2"]
        assert [part.store.size(name) for name in part.names] == [len(part.read(i)) for i in range(len(part))]
        assert [part.store.read(name) for name in part.names] == contents(part)
        assert [int(n.split("/")[1].split(".")[0]) % 3 for n in part.names] == part.labels
    assert len({part.fingerprint() for part in (source, few, kept, held)}) == 4
    assert source.store.names() == source.names


def test_a_store_is_sent_without_its_handles(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    source = open_source(shard_set(tmp_path, 5))
    expected = contents(source)
    assert expected == [picture(i) for i in range(30)]
    assert list(source.store._handles) == [3, 4]
    source.store.read(source.names[0])
    copy = pickle.loads(pickle.dumps(source))
    assert copy.store._handles == {}
    assert copy.store._rows is None
    assert contents(copy) == expected
    assert (copy.labels, copy.names, copy.fingerprint()) == (source.labels, source.names, source.fingerprint())
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if contents(source) == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
    monkeypatch.delattr(os, "pread", raising=False)  # as on Windows
    assert contents(source) == expected


def test_the_recipe_says_what_happens_to_a_broken_shard(tmp_path):
    shard_set(tmp_path / "set", 3, 6)
    shard_set(tmp_path / "held", 2, 6)
    os.truncate(tmp_path / "set/train-000001.tar", 3000)
    os.truncate(tmp_path / "held/train-000001.tar", 3000)
    with pytest.raises(UsageError, match=r"set data\.on_broken_shard=skip"):
        open_sources(DataConfig(train=str(tmp_path / "set")), 0, labelled=True)
    config = DataConfig(
        train=str(tmp_path / "set"), eval=f"{tmp_path}/held/*.tar", labels_per_class=2, on_broken_shard="skip"
    )
    train, held = open_sources(config, 0, labelled=True)
    assert (len(train), len(held)) == (6, 7)
    assert [name for name, _ in train.problems] == [name for name, _ in held.problems] == ["train-000001.tar"]


# --- the index beside the shards ------------------------------------------------------------------------------------


def test_a_second_opening_reads_no_header(tmp_path, monkeypatch):
    source = open_source(shard_set(tmp_path))
    expected = contents(source)
    assert len(caches(tmp_path)) == 1
    os.truncate(write(tmp_path / "sub/train-0.tar", samples(0, 5)), 4000)
    with pytest.raises(UsageError) as first:
        open_source(tmp_path / "sub")

    def fail(*_, **__):
        raise AssertionError("a header was read")

    monkeypatch.setattr(tarfile, "open", fail)
    again = open_source(f"{tmp_path}/*.tar")
    assert contents(again) == expected
    assert (again.labels, again.fingerprint()) == (source.labels, source.fingerprint())
    with pytest.raises(UsageError) as second:  # a broken one is remembered as well
        open_source(tmp_path / "sub")
    assert str(first.value) == str(second.value)
    assert caches(tmp_path)[0].suffix == ".npz"  # nothing temporary is left


def test_only_shards_that_changed_are_read_again(tmp_path, monkeypatch):
    open_source(shard_set(tmp_path))
    write(tmp_path / "train-000002.tar", samples(60, 4))
    scanned, scan = [], shard_index._read_headers
    monkeypatch.setattr(shard_index, "_read_headers", lambda path: (scanned.append(path.name), scan(path))[1])
    source = open_source(tmp_path)
    assert scanned == ["train-000002.tar"]
    assert contents(source)[12:16] == [picture(i) for i in range(60, 64)]
    path = tmp_path / "train-000003.tar"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert len(open_source(tmp_path)) == 22
    assert scanned == ["train-000002.tar", "train-000003.tar"]
    (tmp_path / "train-000000.tar").unlink()
    assert len(open_source(tmp_path)) == 16


def spoil(cache: Path, **changes) -> None:
    with np.load(cache) as stored:
        parts = dict(stored) | changes
    with open(cache, "wb") as file:
        np.savez(file, **parts)


def about(*entry) -> np.ndarray:
    return np.frombuffer(json.dumps([shard_index.CACHE_FORMAT, [entry]]).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.write_bytes(b""),
        lambda c: c.write_bytes(b"PK\x03\x04 nonsense"),
        lambda c: os.truncate(c, c.stat().st_size // 2),
        lambda c: c.write_bytes(c.read_bytes().replace(b"0003", b"0009")),  # the checksum tells
        lambda c: spoil(c, about=np.frombuffer(b"[0, []]", dtype=np.uint8)),
        lambda c: spoil(c, about=np.array([{"an": "object"}], dtype=object)),
        lambda c: spoil(c, members=np.zeros(6)),
        lambda c: spoil(c, members=np.zeros(2, dtype=shard_index.MEMBER)),
        lambda c: spoil(c, names=np.zeros(3, dtype=np.uint8)),
        lambda c: spoil(c, members=np.array([(-1, 5, 0, 8, True)] * 6, dtype=shard_index.MEMBER)),
        lambda c: spoil(c, members=np.array([(0, 2**40, 0, 8, True)] * 6, dtype=shard_index.MEMBER)),
        lambda c: spoil(c, about=about("train-000000.tar", 1, 1, "", "", 6)),
        lambda c: (c.unlink(), c.mkdir()),
    ],
)
def test_a_damaged_index_is_ignored(tmp_path, damage):
    expected = contents(open_source(shard_set(tmp_path, 1)))
    damage(caches(tmp_path)[0])
    assert contents(open_source(tmp_path)) == expected
    assert [c for c in caches(tmp_path) if c.suffix != ".npz"] == []
    if caches(tmp_path)[0].is_file():  # it has been written anew
        assert set(shard_index._load_index(caches(tmp_path)[0])) == {"train-000000.tar"}


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    shard_set(tmp_path)
    plain = builtins.open

    def guarded(file, mode="r", *rest, **more):
        if mode == "xb":
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, mode, *rest, **more)

    tmp_path.chmod(0o555)  # enough for anybody but root
    monkeypatch.setattr(builtins, "open", guarded)
    try:
        assert len(open_source(tmp_path)) == len(open_source(tmp_path)) == 24
        assert caches(tmp_path) == []
    finally:
        tmp_path.chmod(0o755)


def test_several_processes_may_index_at_once(tmp_path):
    shard_set(tmp_path, 8, 20)
    start = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    with start.Pool(4) as pool:
        found = pool.map(_fingerprint, [tmp_path] * 8)
    assert len(set(found)) == 1
    assert len(caches(tmp_path)) == 1
    assert len(shard_index._load_index(caches(tmp_path)[0])) == 8


def _fingerprint(path: Path) -> str:
    return open_source(path).fingerprint()


# --- broken shards --------------------------------------------------------------------------------------------------


def cut(at: int):
    return lambda path: os.truncate(path, at)


def overwrite(at: int, data: bytes):
    def act(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(data)

    return act


def append(data: bytes):
    return lambda path: path.write_bytes(path.read_bytes() + data)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


def sparse(path: Path) -> None:
    info = tarfile.TarInfo("0002.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    overwrite(4096, info.tobuf(tarfile.GNU_FORMAT))(path)


def below_zero(path: Path) -> None:
    info = tarfile.TarInfo("0002.cls")
    info.size = -1536
    overwrite(4096, info.tobuf(tarfile.GNU_FORMAT))(path)


# A sample is 4 blocks of 512 bytes: two headers, a label, a picture. Six of them end at 12288, with the end mark there.
BROKEN = {
    "cut within a picture": (cut(7700), "cut short at byte 7700, within 0003.png", 3),
    "cut after a label": (cut(7168), "cut short at byte 7168, before its end mark", 3),
    "cut between samples": (cut(8192), "cut short at byte 8192, before its end mark", 4),
    "cut within a header": (cut(8300), "cut short at byte 8300, before its end mark", 4),
    "cut within padding": (cut(8150), "cut short at byte 8150, before its end mark", 4),
    "cut before the end mark": (cut(12288), "cut short at byte 12288, before its end mark", 6),
    "cut within the first header": (cut(300), "cut short at byte 300", 0),
    "empty file": (cut(0), "empty file", 0),
    "nothing but zeros": (lambda path: path.write_bytes(bytes(10240)), "holds no file", 0),
    "text": (lambda path: path.write_text("<html>404</html>" * 99), "no tar file", 0),
    "compressed": (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "compressed file", 0),
    "bad header": (overwrite(4096 + 148, b"7777777"), "damaged at byte 4096: bad checksum", 2),
    "first header bad": (overwrite(0, b"\xff" * 200), "no tar file", 0),
    "noise in a header": (overwrite(4096, bytes(range(256)) * 2), "damaged at byte 4096: ", 2),
    "hole": (overwrite(4096, bytes(2048)), "16384 bytes follow its end mark at byte 4096", 2),
    "two archives in one": (append(b"x" * 600), "8792 bytes follow its end mark at byte 12288", 6),
    "end never written": (append(bytes(2**21)), "bytes follow its end mark at byte 12288", 6),
    "size below zero": (below_zero, "damaged at byte 4096: ", 2),
    "sparse": (sparse, "0002.png at byte 4096 is stored in pieces", 2),
    "gone": (dangling, "cannot be read (No such file or directory)", 0),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_shards(tmp_path, kind):
    damage, reason, kept = BROKEN[kind]
    shard_set(tmp_path, 3)
    damage(tmp_path / "train-000000.tar")
    spec = tmp_path
    for _ in range(2):  # from the headers, and from the index
        with pytest.raises(UsageError) as error:
            open_source(spec)
        assert str(error.value).startswith(f"1 of the 3 shards of {tmp_path} are broken, first train-000000.tar: ")
        assert reason in str(error.value)
        assert "data.on_broken_shard=skip" in str(error.value)
        source = open_source(spec, on_broken_shard="skip")
        ((name, why),) = source.problems
        assert name == "train-000000.tar"
        assert reason in why
        assert why.endswith(f"; {kept} samples are kept")
        assert contents(source) == [picture(i) for i in [*range(kept), *range(6, 18)]]
        assert source.labels == [i % 3 for i in [*range(kept), *range(6, 18)]]
        assert source.take([0]).problems == source.problems
        assert sorted(source.epoch_order(np.random.default_rng(0)).tolist()) == list(range(kept + 12))


def test_all_shards_broken(tmp_path):
    shard_set(tmp_path, 2)
    (tmp_path / "train-000000.tar").write_bytes(b"")
    os.truncate(tmp_path / "train-000001.tar", 100)
    for policy in ("raise", "skip"):
        with pytest.raises(
            UsageError, match=r"Nothing can be read from .*: all 2 shards are broken, first train-000000"
        ):
            open_source(tmp_path, on_broken_shard=policy)
    write(tmp_path / "train-000001.tar", {"x.txt": b""})
    with pytest.raises(UsageError, match="1 of the 2 shards"):
        open_source(tmp_path, on_broken_shard="skip")


def test_a_shard_that_could_not_be_read_is_tried_again(tmp_path):
    shard_set(tmp_path, 2)
    path = tmp_path / "train-000001.tar"
    data = path.read_bytes()
    dangling(path)
    assert len(open_source(tmp_path, on_broken_shard="skip")) == 6
    path.unlink()
    path.write_bytes(data)
    assert len(open_source(tmp_path)) == 12
    assert open_source(tmp_path).problems == []


def test_a_disk_that_fails_within_a_shard(tmp_path, monkeypatch):
    shard_set(tmp_path, 2)
    scan = shard_index._scan

    def fail(file, length, contents):
        scan(file, length, contents)
        if file.name.endswith("1.tar"):
            raise OSError(5, "Input/output error")
        return ""

    monkeypatch.setattr(shard_index, "_scan", fail)
    source = open_source(tmp_path, on_broken_shard="skip")
    assert source.problems == [("train-000001.tar", "it cannot be read (Input/output error); 0 samples are kept")]
    assert contents(source) == [picture(i) for i in range(6)]


def swap_quietly(path: Path) -> None:
    """Pictures that no longer decode, in a file with the size and the date that it had."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"PNG\r\n", b"PNX\r\n"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut(5000), "has changed since it was opened"),
        (overwrite(4000, b"x"), "has changed since it was opened"),
        (swap_quietly, "not an image"),
        (Path.unlink, "No such file"),
    ],
    ids=["cut", "written", "swapped", "removed"],
)
def test_a_shard_that_changes_while_a_run_reads_it(tmp_path, change, said, opened):
    """Its samples are replaced by others (training) or left out (evaluation), and reported; nothing crashes."""
    path = shard_set(tmp_path) / "train-000001.tar"
    os.utime(path, ns=(0, 0))  # else it might be written to within a tick of the file system's clock
    source = open_source(tmp_path)
    if opened:
        contents(source)
    change(path)
    if opened and change is Path.unlink:  # while it is open, it is there
        assert contents(source) == [picture(i) for i in range(24)]
        return
    lost = source.names[6:12]
    for workers in (0, 2):
        train = list(EpochLoader(dataset(source), 6, num_workers=workers).batches(0))
        assert sum(len(batch["index"]) for batch in train) == 24
        assert {name for batch in train for name, _ in batch["skipped"]} == set(lost)
        assert all(said in reason for batch in train for _, reason in batch["skipped"])
        held = dataset(source, replace_corrupt=False)
        rest = list(EpochLoader(held, 6, shuffle=False, drop_last=False, num_workers=workers).batches(0))
        assert torch.cat([batch["index"] for batch in rest]).tolist() == [*range(6), *range(12, 24)]


def test_a_lost_shard_costs_one_attempt_per_sample(tmp_path):
    """A replacement comes from another shard: the neighbours are as lost."""
    source = open_source(shard_set(tmp_path, 4, 50))
    (tmp_path / "train-000002.tar").unlink()
    tries = [len(dataset(source)[0, index]["skipped"]) for index in range(100, 150)]
    assert sum(tries) <= 100
    assert Counter(tries).most_common(1)[0][0] == 1


def test_a_read_is_whole_or_an_error(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0123456789")
    handle = shards._Handle(tmp_path / "a")
    assert handle.read(2, 5) == b"23456"
    assert handle.read(10, 0) == b""
    with pytest.raises(EOFError, match="ends 3 bytes before"):
        handle.read(8, 5)
    if hasattr(os, "pread"):
        whole = os.pread
        monkeypatch.setattr(os, "pread", lambda file, size, at: whole(file, min(size, 2), at))
        assert handle.read(2, 5) == b"23456"
    with pytest.raises(FileNotFoundError):
        shards._Handle(tmp_path / "b")


def test_an_item_is_read_by_one_read_of_its_bytes(tmp_path, monkeypatch):
    source = open_source(shard_set(tmp_path, 1))
    reads, whole = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: (reads.append(size), whole(file, size, at))[1])
    assert len(source.read(2)) == sum(reads)
    assert len(reads) == 1


# --- other software -------------------------------------------------------------------------------------------------


def test_webdataset_reads_our_shards_and_we_read_its(tmp_path, photos):
    webdataset = pytest.importorskip("webdataset")
    source = open_source(photos)
    paths = pack(source, tmp_path / "ours", 7)
    found = {
        int(sample["__key__"]): (sample["png"], int(sample["cls"]))
        for sample in webdataset.WebDataset([str(p) for p in paths], shardshuffle=False)
    }
    assert found == {i: (source.read(i), source.labels[i]) for i in range(24)}
    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/theirs/val-%04d.tar", maxcount=10, verbose=0) as writer:
        for i in range(24):
            label = {"cls": source.labels[i]} if i % 2 else {"json": {"label": source.labels[i]}}
            writer.write({"__key__": f"s{i:04d}", "png": source.read(i), **label})
    again = open_source(tmp_path / "theirs", "val")
    assert contents(again) == contents(source)
    assert again.labels == source.labels
