"""Cascade Mask R-CNN and the hybrid task cascade: what one stage hands to the next, and the parts that Swin's HTC++ adds (R-DOWN-2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from random_models import randomise
from small_detectors import rectangle_targets, small_config
from swinscale.heads.cascade import CascadeHead, real
from swinscale.heads.htc import IGNORED, GlobalAttention, HTCHead, SemanticHead
from swinscale.heads.roi import POOLED, Sampled, final_boxes, pool

STRIDES = (4, 8, 16, 32, 64)
SIZES = [(64, 96), (50, 80)]
CLASSES = 3


def maps(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 16, -(-64 // s), -(-96 // s), generator=draw) for s in STRIDES]


def proposals(count: int = 20, seed: int = 0) -> list[Tensor]:
    draw, found = torch.Generator().manual_seed(seed), []
    for height, width in SIZES:
        corner = torch.rand(count, 2, generator=draw) * torch.tensor([width, height]) * 0.6
        found.append(torch.cat([corner, corner + 6 + 20 * torch.rand(count, 2, generator=draw)], 1))
    return found


def small(head: Any) -> Any:
    """Random values small enough that deltas stay moderate."""
    randomise(head)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
    return head


def cascade(**fields: Any) -> CascadeHead:
    return small(CascadeHead(small_config("cascade", **fields), CLASSES, STRIDES[:-1]))


def htc(**fields: Any) -> HTCHead:
    return small(HTCHead(small_config("htc", **fields), CLASSES, STRIDES))


def losses_of(head: CascadeHead, given: list[Tensor] | None = None, each: int = 2) -> dict[str, Tensor]:
    levels = maps() if isinstance(head, HTCHead) else maps()[:-1]
    return head(levels, given or proposals(), SIZES, rectangle_targets(SIZES, CLASSES, each))


class Watched:
    """Records what ``CascadeHead.sample`` was given and returned."""

    def __init__(self, head: CascadeHead, monkeypatch: pytest.MonkeyPatch):
        self.given: list[tuple[int, list[Tensor]]] = []
        self.made: list[Sampled] = []
        plain = head.sample

        def sample(stage: int, boxes: Any, targets: Any) -> Sampled:
            self.given.append((stage, list(boxes)))
            self.made.append(plain(stage, boxes, targets))
            return self.made[-1]

        monkeypatch.setattr(head, "sample", sample)


def moved_on(head: CascadeHead, stage: int, regions: Sampled, levels: list[Tensor]) -> list[Tensor]:
    """By the definition: each region of a stage, moved by the deltas of its class, without those that are objects' boxes."""
    box_head, start, found = head.box_head(stage), 0, []
    with torch.no_grad():
        logits, deltas = box_head(pool(levels, STRIDES[:-1], regions.boxes, POOLED))
        for boxes, (height, width) in zip(regions.boxes, SIZES, strict=True):
            kept = []
            for row in range(start, start + len(boxes)):
                label = int(regions.labels[row])
                label = int(logits[row, :-1].argmax()) if label == CLASSES else label
                label = 0 if head.config.class_agnostic else label
                box = box_head.decode(deltas[row : row + 1, label : label + 1], boxes[row - start : row - start + 1])[
                    0, 0
                ]
                box = torch.minimum(box.clamp(min=0), torch.tensor([width, height, width, height]))
                if not regions.given[row] and (box[2:] - box[:2]).min() > 1e-3:
                    kept.append(box)
            found.append(torch.stack(kept))
            start += len(boxes)
    return found


@pytest.mark.parametrize("agnostic", [False, True])
def test_a_stage_learns_from_the_boxes_that_the_one_before_has_moved(agnostic, monkeypatch):
    head = cascade(class_agnostic=agnostic, regions=512)
    watched = Watched(head, monkeypatch)
    losses = losses_of(head)
    assert [stage for stage, _ in watched.given] == [0, 1, 2]
    assert all(map(torch.equal, watched.given[0][1], proposals()))
    for stage in (0, 1):
        assert watched.made[stage].given.sum() == 4  # the objects' own boxes were candidates
        expected = moved_on(head, stage, watched.made[stage], maps()[:-1])
        for found, boxes in zip(watched.given[stage + 1][1], expected, strict=True):
            assert len(found) == 20 and torch.allclose(found, boxes, atol=1e-4)
    assert list(losses) == [f"{name}{stage}" for stage in range(3) for name in ("class", "box", "mask")]


