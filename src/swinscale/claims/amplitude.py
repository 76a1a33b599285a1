"""Amplitudes by layer, and the learning rates that kinds of block bear: Figure 2 of the Swin V2 article."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

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
    has_diverged,
    train_arm,
    train_step,
)
from swinscale.claims.experiments import LOOKED_AT, Network, count_images, masked, published_recipe, supervised
from swinscale.claims.statistics import judge
from swinscale.intervals import Interval
from swinscale.models import SwinConfig
from swinscale.recipes import Recipe
from swinscale.tasks import SimMIMConfig

WIDTHS = {"T": 96, "S": 96, "B": 128, "L": 192, "H": 352}
DEPTHS = {"T": (2, 2, 6, 2), **dict.fromkeys("SBLH", (2, 2, 18, 2))}
SIZES = {"desk": "TSBL", "gpu": "TSBLH", "paper": "TSBLH"}
NARROWER = {"desk": 4, "gpu": 1}
"""The desk scale has the published depths at a quarter of the width, and heads of 8 channels instead of 32."""
PIXELS = {"desk": 32, "gpu": 64}
BATCH, STEPS = {"desk": 32, "gpu": 64}, {"desk": 80, "gpu": 300}
TASKS = ("simmim", "classify")
VERSIONS = (1, 2)

DOUBLINGS = "doublings"
RATES = tuple(1e-3 * 4**k for k in range(5))
RATE_STEPS = {"desk": 32, "gpu": 100}
KINDS: dict[str, dict[str, Any]] = {
    "pre, dot (V1)": {"norm_placement": "pre", "similarity": "dot"},
    "pre, cosine": {"norm_placement": "pre", "similarity": "cosine"},
    "post, dot": {"norm_placement": "post", "similarity": "dot"},
    "post, cosine": {"norm_placement": "post", "similarity": "cosine"},
    "sandwich, dot": {"norm_placement": "sandwich", "similarity": "dot"},
    "sandwich, cosine": {"norm_placement": "sandwich", "similarity": "cosine"},
    "res-post, dot": {"similarity": "dot"},
    "res-post, cosine (V2)": {},
    "V2, gains start at one": {"identity_start": False},
    "V2, extra norms": {"main_norm_interval": 2},
}
"""Changes of a Swin V2. Extra norms come after every second block, so that the six blocks of stage 3 have three."""


def _model(scale: Scale, size: str, **changes: Any) -> SwinConfig:
    width = WIDTHS[size] // NARROWER[scale]
    heads = tuple(width * 2**stage // (8 if scale == "desk" else 32) for stage in range(4))
    return Network(PIXELS[scale], 2, PIXELS[scale] // 8, width, DEPTHS[size], heads).config(**changes)


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    made = []
    for task, size, version in product(TASKS, SIZES[scale], VERSIONS):
        made.append(train_step(f"{task}-{size}-V{version}", _long(scale, data, task, size, version)))
    for seed, kind in product(range(seeds), KINDS):
        arguments = {"recipe": _short(scale, data, seed, KINDS[kind]), "rates": list(RATES)}
        arguments["ceiling"] = math.log(count_images(data)[1])
        made.append(Step(f"rates/{_path(kind)}-{seed}", highest_rate, arguments))
    return made


def _path(kind: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in kind)


def _long(scale: Scale, data: str, task: str, size: str, version: int) -> Recipe:
    """Hundreds of steps, read at ten moments."""
    if scale == "paper":
        name = "simmim_swin_base_100ep" if task == "simmim" else "imagenet_swin_base"
        recipe = published_recipe(name, data, 0)
        heads = tuple(WIDTHS[size] * 2**stage // 32 for stage in range(4))
        wide = {"embed_dim": WIDTHS[size], "depths": DEPTHS[size], "num_heads": heads}
        same = {"img_size": recipe.model.img_size, "window_size": recipe.model.stage_windows[0][0]}
        rate = recipe.model.drop_path_rate
        model = SwinConfig(**{**wide, **same, "version": version, "drop_path_rate": rate, "num_classes": 0})
        return replace(recipe, model=model)
    how = {"batch": BATCH[scale], "diagnose_every": STEPS[scale] // 10}
    model, images = _model(scale, size, version=version), STEPS[scale] * BATCH[scale]
    if task == "simmim":
        return masked(
            "claims_amplitude",
            model,
            data,
            scale,
            0,
            images,
            SimMIMConfig(mask_patch=PIXELS[scale] // 8),
            rate=1.0,
            **how,
        )
    return supervised("claims_amplitude", model, data, scale, 0, images, tested=LOOKED_AT, **how)


def _short(scale: Scale, data: str, seed: int, changes: dict[str, Any]) -> Recipe:
    if scale == "paper":
        recipe = published_recipe("imagenet_swinv2_tiny", data, seed, **{"identity_start": None, **changes})
        return replace(recipe, train=replace(recipe.train, epochs=1, eval_every=0))
    model = _model(scale, "T", **changes)
    return supervised(
        "claims_rates", model, data, scale, seed, RATE_STEPS[scale] * BATCH[scale], batch=BATCH[scale], tested=LOOKED_AT
    )


def highest_rate(directory: Path, recipe: Recipe, rates: list[float], ceiling: float) -> dict[str, Any]:
    """Trains at one rate after the other, lowest first, until one fails.

    Args:
        ceiling: the loss of guessing.

    Returns:
        ``highest``, the last rate that worked (0: none), and ``losses`` at each: the mean of the last tenth, None if it was
        not finite.
    """
    highest, losses = 0.0, list[float | None]()
    for index, rate in enumerate(rates):
        optim = replace(recipe.train.optim, lr=rate, warmup_lr=rate / 100, min_lr=rate / 100, lr_scaling="none")
        result = train_arm(
            directory / str(index), replace(recipe, train=replace(recipe.train, optim=optim, log_every=1))
        )
        last = [loss for _, loss in result["losses"]][-max(1, len(result["losses"]) // 10) :]
        losses.append(None if result["diverged"] else sum(last) / len(last))
        if has_diverged(result, ceiling):
            break
        highest = rate
    return {"highest": highest, "losses": losses}


def feature_variance(result: dict[str, Any]) -> dict[str, float]:
    """Mean square of the residual stream after each block, at the last reading of a run."""
    blocks = result["vitals"][-1]["amplitudes"]
    return {
        name: places["stream"][1] ** 2 for name, places in blocks.items() if ".blocks." in name and "stream" in places
    }


def read(scale: Scale, results: Results) -> Outcome:
    cases = list(product(TASKS, SIZES[scale]))
    variances = {
        (task, size, v): feature_variance(results[f"{task}-{size}-V{v}"])
        for (task, size), v in product(cases, VERSIONS)
    }
    spread = {key: math.log10(max(values.values()) / min(values.values())) for key, values in variances.items()}
    growth = {key: _growth(values) for key, values in variances.items()}

    def over_cases(values: dict[tuple[str, str, int], float], version: int) -> list[float]:
        return [values[task, size, version] for task, size in cases]

    deep = Interval.of(over_cases(growth, 1))
    tens, over = "powers of ten", "over sizes and tasks"
    pairs = f"the interval of the difference {over} lies above 0"
    seeds = sum(name.startswith(f"rates/{_path('post, dot')}-") for name in results)
    bears = {kind: [_steps_up(results[f"rates/{_path(kind)}-{s}"]["highest"]) for s in range(seeds)] for kind in KINDS}
    v1, v2 = bears["pre, dot (V1)"], bears["res-post, cosine (V2)"]
    findings = [
        ahead(
            "variance differs more between the layers of V1 than between those of V2",
            "V1-L: about 10⁴ between layers; V2 much milder",
            over_cases(spread, 1),
            over_cases(spread, 2),
            tens,
            pairs,
        ),
        Finding(
            "in V1 variance grows with depth (first to last block of stage 3)",
            "grows steadily (figure)",
            deep.text(tens),
            f"the interval {over} lies above 0",
            judge(deep, "above"),
            deep,
            tens,
        ),
        ahead(
            "with res-post-norm it grows less",
            "the growth in deep layers vanishes (figure)",
            over_cases(growth, 1),
            over_cases(growth, 2),
            tens,
            pairs,
        ),
        ahead("V2 bears a higher learning rate than V1", "V1-H cannot finish, V2-H trains", v2, v1, DOUBLINGS),
        ahead(
            "pre-norm bears a higher rate than post-norm",
            "post-norm diverges at the usual rate; a quarter of it works",
            v1,
            bears["post, dot"],
            DOUBLINGS,
        ),
        ahead(
            "V2 bears a higher rate when its blocks start as the identity",
            "gains start at zero",
            v2,
            bears["V2, gains start at one"],
            DOUBLINGS,
        ),
        ahead(
            "extra norms on the main branch let V2 bear a higher rate",
            "used for V2-H and V2-G",
            bears["V2, extra norms"],
            v2,
            DOUBLINGS,
        ),
    ]
    rows = [
        (
            f"{task}, {size}",
            *(10 ** spread[task, size, v] for v in VERSIONS),
            *(10 ** growth[task, size, v] for v in VERSIONS),
        )
        for task, size in cases
    ]
    header = ("run", "V1, largest over smallest", "V2", "V1, growth in stage 3", "V2")
    rates = [
        (kind, ", ".join(f"{results[f'rates/{_path(kind)}-{s}']['highest']:g}" for s in range(seeds))) for kind in KINDS
    ]
    return Outcome(
        findings,
        [
            Table("Mean square of the residual stream: layers of one network", header, rows),
            Table("Highest learning rate that learns, by seed; 0: none did", ("kind of block", "rates"), rates),
        ],
        [*(_curves(task, scale, variances) for task in TASKS), _rates_figure(bears)],
        [
            f"A rate counts as too high if the loss stops being finite, or if the mean of its last tenth is not below that of "
            f"guessing; rates tried: {', '.join(f'{r:g}' for r in RATES)}, upwards until one fails. On such a grid seeds often agree "
            f"exactly, and an interval can have no width."
        ],
    )


def _growth(values: dict[str, float]) -> float:
    stage = [v for name, v in values.items() if name.startswith("layers.2.")]
    return math.log10(stage[-1] / stage[0])


def _steps_up(rate: float) -> float:
    """Doublings from the lowest rate; one step below it if even that was too high."""
    return math.log2(rate / RATES[0]) if rate else -2.0


def _curves(task: str, scale: Scale, variances: dict[tuple[str, str, int], dict[str, float]]) -> Figure:
    series = []
    for group, (version, size) in enumerate(product(VERSIONS, SIZES[scale])):
        values = list(variances[task, size, version].values())
        place = [100 * (i + 1) / len(values) for i in range(len(values))]
        line = {"label": f"V{version}-{size}", "x": place, "y": values, "dashed": version == 2}
        series.append({**line, "group": group % len(SIZES[scale])})
    name = {"simmim": "masked pre-training", "classify": "classification"}[task]
    options = {"title": f"Feature variance by depth, after {name}", "series": series, "log_y": True}
    options |= {"x": "depth, % of the blocks", "y": "mean square of the residual stream"}
    return Figure(task, "lines", options, "Solid: V1 (pre-norm), dashed: V2 (res-post-norm). Each point is a block.")


def _rates_figure(bears: dict[str, list[float]]) -> Figure:
    rows = [{"label": kind, **Interval.of(values).whisker()} for kind, values in bears.items()]
    options = {"title": "Highest learning rate that learns", "rows": rows}
    options |= {"x": f"doublings above {RATES[0]:g}; whisker: 95 % interval over seeds"}
    return Figure("rates", "dots", options, "Rates are tried in steps of two doublings; −2 means that none learned.")


def settings(scale: Scale) -> str:
    if scale == "paper":
        return "V1 and V2 from T to H, SimMIM for 100 and classification for 300 epochs of ImageNet-1K; rates: one epoch each."
    narrow = "a quarter of the published widths" if NARROWER[scale] == 4 else "the published widths"
    return (
        f"V1 and V2 with the published depths and {narrow} at {PIXELS[scale]} pixels (patch 2, window {PIXELS[scale] // 8}), "
        f"{STEPS[scale]} steps of {BATCH[scale]} images by SimMIM and by classification, one seed each; intervals are over the "
        f"{2 * len(SIZES[scale])} pairs of runs. Rates: the T depths, {RATE_STEPS[scale]} steps of classification per rate."
    )


CLAIM = Claim(
    name="amplitude",
    title="Amplitudes by layer, and stability",
    sentence=(
        "In Swin V1 activations grow with depth, far apart between layers in large models, and training becomes unstable; with "
        "res-post-norm, whose blocks start as the identity, they stay alike and the largest models train."
    ),
    source="Swin Transformer V2, arXiv 2111.09883, Figures 2 and 3, sections 3.1 and 3.2",
    published=[
        Published("variance between layers of V1-L", "apart by about 10⁴", "section 3.1, Figure 2"),
        Published("V1-H (658 M), self-supervised", "blows up; its curve is from about epoch 40", "Figure 2"),
        Published("V2-H", "trains; amplitudes much milder", "Figures 2 and 3"),
        Published("post-norm", "diverges at the usual rate, trained at a quarter of it", "Table 7"),
    ],
    steps=steps,
    read=read,
    settings=settings,
)
