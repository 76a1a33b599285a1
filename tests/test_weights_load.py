"""Loading into a model: heads, other channels, SimMIM hand-off, and the 99 % rule (R-CKPT-3, R-CHAN-1)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from random_models import random_swin, randomise
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.tasks.simmim import SimMIM, SimMIMConfig
from swinscale.weights import from_pretrained, infer_config, load_weights, save_pretrained


def refusal(model: nn.Module, source: Any, **options: Any) -> str:
    """The message, after checking that it is one line and that the model has not changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as error:
        load_weights(model, source, **options)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(error.value)


@pytest.mark.parametrize("version", [1, 2])
def test_everything_matches(version: int) -> None:
    source, target = random_swin(version), random_swin(version, seed=1)
    report = load_weights(target, source.state_dict())
    assert report.plain and report.share == 1 and set(report.matched) == set(source.state_dict())
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in source.state_dict().items())
    assert "100.00 %" in str(report) and "published Swin V" in str(report)


def test_a_classifier_of_other_classes_stays_fresh() -> None:
    """It does not count against the 99 %, and the report says so."""
    source, target = random_swin(num_classes=7), random_swin(seed=1)
    head = target.head.weight.clone()
    report = load_weights(target, source.state_dict())
    assert report.share == 1 and set(report.fresh) == {"head.weight", "head.bias"}
    assert "7 classes in the file, 5 in the model" in str(report)
    assert torch.equal(target.head.weight, head) and torch.equal(target.norm.weight, source.norm.weight)
    assert "head.weight" in refusal(target, source.state_dict(), reset_head="never")


def test_reset_head_always() -> None:
    source, target = random_swin(), random_swin(seed=1)
    head = target.head.weight.clone()
    report = load_weights(target, source.state_dict(), reset_head="always")
    assert torch.equal(target.head.weight, head) and "reset_head='always'" in str(report)


def test_headless_models_either_way() -> None:
    backbone, classifier = random_swin(num_classes=0), random_swin(seed=1)
    assert load_weights(classifier, backbone.state_dict()).fresh["head.bias"] == "new classifier: the file has none"
    assert "classifier (5 classes)" in load_weights(backbone, classifier.state_dict()).left_out[0]


