"""``python -m bench run | cpu | gpu | giant | scaling | where | memory | export | vitals | overfit | detect | segment | video | lrnet | systems | page``: speed and memory beside other implementations, with equal weights.

Everybody's outputs are checked before anything is timed; repetitions alternate; tables show medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from bench import (
    decoding,
    detection,
    detection_speed,
    export,
    gpu,
    lrnet,
    memory,
    overfit,
    runner,
    segment,
    segment_runs,
    systems,
    tables,
    video,
    video_runs,
    vitals,
)
from bench.cases import DTYPES, MODES, Case, prepare_device, run_alone, run_case, warm_compiler
from bench.contenders import OURS, PEERS, Contender, Setting, official_checkout, reason
from bench.giant import giant
from bench.goals import cpu_goals, gpu_goals, linearity_goal
from bench.page import parts, rewrite
from bench.progress import say, steps
from bench.results import FOLDER, environment, read, write
from bench.scaling import area_curve, window_curve
from bench.where import where
from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.ops import BACKENDS, choose_backend
from swinscale.timing import Budget

PAGE = FOLDER.parent.parent / "docs" / "performance.md"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # models of many shapes take turns
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", message="flex_attention called without")  # its line in the table shows it
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        options = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
        run: Callable[[argparse.Namespace], None] = options.run
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)  # nothing compiled earlier shortens a first batch
            run(options)
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"bench: {error.strerror}: {Path(error.filename).name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench: stopped; what was measured so far is written.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench", description="Speed and memory beside other implementations, equal weights."
    )
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str | None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text) if text else commands.add_parser(name)
        sub.set_defaults(run=run)
        return sub

    def shared(sub: argparse.ArgumentParser, out: str) -> None:
        sub.add_argument("--out", type=Path, default=FOLDER, help=f"folder of {out} (default: bench/results)")
        sub.add_argument("--threads", type=_positive, help="processor threads (default: PyTorch's choice)")

    sub = command("run", _run, "Compare any slice: the product of all lists is measured.")
    sub.add_argument(
        "--models", nargs="+", default=["swinv2_tiny"], help="swinv2_tiny, swin_base, ... (default: swinv2_tiny)"
    )
    sub.add_argument("--windows", nargs="+", type=_positive, default=[8])
    sub.add_argument("--sizes", nargs="+", type=_positive, default=[256])
    sub.add_argument("--batch", nargs="+", type=_positive, default=[8])
    sub.add_argument("--modes", nargs="+", choices=MODES, default=["inference"])
    sub.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"])
    sub.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True, help="without torch.compile")
    sub.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=False, help="also with torch.compile")
    sub.add_argument("--backends", nargs="+", default=["auto"], help=f"auto, all, {', '.join(BACKENDS)}, sequential:8")
    sub.add_argument(
        "--peers", nargs="*", default=list(PEERS), help=f"{', '.join(PEERS)}, openvino (default: the first three)"
    )
    sub.add_argument("--official", type=Path, metavar="PATH", help="a checkout of microsoft/Swin-Transformer")
    sub.add_argument("--repeats", type=_positive, default=7)
    sub.add_argument("--min-seconds", type=float, default=0.1, help="length of a turn (default: 0.1)")
    sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sub.add_argument("--name", default="run", help="name of the result's file (default: run)")
    shared(sub, "NAME.json and NAME-ratios.png")

    sub = command("cpu", _cpu, "The project's goals on a CPU, in about a quarter of an hour; make bench runs this.")
    sub.add_argument("--official", type=Path, metavar="PATH", help="a checkout of microsoft/Swin-Transformer")
    sub.add_argument("--repeats", type=_positive, default=7)
    sub.add_argument(
        "--budget", type=float, default=1200, help="seconds after which nothing new is begun (default: 1200)"
    )
    sub.add_argument("--only", nargs="+", help="cases by a part of their name, such as 'batch 1'")
    sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    shared(sub, "cpu.json and cpu-ratios.png")

    sub = command("gpu", _gpu, "Ceilings, attention, models, G's blocks and scaling on one GPU within ten minutes.")
    sub.add_argument("--sections", nargs="+", default=list(gpu.SECTIONS), help=f"some of {', '.join(gpu.SECTIONS)}")
    sub.add_argument(
        "--models", nargs="+", help="of the section models, those with this in their name, such as v2b-256-8"
    )
    sub.add_argument("--budget", type=float, default=540, help="seconds (default: 540)")
    sub.add_argument("--tiny", action="store_true", help="small shapes, on whatever device there is: to try the code")
    shared(sub, "gpu.json and its pictures; an earlier file's other sections are kept")

    sub = command(
        "giant", _giant, "Three billion parameters in training on one GPU; elsewhere a narrow model of that shape."
    )
    sub.add_argument("--data", required=True, help="folder of photographs")
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    sub.add_argument("--threads", type=_positive)
    sub.add_argument("--seconds", type=_positive, default=540, help="stop after so many seconds (default: 540)")
    sub.add_argument("--out", type=Path, default=FOLDER, help=f"folder for results (default: {FOLDER.name})")

    sub = command("scaling", _scaling, "Time and peak memory against image area and against the window.")
    sub.add_argument("--model", default="swinv2_tiny")
    sub.add_argument("--window", type=_positive, default=8, help="the fixed window (default: 8)")
    sub.add_argument("--sizes", nargs="+", type=_positive, default=[256, 512, 1024, 2048])
    sub.add_argument("--size", type=_positive, default=512, help="the fixed image (default: 512)")
    sub.add_argument("--windows", nargs="+", type=_positive, default=[4, 8, 16])
    sub.add_argument("--pixels", type=_positive, help="per call, as a side (default: the largest of --sizes)")
    sub.add_argument("--peers", nargs="*", default=["timm"])
    sub.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    sub.add_argument("--modes", nargs="+", choices=MODES, default=["inference"])
    sub.add_argument("--repeats", type=_positive, default=5)
    sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    shared(sub, "scaling.json and scaling-curves.png")

    sub = command("where", _where, "Where our time goes on a CPU, and what single choices of ours buy.")
    sub.add_argument("--repeats", type=_positive, default=3, help="processes for each choice (default: 3)")
    sub.add_argument("--tiny", action="store_true", help="a tiny network: to try the code")
    shared(sub, "where.json")

    sub = command("memory", _memory, "Gigabytes of a training step under each technique, predicted and measured.")
    sub.add_argument("--sections", nargs="+", choices=memory.SECTIONS, default=["predicted", "cpu"])
    sub.add_argument("--tiny", action="store_true", help="one model and size, and a tiny network: to try the code")
    shared(sub, "memory.json; an earlier file's other sections are kept")

    sub = command("export", _export, "Files for other runtimes: written, checked, timed; peers as far as they get.")
    sub.add_argument("--repeats", type=_positive, default=9, help="rounds of the timing (default: 9)")
    sub.add_argument("--tiny", action="store_true", help="a tiny network: to try the code")
    sub.add_argument("--projects", nargs="+", choices=export.PROJECTS, default=list(export.PROJECTS))
    shared(sub, "export.json; rows of other projects in an earlier file are kept")

    sub = command("vitals", _vitals, "What a reading of a run's vital signs costs (train.diagnose_every).")
    sub.add_argument("--batch", type=_positive, default=8)
    sub.add_argument("--repeats", type=_positive, default=7)
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sub.add_argument("--tiny", action="store_true", help="a tiny network: to try the code")
    shared(sub, "vitals.json")

    sub = command("overfit", _overfit, "How fast the desk recipes learn eight images by heart.")
    sub.add_argument("--data", help="a folder of photos, for the second recipe (default: the first one alone)")
    shared(sub, "overfit.json")

    sub = command(
        "detect", _detect, "Detection beside torchvision's: speed, a run on held-out photos, photos by heart."
    )
    sub.add_argument("--sections", nargs="+", choices=detection.SECTIONS, default=["speed"], help="default: speed")
    sub.add_argument("--data", required=True, help="a folder in COCO's layout")
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of heldout and overfit, these models alone")
    sub.add_argument(
        "--minutes", type=float, default=30, help="heldout: of training, all models together (default: 30)"
    )
    sub.add_argument("--epochs", type=float, help="heldout, overfit: passes over the photos, instead of as many as fit")
    sub.add_argument("--images", type=_positive, default=16, help="overfit: photos to learn by heart (default: 16)")
    sub.add_argument(
        "--smallest", type=float, default=16, metavar="PIXELS", help="overfit: of objects in them (default: 16)"
    )
    sub.add_argument("--lr", type=float, help="overfit: learning rate")
    sub.add_argument(
        "--runs", type=Path, metavar="DIR", help="keep runs there, and go on with those that are (default: not kept)"
    )
    sub.add_argument("--size", type=_positive, help="speed: short side (default: 320, on a GPU 800)")
    sub.add_argument("--batch", type=_positive, default=2, help="speed: photos per call (default: 2)")
    sub.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"], help="speed: others under autocast")
    sub.add_argument("--repeats", type=_positive, default=7)
    sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of speed (default: cpu)")
    sub.add_argument("--tiny", action="store_true", help="small networks, one epoch: to try the code")
    shared(sub, "detect.json; rows of other models, devices and precisions in an earlier file are kept")

    sub = command("segment", _segment, "UPerNet beside transformers' with the same weights, and one without a Swin.")
    sub.add_argument("--modes", nargs="+", choices=segment.MODES, default=list(segment.MODES))
    sub.add_argument("--size", type=_positive, help="side of the images (default: 512)")
    sub.add_argument("--batch", type=_positive, help="images per call (default: 2 in training, 1 in inference)")
    sub.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"], help="others under autocast")
    sub.add_argument("--repeats", type=_positive, default=3)
    sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sub.add_argument("--quick", action="store_true", help="small networks and images: to try the code")
    sub.add_argument("--threads", nargs="+", type=_positive, help="processor threads, one number after the other")
    sub.add_argument(
        "--runs", nargs="+", type=Path, metavar="RUN", help="measure nothing: note what these finished runs reached"
    )
    sub.add_argument("--out", type=Path, default=FOLDER, help="folder of segment.json, whose other rows are kept")

    sub = command("video", _video, "3-D models: speed beside torchvision's, films decoded, actions of unseen people.")
    sub.add_argument("--sections", nargs="+", choices=video.SECTIONS, default=["speed"], help="default: speed")
    sub.add_argument("--data", help="actions: a folder per action; decode: films or a folder of them")
    sub.add_argument(
        "--init", nargs="+", default=[], metavar="RECIPE=DIR", help="actions: an image model to inflate, per recipe"
    )
    sub.add_argument(
        "--only", nargs="+", default=list(video_runs.RECIPES), metavar="RECIPE", help="actions: some alone"
    )
    sub.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="actions: such as train.epochs=80")
    sub.add_argument(
        "--out", type=Path, default=Path("runs/actions"), help="actions: folder of runs, which are gone on with"
    )
    sub.add_argument(
        "--runs", nargs="+", type=Path, metavar="RUN", help="measure nothing: test these finished runs of actions"
    )
    sub.add_argument("--modes", nargs="+", choices=video.MODES, default=list(video.MODES), help="speed: default both")
    sub.add_argument("--frames", type=_positive, help="speed: of a clip (default: 16, on a GPU 32)")
    sub.add_argument("--size", type=_positive, help=f"speed: side of the frames (default: {video.SIZE})")
    sub.add_argument("--batch", type=_positive, default=1, help="speed: clips per call (default: 1)")
    sub.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"], help="speed: others under autocast")
    sub.add_argument("--repeats", type=_positive, default=3)
    sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of speed (default: cpu)")
    sub.add_argument("--quick", action="store_true", help="speed: small networks and clips: to try the code")
    sub.add_argument(
        "--threads", nargs="+", type=_positive, help="speed: processor threads, one number after the other"
    )
    sub.add_argument("--results", type=Path, default=FOLDER, help="folder of video.json, whose other rows are kept")

    sub = command("lrnet", _lrnet, "LR-Net, with and without copies of its neighbourhoods, beside a Swin and a ResNet.")
    sub.add_argument("--modes", nargs="+", choices=segment.MODES, default=list(segment.MODES))
    sub.add_argument("--size", type=_positive, help="side of the images (default: 224)")
    sub.add_argument("--batch", type=_positive, default=4, help="images per call (default: 4)")
    sub.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"], help="others under autocast")
    sub.add_argument("--repeats", type=_positive, default=5)
    sub.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sub.add_argument("--quick", action="store_true", help="small networks and images: to try the code")
    shared(sub, "lrnet.json, whose other rows are kept")

    sub = command("systems", _systems, "Note finished runs for the table of all systems that the articles name.")
    sub.add_argument("--runs", nargs="+", type=Path, metavar="RUN", required=True)
    sub.add_argument("--out", type=Path, default=FOLDER, help="folder of systems.json, whose other rows are kept")

    sub = command("page", _page, "Write the measured parts of docs/performance.md from the results.")
    sub.add_argument("--page", type=Path, default=PAGE, help="default: docs/performance.md")
    sub.add_argument("--results", type=Path, default=FOLDER, help="default: bench/results")
    sub.add_argument("--list", action="store_true", help="only name the parts that a page can have")

    sub = command("alone", _alone, None)  # a process of its own for one measurement
    sub.add_argument("spec")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _device(name: str, threads: int | None) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here.")
    prepare_device(name, threads)
    return name


def _contenders(
    backends: Sequence[str], peers: Sequence[str], official: Path | None, eager: bool, compiled: bool
) -> tuple[Contender, ...]:
    for peer in peers:
        if peer not in (*PEERS, "openvino"):
            known = [*PEERS, "openvino"]
            raise UsageError(f"Unknown peer '{peer}'.{suggest(peer, known)} Allowed: {', '.join(known)}.")
    if "all" in backends:
        backends = ["auto", *BACKENDS]
    for name in dict.fromkeys(["auto", *backends]):
        try:
            choose_backend(name)
        except UsageError as error:
            if "Unknown" in str(error):  # one that cannot run here becomes a line of the table
                raise
    if not (eager or compiled):
        raise UsageError("--no-eager without --compiled leaves nothing to measure.")
    found = []
    for how in [False] * eager + [True] * compiled:
        found += [Contender(OURS, name, how) for name in dict.fromkeys(["auto", *backends])]
        found += [Contender(peer, compiled=how) for peer in peers if peer != "openvino"]
        if official:
            official_checkout(official)
            found.append(Contender("official", compiled=how))
    return (*found, *[Contender("openvino") for peer in peers if peer == "openvino"])


def _compare(
    cases: Sequence[Case],
    options: argparse.Namespace,
    name: str,
    budget: Budget | None = None,
    goals: Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]] | None = None,
) -> None:
    """Runs cases, writes after each, prints the tables at the end."""
    content: dict[str, Any] = {"kind": "cases", "environment": environment(options.arguments), "cases": []}
    if any(contender.compiled for case in cases for contender in case.contenders):
        warm_compiler(cases[0].device)
    for case in steps(cases, name):
        if budget is not None and budget.left < 0:
            say(f"{case.name or case}: no time left")
            continue
        over = (lambda: budget.left < 0) if budget is not None else (lambda: False)
        content["cases"].append(run_case(case, options.official, over))
        if goals:
            content["goals"] = goals(content["cases"])
        write(options.out / f"{name}.json", content)
    tables.ratio_plot(content["cases"], options.out / f"{name}-ratios.png")
    print(tables.cases_table(content["cases"]))
    if goals:
        print(f"\n{tables.goals_table(content['goals'])}")
    print(f"\n{tables.machine(content['environment'])}")


def _run(options: argparse.Namespace) -> None:
    contenders = _contenders(options.backends, options.peers, options.official, options.eager, options.compiled)
    settings = [Setting(m, w, s) for m in options.models for s in options.sizes for w in options.windows]
    device = _device(options.device, options.threads)
    cases = [
        Case(setting, batch, mode, dtype, device, contenders, options.repeats, options.min_seconds, options.memory)
        for setting in settings
        for mode in options.modes
        for dtype in options.dtypes
        for batch in options.batch
    ]
    _compare(cases, options, options.name)


def _cpu(options: argparse.Namespace) -> None:
    device = _device("cpu", options.threads)
    tiny, official = "swinv2_tiny", options.official
    eager = _contenders(["auto"], PEERS, official, True, False)
    every = _contenders(["all"], PEERS, official, True, False)
    compiled = (Contender(), *_contenders(["auto"], [*PEERS, "openvino"], None, False, True))

    def case(
        name: str, model: str, window: int, size: int, batch: int, who: tuple[Contender, ...], **more: Any
    ) -> Case:
        more = {"mode": "inference", "repeats": options.repeats, "memory": False, **more}
        more["memory"] &= options.memory
        return Case(Setting(model, window, size), batch, dtype="fp32", device=device, contenders=who, name=name, **more)

    few = max(3, options.repeats - 2)
    cases = [
        case("v2t-256-8 batch 8", tiny, 8, 256, 8, every, memory=True),
        case("v2t-256-8 batch 1", tiny, 8, 256, 1, eager, repeats=2 * options.repeats, min_seconds=0.5),
        case("v2t-256-8 training", tiny, 8, 256, 8, eager, mode="training", repeats=few, memory=True),
        case("v2t-256-16 batch 8", tiny, 16, 256, 8, eager, repeats=few),
        case("v2t-384-24 batch 4", tiny, 24, 384, 4, eager, repeats=few),
        case("v2t-256-8 batch 8 compiled", tiny, 8, 256, 8, compiled),
        case("v2t-256-8 batch 1 compiled", tiny, 8, 256, 1, compiled, repeats=2 * options.repeats, min_seconds=0.5),
        case("v1t-224-7 batch 8", "swin_tiny", 7, 224, 8, eager, repeats=few),
    ]
    if options.only:
        cases = [c for c in cases if any(part in c.name for part in options.only)]
        if not cases:
            raise UsageError(f"--only {' '.join(options.only)}: no case has this in its name.")
    _compare(cases, options, "cpu", Budget(options.budget), cpu_goals)


def _gpu(options: argparse.Namespace) -> None:
    for name in options.sections:
        if name not in gpu.SECTIONS:
            raise UsageError(
                f"Unknown section '{name}'.{suggest(name, gpu.SECTIONS)} Allowed: {', '.join(gpu.SECTIONS)}."
            )
    device = "cuda" if torch.cuda.is_available() or not options.tiny else "cpu"
    shapes = gpu.shapes(_device(device, options.threads), options.tiny, options.models)
    file = options.out / ("gpu-tiny.json" if options.tiny else "gpu.json")
    here = environment(options.arguments)
    old = read(file) or {}
    same = old.get("kind") == "gpu" and old["environment"]["machine"]["gpu"] == here["machine"]["gpu"]
    content: dict[str, Any] = {"kind": "gpu", "environment": here, "sections": old["sections"] if same else {}}

    def save(name: str, section: dict[str, Any]) -> None:
        known = content["sections"].get(name, {})
        if name == "models" and "cases" in section:  # one model after the other, in several calls
            new = [case["name"] for case in section["cases"]]
            section = {
                **section,
                "cases": [c for c in known.get("cases", []) if c["name"] not in new] + section["cases"],
            }
        if "reason" not in section or not known:
            content["sections"][name] = {**section, "environment": here}
        content["goals"] = gpu_goals(content["sections"])
        write(file, content)

    gpu.run_sections(options.sections, shapes, options.budget, save)
    sections = content["sections"]
    for name, draw, key in (
        ("ratios", lambda s, f: tables.ratio_plot(s["cases"], f), "models"),
        ("attention", tables.attention_plot, "attention"),
        ("scaling", tables.scaling_plot, "scaling"),
    ):
        if "reason" not in sections.get(key, {"reason": ""}):
            try:
                draw(sections[key], options.out / f"{file.stem}-{name}.png")
            except Exception as error:  # the tables matter more
                say(f"no picture of {name}: {reason(error)}")
    for name in gpu.SECTIONS:
        if name in sections:
            print(f"\n{tables.section_table(name, sections)}")
    print(f"\n{tables.machine(here)}\n\n{tables.goals_table(content['goals'])}")


def _giant(options: argparse.Namespace) -> None:
    device = _device(options.device, options.threads)
    content = {"kind": "giant", "environment": environment(options.arguments)}
    content |= giant(options.data, device, options.seconds)
    write(options.out / ("giant.json" if device == "cuda" else "giant-cpu.json"), content)
    print(
        f"{tables.training_steps_table(content)}\n\n{tables.losses_line(content)}\n\n{tables.machine(content['environment'])}"
    )


def _scaling(options: argparse.Namespace) -> None:
    who = _contenders(["auto"], options.peers, None, True, False)
    Setting(options.model, options.window, options.size)
    device = _device(options.device, options.threads)
    pixels = (options.pixels or max(options.sizes)) ** 2
    content: dict[str, Any] = {
        "kind": "scaling",
        "environment": environment(options.arguments),
        "area": [],
        "window": [],
    }
    for mode in steps(options.modes, "scaling"):
        how = {"mode": mode, "repeats": options.repeats, "memory": options.memory}
        content["area"] += area_curve(
            options.model, options.window, options.sizes, pixels, who, device, options.dtype, **how
        )
        content["window"] += window_curve(
            options.model, options.size, options.windows, 1, who, device, options.dtype, **how
        )
        write(options.out / "scaling.json", content)
    content["goals"] = [linearity_goal(content)]
    write(options.out / "scaling.json", content)
    tables.scaling_plot(content, options.out / "scaling-curves.png")
    print(tables.scaling_table(content))
    print(f"\n{tables.goals_table(content['goals'])}\n\n{tables.machine(content['environment'])}")


def _where(options: argparse.Namespace) -> None:
    _device("cpu", options.threads)
    here = environment(options.arguments)
    found: dict[str, Any] = {}

    def save(content: dict[str, Any]) -> None:
        found.update(content)
        write(options.out / "where.json", {"kind": "where", "environment": here, **content})

    where(options.repeats, save, options.tiny)
    for profile in found["profiles"].values():
        print(f"{tables.profile_table(profile)}\n")
    print(f"{tables.choices_table(found['choices'])}\n\n{tables.machine(here)}")


def _export(options: argparse.Namespace) -> None:
    _device("cpu", options.threads)
    file = options.out / ("export-tiny.json" if options.tiny else "export.json")
    kept = [row for row in (read(file) or {}).get("rows", []) if row["project"] not in options.projects]
    content: dict[str, Any] = {"kind": "export", "rows": kept}
    here = environment(options.arguments)
    for row in export.measured(options.tiny, options.projects, options.repeats, torch.get_num_threads()):
        content["rows"].append({**row, "environment": here})
        write(file, content)
    print("\n\n".join(make() for make in export.parts(content).values()))


def _memory(options: argparse.Namespace) -> None:
    for section in options.sections:
        _device("cuda" if section == "gpu" else "cpu", options.threads)
    file = options.out / ("memory-tiny.json" if options.tiny else "memory.json")
    content: dict[str, Any] = {"kind": "memory", **(read(file) or {})}
    models, sizes = (["L"], list(memory.SIZES)[:1]) if options.tiny else (list(memory.MODELS), list(memory.SIZES))
    for section in options.sections:
        if section == "predicted":
            rows = memory.predicted(models, sizes)
        elif section.startswith("detectors"):
            rows = memory.detectors(section, options.tiny)
        else:
            cases = {"cpu": memory.CPU_CASES, "gpu": memory.GPU_CASES}[section]
            rows = memory.measured("cuda" if section == "gpu" else "cpu", memory.TRIAL if options.tiny else cases)
        content[section] = {"environment": environment(options.arguments), "rows": []}
        for row in rows:
            content[section]["rows"].append(row)
            write(file, content)
    print("\n\n".join(make() for make in memory.parts(content).values()))


def _vitals(options: argparse.Namespace) -> None:
    device = _device(options.device, options.threads)
    setting = Setting("swinv2_trial", 4, 32) if options.tiny else Setting("swinv2_tiny", 8, 256)
    content = {"kind": "vitals", "environment": environment(options.arguments)}
    content["cost"] = vitals.cost(setting, options.batch, device, options.repeats)
    name = f"vitals{'-tiny' * options.tiny}{'-gpu' * (device == 'cuda')}.json"
    write(options.out / name, content)
    print(f"{vitals.cost_table(content)}\n\n{tables.machine(content['environment'])}")


def _overfit(options: argparse.Namespace) -> None:
    content = {"kind": "overfit", "environment": environment(options.arguments), "runs": overfit.runs(options.data)}
    write(options.out / "overfit.json", content)
    print(overfit.table(content))


def _detect(options: argparse.Namespace) -> None:
    device = _device(options.device, options.threads)
    file = options.out / ("detect-tiny.json" if options.tiny else "detect.json")
    here = environment(options.arguments)
    content: dict[str, Any] = {"kind": "detect", **(read(file) or {})}

    def keep(section: str, row: dict[str, Any]) -> None:
        began = {name: row[name] for name in ("date", "commit") if name in row}
        row = {**row, "environment": {**here, **began}}
        content.update(read(file) or {})  # another call may have written meanwhile
        content[section] = detection.merged(content.get(section, []), row, detection.KEYS[section])
        write(file, content)

    size = options.size or (64 if options.tiny else 800 if device == "cuda" else 320)
    names = ("minutes", "epochs", "images", "smallest", "lr", "batch", "repeats", "memory", "runs", "tiny")
    settings = detection.Settings(
        str(Path(options.data).resolve()),
        tuple(options.only),
        device=device,
        dtypes=tuple(options.dtypes),
        size=size,
        **{name: getattr(options, name) for name in names},
    )
    detection.run_sections(options.sections, settings, keep)
    print("\n\n".join(make() for make in detection.parts(content).values()))


def _segment(options: argparse.Namespace) -> None:
    file = options.out / ("segment-quick.json" if options.quick else "segment.json")
    content: dict[str, Any] = {"kind": "segment", **(read(file) or {})}
    for directory in options.runs or ():
        content["runs"] = detection.merged(content.get("runs", []), segment_runs.row(directory), ("name",))
        write(file, content)
    for threads in [] if options.runs else options.threads or [None]:
        device = _device(options.device, threads)
        here = environment(options.arguments)
        for dtype in options.dtypes:
            for mode in options.modes:
                batch, size = options.batch or segment.BATCH[mode], options.size or (64 if options.quick else 512)
                speed = segment.Speed(mode, dtype, device, size, batch, options.quick)
                row = {**segment.measure(speed, options.repeats, options.memory), "environment": here}
                content.update(read(file) or {})  # another call may have written meanwhile
                content["speed"] = detection.merged(content.get("speed", []), row, segment.KEYS)
                write(file, content)
    print("\n\n".join(make() for make in segment.parts(content).values()))


def _video(options: argparse.Namespace) -> None:
    sections = [] if options.runs else options.sections
    if {"actions", "decode"} <= set(sections):
        raise UsageError("--sections actions decode: each has films of its own (--data). Ask for one at a time.")
    if options.data is None and {"actions", "decode"} & set(sections):
        raise UsageError(f"--sections {' '.join(sections)}: add --data FOLDER, the films.")
    file = options.results / ("video-quick.json" if options.quick else "video.json")
    content: dict[str, Any] = {"kind": "video", **(read(file) or {})}

    def keep(section: str, row: dict[str, Any], keys: Sequence[str]) -> None:
        content.update(read(file) or {})  # another call may have written meanwhile
        content[section] = detection.merged(content.get(section, []), row, keys)
        write(file, content)

    for directory in options.runs or ():
        keep("actions", video_runs.row(directory), video_runs.KEYS)
    if "actions" in sections:
        inits = dict(_pair(text) for text in options.init)
        video_runs.train_all(
            options.data,
            options.out,
            inits,
            lambda row: keep("actions", row, video_runs.KEYS),
            options.only,
            options.set,
        )
    if "decode" in sections:
        row = {**decoding.measure(options.data, options.repeats), "environment": environment(options.arguments)}
        row["environment"]["machine"]["threads"] = 1
        keep("decode", row, ())
    for threads in (options.threads or [None]) if "speed" in sections else []:
        device = _device(options.device, threads)
        here = environment(options.arguments)
        frames = options.frames or (8 if options.quick else video.FRAMES[device])
        size = options.size or (64 if options.quick else video.SIZE)
        for dtype in options.dtypes:
            for mode in options.modes:
                speed = video.Speed(mode, dtype, device, size, options.batch, options.quick, frames)
                found = runner.measure(speed, options.repeats, options.memory)
                keep("speed", {**found, "environment": here}, video.KEYS)
    print("\n\n".join(make() for make in video.parts(content).values()))


def _pair(text: str) -> tuple[str, str]:
    name, sep, place = text.partition("=")
    if not sep:
        raise UsageError(f"--init {text}: write RECIPE=DIR, such as {video_runs.RECIPES[0]}=runs/pictures/best.")
    return name, place


def _lrnet(options: argparse.Namespace) -> None:
    file = options.out / ("lrnet-quick.json" if options.quick else "lrnet.json")
    content: dict[str, Any] = {"kind": "lrnet", **(read(file) or {})}
    device = _device(options.device, options.threads)
    for dtype in options.dtypes:
        for mode in options.modes:
            speed = lrnet.Speed(
                mode, dtype, device, options.size or (32 if options.quick else 224), options.batch, options.quick
            )
            row = {
                **runner.measure(speed, options.repeats, options.memory),
                "environment": environment(options.arguments),
            }
            content["speed"] = detection.merged(content.get("speed", []), row, lrnet.KEYS)
            write(file, content)
    print("\n\n".join(make() for make in lrnet.parts(content).values()))


def _systems(options: argparse.Namespace) -> None:
    file = options.out / "systems.json"
    content: dict[str, Any] = {"kind": "systems", "runs": [], **(read(file) or {})}
    for directory in options.runs:
        content["runs"] = detection.merged(content["runs"], systems.row(directory), systems.KEYS)
    write(file, content)
    print(systems.runs_table(content["runs"]))


def _page(options: argparse.Namespace) -> None:
    if options.list:
        print("\n".join(parts(options.results, options.page)))
        return
    print(f"{options.page.name}: {', '.join(rewrite(options.page, options.results)) or 'no parts'}")


def _alone(options: argparse.Namespace) -> None:
    spec = json.loads(options.spec)
    alone: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"detector": detection_speed.run_alone}
    for kind in (segment.Speed, video.Speed, lrnet.Speed):
        alone[kind.kind] = partial(runner.run_alone, kind)
    print(json.dumps(next((run for name, run in alone.items() if name in spec), run_alone)(spec)))


if __name__ == "__main__":
    sys.exit(main())
