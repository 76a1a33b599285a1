"""The command line: ``swinscale train | show | eval | predict | explain | quantize | export | transfer | convert | info | pack | to-coco | push | report | claims | list | demo``.

A user's mistake ends in one line on standard error and exit code 2; a run that a scheduler stopped, after saving, in 75.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from swinscale import __version__
from swinscale.config import override
from swinscale.errors import Stopped, UsageError, speaks
from swinscale.signals import RESTARTABLE

if TYPE_CHECKING:
    from swinscale.recipes import Recipe

SETTING = re.compile(r"--(model|task|data|train)(\.\w+)+")
"""A setting of a recipe written as an option."""
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
        if speaks() or not stop.signal:  # the process that was lost may be the one that speaks
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
    if speaks():
        print(f"swinscale: {message}", file=sys.stderr)
    return 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; overrides (``setting=value``) may stand anywhere after the recipe."""
    parser = _parser()
    options, rest = parser.parse_known_args(_settings_as_overrides(sys.argv[1:] if arguments is None else arguments))
    for word in rest:
        if word.startswith("-") or not hasattr(options, "overrides"):
            parser.error(f"unknown argument '{word}'")
        options.overrides.append(word)
    return options


def _settings_as_overrides(arguments: Sequence[str]) -> list[str]:
    """``--data.train PATH`` and ``--data.train=PATH`` are ways to write ``data.train=PATH``."""
    words, found = iter(arguments), []
    for word in words:
        setting, given, value = word.partition("=")
        if SETTING.fullmatch(setting):
            value = value if given else next(words, "")
            word = f"{setting.removeprefix('--')}={value}"
        found.append(word)
    return found


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

    def look_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--clips", type=_positive, help="of a video model: clips of each film (default: as trained)")
        sub.add_argument("--crops", type=_positive, help="of a video model: crops of each clip (default: as trained)")
        sub.add_argument(
            "--scales",
            type=_scales,
            metavar="SIZES",
            help="look at several sizes: of a detector short sides, 600,800,1000; of a segmenter factors, 0.75,1,1.25",
        )
        sub.add_argument("--flip", action="store_true", help="of these: look at the mirrored picture, too")
        sub.add_argument(
            "--slide",
            type=_slide,
            metavar="SIDE[,STRIDE]",
            help="of a segmenter: a window that slides over the picture",
        )

    sub = command("train", _train, "Train a recipe.")
    recipe_options(sub)
    sub.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE)")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run directory")
    sub.add_argument(
        "--overfit", type=_positive, metavar="N", help="test instead whether N images can be learned by heart"
    )

    sub = command("show", _show, "Print what a recipe or a model is, its parameters and its cost, and stop.")
    recipe_options(sub)
    sub.add_argument("--gpus", type=_positive, help="predict the memory of a training step on each of so many GPUs")
    sub.add_argument("--card", help="whether it fits: 24GB, 80GB, 74.5GiB, H200 ... (default: this machine's GPU)")

    sub = command(
        "eval", _eval, "Evaluate a checkpoint on images or films, or weights by a published protocol (--suite)."
    )
    sub.add_argument("checkpoint", nargs="?", type=Path, help="a run's best or last directory")
    sub.add_argument("--weights", type=Path, help="instead: a weight file or directory in any layout, or a Hub name")
    sub.add_argument("--data", help="images with labels (default: those its run was evaluated on)")
    sub.add_argument("--split", help="which part of the folder, where it has parts (default: test; a suite's own)")
    sub.add_argument(
        "--img-size",
        type=_positive,
        help="evaluate at another size (a segmenter's short side); weights are transferred",
    )
    sub.add_argument("--window", type=_positive, help="evaluate with another window; weights are transferred")
    look_options(sub)
    sub.add_argument("--batch-size", type=_positive, help="images at a time (default: 64; of dense tasks and films 1)")
    sub.add_argument("--device", default="auto")
    suite = sub.add_argument_group("published tables")
    suite.add_argument(
        "--suite",
        help="imagenet, imagenet-v2, coco, ade20k or kinetics400: its protocol on --data, beside the published number",
    )
    suite.add_argument(
        "--published", metavar="NAME", help="which published weights these are, if their name is another"
    )
    suite.add_argument("--resize", type=_positive, help="short side before the centre crop (default: as published)")
    suite.add_argument(
        "--workers",
        type=_positive,
        help="processes that read images, or of films without a suite (default: up to 8 beside a GPU, else none)",
    )
    suite.add_argument(
        "--out", type=Path, help="file for the result as JSON; of dense tasks and films without a suite, too"
    )

    sub = command(
        "predict",
        _predict,
        "Classify pictures or films, find what is in them, segment or reconstruct them, as the model does.",
    )
    sub.add_argument(
        "images",
        nargs="+",
        type=Path,
        help="picture files or folders; for a video model films; for a segmenter films, too",
    )
    sub.add_argument("--checkpoint", "--weights", type=Path, required=True, help="a run, or its best or last directory")
    sub.add_argument("--out", type=Path, help="folder for what is drawn (default: predictions; of classifiers none)")
    sub.add_argument("--top", type=_positive, help="of a classifier: how many classes to print (default: 5)")
    sub.add_argument(
        "--bands", type=_bands, help="channels shown as red, green and blue, from 0: 3,2,1 (default: the first three)"
    )
    sub.add_argument("--score", type=_share, help="of a detector: the least score shown (default: 0.5)")
    look_options(sub)
    sub.add_argument(
        "--img-size",
        type=_positive,
        help="of a segmenter: the short side at which it looks at pictures; of a video model height and width",
    )
    sub.add_argument(
        "--window", type=_positive, help="of dense tasks and video models: another window; Swin V2 keeps its bias"
    )
    sub.add_argument("--truth", type=Path, help="of a segmenter: a label map, or a folder of them, to show beside it")
    sub.add_argument(
        "--maps", action="store_true", help="of a segmenter: also write the classes as PNG files of labels"
    )
    sub.add_argument("--device", default="auto")

    sub = command(
        "explain", _explain, "Draw why a model says what it says about a picture or a film, and where it looks."
    )
    sub.add_argument("image", type=Path, help="a picture file; for a video model a film")
    sub.add_argument("--checkpoint", type=Path, required=True, help="a run's best or last directory")
    sub.add_argument("--target", metavar="CLASS", help="class to explain, by name or number (default: predicted)")
    sub.add_argument(
        "--method",
        default="integrated-gradients",
        help="of the class map: integrated-gradients (default), grad-cam, exact",
    )
    sub.add_argument(
        "--query",
        type=_pixel,
        metavar="Y,X",
        help="pixel of the resized picture whose attention is shown, of a film T,Y,X (default: the peak of the class map)",
    )
    sub.add_argument("--stage", type=_count, help="which attention, from 0 (default: the last stage but one)")
    sub.add_argument("--block", type=_count, help="of the stage, from 0 (default: the last)")
    sub.add_argument("--head", type=_count, help="of the block, from 0 (default: the mean of all)")
    sub.add_argument("--out", type=Path, default=Path(), help="folder for the picture (default: here)")
    sub.add_argument("--device", default="auto")

    sub = command("quantize", _quantize, "Write a classifier as int8 for CPUs (OpenVINO), and print what it costs.")
    sub.add_argument("checkpoint", type=Path, help="a run's best or last directory")
    sub.add_argument("--out", type=Path, required=True, help="directory for the int8 model")
    sub.add_argument("--data", help="images with labels (default: those its run was evaluated on)")
    sub.add_argument("--split", default="test", help="which part of the folder, where it has parts (default: test)")
    sub.add_argument("--calibration", type=_positive, default=300, help="images that set the ranges (default: 300)")

    sub = command("export", _export, "Write a model for other runtimes, or a run's checkpoint as one directory.")
    sub.add_argument(
        "source", help="a run's directory; with --format a model: directory, weight file or name on the Hub"
    )
    sub.add_argument("--out", type=Path, required=True, help="directory for what is written")
    sub.add_argument(
        "--format",
        metavar="FORMAT",
        help="torch, onnx, openvino, openvino-int8 or aotinductor (default: config.json and model.safetensors)",
    )
    sub.add_argument(
        "--dynamic", choices=("none", "batch", "hw"), help="what stays open: batch, or batch and size (hw)"
    )
    sub.add_argument("--size", type=_size, help="size of the inputs that are not open: 256 or 192x256")
    sub.add_argument("--batch", type=_positive, help="batch of the inputs where it is not open")
    sub.add_argument("--output", choices=("logits", "features", "pyramid"), help="what the file computes")
    sub.add_argument("--check", action="store_true", help="run the file beside the model at other batches and sizes")
    sub.add_argument("--data", help="openvino-int8: images with labels (default: those its run was evaluated on)")
    sub.add_argument(
        "--step", type=_positive, help="which checkpoint of a run (default: the newest one that is intact)"
    )
    sub.add_argument("--trained", action="store_true", help="the trained weights, where a run also averaged them")

    sub = command("transfer", _transfer, "Write a model for another size, window, channels or classes, or for video.")
    sub.add_argument("source", help="directory or file of weights, or a repository of the Hugging Face Hub")
    sub.add_argument("out", type=Path, help="directory for config.json and model.safetensors")
    sub.add_argument("--img-size", type=_size, help="256, 192x256, or frames first: 16x224x224 makes a video model")
    sub.add_argument("--window", type=_size, help="16, 8x16, or time first: 8x7x7 (default for time: 8)")
    sub.add_argument("--in-chans", type=_positive, help="channels of the input")
    sub.add_argument("--num-classes", type=_positive, help="a fresh classifier of so many classes")
    sub.add_argument("--classes", type=Path, help="file with the classes to keep: an index or a name per line")
    sub.add_argument(
        "--cpb",
        metavar="METHOD",
        help="how the position bias gets to another window: log-extrapolate (V2's default), linear-extrapolate, stretch, "
        "bicubic (V1's default), geometric; with --data also all",
    )
    sub.add_argument("--inflate", choices=("repeat", "centre"), default="repeat", help="how images become clips")
    sub.add_argument("--patch-time", type=_positive, help="frames per token of a video model (default: 2)")
    sub.add_argument("--data", help="pictures to compare the models before and after on; labels are not needed")
    sub.add_argument("--split", default="test", help="which part of the folder, where it has parts (default: test)")
    sub.add_argument("--limit", type=_positive, default=64, help="how many pictures (default: 64)")
    sub.add_argument("--device", default="auto")

    sub = command("convert", _convert, "Write weights of any project as another one reads them, and check the result.")
    sub.add_argument("source", type=Path, metavar="IN", help="weight file or directory, in any layout")
    sub.add_argument("out", type=Path, metavar="OUT", help="directory (hf, timm, swinscale) or .pth/.safetensors file")
    sub.add_argument(
        "--to",
        required=True,
        help="hf, timm, torchvision, official, mm or swinscale; a detector: the last three; a segmenter: these and hf",
    )
    sub.add_argument("--img-size", type=_positive, help="transfer to this size first")
    sub.add_argument("--window", type=_positive, help="transfer to this window first; or the window, if IN has none")
    sub.add_argument("--encoder", action="store_true", help="of SimMIM, a detector or a segmenter the backbone alone")

    sub = command("info", _info, "Say what a weight file is, which windows it has and how it was trained.")
    sub.add_argument("path", type=Path, metavar="FILE", help="weight file or directory, in any layout")
    sub.add_argument("--for", "--model", dest="fits", help="whether it fits this model ('swinscale list models')")

    sub = command("pack", _pack, "Write images as tar shards in the WebDataset layout.")
    sub.add_argument("data", help="folder, list file or zip of images")
    sub.add_argument("--out", type=Path, required=True, help="folder for the shards")
    sub.add_argument("--split", default="train", help="which part of the folder, where it has parts (default: train)")
    sub.add_argument("--samples-per-shard", type=_positive, default=10_000)

    sub = command(
        "to-coco", _to_coco, "Write boxes of Pascal VOC, or a folder of masks, as annotations in COCO's format."
    )
    sub.add_argument("source", type=Path, help="a folder with Annotations/*.xml, or with images/ and masks/CLASS/*.png")
    sub.add_argument("--out", type=Path, required=True, help="the annotation file (JSON)")
    sub.add_argument("--kind", choices=("voc", "masks"), help="what the folder holds (default: what it looks like)")
    sub.add_argument("--skip-difficult", action="store_true", help="leave out objects that VOC marks as difficult")

    sub = command("push", _push, "Publish a model on the Hugging Face Hub, with a model card.")
    sub.add_argument("directory", type=Path, help="a run's best or last directory, or another that swinscale wrote")
    sub.add_argument("repository", help="owner/name on the Hub; created where there is none")
    who = sub.add_mutually_exclusive_group()
    who.add_argument("--private", action="store_true", help="a new repository is seen by its owner alone (default)")
    who.add_argument("--public", action="store_true", help="a new repository is seen by everybody")
    sub.add_argument("--licence", help="of the weights, as the Hub writes it: mit, apache-2.0, cc-by-nc-4.0 ...")
    sub.add_argument("--data-note", help="what should be known of the training images: source, licence, consent")
    sub.add_argument("--card", type=Path, help="a README.md to publish instead of one made of what is recorded")
    sub.add_argument("--message", help="of the commit")
    sub.add_argument(
        "--dry-run", action="store_true", help="write the card into the directory, list the files, and stop"
    )

    sub = command("claims", _claims, "Re-run what the articles claim, and show it beside what they report.")
    sub.add_argument("names", nargs="*", metavar="NAME", help="claims to run (default: list them all)")
    sub.add_argument("--scale", choices=("desk", "gpu", "paper"), default="desk", help="size of the experiment")
    sub.add_argument(
        "--data", default="bundled:fashion-mnist", help="images with train and test parts and a folder per class"
    )
    sub.add_argument("--seeds", type=_positive, help="runs per arm (default: what the claim says)")
    sub.add_argument("--jobs", type=_positive, help="steps at a time (default: two on small machines, one on a GPU)")
    sub.add_argument(
        "--out", type=Path, default=Path("docs/claims"), help="results, pages, pictures (default: docs/claims)"
    )
    sub.add_argument("--runs", type=Path, default=Path("runs/claims"), help="the runs (default: runs/claims)")
    sub.add_argument("--plan", action="store_true", help="print the steps, and stop")
    sub.add_argument("--pages", action="store_true", help="make the pages of the results that there are, and stop")

    sub = command("report", _report, "Draw a run as one HTML file: losses, amplitudes, attention, gradients, warnings.")
    sub.add_argument("directory", type=Path, metavar="RUN", help="a run's directory; the run may still go on")
    sub.add_argument("--out", type=Path, help="the file (default: RUN/report.html)")

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


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to less than 1")
    return value


