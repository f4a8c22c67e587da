# SPDX-License-Identifier: Apache-2.0
"""A run in a sentence, and the line that measures it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from vllm_nvfp4.bench.results import BATCH, BatchRow, Results, Spread, batch_rows, ratios


def first_sentence(runs: Mapping[str, Results]) -> str:
    """The result of one run, or what is the fastest of several."""
    if len(runs) == 1:
        return _of_one(next(iter(runs.values())))
    found = [
        (row, f"{_short(record.name)} of {name}")
        for name, run in runs.items()
        for record in run.variants
        for row in batch_rows(run, record)
    ]
    if not found:
        return f"{len(runs)} runs, none of them measured by batch."
    parts = []
    for batch in sorted({found[0][0].batch, *(row.batch for row, _ in found)})[:: _steps(found)]:
        best, name = max(
            ((row, name) for row, name in found if row.batch == batch),
            key=lambda pair: pair[0].tokens_per_s.median,
        )
        parts.append(f"{_number(best.tokens_per_s)} tokens/s at batch {batch} ({name})")
    return f"{len(runs)} runs; the most: {', '.join(parts)}."


def _steps(found: list[tuple[BatchRow, str]]) -> int:
    """So that the least and the greatest batch are named, and no others."""
    return max(len({row.batch for row, _ in found}) - 1, 1)


def _of_one(results: Results) -> str:
    own = results.variants[0]
    rows = batch_rows(results, own)
    if not rows:
        return f"{own.name} on {results.device}: nothing was measured by batch."
    ends = dict.fromkeys((rows[0].batch, rows[-1].batch))
    by_batch = {row.batch: row for row in rows}
    given = " and ".join(f"{_number(by_batch[b].tokens_per_s)} tokens/s at batch {b}" for b in ends)
    sentences = [f"{_short(own.name)} gives {given} on {results.device}."]
    for record in results.variants[1:]:
        found = ratios(results, record.name, BATCH, "output_throughput")
        parts = [_comparison(found[b], b) for b in ends if b in found]
        if parts:
            sentences.append(f"Against {_short(record.name)}: {'; '.join(parts)}.")
    return " ".join(sentences)


def _comparison(ratio: Spread, batch: int) -> str:
    spread = f"{ratio.low:.2f} to {ratio.high:.2f} by turn"
    if ratio.low <= 1 <= ratio.high and ratio.low != ratio.high:
        return f"at batch {batch} the turns do not say which is faster ({spread})"
    word = "times the speed"
    return f"{ratio.median:.2f} {word} at batch {batch} ({spread})"


def _number(spread: Spread) -> str:
    value = spread.median
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(name: str) -> str:
    return re.split(r"[= ]", name)[0]


def reproduce_line(results: Results) -> str:
    """The command of a run as it can be typed again: by its name, into a new folder.

    With the environment that it ran in. The folders of models are as they were given, so it is
    typed where the run was.
    """
    words = shlex.split(results.machine.get("command", ""))
    if words and (Path(words[0]).name in ("main.py", "vllm-nvfp4", "__main__.py")):
        words[0] = "vllm-nvfp4"
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word == "--out" or word.startswith("--out="):
            skip = word == "--out" and not skip
            continue
        kept.append(word)
    environment = results.machine.get("environment", "")
    return f"{environment} {shlex.join(kept)}".strip()
