"""``swinscale convert``: what it writes is what the other projects load, and nothing changes on the way (R-CKPT-2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from random_models import random_swin, randomise
from small_detectors import small_detector
from swinscale.cli import main
from swinscale.convert import convert, read_source
from swinscale.detection import load_detection
from swinscale.errors import UsageError
from swinscale.models import SwinTransformer
from swinscale.tasks.detect import Detect
from swinscale.tasks.simmim import SimMIM, SimMIMConfig
from swinscale.torchvision_cpu import ensure_torchvision
from swinscale.weights import (
    convert_state_dict,
    from_pretrained,
    load_weights,
    read_config,
    read_metadata,
    read_state_dict,
    save_pretrained,
)

PREPROCESSING = {"img_size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "crop_ratio": 0.9}
PREPROCESSING |= {"classes": ["ant", "bee", "cat", "dog", "elk"]}
OUTPUTS = {
    "hf": "out",
    "timm": "out",
    "swinscale": "out",
    "torchvision": "w.pth",
    "official": "w.pth",
    "mm": "w.pth",
}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(images)
    return getattr(out, "logits", out)


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    """Writes a random model as a directory of ours: (model, directory)."""

    def write(version: int = 2, **fields: Any) -> tuple[SwinTransformer, Path]:
        model = random_swin(version, **fields)
        metadata = {"preprocessing": PREPROCESSING} if model.num_classes == 5 else None
        save_pretrained(model, tmp_path / "ours", metadata=metadata)
        return model, tmp_path / "ours"

    return write


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("to", OUTPUTS)
def test_everything_comes_back(to: str, version: int, ours: Any, tmp_path: Path, capsys: Any) -> None:
    """There and back again by the command line: every bit, and the configuration."""
    model, directory = ours(version)
    there, back = tmp_path / OUTPUTS[to], tmp_path / "back"
    assert main(["convert", str(directory), str(there), "--to", to]) == 0
    assert "bit-equal" in capsys.readouterr().out
    assert main(["convert", str(there), str(back), "--to", "swinscale"]) == 0  # V2 files store coordinates: no --window
    expected, found = model.state_dict(), read_state_dict(back)[0]
    assert set(expected) == set(found) and all(torch.equal(expected[n], found[n]) for n in expected)
    assert read_config(back) == model.config


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_loads_the_directory(version: int, ours: Any, tmp_path: Path) -> None:
    """AutoModelForImageClassification, the backbone and the image processor, without a word about names."""
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    trained = {"pretrained_window_sizes": ((3, 3), (2, 2))} if version == 2 else {}
    model, directory = ours(version, **trained)
    convert(directory, tmp_path / "hf", "hf")
    images = torch.randn(2, 3, 32, 32)
    theirs, told = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(told.values()), told
    assert relative_error(logits(theirs, images), logits(model, images)) <= 1e-5
    assert theirs.config.id2label[1] == "bee" and theirs.config.label2id["elk"] == 4
    kind = transformers.SwinBackbone if version == 1 else transformers.Swinv2Backbone  # AutoBackbone asks the Hub
    backbone = kind.from_pretrained(tmp_path / "hf", out_features=["stage1"]).eval()
    with torch.no_grad():  # its first stage is ours, before the norm that the backbone of V1 adds
        mine = model.forward_intermediates(images, intermediates_only=True)[0]
        there = backbone(images).feature_maps[0]
    norm = backbone.hidden_states_norms["stage1"] if version == 1 else torch.nn.Identity()
    assert relative_error(norm(mine.movedim(1, -1)).movedim(-1, 1), there) <= 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == PREPROCESSING["mean"] and processor.size["height"] == 32
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    kept = json.loads(theirs.config.to_json_string(use_diff=False))
    ours_too = set(written) - {"torch_dtype", "architectures", "num_layers"}
    assert {n: written[n] for n in ours_too} == {n: kept[n] for n in ours_too}


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_without_a_classifier(version: int, ours: Any, tmp_path: Path) -> None:
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    model, directory = ours(version, num_classes=0)
    convert(directory, tmp_path / "hf", "hf")
    theirs, told = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(theirs.eval()(images).pooler_output, model(images)) <= 1e-5
    assert read_config(tmp_path / "hf") == model.config


@pytest.mark.parametrize("version", [1, 2])
def test_simmim_goes_to_transformers_and_back(version: int, tmp_path: Path) -> None:
    """ForMaskedImageModeling gives our reconstruction; --to official and --to swinscale keep mask token and decoder."""
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    task = randomise(SimMIM(random_swin(version, num_classes=0), SimMIMConfig(mask_patch=8)), 1)
    task.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    theirs, told = transformers.AutoModelForMaskedImageModeling.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(told.values()), told
    images, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 8, 8) < 0.5
    with torch.no_grad():
        there, here = theirs.eval()(images, bool_masked_pos=mask.flatten(1)), task.reconstruct(images, mask)
    assert relative_error(there.reconstruction, here.prediction) <= 1e-5
    convert(tmp_path / "hf", tmp_path / "official.pth", "official")
    convert(tmp_path / "hf", tmp_path / "back", "swinscale")
    found = read_state_dict(tmp_path / "back")[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in task.state_dict().items())
    assert "encoder.mask_token" in torch.load(tmp_path / "official.pth")["model"]
    assert read_metadata(tmp_path / "back")["task"]["name"] == "simmim"
    with pytest.raises(UsageError, match="pass --encoder"):
        convert(tmp_path / "ours", tmp_path / "timm", "timm")
    convert(tmp_path / "ours", tmp_path / "timm", "timm", encoder=True)
    assert not any("decoder" in name or "mask" in name for name in read_state_dict(tmp_path / "timm")[0])


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        (1, {}),
        (2, {}),
        (2, {"pretrained_window_sizes": ((3, 3), (2, 2))}),
        (1, {"window_size": ((4, 2), (2, 4)), "img_size": (32, 64)}),
        (2, {"in_chans": 4, "qkv_bias": False, "mlp_ratio": 2.0}),
        (2, {"depths": (2, 1, 2), "num_heads": (2, 4, 8), "window_size": 8, "num_classes": 3}),
    ],
)
def test_timm_loads_the_directory(version: int, fields: dict[str, Any], ours: Any, tmp_path: Path) -> None:
    """``timm.create_model("local-dir:…", pretrained=True)`` gives our logits, with windows that shrink in late stages."""
    ensure_torchvision()
    timm = pytest.importorskip("timm")
    model, directory = ours(version, **fields)
    convert(directory, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    images = torch.randn(2, model.config.in_chans, *model.config.img_size)
    assert relative_error(logits(theirs, images), logits(model, images)) <= 1e-5
    assert read_config(tmp_path / "timm") == model.config
    if model.num_classes == 5:
        assert theirs.pretrained_cfg["mean"] == PREPROCESSING["mean"] and theirs.pretrained_cfg["crop_pct"] == 0.9
        assert read_metadata(tmp_path / "timm")["preprocessing"]["classes"] == PREPROCESSING["classes"]


def test_published_names_become_timm_models(tmp_path: Path) -> None:
    """The names of Swin that timm has are recorded as such, so that its own pages and scripts apply."""
    from swinscale.models import create_model
    from swinscale.weights.peer_records import TIMM_MODELS, timm_record

    ensure_torchvision()
    timm = pytest.importorskip("timm")
    assert set(TIMM_MODELS) <= set(timm.list_models("swin*"))
    for name in TIMM_MODELS:
        with torch.device("meta"):
            config = create_model(name).config
        assert timm_record(config, {})["architecture"] == name


@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_torchvision_loads_the_file(extension: str, ours: Any, tmp_path: Path) -> None:
    ensure_torchvision()
    from torchvision.models import swin_transformer as tv

    model, directory = ours(1)
    path = tmp_path / f"tv.{extension}"
    convert(directory, path, "torchvision")
    theirs = tv.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)
    theirs.load_state_dict(read_state_dict(path)[0], strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert relative_error(logits(theirs, images), logits(model, images)) <= 1e-5


def test_video_files(tmp_path: Path) -> None:
    """--to torchvision and --to mm choose the video layout by themselves."""
    config = {"patch_size": (2, 4, 4), "img_size": (8, 32, 32), "window_size": (4, 4, 4)}
    model = random_swin(1, **config)
    save_pretrained(model, tmp_path / "ours")
    for to, layout in (("torchvision", "torchvision-video"), ("mm", "mm-video"), ("official", "official-video")):
        convert(tmp_path / "ours", tmp_path / f"{to}.pth", to)
        source = read_source(tmp_path / f"{to}.pth")
        assert source.layout == layout and source.config == model.config and source.windows_from == "tensors"


@pytest.mark.parametrize("version", [1, 2])
def test_another_window_on_the_way(version: int, ours: Any, tmp_path: Path) -> None:
    """--window and --img-size transfer first, as from_pretrained does."""
    _, directory = ours(version)
    convert(directory, tmp_path / "timm", "timm", img_size=64, window_size=8)
    there = from_pretrained(tmp_path / "timm")
    expected = from_pretrained(directory, img_size=64, window_size=8)
    images = torch.randn(1, 3, 64, 64)
    assert there.config.trained_windows == expected.config.trained_windows
    assert relative_error(logits(there, images), logits(expected, images)) <= 1e-6


def test_windows_that_no_one_knows(ours: Any, tmp_path: Path) -> None:
    """A V2 file without buffers under a name that says nothing: refused, unless --window says it."""
    model, _ = ours(2, window_size=8, img_size=64)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"does not say its windows.*--window"):
        convert(tmp_path / "weights.pth", tmp_path / "timm", "timm")
    convert(tmp_path / "weights.pth", tmp_path / "timm", "timm", window_size=8, img_size=64)
    assert read_config(tmp_path / "timm") == model.config
    convert(tmp_path / "weights.pth", tmp_path / "again.pth", "official")  # holds no windows either


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_numbers_stays(dtype: torch.dtype, ours: Any, tmp_path: Path) -> None:
    model, _ = ours(2)
    save_pretrained(model.to(dtype), tmp_path / "half")
    for to in ("hf", "swinscale"):
        convert(tmp_path / "half", tmp_path / to, to)
        assert {t.dtype for t in read_state_dict(tmp_path / to)[0].values()} == {dtype}


@pytest.mark.parametrize(
    ("fields", "to", "words"),
    [
        ({"version": 1, "window_size": ((4, 4), (2, 2))}, "hf", "would build windows 4×4, 4×4"),
        ({"version": 2, "window_size": ((4, 2), (4, 2))}, "hf", "its windows are square"),
        ({"version": 2, "window_size": ((4, 2), (4, 2))}, "mm", "its windows are square"),
        ({"version": 2, "main_norm_interval": 2}, "hf", "main_norm_interval"),
        ({"version": 1, "patch_norm": False}, "timm", "patch_norm=False"),
        ({"version": 1, "qkv_bias": False}, "torchvision", "qkv_bias=False"),
        ({"version": 2, "img_size": 30}, "timm", "pass --img-size"),
        ({"version": 2, "small_map": "pad", "window_size": 8}, "timm", "would build windows 8×8, 4×4"),
        ({"version": 2, "window_size": ((4, 4), (2, 2))}, "torchvision", "one window for all stages"),
        ({"version": 1, "patch_size": (2, 4, 4), "img_size": (8, 32, 32), "window_size": 4}, "hf", "video"),
    ],
)
def test_what_cannot_be_held_is_refused(
    fields: dict[str, Any], to: str, words: str, ours: Any, tmp_path: Path, capsys: Any
) -> None:
    _, directory = ours(**fields)
    out = tmp_path / OUTPUTS[to]
    assert main(["convert", str(directory), str(out), "--to", to]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not out.exists()


def test_windows_per_stage_reach_transformers_where_it_shrinks_them(ours: Any, tmp_path: Path) -> None:
    """V2 of transformers shrinks a window to its map, as ours does: 8 and 4 at 32 pixels are one setting there."""
    model, directory = ours(2, window_size=8)
    convert(directory, tmp_path / "hf", "hf")
    assert read_config(tmp_path / "hf") == model.config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["IN", "out", "--to", "keras"], "choose one of timm, hf"),
        (["IN", "out.pth", "--to", "hf"], "reads a directory"),
        (["IN", "out", "--to", "official"], "reads one file"),
        (["IN", "IN", "--to", "swinscale"], "where the weights are read from"),
        (["IN", "full", "--to", "timm"], "other files in it"),
        (["missing", "out", "--to", "timm"], "no file or directory"),
        (["IN", "out"], "--to"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], words: str, ours: Any, tmp_path: Path, capsys: Any) -> None:
    _, directory = ours(1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    places = {"IN": directory, **{n: tmp_path / n for n in ("out", "out.pth", "full", "missing")}}
    assert main(["convert", *(str(places.get(a, a)) for a in arguments)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_left_out_is_said(ours: Any, tmp_path: Path) -> None:
    """The heads of a detector do not reach the other side, and a line says so."""
    model, _ = ours(1, num_classes=0)
    state = convert_state_dict(model.state_dict(), "mm") | {"roi_head.bbox_head.0.fc_cls.weight": torch.zeros(3, 8)}
    torch.save({"state_dict": state}, tmp_path / "detector.pth")
    lines = convert(tmp_path / "detector.pth", tmp_path / "timm", "timm", encoder=True)
    assert any("left out: 1 tensors" in line and "roi_head" in line for line in lines)
    assert load_weights(SwinTransformer(model.config), tmp_path / "timm").plain


@pytest.mark.parametrize(
    ("pad", "to", "differs"), [("exact", "hf", True), ("legacy", "hf", False), ("legacy", "timm", True)]
)
def test_padding_that_others_do_otherwise_is_said(pad: str, to: str, differs: bool, ours: Any, tmp_path: Path) -> None:
    """At 40 pixels the maps are 10 and 5 tokens wide, windows 4: outputs differ exactly where a line says so."""
    ensure_torchvision()
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    model, directory = ours(1, img_size=40, pad=pad)
    lines = convert(directory, tmp_path / "out", to)
    assert any("not whole windows" in line for line in lines) == differs
    if to == "hf":
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    else:
        theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = torch.randn(1, 3, 40, 40)
    assert (relative_error(logits(theirs, images), logits(model, images)) > 1e-3) == differs


def test_a_record_that_does_not_belong_is_refused(ours: Any, tmp_path: Path) -> None:
    """A config.json of another model, and weights that lack a part which others would fill with fresh values."""
    model, directory = ours(1)
    convert(directory, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "mlp_ratio": 2.0}))
    with pytest.raises(UsageError, match=r"recorded beside it: 12 tensors differ, .*mlp\.fc1\.bias \(file \(96,\)"):
        convert(tmp_path / "hf", tmp_path / "timm", "timm")
    torch.save({n: t for n, t in model.state_dict().items() if not n.startswith("norm.")}, tmp_path / "features.pth")
    with pytest.raises(UsageError, match=r"2 tensors differ, the first is norm\.bias \(file none"):
        convert(tmp_path / "features.pth", tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


def test_windows_of_the_name_are_said(tmp_path: Path) -> None:
    shape = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 256, "window_size": 16}
    model = random_swin(2, **shape, pretrained_window_sizes=(12, 12, 12, 6))
    torch.save(model.state_dict(), tmp_path / "swinv2_mine_window12to16_192to256.pth")
    lines = convert(tmp_path / "swinv2_mine_window12to16_192to256.pth", tmp_path / "timm", "timm")
    assert "  windows 16×16 16×16 16×16 8×8, as the name says; the tensors do not store them" in lines
    assert read_config(tmp_path / "timm") == model.config


def detector_run(path: Path, kind: str = "mask_rcnn", version: int = 1, **fields: Any) -> Detect:
    """A random detector of three classes, as a run writes it into ``path``."""
    names = ["ant", "bee", "cat"]
    preprocessing = {"test_short": 64, "test_long": 96, "mean": [0.5] * 3, "std": [0.25] * 3, "classes": names}
    task = Detect(small_detector(kind, version, backbone={"window_size": 8}, **fields), names, preprocessing)
    task.save_pretrained(path)
    return task


@pytest.mark.parametrize(
    ("kind", "version", "to"),
    [("mask_rcnn", 1, "official"), ("cascade", 1, "mm"), ("mask_rcnn", 2, "mm"), ("htc", 1, "official")],
)
@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_a_detector_comes_back_whole(
    kind: str, version: int, to: str, extension: str, tmp_path: Path, capsys: Any
) -> None:
    """To OpenMMLab's names and back to ours by the command line: every bit, the classes, and a note about the rest."""
    task = detector_run(tmp_path / "ours", kind, version, **({"global_attention": False} if kind == "htc" else {}))
    there, back = tmp_path / f"detector.{extension}", tmp_path / "back"
    assert main(["convert", str(tmp_path / "ours"), str(there), "--to", to]) == 0
    printed = capsys.readouterr().out
    assert "bit-equal" in printed and "3 classes" in printed
    assert any(name.startswith("roi_head.bbox_head.") for name in read_state_dict(there)[0])
    assert ("does not hold these settings" in printed) == (extension == "pth")
    if extension == "pth":
        assert "task.anchor_scale=4.0" in printed and "data.test_short=64" in printed and "bee" not in printed
    assert main(["convert", str(there), str(back), "--to", "swinscale"]) == 0
    expected, found = task.model.state_dict(), read_state_dict(back)[0]
    assert set(expected) == set(found) and all(torch.equal(expected[n], found[n]) for n in expected)
    record = read_metadata(back)
    assert record["task"]["name"] == "detect" and record["preprocessing"]["classes"] == ["ant", "bee", "cat"]
    assert (record["task"]["anchor_scale"], record["preprocessing"]["mean"]) == (
        (4.0, [0.5] * 3) if extension == "safetensors" else (8.0, [0.485, 0.456, 0.406])
    )
    pipeline = load_detection(back)
    assert pipeline.classes == ["ant", "bee", "cat"]
    assert read_config(back).stage_windows == task.backbone.config.stage_windows  # type: ignore[union-attr]
    assert all(torch.equal(t, expected[n]) for n, t in pipeline.task.model.state_dict().items())


