"""The command line: ``swinscale train | show | eval | predict | quantize | export | pack | list | demo``.

A user's mistake ends in one line on standard error and exit code 2; a run that a scheduler stopped, after saving, in 75.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from swinscale import __version__
from swinscale.config import override
from swinscale.errors import Stopped, UsageError
from swinscale.signals import RESTARTABLE

if TYPE_CHECKING:
    from swinscale.recipes import Recipe

DISK = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO") if hasattr(errno, name)]
"""Errors of a disk, which come without a name while a file is being written."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        options = _options(arguments)
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except UsageError as error:
        return _complain(str(error))
    except Stopped as stop:
        if _speaks() or not stop.signal:  # the process that was lost may be the one that speaks
            print(f"\nswinscale: {stop}", file=sys.stderr)
        if not stop.signal:  # a thread that waits for the lost process would hold the end of this one up
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(RESTARTABLE)
        return 130 if stop.signal == signal.SIGINT else RESTARTABLE
    except KeyboardInterrupt:
        print("\nswinscale: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno not in DISK:
            raise
        return _complain(f"{error.strerror}: {error.filename}" if error.filename else f"{error.strerror}.")
    except ImportError as error:
        if (error.name or "swinscale").startswith("swinscale"):
            raise
        return _complain(f"This command needs the package '{error.name}': pip install 'swinscale[all]'.")
    return 0


def _complain(message: str) -> int:
    if _speaks():
        print(f"swinscale: {message}", file=sys.stderr)
    return 2


def _speaks() -> bool:
    """Whether this is the one process of a run that talks to people."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; overrides (``setting=value``) may stand anywhere after the recipe."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-") or not hasattr(options, "overrides"):
            parser.error(f"unknown argument '{word}'")
        options.overrides.append(word)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="swinscale", description="Swin Transformer V1 and V2: pre-train, fine-tune, evaluate, use.")
    parser.add_argument("--version", action="version", version=f"swinscale {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def recipe_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "recipe", help="name of a recipe ('swinscale list recipes'), or the config.json of a run to repeat"
        )
        sub.add_argument(
            "overrides", nargs="*", metavar="setting=value", help="for example train.epochs=5 model.img_size=128"
        )
        sub.add_argument("--data", help="folder, list file or zip of images; bundled:fashion-mnist")
        sub.add_argument("--model", help="another model ('swinscale list models')")
        sub.add_argument("--init", help="checkpoint to start from: a run's best or last directory, or a file")

    sub = command("train", _train, "Train a recipe.")
    recipe_options(sub)
    sub.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE)")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run directory")

    sub = command("show", _show, "Print what a recipe or a model is, its parameters and its cost, and stop.")
    recipe_options(sub)
    sub.add_argument("--gpus", type=_positive, help="predict the memory of a training step on each of so many GPUs")
    sub.add_argument("--card", help="whether it fits: 24GB, 80GB, 74.5GiB, H200 ... (default: this machine's GPU)")

    sub = command("eval", _eval, "Evaluate a checkpoint on images.")
    sub.add_argument("checkpoint", type=Path, help="a run's best or last directory")
    sub.add_argument("--data", help="images with labels (default: those its run was evaluated on)")
    sub.add_argument("--split", default="test", help="which part of the folder, where it has parts (default: test)")
    sub.add_argument("--img-size", type=_positive, help="evaluate at another size; weights are transferred")
    sub.add_argument("--window", type=_positive, help="evaluate with another window; weights are transferred")
    sub.add_argument("--batch-size", type=_positive, default=64)
    sub.add_argument("--device", default="auto")

    sub = command("predict", _predict, "Classify pictures, or reconstruct them with a SimMIM checkpoint.")
    sub.add_argument("images", nargs="+", type=Path, help="picture files or folders")
    sub.add_argument("--checkpoint", type=Path, required=True, help="a run's best or last directory")
    sub.add_argument("--out", type=Path, help="folder for annotated pictures (reconstructions: default predictions)")
    sub.add_argument("--top", type=_positive, default=5, help="how many classes to print (default: 5)")
    sub.add_argument("--device", default="auto")

    sub = command("quantize", _quantize, "Write a classifier as int8 for CPUs (OpenVINO), and print what it costs.")
    sub.add_argument("checkpoint", type=Path, help="a run's best or last directory")
    sub.add_argument("--out", type=Path, required=True, help="directory for the int8 model")
    sub.add_argument("--data", help="images with labels (default: those its run was evaluated on)")
    sub.add_argument("--split", default="test", help="which part of the folder, where it has parts (default: test)")
    sub.add_argument("--calibration", type=_positive, default=300, help="images that set the ranges (default: 300)")

    sub = command("export", _export, "Write the weights of a run's checkpoint as one model directory.")
    sub.add_argument("run_directory", type=Path, help="the directory of a run, finished or not")
    sub.add_argument("--out", type=Path, required=True, help="directory for config.json and model.safetensors")
    sub.add_argument("--step", type=_positive, help="which checkpoint (default: the newest one that is intact)")
    sub.add_argument("--trained", action="store_true", help="the trained weights, where the run also averaged them")

    sub = command("pack", _pack, "Write images as tar shards in the WebDataset layout.")
    sub.add_argument("data", help="folder, list file or zip of images")
    sub.add_argument("--out", type=Path, required=True, help="folder for the shards")
    sub.add_argument("--split", default="train", help="which part of the folder, where it has parts (default: train)")
    sub.add_argument("--samples-per-shard", type=_positive, default=10_000)

    sub = command("list", _list, "List models or recipes.")
    sub.add_argument("what", choices=("models", "recipes"), nargs="?", default="models")
    sub.add_argument("pattern", nargs="?", default="", help="part of a name, or a pattern with *")

    sub = command("demo", _demo, "Pre-train, fine-tune, compare and report, in a few minutes.")
    sub.add_argument(
        "--data", default="bundled:fashion-mnist", help="your own folder of photos, with one folder per class"
    )
    sub.add_argument("--out", type=Path, help="run directory (default: runs/demo, with your folder runs/demo-FOLDER)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _recipe(options: argparse.Namespace) -> Recipe:
    from swinscale.models import model_config
    from swinscale.recipes import get_recipe

    recipe = get_recipe(options.recipe)
    if options.model:
        keep = {name: getattr(recipe.model, name) for name in ("num_classes", "in_chans", "drop_path_rate")}
        recipe = dataclasses.replace(recipe, model=model_config(options.model, **keep))
    if options.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=options.data))
    if options.init:
        recipe = dataclasses.replace(recipe, init=options.init)
    return override(recipe, *options.overrides)


def _train(options: argparse.Namespace) -> None:
    from swinscale.recipes import run
    from swinscale.runlog import measures

    recipe = _recipe(options)
    result = run(recipe, options.out or Path("runs") / recipe.name, resume=options.resume)
    if _speaks():
        print(f"Done: {result.steps} steps, {measures(result.metrics)}. Weights: {result.directory / 'best'}")


def _show(options: argparse.Namespace) -> None:
    from swinscale.models import list_models, model_config
    from swinscale.show import show, show_memory, show_model

    memory = options.gpus or options.card
    if options.recipe in list_models():
        if memory:
            raise UsageError("--gpus and --card need a recipe, whose training settings decide: add --model to one.")
        # model.img_size=512 and img_size=512 are the same here
        show_model(override(model_config(options.recipe), *(a.removeprefix("model.") for a in options.overrides)))
    else:
        recipe = _recipe(options)
        show(recipe)
        if memory:
            show_memory(recipe, options.gpus or 1, options.card)


def _eval(options: argparse.Namespace) -> None:
    from swinscale.inference import evaluate_checkpoint

    evaluate_checkpoint(
        options.checkpoint,
        data=options.data,
        split=options.split,
        img_size=options.img_size,
        window_size=options.window,
        batch_size=options.batch_size,
        device=options.device,
    )


def _predict(options: argparse.Namespace) -> None:
    from swinscale.inference import predict_files

    predict_files(options.checkpoint, options.images, out=options.out, top=options.top, device=options.device)


def _quantize(options: argparse.Namespace) -> None:
    from swinscale.quantize import quantize_checkpoint

    quantize_checkpoint(
        options.checkpoint, options.out, data=options.data, split=options.split, calibration=options.calibration
    )


def _export(options: argparse.Namespace) -> None:
    from swinscale.export import export

    step = export(options.run_directory, options.out, step=options.step, averaged=not options.trained)
    print(f"Step {step}: {options.out}")


def _pack(options: argparse.Namespace) -> None:
    from swinscale.data import open_source
    from swinscale.data.pack import pack

    source = open_source(options.data, options.split)
    written = pack(source, options.out, options.samples_per_shard, options.split)
    print(f"{len(source)} images in {len(written)} shards: {options.out}")


def _list(options: argparse.Namespace) -> None:
    from swinscale.show import list_models_table, list_recipes_table

    (list_models_table if options.what == "models" else list_recipes_table)(options.pattern)


def _demo(options: argparse.Namespace) -> None:
    from swinscale.demo import demo

    report = demo(options.data, options.out)
    print(f"Done. Open {report}")
