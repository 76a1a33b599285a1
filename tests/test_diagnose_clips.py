"""Films with their class and attention drawn over them: what is light, what stays, sizes, and tables of measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from swinscale.diagnose.clips import FilmExample, draw_attention, film_sheet, print_video_table
from swinscale.errors import UsageError


def grey(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), 90, dtype=torch.uint8)


def test_attention_lightens_its_place_and_leaves_the_rest():
    attention = np.zeros((8, 8), dtype=np.float32)
    attention[1, 6] = 5.0  # more than the lightest
    drawn = np.asarray(draw_attention(grey(320, 320), attention, "wave", 0.5)).astype(int)
    assert (drawn[40:80, :160] == 90).all()  # nothing there
    light = drawn[40:80, 240:280].reshape(-1, 3).mean(0)
    assert light[0] > 180 and light[0] > light[2] + 40  # warm, and not blue
    half = np.asarray(draw_attention(grey(320, 320), attention / 10, "wave", 0.5)).astype(int)
    assert 90 < half[60, 260].mean() < light.mean()


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((64, 64), (320, 320)), ((40, 56), (240, 336)), ((320, 240), (320, 240)), ((500, 700), (500, 700)), ((1, 3), (107, 321))],
)  # fmt: skip
def test_small_frames_are_enlarged_by_whole_numbers(size: tuple[int, int], drawn: tuple[int, int]):
    picture = draw_attention(grey(*size), np.ones((4, 4)), "a class with a rather long name for so small a film", 1.0)
    assert (picture.height, picture.width) == drawn and picture.mode == "RGB"


def test_the_class_and_its_probability_are_written_on_a_dark_strip():
    nothing = np.zeros((2, 2))
    one, two, three = (
        np.asarray(draw_attention(grey(320, 320), nothing, label, p)).astype(int)
        for label, p in (("wave", 0.5), ("wave", 0.9), ("bend", 0.5))
    )
    assert (one[:270] == 90).all() and one[-20:].min() < 40 and one[-40:].max() > 230
    changed = [np.flatnonzero((one != other).any((0, 2))) for other in (two, three)]
    assert changed[0].min() > 200 and changed[1].max() < 160  # the number at the right, the name at the left
    long = np.asarray(draw_attention(grey(320, 320), nothing, "wave " * 40, 0.5)).astype(int)
    assert (long[:, 265:] == one[:, 265:]).all()  # cut before the number


def test_a_film_is_shown_by_some_of_its_frames():
    pictures = [FilmExample(grey(90, 160), Image.new("RGB", (320, 180), "red"), second) for second in (0.0, 1.25, 2.5)]
    picture = film_sheet(pictures, [("wave", 0.7), ("bend", 0.3)], 6.0)
    assert picture.width > 3 * 320 and picture.height > 2 * 180
    assert (np.asarray(picture) == (255, 0, 0)).all(-1).sum() >= 3 * 320 * 180 * 0.99
    tall = film_sheet([FilmExample(grey(2000, 40), Image.new("RGB", (40, 2000)), 0.0)], [("wave", 1.0)], 2.0)
    assert tall.height < 900
    with pytest.raises(UsageError, match="No frames"):
        film_sheet([], [("wave", 1.0)], 2.0)


def printed(classes: int, **changes: object) -> str:
    confusion = np.diag(np.arange(classes)).tolist()
    metrics = {"views": "4 × 3 views", "size": "16×64×64", "confusion": confusion, "top1": 0.8125, "top5": 0.96875}
    metrics |= {
        "loss": 0.5,
        "unreadable": 0.0,
        "absent": 0,
        "classes": [f"[class {k}]" for k in range(classes)],
        **changes,
    }
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_video_table(console, metrics)
    return " ".join(console.export_text().split())


def test_measures_are_printed_with_a_table_of_few_classes():
    few = printed(4)
    assert "4 × 3 views of 16×64×64" in few and "81.2" in few and "[class 3] │ 3 │ 100.0" in few
    assert "[class 0] │ 0 │ –" in few and "top-5" not in few and "cannot be read" not in few
    many = printed(60)
    assert "96.9" in many and "class 3" not in many
    left_out = printed(4, unreadable=2.0, absent=7)
    assert "films that cannot be read │ 2" in left_out and "films that are not there │ 7" in left_out
