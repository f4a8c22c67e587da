# SPDX-License-Identifier: Apache-2.0
"""A part of README.md or docs/ that a script writes, between two marks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_current_part(text: str, name: str, begin: str, end: str, part: str) -> str:
    """The text with what stands between the lines ``begin`` and ``end`` replaced by ``part``.

    name: of the file, for the error. Raises ValueError unless each mark is there once.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{name}: needs once each of {begin.strip()} and {end.strip()}")
    before, _, rest = text.partition(begin)
    return before + begin + part + end + rest.partition(end)[2]


def main(script: str, page: str, begin: str, end: str, part: Callable[[], str]) -> int:
    """Write the part into a page. With --check, write nothing and return 1 if it is not current.

    page: relative to the repository
    """
    path = ROOT / page
    text = path.read_text()
    current = with_current_part(text, page, begin, end, part())
    if current == text:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{page}: a part is not current; run scripts/{Path(script).name}")
        return 1
    path.write_text(current)
    return 0
