"""A trained classifier in eight-bit integers for CPUs, through OpenVINO and NNCF; prints what it costs in accuracy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swinscale.data import EpochLoader, ImageDataset, Source, open_source
from swinscale.errors import UsageError
from swinscale.export.formats import openvino_graph
from swinscale.export.program import Dynamic, export_program
from swinscale.inference import Pipeline, check_labels, held_out_sources, load_pipeline
from swinscale.manifest import environment
from swinscale.models.config import format_size
from swinscale.tasks import Classify


def quantize_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    data: str | None = None,
    split: str = "test",
    calibration: int = 300,
    batch_size: int = 16,
    dynamic: Dynamic = "batch",
) -> dict[str, Any]:
    """Writes ``checkpoint`` as an int8 OpenVINO model and compares it with the original on labelled images.

    Weights and activations of linear layers and convolutions become integers (static post-training quantisation); their
    ranges are read off ``calibration`` images, taken from the run's training images or, with ``data``, from its part
    "train" where it has one, else from the evaluation images themselves (the labels are not used).

    Args:
        out: directory for ``model.xml``, ``model.bin`` and ``quantization.json``.
        data: a source of labelled images; None: those that the run was evaluated on.
        dynamic: what stays open in the graph, see ``swinscale.export.program.export_program``.

    Returns:
        What ``quantization.json`` holds: accuracies, agreement, images per second and bytes, before and after.

    Raises:
        UsageError: if the checkpoint does not classify, or ``data`` does not fit it.
    """
    try:
        import nncf
        import onnxscript  # noqa: F401  (the way to OpenVINO)
        import openvino
    except ImportError as error:
        raise UsageError(
            f"Quantisation needs the package '{error.name}': pip install 'swinscale[quantize]'."
        ) from error
    pipeline = load_pipeline(checkpoint)
    if not isinstance(pipeline.task, Classify):
        raise UsageError(f"{checkpoint} does not classify, so there is no accuracy to compare. Fine-tune it first.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already. Name another directory with --out, or remove it.")
    calibrating, evaluated, name = _sources(checkpoint, pipeline, data, split)
    config, model = pipeline.backbone.config, pipeline.backbone
    console = Console(highlight=False)
    console.print(f"Calibrating on {min(calibration, len(calibrating))} images, then comparing on {len(evaluated)} …")
    out.mkdir(parents=True, exist_ok=True)
    graph = openvino_graph(export_program(model, dynamic=dynamic), out)
    images = [batch["image"].numpy() for batch in _batches(pipeline, calibrating, 1, calibration)]  # read several times
    integer = nncf.quantize(
        graph,
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(integer, out / "model.xml", compress_to_fp16=False)
    compiled = openvino.Core().compile_model(out / "model.xml", "CPU")

    def run_integer(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0])

    with torch.inference_mode():
        before = _measure(model, pipeline, evaluated, batch_size)
        after = _measure(run_integer, pipeline, evaluated, batch_size)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    here = environment()
    here["versions"] |= {"openvino": openvino.__version__, "nncf": nncf.__version__}
    result = {
        "environment": here,
        "checkpoint": str(checkpoint),
        "images": len(before["labels"]),
        "source": name,
        "calibration_images": len(images),
        "input": list(config.img_size),
        "top1": {"float32": _top1(before), "int8": _top1(after)},
        "same_prediction": _share(before["classes"] == after["classes"]),
        "images_per_second": {"float32": before["speed"], "int8": after["speed"]},
        "megabytes": {"float32": size / 1e6, "int8": (out / "model.bin").stat().st_size / 1e6},
        "classes": pipeline.classes,
        "mean": list(pipeline.mean),
        "std": list(pipeline.std),
    }
    (out / "quantization.json").write_text(json.dumps(result, indent=1) + "\n")
    _print(console, result, checkpoint)
    console.print(f"Written: {out / 'model.xml'}", soft_wrap=True, markup=False)
    return result


def _sources(checkpoint: Path, pipeline: Pipeline, data: str | None, split: str) -> tuple[Source, Source, str]:
    """Images to calibrate on, images to compare on, and what to call these."""
    if data is None:
        return held_out_sources(checkpoint, labelled=True)
    evaluated = open_source(data, split=split)
    check_labels(evaluated, data, pipeline, checkpoint)
    return (open_source(data, split="train") if "train" in evaluated.splits else evaluated), evaluated, data


def _batches(pipeline: Pipeline, source: Source, batch_size: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Batches of a source, in random but repeatable order if only ``limit`` images are wanted."""
    dataset = ImageDataset(source, pipeline.transform, pipeline.backbone.config.in_chans, replace_corrupt=False)
    seen = 0
    for batch in EpochLoader(dataset, batch_size, shuffle=limit is not None, drop_last=False).batches(0):
        if limit is not None and seen >= limit:
            return
        if len(batch["image"]):
            seen += len(batch["image"])
            yield batch


def _measure(run: Callable[[Tensor], Tensor], pipeline: Pipeline, source: Source, batch_size: int) -> dict[str, Any]:
    classes, labels, seconds, timed = [], [], 0.0, 0
    for index, batch in enumerate(_batches(pipeline, source, batch_size)):
        if not index:
            run(batch["image"])  # warms up
        start = time.perf_counter()
        logits = run(batch["image"])
        seconds, timed = seconds + time.perf_counter() - start, timed + len(logits)
        classes.append(logits.argmax(-1))
        labels.append(batch["label"])
    return {"classes": torch.cat(classes), "labels": torch.cat(labels), "speed": timed / seconds if seconds else None}


def _share(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def _top1(measured: dict[str, Any]) -> float:
    return _share(measured["classes"] == measured["labels"])


def _print(console: Console, result: dict[str, Any], checkpoint: Path) -> None:
    title = f"{checkpoint} at {format_size(result['input'])} on {result['images']} images of {result['source']}"
    table = Table("", "float32", "int8", title=title)
    top1, speed, size = result["top1"], result["images_per_second"], result["megabytes"]
    table.add_row("top-1", f"{top1['float32']:.2f}", f"{top1['int8']:.2f} ({top1['int8'] - top1['float32']:+.2f})")
    table.add_row("same prediction", "", f"{result['same_prediction']:.2f} %")
    if speed["float32"] and speed["int8"]:
        table.add_row("images per second", *(f"{speed[k]:.1f}" for k in ("float32", "int8")))
    table.add_row("megabytes", *(f"{size[k]:.1f}" for k in ("float32", "int8")))
    console.print(table)
