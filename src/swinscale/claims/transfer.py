"""Other windows without training: Table 1 and Figure 4 of the Swin V2 article."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

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
    line_of,
    seed_values,
    train_step,
)
from swinscale.claims.experiments import network, published_recipe, supervised, test_images
from swinscale.claims.statistics import judge
from swinscale.data import EpochLoader, ImageDataset, eval_transform
from swinscale.evaluation import evaluate
from swinscale.intervals import Interval
from swinscale.models import SwinTransformer
from swinscale.models.windows import relative_coords
from swinscale.parallel import resolve_precision, world
from swinscale.tasks import Classify
from swinscale.weights import read_metadata, transfer

BIASES = {"table": "bicubic", "linear": "linear-extrapolate", "log": "log-extrapolate"}
"""Position bias → how it gets to another window: Table 1's three rows."""
NAMES = {"table": "table, bicubic", "linear": "linear-spaced CPB", "log": "log-spaced CPB"}
IMAGES = {"desk": 24_000, "gpu": 300_000}
TUNING = {"desk": 2_000, "gpu": 60_000}
TESTED = {"desk": 1_500, "gpu": 10_000, "paper": 50_000}
SIZES = {"desk": (32, 48, 64, 96), "gpu": (32, 48, 64, 80, 96), "paper": (256, 384, 512, 640, 768)}
TUNED_SIZE = {"desk": 64, "gpu": 64, "paper": 512}
"""Windows grow with the size: 4 at 32 pixels becomes 12 at 96, as the article's 8 at 256 becomes 24 at 768."""


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    made = []
    for seed, bias in product(range(seeds), BIASES):
        if scale == "paper":
            recipe = published_recipe("imagenet_swinv2_tiny", data, seed, position_bias=bias)
        else:
            model = network(scale).config(position_bias=bias)
            recipe = supervised("claims_transfer", model, data, scale, seed, IMAGES[scale])
        name = f"{bias}-{seed}"
        made.append(train_step(name, recipe))
        looked: dict[str, Any] = {
            "source": f"{name}/run/last", "cpb": BIASES[bias], "data": data, "images": TESTED[scale],
            "sizes": [_at(scale, size) for size in SIZES[scale]],
        }  # fmt: skip
        made.append(Step(f"{name}-elsewhere", elsewhere, looked, (name,)))
        larger = replace(recipe.model, **_at(scale, TUNED_SIZE[scale]))
        if scale == "paper":
            tuned = published_recipe("imagenet_224to384_swin_base", data, seed)
            tuned = replace(tuned, model=larger)
        else:
            tuned = supervised(
                "claims_transfer_tuned", larger, data, scale, seed, TUNING[scale], rate=0.2, tested=TESTED[scale]
            )
        made.append(train_step(f"{name}-tuned", tuned, init=name))
    return made


