#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time layers of routed experts against vLLM's Marlin, Humming and its Triton kernel in BF16.

    python benchmarks/bench_moe.py --models Qwen3-30B-A3B --out moe.csv

All backends run in one process on the same weights, out of a CUDA graph over copies of the layer
with tokens of their own, as many as it takes (and fit) for each call to find its weights evicted
from L2. Bytes count the experts that were hit, and the tokens. ``uniform`` routing chooses experts
at random; ``skewed`` by Zipf's law. Exit status: 0 all match, 1 a mismatch or a backend of ours
that failed, 3 no CUDA GPU.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

from common import EXIT_NO_GPU, copy_bandwidth_gbps, gpu_slug, header, require_gpu

from vllm_nvfp4.testing.shapes import EXPERT_LAYERS

DEFAULT_M = "1,2,4,8,16,32,64,128,256,512,1024,4096"
DEFAULT_BACKENDS = "ours,ours-w4a16,ours-w4a8,marlin,humming,triton-bf16"
ROUTINGS = ("uniform", "skewed")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. hit: experts with a token; pct_limit: of the roofline of its own bits;
    pct_copy: bytes per second against a device-to-device copy of this card."""

    model: str
    routing: str
    m: int
    hit: float
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
    parser.add_argument("--models", default=",".join(EXPERT_LAYERS))
    parser.add_argument("--m", default=DEFAULT_M, help="token counts")
    parser.add_argument("--routings", default=",".join(ROUTINGS))
    parser.add_argument("--backends", default=DEFAULT_BACKENDS)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--format", choices=("nvfp4", "mxfp4"), default="nvfp4")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing per measurement")
    parser.add_argument("--budget", type=float, default=0, help="stop after this many seconds")
    parser.add_argument("--out", type=Path, help="CSV file; default benchmarks/results/<gpu>-moe")
    args = parser.parse_args()
    args.models, args.routings = args.models.split(","), args.routings.split(",")
    args.m = sorted({int(m) for m in args.m.split(",")})
    args.backends = args.backends.split(",")
    if unknown := [m for m in args.models if m not in EXPERT_LAYERS]:
        parser.error(f"unknown model {unknown[0]}; known: {', '.join(EXPERT_LAYERS)}")
    if unknown := [r for r in args.routings if r not in ROUTINGS]:
        parser.error(f"unknown routing {unknown[0]}; known: {', '.join(ROUTINGS)}")
    return args


def draw_tokens(m: int, shape, routing: str, dtype, device, seed: int) -> tuple[Any, Any, Any]:
    """(a, weights, ids) of M tokens. Skewed: expert e is as likely as 1 / (1 + e)."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    a = torch.randn(m, shape.hidden_size, generator=generator, device=device).to(dtype)
    rank = torch.arange(1, shape.num_experts + 1, device=device, dtype=torch.float32)
    likely = 1 / rank if routing == "skewed" else torch.ones_like(rank)
    # Without replacement: a token chooses an expert once.
    ids = torch.multinomial(likely.expand(m, -1), shape.num_choices, generator=generator)
    weights = torch.rand(m, shape.num_choices, generator=generator, device=device)
    return a, weights / weights.sum(1, keepdim=True), ids.int()


