# SPDX-License-Identifier: Apache-2.0
"""The text of ``inspect``: a table, or in a narrow terminal a paragraph for each layer."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_nvfp4.cli.inspect import Row

# Columns that the table needs.
_TABLE_WIDTH = 130
_NUMBERS = ("count", "shape", "bits/weight", "bytes", "on a GPU")
_HEADINGS = ("layer", "count", "format", "algorithm", *_NUMBERS[1:], "path")


def _print_narrow(
    title: str, rows: Sequence[Row], totals: Sequence[Row], remarks: Sequence[str], width: int
) -> None:
    """A paragraph for each layer, and the totals, in ``width`` columns."""

    def say(text: str, indent: str = "") -> None:
        print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent,
                            break_on_hyphens=False))  # fmt: skip

    say(title)
    for row in rows:
        print()
        say(row.name)
        shape = " x ".join(map(str, row.shape))
        say(
            f"{row.count} of {shape} in {row.format}, {row.bits_per_weight:.2f} bits per weight, "
            f"{_size(row.num_bytes)} stored, {_size(row.held_bytes)} on a GPU: {row.path}",
            "    ",
        )
    print(f"\n{'in all':18} {'format':7} {'layers':>6} {'weights':>15} {'bits':>5} "
          f"{'stored':>10} {'on a GPU':>10}")  # fmt: skip
    for row in totals:
        print(
            f"{row.name:18} {row.format:7} {row.count:6} {row.num_weights:15,} "
            f"{row.bits_per_weight:5.2f} {_size(row.num_bytes):>10} {_size(row.held_bytes):>10}"
        )
    for line in remarks:
        say(line)


def _size(num_bytes: int) -> str:
    """Bytes with a unit, powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def print_tables(
    title: str, rows: Sequence[Row], totals: Sequence[Row], remarks: Sequence[str]
) -> None:
    from rich.table import Table

    from vllm_nvfp4.serving.console import table_console

    # Piped output is for grep and files: never cut a line to the width of a terminal.
    console = table_console() if sys.stdout.isatty() else table_console(width=200)
    if console.width < _TABLE_WIDTH:
        _print_narrow(title, rows, totals, remarks, console.width)
        return
    console.print(title, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left")
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        table.add_row(
            row.name,
            str(row.count),
            row.format,
            row.algo,
            shape,
            f"{row.bits_per_weight:.2f}",
            f"{row.num_bytes:,}",
            f"{row.held_bytes:,}",
            row.path,
        )
    table.add_section()
    for row in totals:
        table.add_row(
            row.name,
            str(row.count),
            row.format,
            "",
            f"{row.num_weights:,}",
            f"{row.bits_per_weight:.2f}",
            f"{row.num_bytes:,}",
            f"{row.held_bytes:,}",
            "",
        )
    console.print(table)
    for line in remarks:
        console.print(line, highlight=False, soft_wrap=True)
