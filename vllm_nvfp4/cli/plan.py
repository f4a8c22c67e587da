# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 plan MODEL``: what fits on a card and how fast it can be at best."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_nvfp4.gpus import GPUS, find_gpu
from vllm_nvfp4.planning import model as planning
from vllm_nvfp4.planning.shapes import find_shape


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="memory and best speed of a model on a card, from config.json alone",
        description="Memory and the roofline of decoding, from config.json alone, dense models.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a cached model or a shape's name")
    parser.add_argument("--gpu", default="RTX 4090", help="the card (default: RTX 4090)")
    parser.add_argument("--context", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--concurrency", type=int, default=1, help="sequences at once")
    parser.add_argument("--kv-bits", type=int, choices=(8, 16), default=8)
    for part in ("lm-head", "embedding"):
        parser.add_argument(f"--{part}", choices=("keep", "fp8", "nvfp4"), default="keep")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print one row per format; 0. Raises ValueError for wrong input."""
    gpu = find_gpu(args.gpu)
    if gpu is None:
        raise ValueError(f"--gpu {args.gpu}: unknown; cards: {', '.join(g.name for g in GPUS)}.")
    shape = find_shape(args.model)
    if not 1 <= args.context <= shape.max_context:
        raise ValueError(f"--context {args.context}: {shape.name} takes 1 to {shape.max_context}.")
    if args.concurrency < 1:
        raise ValueError(f"--concurrency {args.concurrency}: needs 1 or more.")
    budget = int(gpu.memory_gb * 1e9 * planning.UTILIZATION)
    fixed = planning.OVERHEAD_BYTES + planning.activation_bytes(shape, args.concurrency)
    kv = args.concurrency * planning.kv_bytes(shape, args.context, args.kv_bits)
    rows = []
    for fmt in planning.FORMATS:
        weights = planning.weights_of(shape, fmt, args.lm_head, args.embedding)
        step = planning.decode(
            shape, weights, fmt, args.kv_bits, args.context, args.concurrency, gpu
        )
        rows.append(
            {
                "format": fmt,
                "weight_bytes": weights.total,
                "kv_bytes": kv,
                "overhead_bytes": fixed,
                "total_bytes": weights.total + kv + fixed,
                "fits": weights.total + kv + fixed <= budget,
                "step_bytes": step.num_bytes,
                "step_flops": step.flops,
                "tflops": planning.tensor_tflops(gpu, fmt),
                "limit_tokens_per_s": step.tokens_per_s,
                "bound": step.bound,
            }
        )
    head = {"model": shape.name, "gpu": gpu.name, "budget_bytes": budget, "gbps": gpu.dram_gbps}
    if args.json:
        print(json.dumps(head | {"formats": rows}, indent=2))
        return 0
    print(f"{shape.name} on {gpu.name}: {budget / 1e9:.2f} GB usable, {gpu.dram_gbps} GB/s; "
          f"{args.concurrency} x {args.context} tokens, {args.kv_bits}-bit KV")  # fmt: skip
    print("GB:    weights     KV  other*   total  fits   read/step  TFLOP/step  limit tok/s  bound")
    for r in rows:
        print(
            f"{r['format']:6} {r['weight_bytes'] / 1e9:7.2f} {kv / 1e9:6.2f} {fixed / 1e9:7.2f} "
            f"{r['total_bytes'] / 1e9:7.2f}  {'yes' if r['fits'] else 'no':4} "
            f"{r['step_bytes'] / 1e9:11.2f} {r['step_flops'] / 1e12:11.3f} "
            f"{r['limit_tokens_per_s']:12.1f}  {r['bound']} ({r['tflops']:.0f} TFLOP/s)"
        )
    print("* activations, graphs and CUDA context: an estimate. The limit is the larger of bytes / "
          "bandwidth and FLOP / rate; nothing runs faster.")  # fmt: skip
    return 0
