"""Where films come from: folders, zip files, list files, and the tables of Kinetics."""

from __future__ import annotations

import csv
from pathlib import Path

from swinscale.data.sources import SPLITS, FolderStore, Source, _natural, check_split, open_source
from swinscale.data.video import VIDEOS
from swinscale.errors import UsageError

FILMS = VIDEOS | {".gif"}  # where films are expected, a GIF file is one
EXTENSIONS = frozenset(end.removeprefix(".") for end in FILMS)
KINETICS = ("youtube_id", "time_start", "time_end")
"""Columns by which a table of Kinetics is known; ``label`` is missing in the published test part."""


class FilmStore(FolderStore):
    """Films below a folder, of which some that a table names are not there."""

    def __init__(self, root: Path, problems: list[tuple[str, str]]):
        super().__init__(root)
        self.problems = problems


def open_films(spec: str | Path, split: str = "train") -> Source:
    """Opens ``spec``.

    * a folder or a zip file, as ``open_source`` does for images: a folder per class, perhaps inside ``train``, ``val``, ``test``;
    * a table of Kinetics (.csv with the columns youtube_id, time_start, time_end and label), whose films lie anywhere below its
      folder, or the one above where it lies in ``annotations``, as ``ID_000010_000020.mp4`` or ``ID.mp4``. A folder that holds
      ``train.csv`` or ``annotations/train.csv`` (for ``split`` "train") is such a table. Films that are not there, as many of
      Kinetics are no longer, are left out and listed in ``Source.problems``;
    * a list file (.txt, .csv, .tsv): a path per line, relative to the file, and a label after a comma, a tab or a space. After a
      space, labels that are all numbers are the numbers of classes.

    Raises:
        UsageError: if it is missing, holds no film, or has splits but not this one.
    """
    path = Path(spec).expanduser()
    tables = _tables(path) if path.is_dir() else {}
    if tables:
        path = tables[check_split(split, tables, str(spec))]
    if path.suffix.lower() == ".csv" and path.is_file() and (rows := _kinetics_rows(path)):
        others = [row for table in tables.values() if table != path for row in _kinetics_rows(table)]
        return _from_kinetics(path, rows, others, list(tables))
    if path.suffix.lower() in (".txt", ".csv") and path.is_file() and (listed := _spaced_list(path)):
        return listed
    return open_source(spec, split, kinds=EXTENSIONS)


def _tables(folder: Path) -> dict[str, Path]:
    """The tables of Kinetics in a folder, by split."""
    found = {}
    for split, words in SPLITS.items():
        for candidate in (place / f"{word}.csv" for place in (folder, folder / "annotations") for word in words):
            if candidate.is_file() and _is_kinetics(candidate):
                found[split] = candidate
    return found


def _is_kinetics(path: Path) -> bool:
    """Whether the first line of a file is that of a table of Kinetics."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return set(KINETICS) <= set(next(csv.reader(file), ()))
    except (UnicodeDecodeError, csv.Error):
        return False


def _kinetics_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of Kinetics; [] for any other file."""
    if not _is_kinetics(path):
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        return []


def _from_kinetics(path: Path, rows: list[dict[str, str]], others: list[dict[str, str]], splits: list[str]) -> Source:
    """The films of ``rows``; their classes are those of ``others`` too, so that all parts have the same."""
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    there: dict[str, list[str]] = {}
    for name in FolderStore(root).names():
        if Path(name).suffix.lower() in FILMS:
            there.setdefault(Path(name).stem, []).append(name)
    names, texts, absent = [], [], list[tuple[str, str]]()
    for number, row in enumerate(rows, 2):
        try:
            start, end = (int(float(row[column])) for column in KINETICS[1:])
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"{path}, line {number}: time_start and time_end are not numbers of seconds.") from None
        stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        found = there.get(stem) or there.get(row["youtube_id"])
        if found is None:
            absent.append((f"{stem}.mp4", f"named in {path.name}, but not there"))
            continue
        names.append(_of_class(found, row.get("label") or "", path.stem))
        texts.append(row.get("label") or "")
    if not names:
        raise UsageError(f"None of the {len(rows)} films of {path} is below {root}: they are called {stem}.mp4 there.")
    store = FilmStore(root, absent)
    if not any(texts):
        return Source(store, names, None, None, splits)
    if not all(texts):
        raise UsageError(
            f"{path}: {texts.count('')} of {len(texts)} films have no label. Give every line one, or none."
        )
    classes = sorted({row["label"] for row in [*rows, *others] if row.get("label")}, key=_natural)
    index = {name: number for number, name in enumerate(classes)}
    return Source(store, names, [index[text] for text in texts], classes, splits)


def _of_class(found: list[str], label: str, split: str) -> str:
    """Of files with one name: the one in a folder of its class, or else of its part."""
    for word in (label, label.replace(" ", "_"), split):
        for name in found:
            if word and word in Path(name).parts[:-1]:
                return name
    return found[0]


def _spaced_list(path: Path) -> Source | None:
    """A list with a space before the label, ``folder/film.mp4 7``; None for one of another kind."""
    try:
        lines = list(enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1))
    except UnicodeDecodeError:
        return None
    rows = [(number, line.rsplit(maxsplit=1)) for number, line in lines if line.strip() and not line.startswith("#")]
    if not rows or any(len(row) != 2 or Path(row[0]).suffix.lower() not in FILMS for _, row in rows):
        return None
    names = [name.strip() for _, (name, _) in rows]
    for (number, _), name in zip(rows, names, strict=True):
        if not (path.parent / name).is_file():
            raise UsageError(f"{path}, line {number}: there is no file {name} (paths are relative to the list file).")
    texts = [text for _, (_, text) in rows]
    if all(text.isdecimal() for text in texts):
        classes = [f"class {index}" for index in range(1 + max(map(int, texts)))]
        return Source(FolderStore(path.parent), names, list(map(int, texts)), classes)
    classes = sorted(set(texts), key=_natural)
    index = {name: number for number, name in enumerate(classes)}
    return Source(FolderStore(path.parent), names, [index[text] for text in texts], classes)
