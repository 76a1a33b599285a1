"""Plots: intervals, what the SVG says, escaping, and that matplotlib is left as it was."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from swinscale.diagnose.plots import (
    Accuracy,
    Curve,
    Dot,
    Line,
    accuracy_bars,
    confusion_matrix,
    dots,
    heat_maps,
    lines,
    loss_curves,
    run_curves,
)
from swinscale.errors import UsageError
from swinscale.intervals import wilson_interval

HOSTILE = '<script>alert(\'x\')</script> & "$5$ note$" --> id="a"'


def texts(svg: str) -> list[str]:
    """The readable text of an SVG, which must be well-formed XML."""
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2552649, 0.3662028),  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I: 0.2553, 0.3662
        (15, 148, 0.0624, 0.1605),  # the same: 0.0624, 0.1605
        (0, 20, 0.0, 0.1611),  # the same
        (1, 29, 0.0061, 0.1718),  # the same
    ],
)
def test_wilson_interval_golden_values(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_narrows_with_confidence_and_is_symmetric():
    low, high = wilson_interval(30, 100)
    narrow_low, narrow_high = wilson_interval(30, 100, confidence=0.8)
    assert low < narrow_low < 0.3 < narrow_high < high
    assert wilson_interval(70, 100) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_what_is_no_proportion_is_refused(correct, total):
    with pytest.raises(UsageError, match="not a proportion"):
        wilson_interval(correct, total)


def test_run_curves_reads_a_log():
    log = [
        {"kind": "train", "step": 20, "loss": 0.5, "lr": 1e-3},
        {"kind": "train", "step": 10, "loss": 0.9},
        {"kind": "eval", "step": 20, "loss": 0.6, "top1": 0.4},
        {"kind": "non_finite", "step": 12, "text": "…"},
    ]
    assert run_curves("a", log) == [Curve("a", (10, 20), (0.9, 0.5)), Curve("a", (20,), (0.6,), held_out=True)]
    assert run_curves("a", []) == []


def test_loss_curves_name_axes_runs_and_baselines():
    curves = [Curve("scratch", range(100), np.linspace(2, 1, 100)), Curve("scratch", [99], [1.25], held_out=True)]
    svg = loss_curves("Fine-tuning", curves, loss="cross-entropy, nats", baselines={"chance": 2.3026})
    said = texts(svg)
    for text in ("Fine-tuning", "optimiser step", "cross-entropy, nats", "scratch, training", "scratch, held-out"):
        assert text in said, text
    assert "chance (2.3)" in said
    assert 'aria-label="Fine-tuning. Last values: scratch training 1, scratch held-out 1.25."' in svg


def test_running_mean_does_not_bend_a_straight_line():
    """Long training curves are smoothed; the mean of a straight line is the line, and its ends stay near."""
    from swinscale.diagnose.plots import _running_mean

    line = np.linspace(5, 1, 101)
    np.testing.assert_allclose(_running_mean(line, 5)[2:-2], line[2:-2])
    assert _running_mean(line, 5)[0] == pytest.approx(line[:3].mean())


@pytest.mark.parametrize("losses", [[], [0.5], [float("nan"), float("inf"), 0.5]])
def test_curves_of_runs_that_have_hardly_begun_or_diverged(losses):
    assert "SimMIM, training" in texts(loss_curves("Loss", [Curve("SimMIM", range(len(losses)), losses)]))
    assert "Loss" in texts(loss_curves("Loss", []))


def test_accuracy_bars_say_value_and_interval():
    svg = accuracy_bars("Top-1", [Accuracy("pre-trained", 81, 263), Accuracy("scratch", 0, 10)], chance=0.1)
    said = texts(svg)
    assert "pre-trained" in said and "scratch" in said and "chance (10 %)" in said
    assert "30.8 %  (25.5 to 36.6)" in said and "0.0 %  (0.0 to 27.8)" in said
    assert "pre-trained 30.8 %, interval 25.5 to 36.6, of 263 images" in svg


def test_confusion_matrix_shows_counts_where_they_are():
    """Rows are true classes: the 7 dogs taken for cats stand in the second row, first column."""
    svg = confusion_matrix("Confusion", [[40, 0], [7, 3]], ["cat", "dog"])
    numbers = {
        text.text: tuple(map(float, re.findall(r"[-\d.]+", f"{text.get('x')} {text.get('y')}")))
        for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        if (text.text or "") in ("40", "7", "3")
    }
    assert numbers["40"][0] == pytest.approx(numbers["7"][0], abs=0.1) and numbers["7"][0] < numbers["3"][0]
    assert numbers["7"][1] == pytest.approx(numbers["3"][1], abs=0.1) and numbers["40"][1] < numbers["7"][1]
    assert {"true class", "predicted class", "share of the true class, %"} <= set(texts(svg))
    assert "43 of 50 images are on the diagonal" in svg


def test_confusion_matrix_colour_is_the_share_of_the_true_class():
    """Colours are normalised per row; an empty row (a class without images) is blank and divides nothing by zero."""
    import base64
    import io

    from PIL import Image

    svg = confusion_matrix("Confusion", [[1, 3, 0], [0, 1000, 0], [0, 0, 0]], ["a", "b", "c"])
    images = [Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r"data:image/png;base64,([^\"]+)", svg)]
    [cells] = [np.asarray(i.convert("RGBA")) for i in images if i.size == (3, 3)]
    alpha = cells[..., 3] if cells[2].max() < cells[1].max() and cells[1, 1, 3] == 255 else cells[::-1, :, 3]
    np.testing.assert_allclose(alpha / 255, [[0.25, 0.75, 0], [0, 1, 0], [0, 0, 0]], atol=0.01)


def test_confusion_matrix_of_the_wrong_size_is_refused():
    with pytest.raises(UsageError, match=r"\(2, 2\).*3 classes"):
        confusion_matrix("Confusion", np.eye(2), ["a", "b", "c"])


@pytest.mark.parametrize("number", [2, 10, 60])
def test_every_class_is_named_and_the_matrix_scales(number):
    names = [f"class {i}" for i in range(number)]
    svg = confusion_matrix("Confusion", np.full((number, number), 11), names)
    said = texts(svg)
    assert all(said.count(name) == 2 for name in names)
    assert said.count("11") == number**2
    width = float(re.search(r'width="(\d+)"', svg)[1])  # type: ignore[index]
    assert 300 < width < 2200
    smallest = min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg))
    assert smallest >= 7


def plots(name: str) -> list[str]:
    return [
        loss_curves(
            name, [Curve(name, [1, 2], [2, 1]), Curve(name, [2], [1], held_out=True)], loss=name, baselines={name: 1}
        ),
        accuracy_bars(name, [Accuracy(name, 1, 2)], chance=0.5),
        confusion_matrix(name, [[3, 1], [1, 3]], [name, "other"]),
        lines(name, [Line(name, [1, 2], [2, 1], [1, 0], [3, 2])], x=name, y=name, baselines={name: 1}, note=name).svg,
        dots(name, [Dot(name, 1, 0, 2)], x=name, reference=0.5, note=name).svg,
        heat_maps(name, [(name, [[1, -1]])], unit=name, diverging=True, note=name).svg,
    ]


def test_names_from_users_are_escaped():
    """A class called ``<script>`` is text, a dollar sign is not mathematics, and the SVG stays well-formed."""
    for svg in plots(HOSTILE):
        assert "<script" not in svg
        assert any(text.startswith("<script>alert('x')</scri") for text in texts(svg))


def test_names_in_other_scripts_are_kept():
    for svg in plots("秋田犬 العربية"):
        assert any("秋田犬" in text for text in texts(svg))


def test_plots_take_the_colour_of_the_page_and_request_nothing():
    for svg in plots("cat"):
        assert "currentColor" in svg and "#1b1f24" not in svg
        namespaces = re.sub(r'xmlns(:xlink)?="[^"]+"', "", svg)
        assert "http" not in namespaces and "DOCTYPE" not in svg and svg.startswith("<svg") and svg.endswith("</svg>")


def test_ids_are_reproducible_and_differ_between_plots():
    """Several plots stand on one page: their ids must not collide."""
    first, again = plots("cat"), plots("cat")
    assert first == again
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (*first, *plots("dog"))]
    assert ids[0] and sum(map(len, ids)) == len(set().union(*ids))


def test_matplotlib_is_left_as_it_was():
    """No settings leak out, and none of the caller's leak in."""
    import matplotlib.pyplot as pyplot

    expected = plots("cat")
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 3, "text.color": "red"}):
        before = dict(matplotlib.rcParams)
        assert plots("cat")[1].count("<text") == expected[1].count("<text")
        assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


