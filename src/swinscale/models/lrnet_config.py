"""What an LR-Net is: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from swinscale.config import check_ranges
from swinscale.errors import UsageError
from swinscale.models.config import Size, _per_axis
from swinscale.ops.local_relation import Similarity


@dataclass(frozen=True)
class LRNetConfig:
    """Architecture of an LR-Net.

    Args:
        img_size: height and width that it is trained at. Nothing in the network depends on it.
        num_classes: outputs of the classifier; 0 for none.
        depths: blocks of each stage.
        widths: channels of the local relation layers of each stage.
        stage_dims: channels of the maps between blocks, of each stage.
        stem_width: channels of the stem.
        stem_stride: pixels per place of the first stage: 4, the published stem; 2, without its max-pooling; 1, nor a stride.
        kernel_size: side k of the neighbourhood, odd.
        shared_channels: channels of a group.
        similarity: of a query q to a key k: "product" q·k, "squared" -(q - k)², "absolute" -|q - k|.
        prior_hidden: hidden channels of the network that gives the prior of an offset.
    """

    img_size: Any = 224
    in_chans: int = 3
    num_classes: int = 1000
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (100, 200, 400, 800)
    stage_dims: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    stem_stride: Literal[1, 2, 4] = 4
    kernel_size: int = 7
    shared_channels: int = 8
    similarity: Similarity = "product"
    prior_hidden: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", _per_axis("img_size", self.img_size, 2))
        for name in ("depths", "widths", "stage_dims"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = (
            "img_size",
            "in_chans",
            "depths",
            "widths",
            "stage_dims",
            "stem_width",
            "kernel_size",
            "shared_channels",
        )
        check_ranges(
            self, "model.", num_classes="[0, inf)", prior_hidden="[1, inf)", **dict.fromkeys(names, "[1, inf)")
        )
        if not len(self.depths) == len(self.widths) == len(self.stage_dims) > 0:
            raise UsageError(
                f"depths={self.depths}, widths={self.widths} and stage_dims={self.stage_dims} must name the same number of stages."
            )
        if self.kernel_size % 2 == 0:
            raise UsageError(
                f"kernel_size={self.kernel_size}: a neighbourhood has its pixel in the centre; give an odd number."
            )
        for name, allowed in (("similarity", ("product", "squared", "absolute")), ("stem_stride", (1, 2, 4))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r} is not allowed: choose one of {allowed}.")

    @property
    def rank(self) -> int:
        """Number of axes of the input."""
        return 2

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.stage_dims[-1]

    def stage_strides(self) -> list[Size]:
        """Input pixels per place of each stage."""
        return [(self.stem_stride * 2**stage,) * 2 for stage in range(len(self.depths))]

    def stage_maps(self, size: Size | None = None) -> list[Size]:
        """Map size of each stage for an input of ``size`` pixels (default: ``img_size``)."""
        return [
            tuple(math.ceil(n / s) for n, s in zip(size or self.img_size, strides, strict=True))
            for strides in self.stage_strides()
        ]

    @property
    def num_layers(self) -> int:
        """The largest layer id of ``layer_id``: number of blocks + 1."""
        return sum(self.depths) + 1

    def layer_id(self, name: str) -> int:
        """Depth of the parameter ``name`` for layer-wise decay: 0 for the stem, 1… for the blocks, ``num_layers`` for the rest."""
        parts = name.split(".")
        if parts[0] == "layers":
            return sum(self.depths[: int(parts[1])]) + int(parts[3]) + 1
        return 0 if parts[0] == "stem" else self.num_layers

    def macs(self, size: Size | None = None) -> list[int]:
        """Multiply–accumulates for one input of ``size`` pixels (default: ``img_size``): of the stem, each stage, the classifier.

        Without norms, softmax, and the prior, which is computed once per call.
        """

        def relation(dim: int, places: int, read: int) -> int:
            groups, offsets = math.ceil(dim / self.shared_channels), self.kernel_size**2
            return dim * groups * (read + places) + (groups + dim) * offsets * places + dim**2 * places

        def halved(pixels: Size) -> Size:
            return tuple(math.ceil(n / 2) for n in pixels)

        pixels = tuple(size or self.img_size)
        stem = halved(pixels) if self.stem_stride > 1 else pixels
        first = self.in_chans * self.stem_width * math.prod(pixels)
        counts, before = [first + relation(self.stem_width, math.prod(stem), math.prod(pixels))], self.stem_width
        maps = self.stage_maps(pixels)
        for stage, (width, dim) in enumerate(zip(self.widths, self.stage_dims, strict=True)):
            places, total = math.prod(maps[stage]), 0
            for block in range(self.depths[stage]):
                read = math.prod(maps[stage - 1]) if stage and not block else places
                total += before * width * read + relation(width, places, read) + width * dim * places
                total += before * dim * places if not block else 0
                before = dim
            counts.append(total)
        return [*counts, self.num_features * self.num_classes]