def _scales(text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(0.0)
        if not 0 < found[-1] < float("inf"):
            raise argparse.ArgumentTypeError(f"'{part}' is not a number above 0")
    return tuple(found)


def _slide(text: str) -> tuple[int, int]:
    side, *stride = (_positive(part.strip()) for part in text.split(","))
    if len(stride) > 1 or (stride and stride[0] > side):
        raise argparse.ArgumentTypeError(f"'{text}' is not the side of a window and a stride up to it, as in 512,341")
    return side, (stride or [0])[0]


def _pixel(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) not in (2, 3):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a pixel: give its row and column, as in 40,56; of a film its frame before them, as in 8,40,56"
        )
    return tuple(_count(part.strip()) for part in parts)


def _bands(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 3 or not all(n.strip().isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"'{text}' does not name three channels, such as 3,2,1 (the first one is 0)")
    return tuple(int(n) for n in numbers)


def _size(text: str) -> int | tuple[int, ...]:
    numbers = tuple(_positive(part) for part in text.lower().replace("×", "x").split("x"))
    if len(numbers) > 3:
        raise argparse.ArgumentTypeError(f"'{text}' has more than three axes")
    return numbers[0] if len(numbers) == 1 else numbers


def _recipe(options: argparse.Namespace) -> Recipe:
    from swinscale.models import model_config
    from swinscale.recipes import get_recipe
    from swinscale.recipes.overfit import overfit
    from swinscale.recipes.parts import dense_model
    from swinscale.tasks import DetectConfig, SegmentConfig

    recipe = get_recipe(options.recipe)
    if options.model:
        old = recipe.model
        model, names = model_config(options.model), ("num_classes", "in_chans", "drop_path_rate")
        keep = {name: getattr(old, name) for name in names if hasattr(old, name) and hasattr(model, name)}
        model = dataclasses.replace(model, **keep)
        if isinstance(recipe.task, (DetectConfig, SegmentConfig)):
            model = dataclasses.replace(
                dense_model(options.model, old.drop_path_rate, img_size=old.img_size), in_chans=old.in_chans
            )
        recipe = dataclasses.replace(recipe, model=model)
    if options.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=options.data))
    if options.init:
        recipe = dataclasses.replace(recipe, init=options.init)
    if getattr(options, "overfit", None):
        recipe = overfit(recipe, options.overfit)
    return override(recipe, *options.overrides)


