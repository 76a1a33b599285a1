"""What heads over regions share: pooling from the right level, sampling, box and mask networks, their targets and losses (R-DOWN-2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from random_models import randomise
from small_detectors import rectangle_targets, small_config
from swinscale.heads.detections import Detections
from swinscale.heads.roi import (
    POOLED,
    BoxHead,
    MaskHead,
    Sampled,
    final_boxes,
    mask_loss,
    mask_regions,
    mask_targets,
    pool,
    sample,
    with_masks,
)

STRIDES = (4, 8, 16, 32)


def levels(height: int = 256, width: int = 320, images: int = 2) -> list[Tensor]:
    """Maps of which each knows its level: all values of level i lie between 10·i and 10·i + 1."""
    draw = torch.Generator().manual_seed(3)
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    return [10 * i + torch.rand(images, 3, h, w, generator=draw) for i, (h, w) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("side", "level"), [(1, 0), (55, 0), (56, 0), (111, 0), (112, 1), (113, 1), (223, 1), (224, 2), (447, 2), (448, 3), (2000, 3)]
)  # fmt: skip
def test_regions_come_from_the_level_of_their_size(side, level):
    """Up to 2 · 56 pixels from the finest, one level further at every doubling (Lin et al., arXiv 1612.03144)."""
    maps = [torch.full((1, 1, 8, 8), float(i)) for i in range(4)]
    maps[level] = torch.full((1, 1, 200, 200), float(level))
    for width, height in ((side, side), (2 * side, side / 2), (side / 2, 2 * side)):  # of the same area
        found = pool(maps, STRIDES, [torch.tensor([[0.0, 0, width, height]])], POOLED)
        assert torch.allclose(found, torch.tensor(float(level)))


def test_pooled_regions_are_those_of_torchvision():
    maps = levels()
    boxes = [torch.tensor([[3.3, 5, 70, 60.5], [0, 0, 320, 256.0]]), torch.tensor([[100, 20, 260, 200.0]])]
    found = pool(maps, STRIDES, boxes, POOLED)
    numbered = torch.tensor([[0, 3.3, 5, 70, 60.5], [0, 0, 0, 320, 256.0], [1, 100, 20, 260, 200.0]])
    for row, level in ((0, 0), (1, 2), (2, 1)):
        one = roi_align(maps[level], numbered[row : row + 1], (7, 7), 1 / STRIDES[level], 0, aligned=True)
        assert torch.equal(found[row], one[0])


def test_pooling_differs_from_torchvisions_pooler_by_half_a_cell():
    """That one samples half a cell beside; published Swin detectors, and ours, do not."""
    ramp = torch.arange(80.0).expand(1, 1, 64, 80)
    box = torch.tensor([[40.0, 40, 96, 96]])
    theirs = MultiScaleRoIAlign(["0"], 7, 0)({"0": ramp}, [box], [(256, 320)])
    ours = pool([ramp], [4], [box], 7)
    assert torch.allclose(theirs - ours, torch.tensor(0.5))
    assert (
        ours[0, 0, 0, 3] == 68 / 4 - 0.5
    )  # the value at pixel 68, the middle of the box; cell i has its centre at 4·i + 2


def test_pooling_no_regions():
    maps = levels()
    assert pool(maps, STRIDES, [torch.zeros(0, 4)] * 2, POOLED).shape == (0, 3, 7, 7)
    assert pool(maps[:1], STRIDES[:1], [torch.zeros(0, 4)] * 2, 14).shape == (0, 3, 14, 14)
    one = pool(maps, STRIDES, [torch.zeros(0, 4), torch.tensor([[0, 0, 20, 20.0]])], POOLED)
    assert torch.equal(one[0], roi_align(maps[0][1:], torch.tensor([[0, 0, 0, 20, 20.0]]), 7, 0.25, 0, True)[0])


def test_pooling_passes_gradients_to_the_levels_it_used():
    maps = [m.requires_grad_() for m in levels()]
    boxes = [torch.tensor([[3.0, 5, 70, 60]]), torch.tensor([[100, 20, 260, 200.0]])]
    pool(maps, STRIDES, boxes, POOLED).sum().backward()
    assert [m.grad is not None and m.grad.abs().sum() > 0 for m in maps] == [True, True, False, False]


def test_pooling_is_in_single_precision_whatever_the_maps_are():
    maps = [m.bfloat16() for m in levels()]
    boxes = [torch.tensor([[3.3, 5, 700, 60.5]]), torch.zeros(0, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(maps, STRIDES, boxes, POOLED)
    assert torch.equal(found, pool([m.float() for m in maps], STRIDES, boxes, POOLED))


def around(boxes: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` proposals beside each box, of which most overlap it."""
    draw = torch.Generator().manual_seed(seed)
    moved = boxes[:, None] + 6 * torch.randn(len(boxes), count, 4, generator=draw)
    return torch.cat([moved[..., :2], torch.maximum(moved[..., 2:], moved[..., :2] + 1)], -1).flatten(0, 1)


