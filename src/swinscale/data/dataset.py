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


class ImageDataset(Dataset[Sample]):
    """Decoded and transformed images.

    Args:
        transform: maps a (C, H, W) tensor to a float32 (C, height, width) one. What it draws from torch's default
            generator is seeded by (seed, epoch, index). With an attribute ``decode_size`` (see ``Augmentation``), large
            JPEG files are decoded at a smaller scale.
        channels: channels of the images.
        mask: masks to draw for masked image modelling.
        replace_corrupt: take another readable image in place of one that cannot be read (training): the next one, but
            from another of many tar shards; otherwise the sample is left out (evaluation, where a replacement would distort the measures).
        orient: turn pictures as their EXIF orientation says, see ``decode_image``.

    An item is asked for as ``dataset[epoch, index]`` and holds ``image``, ``label`` (-1 without labels), ``index``,
    ``mask`` if asked for, and ``skipped``: (name, reason) of each file that could not be read. Where nothing could be read
    it holds ``skipped`` alone.
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
        self.source, self.transform, self.channels, self.seed = source, transform, channels, seed
        self.mask, self.replace_corrupt, self.orient = mask, replace_corrupt, orient

    def __len__(self) -> int:
        return len(self.source)

    @property
    def problems(self) -> list[tuple[str, str]]:
        """What is missing from the images, and why; see ``Source.problems``."""
        return self.source.problems

    def fingerprint(self) -> str:
        """Identifies the images (not their contents); see ``Source.fingerprint``."""
        return self.source.fingerprint()

    def epoch_order(self, random: np.random.Generator) -> np.ndarray:
        """The order of an epoch; see ``Source.epoch_order``."""
        return self.source.epoch_order(random)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        skipped: list[tuple[str, str]] = []
        attempts = len(self.source) if self.replace_corrupt else 1
        for step in range(attempts):
            chosen = self.source.substitute(index, step) if step else index
            try:
                pixels = self.decode(chosen, getattr(self.transform, "decode_size", None))
            except CorruptImage as error:
                skipped.append((error.name, error.reason))
                continue
            with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reseed the GPU as well, for good
                torch.default_generator.manual_seed(derive_seed(self.seed, "augment", epoch, index))
                image = self.transform(pixels)
            sample = {"image": image, "label": self._label(chosen), "index": index, "skipped": skipped}
            if self.mask is not None:
                sample["mask"] = mask_for_sample(self.mask, self.seed, epoch, index)
            return sample
        return {"skipped": skipped}

    def decode(self, index: int, at_least: tuple[int, int] | None = None) -> Tensor:
        """The pixels of one image, untransformed; ``at_least`` as in ``decode_image``.

        Raises:
            CorruptImage: if it cannot be read.
        """
        name = self.source.names[index]
        try:
            data = self.source.read(index)
        except Exception as error:  # a file that vanished, a zip entry with a wrong checksum
            raise CorruptImage(name, " ".join(str(error).split())[:120] or type(error).__name__) from error
        return decode_image(data, name, self.channels, at_least, self.orient)

    def _label(self, index: int) -> int:
        return -1 if self.source.labels is None else self.source.labels[index]


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