def test_a_detector_with_another_window(tmp_path: Path) -> None:
    """--window transfers the backbone, as load_detection does; the heads and the type of numbers stay."""
    task = detector_run(tmp_path / "ours", version=2)
    convert(tmp_path / "ours", tmp_path / "wide", "swinscale", window_size=16)
    wide, expected = load_detection(tmp_path / "wide"), load_detection(tmp_path / "ours", window_size=16)
    assert wide.task.backbone.config == expected.task.backbone.config
    states = wide.task.state_dict(), expected.task.state_dict()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert torch.equal(
        wide.task.model.state_dict()["fpn.inner_blocks.0.0.weight"], task.model.fpn.inner_blocks[0][0].weight
    )  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("version", "kind", "arguments", "words"),
    [
        (1, "mask_rcnn", ["out", "--to", "timm"], "pass --encoder"),
        (1, "mask_rcnn", ["out", "--to", "hf"], "choose mm, official or swinscale"),
        (1, "mask_rcnn", ["w.pth", "--to", "torchvision"], "pass --encoder"),
        (2, "mask_rcnn", ["w.pth", "--to", "official"], "has no Swin V2"),
        (1, "htc", ["w.pth", "--to", "mm"], "no place for 'attention."),
        (1, "mask_rcnn", ["w.pth", "--to", "mm", "--img-size", "64"], "--img-size: a detector"),
    ],
)
def test_a_detector_is_never_cut_down_in_silence(
    version: int, kind: str, arguments: list[str], words: str, tmp_path: Path, capsys: Any
) -> None:
    detector_run(tmp_path / "ours", kind, version)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / arguments[0]).exists()


