"""Masked pre-training: few labels, and what it needs. Figure 5 of the Swin V2 article, and SimMIM's ablations."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
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
    dots_of,
    line_of,
    seed_values,
    train_step,
)
from swinscale.claims.experiments import TESTED, count_images, masked, network, published_recipe, supervised
from swinscale.claims.statistics import judge
from swinscale.intervals import Interval
from swinscale.recipes import DataConfig, Recipe
from swinscale.tasks import SimMIMConfig

SHARES = (0.01, 0.02, 0.05, 0.1, 1.0)
IMAGES = {"desk": 32_000, "gpu": 400_000}
TUNING = {"desk": 3_000, "gpu": 60_000}
ABLATION = {"desk": 6_000, "gpu": 100_000}
ABLATION_TUNING = {"desk": 2_000, "gpu": 30_000}
ABLATION_SHARE = 0.1
SIDE = {"desk": 4, "gpu": 4, "paper": 32}
"""Of a masked square, in pixels: an eighth of the published 32 at an eighth of the size."""

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "ratio 0.3": {"mask_ratio": 0.3},
    "ratio 0.8": {"mask_ratio": 0.8},
    "squares twice as wide": {"mask_patch": 2},
    "twice as wide, ratio 0.3": {"mask_patch": 2, "mask_ratio": 0.3},
    "L2": {"loss": "l2"},
    "all pixels": {"masked_only": False},
    "two-layer head": {"head_layers": 2},
}
"""Changes of the task; ``mask_patch`` as a factor."""


def task(scale: Scale, **changes: Any) -> SimMIMConfig:
    side = SIDE[scale] * changes.pop("mask_patch", 1)
    return SimMIMConfig(mask_patch=side, **changes)


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    made = []
    for seed in range(seeds):
        made.append(train_step(f"pre-{seed}", _pre(scale, data, seed, {}, IMAGES)))
        for share in SHARES:
            place = f"{share:g}-{seed}"
            made += [
                train_step(f"tuned-{place}", _tuned(scale, data, seed, share, TUNING, True), init=f"pre-{seed}"),
                train_step(f"scratch-{place}", _tuned(scale, data, seed, share, TUNING, False)),
            ]
    for seed, (variant, changes) in product(range(seeds), VARIANTS.items()):
        name = f"{variant.replace(' ', '_').replace(',', '')}-{seed}"
        made += [
            train_step(f"ablation/pre-{name}", _pre(scale, data, seed, changes, ABLATION)),
            train_step(
                f"ablation/{name}",
                _tuned(scale, data, seed, ABLATION_SHARE, ABLATION_TUNING, True),
                init=f"ablation/pre-{name}",
            ),
        ]
    return made


def _pre(scale: Scale, data: str, seed: int, changes: dict[str, Any], images: dict[str, int]) -> Recipe:
    if scale == "paper":
        recipe = published_recipe("simmim_swin_base_100ep", data, seed)
        return replace(recipe, task=task(scale, **changes))
    return masked("claims_simmim", network(scale).config(), data, scale, seed, images[scale], task(scale, **changes))


def _tuned(scale: Scale, data: str, seed: int, share: float, images: dict[str, int], pretrained: bool) -> Recipe:
    """From a share of the labels; rates and layer decay are those of the desk recipes, chosen on other pictures."""
    total, classes = count_images(data)
    labels = 0 if share == 1 else max(1, round(share * total / classes))
    if scale == "paper":
        recipe = published_recipe("imagenet_simmim_swin_base_100ep", data, seed)
        assert isinstance(recipe.data, DataConfig)
        return replace(recipe, data=replace(recipe.data, labels_per_class=labels))
    rate, decay = (2.0, 0.85) if pretrained else (1.0, 1.0)
    how: dict[str, Any] = {"labels_per_class": labels, "rate": rate, "layer_decay": decay, "tested": TESTED[scale]}
    return supervised("claims_simmim_tuned", network(scale).config(), data, scale, seed, images[scale], **how)


def read(scale: Scale, results: Results) -> Outcome:
    seeds = sum(name.startswith("pre-") for name in results)
    tuned = {share: seed_values(results, f"tuned-{share:g}-{{seed}}", seeds) for share in SHARES}
    scratch = {share: seed_values(results, f"scratch-{share:g}-{{seed}}", seeds) for share in SHARES}
    findings = [
        ahead(
            f"pre-training helps with {share:.0%} of the labels",
            "Swin-L 83.5 → 85.4, V2-H 83.3 → 85.7, all labels" if share == 1 else "no figure for this share",
            tuned[share],
            scratch[share],
        )
        for share in SHARES
    ]
    few, many = SHARES[0], SHARES[-1]
    more = Interval.of(
        [a - b - (c - d) for a, b, c, d in zip(tuned[few], scratch[few], tuned[many], scratch[many], strict=True)]
    )
    findings.append(
        Finding(
            f"it helps more with {few:.0%} of the labels than with all",
            "40 times less labelled data for the 3-billion model (in words)",
            more.text("points"),
            "the interval of the difference of the two gains lies above 0",
            judge(more, "above"),
            more,
            "points",
        )
    )
    name = {variant: variant.replace(" ", "_").replace(",", "") for variant in VARIANTS}
    ablation = {v: seed_values(results, f"ablation/{name[v]}-{{seed}}", seeds) for v in VARIANTS}
    for worse, statement, published in (
        ("all pixels", "a loss on masked pixels alone is better than on all", "82.8 against 81.7"),
        ("L2", "L1 is better than L2", "82.8 against 82.7"),
        (
            "two-layer head",
            "one linear layer predicts as well as a deeper head, or better",
            "82.8 against 82.8 (2 layers)",
        ),
        ("ratio 0.3", "masking 60 % is better than 30 %", "83.0 against 82.8 (squares of 32)"),
        ("ratio 0.8", "masking 60 % is better than 80 %", "82.8 against 82.4 (squares of 32; 0.6 against 0.8)"),
    ):
        findings.append(ahead(statement, published, ablation["base"], ablation[worse]))
    rows = [
        (
            f"{share:.0%}",
            Interval.of(scratch[share]),
            Interval.of(tuned[share]),
            Interval.of_difference(tuned[share], scratch[share]).text(),
        )
        for share in SHARES
    ]
    header = ("labels", "from random weights", "after pre-training", "gain")
    series = [
        line_of(label, [100 * share for share in SHARES], [arm[share] for share in SHARES], group)
        for group, (label, arm) in enumerate({"after pre-training": tuned, "from random weights": scratch}.items())
    ]
    curves = {"title": "Accuracy against the share of labels", "series": series, "log_x": True}
    curves |= {"x": "labelled share of the training images, %", "y": "top-1, %"}
    title = f"Variants of the pre-training task, {ABLATION_SHARE:.0%} of the labels"
    variants = [(variant, Interval.of(values)) for variant, values in ablation.items()]
    caption = "Bars: 95 % interval over seeds. Both arms see as many labelled images in training, whatever the share."
    return Outcome(
        findings,
        [
            Table("Top-1 in percent, mean and 95 % interval over seeds", header, rows),
            Table(f"Variants, {ABLATION_SHARE:.0%} of the labels: top-1 in percent", ("variant", "top-1"), variants),
        ],
        [
            Figure("labels", "lines", curves, caption),
            dots_of("variants", title, ablation),
        ],
    )


def settings(scale: Scale) -> str:
    if scale == "paper":
        return "SimMIM with Swin-B at 192/6 for 100 epochs of ImageNet-1K, then 100 epochs of fine-tuning at 224/7 on a share of it."
    return (
        f"A network of {network(scale)}. SimMIM with squares of {SIDE[scale]} pixels, 60 % masked, for {IMAGES[scale]} images; then "
        f"{TUNING[scale]} images of fine-tuning, or as many from random weights. Variants: {ABLATION[scale]} images of pre-training "
        f"and {ABLATION_TUNING[scale]} of fine-tuning. Top-1 on {TESTED[scale] or 'all'} test images."
    )


CLAIM = Claim(
    name="simmim",
    title="Masked pre-training and labels",
    sentence=(
        "Pre-training on masked images lets a model do with few labels; the prediction of masked raw pixels by one linear "
        "layer, with an L1 loss and most of the image masked, is all that it takes."
    ),
    source="Swin Transformer V2, arXiv 2111.09883, Figure 5 and section 4.1; SimMIM, arXiv 2111.09886, Tables 1 to 6",
    published=[
        Published("Swin-L, ImageNet-1K alone: supervised, SimMIM", "83.5, 85.4 top-1", "microsoft/SimMIM"),
        Published("Swin V2-H: supervised, SimMIM", "83.3, 85.7 (224), 87.1 (512)", "microsoft/SimMIM"),
        Published(
            "mask ratio 0.1 … 0.9, squares of 32",
            "82.7, 82.8, 82.8, 82.9, 83.0, 82.8, 82.7, 82.4, 82.4",
            "SimMIM, from memory",
        ),
        Published(
            "squares of 4, 8, 16, 32 pixels", "81.9 – 82.1, 82.0 – 82.4, 82.5, up to 83.0", "SimMIM, from memory"
        ),
        Published("L1, L2, smooth L1", "82.8, 82.7, 82.7", "SimMIM, from memory"),
        Published("masked pixels alone, all pixels", "82.8, 81.7", "SimMIM, from memory"),
        Published(
            "head: linear, 2 layers, inverse Swin-T, inverse Swin-B", "82.8, 82.8, 82.4, 82.5", "SimMIM, from memory"
        ),
        Published("V2-B: 1K 10 % for 125k, 250k, 500k steps", "83.33, 83.60, 83.41", "arXiv 2206.04664"),
        Published("V2-B: 1K for 125k, 250k, 500k steps", "84.13, 84.65, 85.04", "arXiv 2206.04664"),
    ],
    steps=steps,
    read=read,
    settings=settings,
)
