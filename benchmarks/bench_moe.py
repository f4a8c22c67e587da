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
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kernel_bench import KernelBench, add_arguments, reason_of, refuse_unknown, run

from vllm_nvfp4.testing.shapes import BENCH_EXPERTS, EXPERT_LAYERS

DEFAULT_M = "1,2,4,8,16,32,64,128,256,512,1024,4096"
DEFAULT_BACKENDS = "ours,ours-w4a16,ours-w4a8,marlin,humming,triton-bf16"
RANGES = (("M<=64", range(65)), ("M>64", range(65, 1 << 30)))
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
    add_arguments(parser, "benchmarks/results/<gpu>-moe.csv")
    args = parser.parse_args()
    args.models, args.routings = args.models.split(","), args.routings.split(",")
    args.m = sorted({int(m) for m in args.m.split(",")})
    args.backends = args.backends.split(",")
    refuse_unknown(parser, "model", args.models, BENCH_EXPERTS)
    refuse_unknown(parser, "routing", args.routings, ROUTINGS)
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


class Bench(KernelBench):
    def __init__(self, args: argparse.Namespace) -> None:
        from moe_backends import BACKENDS

        from vllm_nvfp4.kernels.cuda import moe

        super().__init__("bench_moe", args, BACKENDS, moe.prepare_moe)

    def parts(self) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        for model in self.args.models:
            title = f"{model}: {BENCH_EXPERTS[model]}"
            yield title, lambda model=model: self.model_rows(model)

    def model_rows(self, model: str) -> list[Row]:
        """Every backend at every M and routing on one model's layer."""
        import torch
        from moe_backends import Layer

        layer = Layer(BENCH_EXPERTS[model], self.args.format, self.device, seed=0)
        rows: list[Row] = []
        for backend in self.backends:
            calls: list[Any] = []
            try:
                calls = self.copies(backend, layer)
                for routing in self.args.routings:
                    rows += [self.measure(backend, calls, layer, model, routing, m)
                             for m in self.args.m]  # fmt: skip
            except Exception as error:  # a peer that cannot run a shape must not end the others
                nothing, failed = [math.nan] * 7, reason_of(error)
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
        match = "yes" if error <= backend.max_error else "NO"
        figures = self.figures(us, num_bytes, flops, bits)
        return Row(
            model, routing, m, hit, backend.name, kernel, us, *figures, math.nan, error, match
        )

    def describe(self, backend, m: int, shape) -> tuple[int, str]:
        """(activation bits, kernel's name)"""
        from vllm_nvfp4.kernels.cuda.moe_dispatch import choose_moe

        if not backend.name.startswith("ours"):
            return backend.activation_bits, backend.name
        wanted = {0: "auto", 16: "16", 8: "8"}[backend.activation_bits]
        config = choose_moe(self.gpu, m, shape, self.args.format, self.args.dtype, wanted)
        return (16 if config.stem == "moe_w4a16" else 8), config.symbol


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


def print_rows(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"{r.routing:8s} {r.m:5d} hit {r.hit:6.1f} | {r.backend:12s} {r.us:9.1f} us | "
            f"{r.tflops:7.1f} TFLOP/s | {r.gbps:7.0f} GB/s | {r.pct_limit:5.1f} % of limit | "
            f"{r.pct_copy:5.1f} % of copy | {r.x_marlin:5.2f}x Marlin | {r.error:.1e} {r.match}"
            + (f" {r.kernel}" if r.match == "failed" else ""),
            flush=True,
        )


def main() -> int:
    return run("bench_moe", parse_args(), Bench, Row, Bench.parts, print_rows, RANGES, "-moe")


if __name__ == "__main__":
    sys.exit(main())
