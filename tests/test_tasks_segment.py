"""The task of segmentation: whole pictures, sliding windows, several sizes, mirrored, larger windows; measures, rates and decay (R-DOWN-2, R-DOWN-5)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from random_models import randomise
from small_detectors import DENSE
from small_segmenters import pictures, small_segmenter, small_task
from swinscale.errors import UsageError
from swinscale.evaluation import _update
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import IGNORED, Segmenter
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.optim import OptimConfig, parameter_groups
from swinscale.tasks import segment
from swinscale.tasks.segment import Segment, best_class, windows
from swinscale.weights import transfer_config

SIZES = [(64, 96), (50, 75), (64, 96)]


def up(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def sliding(task: Segment, image: Tensor, side: int, stride: int) -> Tensor:
    """Logits (1, K, H, W) by the published loops: windows from the top left, the last ones moved back to the border."""
    height, width = image.shape[-2:]
    total, count = torch.zeros(1, 4, height, width), torch.zeros(height, width)
    for row in range(max(height - side + stride - 1, 0) // stride + 1):
        for column in range(max(width - side + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + side, height), min(column * stride + side, width)
            top, left = max(bottom - side, 0), max(right - side, 0)
            total[..., top:bottom, left:right] += task.model(image[..., top:bottom, left:right])
            count[top:bottom, left:right] += 1
    assert count.min() >= 1
    return total / count


@pytest.mark.parametrize("version", [1, 2])
def test_a_whole_picture(version: int):
    task = small_task(version)
    batch = pictures([(47, 61)])
    [found] = task.segment(batch)
    assert found.dtype == torch.int64 and torch.equal(found, task.model(batch["image"])[0].argmax(0))
    assert len(found.unique()) > 1


def test_pictures_are_resized_and_their_classes_have_the_size_of_the_picture():
    """The short side decides, or the long one where it would become too long; logits are brought back, then compared."""
    batch = pictures([(47, 61)])
    for short, long, size in ((32, 96, (32, 42)), (64, 70, (54, 70)), (47, 200, (47, 61)), (94, 200, (94, 122))):
        task = small_task(test_short=short, test_long=long)
        smaller = size[0] < 47
        view = F.interpolate(batch["image"], size, mode="bilinear", align_corners=False, antialias=smaller)
        [found] = task.segment(batch)
        assert torch.equal(found, up(task.model(view), (47, 61))[0].argmax(0)), size


@pytest.mark.parametrize(
    ("size", "side", "stride"), [((64, 96), 32, 20), ((50, 75), 48, 48), ((33, 97), 32, 32), ((70, 70), 64, 3)]
)
def test_a_sliding_window_gives_what_the_published_loops_give(size: tuple[int, int], side: int, stride: int):
    task = small_task(test_crop=side, test_stride=stride)
    batch = pictures([size])
    expected = sliding(task, batch["image"], side, stride)
    assert torch.allclose(task._logits(batch["image"]), expected, atol=1e-5)
    assert torch.equal(task.segment(batch)[0], expected[0].argmax(0))
    assert not torch.equal(task.segment(batch)[0], task.model(batch["image"])[0].argmax(0))


@pytest.mark.parametrize("size", [(1, 1), (31, 200), (64, 64), (65, 40), (128, 129)])
@pytest.mark.parametrize(("side", "stride"), [(64, 43), (64, 64), (64, 1), (1, 1)])
def test_windows_cover_every_pixel_and_have_one_size(size: tuple[int, int], side: int, stride: int):
    count = torch.zeros(size)
    places = windows(size, side, stride)
    for rows, columns in places:
        count[rows, columns] += 1
        assert (rows.stop - rows.start, columns.stop - columns.start) == (min(side, size[0]), min(side, size[1]))
    assert count.min() >= 1 and len(places) == len({(r.start, c.start) for r, c in places})
    if side >= max(size):
        assert places == [(slice(0, size[0]), slice(0, size[1]))]


def test_a_picture_smaller_than_the_window_is_looked_at_as_a_whole():
    task = small_task(test_crop=64)
    batch = pictures([(30, 41)])
    assert torch.equal(task.segment(batch)[0], task.model(batch["image"])[0].argmax(0))
    assert task.passes(batch) == 1


def test_without_a_stride_the_window_moves_by_two_thirds_of_its_side():
    assert small_task(test_crop=512)._window() == (512, 342)  # 341.3, rounded up
    assert small_task(test_crop=1)._window() == (1, 1)


def test_several_sizes_and_the_mirror_image_are_averaged_as_probabilities():
    """Equal to the plain way: each view whole, softmax, mirrored back, mean, best (SPEC 3.7)."""
    task = small_task(test_short=48, test_long=96, test_ratios=(0.5, 1.0, 1.75), test_flip=True)
    image = pictures([(48, 60)])["image"]
    total = torch.zeros(1, 4, 48, 60)
    for size in ((24, 30), (48, 60), (84, 105)):
        view = F.interpolate(image, size, mode="bilinear", antialias=size[0] < 48) if size != (48, 60) else image
        total += up(task.model(view), (48, 60)).softmax(1)
        total += up(task.model(view.flip(-1)).flip(-1), (48, 60)).softmax(1)
    [found] = task.segment({"image": image, "size": torch.tensor([[48, 60]])})
    sure = total.topk(2, 1).values.diff(dim=1).abs()[0, 0] > 1e-4
    assert torch.equal(found[sure], total[0].argmax(0)[sure]) and sure.float().mean() > 0.95
    [once] = small_task(test_short=48).segment({"image": image, "size": torch.tensor([[48, 60]])})
    assert not torch.equal(found, once)


@pytest.mark.parametrize(
    "fields",
    [{}, {"test_short": 40}, {"test_crop": 32, "test_stride": 20}, {"test_ratios": (0.5, 1.0), "test_flip": True}],
    ids=str,
)
def test_classes_do_not_depend_on_the_other_pictures_of_a_batch(fields: dict[str, Any]):
    """Neither in a batch that is padded to the largest, nor in one of equal sizes."""
    task = small_task(**fields)
    for sizes in (SIZES, SIZES[:1] * 3):
        batch = pictures(sizes)
        together = task.segment(batch)
        assert [tuple(labels.shape) for labels in together] == sizes
        for image, (height, width), found in zip(batch["image"], sizes, together, strict=True):
            alone = {"image": image[None, :, :height, :width], "size": torch.tensor([[height, width]])}
            assert (task.segment(alone)[0] != found).float().mean() < 0.002  # where two classes are all but equal


@pytest.mark.parametrize("at_once", [1, 500, 3000, 2**28])
def test_the_best_class_in_parts_is_the_argmax(monkeypatch: pytest.MonkeyPatch, at_once: int):
    """Also where classes are exactly equal: the first one."""
    monkeypatch.setattr(segment, "_AT_ONCE", at_once)
    logits = torch.randn(2, 11, 8, 9)
    logits[:, 5] = logits[:, 2]
    assert torch.equal(best_class(logits, (15, 20)), up(logits, (15, 20)).argmax(1))
    same = torch.zeros(1, 11, 4, 4)
    assert (best_class(same, (15, 20)) == 0).all()


def test_passes_are_those_that_the_model_makes(monkeypatch: pytest.MonkeyPatch):
    """What processes agree on under sharding."""
    for fields, sizes in (
        ({}, SIZES), ({}, SIZES[:1] * 2), ({"test_crop": 32, "test_stride": 16}, SIZES),
        ({"test_crop": 32, "test_ratios": (0.5, 1.5), "test_flip": True}, SIZES),
        ({"test_short": 40, "test_crop": 48, "test_flip": True}, SIZES[:2]),
    ):  # fmt: skip
        task, batch = small_task(**fields), pictures(sizes)
        made = 0

        def count(*_: Any) -> None:
            nonlocal made
            made += 1

        task.model.body.register_forward_hook(count)
        task.update_metrics(task.new_metrics(), batch)
        assert made == task.passes(batch), (fields, sizes)
        task.take_part(task.new_metrics(), batch, task.passes(batch) + 3)
        assert made == 2 * task.passes(batch) + 3


def test_a_process_alone_makes_no_idle_passes(monkeypatch: pytest.MonkeyPatch):
    task = small_task(test_crop=32)
    monkeypatch.setattr(Segment, "passes", lambda *_: pytest.fail("nobody to agree with"))
    metrics = task.new_metrics()
    _update(task, metrics, pictures([(40, 40)]))
    assert sum(row["pixels"] for row in metrics["segmentation"].compute()["per_class"]) > 1000


def biases(model: SwinTransformer) -> list[Tensor]:
    """For each stage (A, 2 · height - 1, 2 · width - 1): the bias of every offset in its windows."""
    found = []
    for layer, (height, width) in zip(model.layers, model.config.stage_windows, strict=True):
        values = layer.blocks[0].attn.bias((height, width)).values
        found.append(values.detach().unflatten(1, (2 * height - 1, 2 * width - 1)))
    return found


def test_a_larger_window_at_test_time_keeps_the_bias(tmp_path):
    """R-DOWN-5: of every offset that the trained window has, for V2. V1's table is resized around its centre."""
    from swinscale.segmentation import load_segmentation

    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": list("abcd"), "colours": None}
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    for version in (1, 2):
        place = tmp_path / str(version)
        Segment(small_segmenter(version), list("abcd"), preprocessing).save_pretrained(place)
        plain, wide = load_segmentation(place), load_segmentation(place, window_size=8)
        assert set(wide.task.backbone.config.stage_windows) == {(8, 8)}
        for before, after in zip(biases(plain.task.backbone), biases(wide.task.backbone), strict=True):
            if version == 2:
                assert (after[:, 4:-4, 4:-4] - before).abs().max() <= 1e-6
            else:
                assert torch.allclose(after[:, 7, 7], before[:, 3, 3], atol=1e-5)
        one, two = plain([image])[0], wide([image])[0]
        assert 0.01 < (one != two).float().mean() < 0.9