def _train(options: argparse.Namespace) -> None:
    from swinscale.recipes import run
    from swinscale.recipes.overfit import overfit_verdict
    from swinscale.runlog import measures

    recipe = _recipe(options)
    result = run(recipe, options.out or Path("runs") / recipe.name, resume=options.resume)
    if speaks():
        print(f"Done: {result.steps} steps, {measures(result.metrics)}. Weights: {result.directory / 'best'}")
    if options.overfit:
        verdict = overfit_verdict(recipe, result)
        if speaks():
            print(verdict)


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
    if (options.checkpoint is None) == (options.weights is None):
        raise UsageError(
            "eval needs weights: name one directory or file, as in 'swinscale eval DIR' or --weights PATH."
        )
    weights = options.checkpoint or options.weights
    from swinscale.suites import SUITES, Options, evaluate_suite, get_suite

    if options.suite is not None:
        get_suite(options.suite)
        if options.data is None:
            raise UsageError(f"--suite {options.suite} needs its images: add --data PATH.")
        if options.slide:
            raise UsageError("--slide: a suite looks at whole pictures, as published. Leave it out.")
        same = ("published", "img_size", "resize", "split", "batch_size", "device", "workers", "flip", "clips", "crops")
        views = {"window_size": options.window, "scales": options.scales or ()}
        settings = Options(**views, **{name: getattr(options, name) for name in same})
        evaluate_suite(options.suite, weights, options.data, settings, options.out)
        return
    from swinscale.inference import DENSE, evaluate_checkpoint, reads_films, task_of

    only = [name for name in ("published", "resize") if getattr(options, name) is not None]
    kind = "" if only else task_of(weights)
    films = not only and reads_films(weights)
    only += ["out"] * (options.out is not None and kind not in DENSE and not films)
    only += ["workers"] * (options.workers is not None and not films)
    if only:
        raise UsageError(f"--{only[0]} belongs to a suite: add --suite {', '.join(SUITES)}.")
    looks = _looks(options, kind, films)
    if kind in DENSE or films:
        how: dict[str, Any] = {"device": options.device, "batch_size": options.batch_size or 1, "out": options.out}
        how |= {"data": options.data, "split": options.split or "val"}
        if films:
            from swinscale.video import evaluate_videos

            evaluate_videos(weights, workers=options.workers, **how, **looks)
        elif kind == "detect":
            from swinscale.detection import evaluate_detector

            evaluate_detector(weights, **how, **looks)
        else:
            from swinscale.segmentation import evaluate_segmenter

            evaluate_segmenter(weights, **how, **looks)
        return
    evaluate_checkpoint(
        weights,
        data=options.data,
        split=options.split or "test",
        img_size=options.img_size,
        window_size=options.window,
        batch_size=options.batch_size or 64,
        device=options.device,
    )


