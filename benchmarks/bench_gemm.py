#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time the dense products of real models against vLLM's Marlin and Humming, cuBLAS BF16 and FP8.

    python benchmarks/bench_gemm.py --models Qwen3-8B --out results.csv
    python benchmarks/bench_gemm.py --stand-in      # adds the integer-MMA twin of the W4A8 kernel

All backends run in one process on the same weights, out of a CUDA graph over enough copies that
every call finds its weight evicted from L2. ``error`` is relative to the float64 product. Exit
status: 0 all match, 1 a mismatch or a backend of ours that failed, 3 no CUDA GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator

from kernel_bench import KernelBench, add_arguments, reason_of, refuse_unknown, run

from vllm_nvfp4.testing.shapes import BENCH_M, BENCH_MODELS

DEFAULT_MODELS = "Qwen3-8B,Gemma3-27B,Llama-3.1-70B,Qwen3-30B-A3B"
DEFAULT_BACKENDS = "ours,ours-w4a16,ours-w4a8,marlin,humming,cublas-bf16,torch-fp8"
RANGES = (
    ("M<=64", range(65)),
    ("64<M<1024", range(65, 1024)),
    ("M>=1024", range(1024, 1 << 30)),
)
STAND_IN = "w4a8-imma-STAND-IN"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. pct_limit: of the roofline of its own bits; pct_copy: bytes per second
    against a device-to-device copy of this card; x_marlin: Marlin's time over this one."""

    model: str
    layer: str
    m: int
    n: int
    k: int
    backend: str
    kernel: str
    us: float
    tflops: float
    gbps: float
    pct_limit: float
    pct_copy: float
    x_marlin: float
    error: float
    match: str


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=DEFAULT_MODELS, help=f"default {DEFAULT_MODELS}")
    parser.add_argument("--m", default=",".join(map(str, BENCH_M)), help="token counts")
    parser.add_argument("--backends", default=DEFAULT_BACKENDS)
    parser.add_argument("--stand-in", action="store_true", help=f"add {STAND_IN}")
    add_arguments(parser, "benchmarks/results/<gpu>.csv")
    args = parser.parse_args()
    args.models = args.models.split(",")
    args.m = sorted({int(m) for m in args.m.split(",")})
    args.backends = args.backends.split(",") + ([STAND_IN] if args.stand_in else [])
    refuse_unknown(parser, "model", args.models, BENCH_MODELS)
    return args


def layers_of(models: list[str]) -> list[tuple[str, str, int, int]]:
    """(model, layer, N, K), each shape once: it counts for the first model that has it."""
    seen: set[tuple[int, int]] = set()
    found = []
    for model in models:
        for layer, (n, k) in BENCH_MODELS[model].linear_layers().items():
            if (n, k) not in seen:
                seen.add((n, k))
                found.append((model, layer, n, k))
    return found


