"""Models as files for other runtimes: how long it takes, whether they compute the same at sizes that the export did not see,
and how fast they run. Peers go through the same PyTorch exporter, as far as they get.

Every case has a process and a time limit of its own.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from bench.contenders import OURS, PEERS, Cannot, Contender, Setting, build, randomise
from bench.progress import say
from bench.tables import machine, table
from swinscale.export.check import TOLERANCE, compare, input_shapes
from swinscale.export.formats import FORMATS
from swinscale.export.program import export_program, reference
from swinscale.timing import Spread, alternate
from swinscale.torchvision_cpu import ensure_torchvision

SETTINGS = [Setting("swin_tiny", 7, 224), Setting("swinv2_tiny", 8, 256)]
TRIAL = Setting("swinv2_trial", 4, 64)
LIMIT = 300
"""Seconds for one case."""
BATCHES = (1, 8)


PROJECTS = (OURS, *PEERS)


def cases(trial: bool) -> list[tuple[Setting, str, str]]:
    """(setting, project, format)"""
    if trial:
        return [(TRIAL, OURS, "torch"), (TRIAL, "timm", "torch")]
    ours = [(setting, OURS, form) for setting in SETTINGS for form in FORMATS]
    return ours + [(SETTINGS[-1], peer, "torch") for peer in PEERS]


def measured(trial: bool, projects: Collection[str], repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    """A row for each case, as it is done."""
    context = multiprocessing.get_context("spawn")
    for setting, project, form in cases(trial):
        if project not in projects:
            continue
        say(f"{setting} {project} {form}")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(theirs, setting, project, form, repeats, threads), daemon=True)
        process.start()
        theirs.close()
        row: dict[str, Any] = {"model": str(setting), "project": project, "format": form}
        try:
            row |= ours.recv() if ours.poll(LIMIT) else {"failed": f"not done after {LIMIT} s"}
        except EOFError:
            row["failed"] = "the process died"
        process.kill()
        process.join()
        yield row


def _worker(out: Connection, setting: Setting, project: str, form: str, repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    try:
        found = _ours(setting, form, repeats) if project == OURS else _peer(setting, project)
    except Exception as error:  # whatever a project raises is its result
        found = {"failed": _line(error)}
    out.send(found)


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:80] if text else ''}"


def _ours(setting: Setting, form: str, repeats: int) -> dict[str, Any]:
    model, kind = build(Contender(OURS), setting), FORMATS[form]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        kind.write(export_program(model), Path(folder) / kind.file)
        seconds = time.perf_counter() - start
        run, eager = kind.open(Path(folder) / kind.file), reference(model, "logits")
        shapes = input_shapes(model.config, "hw", model.config.img_size, 2)
        sizes = [{"input": c.shape, "relative": c.relative, "agrees": c.agrees} for c in compare(run, eager, shapes)]
        return {"seconds": seconds, "sizes": sizes, "speed": [_speed(run, eager, setting, n, repeats) for n in BATCHES]}


@torch.inference_mode()
def _speed(run: Any, eager: nn.Module, setting: Setting, batch: int, repeats: int) -> dict[str, Any]:
    images = torch.randn(batch, 3, setting.size, setting.size)
    times = alternate([lambda _: run(images), lambda _: eager(images)], repeats, "cpu")
    return {
        "batch": batch,
        "seconds": Spread.of(times[0]).as_dict(),
        "ratio": Spread.ratio(times[1], times[0]).as_dict(),
    }


def _peer(setting: Setting, project: str) -> dict[str, Any]:
    """Their model through ``torch.export`` with open batch, height and width, and then at sizes not seen."""
    try:
        graph = _Logits(_open_timm(setting) if project == "timm" else build(Contender(project), setting)).eval()
    except Cannot as reason:
        return {"failed": str(reason)}
    size = setting.size
    start = time.perf_counter()
    program = torch.export.export(
        graph, (torch.zeros(2, 3, size, size + 32),), dynamic_shapes=({axis: Dim.AUTO for axis in (0, 2, 3)},)
    )
    seconds = time.perf_counter() - start
    # PyTorch asserts what it noted about sizes while it traced. Some of it may be more than the operations need.
    runs = {"": program.module(), "without its guards: ": program.module(check_guards=False)}
    shapes = input_shapes(setting.config, "hw", (size, size), 2)
    return {"seconds": seconds, "sizes": [_try(runs, graph, shape) for shape in shapes]}


def _open_timm(setting: Setting) -> nn.Module:
    """timm's models refuse other sizes than their own unless they are told otherwise when they are made."""
    ensure_torchvision()
    from timm.models.swin_transformer import SwinTransformer as V1
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as V2

    config = setting.config
    shape = {"embed_dim": config.embed_dim, "depths": config.depths, "num_heads": config.num_heads}
    kind = V1 if config.version == 1 else V2
    made = kind(img_size=setting.size, window_size=setting.window, dynamic_img_size=True, **shape)
    return randomise(made)


class _Logits(nn.Module):
    """A project's model with a tensor as its output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out = self.model(images)
        return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def _try(runs: dict[str, nn.Module], eager: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        expected = eager(images)
    except Exception as error:
        return {"input": shape, "agrees": None, "failed": f"the model itself: {_line(error)}"}
    outcomes = []
    for how, run in runs.items():
        try:
            relative = ((run(images) - expected).abs().max() / expected.abs().max()).item()
        except Exception as error:
            outcomes.append(how + _line(error))
            continue
        outcomes.append(f"{how}deviates by {relative:.0e}")
        if relative <= TOLERANCE and not how:
            return {"input": shape, "agrees": True, "relative": relative}
    return {"input": shape, "agrees": False, "failed": "; ".join(outcomes)}


def parts(content: dict[str, Any]) -> dict[str, Any]:
    """What a page can show."""
    rows = content["rows"]
    ours, theirs = ([r for r in rows if (r["project"] == OURS) is own] for own in (True, False))
    return {
        "ours": lambda: _ours_table(ours),
        "peers": lambda: _peers_table(theirs),
        "machine": lambda: "\n\n".join(dict.fromkeys(machine(row["environment"]) for row in rows)),
    }


def _ours_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["model"], row["format"], row["failed"], *["–"] * (1 + len(BATCHES))])
            continue
        agree = sum(size["agrees"] for size in row["sizes"])
        worst = max(size["relative"] for size in row["sizes"])
        speeds = [f"{s['ratio']['median']:.2f} ({s['ratio']['q1']:.2f}–{s['ratio']['q3']:.2f})" for s in row["speed"]]
        checked = f"{agree} of {len(row['sizes'])}, {worst:.0e}"
        lines.append([row["model"], row["format"], f"{row['seconds']:.0f} s", checked, *speeds])
    heads = ["model", "format", "to write it", "sizes that agree, largest deviation"]
    return table([*heads, *(f"speed, batch {n}" for n in BATCHES)], lines)


def _peers_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["model"], row["project"], row["failed"], "–"])
            continue
        outcome = [
            f"{'×'.join(map(str, size['input']))}: {'agrees' if size['agrees'] else size.get('failed') or 'differs'}"
            for size in row["sizes"]
        ]
        lines.append([row["model"], row["project"], f"{row['seconds']:.0f} s", "; ".join(outcome)])
    return table(["model", "project", "to export it", "at sizes that the export did not see"], lines)
