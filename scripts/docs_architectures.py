#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write what `make models` found into README.md, from benchmarks/results/models.csv.

With --check, write nothing and end with 1 if it is not current.
"""

from __future__ import annotations

import csv
import sys
import textwrap
from collections.abc import Mapping, Sequence

import docs_table

from vllm_nvfp4.testing.architectures import ARCHITECTURES

PAGE = "README.md"
TABLE = "benchmarks/results/models.md"
BEGIN = "<!-- architectures: written by scripts/docs_architectures.py -->\n"
END = "<!-- end of architectures -->\n"
ROADS = ("online", "modelopt", "compressed-tensors")
SHOWN = "picture or sound"
_WIDTH = 104


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit()


def _worst(rows: Sequence[Mapping[str, str]], dtype: str) -> float:
    rows = [r for r in rows if ARCHITECTURES[r["architecture"]].dtype == dtype]
    return max(float(r[road]) for r in rows for road in ROADS)


def read_rows() -> list[dict[str, str]]:
    """What `make models` found."""
    with (docs_table.ROOT / TABLE).with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def is_refused(row: Mapping[str, str]) -> bool:
    """Whether stock vLLM itself refuses the architecture on a CPU."""
    return all(row[road].startswith("refused") for road in ROADS)


def paragraph() -> str:
    """How many architectures agree with stock vLLM, by which road, and how far."""
    rows = read_rows()
    good = [r for r in rows if all(_is_number(r[road]) for road in ROADS)]
    refused = [r for r in rows if is_refused(r)]
    others = [r["architecture"] for r in rows if r not in good and r not in refused]
    shown = sum(_is_number(r.get(SHOWN) or "") for r in rows)
    calibrated = sum(_is_number(r.get("gptq") or "") for r in rows)
    seen = f"; {shown} of them after a picture, or sound, too" if shown else ""
    exact, rounded = _worst(good, "float32"), _worst(good, "bfloat16")
    text = (
        f"`make models`, two CPU cores, vLLM 0.32: of {len(rows)} architectures as tiny models "
        f"with random weights, {len(good)} give stock vLLM's log-probabilities, or "
        "embeddings, on the same weights dequantised, online and in both dialects that "
        f"`quantize` writes, in prefill and in decode: to {exact:.0e} in float32, and to "
        f"{rounded:.2f} in BF16 where vLLM's kernels want it{seen}. Stock vLLM "
        f"refuses {len(refused)} on a CPU. "
    )
    if others:
        text += f"In part: {', '.join(others)}. "
    if calibrated:
        text += f"{calibrated} of the most used are calibrated by gptq too. "
    text += f"[The table]({TABLE}) has tensor parallelism, LoRA and MTP too."
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


if __name__ == "__main__":
    sys.exit(docs_table.main(__file__, PAGE, BEGIN, END, paragraph))
