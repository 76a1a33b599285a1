"""Attention in windows that shift: its cost, and the other ways to look beyond a window, LR-Net among them. Swin V1, Tables 4–6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinscale.claims.base import (
    Claim,
    Outcome,
    Published,
    Results,
    Scale,
    Step,
    dots_of,
    seed_values,
    train_step,
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
from swinscale.claims.windows_read import (
    ARMS,
    LRNET,
    SHIFTED,
    WAYS,
    accuracy_table,
    area_figure,
    area_table,
    lrnet_table,
    of_accuracy,
    of_area,
    of_lrnet,
    of_speed,
    speed_figure,
    speed_table,
)
from swinscale.config import to_dict
from swinscale.errors import NonFiniteLoss
from swinscale.models import LRNetConfig, SwinConfig, build_model, model_config
from swinscale.models.lrnet import LocalRelation
from swinscale.models.swin import WindowAttention
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.recipes import Recipe, build
from swinscale.seeding import derive_seed
from swinscale.timing import alternate
from swinscale.train import train

SIZES = {"T": "tiny", "S": "small", "B": "base"}


@dataclass(frozen=True)
class Settings:
    """How large everything is.

    Args:
        sides: of square maps in tokens, for the cost against the area.
        networks: whose attention and whole forward pass are timed.
        batch: images of those.
        rounds: of timing; a value is the median of three turns.
        model: that is trained; None: the article's.
        lrnet: that is trained beside it, of the same cost within a tenth.
        images: seen in a training.
        method: of sliding windows in training.
    """

    sides: tuple[int, ...]
    networks: tuple[str, ...]
    batch: int
    rounds: int
    model: SwinConfig | None
    lrnet: LRNetConfig
    images: int
    method: Method


def _network(patch: int, width: int, depths: tuple[int, ...]) -> SwinConfig:
    """V1 at 24 pixels with window 3, 32 channels to a head, without stochastic depth."""
    heads = tuple(max(1, width // 32) * 2**stage for stage in range(len(depths)))
    how: dict[str, Any] = {"img_size": 24, "window_size": 3, "num_classes": 0, "drop_path_rate": 0.0}
    return SwinConfig(version=1, patch_size=patch, embed_dim=width, depths=depths, num_heads=heads, **how)


def _lrnet(stem: Literal[1, 2], depths: tuple[int, ...], width: int) -> LRNetConfig:
    """At 24 pixels with neighbourhoods of 3×3, as large as the windows."""
    widths = tuple(width * 2**stage for stage in range(len(depths)))
    how: dict[str, Any] = {
        "img_size": 24,
        "kernel_size": 3,
        "num_classes": 0,
        "stem_stride": stem,
        "stem_width": width // 2,
    }
    return LRNetConfig(depths=depths, widths=widths, stage_dims=tuple(4 * w for w in widths), **how)


DESK_SIDES, GPU_SIDES = (16, 24, 32, 48, 64, 96, 128), (32, 48, 64, 96, 128, 192, 256, 384)
SETTINGS: dict[Scale, Settings] = {
    "desk": Settings(DESK_SIDES, ("T",), 2, 5, _network(2, 32, (2, 2, 1)), _lrnet(2, (2, 2, 1), 32), 24_000, "masked"),
    "gpu": Settings(
        GPU_SIDES, ("T", "S", "B"), 64, 7, _network(1, 64, (2, 2, 6, 2)), _lrnet(1, (2, 2, 6, 2), 64), 200_000, "masked"
    ),
    "paper": Settings(GPU_SIDES, ("T", "S", "B"), 64, 7, None, model_config("lrnet50"), 0, "flex"),
}


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    s = SETTINGS[scale]
    made = [Step("area", time_area, {"sides": list(s.sides), "rounds": s.rounds}, alone=True)]
    for name in s.networks:
        timed = {"model": f"swin_{SIZES[name]}_patch4_window7_224", "batch": s.batch, "rounds": s.rounds}
        made.append(Step(f"speed-{name}", time_ways, timed, alone=True))
    beside = {"model": "swin_tiny_patch4_window7_224", "lrnet": "lrnet50", "batch": s.batch, "rounds": s.rounds}
    made.append(Step("speed-lrnet", time_lrnet, beside, alone=True))
    for seed, arm in product(range(seeds), ARMS):
        if s.model is None:
            recipe = published_recipe("imagenet_swin_tiny", data, seed)
        else:
            recipe = supervised("claims_windows", s.model, data, scale, seed, s.images)
        trained = {"recipe": recipe, "windows": arm, "method": s.method}
        made.append(Step(f"{arm.replace(' ', '-')}-{seed}", train_variant, trained))
    for seed in range(seeds):
        if s.model is None:
            recipe = replace(published_recipe("imagenet_swin_tiny", data, seed), model=s.lrnet)
        else:
            recipe = supervised("claims_windows_lrnet", s.lrnet, data, scale, seed, s.images)
        made.append(train_step(f"lrnet-{seed}", recipe))
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


def time_lrnet(directory: Path, model: str, lrnet: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of local relation layers beside attention in shifted windows, of the same channels and maps; and of the networks.

    Returns: as ``time_ways``; the ways are ``SHIFTED`` and ``LRNET``.
    """
    config, other = model_config(model), model_config(lrnet)
    pairs, reasons = replace(config, depths=(2,) * len(config.depths)), dict[str, str]()
    with _ready() as device:
        stages = []
        for stage, (size, dim) in enumerate(zip(config.stage_maps(), config.stage_dims, strict=True)):
            x = torch.randn(batch, *size, dim, device=device)
            layers = nn.Sequential(LocalRelation(other, dim), LocalRelation(other, dim))
            made = {SHIFTED: attention_alone(make_stage(pairs, stage, "shifted")), LRNET: layers}
            stages.append(_race(made, {SHIFTED: x, LRNET: x.movedim(-1, 1).contiguous()}, rounds, reasons, 2))
        images = torch.randn(batch, config.in_chans, *config.img_size, device=device)
        network = _race({SHIFTED: build_model(config), LRNET: build_model(other)}, images, rounds, reasons, 1)
    return {"batch": batch, "lrnet": lrnet, "stages": stages, "network": network, "reasons": reasons}


