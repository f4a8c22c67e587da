# SPDX-License-Identifier: Apache-2.0
"""What a clone brings along."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 4 << 20


def test_the_tracked_files_stay_small():
    """The repository travels to machines without a network, and most of it is read by people."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.split(b"\0")
    paths = [ROOT / name.decode() for name in listed if name]
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    total = sum(sizes.values())
    assert total < MOST_BYTES, f"{total} bytes; the largest are {[p.name for p in largest]}"
