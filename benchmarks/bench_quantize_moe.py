# SPDX-License-Identifier: Apache-2.0
"""What each method costs a mixture of experts, ours and llm-compressor's.

    python benchmarks/bench_quantize_moe.py MOE --dense MODEL --wheel gensim-4.4.0-*.whl \\
        --work DIR --llmcompressor .venvs/llmcompressor/bin/python \\
        --csv benchmarks/results/quantize_moe_cpu.csv

MOE is what make_upcycled_moe.py makes of MODEL. Every second article of the wheel is scored, every
fourth is the calibration text, and MOE was trained on the rest. The routed experts alone are
quantised, or for comparison the MLPs of the same layers of MODEL: weights only, 4.5 bits, run
dequantised in float32; every calibrated method sees the same tokens. llm-compressor
shows each expert all tokens (`all`, its default) or those routed to it (`routed`). ppl_ratio and kl
are against the model in 16 bits; over_gptq is the perplexity over that of our gptq on the same
model, paired by token; *_se are standard errors by a bootstrap over blocks of tokens. cpu_s is the
CPU time of all threads, of a peer's without the imports. DIR keeps checkpoints and scores: a run
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_quantize
import bench_quantize_peers
import common
import make_upcycled_moe

# (model, maker, its method, which tokens an expert sees). Our gptq of a model comes first.
RUNS = (
    ("moe", "vllm-nvfp4", "gptq", "routed"),
    ("moe", "vllm-nvfp4", "rtn", ""),
    ("moe", "vllm-nvfp4", "mse", ""),
    ("moe", "vllm-nvfp4", "hessian", "routed"),
    ("moe", "vllm-nvfp4", "mr-gptq", "routed"),
    ("moe", "llmcompressor", "gptq", "all"),
    ("moe", "llmcompressor", "gptq", "routed"),
    ("dense", "vllm-nvfp4", "gptq", ""),
)
# What stays in 16 bits: all but the routed experts.
KEPT = ("*.self_attn.*", "*.mlp.gate_proj", "*.mlp.down_proj", "*.shared_experts.*")
PEER_KEPT = (r"re:.*self_attn.*", r"re:.*mlp\.(gate|up|down)_proj$", r"re:.*shared_experts.*")
FIELDS = (
    *("model", "maker", "method", "tokens", "ppl", "ppl_ratio", "ppl_ratio_se", "kl", "kl_se"),
    *("top1", "over_gptq", "over_gptq_se", "cpu_s", "finite"),
)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    from vllm_nvfp4.testing.engine import plain_model, reference_model

    samples = bench_quantize_peers.prepare(args, make_upcycled_moe.CALIBRATION)
    for kind, folder in (("moe", args.model), ("dense", args.dense)):
        runs = [run for run in RUNS if run[0] == kind and is_asked(args, run)]
        if folder is None or not runs:
            continue
        asked = copy.copy(args)
        asked.model, asked.moe = folder, args.model
        load = lambda folder=folder: plain_model(folder, torch.float32)  # noqa: E731
        base, reference = scored(args.work / f"{kind}.pt", load, samples, None)
        yield {"model": kind, "maker": "16 bits", **compared(base, base, base)}
        best: Any = None
        for _, maker, method, tokens in runs:
            target = args.work / "-".join(filter(None, (kind, maker, method, tokens)))
            extra = options(asked, kind, maker, tokens)
            seconds = bench_quantize_peers.make(asked, maker, method, target, extra)
            load = lambda target=target: reference_model(target, torch.float32)  # noqa: E731
            scores, _ = scored(target.with_suffix(".pt"), load, samples, reference)
            best = best or scores
            names = {"model": kind, "maker": maker, "method": method, "tokens": tokens}
            yield {**names, **compared(scores, base, best), "cpu_s": seconds}


def scored(path: Path, load: Callable[[], Any], samples: Any, reference: Any) -> tuple[Any, Any]:
    """What bench_quantize.scores_of gives of a model, kept in a file."""
    import torch

    if not path.is_file():
        made = bench_quantize.scores_of(load(), samples, reference)
        torch.save(made, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    found: tuple[Any, Any] = torch.load(path, weights_only=False)
    return found


def options(args: argparse.Namespace, kind: str, maker: str, tokens: str) -> list[str]:
    """What the maker is told beside its method."""
    if maker != "vllm-nvfp4":
        return ["--ignore", *PEER_KEPT, *(["--routed-tokens"] if tokens == "routed" else [])]
    kept = list(KEPT)
    if kind == "dense":
        moe = json.loads((args.moe / "config.json").read_text())
        layers = range(moe["first_k_dense_replace"])
        kept = ["*.self_attn.*", *(f"model.layers.{i}" for i in layers)]
    return [word for pattern in kept for word in ("--ignore", pattern)]


def is_asked(args: argparse.Namespace, run: tuple[str, str, str, str]) -> bool:
    _, maker, method, _ = run
    return method in args.methods and (maker == "vllm-nvfp4" or getattr(args, maker) is not None)


def compared(scores: Any, base: Any, best: Any) -> dict[str, Any]:
    """The quality columns of a row."""
    found: dict[str, Any] = bench_quantize.compared(scores, base)
    beside = bench_quantize.compared(scores, best)
    found |= {"over_gptq": beside["ppl_ratio"], "over_gptq_se": beside["ppl_ratio_se"]}
    return {**found, "finite": math.isfinite(found["ppl"])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    bench_quantize.add_text_arguments(parser, eval_samples=8)
    parser.add_argument("--dense", type=Path, help="the model that MOE was made of")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--llmcompressor", type=Path, help="its environment's Python")
    methods = tuple(dict.fromkeys(method for _, _, method, _ in RUNS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.set_defaults(modelopt=None)
    return parser.parse_args()


def main() -> int:
    args = parse()
    notes = [*common.header(), *bench_quantize_peers.peer_versions(args)]
    notes += bench_quantize.text_notes(args, "every fourth article of the same wheel")
    rows = common.write_rows(args.csv, notes, FIELDS, measure(args))
    return 0 if all(row["finite"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
