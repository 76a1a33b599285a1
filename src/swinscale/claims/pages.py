"""Markdown pages made of result files alone: one per claim, and an overview. Every number in them is in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swinscale.checkpoint import write_atomically
from swinscale.claims.results import draw, read_results

ORDER = ("desk", "gpu", "paper")
MARKS = {
    "reproduced": "✔ reproduced",
    "not reproduced": "✘ not reproduced",
    "not decided at this scale": "○ not decided",
}


def write_pages(folder: Path, order: Sequence[str]) -> Path:
    """Writes ``folder``/NAME/README.md for every claim with results, draws their pictures, and writes the overview.

    Args:
        order: names of all claims, in the order in which the overview lists them.
    """
    results = read_results(folder)
    for content in results:
        draw(content, folder / content["name"])
    for name in {content["name"] for content in results}:
        ours = [content for content in results if content["name"] == name]
        write_atomically(folder / name / "README.md", claim_page(ours))
    page = folder / "README.md"
    write_atomically(page, overview(results, order))
    return page


def claim_page(results: Sequence[Mapping[str, Any]]) -> str:
    """All scales of one claim."""
    results = sorted(results, key=lambda r: ORDER.index(r["scale"]))
    first = results[0]
    lines = [f"# {first['title']}", "", first["sentence"], "", f"Source: {first['source']}."]
    if first["published"]:
        rows = [(p["what"], p["value"], p["source"]) for p in first["published"]]
        lines += ["", "## Published", "", *_table(("what", "value", "source"), rows)]
    for content in results:
        lines += ["", *_section(content)]
    return "\n".join(lines) + "\n"


def _section(content: Mapping[str, Any]) -> list[str]:
    lines = [f"## Measured, {content['scale']} scale: {MARKS[content['verdict']]}", "", content["settings"], ""]
    rows = [
        (f["statement"], f["published"], f["measured"], f["rule"], MARKS[f["verdict"]]) for f in content["findings"]
    ]
    lines += _table(("statement", "published", "measured (95 % interval)", "counts as reproduced if", "verdict"), rows)
    for figure in content["figures"]:
        picture = f"{content['scale']}-{figure['name']}.svg"
        lines += ["", f"![{figure['options']['title']}]({picture})", "", figure["caption"]]
    for table in content["tables"]:
        lines += ["", f"**{table['title']}**", "", *_table(table["header"], table["rows"])]
        lines += ["", table["note"]] if table["note"] else []
    lines += [line for note in content["notes"] for line in ("", note)]
    made, versions = content["environment"], content["environment"]["versions"]
    machine = made["machine"]
    where = f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads"
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "swinscale") if versions.get(name))
    lines += [
        "",
        f"`{made['command']}` on {content['data']}, {content['seeds']} seeds, {content['steps']} steps that took {content['minutes']} "
        f"process minutes; {made['date']}, {where}, {used}, commit {made['commit']}.",
    ]
    return lines


def overview(results: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    """What each claim says, and what came out at each scale."""
    lines = [
        "# The articles' claims, re-run",
        "",
        "Each row is made of result files that `swinscale claims NAME` wrote. A statement counts as reproduced if the whole "
        "95 % interval over seeds lies on the claimed side, as not reproduced if it lies on the other, and is not decided "
        "otherwise; a claim of several statements needs all of them. The rules stand in the modules of the claims and were "
        "written before the runs; where a figure was known before its rule, the page of the claim says so. Figures of the "
        "desk scale come from small networks, small pictures and minutes: they say whether an effect is visible there, not "
        "what the large models do.",
        "",
    ]
    rows = []
    for name in order:
        ours = sorted((r for r in results if r["name"] == name), key=lambda r: ORDER.index(r["scale"]))
        for content in ours:
            counts = [MARKS[f["verdict"]] for f in content["findings"]]
            held = ", ".join(f"{counts.count(mark)} {mark.split(' ', 1)[1]}" for mark in dict.fromkeys(counts))
            rows.append((f"[{content['title']}]({name}/README.md)", content["scale"], MARKS[content["verdict"]], held))
        if not ours:
            rows.append((name, "", "not measured", ""))
    lines += _table(("claim", "scale", "verdict", "statements"), rows)
    for name in order:
        for content in (r for r in results if r["name"] == name and r["scale"] == "desk"):
            lines += ["", f"## {content['title']}", ""]
            lines += [f"* {MARKS[f['verdict']]}: {f['statement']}: {f['measured']}" for f in content["findings"]]
            for figure in content["figures"][:1]:
                lines += ["", f"![{figure['options']['title']}]({name}/{content['scale']}-{figure['name']}.svg)"]
    lines += ["", "Not measured: the scales that have no row. Their commands: `swinscale claims NAME --scale gpu`.", ""]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(show(value).replace("|", "\\|") for value in row) + " |" for row in rows),
    ]


def show(value: Any) -> str:
    """A cell: numbers with four digits, intervals as "81.2 (80.9 – 81.5)"."""
    if isinstance(value, dict):
        value = [value["estimate"], value["low"], value["high"]]
        if None in value[1:]:
            return show(value[0])
        return f"{show(value[0])} ({show(value[1])} – {show(value[2])})"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
