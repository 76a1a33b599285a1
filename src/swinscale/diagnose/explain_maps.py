"""Feature maps of any point of a Swin by a stable name, and what the other parts of ``explain`` need to get at them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.models.config import Size, format_size
from swinscale.models.swin_mlp import SwinMLP
from swinscale.models.windows import Layout
from swinscale.tasks import Task


def intermediate_names(model: nn.Module) -> list[str]:
    """The names that ``intermediates`` knows, in forward order.

    * ``embed``: the patch embeddings, before an absolute position embedding is added.
    * ``layers.S.blocks.B.norm1`` and ``.norm2``: what the two norms of a block give. In V1 they are what attention and MLP
      read, in V2 what these two add to the stream.
    * ``layers.S.blocks.B``: the stream after a block.
    * ``layers.S``: the stream after a stage, before patch merging, as in ``forward_intermediates``.
    * ``pre_pool``: the normalised last map, whose mean the classifier reads (``forward_features``).
    """
    return list(_points(swin_of(model)))


def intermediates(
    model: nn.Module, x: Tensor, names: Sequence[str] | str, output_fmt: Literal["NCHW", "NHWC"] = "NCHW"
) -> dict[str, Tensor]:
    """Feature maps of one forward pass, in raster order and without padding.

    Gradients flow through them, and nothing else about the model changes: dropout is as the model's mode says.

    Args:
        model: a SwinTransformer, or a task around one.
        x: (B, C, H, W) or (B, C, T, H, W) of any size.
        names: of ``intermediate_names``.
        output_fmt: (B, D, *map) for "NCHW", (B, *map, D) for "NHWC".

    Raises:
        UsageError: for a name or format that does not exist, or an input of the wrong shape.
    """
    if output_fmt not in ("NCHW", "NHWC"):
        raise UsageError(f"output_fmt={output_fmt!r} is not allowed: choose 'NCHW' or 'NHWC'.")
    model = swin_of(model)
    names = [names] if isinstance(names, str) else list(names)
    with capture(model, names) as points:
        model.forward_features(x.to(model.norm.weight.device))
    maps = {name: points[name].to_map() for name in names}
    return {n: y.movedim(-1, 1).contiguous() for n, y in maps.items()} if output_fmt == "NCHW" else maps


def swin_of(model: nn.Module) -> SwinTransformer:
    """The Swin in ``model``, which is one or a task around one; UsageError for anything else."""
    inside = model.backbone if isinstance(model, Task) else model
    if not isinstance(inside, SwinTransformer):
        raise UsageError(
            f"{type(model).__name__} is not a Swin of this library: give a SwinTransformer, or a task whose backbone is one."
        )
    return inside


def check_attention(model: SwinTransformer) -> None:
    """Raises UsageError for a model whose blocks have no attention."""
    if isinstance(model, SwinMLP):
        raise UsageError("SwinMLP has no attention to look at: of its predictions only class maps can be made.")


def block_of(model: SwinTransformer, stage: int, block: int) -> Any:
    """A block with attention; negative numbers count from the end. UsageError says which there are."""
    check_attention(model)
    stages = len(model.layers)
    if not -stages <= stage < stages:
        raise UsageError(f"stage={stage} is not allowed: this model has stages 0 to {stages - 1}.")
    blocks = model.layers[stage].blocks
    if not -len(blocks) <= block < len(blocks):
        raise UsageError(
            f"block={block} is not allowed: stage {stage % stages} of this model has blocks 0 to {len(blocks) - 1}."
        )
    return blocks[block]


def check_pixel(pixel: Sequence[int], size: Size) -> Size:
    """``pixel`` as a tuple; UsageError unless it lies in an image of ``size`` pixels."""
    if len(pixel) != len(size) or not all(0 <= p < n for p, n in zip(pixel, size, strict=True)):
        axes = ("time", "row", "column")[-len(size) :]
        ranges = ", ".join(f"{axis} 0 to {n - 1}" for axis, n in zip(axes, size, strict=True))
        raise UsageError(
            f"query={','.join(map(str, pixel))} is not a pixel of this {format_size(size)} input: allowed are {ranges}."
        )
    return tuple(pixel)


@contextmanager
def evaluating(model: SwinTransformer) -> Iterator[None]:
    """The model in evaluation mode and without activation checkpointing, as it was before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    blocks = [(block, block.checkpointing) for stage in model.layers for block in stage.blocks]
    model.eval()
    for block, _ in blocks:
        block.checkpointing = "none"
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for block, checkpointing in blocks:
            block.checkpointing = checkpointing


@dataclass
class Point:
    """What a module gave in one forward pass; ``layout`` and ``size`` only where it is in window order."""

    value: Tensor = field(init=False)
    layout: Layout | None = None
    size: Size = ()

    def to_map(self, value: Tensor | None = None) -> Tensor:
        """``self.value``, or another tensor in its order such as its gradient, as (B, *map, D)."""
        x = self.value if value is None else value
        if self.layout is None:
            return x
        return x.flatten(1, 2).index_select(1, self.layout.slot).unflatten(1, self.size)


@contextmanager
def capture(model: SwinTransformer, names: Sequence[str]) -> Iterator[Mapping[str, Point]]:
    """What stands at ``names`` after the forward pass that is run inside."""
    known, points, hooks = _points(model), {name: Point() for name in names}, []
    for name in names:
        if name not in known:
            raise UsageError(
                f"Unknown point '{name}' of the model.{suggest(name, known)} Allowed: embed, layers.S, layers.S.blocks.B, "
                f"layers.S.blocks.B.norm1 and .norm2, pre_pool (intermediate_names lists them)."
            )

    def keep(point: Point) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            point.value = output

        return hook

    def note_size(point: Point) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            point.size = tuple(inputs[0].shape[1:-1])

        return hook

    def note_layout(point: Point) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            point.layout = inputs[1]

        return hook

    for name, point in points.items():
        hooks.append(known[name].register_forward_hook(keep(point)))
        if ".blocks." in name:
            _, stage, _, block, *_ = name.split(".")
            hooks.append(model.layers[int(stage)].register_forward_pre_hook(note_size(point)))
            hooks.append(model.layers[int(stage)].blocks[int(block)].register_forward_pre_hook(note_layout(point)))
    try:
        yield points
    finally:
        for hook in hooks:
            hook.remove()


def _points(model: SwinTransformer) -> dict[str, nn.Module]:
    """Modules by the name of what they give, in forward order."""
    points: dict[str, nn.Module] = {"embed": model.patch_embed}
    for s, stage in enumerate(model.layers):
        for b, block in enumerate(stage.blocks):
            name = f"layers.{s}.blocks.{b}"
            points |= {f"{name}.norm1": block.norm1, f"{name}.norm2": block.norm2, name: block}
        points[f"layers.{s}"] = stage
    return points | {"pre_pool": model.norm}


def enlarge(maps: Tensor, strides: Size, size: Size) -> Tensor:
    """(B, *map) → (B, *size): a value per token spread over its pixels, linearly between centres of tokens.

    Args:
        strides: pixels per token and axis. The map may reach past the input, by what padded its last patches.
    """
    whole = [n * s for n, s in zip(maps.shape[1:], strides, strict=True)]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    full = F.interpolate(maps[:, None], whole, mode=mode, align_corners=False)[:, 0]
    return full[(slice(None), *(slice(0, n) for n in size))]
