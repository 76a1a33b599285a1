"""``python -m bench detect``: detection beside torchvision: speed, a small training run on held-out photos, photos by heart."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import tables
from bench.detection_speed import OURS, Speed, measure
from bench.detectors import TRIAL, resnet_pyramid, torchvision_task
from bench.progress import say
from bench.speed import speed_table as compared_table
from swinscale.config import to_dict
from swinscale.data import EpochLoader
from swinscale.data.coco import open_coco
from swinscale.data.detection_transforms import fitted_size
from swinscale.errors import UsageError
from swinscale.evaluation import to_device
from swinscale.heads.config import DetectConfig
from swinscale.recipes import Recipe, build, get_recipe, run
from swinscale.recipes.base import Built
from swinscale.recipes.detection import DetectionDataConfig
from swinscale.recipes.overfit import OVERFIT_BOX_AP, OVERFIT_MASK_AP, overfit
from swinscale.seeding import derive_seed
from swinscale.timing import Spread
from swinscale.train import TrainResult, train

SECTIONS = ("speed", "heldout", "overfit")
DESK = tuple(f"desk_{head}_{body}" for head in ("mask_rcnn", "cascade", "htc") for body in ("swin", "swinv2"))
PEER = "torchvision_resnet50"
HELDOUT = ("desk_mask_rcnn_swin", "desk_mask_rcnn_swinv2", PEER)
MEASURES = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
Row = dict[str, Any]
Keep = Callable[[str, Row], None]
"""Takes a section's name and a row of it, as soon as there is one."""
KEYS = {"speed": ("device", "mode", "dtype"), "heldout": ("name",), "overfit": ("name",)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says.

    Args:
        only: names of models; empty: all.
        minutes: of training, for all models of "heldout" together; decides the epochs where these are not given.
        images: that "overfit" learns by heart: the first ones of the training part without crowds in which every object spans at
            least ``smallest`` pixels (square root of its box) in the network's input.
        lr: of "overfit"; None: its own.
        runs: where runs are kept and gone on with; None: nowhere.
        tiny: small networks and one epoch, to try the code.
    """

    data: str
    only: tuple[str, ...] = ()
    minutes: float = 30
    epochs: float | None = None
    images: int = 16
    smallest: float = 16
    lr: float | None = None
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("fp32",)
    size: int = 320
    batch: int = 2
    repeats: int = 7
    memory: bool = True
    runs: Path | None = None
    tiny: bool = False


def merged(rows: Sequence[Row], row: Row, keys: Sequence[str]) -> list[Row]:
    """``rows`` with ``row`` in the place of the one with the same ``keys``, or at the end."""

    def key(one: Row) -> list[Any]:
        return [one[name] for name in keys]

    if all(key(other) != key(row) for other in rows):
        return [*rows, row]
    return [row if key(other) == key(row) else other for other in rows]


def run_sections(sections: Sequence[str], settings: Settings, keep: Keep) -> None:
    """Runs them one after the other.

    Raises:
        UsageError: before anything runs, for names that a section does not have.
    """
    known: dict[str, Sequence[str]] = {"speed": (), "heldout": HELDOUT, "overfit": DESK}
    allowed = [name for section in sections for name in known[section]]
    for name in settings.only:
        if name not in allowed:
            raise UsageError(f"--only {name} is none of {', '.join(dict.fromkeys(allowed)) or 'nothing'}.")
    if "heldout" in sections and settings.only and settings.epochs is None:
        raise UsageError("--only trains one model and not the others: say --epochs, so that all train equally long.")
    for section in sections:
        {"speed": _speed, "heldout": _heldout, "overfit": _overfit}[section](settings, keep)


def _speed(settings: Settings, keep: Keep) -> None:
    for dtype in settings.dtypes:
        for mode in ("training", "inference"):
            how = (settings.device, settings.size, settings.batch, settings.tiny)
            keep("speed", measure(Speed(settings.data, mode, dtype, *how), settings.repeats, 0.1, settings.memory))


def _heldout(settings: Settings, keep: Keep) -> None:
    names = [name for name in HELDOUT if not settings.only or name in settings.only]
    epochs = settings.epochs or (1 if settings.tiny else _epochs_within(names, settings))
    for name in names:
        recipe, built = _held(name, settings, epochs)
        record = {**to_dict(built.recipe), "name": name}
        with _place(settings.runs, f"heldout-{name}") as place:
            result = train(
                built.task, built.train_data, built.eval_data, recipe.train, place / "run", record=record, resume=True
            )
            row = _row(name, result)
        counts = {"images": len(built.train_data), "heldout_images": len(built.eval_data)}
        how = {"epochs": epochs, "batch": recipe.train.batch_size, "lr": recipe.train.optim.lr}
        keep("heldout", {**row, **counts, **how, **_conditions(recipe)})


def _held(name: str, settings: Settings, epochs: float) -> tuple[Recipe, Built]:
    """The recipe of ``name`` and all that it needs; torchvision's detector takes data, rates and widths of our V1's."""
    base = get_recipe(HELDOUT[0] if name == PEER else name)
    data = dataclasses.replace(base.data, train=settings.data)
    recipe = dataclasses.replace(base, data=data, train=dataclasses.replace(base.train, epochs=epochs))
    recipe = shrunk(recipe) if settings.tiny else recipe
    built = build(recipe)
    if name == PEER:
        assert isinstance(recipe.task, DetectConfig)
        torch.manual_seed(derive_seed(recipe.train.seed, "torchvision"))
        body = resnet_pyramid(18 if settings.tiny else 50, recipe.task.channels)
        built.task = torchvision_task(body, built.train_data.source.classes, recipe.task)
    return recipe, built


def _epochs_within(names: Sequence[str], settings: Settings) -> int:
    """As many passes as all models together need ``settings.minutes`` for, at least 1, from the first steps of each."""
    seconds = sum(_seconds_per_epoch(*_held(name, settings, 1)) for name in names)
    epochs = max(1, math.floor(60 * settings.minutes / seconds))
    say(f"{seconds / 60:.2f} minutes for an epoch of all {len(names)}: {epochs} epochs")
    return epochs


def _seconds_per_epoch(recipe: Recipe, built: Built, steps: int = 4) -> float:
    """Of a few steps, loading included, the first one left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = built.task.to(device).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-5)
    loader = EpochLoader(built.train_data, recipe.train.batch_size, seed=recipe.train.seed, num_workers=0)
    if not len(loader):
        raise UsageError(f"{len(built.train_data)} training photos are less than a batch of {recipe.train.batch_size}.")
    times, start = [], time.perf_counter()
    for batch in itertools.islice(loader.batches(0), steps):
        loss, _ = task(to_device(batch, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return Spread.of(times[1:] or times).median * len(loader)


def _overfit(settings: Settings, keep: Keep) -> None:
    for name in DESK:
        if settings.only and name not in settings.only:
            continue
        recipe = overfit(get_recipe(name), settings.images)
        rate = settings.lr or recipe.train.optim.lr
        optim = dataclasses.replace(recipe.train.optim, lr=rate, warmup_lr=rate / 100, min_lr=rate / 100)
        epochs = settings.epochs or (1 if settings.tiny else recipe.train.epochs)
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, epochs=epochs, optim=optim))
        recipe = dataclasses.replace(shrunk(recipe), name=recipe.name) if settings.tiny else recipe
        with _place(settings.runs, f"overfit-{name}") as place:
            data, objects = clear_photos(recipe.data, settings, place / "photos")
            row = _row(name, run(dataclasses.replace(recipe, data=data), place / "run", resume=True))
        row["learned"] = (row["box_ap"] or 0) >= OVERFIT_BOX_AP and (row["mask_ap"] or 0) >= OVERFIT_MASK_AP
        counts = {"images": settings.images, "objects": objects, "smallest": settings.smallest}
        keep("overfit", {**row, **counts, "epochs": epochs, "lr": rate, **_conditions(recipe)})