def test_the_window_of_the_weights_is_the_trained_one():
    config = SwinConfig(version=2, pad="exact", **DENSE)
    assert set(transfer_config(config, window_size=8).pretrained_window_sizes) == {(4, 4)}


def test_the_loss_is_the_sum_of_the_losses_that_are_logged():
    task = small_task().train()
    loss, logs = task(pictures(SIZES))
    assert logs.keys() == {"decode", "auxiliary"} and loss.requires_grad
    assert loss.item() == pytest.approx(sum(logs.values()).item(), rel=1e-6)
    assert not any(value.requires_grad for value in logs.values())


def test_measures_are_those_of_what_was_found():
    """Padding and ignored pixels count nowhere."""
    task = small_task()
    batch = pictures(SIZES)
    found = task.segment(batch)
    batch["target"] = torch.full_like(batch["target"], 3)  # what padding holds must not matter
    for labels, target in zip(found, batch["target"], strict=True):
        target[: labels.shape[0], : labels.shape[1]] = labels
        target[:5] = IGNORED
    metrics = task.new_metrics()
    task.update_metrics(metrics, batch)
    measured = metrics["segmentation"].compute()
    assert (measured["miou"], measured["aacc"]) == (1, 1)
    assert sum(row["pixels"] for row in measured["per_class"]) == 2 * 59 * 96 + 45 * 75
    assert task.metric in measured and task.higher_is_better
    other = small_task()
    other.model.decode.predict.bias.data[0] += 1e4
    metrics = other.new_metrics()
    other.update_metrics(metrics, batch)
    share = sum((labels[5:] == 0).sum().item() for labels in found) / (2 * 59 * 96 + 45 * 75)
    assert metrics["segmentation"].compute()["aacc"] == pytest.approx(share)


