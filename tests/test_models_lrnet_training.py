"""LR-Net from recipe to checkpoint and back: it trains, is evaluated, used and described as any other model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swinscale
from random_models import randomise
from swinscale import cli
from swinscale.config import override, to_dict
from swinscale.errors import UsageError
from swinscale.inference import evaluate_checkpoint, load_pipeline, predict_files
from swinscale.info import info
from swinscale.models import LRNet, LRNetConfig
from swinscale.models.pyramid import Pyramid
from swinscale.recipes import DataConfig, Recipe, build, get_recipe, run
from swinscale.recipes.base import recipe_from_dict
from swinscale.recipes.lrnet import desk_lrnet_cifar10, photos_lrnet
from swinscale.recipes.overfit import overfit
from swinscale.tasks import ClassifyConfig, SimMIMConfig
from swinscale.train import TrainConfig, train
from swinscale.weights import read_config, transfer
from swinscale.weights.records import read_model_config

TINY = LRNetConfig(
    24, num_classes=0, depths=(1, 1), widths=(12, 16), stage_dims=(16, 24), stem_width=8, stem_stride=2, kernel_size=3
)


def random_net(**fields: Any) -> LRNet:
    net: LRNet = randomise(LRNet(dataclasses.replace(TINY, **{"num_classes": 3, **fields})))
    random = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2, generator=random)  # type: ignore[union-attr, operator]
            module.running_mean.normal_(generator=random)  # type: ignore[union-attr, operator]
    return net


def recipe(photos: Path, **training: Any) -> Recipe:
    train: dict[str, Any] = {"epochs": 20, "batch_size": 6, "num_workers": 0, "device": "cpu", "eval_every": 0}
    optim = dataclasses.replace(desk_lrnet_cifar10().train.optim, warmup_epochs=0.5)
    data = DataConfig(str(photos), eval_fraction=0.25, augment="none", crop_ratio=None)
    return Recipe("trial", TINY, ClassifyConfig(), data, TrainConfig(optim=optim, **{**train, **training}))


@pytest.fixture
def trained(photos: Path, tmp_path: Path) -> Path:
    run(recipe(photos), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_learns_and_its_checkpoint_serves(trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    """R-DOWN-6: train, eval, predict, info, show and report take an LR-Net as they take a Swin."""
    top1 = evaluate_checkpoint(trained / "best", device="cpu")["top1"]
    assert top1 > 0.6  # colours tell the classes; chance is a third
    (_, ranked), *_ = predict_files(trained / "best", [photos / "red" / "0.png"], device="cpu")
    assert {name for name, _ in ranked} == {"blue", "green", "red"}
    told = info(trained / "best", fits="lrnet_micro")
    assert "LR-Net (depths 1-1, widths 12-16" in told and "recipe trial" in told and "lrnet_micro: does not fit" in told
    assert cli.main(["report", str(trained)]) == 0 and (trained / "report.html").stat().st_size > 5000
    assert cli.main(["show", str(trained / "config.json")]) == 0
    shown = capsys.readouterr().out
    assert "model.similarity" in shown and "GMAC" in shown


def test_a_killed_run_goes_on_as_if_it_had_not_been(photos: Path, tmp_path: Path):
    half = dataclasses.replace(recipe(photos).train, checkpoint_every=1, epochs=5)
    run(dataclasses.replace(recipe(photos), train=half), tmp_path / "whole")
    built = build(dataclasses.replace(recipe(photos), train=half))

    class Killed(Exception):
        pass

    forward, calls = built.task.forward, [0]

    def dies(batch: Any) -> Any:
        calls[0] += 1
        if calls[0] > 10:
            raise Killed
        return forward(batch)

    built.task.forward = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(built.task, built.train_data, built.eval_data, half, tmp_path / "two")
    again = build(dataclasses.replace(recipe(photos), train=half))
    train(again.task, again.train_data, again.eval_data, half, tmp_path / "two", resume=True)
    one, two = (swinscale.from_pretrained(tmp_path / name / "last").state_dict() for name in ("whole", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_saving_and_loading(tmp_path: Path):
    net, x = random_net(), torch.randn(2, 3, 20, 28)
    swinscale.save_pretrained(net, tmp_path)
    again = swinscale.from_pretrained(tmp_path).eval()
    assert isinstance(again, LRNet) and again.config == net.config == read_model_config(tmp_path)
    assert torch.equal(again(x), net(x))
    moved = swinscale.from_pretrained(tmp_path, num_classes=7, in_chans=6, img_size=48).eval()
    assert moved(x.repeat(1, 2, 1, 1)).shape == (2, 7) and moved.config.img_size == (48, 48)
    assert torch.allclose(moved.forward_features(x.repeat(1, 2, 1, 1)), net.forward_features(x), atol=1e-5)
    alone = swinscale.from_pretrained(tmp_path / "model.safetensors", num_classes=0).eval()
    assert torch.equal(alone(x), net.forward_head(net.forward_features(x), pre_logits=True))


def test_what_does_not_fit_is_named(tmp_path: Path):
    swinscale.save_pretrained(random_net(), tmp_path)
    with pytest.raises(UsageError, match=r"does not fit an LR-Net of depths \(2, 1\).*layers\.0\.blocks\.1"):
        swinscale.from_pretrained(tmp_path, depths=(2, 1))
    with pytest.raises(UsageError, match="Unknown model setting 'window_size'"):
        swinscale.from_pretrained(tmp_path, window_size=7)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(UsageError, match="SHA-256"):
        swinscale.from_pretrained(tmp_path)


def test_what_only_a_swin_can_is_refused(tmp_path: Path, photos: Path):
    net = random_net()
    swinscale.save_pretrained(net, tmp_path / "net", metadata={"task": {"name": "classify"}})
    place = str(tmp_path / "net")
    for refuse in (
        lambda: read_config(place),
        lambda: transfer(place, img_size=48),
        lambda: load_pipeline(place).backbone,
    ):
        with pytest.raises(UsageError, match="Swin Transformer"):
            refuse()
    with pytest.raises(UsageError, match="no windows"):
        transfer(net)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Swin Transformer"):
        Pyramid(net, [0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a Swin Transformer"):
        build(dataclasses.replace(recipe(photos), task=SimMIMConfig(mask_patch=4)))
    for command in (
        ["convert", place, str(tmp_path / "out"), "--to", "timm"],
        ["export", place, "--out", str(tmp_path / "out")],
        ["transfer", place, "--img-size", "48", "--out", str(tmp_path / "out")],
        ["explain", place, str(photos / "red" / "0.png")],
    ):
        assert cli.main(command) == 2, command
    assert not (tmp_path / "out").exists()


def test_fine_tuning_starts_from_a_checkpoint(trained: Path, photos: Path):
    """All tensors but a classifier of other classes come from it; the same classes take the classifier too."""
    built = build(dataclasses.replace(recipe(photos), init=str(trained / "last")))
    assert built.loaded is not None and built.loaded.plain and built.loaded.share == 1
    saved = swinscale.from_pretrained(trained / "last").state_dict()
    assert all(
        torch.equal(value, saved[name.removeprefix("model.")]) for name, value in built.task.state_dict().items()
    )


def test_a_linear_probe_trains_the_classifier_alone(photos: Path):
    task = build(dataclasses.replace(recipe(photos), task=ClassifyConfig(linear_probe=True))).task
    assert {n for n, p in task.named_parameters() if p.requires_grad} == {"model.head.weight", "model.head.bias"}
    assert not task.train().model.training


def test_checkpointing_changes_neither_gradients_nor_statistics():
    """R-SPD-6: what is computed twice is counted once."""
    x, states = torch.randn(3, 3, 24, 24), []
    for mode in ("none", ("block", "block")):
        net = random_net().train()
        net.set_grad_checkpointing(mode)
        net(x).square().sum().backward()
        states.append({**net.state_dict(), **{f"grad {n}": p.grad for n, p in net.named_parameters()}})
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-5, atol=1e-6), name
    with pytest.raises(UsageError, match="'none' and 'block'"):
        random_net().set_grad_checkpointing("selective")


def test_bf16_is_close_to_fp32():
    net, x = random_net(), torch.randn(4, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    assert half.dtype == torch.bfloat16 and (half.float() - net(x)).norm() < 0.03 * net(x).norm()
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(net(x).float(), torch.tensor([0, 1, 2, 0])).backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters()
    )


@pytest.mark.slow
def test_a_compiled_network_is_the_same():
    net, x = random_net(), torch.randn(2, 3, 24, 20)
    compiled = torch.compile(net, backend="aot_eager")
    assert torch.allclose(compiled(x), net(x), atol=1e-5)
    compiled(x).sum().backward()
    assert net.stem.conv.weight.grad is not None


def test_recipes_are_recorded_and_read_again():
    for made in (desk_lrnet_cifar10(), photos_lrnet()):
        assert recipe_from_dict(to_dict(made)) == made
        assert override(made, "model.kernel_size=5", "model.similarity=absolute").model.kernel_size == 5
        assert overfit(made, 8).model == made.model
    with pytest.raises(UsageError, match=r"model\.window_size"):
        override(desk_lrnet_cifar10(), "model.window_size=7")


@pytest.mark.slow
def test_few_photos_are_learned_by_heart(shared_data: Path, tmp_path: Path):
    """Sixteen real photos of clothes, from the recipe of a user, at 32 pixels."""
    few = overfit(photos_lrnet(), 16)
    few = dataclasses.replace(
        few,
        model=dataclasses.replace(TINY, img_size=32),
        data=dataclasses.replace(few.data, train=str(shared_data / "clothing" / "train")),
        train=dataclasses.replace(few.train, epochs=150, num_workers=0, device="cpu"),
    )
    assert run(few, tmp_path / "run").metrics["top1"] > 0.8


def test_a_mistake_in_a_record_is_named():
    """Which kind of network a record is of follows from its fields; what is wrong with them is said of that kind."""
    values = to_dict(desk_lrnet_cifar10())
    for name, words in (("kernel_sise", "model.kernel_sise"), ("window_size", "of LRNetConfig")):
        with pytest.raises(UsageError, match=words):
            recipe_from_dict({**values, "model": {**values["model"], name: 7}})
    swin = to_dict(get_recipe("desk_scratch"))
    with pytest.raises(UsageError, match=r"'model\.window_sise' of SwinConfig\. Did you mean 'window_size'"):
        recipe_from_dict({**swin, "model": {**swin["model"], "window_sise": 7}})
