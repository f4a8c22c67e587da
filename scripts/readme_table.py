# SPDX-License-Identifier: Apache-2.0
"""A table of README.md that a script writes, between two marks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def with_current_table(text: str, begin: str, end: str, table: str) -> str:
    """The text with what stands between the lines ``begin`` and ``end`` replaced by the table.

    Raises ValueError unless each of them is there once.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{README.name}: needs once each of {begin.strip()} and {end.strip()}")
    before, _, rest = text.partition(begin)
    return before + begin + table + end + rest.partition(end)[2]


def main(script: str, begin: str, end: str, table: Callable[[], str]) -> int:
    """Write the table into README.md. With --check, write nothing and return 1 if it is not
    current."""
    text = README.read_text()
    current = with_current_table(text, begin, end, table())
    if current == text:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{README.name}: a table is not current; run scripts/{Path(script).name}")
        return 1
    README.write_text(current)
    return 0
