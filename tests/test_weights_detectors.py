"""Published detectors into ours and back: names, shapes, other classes, what does not fit, and the same numbers from both
(R-CKPT-1, 2, 3; SPEC 1.6, 1.8, 3.6, 8.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmmlab_files import assert_same, dense_backbone, filled, head_shapes, linear, mm_names, refusal, without_buffers
from random_models import random_swin, randomise
from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks.simmim import SimMIM
from swinscale.weights.detectors import describe_detector, detector_to_mm, is_detector, load_detector
from swinscale.weights.files import State, read_state_dict, write_safetensors

DEPTHS, HEADS = (1, 2, 1, 1), (1, 2, 2, 4)


def tiny(kind: str, layout: str = "official-dense", classes: int = 5, **fields: Any) -> State:
    """A file of four stages, 8 channels wide at first."""
    shapes = dense_backbone(8, DEPTHS, HEADS, 7)
    shapes = mm_names(shapes) if layout == "mm" else shapes
    return filled(shapes | head_shapes(kind, [8, 16, 32, 64], 8, 16, classes, **fields), len(kind))


def options(kind: str, **changed: Any) -> DetectConfig:
    names: dict[str, Any] = {"mask": "mask_rcnn", "cascade": "cascade", "htc": "htc"}
    htc: dict[str, Any] = {"semantic": True, "semantic_classes": 183} if kind == "htc" else {}
    return DetectConfig(**{"head": names[kind], "channels": 8, "fc_channels": 16, **htc, **changed})


def detector(kind: str, classes: int = 5, version: int = 1, **changed: Any) -> Any:
    fields: dict[str, Any] = {"embed_dim": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 7, "img_size": 224}
    swin = SwinTransformer(SwinConfig(version=version, num_classes=0, **fields))
    return randomise(Detector(swin, classes, options(kind, **changed)), 9)


KINDS = ("mask", "cascade", "htc")
LAYOUTS: tuple[Any, ...] = ("official-dense", "mm")
PUBLISHED = {"mask": ("Mask R-CNN", 48), "cascade": ("Cascade Mask R-CNN", 86), "htc": ("HTC", 0)}
"""Names, and millions of parameters with Swin-T (P1, and the table of the detection repository)."""


# --- names and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_published_sizes_are_ours(kind: str, layout: Any) -> None:
    """Swin-T with the full heads, without memory: every name and shape of the file, and none besides; 48 M and 86 M."""
    shapes = dense_backbone(96, (2, 2, 6, 2), (3, 6, 12, 24), 7)
    shapes = mm_names(shapes) if layout == "mm" else shapes
    shapes |= head_shapes(kind, [96, 192, 384, 768], 256, 1024, 80)
    with torch.device("meta"):
        swin = SwinTransformer(SwinConfig(version=1, num_classes=0, window_size=7))
        ours = Detector(swin, 80, options(kind, channels=256, fc_channels=1024))
        written = detector_to_mm(ours.state_dict(), layout)
        theirs = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert {name: tuple(t.shape) for name, t in written.items()} == {
        name: shape for name, shape in shapes.items() if not name.endswith("relative_position_index")
    }
    name, millions = PUBLISHED[kind]
    buffers = ("relative_position_index", "running_mean", "running_var", "num_batches_tracked")
    count = sum(tensor.numel() for n, tensor in theirs.items() if not n.endswith(buffers))
    assert not millions or round(count / 1e6) == millions
    assert is_detector(theirs) and is_detector(ours.state_dict())
    text = describe_detector(theirs)
    assert text == describe_detector(dict(ours.state_dict()))
    assert text.startswith(f"{name}, 80 classes, pyramid of 256 channels, 3 anchors a place, ")
    assert ("semantic branch" in text) == (kind == "htc")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_exact_and_uses_every_tensor(kind: str, layout: Any) -> None:
    """R-CKPT-2: nothing fresh, missing or unexpected, and written again the file is the same to the bit."""
    file, model = tiny(kind, layout), detector(kind)
    report = load_detector(model, file)
    assert report.plain and report.share == 1 and report.layout == layout
    assert set(report.matched) == set(model.state_dict())
    assert len(report.matched) == len(without_buffers(file))
    assert [line for line in report.left_out if "derived buffers" not in line] == []
    assert PUBLISHED[kind][0] in str(report) and "5 classes" in report.looks_like
    assert_same(detector_to_mm(dict(model.state_dict()), layout), without_buffers(file))


PLACES = {
    "backbone.norm1.weight": "body.norms.1.weight",
    "backbone.norm3.bias": "body.backbone.norm.bias",
    "neck.lateral_convs.2.conv.weight": "fpn.inner_blocks.2.0.weight",
    "neck.fpn_convs.3.conv.bias": "fpn.layer_blocks.3.0.bias",
    "rpn_head.rpn_reg.weight": "rpn.head.bbox_pred.weight",
    "roi_head.bbox_head.2.shared_convs.3.bn.running_var": "roi.box_heads.2.convs.3.1.running_var",
    "roi_head.bbox_head.1.shared_convs.0.bn.num_batches_tracked": "roi.box_heads.1.convs.0.1.num_batches_tracked",
    "roi_head.bbox_head.0.fc_reg.bias": "roi.box_heads.0.regress.bias",
    "roi_head.mask_head.2.conv_res.conv.weight": "roi.mask_heads.2.carry.0.weight",
    "roi_head.mask_head.1.conv_logits.weight": "roi.mask_heads.1.predict.weight",
    "roi_head.semantic_head.lateral_convs.4.conv.weight": "roi.semantic.laterals.4.0.weight",
    "roi_head.semantic_head.conv_embedding.conv.weight": "roi.semantic.embed.0.weight",
}


def test_each_tensor_is_in_its_place() -> None:
    file, model = tiny("htc"), detector("htc")
    load_detector(model, file)
    own = model.state_dict()
    assert all(torch.equal(file[theirs], own[ours]) for theirs, ours in PLACES.items())


# --- the same numbers -----------------------------------------------------------------------------------------------


def conv(file: State, name: str, x: Tensor) -> Tensor:
    weight = file[f"{name}.weight"]
    return F.conv2d(x, weight, file.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def box_head(file: State, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """OpenMMLab's shared convolutions and linear layers, then its two last layers."""
    for i in range(4 if f"{name}.shared_convs.0.conv.weight" in file else 0):
        bn = [file[f"{name}.shared_convs.{i}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(conv(file, f"{name}.shared_convs.{i}.conv", x), *bn).relu()
    x = x.flatten(1)
    for i in range(2 if f"{name}.shared_fcs.1.weight" in file else 1):
        x = F.linear(x, file[f"{name}.shared_fcs.{i}.weight"], file[f"{name}.shared_fcs.{i}.bias"]).relu()
    last = [F.linear(x, file[f"{name}.{layer}.weight"], file[f"{name}.{layer}.bias"]) for layer in ("fc_cls", "fc_reg")]
    return last[0], last[1].view(len(x), -1, 4)


def mask_features(file: State, name: str, x: Tensor, before: Tensor | None) -> Tensor:
    x = x if before is None else x + conv(file, f"{name}.conv_res.conv", before).relu()
    for i in range(4):
        x = conv(file, f"{name}.convs.{i}.conv", x).relu()
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_heads_compute_what_the_names_say(kind: str) -> None:
    """Box heads, and the chain of mask heads, from the file's own tensors and from our modules."""
    file, model = tiny(kind), detector(kind)
    load_detector(model, file)
    boxes, masks, before, ours = torch.randn(3, 8, 7, 7), torch.randn(3, 8, 14, 14), None, None
    close: Callable[..., None] = torch.testing.assert_close
    with torch.no_grad():
        for stage in range(len(model.roi.box_heads)):
            number = f".{stage}" if kind != "mask" else ""
            close(model.roi.box_heads[stage](boxes), box_head(file, f"roi_head.bbox_head{number}", boxes))
            name, head = f"roi_head.mask_head{number}", model.roi.mask_heads[stage]
            before = mask_features(file, name, masks, before if kind == "htc" else None)
            ours = head.features(masks, ours)
            close(ours, before)
            up = F.conv_transpose2d(before, file[f"{name}.upsample.weight"], file[f"{name}.upsample.bias"], 2).relu()
            close(head(ours), conv(file, f"{name}.conv_logits", up))


def test_pyramid_and_proposals_compute_what_the_names_say() -> None:
    file, model = tiny("mask"), detector("mask")
    load_detector(model, file)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, x = model.body(image), None
        found = model.features(image, [(64, 64)])
        for level in (3, 2, 1, 0):
            side = conv(file, f"neck.lateral_convs.{level}.conv", maps[level])
            x = side if x is None else side + F.interpolate(x, scale_factor=2.0)
            torch.testing.assert_close(found[level], conv(file, f"neck.fpn_convs.{level}.conv", x))
        hidden = conv(file, "rpn_head.rpn_conv", found[0]).relu()
        scores, moves = model.rpn.head(found)
        torch.testing.assert_close(scores[0], conv(file, "rpn_head.rpn_cls", hidden))
        torch.testing.assert_close(moves[0], conv(file, "rpn_head.rpn_reg", hidden))


# --- other classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_other_classes_keep_their_last_layers(kind: str) -> None:
    file, model = tiny(kind, classes=7), detector(kind, classes=3)
    before = copy.deepcopy(model.state_dict())
    report = load_detector(model, file)
    stages = 1 if kind == "mask" else 3
    layers = ("box_heads.{}.classify", "box_heads.{}.regress", "mask_heads.{}.predict")
    last = {f"roi.{n.format(s)}.{leaf}" for s in range(stages) for n in layers for leaf in ("weight", "bias")}
    assert set(report.fresh) == last and not report.missing and not report.mismatched
    assert "7 classes in the file, 3 in the model" in str(report)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) == (name in last) for name in after)


