# SPDX-License-Identifier: Apache-2.0
"""The road of a GPU on a machine without one, as ``make rehearse`` walks it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.trust

ROOT = Path(__file__).resolve().parents[2]


def test_no_step_fails(tmp_path: Path, count: Callable[..., None]) -> None:
    table = tmp_path / "table.txt"
    command = [sys.executable, str(ROOT / "scripts" / "rehearse.py"), "--table", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    releases = Counter(row.split()[0] for row in rows)
    assert set(releases) >= {"0.32.0", "0.33.0"}
    # Every card was walked, and a checkpoint loaded on it.
    loads = {tuple(row.split()[:2]) for row in rows if " load " in row}
    assert loads >= {(r, card) for r in releases for card in ("8.9", "9.0", "8.6", "12.0")}
    count(releases=len(releases), steps=len(rows), waiting=last.split(", ")[2].split()[0])
