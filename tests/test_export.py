"""Graphs for other runtimes: any batch, any size, few axes, constants written out, and the same numbers (R-EXP-1, 2, 3)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

from random_models import random_swin
from swinscale import cli
from swinscale.errors import UsageError
from swinscale.export.check import TOLERANCE, Comparison, compare, first_deviation, input_shapes
from swinscale.export.formats import FORMATS
from swinscale.export.model import export_model
from swinscale.export.program import export_program, reference
from swinscale.models import SwinTransformer
from swinscale.weights import save_pretrained

SIZES = ((32, 32), (45, 70), (37, 41), (13, 96), (5, 3), (1, 1), (64, 2))


def deviations(model: SwinTransformer, run: Any, shapes: Any, output: Any = "logits") -> list[float]:
    return [c.relative for c in compare(run, reference(model, output), shapes)]


def runner(program: ExportedProgram) -> Any:
    module = program.module()
    return lambda images: found if isinstance(found := module(images), (tuple, list)) else (found,)


def open_shapes(channels: int = 3, sizes: Any = SIZES) -> list[tuple[int, ...]]:
    return [(1 + index % 3, channels, *size) for index, size in enumerate(sizes)]


MODELS: dict[str, dict[str, Any]] = {
    "V1": {"version": 1},
    "V2": {"version": 2},
    "four channels, main norm, position embedding": {"in_chans": 4, "main_norm_interval": 2, "ape": True},
    "one window covers the map": {"window_size": 8},
    "published padding": {"version": 1, "pad": "legacy", "small_map": "pad"},
    "torchvision's padding": {"pad": "legacy", "small_map": "pad-noshift"},
    "transferred": {"window_size": 4, "pretrained_window_sizes": 3},
    "rectangular windows": {"version": 1, "window_size": (2, 4)},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_any_batch_and_any_size(fields: dict[str, Any]) -> None:
    """R-EXP-1: one graph, seven sizes that it never saw, three batches, down to one pixel."""
    model = random_swin(**{"version": 2, **fields}).eval()
    program = export_program(model)
    # What PyTorch's own module asserts about the interpolation of a position embedding excludes maps of one token.
    sizes = [size for size in SIZES if max(size) > 4 or not model.config.ape]
    assert max(deviations(model, runner(program), open_shapes(model.config.in_chans, sizes))) <= 1e-5


@pytest.mark.parametrize("version", [1, 2])
def test_clips_of_any_length_and_size(version: int) -> None:
    model = random_swin(version, patch_size=(2, 4, 4), img_size=(8, 32, 32), window_size=(2, 4, 4)).eval()
    program = export_program(model)
    assert axes(program) <= 5
    shapes = [(1, 3, 8, 32, 32), (2, 3, 5, 20, 37), (3, 3, 1, 3, 50)]
    assert max(deviations(model, runner(program), shapes)) <= 1e-5


@pytest.mark.parametrize("output", ["features", "pyramid"])
def test_other_outputs(output: Any) -> None:
    """The maps of all stages have the sizes that the model gives."""
    model = random_swin(2, num_classes=0).eval()
    program = export_program(model, output=output)
    assert max(deviations(model, runner(program), open_shapes(), output)) <= 1e-5


@pytest.mark.parametrize("size", [(32, 32), (20, 50)])
def test_a_fixed_size_at_any_batch(size: tuple[int, int]) -> None:
    """At a fixed size windows may shrink to the map, and the graph has no arithmetic on sizes."""
    model = random_swin(2).eval()
    fixed, open_ = export_program(model, dynamic="batch", size=size), export_program(model, dynamic="hw")
    assert max(deviations(model, runner(fixed), [(n, 3, *size) for n in (1, 3, 5)])) <= 1e-5
    assert len(fixed.graph.nodes) < len(open_.graph.nodes) / 2
    with pytest.raises(AssertionError, match="Guard failed"):
        fixed.module()(torch.zeros(1, 3, 32, 48))


def test_everything_fixed() -> None:
    model = random_swin(1).eval()
    program = export_program(model, dynamic="none", size=(24, 40), batch=3)
    assert not program.range_constraints
    assert deviations(model, runner(program), [(3, 3, 24, 40)])[0] <= 1e-5


def axes(program: ExportedProgram) -> int:
    values = [node.meta.get("val") for node in program.graph.nodes]
    return max(value.dim() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dynamic", ["none", "batch", "hw"])
@pytest.mark.parametrize("version", [1, 2])
def test_what_a_graph_is_made_of(version: int, dynamic: Any) -> None:
    """R-EXP-2: at most five axes; the position bias and the bias of q, k and v are constants; one op for a LayerNorm."""
    model = random_swin(version).eval()
    program = export_program(model, dynamic=dynamic)
    assert axes(program) <= 5
    names = set(program.state_dict)
    assert not any(part in name for name in names for part in ("cpb_mlp", "bias_table", "q_bias", "v_bias"))
    bias = program.state_dict["model.layers.0.blocks.0.attn.written_bias"]
    attn = model.layers[0].blocks[0].attn
    assert torch.equal(bias, attn.bias(attn.window).rows())
    if version == 2:
        assert not program.state_dict["model.layers.0.blocks.0.attn.qkv.bias"].chunk(3)[1].any()
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.layer_norm.default" in used and "aten.roll.default" not in used
    assert not any("item" in name or "nonzero" in name for name in used)


def test_the_model_stays_as_it_was() -> None:
    """The copy that is traced shares its weights; the model can go on learning."""
    model = random_swin(2).train()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    export_program(model, dynamic="batch")
    assert before == {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert model.training
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_by_name_stays_in_a_graph() -> None:
    """A back end that is asked for by name is not replaced when a user exports the model himself."""
    model = random_swin(2).eval()
    model.set_attention_backend("sdpa")
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    assert any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(program.module()(images), model(images), atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    record = {"preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": ["a", "b", "c", "d", "e"]}}
    save_pretrained(random_swin(2), path, metadata=record)
    return path


def check_onnx(path: Path, dynamic: Any) -> None:
    """Opset 18, names for open axes, and none of the case distinctions that integer division brings along."""
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] >= 18
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert [isinstance(n, str) for n in shape] == [True, False, dynamic == "hw", dynamic == "hw"] and shape[1] == 3
    kinds = {node.op_type for node in model.graph.node}
    assert "LayerNormalization" in kinds and not kinds & {"Mod", "SequenceAt", "Loop", "If", "NonZero"}


@pytest.mark.parametrize("dynamic", ["batch", "hw"])
@pytest.mark.parametrize("name", ["torch", "onnx", "openvino"])
def test_files_compute_what_the_model_computes(name: str, dynamic: Any, saved: Path, tmp_path: Path) -> None:
    """R-EXP-1, R-EXP-3: what was written is read again and run, at batches and sizes that the export did not see."""
    for package in FORMATS[name].packages:
        pytest.importorskip(package)
    record = export_model(saved, tmp_path / "out", name, dynamic=dynamic, check=True)
    if name == "onnx":
        check_onnx(tmp_path / "out" / "model.onnx", dynamic)
    assert len(record["check"]) >= 3
    assert len({case["input"][0] for case in record["check"]}) >= 3
    assert dynamic == "batch" or len({tuple(case["input"][2:]) for case in record["check"]}) >= 4
    assert all(case["deviation"] <= TOLERANCE * case["largest"] for case in record["check"])
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["classes"] == ["a", "b", "c", "d", "e"] and written["input"]["mean"] == [0.5] * 3
    assert written["input"]["shape"][0] == "batch"
    assert written["input"]["shape"][2:] == (["height", "width"] if dynamic == "hw" else [32, 32])
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"export.json", "model.bin", written["file"]}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("version, dim, dynamic", [(2, 24, "batch"), (2, 24, "hw"), (1, 264, "hw")])
def test_machine_code(version: int, dim: int, dynamic: Any, tmp_path: Path) -> None:
    """An AOTInductor package, its sizes open too; norms of more than 1,024 channels are a path of their own there."""
    save_pretrained(random_swin(version, embed_dim=dim, depths=(1, 2)), tmp_path / "model")
    record = export_model(tmp_path / "model", tmp_path / "out", "aotinductor", dynamic=dynamic, check=True)
    assert all(case["deviation"] <= TOLERANCE * case["largest"] for case in record["check"])


def test_a_wrong_file_is_found_out(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-EXP-3: the check names the first operation that differs, and the command fails."""
    onnx = pytest.importorskip("onnx")
    from swinscale.export import formats
    from swinscale.export import onnx as writer

    def spoil(program: ExportedProgram, path: Path) -> None:
        writer.write_onnx(program, path)
        model = onnx.load(path)
        weight = next(t for t in model.graph.initializer if t.name.endswith("layers.1.blocks.0.mlp.fc1.bias"))
        spoilt = onnx.numpy_helper.to_array(weight) + 1
        weight.CopyFrom(onnx.numpy_helper.from_array(spoilt, weight.name))
        onnx.save(model, path)

    monkeypatch.setitem(formats.FORMATS, "onnx", formats.Format(**{**vars(formats.FORMATS["onnx"]), "write": spoil}))
    arguments = [
        "export",
        str(saved),
        "--out",
        str(tmp_path / "out"),
        "--format",
        "onnx",
        "--dynamic",
        "batch",
        "--check",
    ]
    assert cli.main(arguments) == 2
    with pytest.raises(UsageError, match=r"does not compute.*first at linear_\d+ \(Add\)"):
        export_model(saved, tmp_path / "again", "onnx", dynamic="batch", check=True)


