"""Three billion parameters on 40 GB: the memory recipe of the Swin V2 article, predicted for Giant and measured where it runs."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from swinscale.claims.base import Claim, Figure, Finding, Outcome, Published, Results, Scale, Step, Table, ratio_to
from swinscale.claims.statistics import REFUTED, REPRODUCED, judge
from swinscale.intervals import Interval
from swinscale.memory import Predictor, usable
from swinscale.models import SwinConfig, SwinTransformer, model_config
from swinscale.models.variants import GIANT
from swinscale.parallel import MemoryConfig, arrange, resolve_precision, world
from swinscale.peaks import TrainingStep, measure
from swinscale.tasks import Classify, Task
from swinscale.timing import alternate

_SEQUENTIAL = ("sequential", "sequential", "eager", "eager")
NONE, BLOCK, SEQUENTIAL = "none", "block checkpointing", "sequential attention, stages 1 and 2"
TECHNIQUES = {
    NONE: MemoryConfig("eager"),
    "selective checkpointing": MemoryConfig("eager", "selective"),
    BLOCK: MemoryConfig("eager", "block"),
    SEQUENTIAL: MemoryConfig(_SEQUENTIAL),
    "block and sequential": MemoryConfig(_SEQUENTIAL, "block"),
}
"""Each alone, added to "none", in which attention writes out every tensor per pair of tokens, as in the article's time."""
RECIPE = "the article's recipe: ZeRO-1, block, sequential"
PREDICTED = {
    **TECHNIQUES,
    "ZeRO-1": MemoryConfig("eager", shard="zero1"),
    "ZeRO-2": MemoryConfig("eager", shard="zero2"),
    "ZeRO-3": MemoryConfig("eager", shard="zero3"),
    RECIPE: MemoryConfig(_SEQUENTIAL, "block", shard="zero1"),
}
PROCESSES, CARD = 8, int(40e9)
"""A machine of the article's time: eight A100 of 40 GB. It does not say how many it used; with more, ZeRO needs less."""
PLACES: dict[str, dict[str, Any]] = {
    "192/12": {},
    "640/40": {"img_size": 640, "window_size": 40},
    "1536/32": {"img_size": 1536, "window_size": 32},
    "320²×8/20²×8": {"img_size": (16, 320, 320), "patch_size": (2, 4, 4), "window_size": (8, 20, 20)},
}
"""Where the article trains Giant: size and window. 8 of the clip are frames in pairs."""
LARGE, SLOWER, LITTLE = 50.0, 1.3, 1.1
"""Our reading of a large saving, at least half of what a step needs for a time; the article's bound on the time of
checkpointing; our reading of a little slower."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        width: channels of the first stage of a network with Giant's depths and extra norms.
        size, window: of the pictures, and of attention.
        count: images per step.
        rounds: of timing, in which every technique takes a turn.
        shard: what processes share under each technique.
    """

    width: int
    size: int
    window: int
    count: int
    rounds: int
    shard: Literal["none", "zero1"] = "none"

    @property
    def model(self) -> SwinConfig:
        """With ten classes and 32 channels per head."""
        heads = tuple(max(1, self.width // 32) * 2**stage for stage in range(4))
        shape: dict[str, Any] = {**GIANT, "embed_dim": self.width, "num_heads": heads}
        return SwinConfig(**shape, img_size=self.size, window_size=self.window, num_classes=10, drop_path_rate=0.1)


SETTINGS: dict[Scale, Settings] = {
    "desk": Settings(width=32, size=384, window=24, count=1, rounds=9),
    "gpu": Settings(width=192, size=768, window=32, count=1, rounds=9),
    "paper": Settings(width=512, size=640, window=40, count=1, rounds=9, shard="zero1"),
}


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    """No image is read and nothing is drawn by a seed: a step of training takes the same memory and time on any picture."""
    made = [Step(predicted_step(place), predict_place, {"place": place}) for place in PLACES]
    return [*made, Step("measured", measure_techniques, {"settings": SETTINGS[scale]}, alone=True)]


def predicted_step(place: str) -> str:
    """The name of the step that predicts a place; also that of a directory."""
    return "predicted-" + place.translate(str.maketrans("/²×", "-2x"))


def predict_place(directory: Path, place: str) -> dict[str, Any]:
    """Bytes for Giant's backbone on each of ``PROCESSES`` GPUs, one image each, in bf16 under autocast.

    Returns:
        ``parameters`` (their number), and by technique ``states`` (parameters, gradients and moments) and ``peak``.
    """
    changes = {"pretrained_window_sizes": 0, "num_classes": 0, **PLACES[place]}
    predictor = Predictor(replace(model_config("swinv2_giant_window12_192"), **changes), micro_batch=1)
    techniques = {}
    for name, memory in PREDICTED.items():
        plan = predictor.plan(memory, processes=PROCESSES)
        techniques[name] = {"states": plan.parameters + plan.gradients + plan.optimizer, "peak": plan.peak}
    return {"parameters": sum(predictor.sizes), "techniques": techniques}


def measure_techniques(directory: Path, settings: Settings) -> dict[str, Any]:
    """Training steps under each technique: the peak of a step, and seconds, in alternation on one model.

    Returns:
        ``held`` bytes between steps; by technique ``peaks`` in bytes and ``seconds`` in each round, without those that need
        more memory than there is; ``missing``: these.
    """
    with world("auto", settings.shard != "none") as here:
        precision, kind = resolve_precision("auto", here.device), here.device.type
        techniques = {name: replace(m, shard=settings.shard) for name, m in TECHNIQUES.items()}
        held, peaks = 0, dict[str, int]()
        for name, memory in techniques.items():
            with contextlib.suppress(torch.OutOfMemoryError):
                peaks[name], held = measure(
                    _task(settings), settings.size, settings.count, memory, precision, here=here
                )
            gc.collect()
        step = TrainingStep(_task(settings), settings.size, settings.count, techniques[BLOCK], precision, here=here)

        def take(memory: MemoryConfig, _: int) -> None:
            arrange(step.task, memory)
            step()

        times = alternate([partial(take, techniques[name]) for name in peaks], settings.rounds, kind, min_seconds=0)
    missing = [name for name in techniques if name not in peaks]
    return {"held": held, "peaks": peaks, "seconds": dict(zip(peaks, times, strict=True)), "missing": missing}


def _task(settings: Settings) -> Task:
    """On ``meta``: each process fills its share."""
    with torch.device("meta"):
        return Classify(SwinTransformer(settings.model), settings.model.num_classes)


def read(scale: Scale, results: Results) -> Outcome:
    predicted = {place: results[predicted_step(place)] for place in PLACES}
    measured = results["measured"]
    findings = [
        _of_states(predicted["192/12"]),
        *_of_techniques(measured),
        *(_of_recipe(predicted[p], p) for p in list(PLACES)[2:]),
    ]
    notes = [
        "The two rules about predicted gigabytes were written when the predictions were known from docs/memory.md; those about "
        "measured times and savings before anything was measured.",
        "The speed of ZeRO stage 1 is not part of the verdict: it needs several GPUs. Predicted peaks are of the backbone alone; the "
        "heads of the article's detector and video classifier come on top.",
        *(f"{name} needs more memory than this machine has." for name in measured["missing"]),
    ]
    return Outcome(
        findings, [_predicted_table(predicted), _states_table(predicted["192/12"]), _measured_table(measured)],
        [_peaks_figure(predicted), _trade_figure(measured)], notes,
    )  # fmt: skip


def _gigabytes(amount: float) -> float:
    return amount / 1e9


def _ratio(measured: Mapping[str, Any], name: str) -> Interval:
    """Of the seconds of a step to those without a technique, within the same round."""
    return Interval.of_ratio(measured["seconds"][name], measured["seconds"][NONE])


def _saved(measured: Mapping[str, Any], name: str) -> float:
    """Share of what a step needs beyond what is there between two steps."""
    kept = measured["held"]
    return 1 - (measured["peaks"][name] - kept) / (measured["peaks"][NONE] - kept)


def _of_states(predicted: Mapping[str, Any]) -> Finding:
    states = _gigabytes(predicted["techniques"][NONE]["states"])
    return Finding(
        "parameters, gradients and AdamW's moments of Giant in fp32 take 48 GB on every GPU under data parallelism",
        "48 GB for 3 billion parameters",
        f"{states:.2f} GB, predicted: 16 bytes for each of {predicted['parameters']:,} parameters of the backbone",
        "rounded to whole GB it is 48",
        REPRODUCED if round(states) == 48 else REFUTED,
    )


def _of_techniques(measured: Mapping[str, Any]) -> list[Finding]:
    unknown, missing = Interval.of([]), "not measured: more memory than this machine has"
    known = {name for name in (BLOCK, SEQUENTIAL) if {NONE, name} <= measured["peaks"].keys()}
    share = 100 * _saved(measured, BLOCK) if BLOCK in known else math.nan
    # Allocations are counted, and the same in every step: an interval without width.
    saved = Interval(share, share, share, 1) if BLOCK in known else unknown
    slower, little = (_ratio(measured, name) if name in known else unknown for name in (BLOCK, SEQUENTIAL))
    return [
        Finding(
            "activation checkpointing saves much memory",
            "a large saving, without a figure",
            f"{share:.1f} % less, measured" if saved.known else missing,
            f"of what a step needs beyond parameters, moments and images it saves more than {LARGE:g} %, our reading of large",
            judge(saved, "above", LARGE),
        ),
        ratio_to(
            "activation checkpointing makes a step of training at most 30 % slower",
            "at most 30 %",
            slower,
            "below",
            SLOWER,
            f"the interval of the ratio of times, over rounds in alternation, lies below {SLOWER:g}",
            missing,
        ),
        ratio_to(
            "sequential attention in the first two stages has little effect on the speed",
            "little effect, without a figure",
            little,
            "below",
            LITTLE,
            f"the interval of the ratio of times lies below {LITTLE:g}, our reading of little",
            missing,
        ),
    ]


def _of_recipe(predicted: Mapping[str, Any], place: str) -> Finding:
    before, peak = (_gigabytes(predicted["techniques"][name]["peak"]) for name in (NONE, RECIPE))
    room = _gigabytes(usable(CARD))
    return Finding(
        f"with ZeRO stage 1, checkpointing and sequential attention Giant at {place} trains on GPUs of 40 GB",
        "A100 of 40 GB",
        f"{peak:.1f} GB with the recipe, {before:.1f} GB without, predicted for {PROCESSES} GPUs and one input each",
        f"the recipe's predicted peak is below the {room:.1f} GB of a card that tensors can have",
        REPRODUCED if peak < room else REFUTED,
    )


def _predicted_table(predicted: Mapping[str, Any]) -> Table:
    rows = [
        (name, *(round(_gigabytes(p["techniques"][name]["peak"]), 1) for p in predicted.values())) for name in PREDICTED
    ]
    note = f"Predicted by `swinscale.memory`: backbone, bf16 under autocast, {PROCESSES} GPUs, one image or clip each."
    return Table("Giant: predicted peak in GB, by size/window", ("technique", *predicted), rows, note)


def _states_table(predicted: Mapping[str, Any]) -> Table:
    names = (NONE, "ZeRO-1", "ZeRO-2", "ZeRO-3")
    rows = [(name, round(_gigabytes(predicted["techniques"][name]["states"]), 2)) for name in names]
    note = "What each GPU holds at the end of a backward pass. Our stage 1 spreads parameters at rest too."
    return Table(
        f"Giant: parameters, gradients and moments in GB on each of {PROCESSES} GPUs", ("sharing", "GB"), rows, note
    )


def _measured_table(measured: Mapping[str, Any]) -> Table:
    rows: list[Sequence[Any]] = []
    whole = NONE in measured["peaks"]
    for name, peak in measured["peaks"].items():
        saved = round(100 * _saved(measured, name), 1) if whole else None
        seconds = Interval.of(measured["seconds"][name])
        rows.append((name, round(peak / 1e6), saved, seconds, _ratio(measured, name) if whole else None))
    note = (
        f"{round(measured['held'] / 1e6)} MB are there between two steps: parameters, moments and images; the share saved is of the "
        f"rest. Times in alternation on one model, mean and 95 % interval over rounds."
    )
    header = ("technique", "peak, MB", "saved, %", "seconds per step", "times as long")
    return Table("Measured on this machine", header, rows, note)


def _peaks_figure(predicted: Mapping[str, Any]) -> Figure:
    names = (NONE, BLOCK, SEQUENTIAL, "ZeRO-1", RECIPE)
    series = [
        {
            "label": "the article's recipe" if name == RECIPE else name,
            "x": list(range(len(predicted))),
            "y": [_gigabytes(p["techniques"][name]["peak"]) for p in predicted.values()],
        }
        for name in names
    ]
    options = {
        "title": "Giant on eight GPUs: predicted peak", "series": series, "x": "size/window", "y": "GB", "log_y": True,
        "baselines": {"a card of 40 GB": 40.0}, "x_labels": list(predicted),
    }  # fmt: skip
    return Figure(
        "peaks", "lines", options, "Backbone, one image or clip per GPU. The recipe combines the three below the first."
    )


def _trade_figure(measured: Mapping[str, Any]) -> Figure:
    known = [name for name in measured["peaks"] if NONE in measured["peaks"]]
    rows = [{"label": f"{n}: {measured['peaks'][n] / 1e9:.2f} GB", **_ratio(measured, n).whisker()} for n in known]
    options = {
        "title": "Time of a training step, measured", "rows": rows, "reference": 1.0,
        "x": "times as long; whisker: 95 % interval",
    }  # fmt: skip
    return Figure("time", "dots", options, "Against a step without a technique. Beside each name: the peak of a step.")


def settings(scale: Scale) -> str:
    s = SETTINGS[scale]
    shared = ", its states shared by all processes (ZeRO-1)" if s.shard != "none" else ""
    return (
        f"Predicted: Giant, 3.0 billion parameters, at the sizes at which the article trains it. Measured: a network with Giant's "
        f"depths {GIANT['depths']} and extra norms, of width {s.width}, at {s.size} pixels with window {s.window}{shared}: the peak of "
        f"a training step on {s.count} random picture{'s' * (s.count > 1)}, and {s.rounds} steps under each technique."
    )


P2 = "arXiv 2111.09883, section 3.4"
CLAIM = Claim(
    name="memory",
    title="Three billion parameters on 40 GB",
    sentence=(
        "Sharing the optimiser's states among GPUs, computing activations again, and computing attention one part after the other "
        "in the first two stages let a network of three billion parameters train at 1536 pixels on GPUs of 40 GB, at little cost "
        "in speed."
    ),
    source=f"Swin Transformer V2, {P2}",
    published=[
        Published("parameters, gradients and moments of 3 billion parameters, fp32, on each GPU", "48 GB", P2),
        Published("ZeRO stage 1", "little effect on speed", P2),
        Published("activation checkpointing", "large saving; training at most 30 % slower", P2),
        Published("sequential attention in the first two stages", "little effect on speed", P2),
        Published("all together: Giant at 1536×1536 with window 32, and at 320×320×8", "trained on A100 of 40 GB", P2),
        Published("GB per technique", "not published", P2),
    ],
    steps=steps,
    read=read,
    settings=settings,
    seeds=1,
)
