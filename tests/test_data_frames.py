"""Chosen frames of films: any container and codec, exact at any place, whole or damaged, and only what is needed (R-DOWN-6)."""

from __future__ import annotations

import contextlib
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinscale.data import frames as module
from swinscale.data.frames import Timeline, read_frames
from swinscale.data.images import CorruptImage
from swinscale.data.video import NoFilm, open_film

av = pytest.importorskip("av")
from film_files import (  # noqa: E402
    SIZE,
    decoded,
    number_in,
    numbered,
    numbers_in,
    turned,
    write_film,
    write_sound,
)

COUNT = 60
B_FRAMES = {"g": "12", "bf": "2"}
OPEN = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
WIDE: dict[str, Any] = {"size": (96, 128)}
FILMS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "one_key_frame.mp4": {"options": {"g": "250", "bf": "3"}},
    "closed.mov": {"options": B_FRAMES},
    "open.mp4": {"options": OPEN},
    "open.mkv": {"options": OPEN},
    "open.ts": {"options": OPEN},
    "refreshed.mp4": {"options": {"g": "100", "x264-params": "intra-refresh=1:scenecut=0"}},
    "fragments.mp4": {"options": B_FRAMES, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "full_colour.mkv": {"pix_fmt": "yuv444p"},
    "h265.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}, **WIDE},
    "vp8.webm": {"codec": "libvpx", "options": {"lag-in-frames": "16", "auto-alt-ref": "1", "g": "30", "cpu-used": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"lag-in-frames": "16", "g": "30", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": B_FRAMES},
    "mpeg4.mp4": {"codec": "mpeg4", "options": B_FRAMES},
    "h264.avi": {"options": B_FRAMES},
    "motion_jpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mpeg1.mpg": {"codec": "mpeg1video", "options": B_FRAMES},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": B_FRAMES},
    "mpeg2.ts": {"codec": "mpeg2video", "options": B_FRAMES},
    "mpeg2.mkv": {"codec": "mpeg2video", "options": B_FRAMES},
    "with_sound.ts": {"options": B_FRAMES, "tone": True},
    "with_sound.mp4": {"options": B_FRAMES, "tone": True},
    "wmv.wmv": {"codec": "wmv2"},
    "flash.flv": {"codec": "flv"},
    "telephone.3gp": {"codec": "h263", "size": (144, 176)},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "lossless.mkv": {"codec": "ffv1"},
    "stream.h264": {"options": B_FRAMES},
    "early.mp4": {"times": [40 * (i - 15) for i in range(75)], "options": {"g": "100"},
                  "container_options": {"avoid_negative_ts": "disabled"}},
    "late.mp4": {"times": [5000 + 40 * i for i in range(COUNT)], "options": B_FRAMES},
}  # fmt: skip
"""Encoder settings by file name. Of the film "early" the first frames are not to be shown."""


def everything(timeline: Timeline) -> range:
    return range(len(timeline))


def encodable(name: str, how: dict[str, Any]) -> None:
    """Skips where this FFmpeg lacks the encoder."""
    try:
        av.codec.Codec(how.get("codec", "libx264"), "w")
    except ValueError:
        pytest.skip(f"{name} needs an encoder that is not here")


@pytest.mark.parametrize("name", FILMS)
def test_frames_asked_for_at_random_are_those_of_decoding_in_order(tmp_path: Path, name: str):
    """In every container, from a path and from bytes, with key frames near and far; nothing is off by one."""
    encodable(name, FILMS[name])
    film = write_film(tmp_path / name, len(FILMS[name].get("times", range(COUNT))), **FILMS[name])
    all_of_them = decoded(film)
    assert len(all_of_them) == COUNT
    random = np.random.default_rng(0)
    for trial in range(10):
        wanted = random.integers(0, COUNT, random.integers(1, 6)).tolist()
        seen: list[int] = []

        def choose(timeline: Timeline, wanted: list[int] = wanted, seen: list[int] = seen) -> list[int]:
            seen.append(len(timeline))
            return wanted

        read = read_frames(film.read_bytes() if trial == 9 else film, name, choose)
        assert seen == [COUNT] and torch.equal(read, all_of_them[wanted]), wanted
    shown = numbers_in(all_of_them)
    assert shown == list(range(shown[0], shown[0] + COUNT))


def test_a_codec_of_these_years(tmp_path: Path):
    """AV1."""
    encodable("av1", {"codec": "libsvtav1"})
    film = write_film(
        tmp_path / "av1.mp4", 40, codec="libsvtav1", options={"preset": "12", "svtav1-params": "keyint=16"}, **WIDE
    )
    all_of_them = decoded(film)
    for wanted in ([39], [3, 20, 3], [17, 38]):
        assert torch.equal(read_frames(film, "av1.mp4", lambda _, w=wanted: w), all_of_them[wanted])


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4", "film.ts"])
def test_irregular_times_are_kept(tmp_path: Path, name: str):
    """Variable frame rate: the timeline says when each frame is shown, from 0 on."""
    steps = np.random.default_rng(0).choice([10, 33, 40, 90, 400], 29).tolist()
    times = [200, *(200 + np.cumsum(steps)).tolist()]
    film = write_film(tmp_path / name, 30, times=times, options=B_FRAMES)
    found: list[Timeline] = []
    read = read_frames(film, name, lambda timeline: found.append(timeline) or [29, 11])
    assert numbers_in(read) == [29, 11]
    assert list(found[0].seconds) == pytest.approx([(t - 200) / 1000 for t in times], abs=2e-3)
    assert found[0].rate == pytest.approx(29 / sum(steps) * 1000, rel=1e-2)


def test_a_time_is_that_of_the_frame_shown_then():
    timeline = Timeline([0.0, 0.033, 0.067, 0.1, 1.0])
    assert [timeline.at(s) for s in (-1, 0, 0.02, 0.033, 1 / 15, 0.099, 0.1, 0.999, 1, 9)] == [
        0,
        0,
        0,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert Timeline([0.0]).rate == 25 and Timeline([0.0]).at(3) == 0 and timeline.rate == pytest.approx(4)


def test_packets_that_come_without_times(tmp_path: Path):
    """A bare stream of H.264 has none: frames are counted, at the rate that is said."""
    film = write_film(tmp_path / "bare.h264", 20)
    found: list[Timeline] = []
    assert numbers_in(read_frames(film, "bare", lambda timeline: found.append(timeline) or [19, 0])) == [19, 0]
    assert list(found[0].seconds) == pytest.approx([n / 25 for n in range(20)])


def test_the_count_in_a_header_is_not_believed(tmp_path: Path):
    """An AVI file whose headers claim 5 and 5,000 frames has the 20 that are in it."""
    film = write_film(tmp_path / "film.avi", 20, codec="mpeg4")
    for claimed in (5, 5000):
        data = bytearray(film.read_bytes())
        begin = data.index(b"avih") + 8 + 16
        assert struct.unpack_from("<I", data, begin) == (20,)
        struct.pack_into("<I", data, begin, claimed)
        begin = data.index(b"strh") + 8 + 32
        assert struct.unpack_from("<I", data, begin) == (20,)
        struct.pack_into("<I", data, begin, claimed)
        assert numbers_in(read_frames(bytes(data), "film.avi", everything)) == list(range(20))


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("fit", [None, lambda height, width: (2 * height, width // 2)])
def test_a_film_that_was_recorded_sideways_is_turned_as_it_says(tmp_path: Path, degrees: int, fit: Any):
    """To the last pixel as turning it by hand; sizes that are asked for are those of the upright picture."""
    film = write_film(tmp_path / "film.mp4", 8)
    sideways = turned(film, tmp_path / "turned.mp4", degrees)
    fitted = fit and (lambda height, width: fit(width, height)[::-1] if degrees % 180 else fit(height, width))
    plain, upright = (
        read_frames(film, "film", everything, 3, fitted),
        read_frames(sideways, "turned", everything, 3, fit),
    )
    assert torch.equal(upright, torch.rot90(plain, -degrees // 90, (2, 3)))
    height, width = SIZE[::-1] if degrees % 180 else SIZE
    assert tuple(upright.shape[2:]) == (fit(height, width) if fit else (height, width))
    with av.open(str(sideways)) as container:  # what a player turns by is what was written
        assert next(container.decode(video=0)).rotation % 360 == -degrees % 360


@pytest.mark.parametrize(
    ("size", "codec", "end"), [((47, 31), "ffv1", "mkv"), ((49, 65), "mpeg4", "avi"), ((9, 7), "ffv1", "mkv")]
)
def test_odd_sizes(tmp_path: Path, size: tuple[int, int], codec: str, end: str):
    film = write_film(tmp_path / f"film.{end}", 5, size=size, codec=codec)
    read = read_frames(film, "film", everything)
    assert read.shape == (5, 3, *size) and torch.equal(read, decoded(film))
    assert read_frames(film, "film", everything, 1, lambda height, width: (7, 9)).shape == (5, 1, 7, 9)


def test_colours_and_grey(tmp_path: Path):
    red = np.full((*SIZE, 3), (200, 40, 30), dtype=np.uint8)
    film = write_film(tmp_path / "film.mkv", [red] * 3, codec="ffv1", pix_fmt="yuv444p")
    colours, grey = read_frames(film, "film", everything), read_frames(film, "film", everything, 1)
    assert colours[1].flatten(1).float().mean(1).tolist() == pytest.approx([200, 40, 30], abs=3)
    assert grey.shape == (3, 1, *SIZE) and colours.dtype == grey.dtype == torch.uint8 and 60 < grey.float().mean() < 110
    with pytest.raises(CorruptImage, match="has 3 channels where 4 are needed"):
        read_frames(film, "film", everything, 4)


def test_one_frame(tmp_path: Path):
    film = write_film(tmp_path / "film.mp4", 1)
    found: list[Timeline] = []
    read = read_frames(film, "film", lambda timeline: found.append(timeline) or [0, 0, 0])
    assert numbers_in(read) == [0, 0, 0] and (len(found[0]), found[0].rate) == (1, 25)


def test_of_two_films_in_a_file_the_first_one_is_read(tmp_path: Path):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("ffv1", rate=25) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(30):
            for stream, shown in zip(streams, (number, 1000 + number), strict=True):
                frame = av.VideoFrame.from_ndarray(numbered(shown), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    assert numbers_in(read_frames(tmp_path / "two.mkv", "two", lambda _: [25, 3])) == [25, 3]


def test_a_film_that_changes_its_size(tmp_path: Path):
    """As recordings do: two MPEG streams one after the other. All frames get the size of the first one."""
    small, large = (write_film(tmp_path / f"{s[0]}.ts", 10, size=s) for s in (SIZE, (96, 128)))
    both = small.read_bytes() + large.read_bytes()
    read = read_frames(both, "both.ts", everything)
    assert read.shape[1:] == (3, *SIZE) and numbers_in(read)[:10] == list(range(10)) and len(read) >= 18
    assert read_frames(both, "both.ts", lambda t: [len(t) - 1]).shape[1:] == (3, 96, 128)


# What is no film, and what is damaged.


def no_films(folder: Path) -> dict[str, Path]:
    """Files that are called films, by what they are."""
    good = write_film(folder / "good.mp4", 5)
    text = {
        "text": "no film " * 200,
        "a list of films": f"ffconcat version 1.0\nfile {good.name}\n",
        "a playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{good.name}\n#EXT-X-ENDLIST\n",
        "an address": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5555 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "empty": "",
    }
    files = {what: folder / f"{what}.mp4" for what in text}
    for what, content in text.items():
        files[what].write_text(content)
    for kind in ("png", "jpeg", "webp", "bmp", "tiff"):
        files[kind] = folder / f"{kind}.mp4"
        Image.fromarray(numbered(5)).save(files[kind], format=kind)
    for what, content in (("noise", np.random.default_rng(0).bytes(50_000)), ("zeros", bytes(50_000))):
        files[what] = folder / f"{what}.mp4"
        files[what].write_bytes(content)
    files["sound"] = write_sound(folder / "sound.mp4")
    files["sound with a cover"] = write_sound(folder / "cover.mp4", cover=numbered(5))
    files["no frames"] = write_film(folder / "no frames.mp4", 0, tone=True)
    return files


def test_what_is_no_film_says_so_in_one_line(tmp_path: Path):
    """From a path as from bytes, at once: nothing waits for an address, and no file is read that another one names."""
    began = time.perf_counter()
    for what, file in no_films(tmp_path).items():
        for source in (file, file.read_bytes()):
            with pytest.raises(CorruptImage) as error:
                read_frames(source, file.name, everything)
            assert error.value.name == file.name and 5 < len(error.value.reason) < 70, what
            assert (
                "\n" not in error.value.reason and "Errno" not in error.value.reason and "log" not in error.value.reason
            )
    assert time.perf_counter() - began < 5
    for missing, reason in ((tmp_path / "missing.mp4", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(CorruptImage, match=reason):
            read_frames(missing, "x", everything)


def test_reasons_help(tmp_path: Path):
    files = no_films(tmp_path)
    reasons = {"empty": "empty file", "sound": "no moving pictures", "sound with a cover": "no moving pictures"}
    reasons |= dict.fromkeys(("png", "jpeg", "a list of films", "an address"), "a picture or a list, not a film")
    for what, reason in reasons.items():
        with pytest.raises(NoFilm, match=reason):
            open_film(files[what])


CUT = (
    "fragments.mp4",
    "open.mkv",
    "vp9.webm",
    "mpeg4.avi",
    "mpeg2.mpg",
    "open.ts",
    "animation.gif",
    "wmv.wmv",
    "h264.mp4",
)


@pytest.mark.parametrize("name", CUT)
def test_a_film_that_is_cut_short_gives_its_frames_or_a_reason(tmp_path: Path, name: str):
    """At any byte. What is read is what the whole film shows at its beginning; nothing hangs."""
    encodable(name, FILMS[name])
    film = write_film(tmp_path / name, COUNT, **FILMS[name])
    whole, data, random, counts = decoded(film), film.read_bytes(), np.random.default_rng(0), set()
    for end in sorted(random.integers(1, len(data), 30).tolist()):
        began = time.perf_counter()
        try:
            read = read_frames(data[:end], name, everything)
        except CorruptImage as error:
            assert "\n" not in error.reason
        else:
            counts.add(len(read))
            unharmed = max(len(read) - 4, 0)  # what is cut is one packet, and what refers to it
            assert len(read) <= COUNT and torch.equal(read[:unharmed], whole[:unharmed])
        assert time.perf_counter() - began < 3
    assert not counts if name == "h264.mp4" else len(counts) > 3  # an MP4 file needs its end


@pytest.mark.parametrize("name", ["h264.mp4", "open.mkv", "mpeg4.avi", "mpeg2.ts", "flash.flv"])
def test_bytes_that_were_changed_do_no_harm(tmp_path: Path, name: str):
    encodable(name, FILMS[name])
    data = write_film(tmp_path / name, COUNT, **FILMS[name]).read_bytes()
    random, good = np.random.default_rng(0), 0
    for _ in range(25):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 10):
            damaged[place] ^= int(random.integers(1, 256))
        with contextlib.suppress(CorruptImage):
            good += len(read_frames(bytes(damaged), name, lambda timeline: [len(timeline) // 2, 0])) == 2
    assert good > 0


def test_damage_in_the_middle_costs_the_frames_there(tmp_path: Path):
    """A film with a key frame in every place: what follows the damage is as exact as before."""
    film = write_film(tmp_path / "film.mkv", 40, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(film.read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 40
    data[starts[20] : starts[20] + 2] = b"\0\0"
    read = read_frames(bytes(data), "film.mkv", lambda _: [0, 19, 22, 39])
    assert numbers_in(read) == [0, 19, 22, 39]


def test_frames_beyond_measure_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A film of one column may not be blown up to fill the memory; nor may a header claim any size."""
    film = write_film(tmp_path / "film.mkv", 8, size=(400, 1), codec="mjpeg", pix_fmt="yuvj444p")
    with pytest.raises(CorruptImage, match="8 frames of 256×102400000 pixels are more than allowed"):
        read_frames(film, "film", everything, 3, lambda height, width: (256_000 * height, 256))
    monkeypatch.setattr(module, "MAX_PIXELS", 399)
    with pytest.raises(CorruptImage, match="frames of 1×400 pixels are larger than allowed"):
        read_frames(film, "film", everything)


# What it costs.


@pytest.mark.parametrize(("end", "exact"), [("mp4", True), ("mkv", True), ("avi", False)])
def test_only_what_is_needed_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, exact: bool):
    """Of 600 frames with a key frame in 20, a clip from the middle costs some 50; containers without an index cost what is before."""
    codec = "mpeg4" if end == "avi" else "libx264"
    film = write_film(tmp_path / f"film.{end}", 600, codec=codec, options={"g": "20", "bf": "2", "sc_threshold": "0"})
    decode, count = module._decoded, []

    def counted(container: Any, stream: Any) -> Any:
        for frame in decode(container, stream):
            count.append(frame.pts)
            yield frame

    monkeypatch.setattr(module, "_decoded", counted)
    wanted = list(range(411, 443, 2))
    assert numbers_in(read_frames(film, "film", lambda _: wanted)) == wanted
    assert len(count) < 60 if exact else len(count) == 442
    count.clear()
    assert numbers_in(read_frames(film, "film", lambda _: [590, 5])) == [590, 5]
    assert len(count) < 40 if exact else len(count) > 590


def test_a_film_larger_than_memory_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A path is given to FFmpeg, never read as a whole."""
    film = write_film(tmp_path / "film.mp4", 10)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("the whole file was read"))
    assert number_in(read_frames(film, "film", lambda _: [7])[0]) == 7


# Real films.


def test_real_films_are_exact_at_any_place(shared_data: Path):
    """Of Kinetics-400, HMDB51 and UCF101: H.264 with sound, DivX and Xvid, whose last packets show nothing."""
    films = sorted(p for p in (shared_data / "clips").glob("*") if p.suffix in (".mp4", ".avi"))
    if not films:
        pytest.skip("the real films are not beside this checkout")
    random = np.random.default_rng(0)
    for film in films:
        whole = decoded(film)
        wanted = [*random.integers(0, len(whole), 4).tolist(), len(whole) - 1]
        assert torch.equal(read_frames(film, film.name, lambda _, w=wanted: w), whole[wanted]), film.name
        lengths: list[int] = []

        def last(timeline: Timeline, lengths: list[int] = lengths) -> list[int]:
            lengths.append(len(timeline))
            return [len(timeline) - 1]

        assert torch.equal(read_frames(film, film.name, last)[0], whole[-1]), film.name
        assert lengths[-1] == len(whole) <= lengths[0] <= len(whole) + 1


def test_metadata_that_is_not_text(shared_data: Path, tmp_path: Path):
    """One of the real films has some that is not UTF-8, which PyAV by itself refuses."""
    odd = None
    for film in sorted((shared_data / "clips").glob("*.*")):
        try:
            av.open(str(film)).close()
        except UnicodeDecodeError:
            odd = film
    if odd is None:
        pytest.skip("no film with such metadata is beside this checkout")
    shutil.copy(odd, tmp_path / "film.mp4")
    assert read_frames(tmp_path / "film.mp4", "film", lambda timeline: [0, len(timeline) - 1]).shape[0] == 2
