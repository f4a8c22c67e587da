#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of formats in docs/quality.md from benchmarks/results/quality_cpu.csv.

With --check, write nothing and end with 1 if the table is not current.
"""

from __future__ import annotations

import csv
import sys

import docs_table

RESULTS = docs_table.ROOT / "benchmarks" / "results" / "quality_cpu.csv"
PAGE = "docs/quality.md"
BEGIN = "<!-- formats: written by scripts/docs_quality.py -->\n"
END = "<!-- end of formats -->\n"
_HEADER = (
    "| weights | bits | MiB | perplexity, A16 | A8, FP8 | A8, INT8 | A4 "
    "| KL, A16 | A8, FP8 | A8, INT8 | A4 |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
_ACTIVATIONS = ("16", "8", "int8", "4")


def table(results: str) -> str:
    """A Markdown table: a line for each format, a column for each type of activations.

    results: the text of the CSV; lines that begin with "#" are its header
    """
    lines = [line for line in results.splitlines() if not line.startswith("#")]
    by_format: dict[str, dict[str, dict[str, str]]] = {}
    for row in csv.DictReader(lines):
        by_format.setdefault(row["weights"], {})[row["activations"]] = row
    text = _HEADER
    for name, rows in by_format.items():
        a16 = rows["16"]
        size = f"{float(a16['bits_per_weight']):.2f} | {float(a16['layer_mib']):.1f}"
        ppl = f"{float(a16['ppl']):.2f}, {_increase(a16)}"
        others = " | ".join(_increase(rows.get(bits)) for bits in _ACTIVATIONS[1:])
        kl = " | ".join(f"{float(rows[b]['kl']):.3f}" if b in rows else "" for b in _ACTIVATIONS)
        text += f"| {name} | {size} | {ppl} | {others} | {kl} |\n"
    return text


def _increase(row: dict[str, str] | None) -> str:
    """Of the perplexity, over BF16; empty for what was not measured."""
    if row is None:
        return ""
    return f"{float(row['ppl_increase_pct']):+.1f} ± {float(row['standard_error_pct']):.1f} %"


if __name__ == "__main__":
    sys.exit(docs_table.main(__file__, PAGE, BEGIN, END, lambda: table(RESULTS.read_text())))
