"""What a transfer keeps, measured without training: the model before, at its old size, against the model after.

Both look at the same pictures. Where the features still agree, fine-tuning starts from what was learned; where they do
not, it starts from something else, and another method or a smaller step is better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swinscale.data import EpochLoader, ImageDataset, Source, eval_transform, normalisation, open_source
from swinscale.errors import UsageError
from swinscale.manifest import environment
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.models.config import format_size
from swinscale.parallel import world
from swinscale.weights import from_pretrained, read_config, read_metadata, save_pretrained, transfer
from swinscale.weights.hub import resolve
from swinscale.weights.resize import BiasMethod, Inflate, bias_methods
from swinscale.weights.transfer import Classes, class_rows, recorded_classes

POOR_COSINE, POOR_TOP1 = 0.9, 0.8
"""Below these a warning is printed. Rules of thumb, not measured limits."""

HOW_TO_READ = (
    "1 means that the features are what they were (KL: 0). Compare methods with these numbers before training; they are "
    "not the accuracy after it."
)


@dataclass(frozen=True)
class Agreement:
    """Means over the pictures that both models saw.

    Attributes:
        images: how many pictures.
        feature_cosine: cosine between the pooled features.
        map_cosine: cosine between the features at one place of the last map, the larger map averaged to the smaller.
        kl: Kullback-Leibler divergence of the class probabilities after from those before, in nats; None without a
            classifier that both have.
        same_top1: share of pictures whose most likely class is the same.
        top1_before, top1_after: accuracies, where the pictures have labels of the classifier's classes.
        worst: the picture with the smallest ``feature_cosine``.
        worst_cosine: its cosine.
    """

    images: int
    feature_cosine: float
    map_cosine: float
    kl: float | None
    same_top1: float | None
    top1_before: float | None
    top1_after: float | None
    worst: str
    worst_cosine: float

    @property
    def poor(self) -> bool:
        """Whether the model after gives clearly something else."""
        return self.feature_cosine < POOR_COSINE or (self.same_top1 is not None and self.same_top1 < POOR_TOP1)


@dataclass(frozen=True)
class _View:
    """Pictures, and how they become inputs."""

    pictures: Source
    channels: int  # to decode them with
    preprocessing: dict[str, Any]  # mean, std, crop_ratio, classes
    grey: bool  # models with different channels both see the mean of the channels


@dataclass(frozen=True)
class _Seen:
    """What a model made of the pictures that can be read."""

    pooled: Tensor  # (N, D)
    maps: Tensor  # (N, D, height, width)
    logits: Tensor  # (N, classes); without a classifier the pooled features
    labels: Tensor  # (N,)
    index: Tensor  # (N,) of the picture


def measure_agreement(
    before: SwinTransformer,
    after: SwinTransformer,
    pictures: Source,
    *,
    preprocessing: dict[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    limit: int = 64,
) -> Agreement:
    """Runs both models on (at most ``limit``, evenly spread) pictures, each model at its own ``img_size``.

    A video model sees a clip of equal frames. Models with different numbers of channels both see the mean of the
    channels, repeated.

    Args:
        preprocessing: what is recorded with the weights: mean, std, crop_ratio, classes.
        rows: rows of the classifier of ``before`` that ``after`` has kept; None: all.

    Raises:
        UsageError: if no picture can be read.
    """
    view = _view(before.config, after.config, pictures, preprocessing or {}, limit)
    return _compare(_look(before, view), _look(after, view), view, before.num_classes, after.num_classes, rows)


def _view(old: SwinConfig, new: SwinConfig, pictures: Source, preprocessing: dict[str, Any], limit: int) -> _View:
    chosen = pictures.take(range(0, len(pictures), math.ceil(len(pictures) / limit)))
    return _View(chosen, old.in_chans, preprocessing, old.in_chans != new.in_chans)


@torch.no_grad()
def _look(model: SwinTransformer, view: _View, batch_size: int = 16) -> _Seen:
    config, like, p = model.config, model.norm.weight, view.preprocessing
    mean, std = normalisation(view.channels, p.get("mean"), p.get("std"))
    height, width = config.img_size[-2:]
    transform = eval_transform((height, width), mean, std, crop_ratio=p.get("crop_ratio", 224 / 256))
    dataset = ImageDataset(view.pictures, transform, view.channels, replace_corrupt=False)
    training, parts = model.training, []
    model.eval()
    for batch in EpochLoader(dataset, batch_size, shuffle=False, drop_last=False).batches(0):
        if not len(batch["image"]):
            continue
        x = batch["image"].to(like)
        if view.grey:
            x = x.mean(1, keepdim=True).expand(-1, config.in_chans, -1, -1)
        if config.rank == 3:
            x = x[:, :, None].expand(-1, -1, config.img_size[0], -1, -1)
        tokens = model.forward_features(x)
        pooled = model.forward_head(tokens, pre_logits=True)
        flat = tokens.mean(1) if config.rank == 3 else tokens
        seen = [pooled, flat.movedim(-1, 1), model.head(pooled)]
        parts.append([*(t.double().cpu() for t in seen), batch["label"], batch["index"]])
    model.train(training)
    return _Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compare(
    old: _Seen, new: _Seen, view: _View, old_classes: int, new_classes: int, rows: Sequence[int] | None
) -> Agreement:
    cosine = _cosine(old.pooled, new.pooled)
    worst = int(cosine.argmin())
    size = min(old.maps.shape[2], new.maps.shape[2]), min(old.maps.shape[3], new.maps.shape[3])
    maps = _cosine(*(_shrink(seen.maps, size).movedim(1, -1) for seen in (old, new)))
    kept = range(old_classes) if rows is None else list(rows)
    kl = same = hits = None
    if new_classes and len(kept) == new_classes:
        scores = old.logits[:, list(kept)], new.logits
        log_p, log_q = (s.log_softmax(-1) for s in scores)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        first = [s.argmax(-1) for s in scores]
        same = _share(first[0] == first[1])
        names, folders = view.preprocessing.get("classes"), view.pictures.classes
        fits = folders == [names[row] for row in kept] if names else len(folders or ()) == new_classes
        if view.pictures.labels is not None and fits:
            hits = [_share(guess == old.labels) for guess in first]
    return Agreement(
        images=len(cosine),
        feature_cosine=cosine.mean().item(),
        map_cosine=maps.mean().item(),
        kl=kl,
        same_top1=same,
        top1_before=hits[0] if hits else None,
        top1_after=hits[1] if hits else None,
        worst=view.pictures.names[int(old.index[worst])],
        worst_cosine=cosine[worst].item(),
    )


def _shrink(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, D, height, width) → (N, D, *size); the same numbers if it has that size."""
    return maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Over the last axis; exactly 1 for equal vectors, as a product of two separate norms would not be."""
    return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt().clamp_min(1e-300)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def transfer_checkpoint(
    source: str,
    out: Path,
    *,
    img_size: Any = None,
    window_size: Any = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    classes: Classes | None = None,
    cpb: BiasMethod | Literal["all"] | None = None,
    inflate: Inflate = "repeat",
    patch_time: int | None = None,
    data: str | None = None,
    split: str = "test",
    limit: int = 64,
    device: str = "auto",
) -> dict[str, Any] | None:
    """Writes the transferred model as a directory, prints what became of the weights and, with ``data``, the agreement.

    What is recorded with the weights stays with them, as far as it is still true. Of a SimMIM checkpoint the encoder is
    written.

    Args:
        source: what ``from_pretrained`` reads.
        out: the new directory.
        img_size, window_size, in_chans, num_classes, classes, inflate, patch_time: see ``weights.transfer``.
        cpb: as there; "all" writes the default and measures the agreement of every method that is possible.
        data: pictures to measure the agreement on; labels are used where they are the classifier's.
        limit: how many pictures at most.

    Returns: what ``agreement.json`` in ``out`` holds; None without ``data``.
    """
    place = resolve(source)
    if out.is_file() or out.resolve() in (place.resolve(), place.resolve().parent if place.is_file() else None):
        raise UsageError(f"{out} is a file, or holds the weights that are read. Name another directory.")
    if cpb == "all" and data is None:
        raise UsageError("--cpb all compares the methods on pictures: add --data FOLDER.")
    pictures = None if data is None else open_source(data, split)
    read_config(place)  # refuses what is no Swin Transformer
    before = from_pretrained(place)
    record = read_metadata(place)
    names = recorded_classes(record, before.num_classes)
    preprocessing = {**record.get("preprocessing", {}), "classes": names}
    rows = None if classes is None else class_rows(classes, before.num_classes, names)
    methods = bias_methods(before.config) if cpb == "all" else (cpb or bias_methods(before.config)[0],)

    def move(method: BiasMethod) -> tuple[SwinTransformer, Any]:
        return transfer(
            before,
            img_size=img_size,
            window_size=window_size,
            in_chans=in_chans,
            num_classes=num_classes,
            classes=rows,
            cpb=method,
            inflate=inflate,
            patch_time=patch_time,
        )

    after, report = move(methods[0])
    report.source = source
    save_pretrained(after, out, metadata=_metadata(record, names, before.config, after.config, rows))
    console = Console(highlight=False)
    lines = [str(report), f"  before      {_describe(before.config)}", f"  after       {_describe(after.config)}"]
    if record.get("task", {}).get("name") == "simmim":
        lines.append("  left out    mask token and decoder of masked image modelling: this is the encoder")
    console.print("\n".join([*lines, f"Written: {out}"]), soft_wrap=True, markup=False)
    if pictures is None:
        return None
    found: dict[str, Agreement | str] = {}
    with world(device) as here:
        view = _view(before.config, after.config, pictures, preprocessing, limit)
        seen = _look(before.to(here.device), view)
        for method in methods:
            try:
                model = after if method == methods[0] else move(method)[0]
            except UsageError as error:
                found[method] = str(error)
                continue
            now = _look(model.to(here.device), view)
            found[method] = _compare(seen, now, view, before.num_classes, after.num_classes, rows)
    result = {
        "environment": environment(),
        "source": source,
        "data": data,
        "before": _describe(before.config),
        "after": _describe(after.config),
        "methods": {name: a if isinstance(a, str) else asdict(a) for name, a in found.items()},
    }
    (out / "agreement.json").write_text(json.dumps(result, indent=1) + "\n")
    _print(console, found, f"{source} on {data}")
    console.print(f"Written: {out / 'agreement.json'}", soft_wrap=True, markup=False)
    return result


def _metadata(
    record: dict[str, Any], names: list[str] | None, old: SwinConfig, new: SwinConfig, rows: Sequence[int] | None
) -> dict[str, Any]:
    """What was recorded, as far as it holds for the new model."""
    p = {**record.get("preprocessing", {}), "img_size": list(new.img_size)}
    if rows is not None and names:
        p["classes"] = [names[row] for row in rows]
    elif new.num_classes != old.num_classes or rows is not None:
        p.pop("classes", None)
    if new.in_chans != old.in_chans:  # statistics of other channels
        p = {name: value for name, value in p.items() if name not in ("mean", "std") or len(value) == 1}
    # What is written is a backbone, with a classifier or without: no decoder, detector or segmenter.
    kept = {n: value for n, value in record.items() if n != "task" or value.get("name") in ("classify", "video")}
    if "task" in kept and new.rank > old.rank:
        kept["task"] = {**kept["task"], "name": "video"}
    return {**kept, "preprocessing": p}


def _describe(config: SwinConfig) -> str:
    windows = ", ".join(format_size(window) for window in dict.fromkeys(config.stage_windows))
    text = f"{format_size(config.img_size)}, windows {windows}, position bias '{config.position_bias}'"
    if config.position_bias in ("log", "linear"):
        text += f" on the scale of {', '.join(format_size(w) for w in dict.fromkeys(config.trained_windows))}"
    return text + f", {config.in_chans} channels, {config.num_classes} classes"


def _print(console: Console, found: dict[str, Agreement | str], title: str) -> None:
    measured = {method: a for method, a in found.items() if not isinstance(a, str)}
    table = Table("", title=title)
    for method in measured:
        table.add_column(method, justify="right")
    for label, name, form in (
        ("features, cosine", "feature_cosine", "{:.4f}"),
        ("last map, cosine", "map_cosine", "{:.4f}"),
        ("worst picture, cosine", "worst_cosine", "{:.4f}"),
        ("classes, KL", "kl", "{:.4f}"),
        ("same top-1", "same_top1", "{:.1%}"),
        ("top-1 before", "top1_before", "{:.1%}"),
        ("top-1 after", "top1_after", "{:.1%}"),
    ):
        values = [getattr(a, name) for a in measured.values()]
        if None not in values:
            table.add_row(label, *(form.format(value) for value in values))
    console.print(table)
    worst = list(dict.fromkeys(a.worst for a in measured.values()))
    count = next(iter(measured.values())).images
    lines = [f"{count} pictures; the worst: {', '.join(worst)}. {HOW_TO_READ}"]
    lines += [f"{method} is not possible here: {a}" for method, a in found.items() if isinstance(a, str)]
    if poor := [method for method, a in measured.items() if a.poor]:
        lines.append(
            f"Poor agreement with {', '.join(poor)}: features below {POOR_COSINE} or same top-1 below {POOR_TOP1:.0%}. "
            f"Compare methods (--cpb all), or choose a size and window nearer to the old ones; expect to train longer."
        )
    console.print("\n".join(lines), soft_wrap=True, markup=False)
