"""Films as frames, and frames as films, by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from swinscale.errors import UsageError

VIDEOS = frozenset([".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"])
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
    av = _av()
    try:
        container = av.open(str(path), metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a film: {getattr(error, 'strerror', None) or error}.") from None
    if not container.streams.video:
        container.close()
        raise UsageError(f"{path} holds no film: it has no moving pictures.")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return Video(Fraction(stream.average_rate or 25), _frames(av, container, path))


def _frames(av: Any, container: Any, path: Path) -> Iterator[Tensor]:
    count = 0
    with container:
        try:
            for frame in container.decode(video=0):
                count += 1
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        except av.FFmpegError as error:
            raise UsageError(f"{path} is damaged after frame {count}: {error.strerror}.") from None
    if not count:
        raise UsageError(f"{path} holds no frame that can be read.")


def write_video(path: Path, frames: Iterator[Image.Image], rate: Fraction) -> None:
    """Writes RGB pictures of one size as an MP4 film, which appears under its name once it is whole."""
    av = _av()
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


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError("Films need the package PyAV: install it with pip install 'swinscale[video]'.") from error
    return av
