# SPDX-License-Identifier: Apache-2.0
"""How much of what INT8 activations cost a served model is BF16's own rounding.

    python benchmarks/bench_rounding.py MODEL --csv benchmarks/results/rounding_cpu.csv

MODEL is a folder of 16-bit safetensors; its layers become NVFP4 (mse). On the windows of the
built-in text that bench_activations.py serves, transformers runs it twice: in float32 throughout,
and with everything between the quantised layers, and the logits, in BF16, as vLLM has it. The
quantised layers multiply in float32 and round their output alone, as the kernels do.

Each row compares two runs of one arithmetic, or one in BF16 with the same in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_quality
import common
import torch

FIELDS = ("arithmetic", "activations", "from", "ppl_increase_pct", "standard_error_pct", "kl")


class Float32Product(torch.nn.Module):
    """y = dtype(x @ w^T), the sum in float32. weight: [N, K] float32; x: what was rounded before"""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.weight.T).to(self.dtype)


def logits_of(
    folder: Path, dtype: torch.dtype, layers: list[str], samples: torch.Tensor
) -> dict[str, list[torch.Tensor]]:
    """Activations -> the logits of each sample, [T, V]."""
    from vllm_nvfp4.testing.engine import plain_model

    model = plain_model(folder, torch.float32)
    fmt = bench_quality.formats()["nvfp4-mse"]
    weights = {name: fmt.quantize(model.get_submodule(name).weight.detach()) for name in layers}
    model = model.to(dtype)
    for name in layers:
        model.set_submodule(name, Float32Product(weights[name], dtype))
    rounded = bench_quality.Quantised(model, layers)
    found = {}
    for rounded.activations in ("16", "int8"):
        found[rounded.activations] = [row.to(dtype) for row in rounded.logits(samples)]
    return found


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from vllm_nvfp4.checkpoints.source import Source
    from vllm_nvfp4.quality.text import read_windows

    samples = torch.tensor(read_windows(args.model, "builtin", args.windows, args.length))
    quantized, _ = Source(args.model).quantizable()
    layers = sorted(name.removesuffix(".weight") for name in quantized)

    def row(name: str, activations: str, other: str, mine: Any, theirs: Any) -> dict[str, Any]:
        scores, base = (bench_quality.scores_of(iter(x), theirs, samples) for x in (mine, theirs))
        found = bench_quality.a16_columns(scores, base)
        values = (name, activations, other, *(float(value) for value in found.values()))
        return dict(zip(FIELDS, values, strict=True))

    exact = logits_of(args.model, torch.float32, layers, samples)
    yield row("float32", "int8", "16 bits, float32", exact["int8"], exact["16"])
    usual = logits_of(args.model, torch.bfloat16, layers, samples)
    yield row("bfloat16", "16", "16 bits, float32", usual["16"], exact["16"])
    yield row("bfloat16", "int8", "16 bits, float32", usual["int8"], exact["16"])
    yield row("bfloat16", "int8", "16 bits, bfloat16", usual["int8"], usual["16"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    notes = [*common.header(), ("text", f"builtin, {args.windows} x {args.length} tokens")]
    common.write_rows(args.csv, notes, FIELDS, rows_of(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
