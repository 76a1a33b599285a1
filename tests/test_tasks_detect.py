"""The whole detector and its task: gradients, sizes, precision, start values, measures in pixels of the pictures (R-DOWN-1, R-DOWN-2)."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coco_files import entry
from small_detectors import DENSE, HEADS, rectangle_targets, small_config, small_detector
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.heads.detections import Detections
from swinscale.heads.detector import Detector
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.optim import OptimConfig, parameter_groups
from swinscale.parallel import world
from swinscale.tasks.base import Batch
from swinscale.tasks.detect import Detect

SIZES = [(64, 96), (50, 75)]


def padded(sizes: list[tuple[int, int]], seed: int = 0) -> Tensor:
    """Noise of these sizes with zeros at the right and the bottom, as a batch is made."""
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    draw = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(sizes), 3, height, width)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w, generator=draw)
    return images


def without_gradient(model: nn.Module) -> list[str]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, p in trained if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", HEADS)
def test_losses_and_gradients_are_finite_and_nothing_is_left_out(kind: str, version: int, precision: str):
    """R-DOWN-1, R-NUM-4: with objects, and in a batch that has none."""
    detector = small_detector(kind, version)
    for each in (2, 0):
        detector.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            losses = detector(padded(SIZES), SIZES, rectangle_targets(SIZES, each=each))
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values()), losses
        sum(losses.values()).backward()
        assert without_gradient(detector) == []
    stages = [""] if kind == "mask_rcnn" else ["0", "1", "2"]
    expected = {f"{name}{stage}" for name in ("class", "box", "mask") for stage in stages}
    assert set(losses) == expected | {"rpn_objectness", "rpn_box"} | ({"semantic"} if kind == "htc" else set())


@pytest.mark.parametrize("kind", HEADS)
def test_distributed_training_finds_no_unused_parameter(kind: str):
    """R-DOWN-1: with ``find_unused_parameters=False``, an unused parameter is an error in the next step."""
    with world("cpu", alone_in_group=True):
        model = DistributedDataParallel(small_detector(kind, frozen_stages=1))
        for each in (0, 2, 0):
            sum(model(padded(SIZES), SIZES, rectangle_targets(SIZES, each=each)).values()).backward()
    assert without_gradient(model) == []


def test_frozen_stages_are_not_trained():
    detector = small_detector(frozen_stages=2)
    sum(detector(padded(SIZES), SIZES, rectangle_targets(SIZES)).values()).backward()
    still = {name for name, p in detector.named_parameters() if p.grad is None}
    places = ("backbone.patch_embed.", "backbone.layers.0.", "backbone.layers.1.", "norms.0.", "norms.1.")
    wanted = tuple(f"body.{place}" for place in places)
    assert still == {name for name, _ in detector.named_parameters() if name.startswith(wanted)}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", HEADS)
def test_images_of_any_size(kind: str, version: int):
    """R-DOWN-1: from one pixel to odd sides, one detector in consecutive calls, in training and in use."""
    detector = small_detector(kind, version, score=0.2)
    for sizes in ([(1, 1), (67, 41)], [(1, 90), (33, 2)], [(1, 1)], [(64, 32), (64, 32)]):
        detector.train()
        losses = detector(padded(sizes), sizes, rectangle_targets(sizes, each=1))
        assert all(loss.isfinite() for loss in losses.values()), sizes
        found = detector.eval().detect(padded(sizes), sizes)
        for (height, width), one in zip(sizes, found, strict=True):
            assert one.boxes.isfinite().all() and (one.boxes >= 0).all()
            assert (one.boxes[:, [0, 2]] <= width).all() and (one.boxes[:, [1, 3]] <= height).all()
            assert one.masks.shape == (len(one), 14, 14)
    unpadded = torch.randn(1, 3, 37, 53)  # nothing needs sides that are multiples of anything
    assert detector.detect(unpadded, [(37, 53)])[0].boxes.isfinite().all()


def close(a: Detections, b: Detections) -> bool:
    pairs = ((a.boxes, b.boxes), (a.scores, b.scores), (a.masks, b.masks))
    return torch.equal(a.labels, b.labels) and all(torch.allclose(x, y, atol=1e-4) for x, y in pairs)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", HEADS)
def test_detections_do_not_depend_on_the_other_images_of_a_batch(kind: str, version: int):
    """In batches that are padded to the same size."""
    detector = small_detector(kind, version, score=0.2).eval()
    images = padded(SIZES)
    together = detector.detect(images, SIZES)
    assert min(map(len, together)) > 3
    for index in range(2):
        assert close(detector.detect(images[index : index + 1], SIZES[index : index + 1])[0], together[index])


def start(kind: str, classes: int = 3) -> Detect:
    """A task as a recipe builds it: on ``meta``, then with memory of any content, then with initial values."""
    with torch.device("meta"):
        swin = SwinTransformer(SwinConfig(version=2, pad="exact", **DENSE))
        task = Detect(Detector(swin, classes, small_config(kind)), [str(c) for c in range(classes)])
    task.to_empty(device="cpu")
    for tensor in [*task.parameters(), *task.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)
    task.init_weights(0)
    return task


@pytest.mark.parametrize("kind", HEADS)
def test_every_tensor_gets_its_first_value(kind: str):
    task = start(kind)
    assert [name for name, t in task.state_dict().items() if not t.isfinite().all()] == []
    norms = [m for m in task.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (0 if kind == "mask_rcnn" else 12)
    for norm in norms:
        assert (norm.running_mean == 0).all() and (norm.running_var == 1).all() and norm.num_batches_tracked == 0
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    again = start(kind)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", HEADS)
def test_the_deviations_of_first_values_are_those_that_modules_ask_for(kind: str):
    """Every name is that of a parameter; a wrong one would leave it with the values of other layers."""
    task = start(kind)
    count = 0
    for path, module in task.named_modules():
        for name, deviation in getattr(module, "initially_normal", {}).items():
            value = module.get_parameter(name)
            near = 6 / math.sqrt(value.numel())
            assert value.std().item() == pytest.approx(deviation, rel=max(near, 0.05)), f"{path}.{name}"
            assert abs(value.mean().item()) < 4 * deviation / math.sqrt(value.numel()), f"{path}.{name}"
            count += 1
    assert count >= {"mask_rcnn": 12, "cascade": 30, "htc": 40}[kind]
    linear = [m for m in task.model.roi.modules() if isinstance(m, nn.Linear)]
    assert linear and all((layer.bias == 0).all() for layer in linear)


def test_a_fresh_detector_knows_nothing():
    """Its losses are those of even odds: log 2 for each anchor, log (K + 1) for each region, log 2 for each pixel of a mask."""
    task = start("mask_rcnn").train()
    losses = task.model(padded(SIZES), SIZES, rectangle_targets(SIZES))
    assert losses["rpn_objectness"].item() == pytest.approx(math.log(2), abs=0.05)
    assert losses["class"].item() == pytest.approx(math.log(4), abs=0.1)
    assert losses["mask"].item() == pytest.approx(math.log(2), abs=0.4)


def batch_of(sizes: list[tuple[int, int]], originals: list[tuple[int, int]], **more: Any) -> Batch:
    names = {"size": torch.tensor(sizes), "original_size": torch.tensor(originals)}
    return {"image": padded(sizes), "index": torch.arange(len(sizes)), **names, **more}


def task_of(detector: Detector, classes: int = 3) -> Detect:
    return Detect(detector, [f"class {index}" for index in range(classes)])


def test_the_loss_is_the_sum_of_the_losses_that_are_logged():
    task = task_of(small_detector("cascade"))
    batch = batch_of(SIZES, SIZES, targets=rectangle_targets(SIZES))
    loss, logs = task(batch)
    assert loss.item() == pytest.approx(sum(logs.values()).item(), rel=1e-5) and loss.requires_grad
    assert not any(value.requires_grad for value in logs.values())
    assert {"rpn_objectness", "class2", "mask0"} <= logs.keys()


def test_detections_are_in_pixels_of_the_pictures_as_they_were():
    task = task_of(small_detector(score=0.2).eval())
    originals = [(128, 48), (100, 300)]  # twice and half of 64×96; twice and four times of 50×75
    raw = task.model.detect(padded(SIZES), SIZES)
    found = task.detect(batch_of(SIZES, originals))
    for one, input_, factors in zip(found, raw, ((0.5, 2), (4, 2)), strict=True):
        assert torch.allclose(one.boxes, input_.boxes * torch.tensor(factors * 2))
        assert torch.equal(one.scores, input_.scores) and torch.equal(one.masks, input_.masks)


class Answers(nn.Module):
    """Stands for a detector that finds what it is told, whatever the image."""

    def __init__(self, plain: Detector, answers: Any):
        super().__init__()
        self.backbone, self.config, self.num_classes = plain.backbone, plain.config, plain.num_classes
        self.answers, self.seen = answers, list[tuple[tuple[int, ...], tuple[int, int]]]()

    def detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Detections]:
        self.seen += [(tuple(images.shape), size) for size in sizes]
        return [self.answers(image, size) for image, size in zip(images, sizes, strict=True)]


def boxes_with(rows: list[list[float]], scores: list[float], side: int = 4) -> Detections:
    labels = torch.zeros(len(rows), dtype=torch.int64)
    return Detections(torch.tensor(rows).view(-1, 4), torch.tensor(scores), labels, torch.ones(len(rows), side, side))


def corner_of(image: Tensor, size: tuple[int, int]) -> Detections:
    """Finds the brightest pixel, as a box of a tenth of the image around it."""
    height, width = size
    y, x = divmod(int(image[0, :height, :width].argmax()), width)
    half = torch.tensor([width / 20, height / 20])
    place = torch.tensor([x + 0.5, y + 0.5])
    return boxes_with([[*(place - half).tolist(), *(place + half).tolist()]], [0.9])


def bright(height: int, width: int, y: int, x: int) -> Tensor:
    """Smooth, with its maximum at (y, x), so that it is found at every scale."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2
    return (-50 * distance).exp().expand(1, 3, height, width)