class Bench(KernelBench):
    def __init__(self, args: argparse.Namespace) -> None:
        from gemm_backends import BACKENDS

        from vllm_nvfp4.kernels.cuda import linear

        super().__init__("bench_gemm", args, BACKENDS, linear.prepare)

    def parts(self) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        for model, layer, n, k in layers_of(self.args.models):
            title = f"{model} {layer}: N={n} K={k}"
            yield title, lambda place=(model, layer, n, k): self.layer_rows(*place)

    def layer_rows(self, model: str, layer: str, n: int, k: int) -> list[Row]:
        """Every backend at every M on one layer."""
        import torch

        from vllm_nvfp4.testing.kernel_cases import random_weight
        from vllm_nvfp4.testing.timer import num_rotations

        weight = random_weight(n, k, self.args.format, self.device)
        rows: list[Row] = []
        for backend in self.backends:
            bits = backend.weight_bits or weight.fmt.bits_per_weight
            copies = num_rotations(int(n * k * bits / 8), self.l2_bytes, most=24)
            try:
                calls = [backend.prepare(weight, self.dtype) for _ in range(copies)]
                places = [(model, layer, m, n, k) for m in self.args.m]
                rows += [self.measure(backend, calls, weight, place) for place in places]
            except Exception as error:  # a peer that cannot run a shape must not end the others
                rows.append(failed_row(backend.name, (model, layer, 0, n, k), error))
            calls = []
            torch.cuda.empty_cache()
        return with_speedups(rows)

    def measure(self, backend, calls, weight, where) -> Row:
        import torch

        from vllm_nvfp4.testing.timer import time_graph

        model, layer, m, n, k = where
        generator = torch.Generator(self.device).manual_seed(m)
        a = torch.randn(m, k, generator=generator, device=self.device).to(self.dtype)
        y = calls[0](a)
        if y.shape != (m, n):
            raise RuntimeError(f"its result is {list(y.shape)}, needed {[m, n]}")
        activation_bits, kernel = backend.activation_bits, backend.name
        if backend.name.startswith("ours"):
            activation = {0: "auto", 16: "16", 8: "8"}[activation_bits]
            choice = self.loaded.choose(m, n, k, self.args.format, self.args.dtype, activation)
            kernel = f"{choice.config.symbol}/split{choice.num_splits}"
            activation_bits = choice.activation_bits
        # Ours are held to the product of the activations as they quantise them; a peer's FP8
        # weights and activations are its own rounding, and count as error.
        is_ours_8_bit = activation_bits == 8 and backend.name.startswith("ours")
        error = sampled_error(y, a, weight, 8 if is_ours_8_bit else 16)
        match = "stand-in" if backend.max_error is None else (
            "yes" if error <= backend.max_error else "NO"
        )  # fmt: skip
        us = time_graph([lambda c=call: c(a) for call in calls], self.args.seconds)
        bits = backend.weight_bits or weight.fmt.bits_per_weight
        num_bytes = n * k * bits / 8 + 2 * m * k + 2 * m * n
        figures = self.figures(us, num_bytes, 2 * m * n * k, activation_bits)
        return Row(
            model, layer, m, n, k, backend.name, kernel, us, *figures, math.nan, error, match
        )


def sampled_error(y, a, weight, activation_bits: int = 16) -> float:
    """Relative error of up to 128 tokens x 256 rows against the float64 product."""
    import torch

    from vllm_nvfp4.numerics.reference import reference_linear
    from vllm_nvfp4.numerics.weight import BlockScaledWeight
    from vllm_nvfp4.testing.metrics import relative_error

    tokens = torch.linspace(0, len(a) - 1, min(len(a), 128), device=a.device).long()
    rows = torch.linspace(0, weight.num_rows - 1, min(weight.num_rows, 256), device=a.device).long()
    part = BlockScaledWeight(
        weight.codes[rows],
        weight.block_scale.view(torch.uint8)[rows].view(weight.block_scale.dtype),
        weight.global_scale[rows],
        weight.fmt,
    )
    reference = reference_linear(a[tokens], part, activation_bits=activation_bits)
    return relative_error(y[tokens][:, rows], reference)


def failed_row(backend: str, where: tuple[str, str, int, int, int], error: Exception) -> Row:
    return Row(*where, backend, reason_of(error), *[math.nan] * 7, "failed")


def with_speedups(rows: list[Row]) -> list[Row]:
    marlin = {row.m: row.us for row in rows if row.backend == "marlin" and row.match != "failed"}
    return [dataclasses.replace(row, x_marlin=marlin.get(row.m, math.nan) / row.us) for row in rows]


def print_rows(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"{r.m:5d} {r.n:6d} {r.k:6d} | {r.backend:18s} {r.us:9.1f} us | {r.tflops:7.1f} TFLOP/s"
            f" | {r.gbps:7.0f} GB/s | {r.pct_limit:5.1f} % of limit | {r.x_marlin:5.2f}x Marlin | "
            f"{r.error:.1e} {r.match}" + (f" {r.kernel}" if r.match == "failed" else ""),
            flush=True,
        )


def main() -> int:
    return run("bench_gemm", parse_args(), Bench, Row, Bench.parts, print_rows, RANGES)


if __name__ == "__main__":
    sys.exit(main())
