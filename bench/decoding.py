"""Films into clips on one processor core: ours beside other decoders that are installed, on the same frames of the same films."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import tables
from bench.contenders import Cannot
from bench.progress import say
from bench.speed import Row, compared
from swinscale.data.clips import Sampling, ShortSide
from swinscale.data.frames import Timeline, read_frames
from swinscale.data.images import CorruptImage
from swinscale.data.video import film_reader, pixels_of
from swinscale.errors import UsageError
from swinscale.inference import film_files
from swinscale.timing import Spread, seconds_per_call

OURS = "swinscale"
EVERY = "PyAV, every frame"
PACKAGES = ("decord", "torchcodec")
CONTENDERS = (OURS, EVERY, *PACKAGES)
SAMPLING = Sampling(frames=32, stride=2)
FIT = ShortSide(256)
TOLERANCE = 1.0
"""Mean difference of pixels, of 255: resizing differs a little everywhere, another frame by more."""
Clip = tuple[list[int], Tensor]
"""Numbers of frames, and what ours reads for them."""
Reader = Callable[[Path, Sequence[int]], Tensor]
"""Frames of a film by their numbers: (32, 3, H, W) uint8 with a short side of 256."""


def measure(films: str, repeats: int) -> Row:
    """Everybody reads a clip of each film in turn, on one thread, after showing that its frames are the same.

    Raises:
        UsageError: if there are no films, or none that can be read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clips, unreadable = _clips(film_files([Path(films)]))
        say(f"decode {len(clips)} films; {len(unreadable)} others cannot be read")
        if not clips:
            raise UsageError(f"{films}: none of the {len(unreadable)} films can be read.")
        rows = compared(
            CONTENDERS,
            lambda name: _prepared(name, clips),
            ours=(OURS,),
            device="cpu",
            batch=len(clips),
            repeats=repeats,
            warm_up=0,  # everybody has read all of them
        )
        return {
            "films": [_film(path, *clip) for path, clip in clips.items()],
            "unreadable": unreadable,
            "contenders": rows,
        }
    finally:
        torch.set_num_threads(threads)


def _clips(paths: Sequence[Path]) -> tuple[dict[Path, Clip], list[str]]:
    """Of each film the clip in its middle, and names of those that cannot be read."""
    found, unreadable = dict[Path, Clip](), list[str]()
    for path in paths:
        numbers = list[int]()

        def choose(timeline: Timeline, numbers: list[int] = numbers) -> list[int]:
            numbers[:] = SAMPLING.choose(timeline, 1, None)[0].tolist()
            return numbers

        try:
            found[path] = numbers, read_frames(path, path.name, choose, 3, FIT)
        except CorruptImage:
            unreadable.append(path.name)
    return found, unreadable


def _film(path: Path, numbers: Sequence[int], clip: Tensor) -> Row:
    """What a film is, and seconds for our clip of it."""
    with film_reader().open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        found = {"name": path.name, "codec": stream.codec_context.name, "size": [stream.height, stream.width]}
        found["frames"] = sum(1 for packet in container.demux(stream) if packet.size)
    spread = seconds_per_call(lambda _: _ours(path, numbers), "cpu", repeats=3)
    return {**found, "clip": list(clip.shape), "seconds": spread.as_dict()}


def _prepared(name: str, clips: dict[Path, Clip]) -> tuple[Callable[[int], object], Row]:
    """A contender after it has read every clip, and in which films its frames are others than ours."""
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        raise Cannot(f"{name} is not installed")
    read = READERS[name]
    start = time.perf_counter()
    found = {path: read(path, numbers) for path, (numbers, _) in clips.items()}
    row: Row = {"first_batch_s": round(time.perf_counter() - start, 3)}
    for path, (_, clip) in clips.items():
        if found[path].shape != clip.shape:
            raise Cannot(f"{path.name}: gives {tuple(found[path].shape)}, not {tuple(clip.shape)}")
    apart = {path.name: (found[path].float() - clip.float()).abs().mean().item() for path, (_, clip) in clips.items()}
    row["other_frames"] = [film for film, difference in apart.items() if difference > TOLERANCE]
    same = [difference for film, difference in apart.items() if film not in row["other_frames"]]
    row["difference"] = round(max(same, default=0.0), 3)
    return lambda index: [read(path, numbers) for path, (numbers, _) in clips.items()], row


