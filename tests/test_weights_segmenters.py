"""Segmenters of OpenMMLab into ours and back: names, shapes, other classes, what does not fit, and the same
numbers from both (R-CKPT-1, 2, 3; R-DOWN-3; SPEC 1.6, 3.7).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmmlab_files import (
    Shapes,
    assert_same,
    dense_backbone,
    filled,
    head_shapes,
    linear,
    mm_names,
    refusal,
    upernet_shapes,
    without_buffers,
)
from random_models import random_swin, randomise
from small_detectors import small_detector
from small_segmenters import DEPTHS, FIELDS, HEADS, WIDTHS, four_stages
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import Segmenter
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.tasks.simmim import SimMIM
from swinscale.weights import load_detector
from swinscale.weights.detectors import is_detector
from swinscale.weights.files import State
from swinscale.weights.segmenters import (
    describe_segmenter,
    is_segmenter,
    load_segmenter,
    open_segmenter,
    read_segmenter_config,
    segmenter_parts,
    segmenter_to_mm,
    segmenter_to_transformers,
)

LAYOUTS: tuple[Any, ...] = ("official-dense", "mm")


def tiny(layout: str = "official-dense", classes: int = 5, window: int = 7, **heads: Any) -> State:
    """A file of four stages, 8 channels wide at first."""
    shapes = dense_backbone(8, DEPTHS, HEADS, window)
    shapes = mm_names(shapes) if layout == "mm" else shapes
    return filled(shapes | upernet_shapes(WIDTHS, heads.pop("channels", 16), classes, **{"aux": 8, **heads}), 3)


# --- names and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "depth", "millions"), [(96, 6, 60), (96, 18, 81), (128, 18, 121)])
def test_the_published_sizes_are_ours(width: int, depth: int, millions: int, layout: Any) -> None:
    """Swin-T, S and B without memory: every name and shape of the file, and none besides; 60 M, 81 M and 121 M (P1)."""
    depths, heads = (2, 2, depth, 2), tuple(width // 32 << stage for stage in range(4))
    shapes = dense_backbone(width, depths, heads, 7)
    shapes = mm_names(shapes) if layout == "mm" else shapes
    shapes |= upernet_shapes([width << stage for stage in range(4)], 512, 150)
    with torch.device("meta"):
        config = SwinConfig(version=1, num_classes=0, window_size=7, embed_dim=width, depths=depths, num_heads=heads)
        ours = Segmenter(SwinTransformer(config), 150)
        written = segmenter_to_mm(dict(ours.state_dict()), layout)
        theirs = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert {name: tuple(t.shape) for name, t in written.items()} == {
        name: shape for name, shape in shapes.items() if not name.endswith("relative_position_index")
    }
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6) == millions
    assert is_segmenter(theirs) and is_segmenter(ours.state_dict()) and not is_detector(theirs)
    text = "UPerNet, 150 classes, 512 channels, 4 pooled maps, auxiliary head of 256 channels on stage 3"
    assert describe_segmenter(theirs) == describe_segmenter(dict(ours.state_dict())) == text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aux", [8, 0])
def test_round_trip_is_bit_exact_and_uses_every_tensor(layout: Any, aux: int) -> None:
    """R-CKPT-2: nothing fresh, missing or unexpected, and written again the file is the same to the bit."""
    file, model = tiny(layout, aux=aux), four_stages(aux_weight=0.4 if aux else 0.0)
    report = load_segmenter(model, file)
    assert report.plain and report.share == 1 and report.layout == layout
    assert set(report.matched) == set(model.state_dict()) and len(report.matched) == len(without_buffers(file))
    assert [line for line in report.left_out if "derived buffers" not in line] == []
    assert "UPerNet, 5 classes, 16 channels" in report.looks_like
    assert_same(segmenter_to_mm(dict(model.state_dict()), layout), without_buffers(file))


PLACES = {
    "backbone.norm1.weight": "body.norms.1.weight",
    "backbone.norm3.bias": "body.backbone.norm.bias",
    "decode_head.psp_modules.2.1.conv.weight": "decode.pooling.branches.2.0.weight",
    "decode_head.psp_modules.3.1.bn.running_var": "decode.pooling.branches.3.1.running_var",
    "decode_head.bottleneck.conv.weight": "decode.pooling.fuse.0.weight",
    "decode_head.lateral_convs.1.bn.bias": "decode.laterals.1.1.bias",
    "decode_head.fpn_convs.2.conv.weight": "decode.smooth.2.0.weight",
    "decode_head.fpn_bottleneck.bn.num_batches_tracked": "decode.fuse.1.num_batches_tracked",
    "decode_head.conv_seg.weight": "decode.predict.weight",
    "auxiliary_head.convs.0.conv.weight": "auxiliary.convs.0.0.weight",
    "auxiliary_head.conv_seg.bias": "auxiliary.predict.bias",
}


def test_each_tensor_is_in_its_place() -> None:
    file, model = tiny(), four_stages()
    load_segmenter(model, file)
    own = model.state_dict()
    assert all(torch.equal(file[theirs], own[ours]) for theirs, ours in PLACES.items())


# --- the same numbers -----------------------------------------------------------------------------------------------


def conv(file: State, name: str, x: Tensor) -> Tensor:
    """OpenMMLab's convolution, batch norm and ReLU."""
    weight = file[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, variance, gain, shift = (file[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, variance, gain, shift).relu()


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def last(file: State, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, file[f"{name}.conv_seg.weight"], file[f"{name}.conv_seg.bias"])


def test_heads_compute_what_the_names_say() -> None:
    """Pyramid pooling, pyramid, fusion and the auxiliary head, from the file's own tensors and from our modules; odd maps."""
    file, model = tiny(), four_stages()
    load_segmenter(model, file)
    maps = [torch.randn(2, width, 19 >> i, 26 >> i) for i, width in enumerate(WIDTHS)]
    pooled = [
        up(conv(file, f"decode_head.psp_modules.{i}.1", F.adaptive_avg_pool2d(maps[-1], cells)), maps[-1])
        for i, cells in enumerate((1, 2, 3, 6))
    ]
    top = conv(file, "decode_head.bottleneck", torch.cat([maps[-1], *pooled], 1))
    levels = [*(conv(file, f"decode_head.lateral_convs.{i}", maps[i]) for i in range(3)), top]
    for i in (3, 2, 1):
        levels[i - 1] = levels[i - 1] + up(levels[i], levels[i - 1])
    levels = [*(conv(file, f"decode_head.fpn_convs.{i}", levels[i]) for i in range(3)), levels[3]]
    fused = conv(file, "decode_head.fpn_bottleneck", torch.cat([up(level, levels[0]) for level in levels], 1))
    with torch.no_grad():
        torch.testing.assert_close(model.decode(maps), last(file, "decode_head", fused), rtol=1e-5, atol=1e-5)
        seen = last(file, "auxiliary_head", conv(file, "auxiliary_head.convs.0", maps[2]))
        torch.testing.assert_close(model.auxiliary(maps[2]), seen, rtol=1e-5, atol=1e-5)


# --- other classes, and what does not fit ---------------------------------------------------------------------------


def test_other_classes_keep_the_last_layers() -> None:
    model, file = four_stages(3), tiny(classes=7)
    before = copy.deepcopy(model.state_dict())
    report = load_segmenter(model, file)
    final = {f"{head}.predict.{leaf}" for head in ("decode", "auxiliary") for leaf in ("weight", "bias")}
    assert set(report.fresh) == final and not report.missing and not report.mismatched
    assert "7 classes in the file, 3 in the model" in str(report)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) == (name in final) for name in after)


