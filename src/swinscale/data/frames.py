"""Chosen frames of a film: which there are, and only those that are wanted, decoded and brought to a size."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinscale.data.images import MAX_PIXELS, CorruptImage, corrupt_if_it_fails
from swinscale.data.video import NoFilm, film_reader, open_film, pixels_of

Fit = Callable[[int, int], tuple[int, int]]
"""Height and width of a film → those that its frames are resized to."""
SKIP = 16
"""Going to a key frame pays when so many frames need not be decoded."""
ROUNDED = 6e-4
"""Seconds by which a frame may be early: Matroska counts milliseconds."""
MAX_CLIP = 10**9
"""Pixels of all frames that are asked for at once: a small file can claim any size."""
INDEXED = ("mov,", "matroska,")
"""Formats of FFmpeg that say where key frames are, and when each frame is shown. Others go astray: AVI files have no times, in
MPEG streams some frames have none."""


@dataclass(frozen=True)
class Timeline:
    """When the frames of a film are shown, in seconds from its beginning, in order. Empty films have none."""

    seconds: Sequence[float]

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def rate(self) -> float:
        """Frames per second on average; 25 where nothing says it."""
        length = self.seconds[-1] - self.seconds[0]
        return (len(self) - 1) / length if length > 0 else 25.0

    def at(self, seconds: float) -> int:
        """The frame that is shown then; the first and the last one before and after the film."""
        return min(max(bisect_right(self.seconds, seconds + ROUNDED) - 1, 0), len(self) - 1)


class _OutOfOrder(Exception):
    """The times in a file do not say which frame is which."""


def read_frames(
    file: Path | bytes,
    name: str,
    choose: Callable[[Timeline], Sequence[int]],
    channels: int = 3,
    fit: Fit | None = None,
) -> Tensor:
    """The frames of a film that ``choose`` asks for, in any container and codec that FFmpeg knows.

    The file says by its packets which frames there are, whatever its header claims. Decoding begins at the nearest key frame in
    containers with an index (MP4, MOV, Matroska, WebM), in others at the beginning. What is damaged is passed over. Frames are
    turned as the film says (telephones record sideways); where it changes its size, all get that of the first one read.

    Args:
        file: a path, or what is in the file.
        name: for messages.
        choose: numbers of frames, in any order and more than once. It is asked again if there are fewer than the packets say.
        channels: 3, or 1 for grey.
        fit: what frames are resized to, bilinearly; None: they stay as they are.

    Returns: (frames, channels, H, W) uint8.

    Raises:
        CorruptImage: for a file without moving pictures, or without one that can be decoded.
    """
    if channels not in (1, 3):
        raise CorruptImage(name, f"a film has 3 channels where {channels} are needed")
    film_reader()  # where it is missing no file is to blame
    with corrupt_if_it_fails(name):
        times, keys, unit = _packets(file)
        seconds = [(time - times[0]) * unit for time in times]
        try:
            if keys is None:
                raise _OutOfOrder
            wanted = choose(Timeline(seconds))
            found = _by_time(file, times, keys, wanted, _Pixels(len(set(wanted)), channels, fit))
        except _OutOfOrder:
            wanted, found = _in_order(file, seconds, choose, channels, fit)
        return torch.stack([found[number] for number in wanted])


@contextmanager
def _opened(file: Path | bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its film."""
    container, stream = open_film(file)
    with container:
        if stream.width * stream.height > MAX_PIXELS:
            raise NoFilm(f"frames of {stream.width}×{stream.height} pixels are larger than allowed")
        # One thread in a loader process, of which there are several; else as many as PyTorch has.
        stream.codec_context.thread_count = torch.get_num_threads()
        yield container, stream


def _packets(file: Path | bytes) -> tuple[list[int], list[int] | None, float]:
    """The times of a film's frames in order, those of its key frames if one may go there, and the length of a unit in seconds.

    Key frames are None where times are no more than a guess from the frame rate, or an index is missing.
    """
    with _opened(file) as (container, stream):
        packets = [(p.pts, p.is_keyframe) for p in _demuxed(container, stream) if p.size and not p.is_discard]
        indexed = container.format.name.startswith(INDEXED)
        unit, rate = float(stream.time_base), float(stream.average_rate or 25)
    if not packets:
        raise NoFilm("it has no frame")
    times = sorted({time for time, _ in packets if time is not None})
    if len(times) < len(packets):
        return list(range(len(packets))), None, 1 / rate
    return times, sorted(time for time, key in packets if key) if indexed else None, unit


def _demuxed(container: Any, stream: Any) -> Iterator[Any]:
    """Packets from where the container stands to the end, or to where the file is cut short."""
    with suppress(film_reader().FFmpegError, IndexError):  # a stream that appears later is not in PyAV's list
        yield from container.demux(stream)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames from where the container stands; packets that cannot be decoded are passed over."""
    for packet in _demuxed(container, stream):
        with suppress(film_reader().FFmpegError):
            yield from packet.decode()


class _Pixels:
    """Frames as tensors of one size."""

    def __init__(self, count: int, channels: int, fit: Fit | None):
        self.count, self.channels, self.fit, self.size = count, channels, fit, (0, 0)

    def __call__(self, frame: Any) -> Tensor:
        return pixels_of(frame, self.channels, self._size)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if not all(self.size):
            self.size = (height, width) if self.fit is None else self.fit(height, width)
            if self.count * self.size[0] * self.size[1] > MAX_CLIP:
                raise NoFilm(f"{self.count} frames of {self.size[1]}×{self.size[0]} pixels are more than allowed")
        return self.size


def _by_time(
    file: Path | bytes, times: list[int], keys: list[int], wanted: Sequence[int], pixels: _Pixels
) -> dict[int, Tensor]:
    """Frames by the times that packets have: what is not wanted is hardly decoded."""
    known = set(times)
    found: dict[int, Tensor] = {}
    with _opened(file) as (container, stream):
        frames, last, frame = _decoded(container, stream), -1, None
        for number in sorted(set(wanted)):
            key = bisect_right(keys, times[number]) - 1
            if key >= 0 and bisect_left(times, keys[key]) - last > SKIP:
                try:
                    container.seek(keys[key], stream=stream)
                except film_reader().FFmpegError:
                    raise _OutOfOrder from None
                frames, frame = _decoded(container, stream), None
            while frame is None or frame.pts < times[number]:
                before, frame = frame, next(frames, None)
                if frame is None or frame.pts not in known or (before is not None and frame.pts <= before.pts):
                    raise _OutOfOrder  # or there are fewer than there were packets
                if before is None and frame.pts > times[number]:
                    raise _OutOfOrder  # what is said to be a key frame was none
            found[number] = pixels(frame)
            last = number
    return found


def _in_order(
    file: Path | bytes,
    seconds: list[float],
    choose: Callable[[Timeline], Sequence[int]],
    channels: int,
    fit: Fit | None,
) -> tuple[Sequence[int], dict[int, Tensor]]:
    """Frames by their number, all decoded up to the last one that is wanted."""
    while seconds:
        wanted = choose(Timeline(seconds))
        missing, count = set(wanted), 0
        pixels, found = _Pixels(len(missing), channels, fit), dict[int, Tensor]()
        with _opened(file) as (container, stream):
            for count, frame in enumerate(_decoded(container, stream), 1):
                if count - 1 in missing:
                    found[count - 1] = pixels(frame)
                if count > max(missing):
                    return wanted, found
        seconds = seconds[:count]
    raise NoFilm("it has no frame that can be decoded")