def _at(scale: Scale, size: int) -> dict[str, Any]:
    return {"img_size": size, "window_size": size // 32} if scale == "paper" else network(scale).at(size)


def elsewhere(
    directory: Path, source: str, cpb: Any, data: str, images: int, sizes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Top-1 of a trained model at other sizes and windows, and its position bias there.

    Args:
        source: the model, relative to the directory of the claim.
        images: at most so many of the test images, evenly spread.

    Returns:
        ``top1`` per size, and ``maps``: the bias of the first block's first head per offset, as rows, at the first and the last.
    """
    place = directory.parent / source
    made = read_metadata(place)["preprocessing"]
    pictures = test_images(data)
    pictures = pictures.take(range(0, len(pictures), max(1, len(pictures) // images)))
    top1, maps = [], []
    with world("auto") as here:
        for size in sizes:
            model, _ = transfer(place, **size, cpb=cpb)
            assert isinstance(model, SwinTransformer)
            transform = eval_transform(model.config.img_size, made["mean"], made["std"], crop_ratio=None)
            held = ImageDataset(pictures, transform, model.config.in_chans, replace_corrupt=False)
            loader = EpochLoader(held, 64, shuffle=False, drop_last=False)
            task = Classify(model, model.num_classes).to(here.device)
            top1.append(evaluate(task, loader, resolve_precision("auto", here.device), here.device)["top1"])
            maps.append(_bias_map(model.eval()))
    return {"top1": top1, "maps": [maps[0], maps[-1]]}


@torch.no_grad()
def _bias_map(model: SwinTransformer) -> list[list[float]]:
    """(2h-1, 2w-1): the bias of the first head of the first block, by offset along height and width."""
    attention = model.layers[0].blocks[0].attn
    height, width = attention.window
    values = attention.bias((height, width)).values[0].float().cpu()
    return values.view(2 * height - 1, 2 * width - 1).tolist()


def read(scale: Scale, results: Results) -> Outcome:
    seeds = 1 + max(int(name.split("-")[1]) for name in results)
    sizes, tuned_size = SIZES[scale], TUNED_SIZE[scale]
    free = {
        (bias, size): [100 * results[f"{bias}-{s}-elsewhere"]["top1"][i] for s in range(seeds)]
        for bias, (i, size) in product(BIASES, enumerate(sizes))
    }
    tuned = {bias: seed_values(results, f"{bias}-{{seed}}-tuned", seeds) for bias in BIASES}
    findings = []
    largest = sizes[-1]
    for other, published in (("table", "68.7 against 79.1 at 3 times the window"), ("linear", "77.6 against 79.1")):
        statement = (
            f"without training at {largest // sizes[0]} times the size and window, log-spaced CPB keeps more accuracy than the "
            f"{NAMES[other]}"
        )
        findings.append(ahead(statement, published, free["log", largest], free[other, largest]))
    loss = Interval.of_difference(free["table", largest], free["table", sizes[0]])
    findings.append(
        Finding(
            "the table, resized by bicubic interpolation, loses accuracy",
            "81.7 → 68.7",
            loss.text("points"),
            "the interval of the change lies below 0",
            judge(loss, "below"),
            loss,
            "points",
        )
    )
    statement = (
        f"after fine-tuning at {tuned_size // sizes[0]} times the size, log-spaced CPB is still ahead of the table"
    )
    findings.append(ahead(statement, "83.8 against 83.0", tuned["log"], tuned["table"]))
    findings.append(_reach())
    header = ("bias", *(f"{size} pixels" for size in sizes), f"{tuned_size}, fine-tuned")
    rows = [(NAMES[b], *(Interval.of(free[b, size]) for size in sizes), Interval.of(tuned[b])) for b in BIASES]
    lines = [
        line_of(NAMES[bias], sizes, [free[bias, size] for size in sizes], group) for group, bias in enumerate(BIASES)
    ]
    curves = {"title": "Accuracy at larger sizes and windows, without training", "series": lines}
    curves |= {"x": "side of the picture, pixels (the window grows with it)", "y": "top-1, %"}
    maps = [
        (f"{NAMES[bias]}, {where}", _centred(results[f"{bias}-0-elsewhere"]["maps"][i]))
        for bias in BIASES
        for i, where in enumerate(("as trained", f"at {largest} pixels"))
    ]
    learned = {
        "title": "Position bias of the first head, by offset",
        "maps": maps,
        "unit": "bias, less its mean",
        "columns": 2,
        "diverging": True,
    }
    return Outcome(
        findings,
        [Table("Top-1 in percent, mean and 95 % interval over seeds", header, rows)],
        [
            Figure("accuracy", "lines", curves, "Bars: 95 % interval over seeds."),
            Figure(
                "bias", "heat_maps", learned, "Of the first seed. Rows and columns are offsets along height and width."
            ),
            Figure(
                "reach",
                "lines",
                _reach_curves(),
                "How far beyond the trained coordinates a larger window reaches (Figure 4).",
            ),
        ],
    )


def _centred(values: list[list[float]]) -> list[list[float]]:
    """Less the mean, which the softmax does not see."""
    mean = fmean(v for row in values for v in row)
    return [[v - mean for v in row] for row in values]


def _ratio(kind: str, trained: int, window: int) -> float:
    """Coordinates beyond the trained ones, over the trained ones."""
    reach = [
        float(relative_coords((w, w), (trained, trained), kind, torch.device("cpu")).max()) for w in (trained, window)
    ]
    return reach[1] / reach[0] - 1


def _reach() -> Finding:
    """Figure 4's arithmetic, from the coordinates that the models read."""
    linear, log = _ratio("linear", 8, 16), _ratio("paper", 8, 16)
    return Finding(
        "from window 8 to 16, log-spaced coordinates reach less far beyond the trained ones than linear ones",
        "0.33 against 1.14 times", f"{log:.2f} against {linear:.2f} times",
        "both ratios equal the published ones to two digits",
        "reproduced" if (round(log, 2), round(linear, 2)) == (0.33, 1.14) else "not reproduced",
    )  # fmt: skip


def _reach_curves() -> dict[str, Any]:
    windows = [8, 12, 16, 20, 24, 32, 48]
    kinds = {"linear": "linear", "log, as printed": "paper", "log, as in the published code": "log"}
    series = [
        {"label": label, "x": windows, "y": [_ratio(kind, 8, w) for w in windows], "group": i}
        for i, (label, kind) in enumerate(kinds.items())
    ]
    text = {"x": "window, trained at 8", "y": "reach beyond the trained coordinates"}
    return {"title": "Extrapolation ratio of the position bias", "series": series, **text}


def settings(scale: Scale) -> str:
    if scale == "paper":
        return "Swin V2-T at 256/8, 300 epochs of ImageNet-1K per bias; 30 epochs of fine-tuning at 512/16."
    sizes = SIZES[scale]
    return (
        f"The same network ({network(scale)}) with each position bias, {IMAGES[scale]} images seen in training; evaluated on "
        f"{TESTED[scale]} test images at {sizes[0]} to {sizes[-1]} pixels with windows of the same share; fine-tuned at "
        f"{TUNED_SIZE[scale]} pixels on {TUNING[scale]} images."
    )


_T1 = "Table 1, Swin-T"
CLAIM = Claim(
    name="transfer",
    title="Other windows and resolutions",
    sentence=(
        "A position bias that a small network computes from log-spaced coordinates carries over to larger windows and pictures "
        "better than a table resized by interpolation, and better than the same network on linear coordinates."
    ),
    source="Swin Transformer V2, arXiv 2111.09883, Table 1 and Figure 4",
    published=[
        Published(
            "table, bicubic: 256, 384, 512, 640, 768 pixels, without training", "81.7, 79.4, 77.2, 73.2, 68.7", _T1
        ),
        Published("linear-spaced CPB", "81.7, 82.0, 81.2, 79.8, 77.6", _T1),
        Published("log-spaced CPB", "81.8, 82.4, 81.7, 80.4, 79.1 (78.9 in the text)", _T1),
        Published("after fine-tuning at 512: table, linear, log", "83.0, 83.3, 83.8", _T1),
        Published("reach beyond trained coordinates, window 8 to 16", "linear 1.14, log 0.33", "section 3.3"),
    ],
    steps=steps,
    read=read,
    settings=settings,
)
