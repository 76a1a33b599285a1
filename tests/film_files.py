"""Small films of all kinds, whose frames tell their number, written with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BITS = 12
"""Of the number that a frame shows, as so many dark and bright squares, 4 in a row."""
SIZE = (48, 64)
"""Height and width of a frame whose squares have 16 pixels."""


def numbered(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(height, width, 3) uint8: a picture that shows ``number``, below 4096; ``number_in`` reads it again."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)]).reshape(3, 4)
    rows, columns = (np.arange(side) * count // side for side, count in zip(size, (3, 4), strict=True))
    grey = 60 + 130 * bits[rows][:, columns]
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def number_in(frame: Tensor) -> int:
    """What a decoded frame (C, H, W) of ``numbered`` shows."""
    middle = frame.float().mean(0)
    height, width = middle.shape
    cells = [
        middle[(2 * row + 1) * height // 6, (2 * column + 1) * width // 8] for row in range(3) for column in range(4)
    ]
    return sum(1 << bit for bit, value in enumerate(cells) if value > 125)


def numbers_in(frames: Iterable[Tensor]) -> list[int]:
    return [number_in(frame) for frame in frames]


def write_film(
    path: Path,
    frames: int | Sequence[np.ndarray] = 30,
    *,
    size: tuple[int, int] = SIZE,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction | int = 25,
    format: str | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    tone: bool = False,
) -> Path:
    """Writes a film and returns its path; folders are made.

    Args:
        frames: so many numbered ones, or pictures (height, width, 3) uint8.
        options: of the encoder: "g" for the distance of key frames, "bf" for B frames between two others.
        times: of the frames in milliseconds; None: evenly spaced by ``rate``.
        tone: with a second of sound.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [numbered(number, size) for number in range(frames)] if isinstance(frames, int) else list(frames)
    with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2] if pictures else size
        stream.pix_fmt = pix_fmt
        base = Fraction(1, 1000) if times is not None else 1 / Fraction(rate)
        stream.codec_context.time_base = base
        sound: Any = container.add_stream("aac" if format != "webm" else "libopus", rate=48000) if tone else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[number] if times is not None else number, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            add_tone(container, sound)
    return path


def add_tone(container: Any, stream: Any, seconds: float = 1.0) -> None:
    """Sound into an open container."""
    import av

    count = int(48000 * seconds)
    for start in range(0, count, 960):
        wave = np.sin(np.arange(start, start + 960) * 2 * np.pi * 440 / 48000)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.pts, frame.sample_rate, frame.time_base = start, 48000, Fraction(1, 48000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_sound(path: Path, seconds: float = 1.0, cover: np.ndarray | None = None) -> Path:
    """A file of sound alone, perhaps with the picture of its cover."""
    import av

    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        picture: Any = None
        if cover is not None:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width = cover.shape[:2]
            picture.pix_fmt, picture.disposition = "yuvj420p", av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(picture.encode())
        add_tone(container, sound, seconds)
    return path


def turned(source: Path, target: Path, degrees: int) -> Path:
    """A copy of an MP4 or MOV film that says it is to be shown turned clockwise by ``degrees``; its pixels are the same."""
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    data = bytearray(source.read_bytes())
    begin = data.index(b"tkhd") + 4
    begin += 40 if data[begin] == 0 else 52
    one = 1 << 16
    matrix = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    data[begin : begin + 36] = struct.pack(">9i", *matrix)
    target.write_bytes(data)
    return target


def decoded(path: Path) -> Tensor:
    """(frames, 3, H, W): all frames of a film in order, by PyAV alone."""
    import av

    with av.open(str(path), metadata_errors="ignore") as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)
