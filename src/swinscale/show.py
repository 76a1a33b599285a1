"""Looking at a recipe or a model without running it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from swinscale.config import to_dict
from swinscale.data.detection import MULTIPLE
from swinscale.heads.config import DetectConfig, SegmentConfig
from swinscale.heads.detector import Detector
from swinscale.heads.rehearsal import OBJECTS
from swinscale.heads.upernet import Segmenter
from swinscale.memory import CARDS, MemoryPlan, Predictor, card_bytes, usable
from swinscale.models import LRNetConfig, ModelConfig, SwinConfig, build_model, list_models, model_config, plan
from swinscale.models.config import format_size
from swinscale.models.vit_config import ViTConfig
from swinscale.ops import BACKENDS, choose_backend
from swinscale.parallel import MemoryConfig, split_batch
from swinscale.recipes import RECIPES, Recipe
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.recipes.parts import build_network
from swinscale.recipes.segmentation import SegmentationDataConfig
from swinscale.tasks import Classify, ClassifyConfig, ClassifyVideo, SimMIM, SimMIMConfig, Task, VideoConfig
from swinscale.tasks.detect import Detect
from swinscale.tasks.segment import Segment

COCO_CLASSES, ADE20K_CLASSES = 80, 150


def show(recipe: Recipe) -> None:
    """Prints the resolved recipe, the model's parameters, and what it costs at its input size."""
    console = Console(highlight=False)
    classifies = isinstance(recipe.task, ClassifyConfig)
    model = recipe.model if classifies else dataclasses.replace(recipe.model, num_classes=0)
    values = to_dict(dataclasses.replace(recipe, model=model))
    for part in ("model", "task", "data", "train"):
        _print_settings(console, part, values[part])
    optim, batch = recipe.train.optim, recipe.train.batch_size
    scaling = f"{optim.lr:g} per {optim.lr_reference_batch} images, scaled by the {optim.lr_scaling} rule"
    scaling = "whatever the batch" if optim.lr_scaling == "none" else scaling
    console.print(
        f"effective batch {batch}; learning rate {optim.scaled(optim.lr, batch):.3g} ({scaling}), "
        f"minimum {optim.scaled(optim.min_lr, batch):.3g}",
        soft_wrap=True,
    )
    if not isinstance(recipe.task, ClassifyConfig):
        count = sum(p.numel() for p in task_of(recipe).parameters())
        classes = COCO_CLASSES if isinstance(recipe.task, DetectConfig) else ADE20K_CLASSES
        simmim = isinstance(recipe.task, SimMIMConfig)
        more = "mask token and decoder" if simmim else f"pyramid and heads for {classes} classes"
        _print_costs(console, model, f"with {more} {count:,}")
    else:
        _print_costs(console, model, "" if model.num_classes else "the size of the classifier comes from the data")


def show_model(config: ModelConfig) -> None:
    """Prints a model's configuration, its parameters, and what it costs at its input size."""
    console = Console(highlight=False)
    _print_settings(console, "model", to_dict(config))
    _print_costs(console, config)


