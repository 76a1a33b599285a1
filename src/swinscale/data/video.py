"""Films as frames, and frames as films, by PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swinscale.errors import UsageError

VIDEOS = frozenset(
    [".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf",
     ".flv", ".ogv"]
)  # fmt: skip
"""Ends of names that are taken for films."""


@dataclass(frozen=True)
class Video:
    """A film that is read frame by frame.

    Attributes:
        rate: frames per second.
        frames: (3, H, W) uint8 each, in order.
    """

    rate: Fraction
    frames: Iterator[Tensor]


def open_video(path: Path) -> Video:
    """Opens a film; frames are decoded as they are asked for.

    Raises:
        UsageError: for a file that is missing or holds no film that can be read.
    """
    try:
        container, stream = open_film(path)
    except NoFilm as error:
        raise UsageError(f"{path} cannot be read as a film: {error}.") from None
    stream.thread_type = "AUTO"
    return Video(Fraction(stream.average_rate or 25), _frames(container, stream, path))


class NoFilm(ValueError):
    """A file without moving pictures that can be decoded; the text says why."""


def open_film(file: Path | bytes) -> tuple[Any, Any]:
    """The open container of PyAV and its film: the first one, where a container holds several.

    Args:
        file: a path, or what is in the file.

    Raises:
        NoFilm: for anything else, such as a picture, sound (the picture of its cover is no film) or a list of other files.
        UsageError: if PyAV is not installed.
    """
    av = film_reader()
    if not (len(file) if isinstance(file, bytes) else not file.is_file() or file.stat().st_size):
        raise NoFilm("empty file")
    source = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    try:
        # Metadata may be in any encoding. What is called film.mp4 may name other files, or addresses to listen to.
        limits = {"format_whitelist": ",".join(_formats()), "protocol_whitelist": "file"}
        container = av.open(source, metadata_errors="ignore", options=limits)
    except av.ArgumentError:
        raise NoFilm("a picture or a list, not a film") from None
    except (av.FFmpegError, OSError) as error:
        raise NoFilm(f"{error.strerror or error}") from None
    cover = av.stream.Disposition.attached_pic
    films = [stream for stream in container.streams.video if not stream.disposition & cover]
    if films and films[0].codec_context is not None:
        return container, films[0]
    container.close()
    raise NoFilm("its moving pictures have a format that cannot be decoded" if films else "it has no moving pictures")


@cache
def _formats() -> list[str]:
    """The formats of FFmpeg that hold films themselves."""
    others = ("concat", "dash", "hls", "imf", "rtp", "rtsp", "sdp", "lavfi", "image2", "image2pipe", "alias_pix")
    return sorted(n for n in film_reader().formats_available if n not in others and not n.endswith("_pipe"))


def _frames(container: Any, stream: Any, path: Path) -> Iterator[Tensor]:
    av, count = film_reader(), 0
    with container:
        try:
            for frame in container.decode(stream):
                count += 1
                yield pixels_of(frame)
        except av.FFmpegError as error:
            raise UsageError(f"{path} is damaged after frame {count}: {error.strerror}.") from None
    if not count:
        raise UsageError(f"{path} holds no frame that can be read.")


def write_video(path: Path, frames: Iterator[Image.Image], rate: Fraction) -> None:
    """Writes RGB pictures of one size as an MP4 film, which appears under its name once it is whole."""
    av = film_reader()
    temporary = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = None
            for picture in frames:
                if stream is None:
                    stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
                    # The format stores colours for squares of four pixels.
                    stream.width, stream.height = (side + side % 2 for side in picture.size)
                    stream.pix_fmt = "yuv420p"
                even = picture.crop((0, 0, stream.width, stream.height))
                container.mux(stream.encode(av.VideoFrame.from_image(even)))
            if stream is not None:
                container.mux(stream.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def pixels_of(frame: Any, channels: int = 3, fit: Callable[[int, int], tuple[int, int]] | None = None) -> Tensor:
    """(channels, H, W) uint8: a frame of PyAV the way up that its film says, as colours or grey (1 channel).

    Args:
        fit: height and width → those that the frame is resized to, bilinearly.
    """
    turns = round(frame.rotation / 90) % 4
    width, height = frame.width, frame.height
    if fit is not None:
        sides = fit(*((width, height) if turns % 2 else (height, width)))
        height, width = sides[::-1] if turns % 2 else sides
    pixels = frame.to_ndarray(format="rgb24" if channels == 3 else "gray", width=width, height=height)
    upright = np.ascontiguousarray(np.rot90(pixels, turns))
    return torch.from_numpy(upright if channels == 3 else upright[..., None]).permute(2, 0, 1)


def film_reader() -> Any:
    """The package PyAV.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("Films need the package PyAV: install it with pip install 'swinscale[video]'.") from error
    return av