class Bench:
    """The GPU side; made only where there is one."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from moe_backends import BACKENDS

        from vllm_nvfp4.kernels.cuda import moe as cuda_moe
        from vllm_nvfp4.testing.kernel_cases import TORCH_DTYPES

        if unknown := [b for b in args.backends if b not in BACKENDS]:
            sys.exit(f"bench_moe: unknown backend {unknown[0]}; known: {', '.join(BACKENDS)}")
        self.args, self.dtype = args, TORCH_DTYPES[args.dtype]
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.gpu = cuda_moe.prepare_moe(self.device, args.format, (self.dtype,)).gpu
        self.copy_gbps = copy_bandwidth_gbps()
        backends = [BACKENDS[name] for name in args.backends]
        self.backends = [b for b in backends if self.gpu.arch >= 89 or b.activation_bits != 8]
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def model_rows(self, model: str) -> list[Row]:
        """Every backend at every M and routing on one model's layer."""
        import torch
        from moe_backends import Layer

        layer = Layer(EXPERT_LAYERS[model], self.args.format, self.device, seed=0)
        rows: list[Row] = []
        for backend in self.backends:
            calls: list[Any] = []
            try:
                calls = self.copies(backend, layer)
                for routing in self.args.routings:
                    rows += [self.measure(backend, calls, layer, model, routing, m)
                             for m in self.args.m]  # fmt: skip
            except Exception as error:  # a peer that cannot run a shape must not end the others
                reason = " ".join(str(error).split())[:160]
                nothing = [math.nan] * 7
                failed = f"failed: {reason}"
                rows.append(Row(model, "", 0, 0, backend.name, failed, *nothing, "failed"))
            calls = []
            torch.cuda.empty_cache()
        return with_speedups(rows)

    def copies(self, backend, layer) -> list[Any]:
        """The call on as many copies of the layer as fit a third of the free memory, or as the L2
        asks for where a single token is routed."""
        import torch

        from vllm_nvfp4.testing.timer import num_rotations

        bits = backend.weight_bits or layer.w13[0].fmt.bits_per_weight
        touched = layer.shape.num_choices * layer.bytes_of_expert(bits)
        all_bytes = layer.shape.num_experts * layer.bytes_of_expert(bits)
        fitting = int(torch.cuda.mem_get_info(self.device)[0] / 3 / all_bytes)
        num = num_rotations(int(touched), self.l2_bytes, most=max(fitting, 1))
        return [backend.prepare(layer, self.dtype) for _ in range(max(min(num, fitting), 1))]

    def measure(self, backend, calls, layer, model: str, routing: str, m: int) -> Row:
        from vllm_nvfp4.testing.timer import time_graph

        shape = layer.shape
        # A token set for each copy, and a few at least: what they hit is averaged.
        sets = [draw_tokens(m, shape, routing, self.dtype, self.device, seed)
                for seed in range(max(len(calls), 4))]  # fmt: skip
        error = sampled_error(calls[0](*sets[0]), sets[0], layer)
        pairs = [(calls[i % len(calls)], tokens) for i, tokens in enumerate(sets)]
        work = [lambda call=call, tokens=tokens: call(*tokens) for call, tokens in pairs]
        us = time_graph(work, self.args.seconds)
        hit = sum(len(ids.unique()) for _, _, ids in sets) / len(sets)
        bits, kernel = self.describe(backend, m, shape)
        weight_bits = backend.weight_bits or layer.w13[0].fmt.bits_per_weight
        num_bytes = hit * layer.bytes_of_expert(weight_bits) + 4 * m * shape.hidden_size
        flops = 6 * m * shape.num_choices * shape.hidden_size * shape.intermediate_size
        rate = self.gpu.fp8_f32_tflops if bits == 8 else self.gpu.bf16_tflops
        limit_us = max(num_bytes / (self.gpu.dram_gbps * 1e3), flops / (rate * 1e6))
        gbps = num_bytes / us / 1e3
        return Row(
            model, routing, m, hit, backend.name, kernel, us, flops / us / 1e6, gbps,
            100 * limit_us / us, 100 * gbps / self.copy_gbps, math.nan, error,
            "yes" if error <= backend.max_error else "NO",
        )  # fmt: skip

    def describe(self, backend, m: int, shape) -> tuple[int, str]:
        """(activation bits, kernel's name)"""
        from vllm_nvfp4.kernels.cuda.moe_dispatch import choose_moe

        if not backend.name.startswith("ours"):
            return backend.activation_bits, backend.name
        wanted = {0: "auto", 16: "16", 8: "8"}[backend.activation_bits]
        config = choose_moe(self.gpu, m, shape, self.args.format, self.args.dtype, wanted)
        return (8 if config.stem == "moe_w4a8" else 16), config.symbol


