"""torchvision beside a CPU build of torch: it imports, and nms and roi_align give the right numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from swinscale.torchvision_cpu import _nms, ensure_torchvision

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


def test_roi_align_samples_bilinearly_and_has_gradients():
    from torchvision.ops import roi_align

    image = torch.randn(1, 2, 9, 7, requires_grad=True)
    box = [1.3, 0.4, 6.1, 7.7]
    out = roi_align(image, torch.tensor([[0, *box]]), (2, 3), spatial_scale=1.0, sampling_ratio=2, aligned=True)
    left, top = box[0] - 0.5, box[1] - 0.5
    bin_height, bin_width = (box[3] - box[1]) / 2, (box[2] - box[0]) / 3
    for row in range(2):
        for column in range(3):
            points = [
                bilinear(image[0].detach(), top + (row + dy) * bin_height, left + (column + dx) * bin_width)
                for dy in (0.25, 0.75)
                for dx in (0.25, 0.75)
            ]
            assert out[0, :, row, column].tolist() == pytest.approx(torch.stack(points).mean(0).tolist(), abs=1e-5)
    out.sum().backward()
    assert image.grad.sum().item() == pytest.approx(2 * 6, rel=1e-4)
