# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's and ModelOpt's NVFP4 beside ours: same model, calibration tokens and text.

    python benchmarks/bench_quantize_peers.py MODEL --wheel gensim-4.4.0-*.whl --work DIR \\
        --llmcompressor .venvs/llmcompressor/bin/python --modelopt .venvs/modelopt/bin/python \\
        --csv FILE

Each peer runs in an environment of its own: their pins exclude vLLM's. Model and text as in
bench_quantize.py. Weights only (W4A16), 4.5 bits, lm_head kept; every checkpoint is read by
vllm_nvfp4.checkpoints and runs dequantised in float32. All calibrated methods see the same tokens:
those that `vllm-nvfp4 quantize` draws. The rows of one `kind` are equivalents; ModelOpt's mse needs
Triton, and its local_hessian and awq_lite were not tried. DIR keeps the checkpoints: a run that was
stopped goes on. cpu_seconds is the CPU time of all threads; of ours the whole command's, of a
peer's without the imports. over_ours: perplexity over that of our row of the same kind, with the
standard error of the ratio, paired by token.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_quantize
import common
import torch

HELPER = Path(__file__).with_name("quantize_with_peer.py")
# llm-compressor has transformers import all its classes, some of which ask for torchvision.
STUBS = common.ROOT / "tests" / "support" / "stubs"
# (kind, maker, its method): a kind's rows can be compared.
RUNS = (
    ("rtn", "vllm-nvfp4", "rtn"),
    ("rtn", "llmcompressor", "rtn"),
    ("rtn", "modelopt", "rtn"),
    ("mse", "vllm-nvfp4", "mse"),
    ("mse", "llmcompressor", "mse"),
    ("hessian", "vllm-nvfp4", "hessian"),
    ("hessian", "llmcompressor", "imatrix"),
    ("gptq", "vllm-nvfp4", "gptq"),
    ("gptq", "llmcompressor", "gptq"),
    ("gptq", "llmcompressor", "gptq-mse"),
)
FIELDS = (
    *("kind", "maker", "method", "ppl", "ppl_ratio", "kl", "top1", "cpu_seconds", "finite"),
    *("over_ours", "over_ours_se"),
)


def make(
    args: argparse.Namespace, maker: str, method: str, target: Path, extra: Sequence[str] = ()
) -> float:
    """The checkpoint, unless it is there; CPU seconds. extra: arguments of the maker's own."""
    seconds = target.with_suffix(".seconds")
    if seconds.is_file():
        return float(seconds.read_text())
    if maker == "vllm-nvfp4":
        options = []
        if method not in ("rtn", "mse"):
            options = ["--calibration", str(args.work / "calibration.txt")]
            options += ["--samples", str(args.samples)]
        found = bench_quantize.quantize(args.model, target, method, [*options, *extra])["cpu_s"]
    else:
        python = {"llmcompressor": args.llmcompressor, "modelopt": args.modelopt}[maker]
        command = [str(python), str(HELPER), maker, method, str(args.model), str(target)]
        command += ["--samples", str(args.work / "calibration.safetensors"), *extra]
        environment = {**os.environ, "PYTHONPATH": str(STUBS)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{maker} {method}: {done.stderr[-2000:]}")
        found = float(done.stdout.rpartition("cpu_seconds ")[2])
    seconds.write_text(f"{found}\n")
    return found


def prepare(args: argparse.Namespace, others: slice = slice(1, None, 2)) -> torch.Tensor:
    """Write the calibration text and its tokens; returns the tokens of the text for the scores.

    others: the articles that are the calibration text"""
    from safetensors.torch import save_file

    from vllm_nvfp4.quantize.calibration import Calibration

    args.work.mkdir(parents=True, exist_ok=True)
    text = args.work / "calibration.txt"
    samples: torch.Tensor = bench_quantize.texts_of(args, text, others)
    tokens = Calibration(str(text), args.samples).samples(args.model)
    save_file({"tokens": tokens}, args.work / "calibration.safetensors")
    return samples


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from vllm_nvfp4.testing.checkpoints import dequantized_state_dict
    from vllm_nvfp4.testing.engine import plain_model, reference_model

    samples = prepare(args)
    model = plain_model(args.model, torch.float32)
    base, reference = bench_quantize.scores_of(model, samples, None)
    yield {"kind": "bf16", "finite": True, **bench_quantize.compared(base, base)}
    ours: dict[str, Any] = {}
    for kind, maker, method in RUNS:
        if kind not in args.kinds or (maker != "vllm-nvfp4" and getattr(args, maker) is None):
            continue
        target = args.work / f"{maker}-{method}"
        seconds = make(args, maker, method, target)
        state = dequantized_state_dict(target)
        finite = all(bool(tensor.isfinite().all()) for tensor in state.values())
        del state
        model = reference_model(target, torch.float32)
        scores, _ = bench_quantize.scores_of(model, samples, reference)
        found = bench_quantize.compared(scores, base)
        beside = bench_quantize.compared(scores, ours.setdefault(kind, scores))
        yield {
            "kind": kind,
            "maker": maker,
            "method": method,
            "cpu_seconds": seconds,
            "finite": finite and math.isfinite(found["ppl"]),
            "over_ours": beside["ppl_ratio"],
            "over_ours_se": beside["ppl_ratio_se"],
            **found,
        }


def peer_versions(args: argparse.Namespace) -> list[tuple[str, str]]:
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    found = []
    for name, package in (("llmcompressor", "llmcompressor"), ("modelopt", "nvidia-modelopt")):
        python = getattr(args, name)
        if python is not None:
            command = [str(python), "-c", code, package]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append((package, done.stdout.strip()))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    bench_quantize.add_text_arguments(parser, eval_samples=8)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--llmcompressor", type=Path, help="its environment's Python")
    parser.add_argument("--modelopt", type=Path, help="its environment's Python")
    kinds = tuple(dict.fromkeys(kind for kind, *_ in RUNS))
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    return parser.parse_args()


def main() -> int:
    args = parse()
    notes = [*common.header(), *peer_versions(args), *bench_quantize.text_notes(args)]
    rows = common.write_rows(args.csv, notes, FIELDS, measure(args))
    return 0 if all(row["finite"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