def test_an_auxiliary_head_that_one_side_lacks_is_no_misfit() -> None:
    model = four_stages()
    before = copy.deepcopy(model.state_dict())
    report = load_segmenter(model, tiny(aux=0))
    new = {name for name in before if name.startswith("auxiliary.")}
    assert new and set(report.fresh) == new and set(report.fresh.values()) == {"the file has no such branch"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in new)
    report = load_segmenter(four_stages(aux_weight=0.0), tiny())
    assert report.plain and any("auxiliary_head" in line and "no such branch" in line for line in report.left_out)


def edited(state: State, drop: str = "", **shapes: tuple[int, ...]) -> State:
    kept = {name: tensor for name, tensor in state.items() if not drop or drop not in name}
    return {**kept, **{name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}}


def around(heads: Shapes) -> State:
    return filled(dense_backbone(8, DEPTHS, HEADS, 7) | heads)


MISFITS: dict[str, tuple[Callable[[], State], str]] = {
    "channels": (
        lambda: tiny(channels=24),
        "(UPerNet) does not fit the model (UPerNet): channels: 24 in the file, 16 in the model",
    ),
    "channels of the auxiliary head": (
        lambda: tiny(aux=12),
        "channels of the auxiliary head: 12 in the file, 8 in the model",
    ),
    "place of the auxiliary head": (
        lambda: tiny(aux_stage=1),
        "stage of the auxiliary head: 1 in the file, 2 in the model",
    ),
    "pooled maps": (lambda: edited(tiny(), "psp_modules.3."), "pooled maps: 3 in the file, 4 in the model"),
    "more convolutions": (
        lambda: edited(tiny(), auxiliary_head__convs__1__conv__weight=(8, 8, 3, 3)),
        "convolutions in the auxiliary head: 2 in the file, 1 in the model",
    ),
    "an input that is concatenated": (
        lambda: edited(tiny(), auxiliary_head__conv_cat__conv__weight=(8, 40, 3, 3)),
        "the model has no place for auxiliary_head.conv_cat.conv.weight",
    ),
    "one tensor lost": (lambda: edited(tiny(), "fpn_convs.1.conv"), "missing: decode.smooth.1.0.weight"),
    "a stage norm lost": (
        lambda: edited(tiny(), "backbone.norm1."),
        "norms after the stages before the last: 2 in the file, 3 in",
    ),
    "another kernel": (
        lambda: edited(tiny(), decode_head__fpn_convs__0__conv__weight=(16, 16, 1, 1)),
        "other shape: decode.smooth.0.0.weight (file (16, 16, 1, 1), model (16, 16, 3, 3))",
    ),
    "another kind": (
        lambda: around(
            linear("decode_head.linear_fuse.conv", 8, 64, 1, 1) | linear("decode_head.conv_seg", 5, 8, 1, 1)
        ),
        "(another kind of segmenter) does not fit the model (UPerNet): its heads are none of a UPerNet. Choose a UPerNet, or",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(name: str) -> None:
    """R-CKPT-3: the part, both sides, and the model is as it was; ``strict=False`` loads what fits."""
    make, words = MISFITS[name]
    model, file = four_stages(), make()
    message = refusal(load_segmenter, model, file)
    assert words in message and "heads=False" in message, message
    report = load_segmenter(model, file, strict=False)
    assert report.missing or report.mismatched or report.unexpected
    own = model.state_dict()
    assert torch.equal(own["body.backbone.norm.weight"], file["backbone.norm3.weight"])
    assert set(report.matched) | set(report.missing) | set(report.mismatched) | set(report.fresh) == set(own)


def test_another_backbone_does_not_fit() -> None:
    wide = filled(dense_backbone(16, DEPTHS, HEADS, 7) | upernet_shapes([16, 32, 64, 128], 16, 5, aux=8))
    assert "widths of the maps: 16-32-64-128 in the file, 8-16-32-64 in the model" in refusal(
        load_segmenter, four_stages(), wide
    )
    deep = filled(dense_backbone(8, (1, 2, 2, 1), HEADS, 7) | upernet_shapes(WIDTHS, 16, 5, aux=8))
    message = refusal(load_segmenter, four_stages(), deep)
    assert message.startswith("The backbone of state dict does not fit: ") and "layers.2.blocks.1" in message
    assert "Swin V2" in refusal(load_segmenter, four_stages(version=2), tiny())


def test_a_batch_counter_may_be_absent() -> None:
    report = load_segmenter(four_stages(), edited(tiny(), "num_batches_tracked"))
    assert len(report.fresh) == 13 and all(name.endswith("num_batches_tracked") for name in report.fresh)


# --- the backbone alone ---------------------------------------------------------------------------------------------


def test_heads_may_stay_out() -> None:
    """The stage norms of a segmenter belong to its backbone."""
    file, model = tiny(), four_stages()
    report = load_segmenter(model, file, heads=False)
    own = model.state_dict()
    assert report.share == 1 and not report.missing and not report.unexpected
    assert set(report.fresh) == {name for name in own if not name.startswith("body.")}
    assert torch.equal(own["body.norms.0.weight"], file["backbone.norm0.weight"])
    assert sum("heads=False" in line for line in report.left_out) == 1


def other_weights(kind: str) -> State:
    swin = random_swin(1, **FIELDS, num_classes=0 if kind == "SimMIM" else 5)
    if kind == "detector of OpenMMLab":
        return around(head_shapes("mask", WIDTHS, 8, 16, 5))
    if kind == "detector of ours":
        return dict(small_detector(backbone=FIELDS).state_dict())
    return dict((swin if kind == "classifier" else SimMIM(swin)).state_dict())


@pytest.mark.parametrize("kind", ["classifier", "SimMIM", "detector of OpenMMLab", "detector of ours"])
def test_weights_without_such_heads_load_the_backbone(kind: str) -> None:
    """A detector also gives the norms of its stages."""
    model, file = four_stages(), other_weights(kind)
    before = copy.deepcopy(model.state_dict())
    report = load_segmenter(model, file)
    norms = {name for name in before if name.startswith("body.norms.")}
    heads = {name for name in before if not name.startswith("body.")}
    assert report.share == 1 and set(report.fresh) == heads | (set() if "detector" in kind else norms)
    assert {report.fresh[name] for name in heads} == {"the file has no heads"} and not report.unexpected
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) == (name in report.fresh) for name in after)
    assert "detector" not in kind or "belong to no backbone or classifier" in str(report)


