"""Where films come from: folders, zip files, lists, and the tables of Kinetics with films that are gone (R-DOWN-6)."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from swinscale.data.film_sources import open_films
from swinscale.data.sources import Source
from swinscale.data.video import VIDEOS
from swinscale.errors import UsageError


def touch(root: Path, *names: str) -> Path:
    """Files without content: sources decode nothing."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def labelled(source: Source) -> dict[str, str]:
    """The class of each film."""
    assert source.labels is not None and source.classes is not None
    return {name: source.classes[label] for name, label in zip(source.names, source.labels, strict=True)}


# Folders and zip files.


def test_a_folder_per_class(tmp_path: Path):
    """Natural order; other files, hidden ones and what Macs leave are passed over."""
    films = ["run/10.mp4", "run/2.mp4", "walk/1.avi", "walk/more/3.MKV"]
    touch(
        tmp_path, *films, "run/notes.txt", "run/.hidden.mp4", "__MACOSX/run/2.mp4", "walk/sound.mp3", "walk/poster.jpg"
    )
    source = open_films(tmp_path)
    assert labelled(source) == {
        "run/2.mp4": "run",
        "run/10.mp4": "run",
        "walk/1.avi": "walk",
        "walk/more/3.MKV": "walk",
    }
    assert source.names[:2] == ["run/2.mp4", "run/10.mp4"] and source.splits == () and source.problems == []


def test_every_kind_of_film_is_found(tmp_path: Path):
    kinds = sorted([*VIDEOS, ".gif"])
    touch(tmp_path, *(f"{label}/film{kind}" for kind in kinds for label in "ab"))
    assert len(open_films(tmp_path)) == 2 * len(kinds) and {".mp4", ".webm", ".ts", ".wmv", ".3gp"} <= VIDEOS
    assert ".gif" not in VIDEOS  # beside images it is one


@pytest.mark.parametrize("zipped", [False, True])
def test_parts(tmp_path: Path, zipped: bool):
    names = [f"{part}/{label}/0.mp4" for part in ("train", "validation", "test") for label in "ab"]
    place: Path = touch(tmp_path / "films", *names, "train/b/1.mp4")
    if zipped:
        with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
            for name in [*names, "train/b/1.mp4"]:
                archive.write(place / name, f"data/{name}")
        place = tmp_path / "films.zip"
    prefix = "data/" if zipped else ""
    assert set(open_films(place).splits) == {"train", "val", "test"}
    assert open_films(place).names == [prefix + n for n in ("train/a/0.mp4", "train/b/0.mp4", "train/b/1.mp4")]
    assert labelled(open_films(place, "val")) == {f"{prefix}validation/{c}/0.mp4": c for c in "ab"}
    assert open_films(place, "test").read(0) == b"test/a/0.mp4"


def test_films_without_classes(tmp_path: Path):
    assert open_films(touch(tmp_path, "1.mp4", "2.mp4")).labels is None


# Lists.


def films(tmp_path: Path, count: int = 4) -> Path:
    return touch(tmp_path, *(f"clips/{number}.mp4" for number in range(count)), "clips/my film.mp4")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("list.csv", ["path,label", "clips/0.mp4,run", "clips/1.mp4,play guitar", "clips/my film.mp4,run"]),
        ("list.tsv", ["clips/0.mp4\trun", "clips/1.mp4\tplay guitar", "clips/my film.mp4\trun"]),
        ("list.txt", ["clips/0.mp4,run", "", "# more", "clips/1.mp4,play guitar", "clips/my film.mp4,run"]),
    ],
)
def test_a_list_with_classes(tmp_path: Path, name: str, lines: list[str]):
    (films(tmp_path) / name).write_text("\n".join(lines))
    classes = {"clips/0.mp4": "run", "clips/1.mp4": "play guitar", "clips/my film.mp4": "run"}
    assert labelled(open_films(tmp_path / name)) == classes


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_a_list_with_a_space_before_the_number_of_the_class(tmp_path: Path, name: str):
    """As OpenMMLab and VideoMAE have them: number 7 is class 7, whether or not there are others."""
    (films(tmp_path) / name).write_text("clips/1.mp4 7\n\nclips/my film.mp4 0\r\n# clips/9.mp4 1\nclips/0.mp4\t7\n")
    source = open_films(tmp_path / name)
    assert source.names == ["clips/1.mp4", "clips/my film.mp4", "clips/0.mp4"] and source.labels == [7, 0, 7]
    assert source.classes == [f"class {number}" for number in range(8)]