def test_simmim_to_classifier_and_back() -> None:
    """Pre-training hands its encoder over; the decoder and mask token are left out on purpose."""
    pretrained = randomise(SimMIM(random_swin(num_classes=0), SimMIMConfig(mask_patch=8)), 3)
    classifier = random_swin(seed=1)
    report = load_weights(classifier, pretrained.state_dict())
    assert report.share == 1 and "mask token and decoder of masked image modelling (3 tensors)" in report.left_out
    assert not report.unexpected
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(classifier.forward_features(images), pretrained.encoder.forward_features(images))
    again = randomise(SimMIM(random_swin(num_classes=0), SimMIMConfig(mask_patch=8)), 4)
    token = again.mask_token.clone()
    report = load_weights(again, classifier.state_dict())
    assert set(report.fresh) == {"mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert torch.equal(again.mask_token, token)
    report = load_weights(again, pretrained.state_dict())
    assert report.plain and torch.equal(again.decoder[0].weight, pretrained.decoder[0].weight)


def test_rows_of_the_classifier() -> None:
    """Any of them in any order, one more than once; a row that is not there is named and nothing is loaded."""
    source, target = random_swin(), random_swin(seed=1, num_classes=4)
    report = load_weights(target, source.state_dict(), classes=[3, 3, 0, 1])
    assert torch.equal(target.head.weight, source.head.weight[[3, 3, 0, 1]]) and not report.fresh
    assert "4 of 5 classes" in str(report)
    assert "there is no class 5" in refusal(target, source.state_dict(), classes=[0, 1, 2, 5])
    assert "no classifier" in refusal(target, random_swin(num_classes=0).state_dict(), classes=[0])


def test_methods_by_name() -> None:
    """The loader is what ``transfer`` uses: geometric tables, and a stretched bias where that is asked for."""
    source, target = random_swin(1), random_swin(1, seed=1, window_size=7, img_size=56)
    assert "4×4 → 7×7, geometric" in str(load_weights(target, source.state_dict(), transfer="geometric"))
    source, target = random_swin(2), random_swin(2, seed=1, window_size=6, img_size=48)
    assert "transfer='stretch'" in refusal(target, source.state_dict(), config=source.config)
    assert load_weights(target, source.state_dict(), config=source.config, transfer="stretch").plain


def test_wrapped_models() -> None:
    """A task or a wrapper around the model is a target too; two models in one are ambiguous."""
    source = random_swin()
    target = nn.ModuleDict({"model": nn.Sequential(random_swin(seed=1))})
    load_weights(target, source.state_dict())
    assert torch.equal(target["model"][0].head.weight, source.head.weight)
    assert "holds 2 SwinTransformers" in refusal(nn.Sequential(random_swin(), random_swin()), source.state_dict())
    assert "holds 0 SwinTransformers" in refusal(nn.Linear(2, 2), source.state_dict())


def test_the_99_percent_rule() -> None:
    """R-CKPT-3: a nearly matching state passes above the limit and is refused below it."""
    source, target = random_swin(), random_swin(seed=1)
    state = dict(source.state_dict())
    del state["norm.bias"]
    report = load_weights(target, state)
    assert report.missing == ["norm.bias"] and 0.99 < report.share < 1 and "missing     norm.bias" in str(report)
    del state["layers.1.blocks.1.mlp.fc1.weight"]
    message = refusal(target, state)
    assert "layers.1.blocks.1.mlp.fc1.weight" in message and "% needed" in message
    report = load_weights(target, state, strict=False)
    assert report.share < 0.99 and len(report.missing) == 2
    assert load_weights(target, state, min_match=0.5).share == report.share


def test_the_message_says_what_the_file_is() -> None:
    message = refusal(random_swin(2, embed_dim=32), random_swin(1).state_dict())
    assert "a published Swin V1 with embed_dim 24, depths (2, 2)" in message
    assert "Swin V2 with embed_dim 32" in message and "file (24,), model (32,)" in message


def test_surplus_parameters_of_a_larger_model_are_an_error() -> None:
    """Every tensor of the small model is in the large one's file, and still it is another model; so is V1 for V2."""
    assert "no place for layers.1.blocks.2" in refusal(random_swin(), random_swin(depths=(2, 4)).state_dict())
    assert "enorm" in refusal(random_swin(), random_swin(main_norm_interval=2).state_dict())
    assert "no place for" in refusal(random_swin(2), random_swin(1).state_dict())
    assert "no place for" in refusal(random_swin(1), random_swin(2).state_dict())


def test_a_resnet_is_refused(tmp_path: Path) -> None:
    names = {"conv1.weight": (64, 3, 7, 7), "layer1.0.conv1.weight": (64, 64, 3, 3), "fc.weight": (10, 512)}
    path = tmp_path / "resnet.pth"
    torch.save({name: torch.zeros(shape) for name, shape in names.items()}, path)
    assert f"{path}: These are not the weights of a Swin" in refusal(random_swin(), path)
    with pytest.raises(UsageError, match=r"resnet\.pth: These are not the weights"):
        from_pretrained(path)


@pytest.mark.parametrize("how", ["repeat", "mean"])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9])
def test_equal_channels_give_the_features_of_the_rgb_model(channels: int, how: Any) -> None:
    """R-CHAN-1, ≤ 1e-5."""
    source, target = random_swin(), random_swin(seed=1, in_chans=channels)
    report = load_weights(target, source.state_dict(), in_chans_init=how)
    assert report.share == 1 and f"3 → {channels}" in report.reshaped["patch_embed.proj.weight"]
    grey = torch.randn(2, 1, 32, 32)
    want = source.forward_features(grey.expand(-1, 3, -1, -1))
    got = target.forward_features(grey.expand(-1, channels, -1, -1))
    assert ((got - want).norm() / want.norm()).item() <= 1e-5