def test_a_quarter_of_the_sample_is_on_objects():
    sizes = [(200, 200), (200, 200)]
    targets = rectangle_targets(sizes)
    proposals = [
        torch.cat([around(t["boxes"], 60), 100 + 100 * torch.rand(60, 2).sort(1)[0].repeat(1, 2)]) for t in targets
    ]
    proposals = [torch.cat([p, torch.tensor([[150.0, 0, 152, 2]]).repeat(80, 1)]) for p in proposals]
    regions = sample(proposals, targets, 0.5, 64, 3)
    assert [len(b) for b in regions.boxes] == [64, 64]
    assert [int((o >= 0).sum()) for o in regions.objects] == [16, 16]
    assert torch.equal(regions.positive, regions.labels < 3)


@pytest.mark.parametrize("iou", [0.5, 0.7])
def test_each_region_knows_its_object(iou):
    sizes = [(90, 120), (100, 80)]
    targets = rectangle_targets(sizes)
    proposals = [around(t["boxes"], 40) for t in targets]
    regions = sample(proposals, targets, iou, 512, 3)
    starts = torch.tensor([len(b) for b in regions.boxes]).cumsum(0).tolist()
    pieces = zip(
        regions.boxes, regions.objects, regions.labels.split([len(b) for b in regions.boxes]), targets, strict=True
    )
    for boxes, objects, labels, target in pieces:
        overlap, best = box_iou(boxes, target["boxes"]).max(1)
        assert torch.equal(objects >= 0, overlap >= iou)
        assert torch.equal(objects[objects >= 0], best[objects >= 0])
        assert torch.equal(labels, torch.where(overlap >= iou, target["labels"][best], 3))
    first = slice(0, starts[0])
    on = regions.objects[0] >= 0
    assert torch.equal(regions.wanted[first][on], targets[0]["boxes"][regions.objects[0][on]])
    assert torch.equal(regions.wanted[first][~on], regions.boxes[0][~on])
    assert [len(b) for b in regions.on_objects()] == [int((o >= 0).sum()) for o in regions.objects]


def test_the_objects_own_boxes_are_candidates():
    targets = rectangle_targets([(90, 120)])
    regions = sample([torch.tensor([[0.0, 0, 1, 1]])], targets, 0.5, 512, 3)
    assert torch.equal(regions.boxes[0][regions.given], targets[0]["boxes"])
    assert regions.objects[0].tolist() == [0, 1, -1] and regions.given.tolist() == [True, True, False]
    assert regions.labels.tolist() == [*targets[0]["labels"].tolist(), 3]


def test_an_image_without_objects_gives_background_beside_one_with_objects():
    targets = rectangle_targets([(90, 120)]) + rectangle_targets([(90, 120)], each=0)
    proposals = [around(targets[0]["boxes"], 20), torch.tensor([[0.0, 0, 10, 10], [5, 5, 50, 60]])]
    regions = sample(proposals, targets, 0.5, 512, 3)
    assert regions.objects[1].tolist() == [-1, -1]
    assert regions.labels[-2:].tolist() == [3, 3] and not regions.given[-2:].any()
    assert regions.positive.any() and regions.wanted.shape == (len(regions.labels), 4)


