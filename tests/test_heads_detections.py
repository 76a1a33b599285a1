"""Detections: changes of coordinates, pasted masks, suppression of duplicates, fusion of views."""

from __future__ import annotations

import math

import pytest
import torch

from swinscale.errors import UsageError
from swinscale.heads.detections import Detections, merge_views, suppress


def crowded(n: int = 200, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes of which many overlap."""
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, generator=draw) * 60
    boxes = torch.cat([corners, corners + 15 + 15 * torch.rand(n, 2, generator=draw)], 1)
    return boxes, torch.rand(n, generator=draw), torch.randint(classes, (n,), generator=draw)


def some(n: int = 4, masks: bool = True, seed: int = 0) -> Detections:
    boxes, scores, labels = crowded(n, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    return Detections(
        boxes, scores.sort(descending=True)[0], labels, torch.rand(n, 7, 5, generator=draw) if masks else None
    )


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def plainly(boxes, scores, labels, iou, soft, sigma, min_score, limit) -> list[tuple[int, float]]:
    """The pseudocode of the soft-NMS article, class by class."""
    found = []
    for label in sorted(set(labels.tolist())):
        left = {i: s for i, s in enumerate(scores.tolist()) if labels[i] == label and s > min_score}
        while left:
            best = max(left, key=lambda i: left[i])
            found.append((best, left.pop(best)))
            for other in list(left):
                shared = overlap(boxes[best].tolist(), boxes[other].tolist())
                if soft == "gaussian":
                    left[other] *= math.exp(-(shared**2) / sigma)
                elif shared > iou:
                    left[other] *= 1 - shared if soft == "linear" else 0
                if left[other] <= min_score:
                    del left[other]
    return sorted(found, key=lambda each: -each[1])[:limit]


@pytest.mark.parametrize("soft", ["none", "linear", "gaussian"])
@pytest.mark.parametrize(("iou", "min_score", "limit"), [(0.3, 0.05, 1000), (0.5, 0.0, 1000), (0.5, 0.2, 20)])
def test_suppression_is_that_of_the_article(soft, iou, min_score, limit):
    given = crowded()
    indices, scores = suppress(*given, iou=iou, soft=soft, sigma=0.4, min_score=min_score, limit=limit)
    expected = plainly(*given, iou, soft, 0.4, min_score, limit)
    assert 10 < len(expected) <= limit
    assert indices.tolist() == [index for index, _ in expected]
    assert scores.tolist() == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("limit", [5, 1000])
def test_removing_duplicates_equals_torchvision(limit):
    from torchvision.ops import batched_nms  # what runs on a GPU

    boxes, scores, labels = crowded(400, classes=5)
    indices, values = suppress(boxes, scores, labels, iou=0.4, limit=limit)
    assert indices.tolist() == batched_nms(boxes, scores, labels, 0.4)[:limit].tolist()
    assert torch.equal(values, scores[indices])


@pytest.mark.parametrize("soft", ["none", "linear", "gaussian"])
def test_suppression_leaves_other_classes_alone_and_takes_nothing_from_nothing(soft):
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    scores, labels = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1])
    indices, values = suppress(boxes, scores, labels, soft=soft, min_score=0.2)
    assert indices.tolist() == [1, 2]
    assert values.tolist() == pytest.approx([0.9, 0.7])
    indices, values = suppress(boxes[:0], scores[:0], labels[:0], soft=soft)
    assert indices.shape == values.shape == (0,)
    assert indices.dtype == torch.int64


def test_linear_suppression_of_a_copy_leaves_it_without_score():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 2)
    indices, scores = suppress(boxes, torch.tensor([0.8, 0.6]), torch.zeros(2).long(), soft="linear", min_score=-1.0)
    assert indices.tolist() == [0, 1]
    assert scores.tolist() == pytest.approx([0.8, 0.0])


def test_what_suppression_cannot_do_is_said():
    given = crowded(3)
    with pytest.raises(UsageError, match="soft='hard': choose one of none, linear, gaussian"):
        suppress(*given, soft="hard")
    with pytest.raises(UsageError, match="sigma=0"):
        suppress(*given, soft="gaussian", sigma=0)


def test_fields_must_belong_together():
    boxes, scores, labels = crowded(3)
    with pytest.raises(UsageError, match=r"shapes \(3, 4\), \(2,\) and \(3,\)"):
        Detections(boxes, scores[:2], labels)
    with pytest.raises(UsageError, match=r"masks \(3, 1, 7, 7\)"):
        Detections(boxes, scores, labels, torch.zeros(3, 1, 7, 7))


def test_scaling_flipping_and_taking():
    found = some()
    assert len(found) == 4
    assert torch.equal(found.scaled(2, 0.5).boxes, found.boxes * torch.tensor([2, 0.5, 2, 0.5]))
    mirrored = found.flipped(100)
    assert torch.allclose(
        mirrored.boxes[:, [2, 1, 0, 3]], torch.tensor([100.0, 0, 100, 0]) + found.boxes * torch.tensor([-1.0, 1, -1, 1])
    )
    back = mirrored.flipped(100)
    assert torch.allclose(back.boxes, found.boxes, atol=1e-4)
    assert torch.equal(back.masks, found.masks)
    for indices in (torch.tensor([2, 0]), torch.tensor([True, False, True, False]), slice(1, 3)):
        taken = found.take(indices)
        for name in ("boxes", "scores", "labels", "masks"):
            assert torch.equal(getattr(taken, name), getattr(found, name)[indices])
    assert some(masks=False).take(slice(2)).masks is None
    assert found.to("meta").masks.device.type == "meta"


def test_flipping_mirrors_full_masks():
    found = some(6)
    mirrored = found.flipped(100).full_masks(90, 100)
    assert (mirrored.flip(2) != found.full_masks(90, 100)).float().mean() < 1e-4  # rounding where it is 0.5


def interpolated(mask: torch.Tensor, box: list[float], height: int, width: int) -> torch.Tensor:
    """(height, width) probabilities, pixel by pixel."""
    rows, columns = mask.shape
    out = torch.zeros(height, width, dtype=torch.float64)
    for py in range(height):
        for px in range(width):
            y = (py + 0.5 - box[1]) / (box[3] - box[1]) * rows - 0.5
            x = (px + 0.5 - box[0]) / (box[2] - box[0]) * columns - 0.5
            for cy in (math.floor(y), math.floor(y) + 1):
                for cx in (math.floor(x), math.floor(x) + 1):
                    if 0 <= cy < rows and 0 <= cx < columns:
                        out[py, px] += (1 - abs(y - cy)) * (1 - abs(x - cx)) * mask[cy, cx].item()
    return out


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_full_masks_are_bilinear_between_the_centres_of_cells(threshold):
    boxes = torch.tensor(
        [[3.2, 1.7, 20.4, 15.1], [-6.0, -3.0, 8.5, 4.25], [18.0, 10.0, 40.0, 33.0], [5.0, 5.0, 6.2, 7.9]]
    )
    found = Detections(
        boxes, torch.linspace(0.9, 0.6, 4), torch.zeros(4).long(), torch.rand(4, 6, 5).add(0.2).clamp(max=1)
    )
    pasted = found.full_masks(18, 24, threshold)
    assert pasted.shape == (4, 18, 24) and pasted.dtype == torch.bool
    for mask, box, ours in zip(found.masks, boxes.tolist(), pasted, strict=True):
        expected = interpolated(mask, box, 18, 24)
        clear = (expected - threshold).abs() > 1e-5
        assert torch.equal(ours[clear], (expected >= threshold)[clear])
        assert ours.any()


def test_a_full_mask_of_ones_is_its_box():
    found = Detections(torch.tensor([[4.0, 2, 9, 12]]), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 28, 28))
    expected = torch.zeros(20, 16, dtype=torch.bool)
    expected[2:12, 4:9] = True
    assert torch.equal(found.full_masks(20, 16)[0], expected)


def test_masks_pasted_together_equal_masks_pasted_one_by_one():
    found = some(9)
    alone = torch.cat([found.take(slice(i, i + 1)).full_masks(70, 80) for i in range(9)])
    assert torch.equal(found.full_masks(70, 80), alone)
    # Where it is not a CPU's turn, several are pasted at a time, over the region of all.
    from swinscale.heads import detections

    y, x = detections._centres(0, 70, found.boxes), detections._centres(0, 80, found.boxes)
    at_once = detections._sampled(found.masks, found.boxes, y.expand(9, -1), x.expand(9, -1)) >= 0.5
    assert torch.equal(at_once, alone)


def test_full_masks_of_nothing_and_of_boxes_without_area_or_outside():
    assert some(0).full_masks(10, 12).shape == (0, 10, 12)
    boxes = torch.tensor([[5.0, 5, 5, 9], [50, 50, 60, 60], [-9, -9, -2, -2], [math.nan] * 4])
    found = Detections(boxes, torch.ones(4), torch.zeros(4).long(), torch.ones(4, 28, 28))
    assert found.full_masks(20, 20).sum() == 0
    with pytest.raises(UsageError, match="no masks"):
        some(masks=False).full_masks(4, 4)


def test_clipping_cuts_boxes_and_keeps_masks_where_they_are():
    at = (torch.arange(28) + 0.5) / 28 - 0.5
    disc = (4 * (0.45 - (at[:, None] ** 2 + at**2).sqrt())).add(0.5).clamp(0, 1).expand(3, -1, -1)
    boxes = torch.tensor([[-10.0, 5, 30, 45], [20, 30, 80, 90], [10, 10, 20, 30]])
    found = Detections(boxes, torch.ones(3), torch.zeros(3).long(), disc)
    cut = found.clipped(60, 50)
    assert cut.boxes.tolist() == [[0, 5, 30, 45], [20, 30, 50, 60], [10, 10, 20, 30]]
    assert torch.equal(cut.masks[2], disc[2])
    assert torch.equal(found.masks, disc)  # the original stays
    before, after = found.full_masks(60, 50), cut.full_masks(60, 50)
    assert before[:2].flatten(1).sum(1).min() > 500
    assert (before != after).flatten(1).sum(1).max() <= 10
    assert some(masks=False).clipped(5, 5).boxes.max() <= 5


def test_merging_views_keeps_the_best_of_each_object_with_its_mask():
    first, second = some(30, seed=1), some(30, seed=2)
    merged = merge_views([first, second], iou=0.5, min_score=0.1, limit=25)
    boxes = torch.cat([first.boxes, second.boxes])
    scores, labels = torch.cat([first.scores, second.scores]), torch.cat([first.labels, second.labels])
    indices, values = suppress(boxes, scores, labels, iou=0.5, min_score=0.1, limit=25)
    assert torch.equal(merged.boxes, boxes[indices])
    assert torch.equal(merged.scores, values)
    assert torch.equal(merged.masks, torch.cat([first.masks, second.masks])[indices])
    twice = merge_views([first, first], iou=0.5)
    assert len(twice) == len(merge_views([first], iou=0.5))


def test_merging_views_takes_from_each_the_sizes_it_is_for():
    side = torch.tensor([10.0, 40.0, 100.0])
    corner = torch.tensor([0.0, 200.0, 400.0])
    boxes = torch.stack([corner, corner, corner + side, corner + side], 1)
    large, small = (
        Detections(boxes, torch.tensor(s), torch.zeros(3).long()) for s in ([0.9, 0.8, 0.7], [0.6, 0.5, 0.4])
    )
    merged = merge_views([large, small], ranges=[(30, math.inf), (0, 50)])
    assert merged.scores.tolist() == pytest.approx([0.8, 0.7, 0.6])
    assert merged.boxes[:, 0].tolist() == [200, 400, 0]
    assert merge_views([large, small], ranges=[None, (0, 1)]).scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    with pytest.raises(UsageError, match="2 views and 1 ranges"):
        merge_views([large, small], ranges=[None])
    with pytest.raises(UsageError, match="at least one view"):
        merge_views([])
    with pytest.raises(UsageError, match="masks of sizes"):
        merge_views([some(), some(masks=False)])
