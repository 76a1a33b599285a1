"""Images by (epoch, index). A sample depends on seed, epoch and index alone, whoever asks for it and when."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from swinscale.data.images import CorruptImage, decode_image
from swinscale.data.masking import MaskConfig, mask_for_sample
from swinscale.data.sources import Source
from swinscale.errors import UsageError
from swinscale.seeding import derive_seed

Sample = dict[str, Any]


class EpochDataset(Dataset[Sample]):
    """Samples by (epoch, index): what ``ImageDataset`` and ``DetectionDataset`` have in common.

    Args:
        source: a ``Source``, or a ``CocoSource``.
        transform: what it draws from torch's default generator is seeded by (seed, epoch, index).
        channels: channels of the images.
        replace_corrupt: take another readable image in place of one that cannot be read (training): the next one, but
            from another of many tar shards; otherwise the sample is left out (evaluation, where a replacement would distort the
            measures).

    An item is asked for as ``dataset[epoch, index]`` and holds what ``sample`` gives, ``index``, and ``skipped``: (name, reason) of
    each file that could not be read. Where nothing could be read it holds ``skipped`` alone.
    """

    def __init__(self, source: Any, transform: Any, channels: int, seed: int, replace_corrupt: bool):
        self.source, self.transform, self.channels, self.seed = source, transform, channels, seed
        self.replace_corrupt = replace_corrupt

    def __len__(self) -> int:
        return len(self.source)

    @property
    def problems(self) -> list[tuple[str, str]]:
        """What is missing from the images or their annotations, and why; see ``Source.problems``."""
        return list(self.source.problems)

    def fingerprint(self) -> str:
        """Identifies the images (not their contents); see ``Source.fingerprint``."""
        return str(self.source.fingerprint())

    def epoch_order(self, random: np.random.Generator) -> np.ndarray:
        """The order of an epoch; see ``Source.epoch_order``."""
        order: np.ndarray = self.source.epoch_order(random)
        return order

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        skipped: list[tuple[str, str]] = []
        for step in range(len(self.source) if self.replace_corrupt else 1):
            chosen = self.source.substitute(index, step) if step else index
            try:
                return {**self.sample(chosen, epoch, index), "index": index, "skipped": skipped}
            except CorruptImage as error:
                skipped.append((error.name, error.reason))
        return {"skipped": skipped}

    def sample(self, chosen: int, epoch: int, index: int) -> Sample:
        """Image ``chosen`` for place ``index`` of ``epoch``.

        Raises:
            CorruptImage: if it cannot be read.
        """
        raise NotImplementedError

    def transformed(self, before: Any, epoch: int, index: int) -> Any:
        """What the transform makes of ``before``; the same whenever it is asked for."""
        with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reseed the GPU as well, for good
            torch.default_generator.manual_seed(derive_seed(self.seed, "augment", epoch, index))
            return self.transform(before)

    def read(self, index: int) -> tuple[bytes, str]:
        """The bytes of one file, and its name.

        Raises:
            CorruptImage: for a file that vanished, a zip entry with a wrong checksum.
        """
        name = self.source.names[index]
        try:
            return self.source.read(index), name
        except Exception as error:
            raise CorruptImage(name, " ".join(str(error).split())[:120] or type(error).__name__) from error


class ImageDataset(EpochDataset):
    """Decoded and transformed images.

    Args:
        transform: maps a (C, H, W) tensor to a float32 (C, height, width) one; see ``EpochDataset``. With an attribute
            ``decode_size`` (see ``Augmentation``), large JPEG files are decoded at a smaller scale.
        mask: masks to draw for masked image modelling.
        orient: turn pictures as their EXIF orientation says, see ``decode_image``.

    An item holds ``image``, ``label`` (-1 without labels), ``mask`` if asked for, ``index`` and ``skipped``.
    """

    def __init__(
        self,
        source: Source,
        transform: Any,
        channels: int = 3,
        seed: int = 0,
        mask: MaskConfig | None = None,
        replace_corrupt: bool = True,
        orient: bool = True,
    ):
        super().__init__(source, transform, channels, seed, replace_corrupt)
        self.mask, self.orient = mask, orient

    def sample(self, chosen: int, epoch: int, index: int) -> Sample:
        pixels = self.decode(chosen, getattr(self.transform, "decode_size", None))
        found: Sample = {"image": self.transformed(pixels, epoch, index), "label": self._label(chosen)}
        if self.mask is not None:
            found["mask"] = mask_for_sample(self.mask, self.seed, epoch, index)
        return found

    def decode(self, index: int, at_least: tuple[int, int] | None = None) -> Tensor:
        """The pixels of one image, untransformed; ``at_least`` as in ``decode_image``.

        Raises:
            CorruptImage: if it cannot be read.
        """
        return decode_image(*self.read(index), self.channels, at_least, self.orient)

    def _label(self, index: int) -> int:
        return -1 if self.source.labels is None else int(self.source.labels[index])


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Stacks samples into a batch; ones without an image (unreadable) only add to ``skipped``."""
    read = [s for s in samples if "image" in s]
    batch: dict[str, Any] = {"skipped": [entry for s in samples for entry in s["skipped"]]}
    batch["image"] = torch.stack([s["image"] for s in read]) if read else torch.empty(0)
    for name in ("label", "index"):
        batch[name] = torch.tensor([s[name] for s in read], dtype=torch.long)
    if read and "mask" in read[0]:
        batch["mask"] = torch.stack([s["mask"] for s in read])
    return batch


def channel_statistics(
    source: Source, channels: int = 3, limit: int = 1000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over (at most ``limit``, evenly spread) images, for pixels in [0, 1].

    Raises:
        UsageError: if no image can be read.
    """
    dataset = ImageDataset(source, None, channels)
    count, total, square = 0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for index in range(0, len(source), math.ceil(len(source) / limit)):
        try:
            pixels = dataset.decode(index)
        except CorruptImage:
            continue
        values = (pixels.double() / 255 if pixels.dtype == torch.uint8 else pixels.double()).flatten(1)
        count += values.shape[1]
        total += values.sum(1)
        square += values.square().sum(1)
    if not count:
        raise UsageError(f"None of the {len(source)} images can be read as {channels}-channel images.")
    mean = total / count
    return tuple(mean.tolist()), tuple((square / count - mean**2).clamp(min=0).sqrt().tolist())
