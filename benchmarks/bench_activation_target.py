# SPDX-License-Identifier: Apache-2.0
"""What `quantize --activation 8` gives a model that is served with 8-bit activations.

    python benchmarks/bench_activation_target.py MODEL --wheel gensim-4.4.0-*.whl --work DIR \\
        --csv benchmarks/results/activation_target_cpu.csv

Model, text and calibration as in bench_quantize.py, the arithmetic simulated as in
bench_quality.py. chosen_for: the activations that gptq chose the weights for; served: those that
the products are computed of; 8 is FP8 with one scale per token, int8 INT8 with one per token and 64
columns. over_16: perplexity over that of the weights chosen for 16 bits, served the same way, less
1, paired by token; kl_change: the same of the KL from MODEL, as a difference. *_se are standard errors by a
bootstrap over blocks of tokens. DIR keeps the checkpoints: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_quality
import bench_quantize
import bench_quantize_peers
import common
import torch

CHOSEN_FOR = {"16": [], "8": ["--activation", "8"]}
CHOSEN_FOR["int8"] = [*CHOSEN_FOR["8"], "--a8-variant", "int8"]
SERVED = ("16", "8", "int8")
FIELDS = (
    *("chosen_for", "served", "ppl_increase_pct", "ppl_increase_pct_se", "kl", "kl_se", "top1"),
    *("over_16_pct", "over_16_pct_se", "kl_change", "kl_change_se", "finite"),
)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from vllm_nvfp4.checkpoints.source import Source
    from vllm_nvfp4.testing.checkpoints import dequantized_state_dict
    from vllm_nvfp4.testing.engine import plain_model

    samples = bench_quantize_peers.prepare(args)
    quantized, _ = Source(args.model).quantizable()
    layers = sorted(name.removesuffix(".weight") for name in quantized)
    model = bench_quality.Quantised(plain_model(args.model, torch.float32), layers)
    base, reference = bench_quantize.scores_of(model.model, samples, None)
    as_stored = bench_quality.formats()["nvfp4-gptq"]
    beside: dict[str, Any] = {}
    for chosen_for, options in CHOSEN_FOR.items():
        target = args.work / f"for-{chosen_for}"
        bench_quantize_peers.make(args, "vllm-nvfp4", "gptq", target, options)
        finite = model.set_weights("nvfp4-gptq", as_stored, dequantized_state_dict(target))
        for served in SERVED:
            model.activations = served
            scores, _ = bench_quantize.scores_of(model.model, samples, reference)
            found = bench_quantize.compared(scores, base)
            plain = beside.setdefault(served, scores)
            change = dataclasses.replace(scores, kl=scores.kl - plain.kl)
            over = bench_quantize.compared(change, plain)
            yield {
                "chosen_for": chosen_for,
                "served": served,
                "ppl_increase_pct": 100 * (found["ppl_ratio"] - 1),
                "ppl_increase_pct_se": 100 * found["ppl_ratio_se"],
                **{name: found[name] for name in ("kl", "kl_se", "top1")},
                "over_16_pct": 100 * (over["ppl_ratio"] - 1),
                "over_16_pct_se": 100 * over["ppl_ratio_se"],
                "kl_change": over["kl"],
                "kl_change_se": over["kl_se"],
                "finite": finite and math.isfinite(found["ppl"]),
            }
        model.activations = "16"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    bench_quantize.add_text_arguments(parser, eval_samples=8)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    args = parser.parse_args()
    notes = [*common.header(), *bench_quantize.text_notes(args)]
    rows = common.write_rows(args.csv, notes, FIELDS, measure(args))
    return 0 if all(row["finite"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
