"""Whether what was exported computes what the model computes, at sizes and batches that the export did not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from swinscale.export.formats import Run
from swinscale.export.onnx import convert
from swinscale.export.program import Dynamic
from swinscale.models.config import Size, SwinConfig

TOLERANCE = 1e-4
"""Largest deviation, relative to the largest entry of the output, that rounding explains in single precision."""


@dataclass(frozen=True)
class Comparison:
    """One input: the largest deviation over all outputs, and the largest entry of the reference."""

    shape: tuple[int, ...]
    deviation: float
    largest: float

    @property
    def relative(self) -> float:
        return self.deviation / max(self.largest, 1e-30)

    @property
    def agrees(self) -> bool:
        return self.relative <= TOLERANCE  # False for NaN


def input_shapes(config: SwinConfig, dynamic: Dynamic, size: Size, batch: int) -> list[tuple[int, ...]]:
    """Inputs to compare on: where both are open, four batches, and sizes that are odd, not square and below a window."""
    if dynamic == "none":
        return [(batch, config.in_chans, *size)]
    if dynamic == "batch":
        return [(n, config.in_chans, *size) for n in (1, 3, 4)]
    sizes = [
        size,
        tuple(n * (3 + 2 * (i % 2)) // 4 + 1 + 2 * i for i, n in enumerate(size)),  # such as 193x323
        tuple(n // (2 + i % 2) + 5 for i, n in enumerate(size)),  # such as 133x90
        tuple(2 * p + i for i, p in enumerate(config.patch_size)),  # such as 8x9: one window that is mostly empty
    ]
    return [(n, config.in_chans, *s) for n, s in zip((1, 3, 4, 5), sizes, strict=True)]


@torch.no_grad()
def compare(run: Run, reference: nn.Module, shapes: Sequence[tuple[int, ...]]) -> Iterator[Comparison]:
    """Runs both on random images of each shape."""
    random = torch.Generator().manual_seed(0)
    for shape in shapes:
        images = torch.randn(shape, generator=random)
        expected = reference(images)
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = run(images)
        distances = torch.tensor([_distance(f, e) for f, e in zip(found, expected, strict=True)])
        yield Comparison(shape, distances.max().item(), max(e.abs().max().item() for e in expected))


@torch.no_grad()
def first_deviation(path: Path, program: ExportedProgram, shape: tuple[int, ...]) -> str | None:
    """The first operation of an ONNX file whose result is not the program's, in words; None if all agree.

    The exporter names a value after the operation that it translates, so both can be compared one by one.
    """
    import onnx
    import onnxruntime

    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = _intermediate_results(convert(program).exported_program, images)
    model = onnx.load(path)
    written = {name: node.op_type for node in model.graph.node for name in node.output}
    kept = {value.name for value in model.graph.output}
    names = [name for name in expected if name in written]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in kept)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, {session.get_inputs()[0].name: images.numpy()})
    for name, value in zip(names, found, strict=True):
        finite = expected[name].abs().nan_to_num(posinf=0)  # what a mask excludes is minus infinity in both
        one = Comparison(shape, _distance(torch.from_numpy(value), expected[name]), finite.max().item())
        if not one.agrees:
            return f"{name} ({written[name]}), relative deviation {one.relative:.1e}"
    return None


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("nan")
    return (found - expected).masked_fill(found == expected, 0).abs().max().item()


def _intermediate_results(program: ExportedProgram, images: Tensor) -> dict[str, Tensor]:
    """Every floating-point value of a program, by name, in the order in which they are computed."""
    results: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                results[n.name] = value.detach().clone()
            return value

    module = program.module()
    assert isinstance(module, torch.fx.GraphModule)
    Recorder(module).run(images)
    return results
