"""Actions of people who were not seen in training: small 3-D models over three folds of people, from random weights and inflated."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import tables
from bench.progress import say
from swinscale.config import override
from swinscale.data import Source
from swinscale.data.film_sources import open_films
from swinscale.errors import UsageError
from swinscale.recipes import Recipe, get_recipe, run
from swinscale.runlog import read_log
from swinscale.video import evaluate_videos

RECIPES = ("desk_video_swin", "desk_video_swinv2")
FOLDS = (((0, 1), 2), ((3, 4), 5), ((6, 7), 8))
"""People of the test films, and the one of the validation films; the other six train."""
CLIPS_OF_A_PERSON = 8
"""Four actions, each once more in the mirror: a mirrored film is a film of the same person."""
KEYS = ("recipe", "init", "fold", "epochs")
"""What a row is the row of."""
Row = dict[str, Any]


def person(name: str) -> int:
    """Who is in the film ``…/<number>.mp4``.

    Raises:
        UsageError: for a name that is no number.
    """
    stem = Path(name).stem
    if not stem.isdecimal():
        raise UsageError(f"{name}: films of actions are called by their number, which says the person (number // 8).")
    return int(stem) // CLIPS_OF_A_PERSON


def folds(films: str) -> list[dict[str, Source]]:
    """Training, validation and test films of each of ``FOLDS``.

    Args:
        films: a folder with a folder per action.

    Raises:
        UsageError: if people are missing, or there are others.
    """
    source = open_films(films)
    people = [person(name) for name in source.names]
    if source.labels is None or set(people) != set(range(9)):
        raise UsageError(f"{films}: needs a folder per action with films of people 0 to 8, not {sorted(set(people))}.")
    found = []
    for test, held in FOLDS:
        part_of = {**dict.fromkeys(range(9), "train"), **dict.fromkeys(test, "test"), held: "val"}
        parts: dict[str, Source] = {}
        for part in ("train", "val", "test"):
            parts[part] = source.take(index for index, who in enumerate(people) if part_of[who] == part)
        found.append(parts)
    return found


def write_folds(films: str, out: Path) -> list[Path]:
    """Writes ``fold0/train.csv`` and so on into ``out``; returns the folders."""
    root, places = Path(films).resolve(), list[Path]()
    for number, parts in enumerate(folds(films)):
        places.append(out / f"fold{number}")
        places[-1].mkdir(parents=True, exist_ok=True)
        for part, source in parts.items():
            assert source.labels is not None and source.classes is not None
            with (places[-1] / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
                rows = ((root / name, source.classes[k]) for name, k in zip(source.names, source.labels, strict=True))
                csv.writer(file, lineterminator="\n").writerows([("path", "label"), *rows])
    return places


def train_all(
    films: str,
    out: Path,
    inits: Mapping[str, str],
    keep: Callable[[Row], None],
    only: Sequence[str] = RECIPES,
    overrides: Sequence[str] = (),
) -> None:
    """Trains each recipe on each fold, from random weights and from its image model; runs that are finished are not done again.

    Args:
        out: where lists of films and runs are kept.
        inits: a checkpoint of an image model for a recipe.
        keep: takes the row of a run as soon as there is one.
        overrides: settings of all runs, such as "train.epochs=2".

    Raises:
        UsageError: before anything runs, for recipes that are none of ``RECIPES`` and settings that do not exist.
    """
    for name in [*only, *inits]:
        if name not in RECIPES:
            raise UsageError(f"'{name}' is none of the recipes {', '.join(RECIPES)}.")
    recipes = {name: override(get_recipe(name), *overrides) for name in only}
    for fold in write_folds(films, out):
        for name, recipe in recipes.items():
            for init in [None, *([inits[name]] if name in inits else [])]:
                place = out / f"{fold.name}_{name}_{'inflated' if init else 'scratch'}"
                say(f"{place.name}")
                if not (place / "result.json").exists():
                    run(on_fold(recipe, fold, init), place, resume=True)
                keep(row(place))


def on_fold(recipe: Recipe, fold: Path, init: str | None) -> Recipe:
    """The recipe with the lists in ``fold`` and its start."""
    lists = {"train": str(fold.resolve() / "train.csv"), "eval": str(fold.resolve() / "val.csv")}
    start = str(Path(init).resolve()) if init and Path(init).exists() else init
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **lists), init=start)


def row(directory: Path, device: str = "auto") -> Row:
    """What the finished run in ``directory`` is, and what its last weights reach on the test films of its fold.

    Raises:
        UsageError: for a directory without a finished run of a video classifier, or one whose list of training films has no
            ``test.csv`` beside it.
    """
    try:
        config, manifest, result = (
            json.loads((directory / name).read_text()) for name in ("config.json", "manifest.json", "result.json")
        )
        data, task, train = config["data"], config["task"], config["train"]
        lists = Path(data["train"]).parent
        task["test_clips"], result["metrics"]["top1"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{directory} holds no finished run of a video classifier: {error}.") from error
    test = lists / "test.csv"
    if not test.is_file():
        raise UsageError(f"{directory}: beside its list of training films there is no {test}, the films to test on.")
    measures = evaluate_videos(directory / "last", data=str(test), device=device)
    waiting = [entry["waiting_for_data"] for entry in read_log(directory) if "waiting_for_data" in entry]
    init = config["init"] and Path(config["init"])
    return {
        "name": directory.name,
        "recipe": config["name"],
        "init": (init.parent.name if init.name in ("best", "last") else init.name) if init else None,
        "fold": lists.name,
        "test_people": sorted({person(name) for name in open_films(test).names}),
        "parameters": manifest["parameters"],
        "train_films": manifest["train_images"],
        "clip": config["model"]["img_size"],
        "epochs": train["epochs"],
        "steps": result["steps"],
        "batch": manifest["effective_batch"],
        "lr": manifest["scaled_lr"],
        "minutes": round(result["seconds"] / 60, 1),
        "waiting_for_data": round(min(100.0, 100 * waiting[-1]), 1) if waiting else None,
        "precision": manifest["precision"],
        "threads": manifest["machine"]["threads"],
        "processor": manifest["machine"]["processor"],
        "views": [task["test_clips"], task["test_crops"]],
        "top1": round(100 * measures["top1"], 2),
        "loss": round(measures["loss"], 4),
        "unreadable": measures["unreadable"],
        "classes": measures["classes"],
        "confusion": measures["confusion"],
        "versions": manifest["versions"],
        "commit": manifest["commit"],
        "date": manifest["date"],
    }


def _groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of one experiment, which differ in their fold alone."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for one in sorted(rows, key=lambda one: one["fold"]):
        found.setdefault((one["recipe"], one["init"], one["epochs"]), []).append(one)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or "", item[0][2])))


def actions_table(rows: Sequence[Row]) -> str:
    """Accuracy of each fold and their mean, a line per model and start."""
    names = sorted({one["fold"] for one in rows})
    header = [
        "recipe", "starts from", "parameters", "epochs", "minutes", "precision", "waiting for data",
        *(f"people {_people(name, rows)}" for name in names), "mean", "begun",
    ]  # fmt: skip
    lines = []
    for (recipe, init, epochs), found in _groups(rows).items():
        first, by_fold = found[0], {one["fold"]: one for one in found}
        waits = [one["waiting_for_data"] for one in found if one["waiting_for_data"] is not None]
        whole = len(by_fold) == len(FOLDS)
        lines.append([
            f"`{recipe}`", f"`{init}`" if init else "random weights", f"{first['parameters'] / 1e6:.2f} M", f"{epochs:g}",
            _range([one["minutes"] for one in found], 1), first["precision"], f"{_range(waits, 0)} %" if waits else "–",
            *(f"{by_fold[name]['top1']:.1f}" if name in by_fold else "–" for name in names),
            f"**{sum(one['top1'] for one in found) / len(found):.1f}**" if whole else "–",
            f"{first['date'][:10]}, {first['commit'] or 'no commit'}",
        ])  # fmt: skip
    first = rows[0]
    chance = 100 / len(first["classes"])
    films = round(sum(map(sum, first["confusion"])))
    threads = sorted({one["threads"] for one in rows})
    return (
        f"{tables.table(header, lines)}\n\nTop-1 in per cent of the {films} test films of each fold, two people whom the model has not "
        f"seen; chance is {chance:g}. {first['train_films']} films of six others train. A film is judged by {first['views'][0]} clips × "
        f"{first['views'][1]} crops of {'×'.join(map(str, first['clip']))}, the last weights of the run, one seed. CPU, "
        f"{' or '.join(map(str, threads))} thread{'s' * (threads != [1])} per run, beside other work."
    )


def confusion_table(rows: Sequence[Row]) -> str:
    """Films of each action by what was answered, all folds together."""
    lines = []
    for (recipe, init, _), found in _groups(rows).items():
        total = [
            [sum(cells) for cells in zip(*of_class, strict=True)]
            for of_class in zip(*(one["confusion"] for one in found), strict=True)
        ]
        for index, (name, counts) in enumerate(zip(found[0]["classes"], total, strict=True)):
            start = [f"`{recipe}`", f"`{init}`" if init else "random weights"] if index == 0 else ["", ""]
            lines.append([*start, name, *(f"{count:.0f}" for count in counts)])
    return tables.table(["recipe", "starts from", "shown", *(f"answered {name}" for name in rows[0]["classes"])], lines)


def _people(fold: str, rows: Sequence[Row]) -> str:
    """Numbers of the people that a fold tests on."""
    return " and ".join(map(str, next(one["test_people"] for one in rows if one["fold"] == fold)))


def _range(values: Sequence[float], digits: int) -> str:
    """The least and the largest, or the only one."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"
