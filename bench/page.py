"""``python -m bench page``: the measured parts of ``docs/performance.md``, from the files in ``bench/results``.

A part stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``; NAME is the file and what to show of it, such as
``cpu.goals``. ``python -m bench page --list`` names all that there is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import detection, export, goals, lrnet, memory, overfit, segment, systems, tables, video, vitals
from swinscale.config import suggest
from swinscale.errors import UsageError

PART = re.compile(r"(<!-- bench:([\w.-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
Parts = dict[str, Callable[[], str]]


def parts(results: Path, page: Path) -> Parts:
    """Everything that a page can show, by name."""
    found: Parts = {}
    for file in sorted(results.glob("*.json")):
        content = json.loads(file.read_text())
        makers = {
            "cases": _cases,
            "gpu": _gpu,
            "scaling": _scaling,
            "where": _where,
            "giant": _giant,
            "memory": memory.parts,
            "export": export.parts,
            "vitals": vitals.parts,
            "overfit": overfit.parts,
            "detect": detection.parts,
            "segment": segment.parts,
            "lrnet": lrnet.parts,
            "systems": systems.parts,
            "video": video.parts,
        }.get(content.get("kind"))
        if makers is None:
            continue
        for name, make in makers(content).items():
            found[f"{file.stem}.{name}"] = make
        for picture in sorted(results.glob(f"{file.stem}-*.png")):
            link = os.path.relpath(picture, page.parent).replace(os.sep, "/")
            found[f"{picture.stem}.picture"] = lambda link=link, name=picture.stem: f"![{name}]({link})"  # type: ignore[misc]
    return found


def _cases(content: dict[str, Any]) -> Parts:
    made: Parts = {
        "cases": lambda: tables.cases_table(content["cases"]),
        "machine": lambda: tables.machine(content["environment"]),
    }
    if content.get("goals"):
        made["goals"] = lambda: tables.goals_table(goals.cpu_goals(content["cases"]))
    return made


def _gpu(content: dict[str, Any]) -> Parts:
    sections = content["sections"]
    made: Parts = {name: lambda name=name: tables.section_table(name, sections) for name in sections}  # type: ignore[misc]
    made["goals"] = lambda: tables.goals_table(goals.gpu_goals(sections))
    made["machine"] = lambda: tables.machine(content["environment"])
    return made


def _scaling(content: dict[str, Any]) -> Parts:
    return {
        "area": lambda: tables.curve_table(content["area"]),
        "window": lambda: tables.curve_table(content["window"]),
        "goals": lambda: tables.goals_table([goals.linearity_goal(content)]),
        "machine": lambda: tables.machine(content["environment"]),
    }


def _giant(content: dict[str, Any]) -> Parts:
    return {
        "steps": lambda: tables.training_steps_table(content),
        "losses": lambda: tables.losses_line(content),
        "machine": lambda: tables.machine(content["environment"]),
    }


def _where(content: dict[str, Any]) -> Parts:
    made: Parts = {
        mode: lambda profile=profile: tables.profile_table(profile)  # type: ignore[misc]
        for mode, profile in content["profiles"].items()
    }
    made["choices"] = lambda: tables.choices_table(content["choices"])
    made["machine"] = lambda: tables.machine(content["environment"])
    return made


def rewrite(page: Path, results: Path) -> list[str]:
    """Replaces every part of ``page``; makes a page with all of them if there is none. Returns the names of its parts.

    Raises:
        UsageError: for a part that the results do not have.
    """
    known = parts(results, page)
    if not page.exists():
        body = "\n\n".join(f"<!-- bench:{name} -->\n<!-- /bench -->" for name in known)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"# Performance\n\nTables and pictures are written by `python -m bench page`.\n\n{body}\n")
    text, used = page.read_text(), []
    if text.count("<!-- bench:") != len(PART.findall(text)):
        raise UsageError(f"{page.name}: a '<!-- bench:NAME -->' has no '<!-- /bench -->' after it.")

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in known:
            raise UsageError(
                f"{page.name} wants 'bench:{name}', which is not in {results.name}.{suggest(name, known)} "
                f"There are: {', '.join(known) or 'none'}."
            )
        used.append(name)
        return f"{match[1]}\n{known[name]()}\n\n{match[3]}"

    page.write_text(PART.sub(replace, text))
    return used
