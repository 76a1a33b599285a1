"""Instances moved about in their own image, and the holes filled from around them (after InstaBoost, arXiv 1908.07801)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision.transforms import v2  # noqa: E402

Sample = dict[str, Any]
CELL = 4  # pixels; instances that share a cell of this size touch, as neighbouring pixels do


def uniform(low: float, high: float) -> float:
    """A number between both, from torch's default generator."""
    return low + (high - low) * torch.rand(()).item()


def move_instances(
    sample: Sample,
    ignored: int,
    scale: tuple[float, float] = (0.8, 1.2),
    shift: float = 1 / 15,
    degrees: float = 1.0,
    colour: float = 0.5,
) -> Sample:
    """Moves, scales and turns instances a little, each group of touching ones as a whole, and changes colours.

    What an instance leaves free is filled from its surroundings. Where a group comes to lie on another one, the one pasted
    later is on top (large groups first) and the others lose these pixels; instances without a pixel left are dropped. Boxes
    become those of the masks.

    Args:
        sample: as in ``detection_transforms``, with ``masks``. Its tensors are not changed.
        ignored: class in the semantic map for pixels that were filled.
        scale: range of the factor of a group's size.
        shift: how far a group moves at most, as a share of its own width along x and of its height along y. The published
            "dx 15, dy 15" are documented as divisors of the instance's width and height.
        degrees: it turns by at most this angle.
        colour: share of images whose brightness, contrast and saturation change by up to 20 %; for uint8 images of 1 or 3
            channels.
    """
    image, masks, labels = sample["image"], sample["masks"], sample["labels"]
    if image.dtype == torch.uint8 and image.shape[0] in (1, 3) and uniform(0, 1) < colour:
        image = v2.ColorJitter(0.2, 0.2, 0.2 if image.shape[0] == 3 else 0)(image)
    covered = masks.any(0)
    if not covered.any() or covered.all():
        return dict(sample, image=image)
    pixels = image.float()
    canvas = fill_holes(pixels, ~covered)
    semantic = sample["semantic"].masked_fill(covered, ignored) if "semantic" in sample else None
    moved = torch.zeros_like(masks)
    groups = touching(masks)
    groups.sort(key=lambda members: -int(masks[members].any(0).sum()))
    for members in groups:
        union = masks[members].any(0)
        if not union.any():
            continue
        source = mask_boxes(union[None])[0]
        grid, (left, top, right, bottom) = _placement(source, union.shape, scale, shift, degrees)
        if grid is None:
            continue
        # The map is bilinear in masks too: an edge then runs between pixels, as soft as that of a photo.
        x1, y1, x2, y2 = (int(side) for side in source)
        x1, y1 = max(0, x1 - 2), max(0, y1 - 2)
        cut = (slice(y1, y2 + 2), slice(x1, x2 + 2))
        height, width = union[cut].shape
        grid = (grid - torch.tensor([x1, y1])) * 2 / torch.tensor([width, height]) - 1
        place = (slice(top, bottom), slice(left, right))
        alpha = _sample(union[cut][None].float(), grid)
        colours = _sample(pixels[(slice(None), *cut)] * union[cut], grid)  # no old background at the edges
        window = (slice(None), *place)
        canvas[window] = colours + (1 - alpha) * canvas[window]
        shapes = _sample(masks[members][(slice(None), *cut)].float(), grid) >= 0.5
        top_most = shapes.any(0)
        moved[window] &= ~top_most
        for index, shape in zip(members, shapes, strict=True):
            moved[index][place] = shape
        if semantic is not None:
            classes = F.grid_sample(
                sample["semantic"][cut][None, None].double(), grid[None].double(), "nearest", "border", False
            )
            semantic[place] = torch.where(top_most, classes[0, 0].long(), semantic[place])
    keep = moved.flatten(1).any(1)
    if image.dtype == torch.uint8:
        canvas = canvas.round().clamp(0, 255).to(torch.uint8)
    made = dict(sample, image=canvas, masks=moved[keep], labels=labels[keep], boxes=mask_boxes(moved[keep]))
    if semantic is not None:
        made["semantic"] = semantic
    return made


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """Bilinear values of ``maps`` (c, h, w) at ``grid`` (H, W, 2), 0 outside → (c, H, W)."""
    return F.grid_sample(maps[None], grid[None], "bilinear", "zeros", align_corners=False)[0]


