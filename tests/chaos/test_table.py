"""The page shows what the file holds, and a fault without its outcome shows as such."""

from __future__ import annotations

import json
from types import SimpleNamespace

from tests.chaos import table


def report(row, **more):
    return SimpleNamespace(when="call", duration=1.0, user_properties=[("chaos", row)], longrepr="", **more)


def test_the_page_is_made_from_the_file():
    content = json.loads(table.RESULTS.read_text())
    assert table.markdown(content) in table.PAGE.read_text()


def test_a_fault_without_its_outcome_is_told():
    good = table.Fault("kills", "one")
    good.outcome("resumed")
    bad = table.Fault("data", "other")
    failure = SimpleNamespace(reprcrash=SimpleNamespace(message="AssertionError: hang\nmore"))
    failed = report(bad.row)
    failed.longrepr = failure
    rows = table.collect({"failed": [failed], "passed": [report(good.row)]})
    assert [(r["fault"], r["outcome"], r["as_expected"]) for r in rows] == [
        ("one", "resumed", True),
        ("other", "NOT AS EXPECTED: AssertionError: hang", False),
    ]
    place = {"machine": {"processor": "p", "cpus": 2, "system": "s"}, "versions": {"python": "3", "torch": "2"},
             "date": "2026-01-01T00:00", "commit": "c"}  # fmt: skip
    page = table.markdown({"environment": place, "faults": rows})
    assert "2 faults, 1 with the outcome that is expected" in page
    assert "| other | **NOT AS EXPECTED: AssertionError: hang** |" in page
    assert "NOT AS EXPECTED" in table.printed(rows, 100)
