"""The article's core in a few minutes: masked pre-training, fine-tuning at a larger size and window, and a comparison."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from swinscale.data import CorruptImage, ImageDataset, MaskConfig, Source, mask_for_sample
from swinscale.diagnose.pictures import annotated, reconstruction_panels, to_picture
from swinscale.diagnose.plots import Accuracy, accuracy_bars, confusion_matrix, loss_curves, run_curves
from swinscale.diagnose.report import Details, Gallery, Grid, Picture, Plot, Report, Section, Table, write_report
from swinscale.inference import Pipeline, load_pipeline
from swinscale.intervals import wilson_interval
from swinscale.models.config import format_size
from swinscale.recipes import Recipe, get_recipe, run
from swinscale.recipes.base import open_sources
from swinscale.runlog import read_log
from swinscale.tasks import SimMIM
from swinscale.train import TrainResult

BUNDLED = "bundled:fashion-mnist"
PHOTO_BUDGET = 6000  # photos of 112 to 128 pixels that each of the three runs sees: about a minute and a half


def demo(data: str = BUNDLED, out: Path | None = None) -> Path:
    """Runs the demo and returns the path of its report.

    Args:
        data: the bundled pictures, or a folder of photos with one folder per class. Without class folders only the
            pre-training is shown.
        out: run directory; None: ``runs/demo``, with the name of the images added when they are the user's own. A demo
            that was interrupted goes on where it stopped.
    """
    out = out or Path("runs") / ("demo" if data == BUNDLED else f"demo-{Path(data).resolve().stem}")
    started, console = time.perf_counter(), Console(highlight=False)
    recipes = _recipes(data)
    results: dict[str, TrainResult] = {}
    titles = {
        "simmim": "SimMIM pre-training (no labels)",
        "finetuned": "Fine-tuning at a larger size and window",
        "scratch": "The same from random weights",
    }
    if len(recipes) < len(titles):
        console.print("The images have no folder per class in both their training and test part: pre-training alone.")
    for name, recipe in recipes.items():
        console.print(f"[bold]{len(results) + 1}. {titles[name]}[/bold]")
        if name == "finetuned":
            recipe = dataclasses.replace(recipe, init=str(out / "simmim/last"))
        results[name] = run(recipe, out / name, resume=True)
    path = out / "report.html"
    write_report(path, _report(recipes, results, out))
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes.")
    return path


def _recipes(data: str) -> dict[str, Recipe]:
    """The three runs. A folder of photos gets as many epochs as fit the budget."""
    if data == BUNDLED:
        return {name: get_recipe(f"desk_{kind}") for name, kind in _KINDS.items()}
    pre = get_recipe("photos_simmim")
    pre = dataclasses.replace(pre, data=dataclasses.replace(pre.data, train=data, eval_split="test"))
    source, held = open_sources(pre.data, pre.train.seed, labelled=False)
    batch, epochs = min(pre.train.batch_size, len(source)), PHOTO_BUDGET / len(source)
    epochs = max(round(epochs), 1) if epochs > 0.5 else epochs
    recipes = {}
    for name, kind in _KINDS.items():
        if name != "simmim" and (source.classes is None or held.classes != source.classes):
            continue
        recipe = get_recipe(f"photos_{kind}")
        optim = dataclasses.replace(recipe.train.optim, warmup_epochs=min(0.5, epochs / 10))
        how = dataclasses.replace(recipe.train, epochs=epochs, batch_size=batch, num_workers=0, optim=optim)
        part = dataclasses.replace(recipe.data, train=data, eval_split="test")
        recipes[name] = dataclasses.replace(recipe, data=part, train=how)
    return recipes


_KINDS = {"simmim": "simmim", "finetuned": "finetune", "scratch": "scratch"}


def _report(recipes: dict[str, Recipe], results: dict[str, TrainResult], out: Path) -> Report:
    pre = recipes["simmim"]
    source, held = open_sources(pre.data, pre.train.seed, labelled=False)
    sections = [_pretraining(results["simmim"], pre, held, out)]
    highlights = [(f"{len(source):,}", "images without labels")]
    lead = f"A Swin Transformer V2 learned from {len(source):,} images without labels by predicting masked patches."
    if "finetuned" in results:
        tuned, scratch = (results[name].metrics for name in ("finetuned", "scratch"))
        counts = {name: _counts(results[name]) for name in ("finetuned", "scratch")}
        lead += (
            f" Fine-tuned with {_label_count(recipes['finetuned'])} labelled images it classifies "
            f"{100 * tuned['top1']:.1f} % of {counts['finetuned'][1]:,} unseen ones correctly; the same model with the same "
            f"labels from random weights {100 * scratch['top1']:.1f} %."
        )
        highlights += [
            (f"{100 * tuned['top1']:.1f} %", "top-1 with pre-training"),
            (f"{100 * scratch['top1']:.1f} %", "top-1 from scratch"),
        ]
        pipeline = load_pipeline(out / "finetuned/last")
        sections += [_comparison(recipes, results, counts, out), *_predictions(pipeline, results["finetuned"], held)]
    minutes = sum(result.seconds for result in results.values()) / 60
    highlights.append((f"{minutes:.1f} min", "training time"))
    sections.append(_manifests(results))
    return Report("Swin V2: pre-trained, fine-tuned, compared", lead, sections, highlights)


def _counts(result: TrainResult) -> tuple[int, int]:
    """(correct, all) evaluation images."""
    matrix = result.metrics["confusion"]
    return round(sum(row[i] for i, row in enumerate(matrix))), round(sum(map(sum, matrix)))


def _label_count(recipe: Recipe) -> str:
    source, _ = open_sources(recipe.data, recipe.train.seed, labelled=True)
    return f"{len(source):,}"


def _pretraining(result: TrainResult, recipe: Recipe, held: Source, out: Path) -> Section:
    pipeline = load_pipeline(out / "simmim/last")
    task = pipeline.task
    assert isinstance(task, SimMIM)
    options, config = task.config, pipeline.backbone.config
    cells = MaskConfig(config.img_size, options.mask_patch, config.patch_size, options.mask_ratio, options.mask_mode)
    images = [image for _, image in _examples(pipeline, held, 8)]
    masks = torch.stack([mask_for_sample(cells, 0, 0, index) for index in range(len(images))])
    panels = reconstruction_panels(task, torch.stack(images), masks)
    metrics = result.metrics
    size = format_size(config.img_size)
    text = (
        f"{100 * options.mask_ratio:.0f} % of each {size} image is hidden in squares of {options.mask_patch} pixels; one linear "
        f"layer on top of the encoder predicts the hidden pixels, and the loss is their mean absolute error. On held-out "
        f"images it reached {metrics['loss']:.3f}; predicting each image's mean visible colour gives "
        f"{metrics['mean_predictor_loss']:.3f}."
    )
    curves = loss_curves(
        "SimMIM loss",
        run_curves("pre-training", read_log(result.directory)),
        loss="L1 on masked pixels",
        baselines={"mean colour": metrics["mean_predictor_loss"]},
    )
    caption = (
        "Held-out images. Only hidden pixels are trained, so the reconstruction is noise where the image was visible; the "
        "composite has the visible pixels, and the predicted ones in the gaps."
    )
    grid = Grid(["input", "masked", "reconstruction", "composite"], [list(row) for row in panels], caption)
    return Section(f"1. Pre-training without labels ({recipe.name})", text, [Plot(curves), grid])


def _comparison(
    recipes: dict[str, Recipe], results: dict[str, TrainResult], counts: dict[str, tuple[int, int]], out: Path
) -> Section:
    labels = {"finetuned": "pre-trained, then fine-tuned", "scratch": "from scratch"}
    rows = []
    for name, label in labels.items():
        low, high = wilson_interval(*counts[name])
        m = results[name].metrics
        rows.append(
            [
                label,
                f"{100 * m['top1']:.1f}",
                f"{100 * low:.1f} – {100 * high:.1f}",
                f"{100 * m['top5']:.1f}",
                f"{m['loss']:.3f}",
            ]
        )
    before, after = recipes["simmim"].model, recipes["finetuned"].model
    text = (
        f"Pre-training ran at {before.img_size[0]} pixels with window {before.window_size[0][0]}, fine-tuning at "
        f"{after.img_size[0]} with window {after.window_size[0][0]}: the log-spaced position bias keeps its value at every "
        f"offset it was trained on. Both runs see the same labelled images for the same number of steps. One run each, so the "
        f"interval tells how sure the accuracy is on these test images, not how much another seed would change it."
    )
    chance = 1 / len(results["finetuned"].metrics["confusion"])
    bars = accuracy_bars("Accuracy on unseen images", [Accuracy(labels[n], *counts[n]) for n in labels], chance=chance)
    curves = [curve for name in labels for curve in run_curves(labels[name], read_log(out / name))]
    plot = loss_curves("Fine-tuning loss", curves, loss="cross-entropy")
    header = ["", "top-1 %", "95 % interval", f"top-{min(5, round(1 / chance))} %", "cross-entropy"]
    return Section("2. With and without pre-training", text, [Plot(bars), Table(header, rows), Plot(plot)])


def _predictions(pipeline: Pipeline, result: TrainResult, held: Source) -> list[Section]:
    classes = pipeline.classes or []
    matrix = confusion_matrix("Fine-tuned model: true against predicted class", result.metrics["confusion"], classes)
    examples = _examples(pipeline, held, 12)
    pictures = []
    with torch.no_grad():
        for index, image in examples:
            share = pipeline.backbone(image[None])[0].softmax(-1)
            values, order = share.topk(min(3, len(classes)))
            ranked = [(classes[i], p) for p, i in zip(values.tolist(), order.tolist(), strict=True)]
            truth = classes[held.labels[index]] if held.labels else None
            picture = annotated(to_picture(image, pipeline.mean, pipeline.std), ranked, truth)
            pictures.append(Picture(picture, f"{truth}, taken for {ranked[0][0]}"))
    return [
        Section(
            "3. Which classes are confused",
            "Rows are what a picture shows, columns what the model says.",
            [Plot(matrix)],
        ),
        Section("4. Sample predictions", "Test pictures spread evenly over the set, not chosen.", [Gallery(pictures)]),
    ]


def _manifests(results: dict[str, TrainResult]) -> Section:
    blocks = []
    for name, result in results.items():
        manifest = json.loads((result.directory / "manifest.json").read_text())
        manifest.pop("parameter_groups")
        config = json.loads((result.directory / "config.json").read_text())
        blocks.append(Details(f"{name}: machine, versions, data, settings", {"manifest": manifest, "recipe": config}))
    return Section("5. What ran", "Everything that is needed to repeat each run.", blocks)


def _examples(pipeline: Pipeline, source: Source, count: int) -> list[tuple[int, Tensor]]:
    """(index, input) of readable images spread evenly over ``source``."""
    dataset = ImageDataset(source, pipeline.transform, pipeline.backbone.config.in_chans)
    found = []
    for index in range(0, len(source), max(1, len(source) // count)):
        try:
            found.append((index, pipeline.transform(dataset.decode(index))))
        except CorruptImage:
            continue
    return found[:count]
