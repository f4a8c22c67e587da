#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of speeds in docs/plan-and-bench.md, from results/smollm2_cpu/bench.json.

With --check, write nothing and end with 1 if the table is not current.
"""

from __future__ import annotations

import sys

import docs_table

from vllm_nvfp4.bench import results

FOLDER = docs_table.ROOT / "benchmarks" / "results" / "smollm2_cpu"
PAGE = "docs/plan-and-bench.md"
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


if __name__ == "__main__":
    sys.exit(docs_table.main(__file__, PAGE, BEGIN, END, lambda: table(results.load(FOLDER))))