def sampled_error(y, tokens, layer) -> float:
    """Relative error of up to 16 tokens against the float64 layer."""
    import torch
    from moe_backends import SILU

    from vllm_nvfp4.testing.metrics import relative_error

    a, weights, ids = tokens
    chosen = torch.linspace(0, len(a) - 1, min(len(a), 16), device=a.device).long()
    expected = torch.zeros(len(chosen), y.shape[1], dtype=torch.float64, device=a.device)
    for e in ids[chosen].unique().tolist():
        token, j = (ids[chosen] == e).nonzero(as_tuple=True)
        h = SILU(a[chosen[token]].double() @ layer.w13[e].dequantize(torch.float64).T)
        out = h @ layer.w2[e].dequantize(torch.float64).T
        expected.index_add_(0, token, out * weights[chosen[token], j].double()[:, None])
    return relative_error(y[chosen], expected)


def with_speedups(rows: list[Row]) -> list[Row]:
    marlin = {(r.routing, r.m): r.us for r in rows if r.backend == "marlin" and r.match == "yes"}
    return [
        dataclasses.replace(r, x_marlin=marlin.get((r.routing, r.m), math.nan) / r.us) for r in rows
    ]


def geometric_means(rows: list[Row]) -> list[str]:
    """Lines: each backend's speed against Marlin, decode (M <= 64) and above."""
    lines = []
    for backend in dict.fromkeys(row.backend for row in rows):
        parts = []
        for name, wanted in (("M<=64", range(65)), ("M>64", range(65, 1 << 30))):
            speeds = [
                r.x_marlin for r in rows
                if r.backend == backend and r.m in wanted and r.x_marlin > 0
            ]  # fmt: skip
            if speeds:
                mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
                parts.append(f"{name}: {mean:.2f}x Marlin (least {min(speeds):.2f}, {len(speeds)})")
        lines.append(f"{backend:14s} {'  '.join(parts) or 'nothing to compare'}")
    return lines


def print_rows(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"{r.routing:8s} {r.m:5d} hit {r.hit:6.1f} | {r.backend:12s} {r.us:9.1f} us | "
            f"{r.tflops:7.1f} TFLOP/s | {r.gbps:7.0f} GB/s | {r.pct_limit:5.1f} % of limit | "
            f"{r.pct_copy:5.1f} % of copy | {r.x_marlin:5.2f}x Marlin | {r.error:.1e} {r.match}"
            + (f" {r.kernel}" if r.match == "failed" else ""),
            flush=True,
        )


def format_row(row: Row) -> list[object]:
    values = dataclasses.astuple(row)
    return [f"{v:.5g}" if isinstance(v, float) else v for v in values]


def main() -> int:
    args = parse_args()
    if not require_gpu("bench_moe"):
        return EXIT_NO_GPU
    bench = Bench(args)
    out = args.out or Path(__file__).parent / "results" / f"{gpu_slug(bench.gpu.name)}-moe.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    head = [*header(), ("copy_gbps", f"{bench.copy_gbps:.0f}")]
    for name, value in head:
        print(f"# {name}: {value}")
    started, rows = time.monotonic(), []
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows((f"# {name}", value) for name, value in head)
        writer.writerow(field.name for field in dataclasses.fields(Row))
        for model in args.models:
            if args.budget and time.monotonic() - started > args.budget:
                print(f"# stopped at the budget of {args.budget:.0f} s before {model}")
                writer.writerow(["# stopped at the budget before", model])
                break
            print(f"\n{model}: {EXPERT_LAYERS[model]}")
            new = bench.model_rows(model)
            print_rows(new)
            rows += new
            writer.writerows(format_row(row) for row in new)
            file.flush()
    print("\n".join(["", *geometric_means(rows), f"\nwritten to {out}"]))
    is_bad = any(
        row.match == "NO" or (row.match == "failed" and row.backend.startswith("ours"))
        for row in rows
    )
    return 1 if is_bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
