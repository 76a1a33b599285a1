"""Makes ``import torchvision`` work beside a CPU build of torch.

torchvision's wheel is built for CUDA. Beside a CPU torch its compiled operators do not load, and then the import itself
fails (``operator torchvision::nms does not exist``), which also breaks timm. Declaring the operators before the import is
enough for transforms, models and timm; ``nms`` and ``roi_align`` get plain PyTorch kernels. Where the real operators load,
nothing happens.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.util import find_spec

import torch
from torch import Tensor

_ROI = "Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_DEFORM = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask"
)
_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, {_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align(Tensor input, {_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, {_ROI}, {_SIZE}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool(Tensor input, {_ROI}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_ROI[13:]}, {_SIZE}) -> Tensor",
    f"ps_roi_align(Tensor input, {_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_ROI[13:]}, int sampling_ratio, {_SIZE}) "
    "-> Tensor",
    f"ps_roi_pool(Tensor input, {_ROI}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_ROI[13:]}, {_SIZE}) -> Tensor",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_DEFORM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "_cuda_version() -> int",
)
_library: torch.library.Library | None = None


def ensure_torchvision() -> None:
    """After this call ``import torchvision`` works, if torchvision is installed. Safe to call more than once."""
    global _library
    if _library is not None or "torchvision" in sys.modules or find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]  # what the failed import left behind
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPS:
        name = schema.split("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            _library.define(schema)
    _library.impl("nms", _nms, "CPU")
    _library.impl("_cuda_version", lambda: -1, "CompositeExplicitAutograd")
    extension = importlib.import_module("torchvision.extension")
    extension._has_ops = lambda: True  # type: ignore[attr-defined]
    # It holds the name too, and would compile an implementation that takes half a minute and extrapolates beyond the map.
    importlib.import_module("torchvision.ops.roi_align")._has_ops = extension._has_ops  # type: ignore[attr-defined]
    _library.impl("roi_align", _roi_align, "CompositeImplicitAutograd")
    logging.getLogger(__name__).info(
        "torchvision's compiled operators do not load beside this torch; nms and roi_align run in plain PyTorch."
    )


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes (x1, y1, x2, y2) that no better kept box overlaps by more than ``iou_threshold``."""
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    keep: list[Tensor] = []
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = rest[shared <= iou_threshold * (area[best] + area[rest] - shared)]
    return torch.stack(keep) if keep else order


def _roi_align(
    maps: Tensor, rois: Tensor, spatial_scale: float, height: int, width: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Mean of bilinear samples in each of ``height`` × ``width`` bins of each box: (B, C, H, W) → (K, C, height, width).

    The samples of a box form a grid, and bilinear weights are products of one along y and one along x. So a box is two
    small matrices around its map.

    Args:
        rois: (K, 5): index of the image, then the box (x1, y1, x2, y2); times ``spatial_scale`` in cells of the map.
        sampling_ratio: samples per bin and axis; 0 or less: as many as a bin has cells, rounded up.
        aligned: the centre of the first cell is at 0.5 rather than at 0.
    """
    with torch.no_grad():
        corners = rois[:, 1:].float() * spatial_scale - 0.5 * aligned
        sides = corners[:, 2:] - corners[:, :2]
        sides = sides if aligned else sides.clamp(min=1)
        rows = _bin_weights(corners[:, 1], sides[:, 1], height, maps.shape[2], sampling_ratio).to(maps.dtype)
        columns = _bin_weights(corners[:, 0], sides[:, 0], width, maps.shape[3], sampling_ratio).to(maps.dtype)
        image_of = rois[:, 0].long()
    out = maps.new_zeros((len(rois), maps.shape[1], height, width))
    for image in image_of.unique().tolist():
        mine = (image_of == image).nonzero()[:, 0]
        with torch.autocast(maps.device.type, enabled=False):  # the compiled operator does not lower precision either
            pooled = torch.einsum("kph,chw,kqw->kcpq", rows[mine], maps[image], columns[mine])
        out = out.index_copy(0, mine, pooled.to(maps.dtype))
    return out


def _bin_weights(start: Tensor, side: Tensor, bins: int, size: int, sampling_ratio: int) -> Tensor:
    """Weight of each of ``size`` cells in each bin, along one axis: (K,), (K,) → (K, bins, size)."""
    step = side / bins
    count = step.ceil() if sampling_ratio <= 0 else torch.full_like(step, sampling_ratio)
    sample = torch.arange(int(count.max()) if len(count) else 0, device=start.device)
    within = (sample + 0.5) / count.clamp(min=1)[:, None]  # (K, samples), as a part of the bin
    bin_index = torch.arange(bins, device=start.device)[:, None]
    at = start[:, None, None] + step[:, None, None] * (bin_index + within[:, None])  # (K, bins, samples)
    weight = ((at >= -1) & (at <= size) & (sample < count[:, None])[:, None]) / count.clamp(min=1)[:, None, None]
    at = at.clamp(0, size - 1)
    low = at.long()
    fraction = at - low
    weights = start.new_zeros((len(start), bins, size)).scatter_add_(2, low, weight * (1 - fraction))
    return weights.scatter_add_(2, (low + 1).clamp(max=size - 1), weight * fraction)