def _race(
    modules: Mapping[str, nn.Module],
    x: Tensor | Mapping[str, Tensor],
    rounds: int,
    reasons: dict[str, str],
    layers: int,
) -> dict[str, list[float]]:
    """Seconds per layer of each module that can run, with one input for all or one for each; the others are entered in ``reasons``."""
    calls, kind = {}, "cpu"
    inputs: Mapping[str, Tensor] = x if isinstance(x, Mapping) else {name: x for name in modules}
    for name, module in modules.items():
        if name in reasons:
            continue
        _fill(module)
        kind = inputs[name].device.type
        run = partial(module.to(inputs[name].device).eval(), inputs[name])
        try:
            run()
        except Exception as error:  # a compiler that is missing is a result here
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        calls[name] = partial(_call, run)
    taken = _timed(list(calls.values()), rounds, kind)
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
    ancestor, top1_lrnet = results["speed-lrnet"], seed_values(results, "lrnet-{seed}", seeds)
    findings = [*of_area(area), *of_speed(speeds[first], first), *of_accuracy(top1)]
    findings += of_lrnet(ancestor, top1["shifted"], top1_lrnet)
    shown: dict[str, Any] = {**{str(arm): values for arm, values in top1.items()}, LRNET: top1_lrnet}
    tables = [area_table(area), speed_table(speeds), lrnet_table(ancestor), accuracy_table(shown)]
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
            area_figure(area),
            speed_figure(speeds[first], first, ancestor),
            dots_of("accuracy", "Accuracy by kind of window", shown),
        ],
        notes,
    )


def settings(scale: Scale) -> str:
    s = SETTINGS[scale]
    timed = f"Forward passes are timed on {s.batch} images of 224 pixels with window 7, and on maps of up to {s.sides[-1]}² tokens."
    if s.model is None:
        return f"{timed} Swin-T 224/7 with each kind of window, and LR-Net-50, 300 epochs of ImageNet-1K."
    m, a = s.model, s.lrnet
    return (
        f"{timed} Trained with each kind of window: a Swin V1 of width {m.embed_dim} and depths {m.depths} at {m.img_size[0]} pixels "
        f"(patch {m.patch_size[0]}, window {m.window_size[0][0]}), and an LR-Net of widths {a.widths}, depths {a.depths} and "
        f"neighbourhoods of {a.kernel_size}×{a.kernel_size}, which computes as much; {s.images} images seen, top-1 on the whole test "
        f"part."
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
        Published(
            "accuracy, LR-Net-26, LR-Net-50", "75.7, 77.3 top-1", "arXiv 1904.11491, ImageNet-1K, another recipe"
        ),
    ],
    steps=steps,
    read=read,
    settings=settings,
)