def test_class_agnostic_boxes_are_kept_with_other_classes() -> None:
    report = load_detector(detector("cascade", 3, class_agnostic=True), tiny("cascade", classes=7, agnostic=True))
    assert not any("regress" in name for name in report.fresh) and any("classify" in name for name in report.fresh)
    # With one class a box per class is a box for all of them.
    report = load_detector(detector("mask", 1), tiny("mask", classes=1))
    assert report.plain
    assert any("regress" in name for name in load_detector(detector("mask", 3), tiny("mask", classes=1)).fresh)


def test_other_semantic_classes_keep_the_semantic_layer() -> None:
    report = load_detector(detector("htc", semantic_classes=0), tiny("htc"))
    assert set(report.fresh) == {"roi.semantic.predict.weight", "roi.semantic.predict.bias"}
    assert "183 semantic classes in the file, 6 in the model" in str(report)


# --- what does not fit ----------------------------------------------------------------------------------------------


def widened(state: State) -> State:
    """A pyramid and heads of 16 channels on the same backbone."""
    heads = filled(head_shapes("mask", [8, 16, 32, 64], 16, 16, 5))
    return {**{name: t for name, t in state.items() if name.startswith("backbone.")}, **heads}


def edited(state: State, drop: str = "", **shapes: tuple[int, ...]) -> State:
    kept = {name: tensor for name, tensor in state.items() if not drop or drop not in name}
    return {**kept, **{name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}}


