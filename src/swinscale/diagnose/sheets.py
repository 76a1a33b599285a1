"""Pictures in rows under titles, with notes beside them and a legend of colours below, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from swinscale.diagnose.colours import INK, WHITE, Colour
from swinscale.diagnose.pictures import FAINT, cut_to_width

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
LONGEST_NAME = 15  # em, of a name in a legend or a note
EDGE = (196, 202, 209)  # around colours that may be as light as the paper


class Row(NamedTuple):
    """Pictures side by side."""

    pictures: Sequence[Image.Image]
    titles: Sequence[str] = ()
    """One over each picture, or none."""
    note: Sequence[str] = ()
    """Lines at the left; the first is the loudest."""


class Entry(NamedTuple):
    """A line of a legend: a colour, or a picture instead of one; a name; numbers, in each place one or ""."""

    colour: Colour | Image.Image
    name: str
    numbers: Sequence[str]


def letters_for(width: int) -> int:
    """Height of letters, in pixels, on a sheet of this width, so that they are readable where it fills a page."""
    return max(14, min(72, round(width / 84)))


def sheet(
    rows: Sequence[Row], entries: Sequence[Entry] = (), header: Sequence[str] = (), more: str = ""
) -> Image.Image:
    """The whole: pictures in the middle of cells as large as the largest of their row and column, and the legend.

    Args:
        entries: of the legend, in order from the top, column after column.
        header: what the entries' numbers are.
        more: what the legend says last.
    """
    columns = max(len(row.pictures) for row in rows)
    widths = [max(row.pictures[i].width for row in rows if i < len(row.pictures)) for i in range(columns)]
    letters = letters_for(sum(widths))
    font, small = ImageFont.load_default(letters), ImageFont.load_default(max(12, round(letters * 0.85)))
    gap, line = max(6, letters // 2), round(letters * 1.45)
    for row in rows:
        widths = [
            max([wide, *(math.ceil(font.getlength(title)) for title in row.titles[i : i + 1])])
            for i, wide in enumerate(widths)
        ]
    longest = round(LONGEST_NAME * letters * 0.7)
    notes = [[cut_to_width(text, (small, font)[not i], longest) for i, text in enumerate(row.note)] for row in rows]
    lengths = [(small, font)[not i].getlength(text) for note in notes for i, text in enumerate(note)]
    beside = math.ceil(max(lengths)) + 2 * gap if lengths else 0
    tall = [max(max(p.height for p in row.pictures), line * len(row.note)) for row in rows]
    heads = [line if row.titles else 0 for row in rows]
    width = beside + sum(widths) + gap * (columns + 1)
    below = legend(entries, header, width - 2 * gap, letters, more) if entries or more else None
    if below:
        width = max(width, below.width + 2 * gap)
    height = gap + sum(tall) + sum(heads) + gap * len(rows) + (below.height + gap if below else 0)
    canvas = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(canvas)
    y = gap
    for row, note, row_height, head in zip(rows, notes, tall, heads, strict=True):
        x = gap + beside
        for index, title in enumerate(row.titles):
            middle = x + sum(widths[:index]) + index * gap + widths[index] / 2
            draw.text((middle, y + head * 0.42), title, INK, font, anchor="mm")
        for index, picture in enumerate(row.pictures):
            corner = (x + (widths[index] - picture.width) // 2, y + head + (row_height - picture.height) // 2)
            canvas.paste(picture, corner)
            x += widths[index] + gap
        top = y + head + (row_height - line * len(note)) / 2
        for i, text in enumerate(note):
            where = (gap + beside - 2 * gap, top + (i + 0.5) * line)
            draw.text(where, text, FAINT if i else INK, small if i else font, anchor="rm")
        y += head + row_height + gap
    if below:
        canvas.paste(below, (gap, y))
    return canvas


def legend(entries: Sequence[Entry], header: Sequence[str], width: int, letters: int, more: str = "") -> Image.Image:
    """Colours, names and numbers in as many columns as ``width`` has room for, at least one; names are cut with "…"."""
    font, small = ImageFont.load_default(letters), ImageFont.load_default(max(12, round(letters * 0.85)))
    line, gap = round(letters * 1.5), round(letters * 0.6)
    swatch = (round(letters * 1.5), letters)
    names = [cut_to_width(entry.name, font, LONGEST_NAME * letters * 0.55) for entry in entries]
    name_width = math.ceil(max((font.getlength(name) for name in names), default=0))
    cells = [[title, *(entry.numbers[i] for entry in entries)] for i, title in enumerate(header)]
    numbers = [math.ceil(max(small.getlength(text) for text in column)) + gap for column in cells]
    one = swatch[0] + gap + name_width + sum(numbers)
    between = 3 * gap
    columns = max(1, min((width + between) // (one + between), len(entries)))
    lines = math.ceil(len(entries) / columns)
    columns = math.ceil(len(entries) / max(1, lines))
    head = line if header else 0
    size = (
        max(columns * (one + between) - between, math.ceil(small.getlength(more))),
        head + lines * line + line * bool(more),
    )
    canvas = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(canvas)
    for column in range(columns):
        left = column * (one + between)
        ends = [left + one - sum(numbers[i + 1 :]) for i in range(len(header))]
        inside = slice(column * lines, (column + 1) * lines)
        for i, (end, title) in enumerate(zip(ends, header, strict=True)):
            if any(entry.numbers[i] for entry in entries[inside]):
                draw.text((end, head / 2), title, FAINT, small, anchor="rm")
        for place, (entry, name) in enumerate(zip(entries[inside], names[inside], strict=True)):
            middle = head + (place + 0.5) * line
            x, y = left, round(middle - swatch[1] / 2)
            drawn = entry.colour if isinstance(entry.colour, Image.Image) else Image.new("RGB", swatch, entry.colour)
            canvas.paste(drawn.resize(swatch, Image.Resampling.NEAREST), (x, y))
            box = (x, y, x + swatch[0] - 1, y + swatch[1] - 1)
            draw.rectangle(box, outline=EDGE, width=max(1, letters // 20))
            draw.text((left + swatch[0] + gap, middle), name, INK, font, anchor="lm")
            for end, number in zip(ends, entry.numbers, strict=True):
                draw.text((end, middle), number, FAINT, small, anchor="rm")
    if more:
        draw.text((0, size[1] - line / 2), more, FAINT, small, anchor="lm")
    return canvas
