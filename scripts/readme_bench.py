#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of speeds in README.md from benchmarks/results/smollm2_cpu/bench.json.

With --check, write nothing and end with 1 if the table is not current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_nvfp4.bench import results

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FOLDER = ROOT / "benchmarks" / "results" / "smollm2_cpu"
BEGIN = "<!-- speeds: written by scripts/readme_bench.py -->\n"
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


def with_current_table(text: str) -> str:
    """The README with the table between its two marks replaced by the one of the results."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README.name}: needs once each of {BEGIN.strip()} and {END.strip()}")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(results.load(FOLDER)) + END + rest.partition(END)[2]


def main() -> int:
    text = README.read_text()
    current = with_current_table(text)
    if current == text:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{README.name}: the table of speeds is not current; run {Path(__file__).name}")
        return 1
    README.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