MISFITS: dict[str, tuple[str, Callable[[], State], str]] = {
    "cascade into Mask R-CNN": ("mask", lambda: tiny("cascade"), "box heads: 3 in the file, 1 in the model"),
    "Mask R-CNN into a cascade": ("cascade", lambda: tiny("mask"), "box heads: 1 in the file, 3 in the model"),
    "HTC into a cascade": (
        "cascade",
        lambda: tiny("htc"),
        "mask heads that take in the one before: 2 in the file, 0 in",
    ),
    "one box for all classes": (
        "mask",
        lambda: tiny("mask", agnostic=True),
        "(Mask R-CNN) does not fit the model (Mask R-CNN): boxes: class-agnostic in the file, class-specific in the model.",
    ),
    "channels": ("mask", lambda: widened(tiny("mask")), "channels of the pyramid: 16 in the file, 8 in the model"),
    "anchors": (
        "mask",
        lambda: edited(tiny("mask"), rpn_head__rpn_cls__weight=(5, 8, 1, 1), rpn_head__rpn_reg__weight=(20, 8, 1, 1)),
        "anchors a place: 5 in the file, 3 in the model",
    ),
    "convolutions in box heads": (
        "mask",
        lambda: edited(
            tiny("mask"), "shared_fcs.1", **{"roi_head__bbox_head__shared_convs__0__conv__weight": (8, 8, 3, 3)}
        ),
        "convolutions in a box head: 1 in the file, 0 in the model; fully connected layers in a box head: 1 in the file, 2 in",
    ),
    "without norms": (
        "cascade",
        lambda: edited(tiny("cascade"), ".bn."),
        "norm after these convolutions: none in the file, BatchNorm in the model",
    ),
    "one tensor lost": (
        "mask",
        lambda: edited(tiny("mask"), "neck.fpn_convs.1.conv.bias"),
        "missing: fpn.layer_blocks",
    ),
    "a stage norm lost": ("mask", lambda: edited(tiny("mask"), "backbone.norm1."), "missing: body.norms.1.weight"),
    "one tensor more": (
        "mask",
        lambda: edited(tiny("mask"), roi_head__bbox_head__cls_fcs__0__weight=(16, 16)),
        "the model has no place for roi_head.bbox_head.cls_fcs.0.weight",
    ),
    "a wider hidden layer": (
        "mask",
        lambda: edited(tiny("mask"), roi_head__bbox_head__shared_fcs__1__weight=(16, 20)),
        "other shape: roi.box_heads.0.fcs.1.weight (file (16, 20), model (16, 16))",
    ),
    "a one-stage detector": (
        "mask",
        lambda: edited(tiny("mask"), "roi_head", bbox_head__retina_cls__weight=(45, 8, 3, 3)),
        "box heads: 0 in the file, 1 in the model",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(name: str) -> None:
    """R-CKPT-3: the part, both sides, and the model is as it was; ``strict=False`` loads what fits."""
    kind, make, words = MISFITS[name]
    model, file = detector(kind), make()
    message = refusal(load_detector, model, file)
    assert words in message and "heads=False" in message, message
    report = load_detector(model, file, strict=False)
    assert report.missing or report.mismatched or report.unexpected
    own = model.state_dict()
    assert torch.equal(own["body.backbone.norm.weight"], file["backbone.norm3.weight"])
    assert set(report.matched) | set(report.missing) | set(report.mismatched) | set(report.fresh) == set(own)


@pytest.mark.parametrize("kind", ["mask", "htc"])
def test_a_branch_that_one_side_lacks_is_no_misfit(kind: str) -> None:
    """Boxes alone first and masks later (the article's Objects365, then COCO), and a detector with masks for boxes alone."""
    without = edited(edited(tiny(kind), "mask_head"), "semantic_head")
    model = detector(kind)
    before = copy.deepcopy(model.state_dict())
    report = load_detector(model, without)
    new = {name for name in before if name.startswith(("roi.mask_heads.", "roi.semantic."))}
    assert new and new <= set(report.fresh) and not report.missing
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in new)
    assert torch.equal(model.state_dict()["rpn.head.bbox_pred.weight"], without["rpn_head.rpn_reg.weight"])
    boxes = Detector(model.backbone, model.num_classes, replace(model.config, masks=False, semantic=False))
    report = load_detector(boxes, tiny(kind))
    assert any("the model has no such branch" in line for line in report.left_out) and not report.unexpected


def test_another_backbone_does_not_fit() -> None:
    wide = filled(dense_backbone(16, DEPTHS, HEADS, 7) | head_shapes("mask", [16, 32, 64, 128], 8, 16, 5))
    assert "below the pyramid: 16-32-64-128 in the file, 8-16-32-64 in the model" in refusal(
        load_detector, detector("mask"), wide
    )
    deep = filled(dense_backbone(8, (1, 2, 2, 1), HEADS, 7) | head_shapes("mask", [8, 16, 32, 64], 8, 16, 5))
    message = refusal(load_detector, detector("mask"), deep)
    assert message.startswith("The backbone of state dict does not fit: ") and "layers.2.blocks.1" in message
    assert "Swin V2" in refusal(load_detector, detector("mask", version=2), tiny("mask"))


def test_a_batch_counter_may_be_absent_and_a_first_carry_is_left_out() -> None:
    """Files of frozen norms do not count batches; old HTC heads have a layer that nothing reads."""
    report = load_detector(detector("cascade"), edited(tiny("cascade"), "num_batches_tracked"))
    assert len(report.fresh) == 12 and all(name.endswith("num_batches_tracked") for name in report.fresh)
    more = edited(tiny("htc"), roi_head__mask_head__0__conv_res__conv__weight=(8, 8, 1, 1))
    report = load_detector(detector("htc"), more)
    assert report.plain and "roi_head.mask_head.0.conv_res.conv.weight: nothing reads it" in str(report)


def test_the_extra_attention_stays_fresh_and_has_no_published_name() -> None:
    model = detector("htc", global_attention=True)
    report = load_detector(model, tiny("htc"))
    extra = {name for name in model.state_dict() if name.startswith("attention.")}
    assert extra and set(report.fresh) == extra and "no published name" in str(report)
    with pytest.raises(UsageError, match="no place for 'attention"):
        detector_to_mm(dict(model.state_dict()))


# --- the backbone alone ---------------------------------------------------------------------------------------------


def test_heads_may_stay_out() -> None:
    """The stage norms of a detector belong to its backbone."""
    file, model = tiny("cascade"), detector("mask")
    report = load_detector(model, file, heads=False)
    own = model.state_dict()
    assert report.share == 1 and not report.missing and not report.unexpected
    assert set(report.fresh) == {name for name in own if not name.startswith("body.")}
    assert torch.equal(own["body.norms.0.weight"], file["backbone.norm0.weight"])
    assert sum("heads=False" in line for line in report.left_out) == 1


@pytest.mark.parametrize("kind", ["classifier", "SimMIM", "segmenter"])
def test_weights_without_heads_load_the_backbone(kind: str) -> None:
    model = detector("mask")
    fields: dict[str, Any] = {"embed_dim": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 7, "img_size": 224}
    swin = random_swin(1, **fields, num_classes=0 if kind == "SimMIM" else 5)
    if kind == "segmenter":
        file = filled(dense_backbone(8, DEPTHS, HEADS, 7) | linear("decode_head.conv_seg", 4, 8, 1, 1))
        file = {f"module.{name}": tensor for name, tensor in file.items()}
    else:
        file = dict((swin if kind == "classifier" else SimMIM(swin)).state_dict())
    before = copy.deepcopy(model.state_dict())
    report = load_detector(model, file)
    norms = {name for name in before if name.startswith("body.norms.")}
    heads = {name for name in before if not name.startswith("body.")}
    assert report.share == 1 and set(report.fresh) == heads | (set() if kind == "segmenter" else norms)
    assert {report.fresh[name] for name in heads} == {"the file has no heads"}
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) == (name in report.fresh) for name in after)
    assert kind != "segmenter" or "2 tensors that belong to no backbone or classifier (decode_head)" in str(report)