@pytest.mark.parametrize("whose", ["ours", "OpenMMLab's"])
def test_a_detector_takes_the_backbone_of_a_segmenter(whose: str) -> None:
    model = small_detector(backbone=FIELDS)
    source = dict(four_stages().state_dict()) if whose == "ours" else tiny()
    report = load_detector(model, source)
    heads = {name for name in model.state_dict() if not name.startswith("body.")}
    assert report.share == 1 and set(report.fresh) == heads and not report.unexpected
    assert f"({'auxiliary' if whose == 'ours' else 'auxiliary_head'}, decode" in str(report)


def test_a_backbone_of_another_window_is_fitted() -> None:
    report = load_segmenter(four_stages(), tiny(window=12))
    assert len(report.reshaped) == sum(DEPTHS) and not report.fresh
    assert all(name.startswith("body.backbone.layers.") for name in report.reshaped)
    assert "relative_position_bias_table" in refusal(
        load_segmenter, four_stages(), tiny(window=12), transfer=False, min_match=1
    )


@pytest.mark.parametrize("version", [1, 2])
def test_our_own_names_load_too(version: int) -> None:
    source, target = four_stages(version=version), four_stages(version=version, seed=5)
    assert load_segmenter(target, dict(source.state_dict())).plain
    assert_same(dict(target.state_dict()), dict(source.state_dict()))