def clear_photos(data: Any, settings: Settings, place: Path) -> tuple[DetectionDataConfig, int]:
    """``data`` with the photos that ``Settings.images`` names as a data set of its own in ``place``, and their objects."""
    source = open_coco(settings.data, "train", masks=True)
    chosen: list[int] = []
    for index, record in enumerate(source.images):
        height, width = fitted_size((record.height, record.width), data.test_short, data.test_long)
        factor = (height * width / record.height / record.width) ** 0.5
        things = source.annotations[index]
        clear = all((a["bbox"][2] * a["bbox"][3]) ** 0.5 * factor >= settings.smallest for a in things)
        if things and clear and not any(a["iscrowd"] for a in things):
            chosen.append(index)
    if len(chosen) < settings.images:
        raise UsageError(f"{settings.data} has {len(chosen)} such photos, not {settings.images}: lower --smallest.")
    part = source.take(chosen[: settings.images])
    (place / "train").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": n} for i, n in zip(part.category_ids, part.classes, strict=True)]
    for index, (name, record) in enumerate(zip(part.names, part.images, strict=True)):
        (place / "train" / Path(name).name).write_bytes(part.read(index))
        size = {"height": record.height, "width": record.width}
        content["images"].append({"id": record.id, "file_name": Path(name).name, **size})
        content["annotations"] += part.annotations[index]
    (place / "train.json").write_text(json.dumps(content))
    return dataclasses.replace(data, train=str(place / "train.json")), len(content["annotations"])