def test_nothing_differs_in_a_right_file(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from swinscale.export.onnx import write_onnx
    from swinscale.weights import from_pretrained

    program = export_program(from_pretrained(saved), dynamic="batch")
    write_onnx(program, tmp_path / "model.onnx")
    assert first_deviation(tmp_path / "model.onnx", program, (3, 3, 32, 32)) is None


def test_not_a_number_never_agrees() -> None:
    assert not Comparison((1,), math.nan, 1.0).agrees
    assert Comparison((1,), 1e-6, 1.0).agrees


@pytest.mark.parametrize("dynamic", ["none", "batch", "hw"])
def test_shapes_of_a_check(dynamic: Any) -> None:
    config = random_swin(2).config
    shapes = input_shapes(config, dynamic, (32, 32), 2)
    assert len({shape[0] for shape in shapes}) >= (1 if dynamic == "none" else 3)
    assert len({shape[2:] for shape in shapes}) == (4 if dynamic == "hw" else 1)


MISTAKES = {
    "an unknown format": (["--format", "tensorflow"], "Unknown format 'tensorflow'"),
    "a directory that is used": (["--format", "torch", "--out", "."], "exists already"),
    "a setting without a format": (["--dynamic", "hw"], "--dynamic needs a --format"),
    "a check without a format": (["--check"], "--check needs a --format"),
    "a step of a model": (["--format", "torch", "--step", "3"], "write the checkpoint as one first"),
    "a size of other axes": (["--format", "torch", "--size", "8x32x32"], "give 2 axes"),
    "images without int8": (["--format", "torch", "--data", "photos"], "--data is for openvino-int8"),
    "maps in int8": (["--format", "openvino-int8", "--output", "pyramid"], "leave --output"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(saved)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert cli.main(["export", str(saved), *out, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_model_without_classes(tmp_path: Path) -> None:
    save_pretrained(random_swin(2, num_classes=0), tmp_path / "model")
    with pytest.raises(UsageError, match="no classifier"):
        export_model(tmp_path / "model", tmp_path / "out", "torch")
