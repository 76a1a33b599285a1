"""The table of faults and outcomes: printed after the tests, and in the long form kept as a file and shown in the docs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tests.chaos import LONG, ROOT

from swinscale.manifest import environment

RESULTS = ROOT / "bench" / "results" / "chaos.json"
PAGE = ROOT / "docs" / "reliability.md"
PART = re.compile(r"(<!-- chaos -->\n).*?(<!-- /chaos -->)", re.DOTALL)
GROUPS = {
    "kills": "Kills",
    "storage": "Disk and checkpoints",
    "data": "Images, shards and loader processes",
    "numbers": "Numbers and memory",
    "processes": "Several processes",
    "soak": "Long runs",
}


class Fault:
    """A row of the table, filled in while its test runs; without an outcome it has failed."""

    def __init__(self, group: str, name: str):
        self.row: dict[str, Any] = {"group": group, "fault": name, "outcome": None, "measured": {}}

    def outcome(self, text: str, **measured: Any) -> None:
        """What was found, once everything about it is asserted."""
        self.row |= {"outcome": text, "measured": measured}


def report(terminalreporter: Any, config: Any) -> None:
    """After all tests: prints the table if a test of it ran; a whole long run rewrites the file and the page."""
    rows = collect(terminalreporter.stats)
    if not rows:
        return
    terminalreporter.section("faults tried and outcomes")
    terminalreporter.write(printed(rows, terminalreporter._tw.fullwidth))
    if LONG and not config.option.keyword and {row["group"] for row in rows} == set(GROUPS):
        content = {"kind": "chaos", "environment": environment() | {"command": "make chaos"}, "faults": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        rewrite(PAGE, content)
        terminalreporter.write_line(f"written: {RESULTS.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


def collect(stats: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The rows that tests left in their reports, in the order of ``GROUPS``."""
    rows = []
    for result in ("passed", "failed", "xfailed", "xpassed"):
        for report in stats.get(result, ()):
            if getattr(report, "when", "") != "call":
                continue
            for key, row in report.user_properties:
                if key == "chaos":
                    found = row["outcome"] if result in ("passed", "xpassed") else f"NOT AS EXPECTED: {_why(report)}"
                    rows.append({**row, "outcome": found, "as_expected": result in ("passed", "xpassed"),
                                 "seconds": round(report.duration, 1)})  # fmt: skip
    order = list(GROUPS)
    return sorted(rows, key=lambda row: order.index(row["group"]))


def _why(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return (getattr(report, "wasxfail", "") or text.splitlines()[0])[:150]


def printed(rows: list[dict[str, Any]], width: int) -> str:
    """The table for a terminal."""
    table = Table("fault", "outcome", "s", expand=False)
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            table.add_section()
            table.add_row(f"[bold]{GROUPS[group]}[/bold]")
        table.add_row(row["fault"], row["outcome"], f"{row['seconds']:.1f}", style="" if row["as_expected"] else "red")
    out = Console(file=io.StringIO(), width=max(width, 100), highlight=False)
    out.print(table)
    return out.file.getvalue()  # type: ignore[attr-defined]


def markdown(content: dict[str, Any]) -> str:
    """The part of the page that is made from the file."""
    place = content["environment"]
    machine, versions = place["machine"], place["versions"]
    bad = [row for row in content["faults"] if not row["as_expected"]]
    parts = [
        f"{len(content['faults'])} faults, {len(content['faults']) - len(bad)} with the outcome that is expected. "
        f"{place['date'][:10]}, commit {place['commit']}, Python {versions['python']}, PyTorch {versions['torch']}, "
        f"{machine['processor']}, {machine['cpus']} cores, {machine['system']}.",
    ]
    for group, title in GROUPS.items():
        lines = [f"### {title}", "", "| fault | outcome | seconds", "|---|---|---"]
        lines += [
            f"| {row['fault']} | {row['outcome'] if row['as_expected'] else '**' + row['outcome'] + '**'} | {row['seconds']}"
            for row in content["faults"]
            if row["group"] == group
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def rewrite(page: Path, content: dict[str, Any]) -> None:
    """Replaces the measured part of ``page``."""
    text = page.read_text()
    page.write_text(PART.sub(lambda m: f"{m[1]}\n{markdown(content)}\n\n{m[2]}", text))
