# SPDX-License-Identifier: Apache-2.0
"""The long runs, chosen by `make trust`: each test counts what it did, and one table shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_COUNTS = "trust counts"


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``count(requests=500, errors=0)``: what the closing table says beside the test's name."""
    return lambda **counts: record_property(_COUNTS, counts)


def _counts(report: Any) -> dict[str, Any]:
    found = (value for name, value in report.user_properties if name == _COUNTS)
    return {key: number for counts in found for key, number in counts.items()}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per run: outcome, seconds, counts."""
    rows = [
        (report.nodeid.split("tests/trust/")[-1], outcome, report)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" and "trust" in report.keywords
    ]
    if not rows:
        return
    terminalreporter.section("trust")
    for name, outcome, report in sorted(rows, key=lambda row: row[0]):
        counts = ", ".join(
            f"{key.replace('_', ' ')} {number}" for key, number in _counts(report).items()
        )
        terminalreporter.line(f"{name}  {outcome}  {report.duration:.1f} s  {counts}")
    total = sum(report.duration for _, _, report in rows)
    failed = sum(outcome == "failed" for _, outcome, _ in rows)
    terminalreporter.line(f"{len(rows)} runs, {failed} failed, {total:.0f} s")
