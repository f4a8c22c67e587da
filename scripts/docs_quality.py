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
        widths = [rows[name] for name in _ACTIVATIONS]
        increases = [
            f"{float(r['ppl_increase_pct']):+.1f} ± {float(r['standard_error_pct']):.1f} %"
            for r in widths
        ]
        size = f"{float(widths[0]['bits_per_weight']):.2f} | {float(widths[0]['layer_mib']):.1f}"
        kl = " | ".join(f"{float(r['kl']):.3f}" for r in widths)
        ppl = f"{float(widths[0]['ppl']):.2f}, {increases[0]}"
        text += f"| {name} | {size} | {ppl} | {' | '.join(increases[1:])} | {kl} |\n"
    return text


if __name__ == "__main__":
    sys.exit(docs_table.main(__file__, PAGE, BEGIN, END, lambda: table(RESULTS.read_text())))