def _looks(options: argparse.Namespace, kind: str, films: bool) -> dict[str, Any]:
    """How a dense task looks at a picture, or a video model at a film, where the command line says so.

    Raises:
        UsageError: for an option that weights of this kind have no use for.
    """
    from swinscale.inference import DENSE

    useless = [] if kind == "segment" else ["slide"]
    useless += [] if kind in DENSE else ["scales", "flip"]
    useless += [] if kind == "video" else ["clips", "crops"]
    for name in useless:
        if getattr(options, name):
            raise UsageError(f"--{name} is of no use to these weights ({kind or 'not a dense task'}): leave it out.")
    if films:
        views = {} if kind == "simmim" else {"clips": options.clips, "crops": options.crops}
        return views | {"img_size": options.img_size, "window_size": options.window}
    if kind == "detect":
        if options.img_size:
            raise UsageError("--img-size: a detector resizes by its short side; name sides with --scales instead.")
        if options.scales and any(side != int(side) for side in options.scales):
            raise UsageError(
                f"--scales {','.join(map(str, options.scales))}: of a detector these are sides in whole pixels."
            )
        found: dict[str, Any] = {"test_short": tuple(map(int, options.scales))} if options.scales else {}
    else:
        found = {"test_ratios": options.scales} if options.scales else {}
        found |= {"test_crop": options.slide[0], "test_stride": options.slide[1]} if options.slide else {}
        found |= {"short": options.img_size} if options.img_size else {}
    return found | ({"test_flip": True} if options.flip else {}) | {"window_size": options.window}


