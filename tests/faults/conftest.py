"""Faults and bad input. The run ends with a table: fault, tries, survived, and what was measured; docs/faults.md has this one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`tally(tries=50, survived=50, slowest="1.2 s")`: what a test of many tries did; one that says nothing is one try."""

    def count(**figures: Any) -> None:
        request.node.user_properties += list(figures.items())

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, a row for each file of tests."""
    rows: dict[str, dict[str, Any]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when != "call" or "tests/faults/" not in report.nodeid:
                continue
            figures = dict(report.user_properties)
            row = rows.setdefault(Path(report.nodeid.split("::")[0]).stem, {"tries": 0, "survived": 0, "seconds": 0.0})
            tries = figures.pop("tries", 1)
            row["tries"] += tries
            row["survived"] += figures.pop("survived", tries if report.passed else 0)
            row["seconds"] += report.duration
            row.update(figures)
    if rows:
        terminalreporter.section("faults")
    for name, row in sorted(rows.items()):
        more = ", ".join(
            f"{key.replace('_', ' ')} {value}"
            for key, value in row.items()
            if key not in ("tries", "survived", "seconds")
        )
        told = f"{row['tries']} tries, {row['survived']} survived, {row['seconds']:.0f} s{more and ', ' + more}"
        terminalreporter.write_line(f"{name.removeprefix('test_').replace('_', ' ')}: {told}")