def test_the_backbone_of_a_detector_alone(tmp_path: Path) -> None:
    """--encoder says that the heads stay behind, and what is written claims to be no detector."""
    task = detector_run(tmp_path / "ours", version=2)
    lines = convert(tmp_path / "ours", tmp_path / "backbone", "swinscale", encoder=True)
    assert any("left out" in line and "roi" in line for line in lines), lines
    assert "task" not in read_metadata(tmp_path / "backbone")
    model = from_pretrained(tmp_path / "backbone")
    assert all(torch.equal(tensor, task.backbone.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_detector_whose_windows_nobody_knows_is_refused(tmp_path: Path) -> None:
    """A V2 file without coordinates whose name says nothing; a name that says it is enough."""
    from swinscale.weights.detectors import detector_to_mm

    state = detector_to_mm(detector_run(tmp_path / "ours", version=2).model.state_dict(), "mm")
    for name in ("mine.pth", "mask_rcnn_swinv2_window8.pth"):
        torch.save({"state_dict": state}, tmp_path / name)
    with pytest.raises(UsageError, match="does not say its windows"):
        convert(tmp_path / "mine.pth", tmp_path / "out", "swinscale")
    convert(tmp_path / "mask_rcnn_swinv2_window8.pth", tmp_path / "out", "swinscale")
    assert set(read_config(tmp_path / "out").stage_windows) == {(8, 8)}  # type: ignore[union-attr]
