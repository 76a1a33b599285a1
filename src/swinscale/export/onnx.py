"""A graph as an ONNX file, through PyTorch's exporter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

OPSET = 18


def convert(program: ExportedProgram) -> Any:
    """The ``ONNXProgram`` of ``program``, as it is translated operation by operation."""
    from onnxscript import opset18

    def divide(numbers: Any, divisor: Any) -> Any:
        return opset18.Div(numbers, divisor)

    # All integers here are positions, so that rounding down needs no case of a negative number: a dozen operations less
    # for each division.
    table: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.floor_divide.default: divide}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        return torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, optimize=False, custom_translation_table=table, verbose=False
        )


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Writes ``program`` as ONNX, weights inside the file (beside it from 2 GB on, which is as much as one file holds)."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    made = convert(program)
    # What the exporter's own optimiser does besides takes twice as long as all the rest, and runtimes do it when they load.
    optimizer.fold_constants(made.model)
    for step in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        step(made.model)
    size = sum(t.numel() * t.element_size() for t in (*program.state_dict.values(), *program.constants.values()))
    made.save(path, external_data=size > 1.9e9)