def test_each_stage_asks_for_more_overlap_and_counts_less():
    head = cascade()
    boxes = torch.tensor([[10.0, 10, 40, 40]])
    target = [{"boxes": boxes, "labels": torch.tensor([1])}]
    for overlap, stages in ((0.45, []), (0.55, [0]), (0.65, [0, 1]), (0.75, [0, 1, 2])):
        share = torch.tensor([[10.0, 10, 10 + 30 * overlap, 40]])
        regions = [head.sample(stage, [share], target) for stage in range(3)]
        assert [stage for stage in range(3) if (regions[stage].positive & ~regions[stage].given).any()] == stages
    with torch.no_grad():  # all heads blind: the loss of a stage is its weight times the entropy of four classes
        for stage in range(3):
            head.box_head(stage).classify.weight.zero_()
            head.box_head(stage).classify.bias.zero_()
    losses = losses_of(head)
    entropy = math.log(4)
    assert [losses[f"class{stage}"].item() for stage in range(3)] == pytest.approx([entropy, entropy / 2, entropy / 4])


def test_scores_are_means_over_stages_and_boxes_those_of_the_last():
    head = cascade(score=0.01).eval()
    levels, boxes = maps()[:-1], proposals(6)
    scores, moved = [], boxes
    with torch.no_grad():
        for stage in range(3):
            logits, deltas = head.box_head(stage)(pool(levels, STRIDES[:-1], moved, POOLED))
            scores.append(logits.softmax(1))
            last, at = deltas, moved
            moved = head.box_head(stage).refine(logits, deltas, moved, SIZES)
        places = head.box_head(2).decode(last, torch.cat(at))
        expected = final_boxes(torch.stack(scores).mean(0), places, [6, 6], SIZES, head.config)
        found = head.detect(levels, boxes, SIZES)
    assert sum(map(len, found)) > 4
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.boxes, b.boxes, atol=1e-4) and torch.allclose(a.scores, b.scores, atol=1e-6)
        assert torch.equal(a.labels, b.labels)


def test_masks_are_means_over_stages():
    head = cascade(score=0.01).eval()
    levels = maps()[:-1]
    with torch.no_grad():
        found = head.detect(levels, proposals(6), SIZES)
        pooled = pool(levels, STRIDES[:-1], [f.boxes for f in found], 7)
        each = [head.mask_head(s)(head.mask_head(s).features(pooled)).sigmoid() for s in range(3)]
    labels = torch.cat([f.labels for f in found])
    expected = torch.stack(each).mean(0)[torch.arange(len(labels)), labels]
    assert torch.allclose(torch.cat([f.masks for f in found]), expected, atol=1e-6)
    assert found[0].masks.shape[1:] == (14, 14)


@pytest.mark.parametrize("build", [cascade, htc])
def test_images_without_objects_leave_no_parameter_without_a_gradient(build):
    """R-DOWN-1; the losses of boxes and masks are zero there."""
    head = build()
    losses = losses_of(head, each=0)
    assert all(loss == 0 for name, loss in losses.items() if name[:-1] in ("box", "mask"))
    assert all(losses[f"class{stage}"] > 0 for stage in range(3))
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("each", [2, 0])
@pytest.mark.parametrize("build", [cascade, htc])
def test_regions_that_have_all_been_pushed_out_of_the_image_are_no_error(build, each):
    """They have no area, and the next stage learns from the objects alone, or from nothing."""
    head = build()
    with torch.no_grad():
        head.box_head(0).regress.bias.view(-1, 4)[:, :2] = 1000.0
    losses = losses_of(head, each=each)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    found = head.eval().detect(maps() if build is htc else maps()[:-1], proposals(), SIZES)
    assert [len(f) for f in found] == [0, 0]


def test_boxes_without_area_are_no_regions():
    boxes = torch.tensor([[0.0, 0, 5, 5], [5, 0, 5, 5], [0, 0, 5, 0.0005], [float("nan")] * 4])
    assert real(boxes).tolist() == [[0, 0, 5, 5]]


