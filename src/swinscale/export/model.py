"""``swinscale export --format``: a model as a file for another runtime, with what is needed to use it, and checked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swinscale.errors import UsageError
from swinscale.export.check import TOLERANCE, Comparison, compare, first_deviation, input_shapes
from swinscale.export.formats import FORMATS, get_format
from swinscale.export.program import Dynamic, Output, export_program, reference
from swinscale.manifest import environment
from swinscale.models.config import Size, format_size
from swinscale.models.swin import SwinTransformer
from swinscale.weights import from_pretrained, read_config, read_metadata
from swinscale.weights.hub import resolve

INT8 = "openvino-int8"


def export_model(
    source: str | Path,
    out: Path,
    format: str,
    *,
    dynamic: Dynamic = "hw",
    size: int | Size | None = None,
    batch: int = 2,
    output: Output = "logits",
    check: bool = False,
    data: str | None = None,
) -> dict[str, Any]:
    """Writes a model for another runtime, and ``export.json``, which says what goes in and what comes out.

    Args:
        source: what ``from_pretrained`` reads: a directory, a weight file, a name on the Hub.
        out: directory, new or empty.
        format: a key of ``swinscale.export.formats.FORMATS``, or "openvino-int8" (``quantize_checkpoint``).
        dynamic, size, batch, output: see ``export_program``.
        check: run what was written beside the model, at batches and sizes that the export did not see.
        data: labelled images, for int8: to calibrate on, and to measure what it costs.

    Returns: what ``export.json`` holds.

    Raises:
        UsageError: for settings that do not fit, a directory that is not empty, or a check that fails.
    """
    if format == INT8:
        return _export_integer(source, out, dynamic, output, size, check, data)
    if data:
        raise UsageError(f"--data is for {INT8}; the format '{format}' needs none.")
    kind = get_format(format)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already. Name another directory with --out, or remove it.")
    place = resolve(source)
    if output == "logits" and read_metadata(place).get("task", {}).get("name") == "detect":
        raise UsageError(
            f"{source} is a detector, whose numbers of boxes depend on the picture: only its backbone can be exported, with "
            f"--output pyramid."
        )
    read_config(place)  # refuses what is no Swin Transformer
    model = from_pretrained(place).eval()
    size = model.config.img_size if size is None else (size,) * model.config.rank if isinstance(size, int) else size
    console = Console(highlight=False)
    start = time.perf_counter()
    program = export_program(model, dynamic=dynamic, size=size, batch=batch, output=output)
    out.mkdir(parents=True, exist_ok=True)
    kind.write(program, out / kind.file)
    seconds = time.perf_counter() - start
    console.print(f"Written in {seconds:.0f} s: {out / kind.file} ({kind.about})", soft_wrap=True, markup=False)
    record = {"format": format, "source": str(source), "file": kind.file, "seconds": seconds}
    record |= _interface(place, model, dynamic, size, batch, output) | {"environment": environment()}
    found: list[Comparison] = []
    if check:
        shapes = input_shapes(model.config, dynamic, size, batch)
        found = list(compare(kind.open(out / kind.file), reference(model, output), shapes))
        _print(console, found)
        record["check"] = [{"input": c.shape, "deviation": c.deviation, "largest": c.largest} for c in found]
    (out / "export.json").write_text(json.dumps(record, indent=1) + "\n")
    if bad := next((c for c in found if not c.agrees), None):
        where = first_deviation(out / kind.file, program, bad.shape) if format == "onnx" else None
        raise UsageError(
            f"{out / kind.file} does not compute what the model computes: at {format_size(bad.shape)} it deviates by "
            f"{bad.deviation:.2g}, {bad.relative:.1e} of the largest entry ({TOLERANCE:g} is allowed)"
            + (f"; first at {where}" if where else "")
            + ". Do not use it; please report the model's configuration."
        )
    return record


def _export_integer(
    source: str | Path, out: Path, dynamic: Dynamic, output: Output, size: Any, check: bool, data: str | None
) -> dict[str, Any]:
    """Eight-bit integers are not the same numbers, so they are measured on images; a check shows what else they change."""
    from swinscale.inference import load_pipeline
    from swinscale.quantize import quantize_checkpoint

    if output != "logits" or size is not None:
        raise UsageError(f"{INT8} writes the classifier at the size of the checkpoint: leave --output and --size out.")
    record = quantize_checkpoint(resolve(source), out, data=data, dynamic=dynamic)
    if check:
        model = load_pipeline(source).backbone
        shapes = input_shapes(model.config, dynamic, model.config.img_size, 2)
        run = FORMATS["openvino"].open(out / "model.xml")
        _print(Console(highlight=False), list(compare(run, reference(model, output), shapes)), exact=False)
    return record


def _interface(
    place: Path, model: SwinTransformer, dynamic: Dynamic, size: Size, batch: int, output: Output
) -> dict[str, Any]:
    """What a user of the file has to know."""
    preprocessing = read_metadata(place).get("preprocessing", {})
    axes: list[Any] = ["time", "height", "width"][3 - model.config.rank :] if dynamic == "hw" else list(size)
    return {
        "input": {
            "shape": ["batch" if dynamic != "none" else batch, model.config.in_chans, *axes],
            "dtype": "float32",
            "values": "colours from 0 to 1, minus mean, divided by std",
            "mean": preprocessing.get("mean"),
            "std": preprocessing.get("std"),
        },
        "output": output,
        "classes": preprocessing.get("classes"),
        "trained_size": list(model.config.img_size),
        "windows": [list(window) for window in model.config.stage_windows],
    }


def _print(console: Console, found: list[Comparison], exact: bool = True) -> None:
    table = Table("input", "largest deviation", "of the largest entry", "", title="compared with the model in PyTorch")
    for c in found:
        verdict = ("agrees" if c.agrees else "DIFFERS") if exact else "rounded"
        table.add_row(format_size(c.shape), f"{c.deviation:.1e}", f"{c.relative:.1e}", verdict)
    console.print(table)
