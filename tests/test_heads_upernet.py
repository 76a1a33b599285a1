"""UPerNet: sizes, gradients, precision, the loss, first values and the published number of parameters (R-DOWN-1, R-DOWN-2, SPEC 3.7)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from random_models import randomise
from small_detectors import DENSE
from small_segmenters import NARROW, pictures, plain_loss, small_segmenter, without_gradient
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.convs import BatchNorm
from swinscale.heads.upernet import IGNORED, PyramidPooling, Segmenter
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.parallel import world
from swinscale.recipes import get_recipe
from swinscale.recipes.parts import dense_model
from swinscale.tasks.segment import Segment

STAGES: dict[int, dict[str, Any]] = {
    count: {"depths": (1,) * count, "num_heads": (1, 1, 2, 2)[:count]} for count in (2, 3, 4)
}
SIZES = [(1, 1), (1, 90), (33, 2), (37, 53), (64, 64), (96, 32)]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("version", [1, 2])
def test_images_of_any_size(version: int, stages: int):
    """R-DOWN-1: from one pixel, odd, prime and oblong, in consecutive calls, one image or two, in training and in use."""
    segmenter = small_segmenter(version, backbone=STAGES[stages], aux_stage=stages - 2)
    for size in SIZES:
        for count in (1, 2):
            batch = pictures([size] * count)
            losses = segmenter.train().losses(batch["image"], batch["target"])
            assert losses.keys() == {"decode", "auxiliary"} and all(loss.isfinite() for loss in losses.values()), size
            logits = segmenter.eval()(batch["image"])
            assert logits.shape == (count, 4, *size) and logits.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("aux_weight", [0.4, 0.0])
@pytest.mark.parametrize("version", [1, 2])
def test_every_parameter_gets_a_gradient(version: int, aux_weight: float, precision: str):
    """R-DOWN-1, R-NUM-4: also with one image, whose map pooled to one cell has no deviation, and where nothing counts."""
    segmenter = small_segmenter(version, aux_weight=aux_weight)
    assert (segmenter.auxiliary is None) == (aux_weight == 0)
    for sizes, nothing in (([(64, 48)] * 2, False), ([(40, 33)], False), ([(40, 33)], True)):
        segmenter.zero_grad()
        batch = pictures(sizes)
        target = torch.full_like(batch["target"], IGNORED) if nothing else batch["target"]
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            losses = segmenter.losses(batch["image"], target)
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values()), losses
        torch.stack(list(losses.values())).sum().backward()
        assert without_gradient(segmenter) == []
        moved = [p.grad.abs().max() > 0 for p in segmenter.parameters() if p.grad is not None]
        assert any(moved) != nothing and (sum(losses.values()) == 0) == nothing


@pytest.mark.parametrize("aux_weight", [0.4, 0.0])
def test_distributed_training_finds_no_unused_parameter(aux_weight: float):
    """R-DOWN-1: with ``find_unused_parameters=False``, an unused parameter is an error in the next step."""
    segmenter = small_segmenter(frozen_stages=1, aux_weight=aux_weight)
    task = Segment(segmenter, list("abcd"))
    with world("cpu", alone_in_group=True):
        model = DistributedDataParallel(task)
        for seed in range(3):
            model(pictures([(32, 48)], seed=seed))[0].backward()
    assert without_gradient(task) == []


def test_frozen_stages_are_not_trained():
    segmenter = small_segmenter(frozen_stages=2)
    batch = pictures([(64, 64)] * 2)
    sum(segmenter.losses(batch["image"], batch["target"]).values()).backward()
    still = {name for name, p in segmenter.named_parameters() if p.grad is None}
    places = ("backbone.patch_embed.", "backbone.layers.0.", "backbone.layers.1.", "norms.0.", "norms.1.")
    wanted = tuple(f"body.{place}" for place in places)
    assert still == {name for name, _ in segmenter.named_parameters() if name.startswith(wanted)}


@pytest.mark.parametrize("weights", [(), (1.0, 0.0, 2.5, 0.5)])
def test_the_loss_is_the_plain_formula(weights: tuple[float, ...]):
    """A mean over all pixels: ignored ones add nothing, but count as pixels; a weight multiplies, and is not divided by."""
    segmenter = small_segmenter(class_weights=weights).eval()
    batch = pictures([(20, 27), (17, 12)])
    images, target = batch["image"], batch["target"]
    losses = segmenter.losses(images, target)
    assert losses["decode"].item() == pytest.approx(plain_loss(segmenter(images), target, weights).item(), rel=1e-5)
    maps = segmenter.body(images)
    assert segmenter.auxiliary is not None
    beside = F.interpolate(segmenter.auxiliary(maps[2]), (20, 27), mode="bilinear")
    assert losses["auxiliary"].item() == pytest.approx(0.4 * plain_loss(beside, target, weights).item(), rel=1e-5)


def test_two_micro_batches_give_the_gradients_of_one():
    """The loss is a mean over all pixels, so each half counts as much however many of its pixels are ignored (R-OPS-4)."""
    segmenter = small_segmenter().eval()  # batch norms use what they have stored
    batch = pictures([(40, 33)] * 4)
    batch["target"][:2, 5:] = IGNORED
    whole: dict[str, torch.Tensor] = {}
    for parts in ((slice(0, 4),), (slice(0, 2), slice(2, 4))):
        segmenter.zero_grad()
        for part in parts:
            losses = segmenter.losses(batch["image"][part], batch["target"][part])
            (sum(losses.values()) / len(parts)).backward()
        grads = {name: p.grad.clone() for name, p in segmenter.named_parameters() if p.grad is not None}
        whole = whole or grads
    largest = max(g.abs().max() for g in whole.values())
    assert max((whole[name] - grads[name]).abs().max() for name in grads) <= 1e-5 * largest


def test_a_map_of_one_cell_is_normalised_by_the_running_statistics_and_leaves_them():
    norm = BatchNorm(3).train()
    norm.running_mean.copy_(torch.tensor([1.0, 2, 3]))
    norm.running_var.copy_(torch.tensor([4.0, 1, 0.25]))
    single = torch.tensor([3.0, 3, 3]).view(1, 3, 1, 1)
    out = norm(single)
    assert torch.allclose(out.flatten(), torch.tensor([1.0, 1, 0]), atol=1e-4)
    assert norm.running_mean.tolist() == [1, 2, 3] and norm.num_batches_tracked == 0
    out.sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad.tolist() == [1, 1, 1]
    pair = torch.cat([single, single + 2])
    assert torch.equal(norm(pair), F.batch_norm(pair, None, None, norm.weight, norm.bias, True))
    assert norm.num_batches_tracked == 1 and norm.running_mean[0] != 1


def test_pyramid_pooling_is_the_published_one():
    """Adaptive average pooling to 1, 2, 3 and 6 cells a side, a 1×1 convolution each, back up, beside the map itself (SPEC 3.7)."""
    pooling = randomise(PyramidPooling(6, SegmentConfig(channels=5)))
    x = torch.randn(2, 6, 13, 9)
    parts = [x]
    for scale, branch in zip((1, 2, 3, 6), pooling.branches, strict=True):
        cells = torch.empty(2, 6, scale, scale)
        for row in range(scale):
            for column in range(scale):
                rows = slice(row * 13 // scale, -(-(row + 1) * 13 // scale))
                columns = slice(column * 9 // scale, -(-(column + 1) * 9 // scale))
                cells[..., row, column] = x[..., rows, columns].mean((2, 3))
        parts.append(F.interpolate(branch(cells), (13, 9), mode="bilinear"))
    assert torch.allclose(pooling(x), pooling.fuse(torch.cat(parts, 1)), atol=1e-5)
    assert pooling.fuse[0].weight.shape == (5, 6 + 4 * 5, 3, 3) and pooling.fuse[0].bias is None


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_pictures_of_other_channels(channels: int):
    """R-CHAN-1."""
    segmenter = small_segmenter(backbone={"in_chans": channels})
    batch = pictures([(30, 41)] * 2, channels=channels)
    sum(segmenter.losses(batch["image"], batch["target"]).values()).backward()
    assert without_gradient(segmenter) == []
    assert segmenter.eval()(batch["image"]).shape == (2, 4, 30, 41)


def test_dropout_is_for_training_alone():
    segmenter = small_segmenter(dropout=0.5)
    image = pictures([(32, 32)])["image"]
    with torch.no_grad():
        maps = segmenter.body(image)
        segmenter.decode.eval()
        kept = segmenter.decode(maps)
        assert torch.equal(segmenter.decode(maps), kept)
        segmenter.decode.dropout.train()
        assert not torch.equal(segmenter.decode(maps), kept)


def start(version: int = 2, classes: int = 4) -> Segment:
    """A task as a recipe builds it: on ``meta``, then with memory of any content, then with initial values."""
    with torch.device("meta"):
        swin = SwinTransformer(SwinConfig(version=version, pad="exact", **DENSE))
        task = Segment(Segmenter(swin, classes, SegmentConfig(**NARROW)), [str(c) for c in range(classes)])
    task.to_empty(device="cpu")
    for tensor in [*task.parameters(), *task.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)
    task.init_weights(0)
    return task


def test_every_tensor_gets_its_first_value():
    """And the deviations are those that modules ask for: a wrong name would leave a layer with the values of others."""
    task = start()
    assert [name for name, t in task.state_dict().items() if not t.isfinite().all()] == []
    norms = [m for m in task.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4 + 1 + 3 + 3 + 1 + 1
    assert all((n.running_mean == 0).all() and (n.running_var == 1).all() and n.num_batches_tracked == 0 for n in norms)
    asked = {
        f"{path}.{name}": deviation
        for path, module in task.named_modules()
        for name, deviation in getattr(module, "initially_normal", {}).items()
    }
    convolutions = [name for name, m in task.model.named_modules() if isinstance(m, nn.Conv2d)]
    assert asked.keys() == {f"model.{name}.weight" for name in convolutions if not name.startswith("body.")}
    for name, deviation in asked.items():
        value = task.get_parameter(name)
        rule = 0.01 if name.endswith("predict.weight") else math.sqrt(2 / value[0].numel())
        assert deviation == pytest.approx(rule)
        assert value.std().item() == pytest.approx(deviation, rel=max(6 / math.sqrt(value.numel()), 0.05)), name
    again = start()
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True))


def test_a_fresh_segmenter_knows_nothing():
    """Its losses are those of even odds."""
    batch = pictures([(64, 64)] * 2)
    counted = (batch["target"] != IGNORED).float().mean().item()
    losses = start().train().model.losses(batch["image"], batch["target"])
    assert losses["decode"].item() == pytest.approx(counted * math.log(4), rel=0.05)
    assert losses["auxiliary"].item() == pytest.approx(0.4 * counted * math.log(4), rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("upernet_swin_tiny", 60),
        ("upernet_swin_small", 81),
        ("upernet_swin_base", 121),
        ("upernet_swin_large_640", 234),
    ],
)
def test_segmenters_have_the_published_number_of_parameters(recipe: str, published: int):
    """In millions, with 150 classes (SPEC 4.1)."""
    chosen = get_recipe(recipe)
    with torch.device("meta"):
        model = Segmenter(SwinTransformer(chosen.model), 150, chosen.task)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == published


def test_a_backbone_of_two_stages_needs_no_third_one_where_nothing_asks_for_it():
    assert small_segmenter(backbone=STAGES[2], aux_weight=0.0).auxiliary is None
    with pytest.raises(UsageError, match=r"task\.aux_stage=2 must be one of the 2 stages that this"):
        small_segmenter(backbone=STAGES[2])
    with pytest.raises(UsageError, match="needs a backbone of two stages or more"):
        small_segmenter(backbone={"depths": (1,), "num_heads": (1,)}, aux_stage=0)
    with pytest.raises(UsageError, match="frozen_stages=5 is not allowed: choose 0 to 4"):
        small_segmenter(frozen_stages=5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dropout": 1.0}, "task.dropout=1.0"),
        ({"pool_scales": ()}, "task.pool_scales"),
        ({"pool_scales": (0, 1)}, "task.pool_scales"),
        ({"test_ratios": ()}, "test_ratios need at least one"),
        ({"test_ratios": (1.0, 0.0)}, "task.test_ratios"),
        ({"test_short": 512, "test_long": 511}, "task.test_long=511 is less than task.test_short=512"),
        ({"test_crop": 64, "test_stride": 65}, "task.test_stride=65 is more than task.test_crop=64"),
        ({"class_weights": (-1.0,)}, "task.class_weights"),
        ({"aux_weight": -0.1}, "task.aux_weight"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words) as error:
        SegmentConfig(**fields)
    assert "\n" not in str(error.value)


def test_a_recipes_backbone_keeps_its_windows_at_any_size():
    """V1 attends to padding as the published dense code does, V2 does not; windows never shrink to the map."""
    for name, pad in (("swin_tiny_patch4_window7_224", "legacy"), ("swinv2_tiny_window8_256", "exact")):
        config = dense_model(name, 0.3, img_size=512)
        assert (config.pad, config.small_map, config.num_classes) == (pad, "pad", 0)
