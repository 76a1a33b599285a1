"""``swinscale convert`` and ``info`` with segmenters: whole to other projects and back, or their backbone alone (R-CKPT-2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openmmlab_files import dense_backbone, filled, upernet_shapes
from random_models import randomise
from small_detectors import DENSE, PAD
from swinscale.cli import main
from swinscale.convert import convert
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import Segmenter
from swinscale.info import info
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.segmentation import load_segmentation, segmentation_config
from swinscale.tasks.segment import Segment
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import from_pretrained, read_config, read_metadata, read_state_dict
from swinscale.weights.segmenters import segmenter_to_mm, segmenter_to_transformers

NAMES = ["ant", "bee", "cat"]
LABELS = {"ignore_index": 254, "reduce_zero_label": True}
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": NAMES, "colours": None, "labels": LABELS}
NARROW: dict[str, Any] = {"channels": 16, "aux_channels": 8}


def run(path: Path, version: int = 1, swin: dict[str, Any] | None = None, **options: Any) -> Segment:
    """A random segmenter of three classes, as a run writes it into ``path``."""
    config = SwinConfig(**{**DENSE, "version": version, "pad": PAD[version], "window_size": 8, **(swin or {})})
    model = randomise(Segmenter(SwinTransformer(config), 3, SegmentConfig(**{**NARROW, **options})))
    task = Segment(model, NAMES, dict(PREPROCESSING))
    task.save_pretrained(path)
    return task


def assert_same(model: torch.nn.Module, path: Path) -> None:
    expected, found = model.state_dict(), read_state_dict(path)[0]
    assert set(expected) == set(found) and all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.mark.parametrize(
    ("version", "to", "aux"),
    [(1, "official", 0.4), (1, "mm", 0.4), (2, "mm", 0.4), (1, "official", 0.0), (1, "hf", 0.4), (1, "hf", 0.0)],
)
@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_a_segmenter_comes_back_whole(
    version: int, to: str, aux: float, extension: str, tmp_path: Path, capsys: Any
) -> None:
    """To other names and back to ours by the command line: every bit, the classes, and a note about the rest."""
    task = run(tmp_path / "ours", version, aux_weight=aux, test_short=96)
    there, back = tmp_path / ("there" if to == "hf" else f"segmenter.{extension}"), tmp_path / "back"
    assert main(["convert", str(tmp_path / "ours"), str(there), "--to", to]) == 0
    printed = capsys.readouterr().out
    assert "bit-equal" in printed and "UPerNet, 3 classes" in printed
    assert "decode_head.fpn_bottleneck.conv.weight" in read_state_dict(there)[0]
    recorded = to != "hf" and extension == "safetensors"
    assert ("does not hold these settings" in printed) == (not recorded)
    assert recorded or ("task.test_short=96" in printed and "bee" not in printed and "model.pad" not in printed)
    assert ("data.labels.ignore_index=254" in printed) == (to != "hf" and extension == "pth")
    assert main(["convert", str(there), str(back), "--to", "swinscale"]) == 0
    assert_same(task.model, back)
    record = read_metadata(back)
    assert record["task"]["name"] == "segment" and record["preprocessing"]["classes"] == NAMES
    kept = to == "hf" or recorded
    assert record["preprocessing"]["mean"] == ([0.5] * 3 if kept else [0.485, 0.456, 0.406])
    assert (record["preprocessing"]["labels"] == LABELS) == kept
    assert record["task"]["aux_weight"] == aux and record["task"]["test_short"] == (96 if recorded else 512)
    pipeline = load_segmentation(back)
    assert pipeline.classes == NAMES
    assert read_config(back).stage_windows == task.backbone.config.stage_windows  # type: ignore[union-attr]
    assert all(torch.equal(t, task.model.state_dict()[n]) for n, t in pipeline.task.model.state_dict().items())


def test_transformers_loads_the_directory(tmp_path: Path) -> None:
    """AutoModelForSemanticSegmentation and the image processor, without a word about names; the same logits."""
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    task = run(tmp_path / "ours", pool_scales=(1, 2, 4), aux_weight=0.3)
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    theirs, told = transformers.AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(told.values()), told
    images = torch.randn(1, 3, 131, 98)
    with torch.no_grad():
        expected = task.eval().model(images)
        assert (theirs.eval()(images).logits - expected).norm() <= 1e-5 * expected.norm()
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.auxiliary_loss_weight == 0.3
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == [0.5] * 3 and processor.do_reduce_labels and processor.size["height"] == 64
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    kept = json.loads(theirs.config.to_json_string(use_diff=False))
    assert {n: written[n] for n in written if n != "backbone_config"} == {
        n: kept[n] for n in written if n != "backbone_config"
    }
    inside = written["backbone_config"]
    assert inside == {name: kept["backbone_config"][name] for name in inside}
    config, options, preprocessing = segmentation_config(tmp_path / "hf")
    assert config == task.backbone.config
    assert (options.pool_scales, options.aux_weight, preprocessing["labels"]) == ((1, 2, 4), 0.3, LABELS)


def test_a_directory_of_transformers_goes_to_openmmlab(tmp_path: Path) -> None:
    """What transformers itself wrote, with a norm that nothing reads, which a line says."""
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    stages = [f"stage{i + 1}" for i in range(4)]
    shape = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 7}
    backbone = transformers.SwinConfig(**shape, out_features=stages)
    config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3)
    model = randomise(transformers.UperNetForSemanticSegmentation(config))
    model.save_pretrained(tmp_path / "hf")
    lines = convert(tmp_path / "hf", tmp_path / "w.pth", "official")
    assert any("left out: layernorm" in line for line in lines)
    state, beside = read_state_dict(tmp_path / "w.pth")
    assert beside["classes"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert torch.equal(state["decode_head.conv_seg.bias"], model.decode_head.classifier.bias)
    assert torch.equal(state["backbone.norm3.weight"], model.backbone.hidden_states_norms["stage4"].weight)


def test_a_published_file_has_the_classes_of_ade20k(tmp_path: Path) -> None:
    """150 classes without names, in whose maps 0 is what has no class; others are numbered."""
    shapes = dense_backbone(8, (1, 1, 1, 1), (1, 1, 2, 2), 7)
    for classes, first in ((150, "wall"), (4, "class 0")):
        heads = upernet_shapes([8, 16, 32, 64], 16, classes, aux=8)
        torch.save({"state_dict": filled(shapes | heads)}, tmp_path / "w.pth")
        convert(tmp_path / "w.pth", tmp_path / "out", "swinscale")
        preprocessing = read_metadata(tmp_path / "out")["preprocessing"]
        assert preprocessing["classes"][0] == first and len(preprocessing["classes"]) == classes
        assert preprocessing["labels"]["reduce_zero_label"] == (classes == 150)


def test_openmmlab_finds_classes_and_colours(tmp_path: Path) -> None:
    """Where its own inference looks for them; colours are not among what is lost."""
    task = run(tmp_path / "ours")
    task.preprocessing["colours"] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    task.save_pretrained(tmp_path / "ours")
    lines = convert(tmp_path / "ours", tmp_path / "w.pth", "mm")
    meta = torch.load(tmp_path / "w.pth", weights_only=True)["meta"]
    assert meta == {"CLASSES": NAMES, "PALETTE": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    assert not any("colours" in line for line in lines)


def test_a_segmenter_with_another_window(tmp_path: Path) -> None:
    """--window transfers the backbone, as load_segmentation does; the heads stay."""
    task = run(tmp_path / "ours", version=2)
    convert(tmp_path / "ours", tmp_path / "wide", "swinscale", window_size=16)
    wide, expected = load_segmentation(tmp_path / "wide"), load_segmentation(tmp_path / "ours", window_size=16)
    assert wide.task.backbone.config == expected.task.backbone.config
    states = wide.task.state_dict(), expected.task.state_dict()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    name = "model.decode.predict.weight"
    assert torch.equal(states[0][name], task.state_dict()[name])


@pytest.mark.parametrize(
    ("version", "options", "arguments", "words"),
    [
        (1, {}, ["out", "--to", "timm"], "choose mm, official, hf or swinscale, or pass --encoder"),
        (1, {}, ["w.pth", "--to", "torchvision"], "pass --encoder"),
        (2, {}, ["w.pth", "--to", "official"], "has no Swin V2"),
        (2, {}, ["out", "--to", "hf"], "the Swin V2 backbone of transformers has no norms after its stages"),
        (1, {"aux_stage": 1}, ["out", "--to", "hf"], "its auxiliary head reads stage 2"),
        (1, {}, ["w.pth", "--to", "mm", "--img-size", "64"], "--img-size: a segmenter"),
    ],
)
def test_a_segmenter_is_never_cut_down_in_silence(
    version: int, options: dict[str, Any], arguments: list[str], words: str, tmp_path: Path, capsys: Any
) -> None:
    run(tmp_path / "ours", version, **options)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / arguments[0]).exists()


def test_padding_that_transformers_does_otherwise_is_said(tmp_path: Path) -> None:
    """A V1 segmenter trained without the published padding: outputs differ there, and a line says it."""
    run(tmp_path / "ours", swin={"pad": "exact"})
    assert any("model.pad=exact" in line for line in convert(tmp_path / "ours", tmp_path / "hf", "hf"))


@pytest.mark.parametrize("whose", ["ours", "mm", "hf"])
def test_the_backbone_of_a_segmenter_alone(whose: str, tmp_path: Path) -> None:
    """--encoder says that the heads stay behind, and what is written claims to be no segmenter."""
    task = run(tmp_path / "ours")
    source = {"ours": "ours", "mm": "w.pth", "hf": "hf"}[whose]
    if whose != "ours":
        convert(tmp_path / "ours", tmp_path / source, whose)
    lines = convert(tmp_path / source, tmp_path / "backbone", "swinscale", encoder=True)
    assert any("left out" in line and "decode" in line for line in lines), lines
    assert "task" not in read_metadata(tmp_path / "backbone")
    model = from_pretrained(tmp_path / "backbone")
    assert all(torch.equal(tensor, task.backbone.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_segmenter_whose_windows_nobody_knows_is_refused(tmp_path: Path) -> None:
    """A V2 file without coordinates whose name says nothing; a name that says it is enough."""
    state = segmenter_to_mm(run(tmp_path / "ours", version=2).model.state_dict(), "mm")
    for name in ("mine.pth", "upernet_swinv2_window8.pth"):
        torch.save({"state_dict": state}, tmp_path / name)
    with pytest.raises(UsageError, match="does not say its windows"):
        convert(tmp_path / "mine.pth", tmp_path / "out", "swinscale")
    convert(tmp_path / "upernet_swinv2_window8.pth", tmp_path / "out", "swinscale")
    assert set(read_config(tmp_path / "out").stage_windows) == {(8, 8)}  # type: ignore[union-attr]


def test_a_segmenter_is_described(tmp_path: Path, capsys: Any) -> None:
    """OpenMMLab's file, transformers' directory and ours: the parts, and whose parameters are counted."""
    task = run(tmp_path / "ours")
    torch.save({"meta": {}, "state_dict": segmenter_to_mm(task.model.state_dict(), "mm")}, tmp_path / "mm.pth")
    torch.save(segmenter_to_transformers(task.model.state_dict()), tmp_path / "hf.pth")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    count = sum(t.numel() for t in task.backbone.state_dict().values())
    for name, layout in (("ours", "official"), ("mm.pth", "mm"), ("hf", "transformers"), ("hf.pth", "transformers")):
        assert main(["info", str(tmp_path / name)]) == 0
        text = capsys.readouterr().out
        assert f"({layout})" in text and f"{count:,} (float32) in the backbone" in text
        assert (
            "semantic segmentation: UPerNet, 3 classes, 16 channels, 4 pooled maps, auxiliary head of 8 channels on"
            in text
        )
    assert "mean [0.5, 0.5, 0.5]" in info(tmp_path / "hf") and "not recorded" in info(tmp_path / "mm.pth")