def regions_on(boxes: Tensor, wanted: Tensor, labels: Tensor) -> Sampled:
    """All of them on objects, in one image."""
    count = torch.arange(len(boxes))
    return Sampled([boxes], labels, [count], wanted, torch.zeros(len(boxes), dtype=torch.bool))


def box_head(**fields: Any) -> BoxHead:
    head: BoxHead = randomise(BoxHead(small_config(**fields), 3, convs=0, fcs=1))
    return head


def test_moved_boxes_are_found_again():
    """Encoding and decoding are inverse, also with the deviations of a cascade's later stages."""
    boxes = torch.tensor([[10.0, 20, 50, 90], [0, 0, 8, 8]])
    wanted = torch.tensor([[12.0, 15, 60, 80], [1, 1, 11, 7]])
    for deviations in ((0.1, 0.1, 0.2, 0.2), (0.033, 0.033, 0.067, 0.067)):
        head = BoxHead(small_config(), 3, 0, 1, deviations)
        deltas = head.coder.encode_single(wanted, boxes)
        assert torch.allclose(head.decode(deltas[:, None], boxes)[:, 0], wanted, atol=1e-4)
        x_shift = (wanted[:, 0] + wanted[:, 2] - boxes[:, 0] - boxes[:, 2]) / 2 / (boxes[:, 2] - boxes[:, 0])
        assert torch.allclose(deltas[:, 0], x_shift / deviations[0], atol=1e-5)
        widths = (wanted[:, 2] - wanted[:, 0]) / (boxes[:, 2] - boxes[:, 0])
        assert torch.allclose(deltas[:, 2], widths.log() / deviations[2], atol=1e-5)


@pytest.mark.parametrize("agnostic", [False, True])
def test_a_region_is_moved_by_the_deltas_of_its_class(agnostic):
    head = box_head(class_agnostic=agnostic)
    logits, deltas = head(torch.randn(4, 16, 7, 7))
    assert logits.shape == (4, 4) and deltas.shape == (4, 1 if agnostic else 3, 4)
    labels = torch.tensor([2, 0, 1, 2])
    chosen = head.of_class(deltas, labels)
    for row, label in enumerate(labels.tolist()):
        assert torch.equal(chosen[row, 0], deltas[row, 0 if agnostic else label])


@pytest.mark.parametrize("loss", ["l1", "smooth_l1", "giou"])
def test_the_box_loss_is_a_distance_to_the_object_alone(loss):
    head = box_head(box_loss=loss)
    boxes = torch.tensor([[10.0, 20, 50, 90], [0, 0, 8, 8], [30, 30, 60, 50]])
    wanted = torch.tensor([[12.0, 15, 60, 80], [1, 1, 11, 7], [30, 30, 60, 50]])
    labels = torch.tensor([2, 0, 3])
    regions = Sampled([boxes], labels, [torch.tensor([0, 1, -1])], wanted, torch.zeros(3, dtype=torch.bool))
    perfect = head.coder.encode_single(wanted, boxes)
    deltas = torch.full((3, 3, 4), 50.0)  # other classes and background take no part
    deltas[0, 2], deltas[1, 0] = perfect[0], perfect[1]
    logits = torch.zeros(3, 4)
    losses = head.losses(logits, deltas, regions)
    assert losses["box"].item() == pytest.approx(0, abs=1e-5)
    assert losses["class"].item() == pytest.approx(torch.tensor(4.0).log().item())
    deltas[0, 2, 0] += 0.25  # a quarter of a deviation of 0.1: 1 pixel
    moved = head.losses(logits, deltas, regions)["box"].item()
    overlap = (47 * 65) / (49 * 65)  # of boxes of 48×65, one pixel apart, in a hull of 49×65
    expected = {"l1": 0.25, "smooth_l1": 0.25**2 / 2, "giou": 10 * (1 - overlap)}[loss]
    assert moved == pytest.approx(expected / 3, rel=1e-3)