@contextmanager
def _place(runs: Path | None, name: str) -> Iterator[Path]:
    """A folder for one run: kept below ``runs``, or gone afterwards."""
    if runs is not None:
        yield runs / name
        return
    with tempfile.TemporaryDirectory(prefix="bench-detect-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _row(name: str, result: TrainResult) -> Row:
    """What a run reached. Commit and date are those of its beginning, which may be an earlier call."""
    manifest = json.loads((result.directory / "manifest.json").read_text())
    found = {key: result.metrics[key] for key in MEASURES}
    row = {
        "name": name,
        "parameters": manifest["parameters"],
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 2),
        **{key: None if math.isnan(value) else round(value, 5) for key, value in found.items()},
        "commit": manifest["commit"],
        "date": manifest["date"],
    }
    say(f"{name}: " + ", ".join(f"{key} {row[key]}" for key in MEASURES) + f" after {row['minutes']} minutes")
    return row


def _conditions(recipe: Recipe) -> Row:
    """What the models have in common."""
    task, data = recipe.task, recipe.data
    assert isinstance(task, DetectConfig) and isinstance(data, DetectionDataConfig)
    names = ("channels", "fc_channels", "anchor_scale", "regions")
    return {
        **{name: getattr(task, name) for name in names},
        "augment": data.augment,
        "short": list(data.short),
        "test_short": data.test_short,
    }


def shrunk(recipe: Recipe) -> Recipe:
    """A recipe of detection as a network that trains in seconds, on small pictures."""
    model = dataclasses.replace(recipe.model, **TRIAL, window_size=4, img_size=64)
    assert isinstance(recipe.task, DetectConfig) and isinstance(recipe.data, DetectionDataConfig)
    few = {"proposals": (40, 40), "proposals_per_level": (60, 60), "regions": 16}
    task = dataclasses.replace(recipe.task, channels=16, fc_channels=32, **few)
    sizes = {"short": (64,), "long": 96, "test_short": 64, "test_long": 96}
    data = dataclasses.replace(recipe.data, **sizes)
    train = dataclasses.replace(recipe.train, batch_size=2, num_workers=0)
    return dataclasses.replace(recipe, model=model, task=task, data=data, train=train)


