"""Parameter groups and schedules of the published recipes."""

from __future__ import annotations

import math

import pytest
import torch

from swinscale.errors import UsageError
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.optim import OptimConfig, Schedule, build_optimizer, decay_table, parameter_groups
from swinscale.tasks import Classify, SimMIM, SimMIMConfig

STEPS = 1251  # 1,281,167 images at batch 1024, last batch dropped


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 1.0e-6), (10, 5.0050e-4), (20, 1.0e-3), (90, 8.5502e-4), (160, 5.0500e-4), (230, 1.5498e-4), (299, 1.0031e-5)],
)
def test_rate_of_the_imagenet_recipe(epoch, rate):
    """Golden values of microsoft/Swin-Transformer's 300-epoch recipe at batch 1024."""
    schedule = Schedule(OptimConfig(), 1024, STEPS, 300 * STEPS)
    assert schedule.lr(epoch * STEPS) == pytest.approx(rate, rel=5e-5)


def test_layer_scale_acts_on_the_base_rate_alone():
    schedule = Schedule(OptimConfig(warmup_epochs=1), 512, 100, 1000)
    assert schedule.lr(0, 0.1) == schedule.lr(0, 1.0) == pytest.approx(5e-7)
    assert schedule.lr(100, 0.1) == pytest.approx(5e-5)
    assert schedule.lr(1000, 0.1) == pytest.approx(schedule.lr(1000, 1.0)) == pytest.approx(5e-6)


def test_warmup_overlays_the_cosine_without_prefix():
    """microsoft/SimMIM: the cosine's clock runs from step 0."""
    config = OptimConfig(warmup_epochs=1, warmup_prefix=False, min_lr=0.0)
    schedule = Schedule(config, 512, 10, 100)
    assert schedule.lr(50) == pytest.approx(0.5 * config.lr)
    assert schedule.lr(10) == pytest.approx(config.lr * 0.5 * (1 + math.cos(0.1 * math.pi)))


def test_a_schedule_by_epoch_is_constant_within_one():
    """OpenMMLab: after the warm-up the cosine has one value per epoch, that of its first step; 30 epochs of 10 steps."""
    settings = {"lr": 1e-3, "lr_reference_batch": 64, "min_lr": 0.0, "warmup_epochs": 2.5, "warmup_prefix": False}
    by_epoch, by_step = (Schedule(OptimConfig(**settings, by_epoch=how), 64, 10, 300) for how in (True, False))
    for epoch in (3, 10, 29):
        assert {by_epoch.lr(10 * epoch + step) for step in range(10)} == {by_step.lr(10 * epoch)}
        assert by_epoch.lr(10 * epoch) == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * epoch / 30)))
    assert [by_epoch.lr(step) for step in range(25)] == [by_step.lr(step) for step in range(25)]
    assert len({by_epoch.lr(step) for step in range(25, 30)}) == 1  # from the end of the warm-up to that of its epoch
    multistep = Schedule(
        OptimConfig(schedule="multistep", milestones=(2.5,), warmup_epochs=0, by_epoch=True), 512, 10, 100
    )
    assert [multistep.lr(step) for step in (24, 25, 29, 30)] == pytest.approx([5e-4, 5e-4, 5e-4, 5e-5])


def test_each_group_warms_up_from_a_share_of_its_own_rate():
    """OpenMMLab: from a tenth of the classifier's rate, and from a tenth of the backbone's, which is a tenth of that."""
    config = OptimConfig(
        lr=1e-3,
        lr_reference_batch=64,
        warmup_factor=0.1,
        warmup_epochs=2.5,
        warmup_prefix=False,
        by_epoch=True,
        min_lr=0.0,
    )
    schedule = Schedule(config, 64, 100, 3000)
    assert [schedule.lr(0, scale) for scale in (1.0, 0.1)] == pytest.approx([1e-4, 1e-5])
    assert [schedule.lr(125, scale) for scale in (1.0, 0.1)] == pytest.approx([5.5e-4, 5.5e-5])
    assert schedule.lr(249) == pytest.approx(1e-4 + 9e-4 * 249 / 250)
    assert schedule.lr(300, 0.1) == pytest.approx(0.1 * schedule.lr(300))
    assert Schedule(OptimConfig(warmup_lr=2e-6), 512, 100, 3000).lr(0) == pytest.approx(2e-6)  # without one


@pytest.mark.parametrize("version", [1, 2])
def test_the_backbone_may_learn_more_slowly_than_the_classifier(version):
    """Also with layer-wise decay; without either all rates are one, and a model that is all backbone knows no difference."""
    task = Classify(SwinTransformer(small(version, num_classes=3)), 3)

    def scales(**how):
        return {name: scale for name, _, scale, _ in decay_table(parameter_groups(task, OptimConfig(**how)))}

    head = {"model.head.weight", "model.head.bias"}
    slow = scales(backbone_lr=0.1)
    assert {name for name, scale in slow.items() if scale == 1} == head and set(slow.values()) == {1, 0.1}
    both, layers = scales(backbone_lr=0.1, layer_decay=0.5), scales(layer_decay=0.5)
    assert both == pytest.approx({name: scale * (1 if name in head else 0.1) for name, scale in layers.items()})
    assert set(scales().values()) == {1}