def show_memory(recipe: Recipe, gpus: int, card: str | None) -> None:
    """Prints what a training step takes on each of ``gpus`` GPUs, for every technique, and whether it fits ``card``.

    Args:
        card: as ``memory.card_bytes``; None: this machine's GPU, or the smallest common card that suffices.
    """
    console, train = _wide_console(), recipe.train
    capacity = _capacity(card)
    task = task_of(recipe)
    passes = split_batch(train.batch_size, train.micro_batch, gpus, train.batch_size)
    micro = math.ceil(train.batch_size / gpus / passes)
    precision = "bf16" if train.precision == "auto" else train.precision
    predictor = Predictor(task, micro_batch=micro, img_size=trained_size(recipe, micro), precision=precision)
    step: dict[str, Any] = {"processes": gpus, "accumulate": passes, "ema": bool(train.ema_decay)}

    table = Table(
        title=f"GB (1e9 bytes) on each of {gpus} GPUs in a training step: {passes} × {micro} images per GPU, {precision}",
        caption="predicted; each column at its largest, so that the peak is less than their sum",
    )
    for name in (
        "setting", "parameters", "gradients", "optimiser", "EMA", "copies", "activations", "attention", "peak", "where",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name in ("setting", "where") else "right")
    own = predictor.plan(train.memory, **step)
    for name, memory in _techniques(train.memory, len(own.backends), gpus).items():
        plan = predictor.plan(memory, **step)
        numbers = (
            plan.parameters,
            plan.gradients,
            plan.optimizer,
            plan.ema,
            plan.copies,
            sum(plan.activations) + plan.rest,
        )
        cells = [f"{n / 1e9:.2f}" for n in (*numbers, max(plan.attention), plan.peak)]
        table.add_row(name, *cells, plan.where)
    console.print(table)
    if isinstance(recipe.data, DetectionDataConfig):
        size = format_size(predictor.rehearsal.size)
        console.print(f"images of {size}, the largest that this recipe trains on, with {OBJECTS} objects in each")
    _print_stages(console, own)
    name, room = capacity or next(
        ((n, int(b)) for n, b in CARDS.items() if own.peak <= usable(int(b))), list(CARDS.items())[-1]
    )
    console.print(f"{name}: this recipe {predictor.advise(int(room), train.memory, **step)}", soft_wrap=True)


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe, without memory; of 1000 classes (of films 400), 80 categories or 150 classes of pixels, where its data
    would say how many."""
    options, model = recipe.task, recipe.model
    usual = 400 if isinstance(options, VideoConfig) else 1000
    classes = (model.num_classes or usual) if isinstance(options, ClassifyConfig) else 0
    with torch.device("meta"):
        backbone = build_network(dataclasses.replace(model, num_classes=classes))
        if isinstance(options, DetectConfig):
            return Detect(Detector(backbone, COCO_CLASSES, options), [str(n) for n in range(COCO_CLASSES)])
        if isinstance(options, SegmentConfig):
            return Segment(Segmenter(backbone, ADE20K_CLASSES, options), [str(n) for n in range(ADE20K_CLASSES)])
        if isinstance(options, SimMIMConfig):
            return SimMIM(backbone, options)
    if isinstance(options, VideoConfig):
        return ClassifyVideo(backbone, classes, options)
    return Classify(backbone, classes, options)  # its mixup has no meta tensors, nor parameters


def trained_size(recipe: Recipe, images: int) -> tuple[int, int] | None:
    """Height and width of the largest batch that a detector or a segmenter is trained on; None: every image has the model's size."""
    data = recipe.data
    if isinstance(data, SegmentationDataConfig):
        return data.crop
    if not isinstance(data, DetectionDataConfig):
        return None
    # Upright and oblong pictures come together, and are padded to one size.
    short = max(data.short) if images == 1 else data.long
    size = data.jitter_size if data.augment == "large-scale-jitter" else (short, data.long)
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in size)
    return height, width


def _capacity(card: str | None) -> tuple[str, int] | None:
    if card:
        return card, card_bytes(card)
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties("cuda")
    return gpu.name, gpu.total_memory


def _techniques(own: MemoryConfig, stages: int, gpus: int) -> dict[str, MemoryConfig]:
    """The recipe's own settings, each technique alone, and all of them."""
    first = ("sequential",) * min(2, stages) + ("auto",) * max(0, stages - 2)
    alone: dict[str, dict[str, Any]] = {
        "no technique": {},
        "attention=sdpa": {"attention": "sdpa"},
        "attention=sequential in 2 stages": {"attention": first},
        "checkpointing=selective": {"checkpointing": "selective"},
        "checkpointing=block": {"checkpointing": "block"},
        "optimizer_bits=8": {"optimizer_bits": 8},
    }
    if gpus > 1:
        alone |= {f"shard=zero{level}": {"shard": f"zero{level}"} for level in (1, 2, 3)}
    offload = {"shard": "zero3", "offload": True}
    alone |= {
        "shard=zero3 offload=True": offload,
        "block, zero3, 8 bits, offload": {"checkpointing": "block", "optimizer_bits": 8, **offload},
    }
    return {"this recipe": own, **{name: MemoryConfig(**settings) for name, settings in alone.items()}}


def _print_stages(console: Console, plan: MemoryPlan) -> None:
    table = Table(title="this recipe by stage, GB")
    for name in ("stage", "attention by", "activations kept", "attention of one block at once"):
        table.add_column(name, justify="right")
    for stage, (backend, kept, at_once) in enumerate(zip(plan.backends, plan.activations, plan.attention, strict=True)):
        table.add_row(str(stage), backend, f"{kept / 1e9:.3f}", f"{at_once / 1e9:.3f}")
    table.add_row("rest", "", f"{plan.rest / 1e9:.3f}", "")
    console.print(table)


def _print_settings(console: Console, part: str, values: dict[str, Any]) -> None:
    console.print(f"[bold]{part}[/bold]")
    for name, value in _flat(values):
        console.print(f"  {part}.{name} = {json.dumps(value)}", markup=False, soft_wrap=True)


