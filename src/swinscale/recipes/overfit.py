"""A recipe as a test whether anything can be learned: a few images, by heart (``swinscale train RECIPE --overfit N``)."""

from __future__ import annotations

import dataclasses
from typing import Any

from swinscale.errors import UsageError
from swinscale.heads.config import DetectConfig, SegmentConfig
from swinscale.optim import OptimConfig
from swinscale.recipes.base import DataConfig, Recipe
from swinscale.recipes.video import VideoDataConfig
from swinscale.tasks import ClassifyConfig, SimMIMConfig, VideoConfig
from swinscale.train import TrainResult

OVERFIT_EPOCHS, OVERFIT_RATE = 400, 2e-3
OVERFIT_LOSS = 0.05
"""Of SimMIM, in normalised pixels: a twentieth of their standard deviation, invisible in a picture."""
DETECT_EPOCHS, DETECT_BATCH, DETECT_RATE = 280, 4, 1e-3
OVERFIT_BOX_AP, OVERFIT_MASK_AP = 0.9, 0.85
SEGMENT_EPOCHS, SEGMENT_BATCH, SEGMENT_RATE = 120, 2, 1e-3
OVERFIT_MIOU = 0.95


def overfit(recipe: Recipe, images: int) -> Recipe:
    """``recipe`` with a few images, again and again, for ``OVERFIT_EPOCHS`` passes (a detector ``DETECT_EPOCHS``, a segmenter
    ``SEGMENT_EPOCHS``).

    Every step sees all ``images`` (a detector ``DETECT_BATCH`` of them, a segmenter ``SEGMENT_BATCH``), without augmentation, each
    with one and the same mask; no stochastic depth, dropout, mixup, label smoothing, weight decay or average of the weights; a learning rate of its own. It is
    evaluated on the same images with the same masks. ``overfit_verdict`` says what came of it.
    """
    drops = [name for name in ("drop_path_rate", "drop_rate", "attn_drop_rate") if hasattr(recipe.model, name)]
    model = dataclasses.replace(recipe.model, **dict.fromkeys(drops, 0.0))
    task, data = recipe.task, recipe.data
    if isinstance(task, ClassifyConfig):
        task = dataclasses.replace(task, label_smoothing=0.0, mixup=0.0, cutmix=0.0)
    if isinstance(task, VideoConfig):
        task = dataclasses.replace(task, head_dropout=0.0)
    if isinstance(task, SegmentConfig):
        task = dataclasses.replace(task, dropout=0.0)
    if isinstance(data, (DataConfig, VideoDataConfig)):
        data = dataclasses.replace(data, labels_per_class=0)
    data = dataclasses.replace(data, limit=images)
    epochs, batch, rate = OVERFIT_EPOCHS, images, OVERFIT_RATE
    if isinstance(task, DetectConfig):
        epochs, batch, rate = DETECT_EPOCHS, min(DETECT_BATCH, images), DETECT_RATE
    elif isinstance(task, SegmentConfig):
        epochs, batch, rate = SEGMENT_EPOCHS, min(SEGMENT_BATCH, images), SEGMENT_RATE
    optim = OptimConfig(
        lr=rate, lr_scaling="none", warmup_lr=rate / 100, min_lr=rate / 100, warmup_epochs=20, weight_decay=0.0
    )
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch, "optim": optim, "ema_decay": 0.0}
    settings |= {"num_workers": 0, "eval_every": 0, "checkpoint_every": 0}
    train = dataclasses.replace(recipe.train, **settings)
    return Recipe(f"{recipe.name}_overfit", model, task, data, train, recipe.init)


def overfit_verdict(recipe: Recipe, result: TrainResult) -> str:
    """A line that says that a run of ``overfit`` has learned its images by heart.

    Raises:
        UsageError: if it has not, with what to look for.
    """
    task, measures = recipe.task, result.metrics
    where, values = "the images", ["top1"]
    if isinstance(task, SimMIMConfig):
        values, wanted, learned = ["loss"], f"below {OVERFIT_LOSS}", measures["loss"] < OVERFIT_LOSS
        where = f"the images in {result.directory / 'reconstructions'}"
    elif isinstance(task, DetectConfig):
        values, wanted = ["box_ap", "mask_ap"] if task.masks else ["box_ap"], f"box AP {OVERFIT_BOX_AP}"
        wanted += f", mask AP {OVERFIT_MASK_AP}" if task.masks else ""
        learned = measures["box_ap"] >= OVERFIT_BOX_AP and measures.get("mask_ap", 1.0) >= OVERFIT_MASK_AP
    elif isinstance(task, SegmentConfig):
        values, wanted, learned = ["miou"], f"{OVERFIT_MIOU}", measures["miou"] >= OVERFIT_MIOU
    else:
        wanted, learned = "1", measures["top1"] == 1
    reached = ", ".join(f"{name} {measures[name]:.4f}" for name in values)
    reached += f" on {recipe.data.limit} images after {result.steps} steps"
    if learned:
        return f"Learned by heart: {reached} (wanted: {wanted})."
    raise UsageError(
        f"Not learned by heart: {reached}, wanted {wanted}. A model that cannot repeat a few images will not learn from many: "
        f"look whether {where} differ from each other, whether the loss in log.jsonl falls at all, and try another "
        f"train.optim.lr or more train.epochs."
    )
