# SPDX-License-Identifier: Apache-2.0
"""The terminal, for tables."""

from __future__ import annotations

from typing import Any, NoReturn

from rich.console import Console


class PlainConsole(Console):
    """rich's console; a reader that has gone (head, less) is a BrokenPipeError as anywhere else."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def table_console(**options: Any) -> PlainConsole:
    """A console that colours nothing by guessing."""
    return PlainConsole(highlight=False, **options)