def test_multistep_linear_and_constant():
    step = Schedule(OptimConfig(schedule="multistep", milestones=(7.0, 9.0), warmup_epochs=0), 512, 10, 100)
    assert [step.lr(s) for s in (0, 69, 70, 90)] == pytest.approx([5e-4, 5e-4, 5e-5, 5e-6])
    line = Schedule(OptimConfig(schedule="linear", warmup_epochs=0, min_lr=0.0), 512, 10, 100)
    assert line.lr(25) == pytest.approx(0.75 * 5e-4)
    flat = Schedule(OptimConfig(schedule="constant", warmup_epochs=0), 512, 10, 100)
    assert flat.lr(99) == 5e-4


@pytest.mark.parametrize(("how", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_rate_scaling_is_explicit(how, factor):
    """R-SMALL-2."""
    assert OptimConfig(lr_scaling=how).scaled(1e-3, 2048) == pytest.approx(factor * 1e-3)


def small(version: int, **more) -> SwinConfig:
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 32, "patch_size": 2}
    return SwinConfig(version=version, **{**sizes, **more})


@pytest.mark.parametrize("version", [1, 2])
def test_position_biases_scales_norms_and_mask_token_are_not_decayed(version):
    """R-MIM-7: every CPB, logit scale, bias table and mask token is in the no-decay group, by default."""
    task = SimMIM(SwinTransformer(small(version, num_classes=0, ape=True)), SimMIMConfig(mask_patch=4))
    table = {name: decay for name, _, _, decay in decay_table(parameter_groups(task, OptimConfig()))}
    assert set(table) == {name for name, _ in task.named_parameters()}
    marks = (
        "cpb_mlp",
        "logit_scale",
        "relative_position_bias_table",
        "mask_token",
        "absolute_pos_embed",
        "norm",
        "bias",
    )
    for name, decay in table.items():
        assert (decay == 0) == any(mark in name for mark in marks), name


def test_legacy_decay_replays_the_published_pre_training():
    """R-MIM-7: there the exemption list of position biases never matches."""
    task = SimMIM(SwinTransformer(small(2, num_classes=0)), SimMIMConfig(mask_patch=4, legacy_decay=True))
    table = {name: decay for name, _, _, decay in decay_table(parameter_groups(task, OptimConfig()))}
    assert table["encoder.layers.0.blocks.0.attn.cpb_mlp.0.weight"] > 0
    assert table["encoder.layers.0.blocks.0.attn.logit_scale"] > 0
    assert table["mask_token"] == 0


def test_layer_decay_follows_depth():
    """Layer ids of microsoft/SimMIM: patch embedding 0, blocks 1…n, merging like the block before it, the rest n + 1."""
    task = Classify(SwinTransformer(small(2, num_classes=3)), 3)
    rows = {
        name: (layer, scale)
        for name, layer, scale, _ in decay_table(parameter_groups(task, OptimConfig(layer_decay=0.5)))
    }
    expected = {
        "model.patch_embed.proj.weight": 0,
        "model.layers.0.blocks.0.attn.qkv.weight": 1,
        "model.layers.0.blocks.1.mlp.fc1.weight": 2,
        "model.layers.0.downsample.reduction.weight": 2,
        "model.layers.1.blocks.0.norm1.weight": 3,
        "model.layers.1.blocks.1.norm1.weight": 4,
        "model.norm.weight": 5,
        "model.head.weight": 5,
    }
    for name, layer in expected.items():
        assert rows[name] == (layer, 0.5 ** (5 - layer)), name


def test_linear_probe_trains_the_classifier_alone():
    from swinscale.tasks import ClassifyConfig

    task = Classify(SwinTransformer(small(2, num_classes=3)), 3, ClassifyConfig(linear_probe=True))
    names = [name for group in parameter_groups(task, OptimConfig()) for name in group["names"]]
    assert sorted(names) == ["model.head.bias", "model.head.weight"]
    assert not task.train().model.training


def test_nothing_to_train_is_said():
    task = Classify(SwinTransformer(small(2, num_classes=3)), 3).requires_grad_(False)
    with pytest.raises(UsageError, match="frozen"):
        parameter_groups(task, OptimConfig())


def test_schedule_sets_the_rate_of_each_group():
    task = Classify(SwinTransformer(small(1, num_classes=3)), 3)
    config = OptimConfig(layer_decay=0.5, warmup_epochs=0)
    optimizer = build_optimizer(parameter_groups(task, config), config)
    largest = Schedule(config, 512, 10, 100).apply(optimizer, 0)
    assert largest == 5e-4
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4 * 0.5**k for k in range(6)}
    assert isinstance(optimizer, torch.optim.AdamW)