def colour_of(svg: str, dashed: bool = False) -> list[str]:
    """Colours of the lines of a plot, in order."""
    found = re.findall(r'<path d="[^"]+" clip-path[^>]+style="fill: none; ([^"]*)stroke: (#[0-9a-f]{6})', svg)
    return [colour for style, colour in found if ("dasharray" in style) == dashed and colour != "#1b1f24"]


def test_lines_of_a_group_share_a_colour_and_dashes_tell_them_apart():
    x = range(20)
    series = [Line("a", x, x, group=3), Line("b", x, x, dashed=True, group=3), Line("c", x, x)]
    svg = lines("Groups", series, x="step", y="loss").svg
    [solid, other], [dashed] = colour_of(svg), colour_of(svg, dashed=True)
    assert solid == dashed != other
    assert {"Groups", "step", "loss", "a", "b", "c"} <= set(texts(svg))
    assert "Last values: a 19, b 19, c 19." in svg


def test_many_lines_have_colours_of_their_own():
    svg = lines("Blocks", [Line(str(n), [1, 2, 3] * 5, [n] * 15) for n in range(24)], x="step", y="y").svg
    assert len(set(colour_of(svg))) == 24


def test_a_logarithmic_axis_has_plain_numbers_and_leaves_out_what_it_cannot_show():
    svg = lines(
        "Log", [Line("a", range(15), [0, -1, np.nan, *[10.0**n for n in range(12)]])], x="x", y="y", log_y=True
    ).svg
    said = texts(svg)
    assert "10000" in said and not any("mathdefault" in text for text in said)
    narrow = lines("Narrow", [Line("a", range(15), np.linspace(0.3, 0.9, 15))], x="x", y="y", log_y=True).svg
    assert len([text for text in texts(narrow) if re.fullmatch(r"0\.\d", text)]) >= 3


