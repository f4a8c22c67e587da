# SPDX-License-Identifier: Apache-2.0
"""Models that several tests of a file read, each made when the first one asks for it."""

from collections.abc import Callable
from pathlib import Path


def made_once(parent: Path, write: Callable[[Path, str], object]) -> Callable[[str], Path]:
    """models(family) -> its folder under ``parent``, which ``write(folder, family)`` makes."""

    made: set[str] = set()

    def get(family: str) -> Path:
        if family not in made:
            write(parent / family, family)
            made.add(family)
        return parent / family

    return get