def parts(content: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """What a page can show: ``speed`` and ``speed-gpu``, ``heldout``, ``overfit``, and where that was measured."""
    made: dict[str, Callable[[], str]] = {}
    for name, device in (("speed", "cpu"), ("speed-gpu", "cuda")):
        cases = [case for case in content.get("speed", []) if case["device"] == device]
        if cases:
            made[name] = lambda cases=cases: speed_table(cases)  # type: ignore[misc]
    for name, table in (("heldout", heldout_table), ("overfit", overfit_table)):
        if content.get(name):
            made[name] = lambda table=table, rows=content[name]: table(rows)  # type: ignore[misc]
    rows = [row for section in SECTIONS for row in content.get(section, [])]
    made["machine"] = lambda: "\n\n".join(dict.fromkeys(tables.machine(row["environment"]) for row in rows))
    return made


def speed_table(cases: Sequence[Row]) -> str:
    """A row per contender, and below what is the same for all of them."""
    first = cases[0]
    found = [n for case in cases for row in case["contenders"] for n in row.get("detections", [])]
    text = (
        f"Mask R-CNN from random weights on {first['batch']} photos with {first['objects']} objects, short side {first['size']}, "
        f"{first['inputs'][0]}×{first['inputs'][1]} pixels with padding. For all: {first['classes']} classes, pyramid and heads of "
        f"{first['channels']} channels, three anchors per cell of five levels, {first['proposals'][0]} proposals, "
        f"{first['regions']} sampled regions. Training is forward, backward and an AdamW step"
    )
    if found:
        some = str(min(found)) if min(found) == max(found) else f"{min(found)} to {max(found)}"
        text += f"; inference ends with masks of the whole photo, of {some} detections in each (scores are set so)"
    table = compared_table(cases, OURS, lambda case: f"{case['mode']} {case['dtype']}")
    return f"{table}\n\n{text}. nms and roi_align are {first['operators']} for everybody."


def heldout_table(rows: Sequence[Row]) -> str:
    """A row per model, and below what is the same for all of them."""
    heads = ("model", "parameters", "epochs", "minutes", "box AP", "box AP50", "mask AP", "mask AP50", "run")
    lines = [
        (
            f"`{row['name']}`", f"{row['parameters'] / 1e6:.1f} M", f"{row['epochs']:g}", f"{row['minutes']:.1f}",
            *(_percent(row[key]) for key in MEASURES), _run_of(row),
        )
        for row in rows
    ]  # fmt: skip
    first = rows[0]
    text = (
        f"In percent, on {first['heldout_images']} held-out photos after training from random weights on {first['images']} in batches "
        f"of {first['batch']}, AdamW at {first['lr']:g}. For all: short side {min(first['short'])} to {max(first['short'])}, evaluated "
        f"at {first['test_short']}; pyramid and masks of {first['channels']} channels, box heads of {first['fc_channels']}, anchors "
        f"of {first['anchor_scale']:g} cells, {first['regions']} sampled regions. `{PEER}` is torchvision's Mask R-CNN in our loop; "
        f"nothing else of it is changed."
    )
    return f"{tables.table(heads, lines)}\n\n{text}"


def overfit_table(rows: Sequence[Row]) -> str:
    """A row per recipe: what it learned by heart."""
    heads = (
        "recipe",
        "parameters",
        "photos",
        "objects",
        "rate",
        "steps",
        "minutes",
        "box AP",
        "mask AP",
        "by heart",
        "run",
    )
    lines = [
        (
            f"`{row['name']}`", f"{row['parameters'] / 1e6:.1f} M", str(row["images"]), str(row["objects"]),
            f"{row['lr']:g}", str(row["steps"]), f"{row['minutes']:.1f}", _percent(row["box_ap"], 1), _percent(row["mask_ap"], 1),
            "yes" if row["learned"] else "no", _run_of(row),
        )
        for row in rows
    ]  # fmt: skip
    smallest = min(row["smallest"] for row in rows)
    wanted = (
        f"In percent, on the photos themselves: the first ones without crowds whose objects all span {smallest:g} pixels or more in "
        f"the network's input. By heart: box AP {100 * OVERFIT_BOX_AP:g}, mask AP {100 * OVERFIT_MASK_AP:g}."
    )
    return f"{tables.table(heads, lines)}\n\n{wanted}"


def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _run_of(row: Row) -> str:
    return f"{row['date'][:10]}, {row['commit']}"
