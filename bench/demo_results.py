"""Keeps what a demo measured: ``python bench/demo_results.py runs/demo`` writes ``bench/results/demo.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "demo.json"


def main(home: Path) -> None:
    """Accuracy, seconds and settings of the three runs, with machine, versions and date."""
    found = {}
    for name in ("simmim", "finetuned", "scratch"):
        result = json.loads((home / name / "result.json").read_text())
        measures = {k: v for k, v in result["metrics"].items() if isinstance(v, float)}
        found[name] = {"measures": measures, "steps": result["steps"], "seconds": round(result["seconds"])}
    manifest = json.loads((home / "simmim" / "manifest.json").read_text())
    shared = {k: manifest[k] for k in ("date", "versions", "machine", "commit", "precision", "parameters")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"runs": found, **shared}, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
