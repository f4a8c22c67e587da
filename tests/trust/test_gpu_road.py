# SPDX-License-Identifier: Apache-2.0
"""The road of a GPU on a machine without one, as ``make rehearse`` walks it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.trust

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("lock-cuda*.txt"))
CARDS = ("8.9", "9.0", "8.6", "12.0")


def test_every_release_of_vllm_has_its_lock() -> None:
    assert {lock.stem for lock in LOCKS} == {"lock-cuda", "lock-cuda-0.32"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_no_step_fails(lock: Path, tmp_path: Path, count: Callable[..., None]) -> None:
    table = tmp_path / "table.txt"
    command = [sys.executable, str(ROOT / "scripts" / "rehearse.py"), "--lock", str(lock)]
    done = subprocess.run(
        [*command, "--table", str(table)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    # Every card was walked, and a checkpoint loaded on it.
    assert {row.split()[1] for row in rows if " load " in row} == set(CARDS)
    steps, failed, waiting, _ = (part.split()[0] for part in last.split(", "))
    assert failed == "0"
    count(steps=steps, waiting=waiting)