def test_masks_of_a_hybrid_stage_are_learned_from_the_boxes_it_has_just_moved(monkeypatch):
    head = htc(regions=512)
    watched = Watched(head, monkeypatch)
    losses_of(head)
    assert [stage for stage, _ in watched.given] == [0, 0, 1, 1, 2, 2]
    semantic = head.semantic(maps())[1]
    for stage in range(3):
        regions = watched.made[2 * stage]
        with torch.no_grad():
            logits, deltas = head.box_head(stage)(head.pooled(maps(), semantic, regions.boxes, POOLED))
            moved = head.box_head(stage).refine(logits, deltas, regions.boxes, SIZES, regions.labels)
        given = regions.given.split([len(b) for b in regions.boxes])
        for found, boxes, own in zip(watched.given[2 * stage + 1][1], moved, given, strict=True):
            assert torch.allclose(found, real(boxes[~own]), atol=1e-4)
        if stage < 2:  # the next stage starts from the same
            assert all(map(torch.equal, watched.given[2 * stage + 1][1], watched.given[2 * stage + 2][1]))


def test_a_mask_head_takes_in_what_the_one_before_saw():
    head = htc().eval()
    assert [head.mask_head(stage).carry is not None for stage in range(3)] == [False, True, True]
    regions = torch.randn(3, 16, 7, 7)
    first = head.mask_head(0).features(regions)
    second = head.mask_head(1).features(regions, first)
    third = head.mask_head(2).features(regions, second)
    assert torch.equal(head.mask_logits(2, regions), head.mask_head(2)(third))
    assert not torch.allclose(head.mask_logits(2, regions), head.mask_head(2)(head.mask_head(2).features(regions)))
    with torch.no_grad():  # through its own 1×1 convolution, which a rectifier follows
        head.mask_head(1).carry[0].weight.zero_()
        head.mask_head(1).carry[0].bias.fill_(-1)
    assert torch.equal(head.mask_head(1).features(regions, first), head.mask_head(1).features(regions))


def test_masks_in_use_are_means_of_the_chain():
    head = htc(score=0.01).eval()
    with torch.no_grad():
        found = head.detect(maps(), proposals(6), SIZES)
        semantic = head.semantic(maps())[1]
        pooled = head.pooled(maps(), semantic, [f.boxes for f in found], 7)
        expected = torch.stack([head.mask_logits(stage, pooled).sigmoid() for stage in range(3)]).mean(0)
    labels = torch.cat([f.labels for f in found])
    assert len(labels) > 4
    assert torch.allclose(torch.cat([f.masks for f in found]), expected[torch.arange(len(labels)), labels], atol=1e-6)


@pytest.mark.parametrize("name", ["class0", "box1", "mask2"])
def test_the_semantic_features_reach_boxes_and_masks(name):
    head = htc()
    losses_of(head)[name].backward()
    assert head.semantic.embed[0].weight.grad.abs().sum() > 0
    assert head.semantic.predict.weight.grad is None  # the map itself has its own loss alone


def test_regions_are_the_sum_of_the_pyramid_and_the_semantic_features():
    head = htc()
    semantic = torch.randn(2, 16, 8, 12)
    boxes = [torch.tensor([[8.0, 8, 64, 56]]), torch.tensor([[0.0, 0, 20, 30]])]
    for side in (7, 14):
        more = pool([semantic], [8], boxes, 14)
        more = F.avg_pool2d(more, 2) if side == 7 else more
        assert torch.allclose(
            head.pooled(maps(), semantic, boxes, side), pool(maps()[:-1], STRIDES[:-1], boxes, side) + more
        )


def test_without_the_semantic_branch_there_is_no_semantic_loss():
    head = htc(semantic=False, masks=False)
    assert head.semantic is None and len(head.mask_heads) == 0
    assert list(losses_of(head)) == [f"{name}{stage}" for stage in range(3) for name in ("class", "box")]
    assert all(f.masks is None for f in head.eval().detect(maps(), proposals(), SIZES))


