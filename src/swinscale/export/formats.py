"""The formats a graph is written in, and how each is run again: what a check compares is what was written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from swinscale.errors import UsageError
from swinscale.export.onnx import write_onnx

Run = Callable[[Tensor], Sequence[Tensor]]
"""A batch of images to the outputs of a model."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        file: name of the file in the directory.
        write: writes a program there.
        open: what runs the file, on a CPU.
        packages: what both need besides PyTorch.
        about: in words.
    """

    file: str
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Run]
    packages: tuple[str, ...]
    about: str


def _write_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _open_torch(path: Path) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own pytree
        module = torch.export.load(path).module()
    return lambda images: _several(module(images))


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone: it warns of constants that it leaves as they are
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(value) for value in session.run(None, {name: images.numpy()})]


def _write_openvino(program: ExportedProgram, path: Path) -> None:
    import openvino

    openvino.save_model(openvino_graph(program, path.parent), path, compress_to_fp16=False)


def openvino_graph(program: ExportedProgram, folder: Path) -> Any:
    """An OpenVINO model of ``program``, by way of ONNX: OpenVINO's own reader of programs lacks operations on sizes."""
    import openvino

    between = folder / ".openvino.onnx"
    try:
        write_onnx(program, between)
        graph = openvino.convert_model(between)
        for value, node in zip(graph.outputs, program.graph_signature.user_outputs, strict=True):
            value.get_tensor().set_names({str(node)})
        return graph
    finally:
        for path in folder.glob(f"{between.name}*"):
            path.unlink()


def _open_openvino(path: Path) -> Run:
    import openvino

    # In single precision where the processor would rather compute in bf16: the file says what the weights are.
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Tensor) -> list[Tensor]:
        found = model(images.numpy())
        return [torch.from_numpy(found[index]) for index in range(len(model.outputs))]

    return run


def _write_aotinductor(program: ExportedProgram, path: Path) -> None:
    # Index arithmetic on symbolic sizes, carried into the kernels that use it, keeps the compiler busy for hours.
    # And without it the compiler fails on a norm of more channels than it computes the variance of in two steps.
    settings = {"constant_and_index_propagation": False, "cpp.use_two_step_variance_threshold": 1 << 20}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def _open_aotinductor(path: Path) -> Run:
    module = torch._inductor.aoti_load_package(str(path))
    return lambda images: _several(module(images))


def _several(outputs: Any) -> Sequence[Tensor]:
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)


FORMATS = {
    "torch": Format("model.pt2", _write_torch, _open_torch, (), "PyTorch's exported program"),
    "onnx": Format("model.onnx", write_onnx, _open_onnx, ("onnx", "onnxscript", "onnxruntime"), "ONNX, opset 18"),
    "openvino": Format(
        "model.xml", _write_openvino, _open_openvino, ("onnx", "onnxscript", "openvino"), "OpenVINO, single precision"
    ),
    "aotinductor": Format(
        "model.pt2",
        _write_aotinductor,
        _open_aotinductor,
        (),
        "machine code for this kind of processor, without Python",
    ),
}


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: for an unknown one, or one whose packages are not installed.
    """
    from importlib.util import find_spec

    if name not in FORMATS:
        raise UsageError(f"Unknown format '{name}': choose one of {', '.join(FORMATS)}, openvino-int8.")
    for package in FORMATS[name].packages:
        if find_spec(package) is None:
            raise UsageError(f"The format '{name}' needs the package '{package}': pip install 'swinscale[export]'.")
    return FORMATS[name]
