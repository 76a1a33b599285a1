"""The classes of label maps: names and colours, from a text file or from a list inside the package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from swinscale.config import suggest
from swinscale.errors import UsageError

Colour = tuple[int, int, int]
BUNDLED = ("ade20k", "camvid")
MOST = 65_536
"""Classes that a 16-bit map can tell apart."""
FORMS = "a line per class, 'name' or 'name,red,green,blue'"


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of their labels.

    Attributes:
        names: one per class, all different.
        colours: red, green, blue (0 … 255) of each class, all different; None: the list has none.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


def numbered_classes(count: int) -> ClassList:
    """Classes without names: "class 0", "class 1", …"""
    return ClassList(tuple(f"class {index}" for index in range(count)))


def class_list(spec: str) -> ClassList:
    """The classes that ``spec`` means.

    Args:
        spec: "ade20k" (150 classes) or "camvid" (11 classes with colours); a number of classes, which are then called
            "class 0", "class 1", …; or a text file, see ``parse_class_list``.

    Raises:
        UsageError: if there is no such file or list, or the file is not a list of classes.
    """
    if spec in BUNDLED:
        return parse_class_list((files("swinscale.data") / "bundled" / f"{spec}.txt").read_bytes(), spec)
    if re.fullmatch("[0-9]+", spec):
        if not 2 <= int(spec) <= MOST:
            raise UsageError(f"classes={spec} is not allowed: give a number of classes from 2 to {MOST}.")
        return numbered_classes(int(spec))
    path = Path(spec).expanduser()
    if not path.is_file():
        known = ", ".join(BUNDLED)
        raise UsageError(
            f"There is no file and no list of classes '{spec}'.{suggest(spec, BUNDLED)} Give {known}, a number, or a text "
            f"file with {FORMS}."
        )
    return parse_class_list(path.read_bytes(), str(path))


def parse_class_list(data: bytes, where: str) -> ClassList:
    """Reads a list of classes: a line per class, "name", "name,red,green,blue" or CamVid's "red green blue name".

    Empty lines and lines that begin with # are passed over, and so is a first line "name,r,g,b". All classes have a
    colour or none has.

    Args:
        where: the file, for messages.

    Raises:
        UsageError: naming file and line, for a line of another form, a name or a colour that is there twice, and for
            less than two classes.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{where} is not a text file in UTF-8; a list of classes has {FORMS}.") from None
    names: dict[str, int] = {}  # with the lines that they are on
    colours: dict[Colour, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not names and re.fullmatch(r"name\s*,\s*r\s*,\s*g\s*,\s*b", text.lower()):
            continue
        name, colour = _entry(text, f"{where}, line {number}")
        if name in names:
            raise UsageError(
                f"{where}, line {number}: '{name}' is there twice, first in line {names[name]}. Rename one."
            )
        if colour in colours:
            raise UsageError(
                f"{where}, line {number}: colour {colour} is there twice, first in line {colours[colour]}. Change one."
            )
        names[name] = number
        if colour is not None:
            colours[colour] = number
        if len(colours) not in (0, len(names)):
            raise UsageError(
                f"{where}, line {number}: some classes have a colour and some have not. Give all one, or none."
            )
    if not 2 <= len(names) <= MOST:
        raise UsageError(f"{where} has {len(names)} classes; a list of classes has 2 to {MOST}: {FORMS}.")
    return ClassList(tuple(names), tuple(colours) or None)


def _entry(text: str, where: str) -> tuple[str, Colour | None]:
    """Name and colour in a line."""
    if found := re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)", text):
        numbers, name = found.groups()[:3], found.group(4)
    elif "," in text:
        name, *cells = (cell.strip() for cell in text.split(","))
        if len(cells) != 3 or not name or not all(re.fullmatch("[0-9]+", cell) for cell in cells):
            raise UsageError(f"{where}: '{text[:60]}' is not 'name' or 'name,red,green,blue'.")
        numbers = (cells[0], cells[1], cells[2])
    else:
        return text, None
    red, green, blue = (int(number) for number in numbers)
    if max(red, green, blue) > 255:
        raise UsageError(f"{where}: colour {(red, green, blue)} is not allowed: red, green and blue are 0 … 255.")
    return name, (red, green, blue)