def test_swin_v2_goes_through_openmmlabs_names_alone() -> None:
    source, target = four_stages(version=2), four_stages(version=2, seed=5)
    file = segmenter_to_mm(dict(source.state_dict()), "mm")
    assert "backbone.stages.1.downsample.reduction.weight" in file
    assert load_segmenter(target, file).plain
    assert_same(dict(target.state_dict()), dict(source.state_dict()))
    with pytest.raises(UsageError, match="no Swin V2"):
        segmenter_to_mm(dict(source.state_dict()))


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_with_copies_and_prefixes(tmp_path: Path) -> None:
    """The wrapper of OpenMMLab's checkpoints, the copies of a moving average, a teacher beside a student; a wrong name."""
    file = tiny()
    other = filled({name: tuple(t.shape) for name, t in file.items()}, 8)
    averages = {f"ema_{name.replace('.', '_')}": t for name, t in other.items()}
    path = tmp_path / "upernet_swin_tiny_patch4_window7_512x512_160k_ade20k.pth"
    torch.save({"meta": {"CLASSES": ("a", "b", "c", "d", "e")}, "state_dict": {**file, **averages}}, path)
    sources: list[tuple[Any, str]] = [
        (path, f"{len(other)} tensors of other copies"),
        ({f"module.{name}": t for name, t in file.items()}, "derived buffers"),
        ({f"teacher.{n}": t for n, t in file.items()} | {f"student.{n}": t for n, t in other.items()}, "(student)"),
    ]
    for source, note in sources:
        model = four_stages()
        report = load_segmenter(model, source)
        assert set(report.matched) == set(model.state_dict()) and not report.unexpected
        assert any(note in line for line in report.left_out), str(report)
        assert_same(segmenter_to_mm(dict(model.state_dict())), without_buffers(file))
    report = load_segmenter(four_stages(), path)
    assert "the name says 'tiny'" in report.disagreements[0] and report.source.endswith("ade20k.pth")