def _placement(
    box: Tensor, size: torch.Size, scale: tuple[float, float], shift: float, degrees: float
) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """Where what is in ``box`` goes: for each pixel of a window, the point (x, y) of the image it is taken from.

    Returns:
        (height, width, 2) in pixels, None if the window is empty; and the window (left, top, right, bottom).
    """
    x1, y1, x2, y2 = (float(side) for side in box)
    factor, angle = uniform(*scale), math.radians(uniform(-degrees, degrees))
    across, down = uniform(-shift, shift) * (x2 - x1), uniform(-shift, shift) * (y2 - y1)
    middle = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2])
    target = middle + torch.tensor([across, down])
    turn = factor * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = (torch.tensor([[x1, y1], [x2, y1], [x1, y2], [x2, y2]]) - middle) @ turn.T + target
    (left, top), (right, bottom) = (corners.amin(0) - 1).floor().tolist(), (corners.amax(0) + 1).ceil().tolist()
    window = max(0, int(left)), max(0, int(top)), min(size[1], int(right)), min(size[0], int(bottom))
    if window[2] <= window[0] or window[3] <= window[1]:
        return None, window
    y, x = torch.meshgrid(torch.arange(window[1], window[3]), torch.arange(window[0], window[2]), indexing="ij")
    return (torch.stack([x, y], -1) + 0.5 - target) @ torch.linalg.inv(turn).T + middle, window


def touching(masks: Tensor) -> list[list[int]]:
    """Groups of instances that touch or overlap, directly or through others: (n, H, W) bool → lists of indices."""
    wide = masks.clone()
    wide[:, 1:] |= masks[:, :-1]
    wide[:, :-1] |= masks[:, 1:]
    wider = wide.clone()
    wider[..., 1:] |= wide[..., :-1]
    wider[..., :-1] |= wide[..., 1:]
    whole = F.pad(wider, (0, -masks.shape[2] % CELL, 0, -masks.shape[1] % CELL))
    cells = whole.unflatten(2, (-1, CELL)).any(3).unflatten(1, (-1, CELL)).any(2).flatten(1).float()
    linked = cells @ cells.T > 0
    linked.fill_diagonal_(True)
    group = torch.arange(len(masks))
    while True:
        lowest = torch.where(linked, group, len(masks)).amin(1)
        if torch.equal(lowest, group):
            break
        group = lowest
    return [(group == number).nonzero()[:, 0].tolist() for number in group.unique().tolist()]


def mask_boxes(masks: Tensor) -> Tensor:
    """The boxes (x1, y1, x2, y2) around non-empty masks: (n, H, W) bool → (n, 4) float32."""
    ends = []
    for axis in (1, 2):  # over rows: which columns are used; over columns: which rows
        used = masks.any(axis).to(torch.uint8)
        ends.append((used.argmax(1), used.shape[1] - used.flip(1).argmax(1)))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], 1).float()


def fill_holes(image: Tensor, known: Tensor) -> Tensor:
    """Smooth values where ``known`` is False, from the pixels around; the others stay.

    A push-pull pyramid: on the way down each level averages the known pixels among four, on the way up what is still
    unknown takes the values of the coarser level.

    Args:
        image: (C, H, W) float.
        known: (H, W) bool, at least one of them True.
    """
    values, weights = [image[None] * known], [known[None, None].to(image.dtype)]
    while weights[-1].min() == 0:
        weight = F.avg_pool2d(weights[-1], 2, ceil_mode=True)
        value = F.avg_pool2d(values[-1], 2, ceil_mode=True) / weight.clamp(min=1e-6)
        values.append(value)
        weights.append((weight > 0).to(image.dtype))
    filled = values.pop()
    for value, weight in zip(values[::-1], weights[-2::-1], strict=True):
        coarse = F.interpolate(filled, size=value.shape[-2:], mode="bilinear", align_corners=False)
        filled = value + coarse * (1 - weight)
    return filled[0]