def test_a_backbone_of_another_window_is_fitted() -> None:
    shapes = dense_backbone(8, DEPTHS, HEADS, 12) | head_shapes("mask", [8, 16, 32, 64], 8, 16, 5)
    report = load_detector(detector("mask"), filled(shapes))
    assert len(report.reshaped) == sum(DEPTHS) and not report.fresh
    assert all(name.startswith("body.backbone.layers.") for name in report.reshaped)
    assert "relative_position_bias_table" in refusal(
        load_detector, detector("mask"), filled(shapes), transfer=False, min_match=1
    )


@pytest.mark.parametrize("version", [1, 2])
def test_our_own_names_load_too(version: int) -> None:
    """The extra attention is among them."""
    source, target = (detector("htc", version=version, global_attention=True) for _ in range(2))
    randomise(source, 5)
    report = load_detector(target, dict(source.state_dict()))
    assert report.plain
    assert_same(dict(target.state_dict()), dict(source.state_dict()))
    report = load_detector(detector("htc", 3, version, global_attention=True), dict(source.state_dict()))
    assert len(report.fresh) == 18


def test_swin_v2_goes_through_openmmlabs_names_alone() -> None:
    source, target = detector("mask", version=2), randomise(detector("mask", version=2), 5)
    file = detector_to_mm(dict(source.state_dict()), "mm")
    assert "backbone.stages.1.downsample.reduction.weight" in file  # their V2 merges at the beginning of a stage
    assert load_detector(target, file).plain
    assert_same(dict(target.state_dict()), dict(source.state_dict()))
    with pytest.raises(UsageError, match="no Swin V2"):
        detector_to_mm(dict(source.state_dict()))


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_with_copies_and_prefixes(tmp_path: Path) -> None:
    """The wrapper of OpenMMLab's checkpoints, the copies of a moving average, a teacher beside a student."""
    file, other = tiny("mask"), filled({name: tuple(t.shape) for name, t in tiny("mask").items()}, 3)
    meta = {"CLASSES": ("a", "b", "c", "d", "e"), "epoch": 36, "mmdet_version": "2.11.0"}
    averages = {f"ema_{name.replace('.', '_')}": t for name, t in other.items()}
    torch.save({"meta": meta, "state_dict": {**file, **averages}}, tmp_path / "mask_rcnn_swin_tiny_patch4_window7.pth")
    for state, note in (
        (tmp_path / "mask_rcnn_swin_tiny_patch4_window7.pth", f"{len(other)} tensors of other copies"),
        ({f"module.{name}": t for name, t in file.items()}, "derived buffers"),
        ({f"teacher.{n}": t for n, t in file.items()} | {f"student.{n}": t for n, t in other.items()}, "(student)"),
    ):
        model = detector("mask")
        report = load_detector(model, state)
        assert set(report.matched) == set(model.state_dict()) and not report.unexpected
        assert any(note in line for line in report.left_out), str(report)
        assert_same(detector_to_mm(dict(model.state_dict())), without_buffers(file))
    report = load_detector(detector("mask"), tmp_path / "mask_rcnn_swin_tiny_patch4_window7.pth")
    assert "the name says 'tiny'" in report.disagreements[0] and report.source.endswith("window7.pth")


