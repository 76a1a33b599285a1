"""torchvision beside a CPU build of torch: it imports, and nms and roi_align give the right numbers."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from swinscale.torchvision_cpu import _nms, _roi_align, ensure_torchvision

ensure_torchvision()


def test_torchvision_and_timm_import_in_a_fresh_process():
    code = "from swinscale.torchvision_cpu import ensure_torchvision as e; e(); e(); import timm, torchvision.transforms.v2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_nms_keeps_the_best_of_overlapping_boxes():
    from torchvision.ops import nms

    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 10.0]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.5])
    for function in (nms, _nms):
        assert function(boxes, scores, 0.5).tolist() == [1, 2]
        assert function(boxes, scores, 0.9).tolist() == [1, 0, 2]  # equal boxes: the first of equal scores stays
        assert function(boxes[:0], scores[:0], 0.5).tolist() == []


def bilinear(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(len(image))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = image[:, y0, x0] * (1 - (x - x0)) + image[:, y0, x1] * (x - x0)
    bottom = image[:, y1, x0] * (1 - (x - x0)) + image[:, y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 3])
def test_roi_align_is_the_mean_of_bilinear_samples(sampling_ratio: int, aligned: bool):
    """Boxes inside the map, reaching out of it on every side, wholly outside, small, and empty."""
    from torchvision.ops import roi_align

    maps, bins, scale = torch.randn(2, 3, 9, 7, dtype=torch.float64), (2, 3), 0.5
    boxes = [
        (0, 2.6, 0.8, 12.2, 15.4), (1, -9.0, -7.0, 5.0, 6.0), (0, 8.0, 9.0, 31.0, 29.0), (1, 60.0, 2.0, 80.0, 9.0),
        (0, 5.0, 5.0, 5.2, 5.4), (1, 4.0, 4.0, 4.0, 4.0), (0, -30.0, -30.0, 40.0, 40.0),
    ]  # fmt: skip
    out = roi_align(maps, torch.tensor(boxes), bins, scale, sampling_ratio, aligned)
    assert out.shape == (7, 3, *bins) and out.dtype == maps.dtype
    for (image, *box), found in zip(boxes, out, strict=True):
        left, top, right, bottom = (value * scale - 0.5 * aligned for value in box)
        sides = [bottom - top, right - left] if aligned else [max(bottom - top, 1), max(right - left, 1)]
        steps = [side / count for side, count in zip(sides, bins, strict=True)]
        samples = [sampling_ratio if sampling_ratio > 0 else math.ceil(step - 1e-6) for step in steps]
        for row in range(bins[0]):
            for column in range(bins[1]):
                values = [
                    bilinear(
                        maps[image],
                        top + (row + (i + 0.5) / samples[0]) * steps[0],
                        left + (column + (j + 0.5) / samples[1]) * steps[1],
                    )
                    for i in range(samples[0])
                    for j in range(samples[1])
                ]
                mean = torch.stack(values).mean(0) if values else torch.zeros(3, dtype=maps.dtype)
                assert found[:, row, column].tolist() == pytest.approx(mean.tolist(), abs=1e-5)
    assert roi_align(maps, torch.zeros(0, 5), bins).shape == (0, 3, *bins)


def test_gradients_of_roi_align():
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 1.3, 0.4, 6.1, 4.7], [1, -2, 0, 3, 9.0]])
    assert torch.autograd.gradcheck(lambda x: _roi_align(x, boxes, 1.0, 2, 3, 2, True), maps)
