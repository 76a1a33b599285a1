"""A model as one graph of plain operations, for any batch and any height and width.

Graphs of Swin models usually keep the batch or the size of the example. Here both stay symbols: layouts of windows are
integer arithmetic on the sizes (``models.windows.sort_into_windows``), no value decides what is computed, and a map smaller
than its window counts as one window whose rest takes no part.

What depends on weights alone is a constant of the graph: the position bias, written out per pair of tokens, and the bias of
queries, keys and values in one piece. No tensor has more than five axes, which is as many as some runtimes take.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from swinscale.errors import UsageError
from swinscale.models.config import Size, SwinConfig
from swinscale.models.swin import SwinTransformer, WindowAttention
from swinscale.models.windows import stage_layouts
from swinscale.ops.position import PositionBias

Dynamic = Literal["none", "batch", "hw"]
"""What stays open in a graph: nothing, the batch, or the batch and every axis of the size (time too, for video)."""
Output = Literal["logits", "features", "pyramid"]


def export_program(
    model: SwinTransformer,
    *,
    dynamic: Dynamic = "hw",
    size: Size | None = None,
    batch: int = 2,
    output: Output = "logits",
) -> ExportedProgram:
    """``model`` in evaluation as a graph of ATen operations; ``.module()`` runs it, ``torch.export.save`` writes it.

    Args:
        dynamic: "none": for inputs (batch, C, *size) alone; "batch": for any batch; "hw": for any batch and any size.
        size: of the example, and of all inputs unless ``dynamic`` is "hw"; None: ``config.img_size``.
        batch: of the example, and of all inputs if ``dynamic`` is "none".
        output: "logits" (B, classes); "features" (B, num_features), pooled; "pyramid", the maps of all stages (B, D, *map).

    Raises:
        UsageError: for settings that do not fit the model.
    """
    config = model.config
    size = config.img_size if size is None else size
    if len(size) != config.rank or min(size) < 1 or batch < 1:
        raise UsageError(
            f"size={size}, batch={batch}: give {config.rank} axes of at least 1 pixel, and a batch of at least 1."
        )
    if dynamic not in ("none", "batch", "hw"):
        raise UsageError(f"dynamic={dynamic!r} is not allowed: choose 'none', 'batch' or 'hw'.")
    if output == "logits" and not config.num_classes:
        raise UsageError(
            "The model has no classifier: export output='features' or 'pyramid' (--output). Of a detector or a segmenter a file "
            "holds the backbone alone."
        )
    fixed = None if dynamic == "hw" else size
    graph = _Graph(with_constants(model, fixed), output)
    if dynamic == "hw":  # an example whose maps are several windows, and whose axes are not equal by chance
        strides = config.stage_strides()[-1]
        size = tuple(n * s + 32 * i for i, (n, s) in enumerate(zip(_largest_window(config), strides, strict=True)))
    open_axes = {"none": (), "batch": (0,), "hw": (0, *range(2, config.rank + 2))}[dynamic]
    example = torch.zeros(batch if dynamic == "none" else 2, config.in_chans, *size, dtype=model.norm.weight.dtype)
    # Without this the graph would claim that no axis of a map is 1, though none of its operations depends on that.
    sizes: Any = symbolic_shapes
    with sizes.patch(backed_size_oblivious=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own pytree
        return torch.export.export(graph, (example,), dynamic_shapes=({axis: Dim.DYNAMIC for axis in open_axes},))


class _Graph(nn.Module):
    """What is traced: a model with one of its outputs."""

    def __init__(self, model: SwinTransformer, output: Output):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, images: Tensor) -> Any:
        if self.output == "pyramid":
            maps = self.model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
            return tuple(y.movedim(-1, 1) for y in maps)
        return self.model.forward_head(self.model.forward_features(images), pre_logits=self.output == "features")


def reference(model: SwinTransformer, output: Output) -> nn.Module:
    """The module that an exported graph of ``model`` has to agree with."""
    return _Graph(model.eval(), output)


def _largest_window(config: SwinConfig) -> Size:
    return tuple(max(axis) for axis in zip(*config.stage_windows, strict=True))


class _Constant(PositionBias):
    """A position bias that is written out: (A, N, N)."""

    def __init__(self, pairs: Tensor):
        self.pairs = pairs

    @property
    def heads(self) -> int:
        return self.pairs.shape[0]

    def rows(self, queries: slice | None = None) -> Tensor:
        return self.pairs if queries is None else self.pairs[:, queries]

    def forget(self) -> None:
        pass


def with_constants(model: SwinTransformer, size: Size | None) -> SwinTransformer:
    """A copy of ``model``, sharing its weights, that computes nothing from weights alone.

    Args:
        size: inputs will have this size; None: any, so that no window shrinks.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    made = copy.deepcopy(model, cast(dict[int, Any], shared)).eval()
    for stage, (layer, tokens) in enumerate(zip(made.layers, made.config.stage_maps(size), strict=True)):
        window = made.config.stage_windows[stage]
        if size is not None:
            window = stage_layouts(made.config, stage, tokens, torch.device("cpu"))[0].window
        for block in layer.blocks:
            block.checkpointing = "none"
            if hasattr(block, "attn"):  # SwinMLP's matrices are weights as they are
                _freeze(block.attn, window)
    return made


@torch.no_grad()
def _freeze(attn: WindowAttention, window: Size) -> None:
    attn.backend = "auto"
    attn.register_buffer("written_bias", attn.bias(window).rows().clone())
    delattr(attn, "relative_position_bias_table" if attn.position_bias == "table" else "cpb_mlp")
    attn.bias = lambda window: _Constant(cast(Tensor, attn.written_bias))  # type: ignore[method-assign]
    if attn.cosine and attn.q_bias is not None and attn.v_bias is not None:
        bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
        attn.qkv.bias = nn.Parameter(bias, requires_grad=False)
        attn.q_bias = attn.v_bias = None
