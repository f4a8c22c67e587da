#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of speeds in README.md and docs/plan-and-bench.md, from one committed run.

With --check, write nothing and end with 1 if a table is not current.
"""

from __future__ import annotations

import sys
from functools import partial

import docs_table

from vllm_nvfp4.bench import results

FOLDER = docs_table.ROOT / "benchmarks" / "results" / "smollm2_cpu"
SHORT = (1, 8, 32)
"""The batches of the README's table."""
BEGIN = "<!-- speeds: written by scripts/docs_bench.py -->\n"
END = "<!-- end of speeds -->\n"
_HEADER = (
    "| requests at once | BF16, tok/s | NVFP4, tok/s | times as fast |\n| --- | --- | --- | --- |\n"
)


def table(run: results.Results) -> str:
    """A Markdown table, a line for each batch: medians, and the least and largest ratio of a turn.

    run: two variants, NVFP4 first
    """
    own, other = run.variants
    ratios = results.ratios(run, other.name, results.BATCH, "output_throughput")
    theirs = {row.batch: row.tokens_per_s.median for row in results.batch_rows(run, other)}
    text = _HEADER
    for row in results.batch_rows(run, own):
        ratio, speed = ratios[row.batch], row.tokens_per_s.median
        text += (
            f"| {row.batch} | {theirs[row.batch]:.1f} | {speed:.1f} | "
            f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |\n"
        )
    return text


def short_table(run: results.Results) -> str:
    """A Markdown table, a line for each variant: medians of tokens/s, and of the first token at the
    lowest load.

    run: two variants, NVFP4 first
    """
    own, other = run.variants
    text = "| | " + " | ".join(f"batch {batch}" for batch in SHORT)
    text += f" | first token, {run.settings['load_prompt_tokens']}-token prompt |\n"
    text += "| --- " * (len(SHORT) + 2) + "|\n"
    ratios = results.ratios(run, other.name, results.BATCH, "output_throughput")
    for record, label in ((other, "BF16"), (own, "NVFP4")):
        speeds = {row.batch: row.tokens_per_s.median for row in results.batch_rows(run, record)}
        cells = [
            f"{speeds[batch]:.3g} tok/s" + (f", {ratios[batch].median:.2f}x" * (record is own))
            for batch in SHORT
        ]
        first = results.rate_rows(run, record.name)[0].ttft.median
        text += f"| {label} | {' | '.join(cells)} | {first:.0f} ms |\n"
    return text


def main() -> int:
    run = results.load(FOLDER)
    parts = {"docs/plan-and-bench.md": table, "README.md": short_table}
    return max(
        docs_table.main(__file__, page, BEGIN, END, partial(part, run))
        for page, part in parts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
