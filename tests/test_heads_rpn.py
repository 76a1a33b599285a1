"""Region proposals: anchors at every size, and torchvision's losses and proposals where its anchors are right (R-DOWN-2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from random_models import randomise
from small_detectors import rectangle_targets
from swinscale.heads.config import DetectConfig
from swinscale.heads.rpn import RPN, anchors_of_level

STRIDES = (4, 8, 16, 32, 64)


def maps_of(height: int, width: int, images: int = 2, channels: int = 8) -> list[Tensor]:
    """Maps as a pyramid makes them of images of this size: rounded up at every level."""
    return [torch.randn(images, channels, -(-height // stride), -(-width // stride)) for stride in STRIDES]


def network(**fields: Any) -> RPN:
    rpn: RPN = randomise(RPN(DetectConfig(channels=8, **fields), STRIDES)).train()
    return rpn


def theirs(sizes: tuple[tuple[int, ...], ...], ratios: tuple[float, ...], proposals: int = 50) -> RegionProposalNetwork:
    generator = AnchorGenerator(sizes, (ratios,) * len(sizes))
    few = {"training": proposals, "testing": proposals}
    return RegionProposalNetwork(generator, RPNHead(8, len(ratios)), 0.7, 0.3, 256, 0.5, few, few, 0.7).train()


def images_of(height: int, width: int, count: int = 2) -> ImageList:
    return ImageList(torch.zeros(count, 3, height, width), [(height, width)] * count)


def test_anchors_are_torchvisions_up_to_its_rounding():
    ratios = (0.5, 1.0, 2.0)
    generator = AnchorGenerator(tuple((8 * stride,) for stride in STRIDES), (ratios,) * 5)
    maps = maps_of(128, 192, images=1)
    [expected] = generator(images_of(128, 192, 1), maps)
    found = torch.cat(network().anchors(maps))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 0.5
    square = torch.arange(len(found)) % 3 == 1
    assert torch.equal(found[square], expected[square])  # sides of 32 … 512, which need no rounding
    assert not torch.equal(found[~square], expected[~square])


def test_anchors_have_the_area_and_the_ratio_that_is_asked_for():
    anchors = anchors_of_level(2, 3, 16, 4.0, (0.5, 2.0)).view(6, 2, 4)
    width, height = (anchors[..., 2:] - anchors[..., :2]).unbind(-1)
    assert torch.allclose(width * height, torch.tensor(64.0**2))
    assert torch.allclose(height / width, torch.tensor([0.5, 2.0]).expand(6, 2))
    centres = (anchors[..., 2:] + anchors[..., :2]) / 2
    expected = torch.tensor([[0.0, 0], [16, 0], [32, 0], [0, 16], [16, 16], [32, 16]])
    assert torch.allclose(centres, expected[:, None].expand(6, 2, 2), atol=1e-5)


def test_anchors_lie_on_their_cells_at_odd_sizes():
    """R-DOWN-1: levels are rounded up, so the quotient of the sizes, which torchvision takes, is not the stride."""
    height, width = 100, 76
    maps = maps_of(height, width, images=1)
    wrong = AnchorGenerator(tuple((8 * stride,) for stride in STRIDES), ((1.0,),) * 5)
    [theirs_all] = wrong(images_of(height, width, 1), maps)
    ours = network(anchor_ratios=(1.0,)).anchors(maps)
    counts = [len(level) for level in ours]
    strides_of_theirs = []
    for stride, level, other, features in zip(STRIDES, ours, theirs_all.split(counts), maps, strict=True):
        grid = (level[:, :2] + level[:, 2:]).view(*features.shape[-2:], 2) / 2
        assert (grid[0, 0] == 0).all()
        assert (grid[1:, :, 1] - grid[:-1, :, 1] == stride).all() and (grid[:, 1:, 0] - grid[:, :-1, 0] == stride).all()
        grid = (other[:, :2] + other[:, 2:]).view(*features.shape[-2:], 2) / 2
        strides_of_theirs.append(int(grid[1, 0, 1]))
    assert strides_of_theirs == [4, 7, 14, 25, 50]


def test_anchors_follow_the_size_of_each_call():
    rpn = network()
    first = rpn.anchors(maps_of(64, 96))
    assert rpn.anchors(maps_of(64, 96)) is first
    assert len(rpn.anchors(maps_of(33, 20))[0]) == 9 * 5 * 3
    assert len(rpn.anchors(maps_of(64, 96))[0]) == 16 * 24 * 3


def with_torchvision(**fields: Any) -> tuple[RPN, RegionProposalNetwork]:
    """Both networks with the same weights, and anchors of whole pixels: ratio 1 and even sides."""
    settings = {"anchor_ratios": (1.0,), "rpn_box_loss": "smooth_l1"}
    ours = network(**{**settings, "proposals": (50, 50), "proposals_per_level": (50, 50), **fields})
    other = theirs(tuple((8 * stride,) for stride in STRIDES), (1.0,))
    other.head.load_state_dict(ours.head.state_dict())
    return ours, other


def test_losses_and_proposals_are_torchvisions():
    """R-DOWN-2. The same sample of anchors is drawn, because both draw alike from one seed."""
    ours, other = with_torchvision()
    maps, sizes = maps_of(128, 192), [(128, 192), (128, 192)]
    targets = rectangle_targets(sizes)
    torch.manual_seed(5)
    proposals, losses = ours(maps, sizes, targets)
    torch.manual_seed(5)
    expected, theirs_losses = other(images_of(128, 192), dict(enumerate(maps)), targets)
    assert [len(p) for p in proposals] == [len(p) for p in expected] and len(proposals[0]) > 20
    for mine, yours in zip(proposals, expected, strict=True):
        assert torch.allclose(mine, yours, atol=1e-4)
    assert losses["rpn_objectness"].item() == pytest.approx(theirs_losses["loss_objectness"].item(), rel=1e-5)
    assert losses["rpn_box"].item() == pytest.approx(theirs_losses["loss_rpn_box_reg"].item(), rel=1e-5)
    assert losses["rpn_box"] > 0


def test_gradients_are_torchvisions():
    ours, other = with_torchvision()
    maps, sizes = maps_of(64, 64), [(64, 64), (64, 64)]
    targets = rectangle_targets(sizes)
    for module, call in ((ours, (maps, sizes, targets)), (other, (images_of(64, 64), dict(enumerate(maps)), targets))):
        torch.manual_seed(5)
        sum(module(*call)[1].values()).backward()
    for (name, mine), yours in zip(ours.head.named_parameters(), other.head.parameters(), strict=True):
        assert torch.allclose(mine.grad, yours.grad, atol=1e-5), name


def test_proposals_stay_inside_each_image():
    ours = network()
    sizes = [(128, 100), (50, 192)]
    proposals, losses = ours(maps_of(128, 192), sizes)
    assert losses == {}
    for boxes, (height, width) in zip(proposals, sizes, strict=True):
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 1e-3).all()


def test_fewer_proposals_in_use_than_in_training_are_the_best_of_them():
    rpn = network(proposals=(30, 7), proposals_per_level=(40, 40))
    maps, sizes = maps_of(128, 192), [(128, 192)] * 2
    many, few = rpn(maps, sizes)[0], rpn.eval()(maps, sizes)[0]
    assert [len(p) for p in many] == [30, 30] and [len(p) for p in few] == [7, 7]
    assert all(torch.equal(a[:7], b) for a, b in zip(many, few, strict=True))
    rpn = network(proposals=(500, 500), proposals_per_level=(6, 3))
    assert [len(rpn.train(mode)(maps, sizes)[0][0]) <= 5 * each for mode, each in ((True, 6), (False, 3))] == [True] * 2


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5, 3)], ids=str)
def test_the_smallest_image_has_a_proposal(size):
    """R-DOWN-1: whatever the network says: boxes that it moves out of the image leave the whole image."""
    rpn = network()
    with torch.no_grad():
        rpn.head.bbox_pred.bias.view(-1, 4)[:, :2] = 1000.0  # far to the right and below
        rpn.head.bbox_pred.weight.zero_()
    height, width = (-(-side // 32) * 32 for side in size)
    proposals, _ = rpn(maps_of(height, width, images=1), [size])
    assert proposals[0].tolist() == [[0, 0, size[1], size[0]]]


@pytest.mark.parametrize("inside", [False, True])
def test_images_without_objects_teach_background_alone(inside):
    rpn = network(anchors_inside=inside)
    sizes = [(64, 64), (60, 40)]
    nothing = rectangle_targets(sizes, each=0)
    torch.manual_seed(1)
    _, losses = rpn(maps_of(64, 64), sizes, nothing)
    assert losses["rpn_box"] == 0 and losses["rpn_objectness"] > 0
    sum(losses.values()).backward()
    assert rpn.head.bbox_pred.weight.grad.abs().sum() == 0  # not None: it takes part
    assert rpn.head.cls_logits.weight.grad.abs().sum() > 0
    with torch.no_grad():  # a network that sees background everywhere is right
        rpn.head.cls_logits.weight.zero_()
        rpn.head.cls_logits.bias.fill_(-20)
    assert rpn(maps_of(64, 64), sizes, nothing)[1]["rpn_objectness"] < 1e-6


def sampled_anchors(rpn: RPN, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]]) -> Tensor:
    """(B, A) which anchors have an influence on the objectness loss."""
    maps = maps_of(max(h for h, _ in sizes), max(w for _, w in sizes), images=len(sizes))
    anchors = torch.cat(rpn.anchors(maps))
    logits = torch.zeros(len(sizes), len(anchors), requires_grad=True)
    moves = torch.zeros(len(sizes), len(anchors), 4)
    rpn.losses(anchors, logits, moves, sizes, targets)["rpn_objectness"].backward()
    assert logits.grad is not None
    return logits.grad != 0


def test_anchors_across_the_border_can_be_left_out():
    """As in the published Cascade R-CNN; the border is that of the image, not of the padding."""
    sizes = [(160, 160), (96, 160)]
    targets = rectangle_targets(sizes)
    anchors = torch.cat(network(anchor_scale=4.0).anchors(maps_of(160, 160)))
    across = torch.stack([(anchors[:, :2] < 0).any(1) | (anchors[:, 2] > w) | (anchors[:, 3] > h) for h, w in sizes])
    for inside in (False, True):
        chosen = sampled_anchors(network(anchors_inside=inside, anchor_scale=4.0), sizes, targets)
        assert (chosen & across).any().item() == (not inside)
        assert chosen.sum(1).tolist() == [256, 256]


def test_an_image_too_small_for_any_anchor_uses_all_of_them():
    sizes = [(20, 20), (160, 160)]
    chosen = sampled_anchors(network(anchors_inside=True), sizes, rectangle_targets(sizes))
    assert chosen.any(1).all()


def test_half_of_the_sample_is_on_objects_where_there_are_enough():
    sizes = [(128, 128)]
    targets = rectangle_targets(sizes, each=1)
    rpn = network(anchor_scale=1.0, anchor_ratios=(1.0,))
    maps = maps_of(128, 128, images=1)
    anchors = torch.cat(rpn.anchors(maps))
    targets[0]["boxes"] = anchors[(anchors[:, 0] >= 0) & (anchors[:, 2] < 100)][:200]  # each of them hits exactly
    labels, _ = rpn.assign_targets_to_anchors([anchors], targets)
    assert (labels[0] == 1).sum() >= 200
    chosen = sampled_anchors(rpn, sizes, targets)[0]
    assert chosen.sum() == 256 and (labels[0][chosen] == 1).sum() == 128


def test_the_best_anchor_of_an_object_counts_however_little_they_overlap():
    rpn = network()
    anchors = torch.cat(rpn.anchors(maps_of(64, 64)))
    tiny = {"boxes": torch.tensor([[10.0, 10, 12, 12]]), "labels": torch.tensor([0])}
    labels, matched = rpn.assign_targets_to_anchors([anchors], [tiny])
    assert (labels[0] == 1).any()
    assert (matched[0][labels[0] == 1] == tiny["boxes"]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_do_not_crash(bad):
    """R-NUM-4: the loss is what tells, not a crash in the middle of the step."""
    rpn = network()
    maps, sizes = maps_of(64, 64), [(64, 64), (64, 64)]
    maps[0][:] = bad
    proposals, losses = rpn(maps, sizes, rectangle_targets(sizes))
    assert all(len(p) for p in proposals)
    assert not sum(losses.values()).isfinite()
    everything = [torch.full_like(m, bad) for m in maps]
    proposals, _ = rpn(everything, sizes)
    assert all(len(p) for p in proposals)


def test_scores_are_single_precision_under_autocast():
    rpn = network()
    maps, sizes = maps_of(64, 96), [(64, 96), (64, 96)]
    with torch.autocast("cpu", torch.bfloat16):
        proposals, losses = rpn(maps, sizes, rectangle_targets(sizes))
    assert {p.dtype for p in [*proposals, *losses.values()]} == {torch.float32}