def test_the_semantic_head_adds_all_levels_at_the_second_ones_size():
    head = small(SemanticHead(small_config("htc"), 4, 5))
    logits, features = head(maps())
    assert logits.shape == (2, 4, 8, 12) and features.shape == (2, 16, 8, 12)
    for level in range(5):
        changed = maps()
        changed[level] = changed[level] + 1
        assert not torch.allclose(head(changed)[0], logits), level


def test_the_semantic_loss_ignores_padding_and_what_is_marked():
    head = SemanticHead(small_config("htc"), 4, 5)
    logits = torch.randn(2, 4, 8, 12)
    targets = rectangle_targets(SIZES, CLASSES)
    loss = head.loss(logits, targets, 8)
    padded = logits.clone()
    padded[1, :, 6:] = 1e4  # the second image is 50×80: 6 rows of cells have their centre inside, and 10 columns
    padded[1, :, :, 10:] = -1e4
    assert head.loss(padded, targets, 8) == loss
    inside = logits.clone()
    inside[1, :, 5, 9] += torch.tensor([5.0, 0, 0, 0])
    assert head.loss(inside, targets, 8) != loss
    total = 0.0
    for one, target in zip(logits, targets, strict=True):  # by hand
        wanted = target["semantic"][4::8, 4::8]
        total += F.cross_entropy(
            one[None, :, : wanted.shape[0], : wanted.shape[1]], wanted[None], reduction="sum"
        ).item()
    assert loss.item() == pytest.approx(total / (8 * 12 + 6 * 10), rel=1e-5)
    targets[0]["semantic"][:] = IGNORED
    assert head.loss(logits, targets, 8).item() == pytest.approx(head.loss(logits[1:], targets[1:], 8).item(), rel=1e-5)
    targets[1]["semantic"][:] = IGNORED
    assert head.loss(logits, targets, 8) == 0


def test_the_semantic_loss_of_images_smaller_than_a_cell():
    head = SemanticHead(small_config("htc"), 4, 5)
    logits = torch.randn(1, 4, 4, 4, requires_grad=True)
    for size in ((1, 1), (1, 32), (4, 4)):
        loss = head.loss(logits, rectangle_targets([size], CLASSES, each=0), 8)
        assert loss == 0 and torch.autograd.grad(loss, logits)[0].isfinite().all()


def attention(rate: float = 0.0) -> GlobalAttention:
    return small(GlobalAttention(16, 4, rate))


def test_the_global_attention_never_sees_padding():
    layer = attention()
    x = torch.randn(2, 16, 3, 4)
    sizes = [(96, 128), (50, 65)]  # the second image: 2 rows and 3 columns of 32 pixels
    before = layer(x, sizes, 32)
    changed = x.clone()
    changed[1, :, 2:] = 100.0
    changed[1, :, :, 3:] = -50.0
    after = layer(changed, sizes, 32)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1, :, :2, :3], before[1, :, :2, :3])
    alone = layer(x[1:, :, :2, :3], sizes[1:], 32)
    assert torch.allclose(alone[0], before[1, :, :2, :3], atol=1e-5)
    moved = x.clone()
    moved[1, :, 1, 2] = torch.randn(16)  # a cell inside is seen by all others
    assert (layer(moved, sizes, 32)[1, :, :2, :3] != before[1, :, :2, :3]).any(0).all()


def test_the_global_attention_knows_no_positions():
    layer = attention()
    x = torch.randn(1, 16, 3, 4)
    turned = layer(x.flip(2, 3), [(96, 128)], 32).flip(2, 3)
    assert torch.allclose(turned, layer(x, [(96, 128)], 32), atol=1e-5)


def test_the_global_attention_drops_branches_of_whole_samples():
    layer = attention(0.5)
    x, sizes = torch.randn(64, 16, 1, 1), [(32, 32)] * 64
    assert torch.equal(layer(x, sizes, 32), layer(x, sizes, 32))  # in use nothing is dropped
    layer.train()
    torch.manual_seed(0)
    plain = layer.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (1, 1))
    untouched = (layer(x, sizes, 32) == plain).flatten(1).all(1).float().mean()
    assert 0.1 < untouched < 0.45  # a quarter loses both branches
    branch = torch.ones(1000, 3, 2)
    dropped = layer.drop_path(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.15)