def test_a_file_without_a_record_says_what_its_tensors_tell(tmp_path: Path) -> None:
    torch.save({"meta": {"CLASSES": list("abcde")}, "state_dict": tiny("mm", aux_stage=1)}, tmp_path / "w.pth")
    swin, options, beside = read_segmenter_config(tmp_path / "w.pth")
    assert (swin.depths, swin.stage_windows[3], swin.pad, swin.small_map) == (DEPTHS, (7, 7), "legacy", "pad")
    assert options == {"channels": 16, "pool_scales": (1, 2, 3, 6), "aux_channels": 8, "aux_stage": 1}
    assert (beside["classes"], beside["count"]) == (list("abcde"), 5)
    model = randomise(Segmenter(SwinTransformer(swin), 5, SegmentConfig(**options)), 2)
    assert load_segmenter(model, tmp_path / "w.pth").plain
    torch.save({"meta": {"CLASSES": list("abc")}, "state_dict": tiny(aux=0)}, tmp_path / "w.pth")
    _, options, beside = read_segmenter_config(tmp_path / "w.pth")
    assert options["aux_weight"] == 0 and "aux_channels" not in options and beside["classes"] is None
    torch.save(edited(tiny(), "psp_modules.3."), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="has 3 pooled maps and does not say of how many cells"):
        read_segmenter_config(tmp_path / "w.pth")
    torch.save(random_swin(1).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="holds no segmenter"):
        read_segmenter_config(tmp_path / "w.pth")


def test_a_module_around_the_segmenter_serves_and_one_without_memory_takes_the_tensors() -> None:
    task, file = nn.ModuleDict({"model": four_stages()}), tiny()
    load_segmenter(task, file)
    assert_same(segmenter_to_mm(dict(task.state_dict())), without_buffers(file))
    assert "holds 0 segmenters" in refusal(load_segmenter, nn.Linear(2, 2), file)
    with torch.device("meta"):
        model, other = four_stages(), four_stages(3)
    load_segmenter(model, file)
    assert_same(segmenter_to_mm(dict(model.state_dict())), without_buffers(file))
    with pytest.raises(UsageError, match="on the meta device"):
        load_segmenter(other, file)


def test_what_is_no_segmenter() -> None:
    state = dict(random_swin(1).state_dict())
    assert not is_segmenter(state) and not is_segmenter(small_detector().state_dict())
    with pytest.raises(UsageError, match="not the weights of a UPerNet"):
        describe_segmenter(state)
    for write in (segmenter_to_mm, segmenter_to_transformers):
        with pytest.raises(UsageError, match="not the tensors of a segmenter of ours"):
            write(state)
    with pytest.raises(UsageError, match="layout='timm'"):
        segmenter_to_mm(dict(four_stages().state_dict()), "timm")  # type: ignore[arg-type]
    assert segmenter_parts(open_segmenter(tiny()).heads).aux_stage == 2
