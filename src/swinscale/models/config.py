"""What a Swin Transformer is: one frozen dataclass, checked and normalised when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

from swinscale.errors import UsageError

Size = tuple[int, ...]
"""One integer per axis: ``(height, width)`` for images, ``(time, height, width)`` for video."""


def format_size(size: Sequence[int]) -> str:
    """``"192×256"``."""
    return "×".join(map(str, size))


@dataclass(frozen=True)
class SwinConfig:
    """Architecture of a Swin Transformer V1 or V2 for images (two axes) or video (three axes).

    Sizes are tuples and the length of ``patch_size`` is the rank. An integer stands for the same value on every axis;
    ``window_size`` may also be one size per stage. Inputs may have any size at run time: ``img_size`` is not a
    restriction, it is the size that the windows are fitted to (the size the model is trained at).

    Args:
        version: 1 (pre-norm, scaled dot product) or 2 (residual post-norm, scaled cosine attention); it also says where
            patch merging normalises. The parts of a block can be chosen one by one below, as in the article's ablations.
        img_size: input size that the windows are fitted to, in pixels.
        patch_size: pixels per token of the first stage.
        num_classes: outputs of the classifier; 0 for none.
        embed_dim: channels of the first stage; each later stage has twice as many.
        window_size: side of the attention windows in tokens; per axis, per stage, or both.
        position_bias: "table" (a parameter per offset), or a continuous bias from a small network that reads
            coordinates: "log" (the published V2 code), "linear", "paper" (the formula printed in the V2 article).
            Default: "table" for version 1, "log" for version 2.
        pretrained_window_sizes: windows that the continuous bias was trained with, per stage; 0 for none. It fixes the
            scale of the coordinates, so that a bias keeps its value when the window grows.
        past_windows: the windows, per stage, of every size that the weights belonged to before this one, oldest first
            (``swinscale.weights.transfer`` adds to it). A record: nothing is computed from it, and two configurations
            that differ in it alone are equal.
        norm_placement: where a block normalises: "pre", the input of each residual branch (default for version 1);
            "res-post", the output of each branch before it is added (default for version 2); "sandwich", both; "post", the sum.
        similarity: logits of attention: "dot" (default for version 1) or "cosine" (default for version 2).
        identity_start: the last norm of each branch starts with a gain of zero, so that a block starts as the identity.
            Default: with "res-post".
        main_norm_interval: a LayerNorm on the main branch after every n-th block of a stage (V2-H and V2-G: 6); 0: none.
        ape: add a learned absolute position embedding.
        pad: what windows that reach past the map do. "exact": padding is never attended. "legacy": padding takes part
            as zero tokens, as in the published detection and segmentation code.
        small_map: when a map is not larger than the window. "shrink": the window becomes the map and is not shifted
            (published classification code). "pad": the map is padded up to the window, shifts stay (published detection
            code). "pad-noshift": the same without the shift (torchvision).
    """

    version: Literal[1, 2] = 2
    img_size: Any = 256
    patch_size: Any = 4
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: Any = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    position_bias: Literal["table", "log", "linear", "paper"] | None = None
    pretrained_window_sizes: Any = 0
    norm_placement: Literal["pre", "post", "sandwich", "res-post"] | None = None
    similarity: Literal["dot", "cosine"] | None = None
    identity_start: bool | None = None
    main_norm_interval: int = 0
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    patch_norm: bool = True
    ape: bool = False
    pad: Literal["exact", "legacy"] = "exact"
    small_map: Literal["shrink", "pad", "pad-noshift"] = "shrink"
    past_windows: Any = field(default=(), compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("depths", "num_heads"):
            put(name, tuple(getattr(self, name)))
        stages = len(self.depths)
        rank = max([2, *(len(v) for v in (self.patch_size, self.img_size) if isinstance(v, Sequence))])
        put("patch_size", _per_axis("patch_size", self.patch_size, rank))
        put("img_size", _per_axis("img_size", self.img_size, rank))
        put("window_size", _per_stage("window_size", self.window_size, stages, rank))
        put(
            "pretrained_window_sizes", _per_stage("pretrained_window_sizes", self.pretrained_window_sizes, stages, rank)
        )
        put("past_windows", _history(self.past_windows, stages, rank))
        if self.position_bias is None:
            put("position_bias", "table" if self.version == 1 else "log")
        if self.norm_placement is None:
            put("norm_placement", "pre" if self.version == 1 else "res-post")
        if self.similarity is None:
            put("similarity", "dot" if self.version == 1 else "cosine")
        if self.identity_start is None:
            put("identity_start", self.norm_placement == "res-post")
        self._check()

    def _check(self) -> None:
        def one_of(name: str, *allowed: Any) -> None:
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r} is not allowed: choose one of {allowed}.")

        one_of("version", 1, 2)
        one_of("position_bias", "table", "log", "linear", "paper")
        one_of("norm_placement", "pre", "post", "sandwich", "res-post")
        one_of("similarity", "dot", "cosine")
        if self.identity_start and self.norm_placement not in ("sandwich", "res-post"):
            raise UsageError(
                f"identity_start=True: with norm_placement={self.norm_placement!r} no norm ends a branch. Leave it out, or "
                f"choose 'res-post' or 'sandwich'."
            )
        one_of("pad", "exact", "legacy")
        one_of("small_map", "shrink", "pad", "pad-noshift")
        if self.rank not in (2, 3):
            raise UsageError(f"patch_size={self.patch_size}: give 2 axes (images) or 3 (video), not {self.rank}.")
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise UsageError(
                f"depths={self.depths} and num_heads={self.num_heads} must name the same number of stages."
            )
        for name in ("img_size", "patch_size", "depths", "num_heads"):
            if min(getattr(self, name)) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: every entry must be at least 1.")
        if min(map(min, self.window_size)) < 1 or min(map(min, self.pretrained_window_sizes)) < 0:
            raise UsageError(
                f"window_size={self.window_size} must be at least 1 and "
                f"pretrained_window_sizes={self.pretrained_window_sizes} at least 0 everywhere."
            )
        for name, least in (("in_chans", 1), ("embed_dim", 1), ("num_classes", 0), ("main_norm_interval", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}.")
        for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must lie in [0, 1).")
        for stage, (dim, heads) in enumerate(zip(self.stage_dims, self.num_heads, strict=True)):
            if dim % heads:
                raise UsageError(
                    f"Stage {stage} has {dim} channels, which {heads} heads do not divide. "
                    f"Change embed_dim={self.embed_dim} or num_heads={self.num_heads}."
                )

    @property
    def published_block(self) -> bool:
        """Whether the blocks are those of the published V1 or V2, which other projects can hold."""
        usual = ("pre", "dot") if self.version == 1 else ("res-post", "cosine")
        return (self.norm_placement, self.similarity) == usual

    @property
    def initially_zero(self) -> tuple[str, ...]:
        """Parameters of a block that start at zero. Deep V2 networks whose blocks do not start as the identity diverge."""
        ends = "branch_norm" if self.norm_placement == "sandwich" else "norm"
        return (f"{ends}1.weight", f"{ends}2.weight") if self.identity_start else ()

    @property
    def rank(self) -> int:
        """Number of axes: 2 for images, 3 for video."""
        return len(self.patch_size)

    @cached_property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.stage_dims[-1]

    @property
    def merging(self) -> Size:
        """Tokens merged per axis between two stages: height and width halve, time stays."""
        return (1,) * (self.rank - 2) + (2, 2)

    def stage_strides(self) -> list[Size]:
        """Input pixels per token of each stage."""
        return [
            tuple(p * m**stage for p, m in zip(self.patch_size, self.merging, strict=True))
            for stage in range(len(self.depths))
        ]

    def stage_maps(self, size: Size | None = None) -> list[Size]:
        """Map size of each stage, in tokens, for an input of ``size`` pixels (default: ``img_size``)."""
        maps = [tuple(math.ceil(s / p) for s, p in zip(size or self.img_size, self.patch_size, strict=True))]
        for _ in self.depths[1:]:
            maps.append(tuple(math.ceil(n / m) for n, m in zip(maps[-1], self.merging, strict=True)))
        return maps

    @cached_property
    def stage_windows(self) -> tuple[Size, ...]:
        """Window of each stage, fitted to the map at ``img_size``: the windows that the weights belong to.

        A larger input never enlarges them; that is a transfer (``swinscale.weights.transfer``), not an accident.
        """
        if self.small_map != "shrink":
            return cast(tuple[Size, ...], self.window_size)
        return tuple(
            tuple(map(min, window, size)) for window, size in zip(self.window_size, self.stage_maps(), strict=True)
        )

    @cached_property
    def trained_windows(self) -> tuple[Size, ...]:
        """Window, per stage, whose largest offset has coordinate 1 in the continuous position bias."""
        return tuple(
            tuple(p or w for p, w in zip(pretrained, window, strict=True))
            for pretrained, window in zip(self.pretrained_window_sizes, self.stage_windows, strict=True)
        )

    @property
    def num_layers(self) -> int:
        """The largest layer id of ``layer_id``: number of blocks + 1."""
        return sum(self.depths) + 1

    def layer_id(self, name: str) -> int:
        """Depth of the parameter ``name`` for layer-wise decay.

        0 for the patch embedding, 1… for the blocks, ``num_layers`` for the rest. A merging layer counts as the last
        block before it (microsoft/SimMIM, optimizer.py).
        """
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] == "layers":
            before = sum(self.depths[: int(parts[1])])
            return before + (int(parts[3]) + 1 if parts[2] == "blocks" else self.depths[int(parts[1])])
        return self.num_layers

    def drop_path_rates(self) -> list[list[float]]:
        """Stochastic-depth rate of every block of every stage: linear from 0 to ``drop_path_rate`` over all blocks."""
        total, rates, k = sum(self.depths), [], 0
        for depth in self.depths:
            rates.append([self.drop_path_rate * (k + j) / max(total - 1, 1) for j in range(depth)])
            k += depth
        return rates


def _per_axis(name: str, value: Any, rank: int) -> Size:
    if isinstance(value, int):
        return (value,) * rank
    if isinstance(value, Sequence) and len(value) == rank and all(isinstance(v, int) for v in value):
        return tuple(value)
    raise UsageError(f"{name}={value!r} is not a size: give an integer or {rank} integers, one per axis.")


def _per_stage(name: str, value: Any, stages: int, rank: int) -> tuple[Size, ...]:
    """One size per stage. ``rank`` plain integers are one size; ``stages`` entries are one per stage.

    Sizes that are the same in every stage are right for any number of stages, so that other ``depths`` need nothing else.
    """
    if isinstance(value, int) or (
        isinstance(value, Sequence) and len(value) == rank and all(isinstance(v, int) for v in value)
    ):
        return (_per_axis(name, value, rank),) * stages
    if isinstance(value, Sequence) and value:
        sizes = tuple(_per_axis(name, v, rank) for v in value)
        if len(sizes) == stages:
            return sizes
        if len(set(sizes)) == 1 and not isinstance(value[0], int):
            return sizes[:1] * stages
    raise UsageError(
        f"{name}={value!r}: give an integer, {rank} integers (one per axis), or one of these per stage ({stages})."
    )


def _history(past: Any, stages: int, rank: int) -> tuple[tuple[Size, ...], ...]:
    """Windows per stage of each size before; those of an image model stay two numbers in the video model made from it."""

    def is_window(value: Any) -> bool:
        return isinstance(value, Sequence) and 2 <= len(value) <= rank and all(isinstance(v, int) for v in value)

    if isinstance(past, Sequence) and all(
        isinstance(one, Sequence) and len(one) == stages and all(map(is_window, one)) for one in past
    ):
        return tuple(tuple(tuple(window) for window in one) for one in past)
    raise UsageError(f"past_windows={past!r}: give a list of sizes, each with one window for each of {stages} stages.")
