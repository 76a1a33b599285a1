"""Where a block normalises and how it compares: Tables 6 and 7 of the Swin V2 article."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

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
    seed_values,
    train_step,
)
from swinscale.claims.experiments import network, published_recipe, supervised
from swinscale.claims.statistics import judge
from swinscale.intervals import Interval

PLACEMENTS, SIMILARITIES = ("pre", "post", "sandwich", "res-post"), ("dot", "cosine")
SLOWER = 0.25
"""Post-norm has a quarter of the learning rate, as in the article, where it diverges at the full one."""
IMAGES = {"desk": 16_000, "gpu": 200_000}
ABOVE = "the interval of the difference, paired by seed, lies above 0"


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    made = []
    for seed, placement, similarity in product(range(seeds), PLACEMENTS, SIMILARITIES):
        name, parts = (
            f"{placement}-{similarity}-{seed}",
            {"norm_placement": placement, "similarity": similarity, "identity_start": None},
        )
        rate = SLOWER if placement == "post" else 1.0
        if scale == "paper":
            recipe = published_recipe("imagenet_swinv2_small", data, seed, **parts)
            optim = recipe.train.optim
            recipe = replace(recipe, train=replace(recipe.train, optim=replace(optim, lr=rate * optim.lr)))
        else:
            model = network(scale).config(**parts)
            recipe = supervised("claims_blocks", model, data, scale, seed, IMAGES[scale], rate=rate)
        made.append(train_step(name, recipe))
    return made


def read(scale: Scale, results: Results) -> Outcome:
    seeds = 1 + max(int(name.rpartition("-")[2]) for name in results)
    top1 = {(p, s): seed_values(results, f"{p}-{s}-{{seed}}", seeds) for p, s in product(PLACEMENTS, SIMILARITIES)}

    def compare(one: tuple[str, str], other: tuple[str, str], statement: str, published: str) -> Finding:
        gain = Interval.of_difference(top1[one], top1[other])
        return Finding(statement, published, gain.text("points"), ABOVE, judge(gain, "above"), gain, "points")

    findings = [
        compare(
            ("res-post", "cosine"), ("pre", "dot"), "res-post-norm with cosine attention is more accurate than pre-norm "
            "with the dot product", "T 81.5 → 81.7, S 83.2 → 83.6, B 83.6 → 84.1"
        ),
        compare(
            ("res-post", "dot"), ("pre", "dot"), "res-post-norm alone is more accurate than pre-norm",
            "T 81.5 → 81.6, S 83.2 → 83.3, B 83.6 → 83.8"
        ),
        compare(
            ("res-post", "cosine"), ("res-post", "dot"), "cosine attention adds accuracy to res-post-norm",
            "T 81.6 → 81.7, S 83.3 → 83.6, B 83.8 → 84.1"
        ),
        compare(
            ("res-post", "cosine"), ("sandwich", "dot"), "V2 is more accurate than sandwich norm", "S 82.6 → 83.6"
        ),
        compare(
            ("res-post", "cosine"), ("post", "dot"), "V2 is more accurate than post-norm at a quarter of the rate",
            "S 83.3 → 83.6, B 83.6 → 84.1"
        ),
    ]  # fmt: skip
    rows = [(placement, *(Interval.of(top1[placement, s]) for s in SIMILARITIES)) for placement in PLACEMENTS]
    options = {
        "title": "Accuracy by place of the norm and similarity",
        "rows": [
            {"label": f"{p}, {s}", **Interval.of(top1[p, s]).whisker(), "group": SIMILARITIES.index(s)}
            for p, s in product(PLACEMENTS, SIMILARITIES)
        ],
        "x": "top-1, %; whisker: 95 % interval over seeds",
    }
    caption = (
        "Blue: dot product, orange: cosine. Whiskers are of single means; the statements compare pairs of equal seed."
    )
    return Outcome(
        findings,
        [Table("Top-1 in percent, mean and 95 % interval over seeds", ("norm", *SIMILARITIES), rows)],
        [Figure("accuracy", "dots", options, caption)],
    )


def settings(scale: Scale) -> str:
    if scale == "paper":
        return "Swin V2-S 256/8, 300 epochs of ImageNet-1K for each of eight kinds of block."
    n = network(scale)
    return (
        f"Each of eight kinds of block in the same network ({n.img_size} pixels, patch {n.patch_size}, window {n.window_size}, width "
        f"{n.embed_dim}, depths {n.depths}), {IMAGES[scale]} images seen in training, top-1 on the whole test part."
    )


CLAIM = Claim(
    name="blocks",
    title="Norm placement and cosine attention",
    sentence=(
        "Normalising the output of each residual branch instead of its input (res-post-norm) and comparing queries and keys by "
        "their cosine each make the network a little more accurate, and both together are better than sandwich or post-norm."
    ),
    source="Swin Transformer V2, arXiv 2111.09883, Tables 6 and 7",
    published=[
        Published("V1 → + res-post-norm → + cosine, T", "81.5 → 81.6 → 81.7 top-1", "Table 6, ImageNet-1K, 256/8"),
        Published("the same, S", "83.2 → 83.3 → 83.6", "Table 6"),
        Published("the same, B", "83.6 → 83.8 → 84.1", "Table 6"),
        Published("S: pre-norm, sandwich, post-norm, V2", "83.2, 82.6, 83.3, 83.6", "Table 7"),
        Published("B: pre-norm, post-norm, V2", "83.6, 83.6, 84.1", "Table 7"),
    ],
    steps=steps,
    read=read,
    settings=settings,
)
