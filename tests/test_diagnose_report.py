"""The report: one well-formed file that requests nothing, and in which every text from a user is escaped."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinscale.diagnose.plots import Accuracy, accuracy_bars, confusion_matrix
from swinscale.diagnose.report import Details, Gallery, Grid, Picture, Plot, Report, Section, Table, write_report

HOSTILE = "<script>alert('x')</script>\" onload=\"x & y"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects elements and text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is given twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture(value: int = 200, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def everything(name: str) -> Report:
    """A report with every kind of block, in which every text is ``name``."""
    blocks = [
        Plot(accuracy_bars(name, [Accuracy(name, 3, 4)]), name),
        Plot(confusion_matrix(name, [[3, 1], [0, 4]], [name, "b"]), name),
        Picture(Image.new("RGB", (5, 6)), name, name),
        Gallery([Picture(picture(), name, name)], name),
        Grid([name, "masked"], [[picture(1), picture(2)], [picture(3), picture(4)]], name),
        Table([name, "value"], [[name, 1.5], ["b", "2.5 %"]], name),
        Details(name, {name: name}),
        Details(name, name),
    ]
    return Report(name, name, [Section(name, name, blocks), Section(name), Section(name)], [(name, name)])


def written(tmp_path: Path, report: Report) -> tuple[str, Page]:
    path = tmp_path / "new" / "folder" / "report.html"
    write_report(path, report)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_every_block_is_in_a_well_formed_page(tmp_path):
    html, page = written(tmp_path, everything("a plain name"))
    assert html.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and len(page.all("h2")) == 3 and len(page.all("section")) == 3
    assert len(page.all("svg")) >= 2 and len(page.all("table")) == 1 and len(page.all("details")) == 2
    assert any("width=device-width" in (m.get("content") or "") for m in page.all("meta"))
    assert "prefers-color-scheme: dark" in html
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in page.all("a")]
    assert targets == ["#section-1", "#section-2", "#section-3"] and all((t or "")[1:] in ids for t in targets)


def test_nothing_is_requested(tmp_path):
    """The only addresses are data, fragments and the names of XML namespaces; scripts and requests are forbidden."""
    html, page = written(tmp_path, everything("name"))
    for tag, attributes in page.elements:
        for attribute in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("data:", "#")), (tag, attribute, value)
    assert not re.search(r"https?://", re.sub(r'xmlns(:xlink)?="[^"]+"', "", html))
    assert not re.search(r"@import|url\((?!#)", html)
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src" not in policy
    assert page.all("script") == []


def test_texts_from_users_are_escaped(tmp_path):
    """Class and file names may hold anything; they come out as the same text, and as nothing else."""
    html, page = written(tmp_path, everything(HOSTILE))
    assert page.all("script") == [] and "<script" not in html
    assert not any("onload" in attributes for _, attributes in page.elements)
    assert page.all("img")[0]["alt"] == HOSTILE
    # title, lead, headings, captions, table header and cell, summary and text of the details …
    assert sum(text.strip() == HOSTILE for text in page.text) >= 15


def test_pictures_are_inside_with_their_pixels_and_descriptions(tmp_path):
    _, page = written(tmp_path, everything("name"))
    images = page.all("img")
    assert len(images) == 6 and all(image["alt"] for image in images)
    decoded = [Image.open(io.BytesIO(base64.b64decode((i["src"] or "").split(",")[1]))) for i in images]
    assert [d.size for d in decoded] == [(int(i["width"] or 0), int(i["height"] or 0)) for i in images]
    assert [np.asarray(d)[0, 0, 0] for d in decoded] == [0, 200, 1, 2, 3, 4]
    assert [i["alt"] for i in images[2:]] == [f"{t} of image {n}" for n in (1, 2) for t in ("name", "masked")]


def test_tables_mark_headers_and_set_numbers_to_the_right(tmp_path):
    rows = [["SimMIM", "81.2 %", -1, "fast"], ["scratch", 74.4, "+2", "3 s"]]
    _, page = written(
        tmp_path, Report("t", "l", [Section("s", blocks=[Table(["run", "top-1", "change", "speed"], rows)])])
    )
    assert [h.get("class") for h in page.all("th") if h.get("scope") == "col"] == [None, "number", "number", None]
    assert [h.get("scope") for h in page.all("th")].count("row") == 2
    assert [d.get("class") for d in page.all("td")] == ["number", "number", None] * 2
    assert Table(["a", "b"], []).numeric == [False, False]


def test_empty_lines_make_paragraphs_and_few_sections_need_no_contents(tmp_path):
    html, page = written(tmp_path, Report("t", "one\n\ntwo\n \nthree", [Section("s", "a\nb")]))
    assert html.count('<p class="lead">') == 3 and page.all("nav") == [] and page.all("dl") == []
    assert "<p>a\nb</p>" in html


def test_details_hold_json_and_other_scripts_and_open_when_asked(tmp_path):
    html, page = written(
        tmp_path, Report("t", "l", [Section("s", blocks=[Details("Manifest", {"path": Path("ä"), "n": [1]})])])
    )
    assert any('"path": "ä"' in text for text in page.text)
    assert page.all("details") == [{}]
    assert 'charset="utf-8"' in html


def test_a_row_that_does_not_fit_the_columns_is_refused(tmp_path):
    with pytest.raises(ValueError):
        write_report(
            tmp_path / "r.html", Report("t", "l", [Section("s", blocks=[Grid(["a"], [[picture(), picture()]])])])
        )
