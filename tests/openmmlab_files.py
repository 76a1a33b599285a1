"""Files of detectors and segmenters as OpenMMLab's projects write them, name by name from the published configurations, with random values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinscale.errors import UsageError
from swinscale.weights.files import State

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, *inputs: int, bias: bool = True) -> Shapes:
    """The weight, and the bias if there is one, of a layer or a norm."""
    return {f"{name}.weight": (out, *inputs), **({f"{name}.bias": (out,)} if bias else {})}


def dense_backbone(width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int) -> Shapes:
    """The published dense Swin V1, its position indices included."""
    shapes = linear("backbone.patch_embed.proj", width, 3, 4, 4) | linear("backbone.patch_embed.norm", width)
    for stage, depth in enumerate(depths):
        dim = width << stage
        for number in range(depth):
            block = f"backbone.layers.{stage}.blocks.{number}"
            shapes |= linear(f"{block}.norm1", dim) | linear(f"{block}.norm2", dim)
            shapes |= linear(f"{block}.attn.qkv", 3 * dim, dim) | linear(f"{block}.attn.proj", dim, dim)
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            shapes |= linear(f"{block}.mlp.fc1", 4 * dim, dim) | linear(f"{block}.mlp.fc2", dim, 4 * dim)
        if stage < len(depths) - 1:
            shapes |= linear(f"backbone.layers.{stage}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
            shapes |= linear(f"backbone.layers.{stage}.downsample.norm", 4 * dim)
        shapes |= linear(f"backbone.norm{stage}", dim)
    return shapes


def mm_names(dense: Shapes) -> Shapes:
    """The same backbone as mmdetection names it."""
    words = {
        "patch_embed.proj.": "patch_embed.projection.",
        "layers.": "stages.",
        ".attn.": ".attn.w_msa.",
        ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
    }
    out = {}
    for name, shape in dense.items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        out[name] = shape
    return out


def head_shapes(kind: str, widths: list[int], channels: int, fc: int, classes: int, agnostic: bool = False) -> Shapes:
    """Neck and heads of "mask", "cascade" and "htc" as the published configurations build them."""
    shapes: Shapes = {}
    for level, width in enumerate(widths):
        shapes |= linear(f"neck.lateral_convs.{level}.conv", channels, width, 1, 1)
        shapes |= linear(f"neck.fpn_convs.{level}.conv", channels, channels, 3, 3)
    shapes |= linear("rpn_head.rpn_conv", channels, channels, 3, 3)
    shapes |= linear("rpn_head.rpn_cls", 3, channels, 1, 1) | linear("rpn_head.rpn_reg", 12, channels, 1, 1)
    for stage in range(1 if kind == "mask" else 3):
        number = "" if kind == "mask" else f".{stage}"
        box, mask = f"roi_head.bbox_head{number}", f"roi_head.mask_head{number}"
        for layer in range(0 if kind == "mask" else 4):
            conv = f"{box}.shared_convs.{layer}"
            shapes |= linear(f"{conv}.conv", channels, channels, 3, 3, bias=False) | linear(f"{conv}.bn", channels)
            shapes |= {f"{conv}.bn.running_mean": (channels,), f"{conv}.bn.running_var": (channels,)}
            shapes |= {f"{conv}.bn.num_batches_tracked": ()}
        shapes |= linear(f"{box}.shared_fcs.0", fc, 49 * channels)
        shapes |= linear(f"{box}.shared_fcs.1", fc, fc) if kind == "mask" else {}
        shapes |= linear(f"{box}.fc_cls", classes + 1, fc)
        shapes |= linear(f"{box}.fc_reg", 4 if agnostic else 4 * classes, fc)
        for layer in range(4):
            shapes |= linear(f"{mask}.convs.{layer}.conv", channels, channels, 3, 3)
        shapes |= linear(f"{mask}.upsample", channels, channels, 2, 2)
        shapes |= linear(f"{mask}.conv_logits", classes, channels, 1, 1)
        if kind == "htc" and stage:
            shapes |= linear(f"{mask}.conv_res.conv", channels, channels, 1, 1)
    if kind == "htc":
        semantic = "roi_head.semantic_head"
        for level in range(len(widths) + 1):
            shapes |= linear(f"{semantic}.lateral_convs.{level}.conv", channels, channels, 1, 1)
        for layer in range(4):
            shapes |= linear(f"{semantic}.convs.{layer}.conv", channels, channels, 3, 3)
        shapes |= linear(f"{semantic}.conv_embedding.conv", channels, channels, 1, 1)
        shapes |= linear(f"{semantic}.conv_logits", 183, channels, 1, 1)
    return shapes


def window_index(window: int) -> Tensor:
    """(w², w²): the offset from each place of a window to each other, as a row of the bias table."""
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


def filled(shapes: Shapes, seed: int = 0) -> State:
    """Random values in which no two tensors are alike; variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("relative_position_index"):
            state[name] = window_index(round(shape[0] ** 0.5))
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.randint(1000, (), generator=generator)
        else:
            value = 0.2 * torch.randn(shape, generator=generator)
            state[name] = value.abs() + 0.5 if name.endswith("running_var") else value
    return state


def upernet_shapes(
    widths: list[int],
    channels: int,
    classes: int,
    aux: int = 256,
    aux_stage: int = 2,
    bn: str = "bn",
    last: str = "conv_seg",
) -> Shapes:
    """The heads of a UPerNet as the published configurations build them.

    Args:
        aux: channels of the auxiliary head; 0: none.
        bn, last: what norms and last layers are called.
    """

    def conv(name: str, out: int, inputs: int, kernel: int) -> Shapes:
        norm = f"{name}.{bn}"
        statistics = {f"{norm}.running_mean": (out,), f"{norm}.running_var": (out,), f"{norm}.num_batches_tracked": ()}
        return linear(f"{name}.conv", out, inputs, kernel, kernel, bias=False) | linear(norm, out) | statistics

    head = "decode_head"
    shapes = linear(f"{head}.{last}", classes, channels, 1, 1)
    for place in range(4):
        shapes |= conv(f"{head}.psp_modules.{place}.1", channels, widths[-1], 1)
    shapes |= conv(f"{head}.bottleneck", channels, widths[-1] + 4 * channels, 3)
    for level, width in enumerate(widths[:-1]):
        shapes |= conv(f"{head}.lateral_convs.{level}", channels, width, 1)
        shapes |= conv(f"{head}.fpn_convs.{level}", channels, channels, 3)
    shapes |= conv(f"{head}.fpn_bottleneck", channels, len(widths) * channels, 3)
    if aux:
        shapes |= conv("auxiliary_head.convs.0", aux, widths[aux_stage], 3)
        shapes |= linear(f"auxiliary_head.{last}", classes, aux, 1, 1)
    return shapes


def assert_same(a: State, b: State) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def without_buffers(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}


def refusal(load: Any, model: nn.Module, source: Any, **changed: Any) -> str:
    """The message of ``load``, after checking that it is one line and that the model has not changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as error:
        load(model, source, **changed)
    assert "\n" not in str(error.value)
    assert_same(dict(model.state_dict()), before)
    return str(error.value)
