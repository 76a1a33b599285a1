"""Where a block normalises and how it compares: Tables 6 and 7 of the Swin V2 article."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from swinscale.claims.base import (
    Claim,
    Outcome,
    Published,
    Results,
    Scale,
    Step,
    Table,
    ahead,
    dots_of,
    seed_values,
    train_step,
)
from swinscale.claims.experiments import network, published_recipe, supervised
from swinscale.intervals import Interval

PLACEMENTS, SIMILARITIES = ("pre", "post", "sandwich", "res-post"), ("dot", "cosine")
SLOWER = 0.25
"""Post-norm has a quarter of the learning rate, as in the article, where it diverges at the full one."""
IMAGES = {"desk": 16_000, "gpu": 200_000}


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    made = []
    for seed, placement, similarity in product(range(seeds), PLACEMENTS, SIMILARITIES):
        name = f"{placement}-{similarity}-{seed}"
        parts = {"norm_placement": placement, "similarity": similarity, "identity_start": None}
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
    v1, v2 = top1["pre", "dot"], top1["res-post", "cosine"]
    findings = [
        ahead(
            "res-post-norm with cosine attention is more accurate than pre-norm with the dot product",
            "T 81.5 → 81.7, S 83.2 → 83.6, B 83.6 → 84.1",
            v2,
            v1,
        ),
        ahead(
            "res-post-norm alone is more accurate than pre-norm",
            "T 81.5 → 81.6, S 83.2 → 83.3, B 83.6 → 83.8",
            top1["res-post", "dot"],
            v1,
        ),
        ahead(
            "cosine attention adds accuracy to res-post-norm",
            "T 81.6 → 81.7, S 83.3 → 83.6, B 83.8 → 84.1",
            v2,
            top1["res-post", "dot"],
        ),
        ahead("V2 is more accurate than sandwich norm", "S 82.6 → 83.6", v2, top1["sandwich", "dot"]),
        ahead(
            "V2 is more accurate than post-norm at a quarter of the rate",
            "S 83.3 → 83.6, B 83.6 → 84.1",
            v2,
            top1["post", "dot"],
        ),
    ]
    rows = [(placement, *(Interval.of(top1[placement, s]) for s in SIMILARITIES)) for placement in PLACEMENTS]
    arms = {f"{p}, {s}": values for (p, s), values in top1.items()}
    colours = [SIMILARITIES.index(s) for _, s in top1]
    return Outcome(
        findings,
        [Table("Top-1 in percent, mean and 95 % interval over seeds", ("norm", *SIMILARITIES), rows)],
        [dots_of("accuracy", "Accuracy by place of the norm and similarity", arms, colours)],
    )


def settings(scale: Scale) -> str:
    if scale == "paper":
        return "Swin V2-S 256/8, 300 epochs of ImageNet-1K for each of eight kinds of block."
    return (
        f"Each of eight kinds of block in the same network ({network(scale)}), {IMAGES[scale]} images seen in training, top-1 on "
        f"the whole test part."
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
