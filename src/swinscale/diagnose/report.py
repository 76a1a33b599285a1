"""One HTML file that says what was done and what came out: no script, no request, readable on a phone and in the dark.

A ``Report`` has sections, a section has blocks. Every text in them is escaped; only ``Plot.svg`` goes in as it is, and
comes from ``diagnose.plots``. The page forbids itself scripts and requests (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Plot:
    """A drawing from ``diagnose.plots``."""

    kind: ClassVar[str] = "plot"
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """An image, and in words what it shows."""

    kind: ClassVar[str] = "picture"
    image: Image.Image | NDArray[np.uint8]
    alt: str
    caption: str = ""

    @property
    def width(self) -> int:
        """In pixels."""
        return self.image.width if isinstance(self.image, Image.Image) else self.image.shape[1]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.image.height if isinstance(self.image, Image.Image) else self.image.shape[0]

    @property
    def uri(self) -> str:
        """The image as a ``data:`` address."""
        image = self.image if isinstance(self.image, Image.Image) else Image.fromarray(np.ascontiguousarray(self.image))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many in a line as the page has room for."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Grid:
    """Pictures in rows under column titles, such as the panels of ``pictures.reconstruction_panels``.

    They go in at their own size and are enlarged by the page, pixel by pixel.
    """

    kind: ClassVar[str] = "grid"
    columns: Sequence[str]
    rows: Sequence[Sequence[NDArray[np.uint8]]]
    caption: str = ""

    @property
    def cells(self) -> list[list[Picture]]:
        """The rows, with a description for each picture."""
        return [
            [Picture(image, f"{title} of image {number}") for title, image in zip(self.columns, row, strict=True)]
            for number, row in enumerate(self.rows, 1)
        ]


@dataclass(frozen=True)
class Table:
    """Rows of values; the first column names the row. Columns of numbers are set to the right."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether every value in it begins like a number."""
        values = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return [bool(column) and all(re.match(r"[-+−±]?\d", str(value)) for value in column) for column in values]


@dataclass(frozen=True)
class Details:
    """Something long, such as a manifest, that opens when asked: text, or values shown as JSON."""

    kind: ClassVar[str] = "details"
    summary: str
    content: str | Mapping[str, Any]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return json.dumps(self.content, indent=2, ensure_ascii=False, default=str)


Block = Plot | Picture | Gallery | Grid | Table | Details


@dataclass(frozen=True)
class Section:
    """A heading, plain text (an empty line starts a paragraph), and blocks."""

    heading: str
    text: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Report:
    """A page.

    Args:
        lead: what was done and what came out, in plain words.
        highlights: (value, what it is), a few figures to see first.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    highlights: Sequence[tuple[str, str]] = ()


def write_report(path: Path, report: Report) -> None:
    """Writes ``report`` as one HTML file, and the folders above it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["paragraphs"] = lambda text: [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    page = environment.get_template("report.html.jinja").render(report=report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
