"""Attention in windows that shift: its cost, and the other ways to look beyond a window. Swin V1, Tables 4, 5 and 6."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.claims.base import (
    Claim,
    Figure,
    Finding,
    Outcome,
    Published,
    Results,
    Scale,
    Step,
    Table,
    ahead,
    alike,
    dots_of,
    ratio_to,
    seed_values,
)
from swinscale.claims.experiments import published_recipe, supervised
from swinscale.claims.sliding import (
    ClassifyVariant,
    Method,
    SwinVariant,
    Windows,
    attention_alone,
    make_stage,
)
from swinscale.claims.statistics import judge, judge_within
from swinscale.config import to_dict
from swinscale.errors import NonFiniteLoss
from swinscale.intervals import Interval
from swinscale.models import SwinConfig, model_config
from swinscale.models.swin import WindowAttention
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.recipes import Recipe, build
from swinscale.seeding import derive_seed
from swinscale.timing import alternate
from swinscale.train import train

ARMS: tuple[Windows, ...] = ("not shifted", "shifted", "sliding")
SHIFTED, FIXED, NAIVE, FLEX = "shifted windows", "windows, not shifted", "sliding, naive", "sliding, flex attention"
WAYS: dict[str, tuple[Windows, Method]] = {
    FIXED: ("not shifted", "gathered"),
    SHIFTED: ("shifted", "gathered"),
    NAIVE: ("sliding", "gathered"),
    FLEX: ("sliding", "flex"),
}
"""What is timed against each other; the method matters to sliding windows alone."""
SIZES = {"T": "tiny", "S": "small", "B": "base"}
LINEAR, QUADRATIC, ALIKE = 0.1, 1.7, 1.0
"""Our readings: an exponent of 1 ± 0.1 is linear, one above 1.7 is quadratic with the linear part of the projections, and a
point of accuracy is alike."""


@dataclass(frozen=True)
class Settings:
    """How large everything is.

    Args:
        sides: of square maps in tokens, for the cost against the area.
        networks: whose attention and whole forward pass are timed.
        batch: images of those.
        rounds: of timing; a value is the median of three turns.
        model: that is trained; None: the article's.
        images: seen in a training.
        method: of sliding windows in training.
    """

    sides: tuple[int, ...]
    networks: tuple[str, ...]
    batch: int
    rounds: int
    model: SwinConfig | None
    images: int
    method: Method


def _network(patch: int, width: int, depths: tuple[int, ...]) -> SwinConfig:
    """V1 at 24 pixels with window 3, 32 channels to a head, without stochastic depth."""
    heads = tuple(max(1, width // 32) * 2**stage for stage in range(len(depths)))
    how: dict[str, Any] = {"img_size": 24, "window_size": 3, "num_classes": 0, "drop_path_rate": 0.0}
    return SwinConfig(version=1, patch_size=patch, embed_dim=width, depths=depths, num_heads=heads, **how)


DESK_SIDES, GPU_SIDES = (16, 24, 32, 48, 64, 96, 128), (32, 48, 64, 96, 128, 192, 256, 384)
SETTINGS: dict[Scale, Settings] = {
    "desk": Settings(DESK_SIDES, ("T",), 2, 5, _network(2, 32, (2, 2, 1)), 24_000, "masked"),
    "gpu": Settings(GPU_SIDES, ("T", "S", "B"), 64, 7, _network(1, 64, (2, 2, 6, 2)), 200_000, "masked"),
    "paper": Settings(GPU_SIDES, ("T", "S", "B"), 64, 7, None, 0, "flex"),
}


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    s = SETTINGS[scale]
    made = [Step("area", time_area, {"sides": list(s.sides), "rounds": s.rounds}, alone=True)]
    for name in s.networks:
        timed = {"model": f"swin_{SIZES[name]}_patch4_window7_224", "batch": s.batch, "rounds": s.rounds}
        made.append(Step(f"speed-{name}", time_ways, timed, alone=True))
    for seed, arm in product(range(seeds), ARMS):
        if s.model is None:
            recipe = published_recipe("imagenet_swin_tiny", data, seed)
        else:
            recipe = supervised("claims_windows", s.model, data, scale, seed, s.images)
        trained = {"recipe": recipe, "windows": arm, "method": s.method}
        made.append(Step(f"{arm.replace(' ', '-')}-{seed}", train_variant, trained))
    return made


class _GlobalAttention(WindowAttention):
    """Every token attends to the whole map, without a bias: (B, *map, D) → (B, *map, D)"""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, -2)).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)


@contextmanager
def _ready() -> Iterator[torch.device]:
    """The device, for forward passes in the precision that suits it; every shape may have a compiled kernel of its own."""
    kernels: Any = torch._dynamo.config.patch(recompile_limit=64)
    with world("auto") as here, torch.inference_mode(), kernels:
        device = here.device
        with autocast(resolve_precision("auto", device), device):
            yield device


def time_area(directory: Path, sides: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds of the attention of a block (96 channels, 3 heads) on one square map, by kind, side and round.

    Windows have a side of 8. Global attention is PyTorch's fused one.
    """
    one: dict[str, Any] = {"img_size": 256, "embed_dim": 96, "num_heads": (3,), "depths": (1,), "window_size": 8}
    config = SwinConfig(version=1, **one)
    with _ready() as device:
        modules = {
            "windows": attention_alone(make_stage(config, 0, "not shifted")),
            "global": _GlobalAttention(config, 0),
        }
        calls = []
        for module, side in product(modules.values(), sides):
            _fill(module)
            run = partial(module.to(device).eval(), torch.randn(1, side, side, 96, device=device))
            calls.append(partial(_call, run))
        taken = iter(_timed(calls, rounds, device.type))
        return {"sides": list(sides), **{name: [next(taken) for _ in sides] for name in modules}}


