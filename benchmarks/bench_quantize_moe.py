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
model, paired by token; *_se are standard errors by a bootstrap over whole windows. cpu_s is the
CPU time of all threads, of a peer's without the imports. DIR keeps checkpoints and scores: a run
that was stopped goes on. `--eval-samples 0`, the default, scores all there is; the layers before
the first mixture, which no method changes, are run once for all models.
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


def measure(args: argparse.Namespace, samples: Any) -> Iterator[dict[str, Any]]:
    import torch

    from vllm_nvfp4.testing.engine import plain_model, reference_model

    first = json.loads((args.model / "config.json").read_text())["first_k_dense_replace"]
    for kind, folder in (("moe", args.model), ("dense", args.dense)):
        runs = [run for run in RUNS if run[0] == kind and is_asked(args, run)]
        if folder is None or not runs:
            continue
        asked = copy.copy(args)
        asked.model, asked.moe = folder, args.model
        targets = {}
        for run in runs:
            _, maker, method, tokens = run
            target = args.work / "-".join(filter(None, run))
            extra = options(asked, kind, maker, tokens)
            seconds = bench_quantize_peers.make(asked, maker, method, target, extra)
            targets[run] = target, seconds
        models: dict[Path, Callable[[], Any]] = {
            args.work / kind: lambda folder=folder: plain_model(folder, torch.float32)
        }
        for target, _ in targets.values():
            models[target] = lambda target=target: reference_model(target, torch.float32)
        base, *scores = scored(models, first, samples, args.work / "before")
        yield {"model": kind, "maker": "16 bits", **compared(base, base, base, args.length)}
        for (run, (_, seconds)), of_run in zip(targets.items(), scores, strict=True):
            names = dict(zip(("model", "maker", "method", "tokens"), run, strict=True))
            quality = compared(of_run, base, scores[0], args.length)
            yield {**names, **quality, "cpu_s": seconds}


def run_layers(model: Any, part: slice, **inputs: Any) -> Any:
    """What some of a model's layers give; the last one through the norm."""
    import torch

    decoder = model.get_decoder()
    layers, norm = decoder.layers, decoder.norm
    decoder.layers = layers[part]
    if part.stop is not None:
        decoder.norm = torch.nn.Identity()
    try:
        return decoder(**inputs, use_cache=False).last_hidden_state
    finally:
        decoder.layers, decoder.norm = layers, norm


def state_before(path: Path, model: Any, first: int, tokens: Any) -> Any:
    """What goes into layer ``first``, [1, length, hidden size], kept in a file: alike in all
    models, since no layer before it is quantised."""
    import torch

    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        state = run_layers(model, slice(0, first), input_ids=tokens[None])
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return torch.load(path)


def scored(
    models: dict[Path, Callable[[], Any]], first: int, samples: Any, before: Path
) -> list[Any]:
    """The Scores of each model against the first, window by window, kept in files."""
    import numpy as np
    import torch

    from vllm_nvfp4.quality.engine import Scores
    from vllm_nvfp4.quality.recorder import score

    found = {path: scores_of(path) for path in models}
    lacking = [p for p in models if len(found[p]) < len(samples)]
    done = min((len(found[p]) for p in lacking), default=len(samples))
    base = next(iter(models))
    loaded = {p: models[p]() for p in dict.fromkeys((base, *lacking))} if lacking else {}
    for i in range(done, len(samples)):
        with torch.inference_mode():
            theirs = None
            state = state_before(before / f"{i}.pt", loaded[base], first, samples[i])
            for path, model in loaded.items():
                hidden = run_layers(model, slice(first, None), inputs_embeds=state)
                if i == done:
                    check_whole(path, model, samples[i], hidden)
                logits = model.get_output_embeddings()(hidden[0, :-1])
                theirs = logits if theirs is None else theirs
                if path in lacking:
                    found[path][i:] = [score(logits, samples[i, 1:], theirs)]
        if i % 16 == 15 or i == len(samples) - 1:
            for path in lacking:
                scores_file(path).write_text(json.dumps(found[path]))
    names = ("nll", "kl", "same")
    return [
        Scores(**{n: np.array([window[n] for window in found[p][: len(samples)]]) for n in names})
        for p in models
    ]


def scores_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.scores.json")


def scores_of(path: Path) -> list[dict[str, list[float]]]:
    """Of earlier runs."""
    file = scores_file(path)
    return json.loads(file.read_text()) if file.is_file() else []


def check_whole(path: Path, model: Any, tokens: Any, hidden: Any) -> None:
    """That a whole model computes the same."""
    whole = model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state
    if (whole - hidden).abs().max() > 1e-3 * whole.abs().max():
        raise SystemExit(f"{path}: a layer before the first mixture is not the source's")


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


def compared(scores: Any, base: Any, best: Any, length: int) -> dict[str, Any]:
    """The quality columns of a row."""
    found: dict[str, Any] = bench_quantize.compared(scores, base, length)
    beside = bench_quantize.compared(scores, best, length)
    found |= {"over_gptq": beside["ppl_ratio"], "over_gptq_se": beside["ppl_ratio_se"]}
    return {**found, "finite": math.isfinite(found["ppl"])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    bench_quantize.add_text_arguments(parser, eval_samples=0)
    parser.add_argument("--dense", type=Path, help="the model that MOE was made of")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--llmcompressor", type=Path, help="its environment's Python")
    methods = tuple(dict.fromkeys(method for _, _, method, _ in RUNS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.set_defaults(modelopt=None)
    return parser.parse_args()


def main() -> int:
    args = parse()
    samples = bench_quantize_peers.prepare(args, make_upcycled_moe.CALIBRATION)
    notes = [*common.header(), *bench_quantize_peers.peer_versions(args)]
    notes += bench_quantize.text_notes(args, "every fourth article of the same wheel")
    rows = common.write_rows(args.csv, notes, FIELDS, measure(args, samples))
    return 0 if all(row["finite"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
