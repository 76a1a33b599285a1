"""Segmenters of transformers into ours and back: the same numbers, bit for bit, directories, what is refused (R-CKPT-1, 2, 3; R-DOWN-3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmmlab_files import assert_same, refusal
from random_models import random_swin, randomise
from small_detectors import small_detector
from small_segmenters import DEPTHS, FIELDS, HEADS, four_stages
from swinscale.data import decode_image
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import Segmenter
from swinscale.models import SwinTransformer
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import load_detector, load_weights, read_config, read_metadata, read_state_dict
from swinscale.weights.files import write_safetensors
from swinscale.weights.segmenters import (
    describe_segmenter,
    load_segmenter,
    segmenter_to_transformers,
)

PHOTO = (
    Path(__file__).parents[2] / "shared" / "data" / "ade20k-sample" / "sampleData" / "images" / "ADE_val_00000001.jpg"
)


@pytest.fixture(scope="module")
def transformers() -> Any:
    ensure_torchvision()
    return pytest.importorskip("transformers")


def statistics(model: nn.Module, seed: int = 1) -> Any:
    """Running means and variances that are not those of a new norm; and the model."""
    draw = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=draw)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=draw)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    return model


def theirs(transformers: Any, version: int = 1, classes: int = 5, **fields: Any) -> Any:
    """A random UPerNet of transformers."""
    kind = transformers.SwinConfig if version == 1 else transformers.Swinv2Config
    stages = [f"stage{i + 1}" for i in range(4)]
    same = {"embed_dim": 8, "depths": list(DEPTHS), "num_heads": list(HEADS), "window_size": 7, "image_size": 64}
    config = transformers.UperNetConfig(
        backbone_config=kind(**same, out_features=stages),
        hidden_size=16,
        auxiliary_channels=8,
        id2label={i: f"name {i}" for i in range(classes)},
        **fields,
    )
    return statistics(randomise(transformers.UperNetForSemanticSegmentation(config), 4))


def built(place: Path, classes: int = 5) -> Segmenter:
    """A segmenter of ours as the directory says it."""
    options = {name: value for name, value in read_metadata(place)["task"].items() if name != "name"}
    config = read_config(place)
    assert config is not None
    options["pool_scales"] = tuple(options["pool_scales"])
    return randomise(Segmenter(SwinTransformer(config), classes, SegmentConfig(**options)), 2)


def inputs() -> list[Tensor]:
    """Whole windows; odd sides that are padded everywhere; a map smaller than a window; and a photo where there is one."""
    images = [torch.randn(2, 3, 224, 224), torch.randn(1, 3, 131, 98), torch.randn(1, 3, 33, 47)]
    if PHOTO.is_file():
        photo = decode_image(PHOTO.read_bytes(), PHOTO.name, 3)[None] / 255
        images.append(F.interpolate(photo, (150, 201), mode="bilinear", antialias=True) * 4 - 2)
    return images


@pytest.mark.parametrize("auxiliary", [True, False])
def test_transformers_and_ours_give_the_same(auxiliary: bool, transformers: Any, tmp_path: Path) -> None:
    """R-DOWN-3: a directory of transformers in ours, and ours in transformers, of any size, relative error ≤ 1e-5."""
    model = theirs(transformers, use_auxiliary_head=auxiliary)
    model.save_pretrained(tmp_path / "theirs")
    ours = built(tmp_path / "theirs")
    report = load_segmenter(ours, tmp_path / "theirs")
    assert report.plain and report.share == 1 and "transformers Swin V1" in report.looks_like
    assert set(report.matched) == set(ours.state_dict()) and (ours.auxiliary is not None) == auxiliary
    with torch.no_grad():
        for images in inputs():
            maps = ours.body(images)
            assert error(ours(images), model(images).logits) <= 1e-5
            if ours.auxiliary is not None:
                assert error(ours.auxiliary(maps[2]), model.auxiliary_head(maps)) <= 1e-5
    other = four_stages(seed=6, swin={"pad": "legacy", "small_map": "pad"}, aux_weight=0.4 * auxiliary)
    statistics(other, 3)
    (tmp_path / "ours").mkdir()
    write_safetensors(tmp_path / "ours" / "model.safetensors", segmenter_to_transformers(dict(other.state_dict())))
    (tmp_path / "ours" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    back, told = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        for images in inputs():
            assert error(back.eval()(images).logits, other(images)) <= 1e-5


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and b.norm() > 1
    return ((a - b).norm() / b.norm()).item()


def test_transformers_comes_back_bit_for_bit(transformers: Any, tmp_path: Path) -> None:
    """R-CKPT-2: the file but for the norm that its backbone does not read; names in memory (release 5) load as well."""
    model = theirs(transformers)
    model.save_pretrained(tmp_path)
    file = read_state_dict(tmp_path)[0]
    spare = {name for name in file if name.startswith("backbone.swin.layernorm.")}
    for source in (tmp_path, dict(model.state_dict())):
        ours = built(tmp_path)
        report = load_segmenter(ours, source)
        assert report.plain and (not spare or "this backbone reads the norms after its stages" in str(report))
        written = segmenter_to_transformers(dict(ours.state_dict()))
        assert_same(written, {name: tensor for name, tensor in file.items() if name not in spare})
    assert torch.equal(ours.body.norms["1"].weight, file["backbone.hidden_states_norms.stage2.weight"])
    assert torch.equal(ours.backbone.norm.weight, file["backbone.hidden_states_norms.stage4.weight"])


def test_a_directory_of_transformers_says_what_it_is(transformers: Any, tmp_path: Path) -> None:
    """Backbone, classes, options, how pictures become inputs: as our own checkpoints record it."""
    model = theirs(transformers, pool_scales=[1, 2, 4], auxiliary_loss_weight=0.3, loss_ignore_index=254)
    model.save_pretrained(tmp_path)
    size = {"size": {"height": 512, "width": 512}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**size, "do_reduce_labels": True}))
    config, metadata = read_config(tmp_path), read_metadata(tmp_path)
    assert config is not None and (config.pad, config.small_map, config.num_classes) == ("legacy", "pad", 0)
    assert (config.embed_dim, config.depths, config.window_size[0]) == (8, DEPTHS, (7, 7))
    assert metadata["task"] == {"name": "segment", "channels": 16, "pool_scales": [1, 2, 4], "aux_channels": 8, "aux_stage": 2,
                                "aux_weight": 0.3}  # fmt: skip
    assert metadata["preprocessing"] == {
        "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "classes": [f"name {i}" for i in range(5)], "colours": None,
        "labels": {"ignore_index": 254, "reduce_zero_label": True},
    }  # fmt: skip
    load_segmenter(built(tmp_path), tmp_path)
    assert describe_segmenter(read_state_dict(tmp_path)[0]).startswith("UPerNet, 5 classes, 16 channels, 3 pooled maps")


def test_the_v2_backbone_of_transformers_is_refused_with_its_reason(transformers: Any) -> None:
    """Its maps have no norms; the backbone alone can be had, and ours cannot be written for it."""
    file = dict(theirs(transformers, 2).state_dict())
    model = four_stages(version=2)
    message = refusal(load_segmenter, model, file)
    assert "has no norms after its stages" in message and "0 in the file, 3 in the model" in message
    report = load_segmenter(model, file, heads=False)
    assert not report.mismatched and set(report.missing) == {
        f"body.backbone.norm.{leaf}" for leaf in ("weight", "bias")
    }
    with pytest.raises(UsageError, match="transformers cannot hold this model: the Swin V2 backbone"):
        segmenter_to_transformers(dict(model.state_dict()))


def test_the_backbone_of_transformers_serves_alone(transformers: Any, tmp_path: Path) -> None:
    """A classifier gets backbone and last norm of the UPerNet, a detector the norms of the stages too."""
    theirs(transformers).save_pretrained(tmp_path)
    file = read_state_dict(tmp_path)[0]
    classifier = random_swin(1, **{**FIELDS, "small_map": "pad"})
    report = load_weights(classifier, tmp_path)
    assert report.share == 1 and not report.unexpected and not report.missing
    assert torch.equal(classifier.norm.bias, file["backbone.hidden_states_norms.stage4.bias"])
    detector = small_detector(backbone={**FIELDS})
    report = load_detector(detector, tmp_path)
    assert report.share == 1 and not any(name.startswith("body.") for name in report.fresh)
    assert torch.equal(detector.body.norms["0"].weight, file["backbone.hidden_states_norms.stage1.weight"])