def time_ways(directory: Path, model: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of each of ``WAYS``, round by round: of attention alone in one layer of each stage, and of the whole network.

    Returns:
        ``stages``, a list over stages, and ``network``: seconds by way; ``reasons``: why a way cannot run, by way.
    """
    config = model_config(model)
    pairs = replace(config, depths=(2,) * len(config.depths))  # a regular and a shifted layer
    reasons: dict[str, str] = {}
    with _ready() as device:
        shapes = [(batch, *size, dim) for size, dim in zip(config.stage_maps(), config.stage_dims, strict=True)]
        stages = []
        for stage, shape in enumerate(shapes):
            made = {way: attention_alone(make_stage(pairs, stage, *how)) for way, how in WAYS.items()}
            stages.append(_race(made, torch.randn(shape, device=device), rounds, reasons, 2))
        images = torch.randn(batch, config.in_chans, *config.img_size, device=device)
        networks = {way: SwinVariant(config, *how) for way, how in WAYS.items()}
        network = _race(networks, images, rounds, reasons, 1)
    return {"batch": batch, "stages": stages, "network": network, "reasons": reasons}


def _race(
    modules: Mapping[str, nn.Module], x: Tensor, rounds: int, reasons: dict[str, str], layers: int
) -> dict[str, list[float]]:
    """Seconds per layer of each module that can run; the others are entered in ``reasons``."""
    calls = {}
    for name, module in modules.items():
        if name in reasons:
            continue
        _fill(module)
        run = partial(module.to(x.device).eval(), x)
        try:
            run()
        except Exception as error:  # a compiler that is missing is a result here
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        calls[name] = partial(_call, run)
    taken = _timed(list(calls.values()), rounds, x.device.type)
    return {name: [t / layers for t in times] for name, times in zip(calls, taken, strict=True)}


def _call(run: Any, _: int) -> None:
    run()


def _fill(module: nn.Module) -> None:
    """Small random values for all parameters: times do not depend on them, but on their being finite."""
    random = torch.Generator().manual_seed(derive_seed(0, "claims.windows"))
    for parameter in module.parameters():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))


def _timed(calls: Sequence[Any], rounds: int, kind: str) -> list[list[float]]:
    """Medians of three turns, so that a moment in which the machine is busy does not count."""
    turns = alternate(calls, 3 * rounds, kind)
    return [[median(times[i : i + 3]) for i in range(0, len(times), 3)] for times in turns]


def train_variant(directory: Path, recipe: Recipe, windows: Windows, method: Method) -> dict[str, Any]:
    """Trains the network of a recipe with other windows, from the same first weights; returns its ``metrics``."""
    built = build(recipe)
    with torch.device("meta"):
        model = SwinVariant(built.recipe.model, windows, method)
    task = ClassifyVariant(model, built.recipe.model.num_classes, cast(Any, recipe.task), built.task.preprocessing)
    if recipe.train.memory.shard == "none":
        task.to_empty(device="cpu")
        task.init_weights(derive_seed(recipe.train.seed, "weights"))
    record = {**to_dict(built.recipe), "windows": windows, "method": method}
    data = (built.train_data, built.eval_data)
    try:
        result = train(task, *data, recipe.train, directory / "run", record=record, resume=True)
    except NonFiniteLoss as error:
        return {"metrics": {}, "diverged": str(error)}
    return {"metrics": {k: v for k, v in result.metrics.items() if isinstance(v, float)}, "seconds": result.seconds}


def read(scale: Scale, results: Results) -> Outcome:
    area, first = results["area"], SETTINGS[scale].networks[0]
    speeds = {n: results[f"speed-{n}"] for n in SETTINGS[scale].networks}
    seeds = sum(name.startswith("shifted-") for name in results)
    top1 = {arm: seed_values(results, f"{arm.replace(' ', '-')}-{{seed}}", seeds) for arm in ARMS}
    findings = [*_of_area(area), *_of_speed(speeds[first], first), *_of_accuracy(top1)]
    tables = [_area_table(area), _speed_table(speeds), _accuracy_table(top1)]
    reasons = {f"{way} could not run: {why}" for s in speeds.values() for way, why in s["reasons"].items()}
    notes = [
        "Performer, which the article compares with too, and hand-written kernels for sliding windows (CUDA, NATTEN) are not "
        "measured here: flex attention stands for the best kernel. A published time is of one V100; the ratios compare.",
        *sorted(reasons),
    ]
    return Outcome(
        findings,
        tables,
        [
            _area_figure(area),
            _speed_figure(speeds[first], first),
            dots_of("accuracy", "Accuracy by kind of window", {str(arm): values for arm, values in top1.items()}),
        ],
        notes,
    )


def exponents(sides: Sequence[int], seconds: Sequence[Sequence[float]]) -> list[float]:
    """Of the tokens in the time, fitted to the larger half of the sizes, for each round."""
    kept = len(sides) // 2
    tokens = [math.log(side**2) for side in sides[kept:]]
    rounds = zip(*seconds[kept:], strict=True)
    return [linear_regression(tokens, [math.log(t) for t in times]).slope for times in rounds]


def _of_area(area: Mapping[str, Any]) -> list[Finding]:
    linear, quadratic = (Interval.of(exponents(area["sides"], area[kind])) for kind in ("windows", "global"))
    beyond = Interval.of_difference(exponents(area["sides"], area["windows"]), [1.0] * linear.count)
    return [
        Finding(
            "the time of attention in windows grows in proportion to the area",
            "4hwC² + 2M²hwC operations: linear in the area hw",
            f"exponent {linear.text(signed=False)}",
            f"the interval of the exponent, over rounds, lies within 1 ± {LINEAR:g}",
            judge_within(beyond, LINEAR),
            linear,
        ),
        Finding(
            "the time of global attention grows with the square of the area",
            "4hwC² + 2(hw)²C operations",
            f"exponent {quadratic.text(signed=False)}",
            f"the interval of the exponent lies above {QUADRATIC:g}",
            judge(quadratic, "above", QUADRATIC),
            quadratic,
        ),
    ]


def _of_speed(speed: Mapping[str, Any], name: str) -> list[Finding]:
    rule = "the interval of the ratio of times, over rounds in alternation, lies above 1"
    network, first = speed["network"], speed["stages"][0]

    def compare(times: Mapping[str, Sequence[float]], way: str, statement: str, published: str) -> Finding:
        missing = f"not measured: {speed['reasons'].get(way)}"
        ratio = Interval.of_ratio(times[way], times[SHIFTED]) if way in times else Interval.of([])
        return ratio_to(statement, published, ratio, "above", 1.0, rule, missing)

    # A kernel that cannot run decides nothing; else the better of the two counts.
    best = FLEX if FLEX not in network else min((NAIVE, FLEX), key=lambda way: median(network[way]))
    return [
        compare(
            first, NAIVE, "a naive sliding window takes longer than a shifted one, attention alone in the first stage",
            "122.5 against 3.0 ms: 41 times",
        ),
        compare(
            network, NAIVE, f"Swin-{name} with naive sliding windows takes longer than with shifted ones",
            "T 183 against 755 images/s: 4.1 times",
        ),
        compare(
            network, best, f"Swin-{name} with the best sliding kernel ({best.removeprefix('sliding, ')}) takes longer than with "
            "shifted windows", "T 488 against 755 images/s: 1.5 times",
        ),
    ]  # fmt: skip


def _of_accuracy(top1: Mapping[Windows, Sequence[float]]) -> list[Finding]:
    shifted = top1["shifted"]
    better, same = (
        "shifting the windows makes the network more accurate",
        "shifted windows are about as accurate as sliding ones",
    )
    return [
        ahead(better, "80.2 → 81.3 top-1", shifted, top1["not shifted"]),
        alike(same, "81.3 and 81.4 top-1", shifted, top1["sliding"], ALIKE),
    ]


def _milliseconds(times: Sequence[float]) -> Interval:
    return Interval.of([1000 * t for t in times])


def _area_table(area: Mapping[str, Any]) -> Table:
    rows = [
        (f"{side}×{side}", side**2, _milliseconds(windows), _milliseconds(everywhere))
        for side, windows, everywhere in zip(area["sides"], area["windows"], area["global"], strict=True)
    ]
    return Table(
        "Milliseconds of attention on one map, with 95 % interval", ("map", "tokens", "windows", "global"), rows
    )


def _speed_table(speeds: Mapping[str, Any]) -> Table:
    """Milliseconds per stage of the first network, and the images per second of all."""
    first = next(iter(speeds.values()))
    stages = range(len(first["stages"]))
    rows = []
    for way in WAYS:
        cells: list[Any] = []
        for times in (stage.get(way) for stage in first["stages"]):
            cells.append(None if times is None else _milliseconds(times))
        for speed in speeds.values():
            times = speed["network"].get(way)
            cells.append(None if times is None else Interval.of([speed["batch"] / t for t in times]))
        rows.append((way, *cells))
    header = ("way", *(f"stage {i + 1}, ms" for i in stages), *(f"{name}, images/s" for name in speeds))
    note = (
        f"Milliseconds of attention alone (projections, changes of order, attention) in one layer for {first['batch']} images, the "
        f"mean of two layers, of which the second shifts; whole networks at 224 pixels. Forward passes."
    )
    return Table("Speed of windows that shift, stay, or slide", header, rows, note)


def _accuracy_table(top1: Mapping[Windows, Sequence[float]]) -> Table:
    rows = [(arm, Interval.of(values)) for arm, values in top1.items()]
    return Table("Top-1 in percent, mean and 95 % interval over seeds", ("windows", "top-1"), rows)


def _area_figure(area: Mapping[str, Any]) -> Figure:
    series = []
    for label, kind in (("windows of 8×8", "windows"), ("global", "global")):
        exponent = Interval.of(exponents(area["sides"], area[kind])).estimate
        made = [_milliseconds(times) for times in area[kind]]
        line = {"y": [i.estimate for i in made], "low": [i.low for i in made], "high": [i.high for i in made]}
        series.append({"label": f"{label}, exponent {exponent:.2f}", "x": [s**2 for s in area["sides"]], **line})
    options = {
        "title": "Time of attention against the size of the map", "series": series, "x": "tokens of the map",
        "y": "milliseconds", "log_x": True, "log_y": True,
    }  # fmt: skip
    return Figure("area", "lines", options, "One map, 96 channels. The exponents are of the larger half of the sizes.")


def _speed_figure(speed: Mapping[str, Any], name: str) -> Figure:
    places = [*speed["stages"], speed["network"]]
    series = []
    for way in (way for way in WAYS if way != SHIFTED):
        known = [(x, Interval.of_ratio(p[way], p[SHIFTED])) for x, p in enumerate(places) if way in p]
        bounds = {part: [getattr(ratio, part) for _, ratio in known] for part in ("low", "high")}
        series.append({"label": way, "x": [x for x, _ in known], "y": [ratio.estimate for _, ratio in known], **bounds})
    options = {
        "title": "Times relative to shifted windows", "series": series, "x": "attention alone, and the whole network",
        "y": "times as long", "log_y": True, "baselines": {"shifted windows": 1.0},
        "x_labels": [*(f"stage {i + 1}" for i in range(len(places) - 1)), f"Swin-{name}"],
    }  # fmt: skip
    return Figure("speed", "lines", options, "Ratios within rounds in alternation, with their 95 % intervals.")


def settings(scale: Scale) -> str:
    s = SETTINGS[scale]
    timed = f"Forward passes are timed on {s.batch} images of 224 pixels with window 7, and on maps of up to {s.sides[-1]}² tokens."
    if s.model is None:
        return f"{timed} Swin-T 224/7 with each kind of window, 300 epochs of ImageNet-1K."
    m = s.model
    return (
        f"{timed} Trained with each kind of window: a Swin V1 of width {m.embed_dim} and depths {m.depths} at {m.img_size[0]} pixels "
        f"(patch {m.patch_size[0]}, window {m.window_size[0][0]}), {s.images} images seen, top-1 on the whole test part."
    )


P1 = "arXiv 2103.14030"
CLAIM = Claim(
    name="windows",
    title="Shifted windows",
    sentence=(
        "Attention in windows costs in proportion to the area of the picture, global attention with its square. Shifting the "
        "windows connects them at hardly any cost: it is faster than sliding windows, as accurate, and more accurate than "
        "windows that stay."
    ),
    source=f"Swin Transformer, {P1}, section 3.2 and Tables 4, 5 and 6",
    published=[
        Published(
            "operations in windows of M×M, and global", "4hwC² + 2M²hwC; 4hwC² + 2(hw)²C", f"{P1}, equations 1, 2"
        ),
        Published("sliding window, naive: stages 1–4; T, S, B", "122.5, 38.3, 12.1, 7.6 ms; 183, 109, 77 images/s", P1),
        Published("sliding window, CUDA kernel", "7.6, 4.7, 2.7, 1.8 ms; 488, 283, 187 images/s", P1),
        Published("Performer", "4.8, 2.8, 1.8, 1.5 ms; 638, 370, 241 images/s", P1),
        Published("windows, not shifted", "2.8, 1.7, 1.2, 0.9 ms; 770, 444, 280 images/s", P1),
        Published("shifted windows, cyclic", "3.0, 1.9, 1.3, 1.0 ms; 755, 437, 278 images/s", P1),
        Published("accuracy, Swin-T: not shifted, shifted, sliding", "80.2, 81.3, 81.4 top-1", f"{P1}, ImageNet-1K"),
        Published("accuracy, Swin-T: Performer", "79.0 top-1", f"{P1}, ImageNet-1K"),
    ],
    steps=steps,
    read=read,
    settings=settings,
)
