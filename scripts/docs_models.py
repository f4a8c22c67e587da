#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of models in README.md: what fits, the limit of decoding, how far it is tested.

Sizes and limits are those of `vllm-nvfp4 plan`; the models are those of planning/models.json. How
far a model is tested follows from the tests and from benchmarks/results/models.csv: of which
architectures tiny models are served, of which published checkpoints the layout is known. With
--check, write nothing and end with 1 if the table is not current.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import docs_table

from vllm_nvfp4.planning import choose, fit, rows
from vllm_nvfp4.planning.cards import find_card
from vllm_nvfp4.planning.find import find_shape, models
from vllm_nvfp4.planning.shapes import DecoderShape
from vllm_nvfp4.testing.architectures import ARCHITECTURES
from vllm_nvfp4.testing.tiny_models import FAMILIES

sys.path.insert(0, str(docs_table.ROOT / "tests" / "support"))

PAGE = "README.md"
BEGIN = "<!-- models: written by scripts/docs_models.py -->\n"
END = "<!-- end of models -->\n"
CARDS = (("RTX 4080 SUPER", 1), ("RTX 4090", 1), ("RTX 6000 Ada", 1), ("RTX 4090", 2))
CONTEXT = 8192
SWEEP = docs_table.ROOT / "benchmarks" / "results" / "models.csv"
_HEADER = (
    "| checkpoint | 16 GB | 24 GB | 48 GB | 2 x 24 GB | tested |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)
# In models.json a family is named as in config.json.
_TINY = {"gemma3_text": "gemma3"}


def table() -> str:
    """A Markdown table, a line for each model, those whose files `plan` has to read last."""
    text = _HEADER
    for name, entry in models().items():
        checkpoint = entry.get("nvfp4") or entry["hub"]
        shape = find_shape(name)
        cells = [_cell(shape, card, count) for card, count in CARDS]
        online = "" if "nvfp4" in entry or entry["config"].get("quantization_config") else " *"
        text += f"| {checkpoint}{online} | {' | '.join(cells)} | {how_far_tested(name, entry)} |\n"
    return text


def _cell(shape: DecoderShape, card: str, count: int) -> str:
    """ "40k, 160 tok/s": the longest context of one sequence, the limit of decoding at CONTEXT."""
    gpu = find_card(card)
    load = fit.Load(CONTEXT, 1)
    asked = rows.Asked(shape, load, 1, 0)
    base = fit.Setup(kv_bits=choose.kv_bits_of(gpu))
    choice = choose.choose(shape, load, gpu, "usual", base)
    if choice is None or choice.found.setup.cards > count:
        return "no"
    row = rows.row_of(asked, replace(choice.found.setup, cards=count), gpu, cards=count)
    if row.obstacle:
        return "no"
    return f"{row.longest_context // 1024}k, {row.decode.tokens_per_s:.0f}"


@cache
def served_tiny() -> set[str]:
    """The models of whose architecture `make models` served a stored checkpoint right."""
    lines = [x for x in SWEEP.read_text().splitlines() if not x.startswith("#")]
    stored = ("modelopt", "compressed-tensors")
    right = [r for r in csv.DictReader(lines) if all(r[road][:1].isdigit() for road in stored)]
    models_of = [ARCHITECTURES[row["architecture"]].models for row in right]
    return {name.strip() for names in models_of for name in names.split(",")}


def how_far_tested(name: str, entry: dict[str, Any]) -> str:
    """ "served tiny", "layout" or "", from what the tests and the sweep of architectures have."""
    from published import PUBLISHED

    family = entry["config"]["model_type"]
    if _TINY.get(family, family) in FAMILIES or name in served_tiny():
        return "served tiny"
    return "layout" if entry.get("nvfp4") in {case.name for case in PUBLISHED} else ""


if __name__ == "__main__":
    sys.exit(docs_table.main(__file__, PAGE, BEGIN, END, table))
