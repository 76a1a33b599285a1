"""``swinscale claims``: list claims, run them, and make their pages."""

from __future__ import annotations

import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from swinscale.claims import CLAIMS
from swinscale.claims.base import Claim, Scale
from swinscale.claims.pages import MARKS, write_pages
from swinscale.claims.results import read_results, record, write_result
from swinscale.claims.runner import minutes_taken, run_steps
from swinscale.config import suggest
from swinscale.errors import UsageError, speaks
from swinscale.recipes import Recipe

BUNDLED = "bundled:fashion-mnist"


def run_claims(
    names: Sequence[str],
    scale: Scale,
    *,
    data: str = BUNDLED,
    seeds: int | None = None,
    jobs: int | None = None,
    out: Path = Path("docs/claims"),
    runs: Path = Path("runs/claims"),
    plan: bool = False,
    pages: bool = False,
) -> None:
    """Runs the experiments of some claims and writes what came out.

    Args:
        data: labelled images with train and test parts (``swinscale.data.open_source``); a compressed tar file is unpacked
            once, into ``runs``.
        seeds: runs per arm; None: as many as the claim says.
        jobs: steps at a time; None: one per two threads and at least two on a CPU, one on a GPU.
        out: where NAME/SCALE.json, NAME/README.md and the pictures go.
        runs: where the runs themselves go; a second call goes on from there.
        plan: print the steps, and stop.
        pages: make pages and pictures of the files in ``out`` anew, and run nothing.

    Raises:
        UsageError: for an unknown claim, images that do not serve, or a step that failed.
    """
    console = Console(highlight=False, quiet=not speaks())
    if pages:
        console.print(f"Wrote {write_pages(out, list(CLAIMS))}", markup=False)
        return
    if not names:
        _list(out, console)
        return
    for name in names:
        if name not in CLAIMS:
            raise UsageError(f"Unknown claim '{name}'.{suggest(name, CLAIMS)} Allowed: {', '.join(CLAIMS)}.")
    read_results(out)  # before hours of work, whether it can be written there
    data = _unpacked(data, runs)
    jobs = jobs or (1 if torch.cuda.is_available() or scale == "paper" else max(2, torch.get_num_threads() // 2))
    for name in dict.fromkeys(names):
        _run(CLAIMS[name], scale, data, seeds, jobs, out, runs, plan, console)


def _run(
    claim: Claim,
    scale: Scale,
    data: str,
    seeds: int | None,
    jobs: int,
    out: Path,
    runs: Path,
    plan: bool,
    console: Console,
) -> None:
    count = seeds or claim.seeds
    steps = claim.steps(scale, data, count)
    console.print(f"{claim.title}, {scale} scale: {len(steps)} steps. {claim.settings(scale)}", markup=False)
    if plan:
        for step in steps:
            recipe = step.arguments.get("recipe")
            told = f", {recipe.name}: {recipe.train.epochs:.3g} epochs" if isinstance(recipe, Recipe) else ""
            console.print(
                f"  {step.name}{told}" + (f" (after {', '.join(step.after)})" if step.after else ""), markup=False
            )
        return
    place = runs / scale / claim.name
    results = run_steps(steps, place, jobs, console)
    if not speaks():
        return
    minutes = minutes_taken(steps, place)
    outcome = claim.read(scale, results)
    shown = data if data.startswith("bundled:") else Path(data).stem
    command = " ".join(["swinscale", *(Path(word).name if "/" in word else word for word in sys.argv[1:])])
    content = record(claim, scale, shown, count, outcome, command, minutes, len(steps))
    place = write_result(out, content)
    write_pages(out, list(CLAIMS))
    for finding in outcome.findings:
        console.print(
            f"  {MARKS[finding.verdict]}: {finding.statement}: {finding.measured}", markup=False, soft_wrap=True
        )
    console.print(f"{MARKS[outcome.verdict]}. Wrote {place}", markup=False, soft_wrap=True)


def _list(out: Path, console: Console) -> None:
    """All claims, and what was found so far."""
    verdicts = {(r["name"], r["scale"]): r["verdict"] for r in read_results(out)}
    table = Table("name", "claim", "desk", "gpu", "paper")
    for name, claim in CLAIMS.items():
        found = [
            MARKS[verdicts[name, s]] if (name, s) in verdicts else "not measured" for s in ("desk", "gpu", "paper")
        ]
        table.add_row(name, claim.title, *found)
    console.print(table)


def _unpacked(data: str, runs: Path) -> str:
    """A plain tar file in place of a compressed one, in which no single picture can be read."""
    path = Path(data).expanduser()
    if path.suffixes[-2:-1] != [".tar"] or not path.is_file():
        return data
    plain = runs / "data" / path.stem
    if not plain.exists():
        plain.parent.mkdir(parents=True, exist_ok=True)
        part = plain.with_suffix(".part")
        try:
            with tarfile.open(path) as packed, tarfile.open(part, "w") as out:
                for member in packed:
                    out.addfile(member, packed.extractfile(member) if member.isfile() else None)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UsageError(f"{path} cannot be unpacked: {error}.") from None
        shutil.move(part, plain)
    return str(plain)
