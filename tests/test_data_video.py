"""Films as frames and back: sizes, rates, order, damaged and missing files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from swinscale.data.video import open_video, write_video
from swinscale.errors import UsageError

pytest.importorskip("av")


def frames(count: int, size: tuple[int, int] = (48, 32)) -> Iterator[Image.Image]:
    """Pictures of (width, height), each a little brighter than the one before."""
    for number in range(count):
        yield Image.new("RGB", size, (20 + 15 * number,) * 3)


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001), Fraction(5)])
def test_a_film_that_was_written_has_its_frames_in_order(tmp_path: Path, rate: Fraction):
    write_video(tmp_path / "film.mp4", frames(12), rate)
    video = open_video(tmp_path / "film.mp4")
    assert float(video.rate) == pytest.approx(float(rate), rel=1e-3)
    seen = list(video.frames)
    assert [tuple(frame.shape) for frame in seen] == [(3, 32, 48)] * 12 and seen[0].dtype == torch.uint8
    means = [frame.float().mean().item() for frame in seen]
    assert means == pytest.approx([20 + 15 * number for number in range(12)], abs=4)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("size", [(47, 31), (2, 2), (17, 64)])
def test_sides_become_even(tmp_path: Path, size: tuple[int, int]):
    write_video(tmp_path / "film.mp4", frames(3, size), Fraction(25))
    seen = list(open_video(tmp_path / "film.mp4").frames)
    assert [tuple(f.shape) for f in seen] == [(3, size[1] + size[1] % 2, size[0] + size[0] % 2)] * 3
    assert seen[0][:, : size[1] - 1, : size[0] - 1].float().mean().item() == pytest.approx(20, abs=8)


def test_a_film_that_was_not_finished_leaves_nothing(tmp_path: Path):
    def broken() -> Iterator[Image.Image]:
        yield from frames(2)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_video(tmp_path / "film.mp4", broken(), Fraction(25))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_film_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "text.mp4").write_text("no film")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(UsageError, match="cannot be read as a film") as error:
            open_video(tmp_path / name)
        assert "\n" not in str(error.value)
    write_video(tmp_path / "film.mp4", frames(30), Fraction(25))
    whole = (tmp_path / "film.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cut\.mp4"):
        list(open_video(tmp_path / "cut.mp4").frames)


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"PyAV: install it with pip install 'swinscale\[video\]'"):
        open_video(tmp_path / "film.mp4")


def test_real_films(shared_data: Path):
    """Of several makers; the first frames of each."""
    films = sorted(p for p in (shared_data / "clips").glob("*") if p.suffix in (".mp4", ".avi"))
    if not films:
        pytest.skip("the real films are not beside this checkout")
    for film in films[:5]:
        video = open_video(film)
        first, second = next(video.frames), next(video.frames)
        assert first.shape == second.shape and first.shape[0] == 3 and min(first.shape[1:]) >= 100, film
        assert 5 <= video.rate <= 60 and first.float().std() > 5
        video.frames.close()