def _print_lrnet_costs(console: Console, config: LRNetConfig, note: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters())
    console.print(f"[bold]{parameters:,} parameters[/bold]{f' ({note})' if note else ''}", soft_wrap=True)
    macs, maps = config.macs(), config.stage_maps()
    total = f"{sum(macs) / 1e9:.3g} GMAC = {2 * sum(macs) / 1e9:.3g} GFLOP"
    table = Table(title=f"one forward pass at {format_size(config.img_size)}: {total}")
    for name in ("stage", "map", "width", "channels", "GMAC"):
        table.add_column(name, justify="right")
    table.add_row("stem", "", str(config.stem_width), str(config.stem_width), f"{macs[0] / 1e9:.3f}")
    for stage, row in enumerate(zip(maps, config.widths, config.stage_dims, macs[1:-1], strict=True)):
        size, width, dim, count = row
        table.add_row(str(stage), format_size(size), str(width), str(dim), f"{count / 1e9:.3f}")
    console.print(table)


def _print_vit_costs(console: Console, config: ViTConfig, note: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_network(config).parameters())
    console.print(f"[bold]{parameters:,} parameters[/bold]{f' ({note})' if note else ''}", soft_wrap=True)
    [map_size] = config.stage_maps()
    console.print(
        f"one forward pass at {format_size(config.img_size)}: {config.depth} blocks over {format_size(map_size)} tokens and one more, "
        f"{config.macs() / 1e9:.3g} GMAC = {2 * config.macs() / 1e9:.3g} GFLOP",
        soft_wrap=True,
    )


def _print_costs(console: Console, config: Any, note: str = "") -> None:
    if isinstance(config, LRNetConfig):
        _print_lrnet_costs(console, config, note)
        return
    if isinstance(config, ViTConfig):
        _print_vit_costs(console, config, note)
        return
    costs = plan(config)
    backbone = plan(dataclasses.replace(config, num_classes=0)).parameters
    parts = [f"backbone {backbone:,}" if config.num_classes else "backbone"]
    parts += [note] if note else []
    console.print(f"[bold]{costs.parameters:,} parameters[/bold] ({'; '.join(parts)})", soft_wrap=True)
    size = format_size(costs.size)
    table = Table(title=f"one forward pass at {size}: {costs.macs / 1e9:.2f} GMAC = {costs.flops / 1e9:.2f} GFLOP")
    for name in ("stage", "map", "window", "shift", "windows", "padding %", "attention GMAC", "GMAC"):
        table.add_column(name, justify="right")
    for row in costs.rows():
        table.add_row(*row)
    console.print(table)
    if costs.position_bias_macs:
        console.print(
            f"continuous position bias: {costs.position_bias_macs / 1e9:.3f} GMAC per call, whatever the batch",
            soft_wrap=True,
        )
    for warning in costs.warnings:
        console.print(f"[yellow]{warning}[/yellow]", soft_wrap=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = max(math.prod(w) for w in config.stage_windows)
    head = max(d // a for d, a in zip(config.stage_dims, config.num_heads, strict=True))
    for mode, dropout in (("training", config.attn_drop_rate), ("inference", 0.0)):
        case = (device, torch.bfloat16 if device == "cuda" else torch.float32, tokens, head, dropout)
        with torch.set_grad_enabled(mode == "training"):
            able = [f"{name} ({reason})" if (reason := b.why_not(*case)) else name for name, b in BACKENDS.items()]
            console.print(
                f"attention in {mode}: {choose_backend('auto', *case)} (of {', '.join(able)})", soft_wrap=True
            )


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _wide_console() -> Console:
    """The terminal, or when the output goes elsewhere, lines long enough for whole names."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def list_models_table(pattern: str) -> None:
    """Prints the models whose names match."""
    table = Table(Column("model", no_wrap=True), "image", "window", "width", "depths", "parameters (1000 classes)")
    for name in list_models(pattern):
        c = model_config(name)
        with torch.device("meta"):
            count = sum(p.numel() for p in build_model(c).parameters())
        swin, depths = isinstance(c, SwinConfig), ",".join(map(str, c.depths))
        window, width = (c.window_size[0][-1], c.embed_dim) if swin else (c.kernel_size, c.widths[0])
        table.add_row(name, format_size(c.img_size), str(window), str(width), depths, f"{count / 1e6:,.1f} M")
    _wide_console().print(table)


def list_recipes_table(pattern: str) -> None:
    """Prints the recipes whose names hold ``pattern``, with the first paragraph of their docstrings."""
    table = Table(Column("recipe", no_wrap=True), "what")
    for name, function in RECIPES.items():
        if pattern.strip("*") in name:
            table.add_row(name, (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "))
    _wide_console().print(table)