def _predict(options: argparse.Namespace) -> None:
    from swinscale.inference import picture_files, predict_files, reads_films, task_of

    kind, films = task_of(options.checkpoint), reads_films(options.checkpoint)
    looks = _looks(options, kind, films)
    for name, kinds, owners in (
        ("top", ("classify", "video"), "classifiers"),
        ("score", ("detect",), "detectors"),
        ("truth", ("segment",), "segmenters"),
        ("maps", ("segment",), "segmenters"),
    ):
        if getattr(options, name) and kind not in kinds:
            raise UsageError(f"--{name} is of use to {owners} alone: leave it out.")
    if films:
        from swinscale.films import classify_films

        if options.bands:
            raise UsageError("--bands: the channels of films are colours. Leave it out.")
        looks |= {} if options.top is None else {"top": options.top}
        classify_films(options.checkpoint, options.images, out=options.out, device=options.device, **looks)
        return
    how = {"out": options.out, "bands": options.bands, "device": options.device}
    if kind == "segment":
        from swinscale.segmentation import segment_files

        segment_files(options.checkpoint, options.images, truth=options.truth, save_maps=options.maps, **how, **looks)
        return
    if kind == "detect":
        from swinscale.detection import detect_files

        how |= {} if options.score is None else {"score": options.score}
        detect_files(options.checkpoint, picture_files(options.images), **how, **looks)
        return
    if options.img_size or options.window:
        size = "img-size" if options.img_size else "window"
        raise UsageError(f"--{size}: these weights predict at their own size; make others with swinscale transfer.")
    how |= {} if options.top is None else {"top": options.top}
    predict_files(options.checkpoint, options.images, **how)