def _ours(path: Path, numbers: Sequence[int]) -> Tensor:
    """As ``ClipDataset`` does it."""
    return read_frames(path, path.name, lambda timeline: numbers, 3, FIT)


def _every(path: Path, numbers: Sequence[int]) -> Tensor:
    """As readers do it that decode a film from its beginning and then choose."""
    with film_reader().open(str(path), metadata_errors="ignore") as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    return torch.stack([pixels_of(frames[min(number, len(frames) - 1)], 3, FIT) for number in numbers])


def _decord(path: Path, numbers: Sequence[int]) -> Tensor:
    height, width = _sides(path)
    film = importlib.import_module("decord").VideoReader(str(path), num_threads=1, height=height, width=width)
    return torch.from_numpy(film.get_batch(list(numbers)).asnumpy()).permute(0, 3, 1, 2)


@cache
def _sides(path: Path) -> tuple[int, int]:
    """Height and width of the resized frames, which decord wants to know before it opens a film."""
    with film_reader().open(str(path), metadata_errors="ignore") as container:
        return FIT(container.streams.video[0].height, container.streams.video[0].width)


def _torchcodec(path: Path, numbers: Sequence[int]) -> Tensor:
    film = importlib.import_module("torchcodec.decoders").VideoDecoder(str(path), num_ffmpeg_threads=1)
    frames: Tensor = film.get_frames_at([min(number, len(film) - 1) for number in numbers]).data
    resized = F.interpolate(frames, FIT(*frames.shape[-2:]), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


READERS: dict[str, Reader] = {OURS: _ours, EVERY: _every, "decord": _decord, "torchcodec": _torchcodec}


def table(cases: Sequence[Row]) -> str:
    """A row per decoder, then one per film."""
    parts = []
    for case in cases:
        lines: list[tuple[str, ...]] = []
        for row in case["contenders"]:
            if row["status"] != "ok":
                lines.append((row["name"], "–", "–", "–", "–", row["reason"]))
                continue
            ratio = row["ratios"].get(OURS)
            lines.append((
                row["name"], f"{row['images_per_s']:.3g}", tables.spread(ratio) if ratio else "–",
                tables.duration(row["seconds"]["median"]), f"{row['difference']:.2g}",
                f"{len(row['other_frames'])} of {len(case['films'])}",
            ))  # fmt: skip
        heads = ("decoder", "clips/s and core", "times ours", "all films once", "difference", "films with other frames")
        parts.append(tables.table(heads, lines))
        films = [
            (
                one["name"], one["codec"], "×".join(map(str, one["size"])), str(one["frames"]),
                tables.duration(Spread(**one["seconds"]).median),
            )
            for one in case["films"]
        ]  # fmt: skip
        parts.append(tables.table(("film", "codec", "pixels", "frames", "our time for a clip"), films))
        skipped = case["unreadable"]
        note = f" Not readable: {', '.join(skipped)}." if skipped else ""
        parts.append(
            f"A clip is {SAMPLING.frames} frames, every second one, from the middle of a film, resized to a short side of {FIT.side}; one "
            f"thread. `{EVERY}` decodes all frames and keeps those of the clip; ours begins at the key frame before it. Everybody is asked "
            f"for the same numbers of frames. Difference: of pixels, in the film with the largest mean, of 255; above {TOLERANCE:g} a "
            f"frame counts as another one.{note}"
        )
    return "\n\n".join(parts)