def test_the_box_loss_without_objects_is_zero_and_has_gradients():
    for loss in ("l1", "smooth_l1", "giou"):
        head = box_head(box_loss=loss)
        [regions] = [sample([torch.tensor([[0.0, 0, 9, 9]])], rectangle_targets([(30, 30)], each=0), 0.5, 8, 3)]
        losses = head.losses(*head(torch.randn(1, 16, 7, 7)), regions)
        assert losses["box"] == 0 and losses["class"] > 0
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_refined_regions_are_those_of_the_most_probable_class_inside_the_image():
    head = box_head()
    boxes = [torch.tensor([[10.0, 20, 50, 90]]), torch.tensor([[0.0, 0, 8, 8], [30, 30, 60, 50]])]
    logits = torch.tensor([[0.0, 2, 1, 9], [5, 0, 1, 0], [0, 1, 5, 0]])  # background, most probable, does not count
    _, deltas = head(torch.randn(3, 16, 7, 7))
    deltas[0, 1, 2] = 30  # very wide
    sizes = [(64, 64), (40, 50)]
    moved = head.refine(logits, deltas, boxes, sizes)
    everything = head.decode(deltas, torch.cat(boxes))
    expected = everything[torch.arange(3), torch.tensor([1, 0, 2])]
    assert moved[0][0, 2] == 64
    assert torch.equal(moved[0], expected[:1].clamp(min=0, max=64))
    assert torch.equal(moved[1], torch.minimum(expected[1:].clamp(min=0), torch.tensor([50.0, 40, 50, 40])))
    known = head.refine(logits, deltas, boxes, sizes, torch.tensor([3, 2, 2]))  # of a region on an object: its class
    assert torch.equal(known[0], moved[0]) and torch.equal(known[1][1], moved[1][1])
    assert torch.equal(known[1][0], torch.minimum(everything[1, 2].clamp(min=0), torch.tensor([50.0, 40, 50, 40])))
    assert not moved[0].requires_grad


def cropped(mask: Tensor, box: list[int], side: int) -> Tensor:
    x1, y1, x2, y2 = box
    part = mask[y1:y2, x1:x2].float()[None, None]
    return torch.nn.functional.interpolate(part, (side, side), mode="nearest")[0, 0] > 0.5