def _explain(options: argparse.Namespace) -> None:
    from swinscale.explain import explain_picture

    names = ("target", "query", "stage", "block", "head", "method", "out", "device")
    explain_picture(options.image, options.checkpoint, **{name: getattr(options, name) for name in names})


def _quantize(options: argparse.Namespace) -> None:
    from swinscale.quantize import quantize_checkpoint

    quantize_checkpoint(
        options.checkpoint, options.out, data=options.data, split=options.split, calibration=options.calibration
    )


def _export(options: argparse.Namespace) -> None:
    given = {n: getattr(options, n) for n in ("dynamic", "size", "batch", "output", "data") if getattr(options, n)}
    if options.format is None:
        if given or options.check:
            raise UsageError(f"--{next(iter(given), 'check')} needs a --format: the default writes a run's checkpoint.")
        from swinscale.export.run import export

        step = export(Path(options.source), options.out, step=options.step, averaged=not options.trained)
        print(f"Step {step}: {options.out}")
        return
    if options.step or options.trained:
        raise UsageError(
            f"--format {options.format} reads a model: write the checkpoint as one first, swinscale export RUN --out MODEL."
        )
    from swinscale.export.model import export_model

    export_model(options.source, options.out, options.format, check=options.check, **given)


def _transfer(options: argparse.Namespace) -> None:
    from swinscale.agreement import transfer_checkpoint

    transfer_checkpoint(
        options.source,
        options.out,
        img_size=options.img_size,
        window_size=options.window,
        in_chans=options.in_chans,
        num_classes=options.num_classes,
        classes=options.classes,
        cpb=options.cpb,
        inflate=options.inflate,
        patch_time=options.patch_time,
        data=options.data,
        split=options.split,
        limit=options.limit,
        device=options.device,
    )