def test_categories_are_named_and_what_is_not_finite_is_left_out():
    series = [Line("a", [0, 1, 2], [1, np.nan, 3], [0, 0, 2], [2, 0, 4])]
    svg = lines("Kinds", series, x="mask", y="loss", x_labels=["random", "block", "grid"]).svg
    assert {"random", "block", "grid"} <= set(texts(svg))
    assert lines("Nothing", [], x="x", y="y").svg.startswith("<svg")


def test_dots_say_values_and_intervals():
    svg = dots("Transfer", [Dot("pre-trained", 0.4, 0.3, 0.5), Dot("scratch", 0.2, 0.1, 0.3, 1)], x="top-1").svg
    assert {"pre-trained", "scratch", "top-1"} <= set(texts(svg))
    assert "pre-trained 0.4 (0.3 to 0.5); scratch 0.2 (0.1 to 0.3)." in svg


def test_heat_maps_share_a_scale_and_two_colours_meet_at_zero():
    import base64
    import io

    from PIL import Image

    svg = heat_maps("Bias", [("a", [[-4, 0, 2]]), ("b", [[4, np.nan, 0]])], unit="logit", diverging=True).svg
    images = [Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r"data:image/png;base64,([^\"]+)", svg)]
    [a, b] = [np.asarray(i.convert("RGBA"))[0] for i in images if i.size == (3, 1)]
    assert a[0, 3] == b[0, 3] == 255 and a[0, 0] > 150 and b[0, 0] < 50
    assert a[1, 3] <= 1 and b[1, 3] == 0 and 120 < a[2, 3] < 135
    assert "2 maps from -4 to 4" in svg
    with pytest.raises(UsageError, match=r"'a' has shape \(3,\)"):
        heat_maps("Bias", [("a", [1, 2, 3])], unit="logit")


def test_a_drawing_is_saved_on_white_in_both_formats(tmp_path):
    from PIL import Image

    drawing = lines("Loss", [Line("a", [1, 2], [2, 1])], x="step", y="loss")
    for stem in ("one", "two"):
        drawing.save(tmp_path / "new.d" / stem)
    names = sorted(p.name for p in (tmp_path / "new.d").iterdir())
    assert names == ["one.png", "one.svg", "two.png", "two.svg"]
    for kind in ("png", "svg"):
        assert (tmp_path / f"new.d/one.{kind}").read_bytes() == (tmp_path / f"new.d/two.{kind}").read_bytes()
    picture = Image.open(tmp_path / "new.d/one.png").convert("RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255) and 700 < picture.width < 900
    assert "Loss" in texts((tmp_path / "new.d/one.svg").read_text())