def test_a_list_with_a_space_before_the_name_of_the_class(tmp_path: Path):
    (films(tmp_path) / "list.txt").write_text("clips/1.mp4 run\nclips/0.mp4 10\n")
    assert labelled(open_films(tmp_path / "list.txt")) == {"clips/1.mp4": "run", "clips/0.mp4": "10"}


def test_a_list_without_classes(tmp_path: Path):
    (films(tmp_path) / "list.txt").write_text("clips/1.mp4\nclips/my film.mp4\n")
    source = open_films(tmp_path / "list.txt")
    assert source.names == ["clips/1.mp4", "clips/my film.mp4"] and source.labels is None


# Tables of Kinetics.

HEADER = "label,youtube_id,time_start,time_end,split"


def table(path: Path, rows: Sequence[str], header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize("annotations", ["annotations/", ""])
def test_the_published_layout(tmp_path: Path, annotations: str):
    """Films by class, by part, or all in one folder; with or without their seconds in the name; ids may begin with a hyphen."""
    place = touch(
        tmp_path, "train/play_guitar/-ab_000010_000020.mp4", "train/run/cd.webm", "val/run/ef_000001_000011.mp4",
        "test/gh_000000_000010.mkv",
    )  # fmt: skip
    table(
        place / f"{annotations}train.csv", ["play guitar,-ab,10,20,train", "run,cd,5,15,train", "run,gone,0,10,train"]
    )
    table(place / f"{annotations}val.csv", ["run,ef,1,11,validate", "play guitar,lost,3,13,validate"])
    table(place / f"{annotations}test.csv", ["gh,0,10,test"], "youtube_id,time_start,time_end,split")
    training = open_films(place)
    assert labelled(training) == {"train/play_guitar/-ab_000010_000020.mp4": "play guitar", "train/run/cd.webm": "run"}
    assert training.problems == [("gone_000000_000010.mp4", "named in train.csv, but not there")]
    assert set(training.splits) == {"train", "val", "test"}
    held = open_films(place, "val")
    assert labelled(held) == {"val/run/ef_000001_000011.mp4": "run"} and held.classes == training.classes
    assert len(held.problems) == 1 and held.take([0]).problems == held.problems
    tested = open_films(place, "test")
    assert tested.names == ["test/gh_000000_000010.mkv"] and tested.labels is None
    assert labelled(open_films(place / f"{annotations}val.csv")) == labelled(held)


def test_parts_have_the_same_classes_where_one_lacks_some(tmp_path: Path):
    """A table of a few films for evaluation has not all 400: the numbers of classes are those of training all the same."""
    touch(tmp_path, *(f"{name}.mp4" for name in "abcd"))
    table(tmp_path / "train.csv", ["x,a,0,10,", "y,b,0,10,", "z,c,0,10,"])
    table(tmp_path / "val.csv", ["z,d,0,10,"])
    held = open_films(tmp_path, "val")
    assert held.classes == open_films(tmp_path).classes == ["x", "y", "z"] and held.labels == [2]


def test_one_name_in_several_places(tmp_path: Path):
    """The film of a row is that in the folder of its class, or of its part."""
    touch(tmp_path, *(f"{place}/a_000000_000010.mp4" for place in ("run", "sing", "val", "walk")))
    table(tmp_path / "train.csv", ["sing,a,0,10,", "walk,a,0,10,"])
    assert open_films(tmp_path).names == ["sing/a_000000_000010.mp4", "walk/a_000000_000010.mp4"]
    table(tmp_path / "val.csv", ["jump,a,0,10,", "sing,a,0,10,"])
    assert open_films(tmp_path, "val").names == ["val/a_000000_000010.mp4", "sing/a_000000_000010.mp4"]


def test_seconds_may_be_written_as_fractions(tmp_path: Path):
    touch(tmp_path, "a_000010_000020.mp4")
    table(tmp_path / "train.csv", ["run,a,10.0,20.5,"])
    assert open_films(tmp_path).names == ["a_000010_000020.mp4"]


# Mistakes.


def complaint(spec: Path, split: str = "train") -> str:
    with pytest.raises(UsageError) as error:
        open_films(spec, split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing(tmp_path: Path):
    assert complaint(tmp_path / "nowhere").startswith("No such folder or file")
    touch(tmp_path / "images", "a/1.jpg", "b/2.jpg")
    assert "No films in" in complaint(tmp_path / "images") and "mp4" in complaint(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    assert "found 0 other files" in complaint(tmp_path / "empty")
    touch(tmp_path / "parts", "train/a/1.mp4", "train/b/1.mp4", "test/a/1.mp4")
    assert "has no 'val' part, only test, train" in complaint(tmp_path / "parts", "val")
    assert "is not a source" in complaint(touch(tmp_path, "film.mp4") / "film.mp4")


def test_mistakes_in_lists(tmp_path: Path):
    """The line is that of the file, whatever comments and empty lines are before it."""
    films(tmp_path)
    for name, text, told in (
        (
            "a.txt",
            "# films\n\nclips/0.mp4 1\nclips/99.mp4 1\n",
            "a.txt, line 4: there is no file clips/99.mp4 (paths are relative",
        ),
        ("b.csv", "path,label\nclips/0.mp4,1\nclips/99.mp4,1\n", "b.csv, line 3: there is no file clips/99.mp4"),
        ("c.csv", "clips/0.mp4,1\nclips/1.mp4,\n", "1 of 2 lines have no label"),
        ("d.txt", "\n\n", "names no image"),
    ):
        (tmp_path / name).write_text(text)
        assert told in complaint(tmp_path / name)
    (tmp_path / "e.csv").write_bytes(b"\xff\xfe\x00clips")
    assert "not a text file in UTF-8" in complaint(tmp_path / "e.csv")


def test_mistakes_in_tables(tmp_path: Path):
    touch(tmp_path, "a.mp4", "b.mp4")
    for rows, told in (
        (["run,a,ten,20,"], "line 2: time_start and time_end are not numbers of seconds"),
        (["run,a,0,10,", "run,b,inf,10,"], "line 3: time_start and time_end are not numbers of seconds"),
        (["run,a"], "line 2: time_start and time_end are not numbers"),
        (["run,x,0,10,", "run,y,0,10,"], "None of the 2 films of"),
        (["run,a,0,10,", ",b,0,10,"], "1 of 2 films have no label. Give every line one, or none."),
    ):
        table(tmp_path / "train.csv", rows)
        assert told in complaint(tmp_path)
        assert told in complaint(tmp_path / "train.csv")
    table(tmp_path / "train.csv", ["run,x,0,10,"])
    assert "x_000000_000010.mp4 there" in complaint(tmp_path)
    table(tmp_path / "train.csv", ["run,a,0,10,"])
    assert "has no 'val' part, only train" in complaint(tmp_path, "val")


def test_a_table_of_something_else_is_none(tmp_path: Path):
    """A folder of films by class may hold a train.csv that is not a table of Kinetics, even one that is not text."""
    touch(tmp_path, "run/a.mp4", "walk/b.mp4")
    for content in (b"id,name\n1,x\n", b"\xff\xfe\x00", b"", b"label,youtube_id,time_start,time_end\n"):
        (tmp_path / "train.csv").write_bytes(content)
        assert labelled(open_films(tmp_path)) == {"run/a.mp4": "run", "walk/b.mp4": "walk"}