def _convert(options: argparse.Namespace) -> None:
    from swinscale.convert import convert

    sizes = {"img_size": options.img_size, "window_size": options.window}
    for line in convert(options.source, options.out, options.to, **sizes, encoder=options.encoder):
        print(line)


def _info(options: argparse.Namespace) -> None:
    from swinscale.info import info

    print(info(options.path, options.fits))


def _pack(options: argparse.Namespace) -> None:
    from swinscale.data import open_source
    from swinscale.data.pack import pack

    source = open_source(options.data, options.split)
    written = pack(source, options.out, options.samples_per_shard, options.split)
    print(f"{len(source)} images in {len(written)} shards: {options.out}")


def _to_coco(options: argparse.Namespace) -> None:
    from swinscale.data.to_coco import to_coco

    counts = to_coco(options.source, options.out, options.kind, options.skip_difficult)
    left_out = f", {counts.left_out} left out" if counts.left_out else ""
    print(
        f"{counts.annotations} objects of {counts.classes} classes in {counts.images} images{left_out}: {options.out}"
    )


def _push(options: argparse.Namespace) -> None:
    from swinscale.card import model_card
    from swinscale.hub import check_directory, check_name, files_to_push, push_to_hub

    directory, repository = options.directory, options.repository
    check_name(repository)
    check_directory(directory)
    if options.card and (options.licence or options.data_note):
        raise UsageError("--card is the whole card: write the licence and the note into it.")
    if options.card:
        card = options.card.read_text(encoding="utf-8")
    else:
        card = model_card(directory, repository, licence=options.licence, data_note=options.data_note)
        if not options.licence:
            print("No licence is stated (add --licence): others do not know what they may do with the model.")
    if options.dry_run:
        readme = directory / "README.md"
        if not options.card and readme.exists() and readme.read_text(encoding="utf-8") != card:
            raise UsageError(f"{readme} exists and differs: publish it with --card {readme}, or delete it.")
        if not options.card:
            readme.write_text(card, encoding="utf-8")
            print(f"Wrote {readme}. To change it, edit it and publish it with --card {readme}.")
        for name, size in files_to_push(directory, card):
            print(f"{size:>14,} bytes  {name}")
        return
    address = push_to_hub(directory, repository, private=not options.public, message=options.message, card=card)
    print(f"Published: {address}")


def _claims(options: argparse.Namespace) -> None:
    from swinscale.claims.command import run_claims

    how = {name: getattr(options, name) for name in ("data", "seeds", "jobs", "out", "runs", "plan", "pages")}
    run_claims(options.names, options.scale, **how)


def _report(options: argparse.Namespace) -> None:
    from swinscale.diagnose.run_report import run_report

    print(f"Open {run_report(options.directory, options.out)}")


def _list(options: argparse.Namespace) -> None:
    from swinscale.show import list_models_table, list_recipes_table

    (list_models_table if options.what == "models" else list_recipes_table)(options.pattern)


def _demo(options: argparse.Namespace) -> None:
    from swinscale.demo import demo

    report = demo(options.data, options.out)
    print(f"Done. Open {report}")
