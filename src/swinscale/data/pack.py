"""Writing images as tar shards in the WebDataset layout; ``shards.py`` reads them, and so do other loaders."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from swinscale.data.images import NUMPY, ZIP
from swinscale.data.sources import EXTENSIONS, Source, _extension
from swinscale.errors import UsageError


def pack(
    source: Source,
    out: Path,
    samples_per_shard: int = 10_000,
    prefix: str = "train",
    seed: int | None = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes ``source`` as tar shards in the WebDataset layout, and ``classes.txt`` if it has labels.

    Files are copied as they are. The key of a sample is its index in ``source``; the same source gives the same bytes. The
    shards get their names when all are written, so that a part of them is never taken for the whole.

    Args:
        prefix: shards are called ``PREFIX-000000.tar`` and so on. Give each split a call with a prefix that says so:
            "train", "val" or "test".
        seed: samples are shuffled with it, because an epoch mixes within a few shards only; None: keep the order.
        progress: called after each shard with the samples written and their number.

    Returns:
        The shards.

    Raises:
        UsageError: if ``out`` holds shards of this prefix or other classes, or a file cannot be read.
    """
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard={samples_per_shard} is not allowed: it must be at least 1.")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", prefix):
        raise UsageError(f"prefix='{prefix}' is not allowed: use letters, digits, '_' and '-'.")
    if not len(source):
        raise UsageError("There are no images to pack.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file. Name a folder for the shards.")
    if there := sorted(out.glob(f"{prefix}-*.tar")):
        raise UsageError(
            f"{out} already holds {len(there)} shards {prefix}-*.tar. Remove them, or name another folder."
        )
    _write_classes(source, out)
    order = np.arange(len(source)) if seed is None else np.random.default_rng(seed).permutation(len(source))
    starts = range(0, len(source), samples_per_shard)
    shards = [out / f"{prefix}-{number:06d}.tar" for number in range(len(starts))]
    parts = [shard.with_name(f".{shard.name}.part") for shard in shards]
    try:
        for part, start in zip(parts, starts, strict=True):
            _write_shard(part, source, order[start : start + samples_per_shard])
            if progress is not None:
                progress(min(start + samples_per_shard, len(source)), len(source))
        for part, shard in zip(parts, shards, strict=True):
            os.replace(part, shard)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return shards


def _write_classes(source: Source, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if source.labels is None or source.classes is None:
        return
    if odd := [name for name in source.classes if not name or "\n" in name or "\r" in name]:
        raise UsageError(f"The class name {odd[0]!r} cannot stand on a line of classes.txt. Rename the class.")
    file, text = out / "classes.txt", "".join(f"{name}\n" for name in source.classes)
    if file.exists():
        if file.read_text(encoding="utf-8") != text:
            raise UsageError(f"{file} names other classes than these images have. Name another folder.")
        return
    part = file.with_name(".classes.txt.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, file)


def _write_shard(path: Path, source: Source, indices: Iterable[int]) -> None:
    digits = max(8, len(str(len(source) - 1)))
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in map(int, indices):
                for extension, data in _sample_files(source, index):
                    info = tarfile.TarInfo(
                        f"{index:0{digits}d}.{extension}"
                    )  # of nobody, in 1970: equal bytes each time
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())


def _sample_files(source: Source, index: int) -> Iterator[tuple[str, bytes]]:
    """Extension and contents of each member; the label first, so that a shard cut short has none without its picture."""
    name = source.names[index]
    try:
        data = source.read(index)
    except Exception as error:  # as in ``ImageDataset.decode``
        raise UsageError(f"{name} cannot be read, so nothing is packed: {error}. Mend or remove it.") from error
    if source.labels is not None:
        yield "cls", str(source.labels[index]).encode()
    yield _image_extension(name, data), data


def _image_extension(name: str, data: bytes) -> str:
    extension = _extension(name)
    if extension in EXTENSIONS:
        return extension
    if data.startswith((NUMPY, ZIP)):
        return "npy" if data.startswith(NUMPY) else "npz"
    try:
        with Image.open(io.BytesIO(data)) as picture:
            extension = (picture.format or "").lower()
    except Exception:  # Pillow raises nearly anything
        extension = ""
    if extension not in EXTENSIONS:
        raise UsageError(f"{name} has no extension of an image and no known format, so nothing is packed. Remove it.")
    return extension