def test_a_written_file_reads_the_same(tmp_path: Path) -> None:
    model = detector("cascade")
    write_safetensors(tmp_path / "c.safetensors", detector_to_mm(dict(model.state_dict()), "mm"))
    again = randomise(detector("cascade"), 5)
    assert load_detector(again, tmp_path / "c.safetensors").plain
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert describe_detector(read_state_dict(tmp_path / "c.safetensors")[0]) == describe_detector(model.state_dict())


def test_a_module_around_the_detector_serves() -> None:
    task = nn.ModuleDict({"model": detector("mask")})
    file = tiny("mask")
    load_detector(task, file)
    assert_same(detector_to_mm(dict(task.state_dict())), without_buffers(file))
    assert "holds 0 detectors" in refusal(load_detector, nn.Linear(2, 2), file)
    assert "holds 2 detectors" in refusal(load_detector, nn.ModuleList([detector("mask"), detector("mask")]), file)


def test_a_detector_without_memory_takes_the_files_tensors() -> None:
    file = tiny("cascade")
    with torch.device("meta"):
        model, other = detector("cascade"), detector("cascade", 3)
    load_detector(model, file)
    assert_same(detector_to_mm(dict(model.state_dict())), without_buffers(file))
    with pytest.raises(UsageError, match="on the meta device"):
        load_detector(other, file)


def test_what_is_no_detector() -> None:
    state = dict(random_swin(1).state_dict())
    assert not is_detector(state)
    with pytest.raises(UsageError, match="not the weights of a two-stage detector"):
        describe_detector(state)
    with pytest.raises(UsageError, match="not the tensors of a detector of ours"):
        detector_to_mm(state)
    with pytest.raises(UsageError, match="layout='timm'"):
        detector_to_mm(dict(detector("mask").state_dict()), "timm")  # type: ignore[arg-type]
