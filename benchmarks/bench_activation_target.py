# SPDX-License-Identifier: Apache-2.0
"""What `quantize --activation 8` gives a model that is served with 8-bit activations.

    python benchmarks/bench_activation_target.py MODEL --wheel gensim-4.4.0-*.whl --work DIR \\
        --csv benchmarks/results/activation_target_cpu.csv

Text, calibration and simulated arithmetic as in bench_quantize.py and bench_quality.py. chosen_for:
the activations that gptq chose the weights for; served: those that the products see (8: FP8 per
token; int8: per token and 64 columns). over_16_pct, kl_change: against the weights chosen for 16
bits, served the same way, paired by token, standard errors by block bootstrap. DIR keeps what was
made.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_quality
import bench_quantize
import bench_quantize_peers
import torch

RUNS = (("16", "8"), ("16", "int8"), ("8", "8"), ("int8", "int8"))
OPTIONS = {"16": [], "8": ["--activation", "8"]}
OPTIONS["int8"] = [*OPTIONS["8"], "--a8-variant", "int8"]
FIELDS = (
    *("chosen_for", "served", "ppl", "ppl_ratio", "ppl_ratio_se", "kl", "kl_se", "top1"),
    *("over_16_pct", "over_16_pct_se", "kl_change", "kl_change_se", "match"),
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
    stored = bench_quality.formats()["nvfp4-gptq"]
    plain: dict[str, Any] = {}
    for chosen_for, served in RUNS:
        target = args.work / f"for-{chosen_for}"
        bench_quantize_peers.make(args, "vllm-nvfp4", "gptq", target, OPTIONS[chosen_for])
        match = model.set_weights("nvfp4-gptq", stored, dequantized_state_dict(target))
        model.activations = served
        scores, _ = bench_quantize.scores_of(model.model, samples, reference)
        beside = plain.setdefault(served, scores)
        change = dataclasses.replace(scores, kl=scores.kl - beside.kl)
        over = bench_quantize.compared(change, beside)
        yield {
            **{"chosen_for": chosen_for, "served": served, "match": match},
            **bench_quantize.compared(scores, base),
            "over_16_pct": 100 * (over["ppl_ratio"] - 1),
            "over_16_pct_se": 100 * over["ppl_ratio_se"],
            **{"kl_change": over["kl"], "kl_change_se": over["kl_se"]},
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    bench_quantize.add_text_arguments(parser, eval_samples=8)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    args = parser.parse_args()
    return bench_quantize.write(args, FIELDS, measure(args))


if __name__ == "__main__":
    sys.exit(main())
