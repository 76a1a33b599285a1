"""Folders, list files, zip archives and the bundled pictures; and the mistakes people make with them."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swinscale.data import Source, open_source, split_source, subset_per_class
from swinscale.errors import UsageError


def test_a_folder_per_class(photos):
    source = open_source(photos)
    assert source.classes == ["blue", "green", "red"]
    assert source.labels == [0] * 8 + [1] * 8 + [2] * 8
    assert source.names[:2] == ["blue/0.png", "blue/1.png"]
    assert source.read(0) == (photos / "blue/0.png").read_bytes()


def test_a_flat_folder_has_no_labels(photos):
    source = open_source(photos / "red")
    assert source.labels is None
    assert len(source) == 8


def test_natural_order_and_ignored_files(tmp_path, photos):
    for name in ("10", "9", "1"):
        shutil.copy(photos / "red/0.png", tmp_path / f"{name}.PNG")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    shutil.copy(photos / "red/0.png", tmp_path / "__MACOSX/a.png")
    shutil.rmtree(photos)
    assert open_source(tmp_path).names == ["1.PNG", "9.PNG", "10.PNG"]


def test_the_order_does_not_depend_on_the_disk(tmp_path, photos):
    """Names that differ in leading zeros alone, digits that are no numbers, bytes that are no text."""
    names = ["img1.png", "img01.png", "img001.png", "m²3.png", "img10.png", os.fsdecode(b"caf\xe9.png")]
    for folder, order in (("a", names), ("b", names[::-1])):
        (tmp_path / folder).mkdir()
        for name in order:
            shutil.copy(photos / "red/0.png", tmp_path / folder / name)
    a, b = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    assert a.names == b.names == [names[5], "img001.png", "img01.png", "img1.png", "img10.png", "m²3.png"]
    assert a.fingerprint() == b.fingerprint()


def test_links_are_followed_but_not_in_circles(tmp_path, photos):
    shutil.move(photos / "red", tmp_path / "elsewhere")
    (photos / "red").symlink_to(tmp_path / "elsewhere")
    (photos / "blue" / "up").symlink_to(photos)
    source = open_source(photos)
    assert len(source) == 24
    assert source.classes == ["blue", "green", "red"]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "Validation", "testing")])
def test_splits(tmp_path, photos, names):
    for index, name in enumerate(names):
        shutil.copytree(photos, tmp_path / "set" / name)
        (tmp_path / "set" / name / "red" / f"{index}.png").unlink()
    for index, split in enumerate(("train", "val", "test")):
        source = open_source(tmp_path / "set", split)
        assert source.splits == ("train", "val", "test")
        assert len(source) == 23
        assert not any(n.endswith(f"red/{index}.png") for n in source.names)
        assert source.classes == ["blue", "green", "red"]
    shutil.rmtree(tmp_path / "set" / names[2])
    with pytest.raises(UsageError, match="no 'test' part, only train, val"):
        open_source(tmp_path / "set", "test")


def test_list_files(tmp_path, photos):
    (tmp_path / "a.csv").write_text("path,label\nphotos/red/0.png,rot\nphotos/blue/1.png,blau\n\n# a comment\n")
    source = open_source(tmp_path / "a.csv")
    assert source.classes == ["blau", "rot"]
    assert source.labels == [1, 0]
    assert source.read(1) == (photos / "blue/1.png").read_bytes()
    (tmp_path / "b.txt").write_text("photos/red/0.png\n")
    assert open_source(tmp_path / "b.txt").labels is None
    (tmp_path / "c.tsv").write_text("photos/red/0.png\t1\nphotos/red/1.png\t10\nphotos/red/2.png\t2\n")
    assert open_source(tmp_path / "c.tsv").classes == ["1", "2", "10"]
    (tmp_path / "photos/red/first").write_bytes((photos / "red/0.png").read_bytes())
    (tmp_path / "g.txt").write_text('photos/red/first\n"photos/red/0.png"\n', encoding="utf-8-sig")
    assert open_source(tmp_path / "g.txt").names == ["photos/red/first", "photos/red/0.png"]  # neither is a header
    (tmp_path / "h.txt").write_text("photos/red/0.pgn\n")
    with pytest.raises(UsageError, match=r"line 1: there is no file photos/red/0\.pgn"):
        open_source(tmp_path / "h.txt")
    (tmp_path / "d.txt").write_text("photos/red/0.png,a\nphotos/red/99.png,b\n")
    with pytest.raises(UsageError, match=r"line 2: there is no file photos/red/99\.png"):
        open_source(tmp_path / "d.txt")
    (tmp_path / "e.csv").write_text("photos/red/0.png,a\nphotos/red/1.png\n")
    with pytest.raises(UsageError, match="1 of 2 lines have no label"):
        open_source(tmp_path / "e.csv")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        open_source(tmp_path / "f.txt")


@pytest.mark.parametrize("top", ["", "my photos/"])
def test_zip_files(tmp_path, photos, top):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in photos.rglob("*.png"):
            file.write(path, top + path.relative_to(photos).as_posix())
        file.writestr("__MACOSX/._x.png", b"")
    source = pickle.loads(pickle.dumps(open_source(archive)))
    assert source.classes == ["blue", "green", "red"]
    assert source.read(0) == (photos / "blue/0.png").read_bytes()
    if hasattr(os, "fork"):  # the child reads with a file position of its own
        opened = source.store._open()
        child = os.fork()
        if child == 0:
            os._exit(0 if source.store._open() is not opened and source.read(0)[:4] == b"\x89PNG" else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert source.store._open() is opened
    (tmp_path / "cut.zip").write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UsageError, match="not a zip file"):
        open_source(tmp_path / "cut.zip")


def test_bundled_pictures():
    """They come with the package, so that the demo needs no network: at most 5 MB, balanced, with their licence."""
    train, test = open_source("bundled:fashion-mnist"), open_source("bundled:fashion-mnist", "test")
    assert (len(train), len(test)) == (5000, 1000)
    assert train.classes == test.classes
    assert [train.labels.count(c) for c in range(10)] == [500] * 10
    assert Path(train.store.path).stat().st_size <= 5e6
    assert b"Zalando" in train.store.read("LICENSE")
    with pytest.raises(UsageError, match=r"Did you mean 'fashion-mnist'"):
        open_source("bundled:fashion-mnis")


def test_mistakes_name_the_thing(tmp_path, photos):
    with pytest.raises(UsageError, match=r"photo .*Did you mean 'photos'"):
        open_source(tmp_path / "photo")
    with pytest.raises(UsageError, match="does not exist either"):
        open_source(tmp_path / "no" / "where")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"/folder\."):  # it exists, and is empty
        open_source(tmp_path / "folder" / "photos")
    with pytest.raises(UsageError, match="No such folder"):
        open_source("x" * 5000)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match="not a source of images"):
        open_source(tmp_path / "notes.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"No images in .*empty: looked for .*jpg.*; found 0 other files"):
        open_source(tmp_path / "empty")


def test_few_labels_and_splits_are_balanced_and_repeatable(photos):
    source = open_source(photos)
    few = subset_per_class(source, 2, seed=1)
    assert few.labels == [0, 0, 1, 1, 2, 2]
    assert few.names == subset_per_class(source, 2, seed=1).names
    assert few.names != subset_per_class(source, 2, seed=2).names
    kept, held = split_source(source, 0.25, seed=0)
    assert [held.labels.count(c) for c in range(3)] == [2, 2, 2]
    assert sorted(kept.names + held.names) == sorted(source.names)
    with pytest.raises(UsageError, match="class 'blue' has 8 images"):
        subset_per_class(source, 9, seed=0)
    with pytest.raises(UsageError, match="no labels"):
        subset_per_class(open_source(photos / "red"), 1, seed=0)


@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_split_loses_nothing_and_both_parts_see_every_class(labels, fraction, seed):
    source = Source(None, [str(i) for i in range(len(labels))], labels, list("abcd"))
    if max(labels.count(c) for c in range(4)) < 2:
        return  # nothing to share
    kept, held = split_source(source, fraction, seed)
    assert sorted(kept.names + held.names, key=int) == source.names
    for part in (kept, held):
        assert [labels[int(n)] for n in part.names] == part.labels
        assert {c for c in range(4) if labels.count(c) > 1} <= set(part.labels)
    assert abs(len(held) - fraction * len(labels)) <= 4


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.3, 1.7])
def test_a_share_outside_0_to_1_is_refused(photos, fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        split_source(open_source(photos), fraction, 0)


def test_fingerprint_tells_sets_apart(photos):
    before = open_source(photos).fingerprint()
    assert open_source(photos).fingerprint() == before
    (photos / "red/0.png").unlink()
    assert open_source(photos).fingerprint() != before