def test_layers_for_rates_and_decay():
    """SPEC 3.7: norms, biases and position tables do not decay; layers of the backbone alone are near the input."""
    for version in (1, 2):
        task = small_task(version)
        blocks = task.backbone.config.num_layers
        depth = {name: task.layer_id(name) for name, _ in task.named_parameters()}
        assert depth["model.body.backbone.patch_embed.proj.weight"] == 0
        assert depth["model.body.backbone.layers.0.blocks.0.attn.qkv.weight"] == 1
        outside = {layer for name, layer in depth.items() if not name.startswith("model.body.backbone.")}
        assert outside == {blocks} == {task.num_layers}
        groups = parameter_groups(task, OptimConfig(weight_decay=0.05, layer_decay=0.5))
        decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
        words = ("bias", "norm", "relative_position_bias_table", "logit_scale", "cpb_mlp")
        expected = {name for name, p in task.named_parameters() if p.ndim == 1 or any(w in name for w in words)}
        assert decay.keys() == depth.keys() and {name for name, value in decay.items() if value == 0} == expected
        scales = {name: group["layer_scale"] for group in groups for name in group["names"]}
        assert scales["model.decode.fuse.0.weight"] == 1
        assert scales["model.body.backbone.patch_embed.proj.weight"] == pytest.approx(0.5**blocks)


def test_names_weights_and_classes_must_agree():
    with pytest.raises(UsageError, match="2 names of classes for a model of 4: give one for each"):
        Segment(small_segmenter(), ["a", "b"])
    with pytest.raises(UsageError, match=r"task\.class_weights has 3 numbers for 4 classes: give one for each"):
        small_task(class_weights=(1.0, 2.0, 3.0))


@pytest.mark.parametrize("stages", [2, 3])
def test_a_backbone_of_fewer_stages_and_other_patches_serves(stages: int):
    fields = {**DENSE, "depths": (1,) * stages, "num_heads": (1, 2, 2)[:stages], "patch_size": 2, "img_size": 32}
    swin = SwinTransformer(SwinConfig(version=2, pad="exact", **fields))
    config = SegmentConfig(channels=8, aux_channels=8, aux_stage=1, test_short=0)
    task = Segment(randomise(Segmenter(swin, 3, config)), list("abc")).eval()
    batch = pictures([(37, 20), (11, 53)], classes=3)
    assert [tuple(labels.shape) for labels in task.segment(batch)] == [(37, 20), (11, 53)]
    task.train()(batch)[0].backward()
    assert all(p.grad is not None for p in task.parameters())


def test_settings_of_use_change_no_weight():
    """Those whose names begin with ``test_``."""
    names = {field.name for field in dataclasses.fields(SegmentConfig) if field.name.startswith("test_")}
    assert names >= {"test_short", "test_long", "test_ratios", "test_flip", "test_crop", "test_stride"}
    plain = small_task().state_dict()
    views = {"test_short": 99, "test_long": 300, "test_ratios": (2.0,), "test_flip": True, "test_crop": 7}
    other = small_task(**views).state_dict()
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
