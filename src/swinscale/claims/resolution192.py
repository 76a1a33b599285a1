"""Pre-training at 192 pixels instead of 224: how SimMIM and Swin V2 pre-train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swinscale.claims.base import (
    Claim,
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
    train_step,
)
from swinscale.claims.experiments import GPU, TESTED, Network, count_images, masked, published_recipe, supervised
from swinscale.intervals import Interval
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.parallel import autocast, resolve_precision, world
from swinscale.tasks import SimMIM, SimMIMConfig
from swinscale.timing import alternate

NETWORKS = {
    "desk": Network(24, patch_size=2, window_size=6, embed_dim=32, depths=(2, 4), num_heads=(2, 4)),
    "gpu": replace(GPU, img_size=48, window_size=6),
}
"""An eighth (desk) or a quarter (gpu) of 192 pixels, with windows of the same share: 6, and 7 at the larger size."""
SIZES = {"desk": (24, 28), "gpu": (48, 56), "paper": (192, 224)}
IMAGES = {"desk": 16_000, "gpu": 200_000}
TUNING = {"desk": 6_000, "gpu": 60_000}
SHARE = 0.1
"""Of the labels, in fine-tuning."""
MASK = {"desk": 4, "gpu": 8, "paper": 32}
BATCH = {"desk": 64, "gpu": 256, "paper": 64}
ALIKE = 1.0
"""Points of accuracy within which two count as equal: our reading of "no loss"."""


def _model(scale: Scale, size: int) -> SwinConfig:
    return NETWORKS[scale].config(**NETWORKS[scale].at(size))


def steps(scale: Scale, data: str, seeds: int) -> list[Step]:
    made = []
    for seed in range(seeds):
        for size in SIZES[scale]:
            if scale == "paper":
                window = size // 32
                pre = published_recipe("simmim_swin_base_100ep", data, seed, img_size=size, window_size=window)
                tuned = published_recipe("imagenet_simmim_swin_base_100ep", data, seed)
            else:
                task = SimMIMConfig(mask_patch=MASK[scale])
                pre = masked("claims_resolution", _model(scale, size), data, scale, seed, IMAGES[scale], task)
                tuned = _tuned(scale, data, seed, 2.0, 0.85)
            made += [
                train_step(f"pre{size}-{seed}", pre),
                train_step(f"tuned{size}-{seed}", tuned, init=f"pre{size}-{seed}"),
            ]
        if scale != "paper":
            made.append(train_step(f"scratch-{seed}", _tuned(scale, data, seed, 1.0, 1.0)))
    made.append(Step("time", time_steps, {"scale": scale}, tuple(s.name for s in made), alone=True))
    return made


def _tuned(scale: Scale, data: str, seed: int, rate: float, layer_decay: float) -> Any:
    """From a share of the labels, at the larger size; rates and layer decay are those of the desk recipes."""
    total, classes = count_images(data)
    labels = max(1, round(SHARE * total / classes))
    model, images = _model(scale, SIZES[scale][1]), TUNING[scale]
    how: dict[str, Any] = {
        "labels_per_class": labels,
        "rate": rate,
        "layer_decay": layer_decay,
        "tested": TESTED[scale],
    }
    return supervised("claims_resolution_tuned", model, data, scale, seed, images, **how)


def time_steps(directory: Path, scale: Scale, rounds: int = 15) -> dict[str, Any]:
    """Seconds of a SimMIM step (forward and backward) at either size, in alternation."""
    with world("auto") as here:
        device, precision = here.device, resolve_precision("auto", here.device)
        calls = []
        for size in SIZES[scale]:
            if scale == "paper":
                config = replace(
                    published_recipe("simmim_swin_base_100ep", "", 0).model,
                    img_size=(size, size),
                    window_size=size // 32,
                )
            else:
                config = _model(scale, size)
            task = SimMIM(SwinTransformer(config), SimMIMConfig(mask_patch=MASK[scale])).to(device).train()
            images = torch.randn(BATCH[scale], config.in_chans, size, size, device=device)
            tokens = size // config.patch_size[0]
            batch = {"image": images, "mask": torch.rand(BATCH[scale], tokens, tokens, device=device) < 0.6}

            def step(_: int, task: SimMIM = task, batch: dict[str, Any] = batch) -> None:
                task.zero_grad(set_to_none=True)
                with autocast(precision, device):
                    loss = task(batch)[0]
                loss.backward()

            calls.append(step)
        small, large = alternate(calls, rounds, device.type)
    return {"small": small, "large": large}


def read(scale: Scale, results: Results) -> Outcome:
    small, large = SIZES[scale]
    seeds = sum(name.startswith(f"pre{small}-") for name in results)
    arms = {f"pre-trained at {s}": seed_values(results, f"tuned{s}-{{seed}}", seeds) for s in (small, large)}
    names = list(arms)
    if "scratch-0" in results:
        arms["from random weights"] = seed_values(results, "scratch-{seed}", seeds)
    times = results["time"]
    ratio = Interval.of_ratio(times["small"], times["large"])
    findings = [
        alike(
            f"pre-training at {small} instead of {large} pixels loses no accuracy after fine-tuning at {large}",
            "83.5 top-1 after 192; no figure for 224",
            arms[names[0]],
            arms[names[1]],
            ALIKE,
        ),
        ratio_to(
            f"a step of pre-training at {small} pixels takes less time than at {large}",
            f"no figure; {small**2 / large**2:.2f} of the pixels",
            ratio,
            "below",
            1.0,
            "the interval of the ratio, over rounds in alternation, lies below 1",
        ),
    ]
    if len(arms) == 3:
        statement = "pre-training helps at all, so that the comparison means something"
        findings.append(ahead(statement, "Swin-B 83.3 → 83.5", arms[names[0]], arms["from random weights"]))
    rows = [(name, Interval.of(values)) for name, values in arms.items()]
    seconds = [
        (f"{size} pixels", 1000 * Interval.of(times[part]).estimate)
        for part, size in (("small", small), ("large", large))
    ]
    return Outcome(
        findings,
        [
            Table(f"Top-1 in percent at {large} pixels, mean and 95 % interval over seeds", ("arm", "top-1"), rows),
            Table("Milliseconds of a pre-training step (forward and backward), mean", ("size", "ms"), seconds),
        ],
        [dots_of("accuracy", "Accuracy after fine-tuning", arms)],
    )


def settings(scale: Scale) -> str:
    small, large = SIZES[scale]
    if scale == "paper":
        return "SimMIM with Swin-B for 100 epochs of ImageNet-1K at 192/6 and 224/7, then 100 epochs of fine-tuning at 224/7."
    n = NETWORKS[scale]
    return (
        f"SimMIM at {small} pixels with window {n.window_size} and at {large} with window {n.at(large)['window_size']} (patch "
        f"{n.patch_size}, width {n.embed_dim}, depths {n.depths}), {IMAGES[scale]} images seen; then {TUNING[scale]} images of "
        f"fine-tuning at {large} pixels from {SHARE:.0%} of the labels; top-1 on {TESTED[scale] or 'all'} test images."
    )


CLAIM = Claim(
    name="resolution192",
    title="Pre-training at 192 pixels",
    sentence="Masked pre-training at 192 pixels instead of 224 costs no accuracy after fine-tuning at 224, and takes less time.",
    source="SimMIM, arXiv 2111.09886, and Swin Transformer V2, arXiv 2111.09883: both pre-train at 192",
    published=[
        Published(
            "Swin-B, 100 epochs at 192/6, fine-tuned at 192/6 and at 224/7", "82.8, 83.5 top-1", "microsoft/SimMIM"
        ),
        Published("Swin-B, 800 epochs at 192/6, fine-tuned at 224/7", "84.0", "microsoft/SimMIM"),
        Published("the same pre-trained at 224", "not published", ""),
    ],
    steps=steps,
    read=read,
    settings=settings,
)