def test_mask_targets_are_crops_of_the_objects_masks():
    targets = rectangle_targets([(60, 80), (48, 64)])
    for target in targets:  # a corner is missing, so that position and orientation show
        for mask, (x1, y1, x2, _) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            mask[y1 : y1 + 4, x1 : (x1 + x2) // 2] = False
    boxes = [torch.tensor([[0.0, 0, 56, 56], [20, 10, 48, 38], [70, 50, 78, 58]]), torch.tensor([[4.0, 4, 32, 32]])]
    objects = [torch.tensor([1, 0, -1]), torch.tensor([1])]
    labels = torch.zeros(4, dtype=torch.int64)
    regions = Sampled(boxes, labels, objects, torch.cat(boxes), torch.zeros(4, dtype=torch.bool))
    found = mask_targets(regions, targets, 28)
    expected = [
        cropped(targets[0]["masks"][1], [0, 0, 56, 56], 28),
        cropped(targets[0]["masks"][0], [20, 10, 48, 38], 28),
        cropped(targets[1]["masks"][1], [4, 4, 32, 32], 28),
    ]
    assert found.shape == (3, 28, 28) and set(found.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(found[1].bool(), expected[1]) and torch.equal(found[2].bool(), expected[2])
    even = targets[0]["masks"][1][0:56, 0:56].float().unflatten(0, (28, 2)).unflatten(2, (28, 2)).mean((1, 3))
    assert torch.equal(found[0].bool(), even >= 0.5)  # two by two pixels: a tie is part of the object


def test_a_mask_over_exactly_its_box_is_full():
    targets = rectangle_targets([(60, 80)], each=3)
    boxes = targets[0]["boxes"]
    found = mask_targets(regions_on(boxes, boxes, targets[0]["labels"]), targets, 14)
    assert found.all()


def test_the_mask_loss_looks_at_the_class_of_each_region():
    targets = rectangle_targets([(60, 80)])
    boxes = torch.cat([targets[0]["boxes"], torch.tensor([[0.0, 0, 5, 5]])])
    labels = torch.cat([targets[0]["labels"], torch.tensor([3])])
    objects = [torch.tensor([0, 1, -1])]
    regions = Sampled([boxes], labels, objects, boxes, torch.zeros(3, dtype=torch.bool))
    logits = torch.full((2, 3, 14, 14), -50.0)
    logits[torch.arange(2), targets[0]["labels"]] = 50.0
    assert mask_loss(logits, regions, targets) < 1e-6
    logits[0, targets[0]["labels"][0]] = 0.0
    assert mask_loss(logits, regions, targets).item() == pytest.approx(torch.tensor(2.0).log().item() / 2)


def test_without_any_object_every_parameter_of_the_mask_head_has_a_gradient():
    """R-DOWN-1: DistributedDataParallel needs no ``find_unused_parameters``."""
    targets = rectangle_targets([(60, 80), (50, 50)], each=0)
    regions = sample([torch.tensor([[0.0, 0, 9, 9], [1, 1, 5, 5]]), torch.tensor([[2.0, 2, 9, 9]])], targets, 0.5, 8, 3)
    boxes = mask_regions(regions)
    assert [len(b) for b in boxes] == [1, 0]
    head = randomise(MaskHead(small_config(), 3))
    loss = mask_loss(head(head.features(torch.randn(1, 16, 7, 7))), regions, targets)
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in head.parameters())


def test_masks_are_twice_as_fine_as_their_regions():
    head = randomise(MaskHead(small_config(), 3))
    assert head(head.features(torch.randn(2, 16, 14, 14))).shape == (2, 3, 28, 28)
    assert head(head.features(torch.randn(0, 16, 14, 14))).shape == (0, 3, 28, 28)


def test_final_boxes_are_kept_by_score_and_class():
    probabilities = torch.tensor([[0.7, 0.2, 0.0, 0.1], [0.04, 0.6, 0.3, 0.06], [0.1, 0.1, 0.1, 0.7]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 11, 10], [50, 50, 70, 60]])[:, None]
    config = small_config(score=0.15)
    [first, second] = final_boxes(probabilities, boxes, [2, 1], [(30, 30), (30, 30)], config)
    # The second box holds class 1 better than the first, which overlaps it.
    assert first.scores.tolist() == pytest.approx([0.7, 0.6, 0.3]) and first.labels.tolist() == [0, 1, 2]
    assert first.boxes.tolist() == [[0, 0, 10, 10], [0, 0, 11, 10], [0, 0, 11, 10]] and first.masks is None
    assert len(second) == 0
    [all_of_them] = final_boxes(probabilities, boxes, [3], [(30, 30)], small_config(score=0.05))
    assert (all_of_them.boxes[:, 2:] > all_of_them.boxes[:, :2]).all()  # the third lies outside the image
    assert len(final_boxes(probabilities, boxes, [3], [(30, 30)], small_config(score=0.05, limit=2))[0]) == 2
    [soft] = final_boxes(probabilities, boxes, [3], [(30, 30)], small_config(score=0.01, soft_nms="linear"))
    assert len(soft) > len(all_of_them)


def test_boxes_of_each_class_are_those_of_that_class():
    probabilities = torch.tensor([[0.5, 0.4, 0.0, 0.1]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [5, 5, 20, 20], [0, 0, 1, 1]]])
    [found] = final_boxes(probabilities, boxes, [1], [(30, 30)], small_config())
    assert found.boxes.tolist() == boxes[0, :2].tolist()


def test_numbers_that_are_none_give_no_detection():
    boxes = torch.tensor([[[float("nan")] * 4], [[0.0, 0, 10, 10]]])
    [found] = final_boxes(torch.tensor([[0.9, 0.1], [float("nan"), 0.5]]), boxes, [2], [(30, 30)], small_config())
    assert len(found) == 0


def test_each_detection_gets_the_mask_of_its_class():
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    two = Detections(torch.zeros(2, 4), torch.ones(2), torch.tensor([2, 0]))
    one = Detections(torch.zeros(1, 4), torch.ones(1), torch.tensor([1]))
    masks = torch.arange(9.0).view(3, 3, 1, 1).expand(3, 3, 14, 14)
    found = with_masks([two, empty, one], masks)
    assert [f.masks.amax((1, 2)).tolist() for f in found] == [[2.0, 3.0], [], [7.0]]
