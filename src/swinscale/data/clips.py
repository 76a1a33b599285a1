"""Clips of films: which frames make one, and a data set of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.data.dataset import EpochDataset, Sample
from swinscale.data.frames import Fit, Timeline, read_frames
from swinscale.data.images import CorruptImage
from swinscale.data.masking import MaskConfig, mask_for_sample
from swinscale.data.sources import FolderStore, Source
from swinscale.seeding import derive_seed


@dataclass(frozen=True)
class Sampling:
    """Which frames of a film make a clip.

    Args:
        frames: of a clip.
        kind: "stride", every ``stride``-th frame from some point on, as for Kinetics; "segments", one frame of each of so many
            equal parts of the whole film, as for Something-Something.
        stride: from a frame to the next.
        rate: frames per second that ``stride`` counts; 0: the frames of the film, whatever its rate.
    """

    frames: int
    kind: Literal["stride", "segments"] = "stride"
    stride: int = 2
    rate: float = 0.0

    def choose(self, timeline: Timeline, clips: int, random: np.random.Generator | None) -> np.ndarray:
        """(clips, frames) numbers of frames: at random (training), or spread evenly over the film (``random`` None).

        A film that is shorter than a clip begins again; shorter than ``frames``, its segments hold the same frame.
        """
        rate = self.rate or timeline.rate
        # In steps of 1 / rate seconds, which are frames where the film's own rate counts.
        length = max(1, round(len(timeline) * rate / timeline.rate))
        if self.kind == "segments":
            edges = np.linspace(0, length, self.frames + 1)
            share = np.full((clips, self.frames), 0.5) if random is None else random.random((clips, self.frames))
            if random is None and clips > 1:  # each looks at other frames
                share = ((np.arange(clips) + 0.5) / clips)[:, None].repeat(self.frames, 1)
            steps = np.floor(edges[:-1] + share * np.diff(edges)).astype(int)
        else:
            room = max(length - self.frames * self.stride + 1, 1)
            if random is None:
                starts = np.floor((np.arange(clips) + 0.5) * room / clips)
            else:
                starts = random.integers(0, room, clips)
            steps = starts.astype(int)[:, None] + self.stride * np.arange(self.frames)
        steps %= length
        if not self.rate:
            return steps
        return np.array([[timeline.at(step / rate) for step in clip] for clip in steps])


class ClipDataset(EpochDataset):
    """Decoded and transformed clips of films.

    Args:
        source: films (``open_films``).
        transform: maps (frames, C, H, W) uint8 to float32 (frames, C, h, w); see ``EpochDataset``.
        sampling: which frames make a clip.
        fit: what frames are resized to when they are decoded.
        clips: 0: items hold one clip, ``image`` (C, T, H, W), at random for each epoch (training); else so many, spread evenly over
            the film: (clips, C, T, H, W), padded at the right and the bottom in a batch, with ``size`` (height, width).
        mask: masks to draw for masked image modelling; clips are as in training.

    An item holds ``image``, ``label`` (-1 without labels), ``mask`` if asked for, ``name``, ``index`` and ``skipped``.
    """

    def __init__(
        self,
        source: Source,
        transform: Any,
        sampling: Sampling,
        *,
        fit: Fit | None = None,
        clips: int = 0,
        channels: int = 3,
        seed: int = 0,
        mask: MaskConfig | None = None,
        replace_corrupt: bool = True,
    ):
        super().__init__(source, transform, channels, seed, replace_corrupt)
        self.sampling, self.fit, self.clips, self.mask = sampling, fit, clips, mask

    def sample(self, chosen: int, epoch: int, index: int) -> Sample:
        random = None if self.clips else np.random.default_rng(derive_seed(self.seed, "frames", epoch, index))
        frames = self.decode(chosen, random)
        pixels = self.transformed(frames, epoch, index)
        clips = pixels.unflatten(0, (-1, self.sampling.frames)).movedim(1, 2)  # (clips, C, T, H, W)
        found: Sample = {"image": clips if self.clips else clips[0], "label": self._label(chosen)}
        found["name"] = self.source.names[chosen]
        if self.mask is not None:
            found["mask"] = mask_for_sample(self.mask, self.seed, epoch, index)
        return found

    def decode(self, index: int, random: np.random.Generator | None) -> Tensor:
        """(clips * frames, C, H, W) uint8 frames of a film, untransformed.

        Raises:
            CorruptImage: if it cannot be read.
        """
        store, name = self.source.store, self.source.names[index]
        file: Path | bytes
        if isinstance(store, FolderStore):  # a film may be larger than memory
            file = path = store.root / name
            if not path.is_file():
                raise CorruptImage(name, "the file is gone")
        else:
            file, name = self.read(index)

        def choose(timeline: Timeline) -> list[int]:
            return self.sampling.choose(timeline, self.clips or 1, random).flatten().tolist()

        return read_frames(file, name, choose, self.channels, self.fit)

    def _label(self, index: int) -> int:
        return -1 if self.source.labels is None else int(self.source.labels[index])

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """A batch: ``image`` (B, …), ``size`` (B, 2) without padding, ``name``; see ``collate`` for the rest."""
        read = [sample for sample in samples if "image" in sample]
        batch: dict[str, Any] = {"skipped": [entry for sample in samples for entry in sample["skipped"]]}
        sizes = [tuple(sample["image"].shape[-2:]) for sample in read]
        most = [max(sides) for sides in zip(*sizes, strict=True)]
        padded = [
            F.pad(sample["image"], (0, most[1] - w, 0, most[0] - h)) for sample, (h, w) in zip(read, sizes, strict=True)
        ]
        batch["image"] = torch.stack(padded) if read else torch.empty(0)
        batch["size"] = torch.tensor(sizes, dtype=torch.long).reshape(-1, 2)
        batch["name"] = [sample["name"] for sample in read]
        for name in ("label", "index"):
            batch[name] = torch.tensor([sample[name] for sample in read], dtype=torch.long)
        if read and "mask" in read[0]:
            batch["mask"] = torch.stack([sample["mask"] for sample in read])
        return batch


@dataclass(frozen=True)
class ShortSide:
    """Height and width → those with this short side."""

    side: int

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        factor = self.side / min(height, width)
        return max(1, round(height * factor)), max(1, round(width * factor))


@dataclass(frozen=True)
class Cover:
    """Height and width → the smallest ones of that shape that cover ``size`` (height, width)."""

    size: tuple[int, int]

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        factor = max(self.size[0] / height, self.size[1] / width)
        return max(self.size[0], round(height * factor)), max(self.size[1], round(width * factor))