def test_copied_and_random_channels() -> None:
    """R-CHAN-1: copy-rgb ignores the new channels at first; random keeps the model's own filters."""
    source, target = random_swin(), random_swin(seed=1, in_chans=5)
    own = target.patch_embed.proj.weight.clone()
    report = load_weights(target, source.state_dict(), in_chans_init="random")
    assert torch.equal(target.patch_embed.proj.weight, own) and "patch_embed.proj.weight" in report.fresh
    load_weights(target, source.state_dict(), in_chans_init="copy-rgb")
    images = torch.randn(2, 5, 32, 32)
    want = source.forward_features(images[:, :3])
    assert torch.allclose(target.forward_features(images), want, atol=1e-6)


def test_unknown_way_to_fill_channels() -> None:
    assert "repeat, mean, copy-rgb, random" in refusal(
        random_swin(in_chans=1), random_swin().state_dict(), in_chans_init="x"
    )


def test_model_on_meta() -> None:
    """The tensors of the file take the place of parameters without memory; what the file has not is an error, or stays."""
    whole = random_swin()
    with torch.device("meta"):
        model = SwinTransformer(whole.config)
    load_weights(model, whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    with torch.device("meta"):
        model = SwinTransformer(whole.config)
    headless = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(UsageError, match=r"on the meta device, and .* has no head\.weight"):
        load_weights(model, headless)
    with torch.device("meta"):
        model = SwinTransformer(whole.config)
    load_weights(model, headless, keep_meta=True)
    assert [name for name, p in model.named_parameters() if p.is_meta] == ["head.weight", "head.bias"]


def test_a_v2_bias_is_not_stretched_in_silence(tmp_path: Path) -> None:
    """R-RES-2: a directory records the windows; a model that would read its bias on another scale is refused."""
    save_pretrained(random_swin(2, window_size=4), tmp_path)
    wider = random_swin(2, seed=1, window_size=8, img_size=64)
    message = refusal(wider, tmp_path)
    assert "pretrained_window_sizes=((4, 4), (4, 4))" in message and "transfer_config" in message
    load_weights(wider, tmp_path, transfer=False)
    load_weights(random_swin(2, window_size=8, img_size=64, pretrained_window_sizes=((4, 4), (4, 4))), tmp_path)


def test_a_record_that_contradicts_its_tensors() -> None:
    message = refusal(random_swin(1), random_swin(1).state_dict(), config=random_swin(1, window_size=3).config)
    assert "does not belong to the recorded configuration" in message


# --- infer_config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 1},
        {"version": 1, "window_size": ((4, 4), (2, 2)), "img_size": 16},
        {"version": 1, "ape": True, "in_chans": 1, "num_classes": 0},
        {"version": 1, "patch_norm": False, "qkv_bias": False, "mlp_ratio": 2.0, "patch_size": 2, "img_size": 16},
        {"version": 2, "main_norm_interval": 2, "depths": (1, 2, 3), "num_heads": (1, 2, 4), "img_size": 64},
        {"version": 2, "num_heads": (3, 6), "in_chans": 9, "patch_size": (4, 2), "img_size": (32, 16)},
    ],
)
def test_inferred_configurations(fields: dict[str, Any]) -> None:
    """R-CKPT-6: tensors alone say what the model is; V2 windows are the exception, with a warning."""
    model = random_swin(**fields)
    if model.config.version == 2:
        with pytest.warns(UserWarning, match="windows of this Swin V2 are not stored"):
            infer_config(model.state_dict())
        assert infer_config(model.state_dict(), window_size=4) == model.config
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert infer_config(model.state_dict()) == model.config


def test_rectangular_windows_are_asked_for() -> None:
    state = random_swin(1, window_size=(2, 4)).state_dict()
    with pytest.raises(UsageError, match="not square: pass window_size"):
        infer_config(state)
    assert infer_config(state, window_size=(2, 4)).window_size == ((2, 4), (2, 4))
