#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tokens per second and time to first token through vLLM, with the plugin and without it.

    python benchmarks/bench_serving.py --model DIR --out serving.csv
    python benchmarks/bench_serving.py --model DIR --engine-arg attention_backend=TRITON_ATTN

Each variant runs in a process of its own, in turns (A B C, A B C, ...), --repeats times; a row is
the median over all. Decode: a batch of 32-token prompts, time of --tokens tokens less the time of
the first. Time to first token: one prompt at a time, tokens never seen before. Both variants keep
the KV cache and lm_head as the checkpoint has them, except where the variant's name says more.
Exit status: 0, 1 where a variant failed, 3 no CUDA GPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import EXIT_NO_GPU, header, require_gpu

# Variant -> (value of VLLM_PLUGINS, engine arguments).
_KEEP = {"kv_cache": "keep"}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "stock": ("", {}),
    "stock-marlin": ("", {"linear_backend": "marlin"}),
    "plugin": (
        "nvfp4",
        {"quantization": "nvfp4", "additional_config": {"nvfp4": _KEEP}},
    ),
    "plugin-a16": (
        "nvfp4",
        {
            "quantization": "nvfp4",
            "additional_config": {"nvfp4": _KEEP | {"activation": "16"}},
        },
    ),
    "plugin-fp8-lm-head": (
        "nvfp4",
        {
            "quantization": "nvfp4",
            "additional_config": {"nvfp4": _KEEP | {"lm_head": "fp8"}},
        },
    ),
}
DEFAULT_VARIANTS = "stock-marlin,plugin"
PROMPT_TOKENS = 32


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--variants", default=DEFAULT_VARIANTS, help=", ".join(VARIANTS))
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of a TTFT prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=2, help="processes per variant")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per process")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--cpu", action="store_true", help="on vLLM's CPU backend: a trial run")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"unknown variant {unknown[0]}; known: {', '.join(VARIANTS)}")
    args.variant_names = names
    args.batch_sizes = [int(b) for b in args.batches.split(",")]
    return args


def engine_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What LLM() is given, the variant's own arguments and --engine-arg last."""
    arguments: dict[str, object] = {
        "model": str(args.model),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_model_len": args.prefill + args.tokens,
        "max_num_batched_tokens": max(2 * args.prefill, 2048),
        "max_num_seqs": max(args.batch_sizes),
        "seed": 0,
    } | VARIANTS[args.worker][1]
    for item in args.engine_arg:
        name, _, value = item.partition("=")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


def run_worker(args: argparse.Namespace) -> dict[str, float]:
    """Measure one variant in this process: {"decode <batch>": tokens/s, "ttft ms": ...}."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    started = time.monotonic()
    llm = LLM(**engine_arguments(args))
    results = {"load s": time.monotonic() - started}
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    next_token = iter(range(1, 1 << 62))

    def generate(batch: int, prompt_tokens: int, num_tokens: int) -> float:
        """Seconds for a batch of prompts that are all different from any before."""
        prompts = [
            TokensPrompt(
                prompt_token_ids=[next(next_token) * 7919 % vocab for _ in range(prompt_tokens)]
            )
            for _ in range(batch)
        ]
        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        found = sum(len(o.outputs[0].token_ids) for o in outputs)
        if found != batch * num_tokens:
            raise RuntimeError(f"{found} tokens came back, needed {batch * num_tokens}")
        return seconds

    generate(max(args.batch_sizes), PROMPT_TOKENS, 4)
    for batch in args.batch_sizes:
        generate(batch, PROMPT_TOKENS, 8)
        rates = []
        for _ in range(3):
            first = generate(batch, PROMPT_TOKENS, 1)
            whole = generate(batch, PROMPT_TOKENS, args.tokens)
            rates.append(batch * (args.tokens - 1) / (whole - first))
        results[f"decode {batch}"] = statistics.median(rates)
    generate(1, args.prefill, 1)
    times = [generate(1, args.prefill, 1) for _ in range(5)]
    results["ttft ms"] = statistics.median(times) * 1e3
    results["prefill tok/s"] = args.prefill / statistics.median(times)
    return results


def run_variant(args: argparse.Namespace, name: str) -> dict[str, float] | None:
    """One process; None, with the end of its log on stderr, where it failed."""
    plugins, _ = VARIANTS[name]
    environment = os.environ | {"VLLM_PLUGINS": plugins}
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        command += ["--result", str(result)]
        with log.open("w") as file:
            try:
                status = subprocess.run(
                    command, env=environment, stdout=file, stderr=file, timeout=args.timeout,
                    check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = -1
        if status == 0 and result.is_file():
            return json.loads(result.read_text())
        why = f"no answer in {args.timeout:.0f} s" if status == -1 else f"exit status {status}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        print(f"bench_serving: {name}: {why}\n{tail}", file=sys.stderr)
        return None


def find_plugin() -> str:
    """ "" where vLLM will find the plugin, else what to do."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(point.name == "nvfp4" for point in points):
        return ""
    return "the plugin is not installed (pip install --no-deps .), so vLLM cannot find it"


def medians(runs: dict[str, list[dict[str, float]]]) -> list[tuple[str, str, float, float]]:
    """(metric, variant, median, ratio to the first variant that has it; above 1 is better)."""
    rows = []
    first: dict[str, float] = {}
    for name, results in runs.items():
        for metric in dict.fromkeys(key for result in results for key in result):
            value = statistics.median(r[metric] for r in results if metric in r)
            base = first.setdefault(metric, value)
            is_time = metric in ("ttft ms", "load s")
            rows.append((metric, name, value, base / value if is_time else value / base))
    return sorted(rows, key=lambda row: list(first).index(row[0]))


def main() -> int:
    args = parse_args()
    if args.worker:
        args.result.write_text(json.dumps(run_worker(args)))
        return 0
    if not args.cpu and not require_gpu("bench_serving"):
        return EXIT_NO_GPU
    if any(VARIANTS[name][0] for name in args.variant_names) and (problem := find_plugin()):
        print(f"bench_serving: {problem}", file=sys.stderr)
        return 1
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.variant_names}
    num_failed = 0
    for repeat in range(args.repeats):
        for name in args.variant_names:
            started = time.monotonic()
            result = run_variant(args, name)
            num_failed += result is None
            if result:
                runs[name].append(result)
            print(f"{name}, run {repeat + 1} of {args.repeats}: "
                  f"{'ok' if result else 'failed'} in {time.monotonic() - started:.0f} s",
                  flush=True)  # fmt: skip
    head, rows = header(), medians(runs)
    for name, value in head:
        print(f"# {name}: {value}")
    for metric, name, value, ratio in rows:
        print(f"{metric:14s} {name:20s} {value:12.1f}   {ratio:5.2f}x {args.variant_names[0]}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows((f"# {name}", value) for name, value in head)
            writer.writerow(("metric", "variant", "median", "ratio", "runs"))
            writer.writerows(
                (metric, name, f"{value:.5g}", f"{ratio:.4g}", len(runs[name]))
                for metric, name, value, ratio in rows
            )
    return 1 if num_failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