def test_several_scales_and_the_mirror_image_agree_on_where_things_are():
    """Each view is padded to multiples of 32 and knows its true size; all detections are brought back and merged."""
    plain = small_detector(test_short=(32, 64, 90), test_long=128, test_flip=True)
    task = task_of(plain)
    task.model = Answers(plain, corner_of)
    image = bright(64, 96, 16, 72)
    batch = {"image": image, "size": torch.tensor([[64, 96]]), "original_size": torch.tensor([[128, 192]])}
    [found] = task.detect(batch)
    assert [size for _, size in task.model.seen] == [(32, 48)] * 2 + [(64, 96)] * 2 + [
        (85, 128)
    ] * 2  # the long side counts
    assert all(shape[2:] == (-(-h // 32) * 32, -(-w // 32) * 32) for shape, (h, w) in task.model.seen)
    assert len(found) == 1 and found.masks.shape == (1, 4, 4)  # six boxes of one object
    x1, y1, x2, y2 = found.boxes[0].tolist()
    assert (x1 + x2) / 2 == pytest.approx(2 * 72.5, abs=4) and (y1 + y2) / 2 == pytest.approx(2 * 16.5, abs=4)


def test_each_scale_gives_objects_of_its_range_alone():
    plain = small_detector(test_short=(32, 64), test_ranges=((20.0, 1000.0), (0.0, 20.0)))
    task = task_of(plain)

    def answer(image: Tensor, size: tuple[int, int]) -> Detections:
        scale = size[0] / 64
        rows = torch.tensor([[0.0, 0, 10, 10], [30, 20, 60, 50]]) * scale  # of sides 10 and 30 in the picture
        return boxes_with(rows.tolist(), [0.5 * scale, 0.8 * scale])

    task.model = Answers(plain, answer)
    batch = {
        "image": torch.zeros(1, 3, 64, 64),
        "size": torch.tensor([[64, 64]]),
        "original_size": torch.tensor([[64, 64]]),
    }
    [found] = task.detect(batch)
    assert found.boxes.tolist() == [[0, 0, 10, 10], [30, 20, 60, 50]]
    assert found.scores.tolist() == pytest.approx(
        [0.5, 0.4]
    )  # the small one from the large scale, and the other way round


@pytest.mark.parametrize("kind", ["mask_rcnn", "htc"])
def test_views_of_a_real_detector_are_merged(kind: str):
    detector = small_detector(kind, score=0.2).eval()
    views = dataclasses.replace(detector.config, test_short=(48, 64), test_flip=True)
    task = task_of(detector)
    once = task.detect(batch_of(SIZES, SIZES))
    task.config = views
    merged = task.detect(batch_of(SIZES, SIZES))
    for one, (height, width) in zip(merged, SIZES, strict=True):
        assert (one.scores[1:] <= one.scores[:-1]).all() and 0 < len(one) <= detector.config.limit
        assert (one.boxes[:, [0, 2]] <= width + 1e-3).all() and (one.boxes[:, [1, 3]] <= height + 1e-3).all()
    assert not torch.equal(once[0].boxes, merged[0].boxes)


def annotated(*boxes: list[int]) -> list[dict[str, Any]]:
    entries = []
    for number, (x, y, w, h) in enumerate(boxes, 1):
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        entries.append(entry(number, bbox=[x, y, w, h], segmentation=[polygon], area=w * h) | {"label": 0})
    return entries


def test_measures_are_those_of_what_was_found():
    plain = small_detector()
    task = task_of(plain)
    right = boxes_with([[10.0, 10, 40, 30], [50, 5, 60, 25]], [0.9, 0.8])
    task.model = Answers(plain, lambda *_: right)
    truths = [annotated([20, 20, 60, 40], [100, 10, 20, 40]), annotated([20, 20, 60, 40], [100, 10, 20, 40])]
    metrics = task.new_metrics()
    sizes = [(64, 96), (64, 96)]
    task.update_metrics(metrics, batch_of(sizes, [(128, 192)] * 2, image_id=[1, 2], annotations=truths))
    measured = metrics["coco"].compute()
    assert measured["box_ap"] == pytest.approx(1) and measured["mask_ap"] > 0.8
    assert task.metric == "box_ap" and task.higher_is_better and task.metric in measured


def test_layers_for_rates_and_decay():
    task = task_of(small_detector("htc", version=2))
    blocks = task.backbone.config.num_layers
    assert task.num_layers == blocks
    depth = {name: task.layer_id(name) for name, _ in task.named_parameters()}
    assert depth["model.body.backbone.patch_embed.proj.weight"] == 0
    assert depth["model.body.backbone.layers.0.blocks.0.attn.qkv.weight"] == 1
    outside = [name for name in depth if not name.startswith("model.body.backbone.")]
    assert {depth[name] for name in outside} == {blocks} and "model.body.norms.0.weight" in outside
    listed = task.no_weight_decay()
    assert listed and listed <= depth.keys()


@pytest.mark.parametrize("version", [1, 2])
def test_norms_biases_and_position_tables_do_not_decay(version: int):
    """SPEC 3.6."""
    task = task_of(small_detector("htc", version))
    groups = parameter_groups(task, OptimConfig(weight_decay=0.05, backbone_lr=0.1))
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay.keys() == {name for name, _ in task.named_parameters()}
    still = {name for name, value in decay.items() if value == 0}
    words = ("bias", "norm", "relative_position_bias_table", "logit_scale", "cpb_mlp")
    expected = {name for name, p in task.named_parameters() if p.ndim == 1 or any(w in name for w in words)}
    assert still == expected
    scales = {name: group["layer_scale"] for group in groups for name in group["names"]}
    assert {s for n, s in scales.items() if n.startswith("model.body.backbone.")} == {0.1}
    assert {s for n, s in scales.items() if not n.startswith("model.body.backbone.")} == {1.0}


def test_the_rate_of_the_backbone_multiplies_the_decay_by_layers():
    task = task_of(small_detector())
    groups = parameter_groups(task, OptimConfig(layer_decay=0.5, backbone_lr=0.1))
    scales = {name: group["layer_scale"] for group in groups for name in group["names"]}
    assert scales["model.rpn.head.conv.0.0.weight"] == 1
    assert scales["model.body.backbone.layers.3.blocks.0.attn.qkv.weight"] == pytest.approx(0.1 * 0.5)
    assert scales["model.body.backbone.patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5**5)


def test_names_and_classes_must_agree():
    with pytest.raises(UsageError, match="2 names of classes for a model of 3: give one for each"):
        Detect(small_detector(classes=3), ["a", "b"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mask_size": 15}, "task.mask_size=15 must be even"),
        ({"semantic": True}, "belongs to task.head='htc'"),
        ({"anchor_ratios": ()}, "name at least one ratio"),
        ({"test_short": (400, 600), "test_ranges": ((0.0, 9.0),)}, "one range for"),
        ({"score": 1.0}, r"task.score=1.0 is not in \[0, 1\)|task.score"),
        ({"nms_iou": 0.0}, "task.nms_iou"),
        ({"proposals": (0, 10)}, "task.proposals"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words) as error:
        DetectConfig(**fields)
    assert "\n" not in str(error.value)


def test_more_frozen_stages_than_there_are():
    with pytest.raises(UsageError, match="frozen_stages=5 is not allowed: choose 0 to 4"):
        small_detector(frozen_stages=5)


def test_levels_have_the_strides_of_the_backbone_and_one_more():
    detector = small_detector()
    images = torch.randn(1, 3, 100, 76)
    levels = detector.features(images, [(100, 76)])
    assert [tuple(level.shape) for level in levels] == [
        (1, 16, -(-100 // stride), -(-76 // stride)) for stride in (4, 8, 16, 32, 64)
    ]
    assert detector.rpn.strides == (4, 8, 16, 32, 64) and detector.roi.strides == (4, 8, 16, 32)
    with torch.no_grad():
        last = F.max_pool2d(levels[3], 1, 2)
    assert torch.equal(levels[4], last)


def test_a_backbone_of_fewer_stages_and_other_patches_serves():
    """Strides come from the backbone; with patches of 2 pixels they are 2, 4, 8."""
    fields = {"depths": (1, 1), "num_heads": (1, 2), "patch_size": 2, "img_size": 32}
    detector = small_detector(backbone=fields, score=0.2)
    assert detector.rpn.strides == (2, 4, 8)
    sizes = [(33, 20), (30, 31)]
    losses = detector(padded(sizes), sizes, rectangle_targets(sizes))
    sum(losses.values()).backward()
    assert without_gradient(detector) == []
    assert len(detector.eval().detect(padded(sizes), sizes)) == 2
