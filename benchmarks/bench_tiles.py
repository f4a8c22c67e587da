#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time every tile and split of the kernels, and say what dispatch's choice loses to the best.

    python benchmarks/bench_tiles.py --models Qwen3-8B --m 1,16,64 --out tiles.csv

The constants of vllm_nvfp4/kernels/cuda/cost.py are to be set from this. Exit status: 0, or 3
where there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from pathlib import Path

from bench_gemm import layers_of
from common import EXIT_NO_GPU, header, require_gpu

from vllm_nvfp4.testing.shapes import BENCH_MODELS

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
COLUMNS = ("m", "n", "k", "bits", "kernel", "splits", "us", "is_choice", "is_best", "estimated_us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="Qwen3-8B,Llama-3.1-70B")
    parser.add_argument("--m", default="1,8,16,32,64,128,256,1024")
    parser.add_argument("--bits", choices=("16", "8", "both"), default="16")
    parser.add_argument("--seconds", type=float, default=0.02, help="of timing per measurement")
    parser.add_argument("--budget", type=float, default=0, help="stop after this many seconds")
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args()
    models = args.models.split(",")
    if unknown := [m for m in models if m not in BENCH_MODELS]:
        parser.error(f"unknown model {unknown[0]}; known: {', '.join(BENCH_MODELS)}")
    if not require_gpu("bench_tiles"):
        return EXIT_NO_GPU
    deadline = time.monotonic() + args.budget if args.budget else math.inf
    head, rows, losses = header(), [], []
    for name, value in head:
        print(f"# {name}: {value}")
    for _, _, n, k in layers_of(models):
        for m in (int(m) for m in args.m.split(",")):
            for bits in (16, 8) if args.bits == "both" else (int(args.bits),):
                if time.monotonic() > deadline:
                    break
                measured = measure(m, n, k, bits, args.seconds)
                rows += measured
                losses.append(report(measured))
    if losses:
        mean = math.exp(sum(map(math.log, losses)) / len(losses))
        print(f"dispatch's choice takes {mean:.3f}x the best time (geometric mean of {len(losses)},"
              f" worst {max(losses):.2f}x)")  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows((f"# {name}", value) for name, value in head)
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    return 0


def measure(m: int, n: int, k: int, bits: int, seconds: float) -> list[tuple]:
    """A row (COLUMNS) for every configuration and split of one product."""
    import torch

    from vllm_nvfp4.kernels.cuda import dispatch
    from vllm_nvfp4.kernels.cuda import linear as cuda
    from vllm_nvfp4.kernels.cuda.devices import current_stream
    from vllm_nvfp4.testing.kernel_cases import random_weight
    from vllm_nvfp4.testing.timer import num_rotations, time_graph

    place = torch.device("cuda", torch.cuda.current_device())
    device = cuda.prepare(place, "nvfp4", (torch.bfloat16,))
    l2_bytes = torch.cuda.get_device_properties(place).L2_cache_size
    copies = num_rotations(n * k * 9 // 16, l2_bytes, most=24)
    packed = [cuda.pack_weight(random_weight(n, k, "nvfp4", place)) for _ in range(copies)]
    a = torch.randn(m, k, device=place).bfloat16()
    chosen = device.choose(m, n, k, "nvfp4", "bf16", str(bits))
    rows = []
    for config in dispatch.reachable("nvfp4", "bf16", bits):
        default = dispatch.launch_geometry(device.gpu, config, m, n, k).num_splits
        most = max(1, math.ceil(k / config.block_k) // 2)
        for splits in sorted({default, *(s for s in SPLITS if s <= most)}):
            choice = dispatch.launch_geometry(device.gpu, config, m, n, k, splits)

            def call(weight, choice=choice):
                y = a.new_empty((m, n))
                cuda.run(device, choice, a, weight, None, y, current_stream(place.index))
                return y

            us = time_graph([lambda w=w, call=call: call(w) for w in packed], seconds)
            is_choice = (config, splits) == (chosen.config, chosen.num_splits)
            rows.append((m, n, k, bits, config.symbol, splits, us, is_choice, choice.estimated_us))
    best = min(row[6] for row in rows)
    return [(*row[:6], f"{row[6]:.3f}", row[7], row[6] == best, f"{row[8]:.2f}") for row in rows]


def report(rows: list[tuple]) -> float:
    """Print one line about a product; returns the choice's time over the best."""
    choice = next(row for row in rows if row[7])
    best = next(row for row in rows if row[8])
    loss = float(choice[6]) / float(best[6])
    m, n, k, bits = choice[:4]
    print(f"{m:5d} {n:6d} {k:6d} A{bits:<2d} choice {choice[6]:>9s} us  best {best[6]:>9s} us "
          f"({loss:.2f}x): {choice[4]}/{choice[5]} vs {best[4]}/{best[5]}", flush=True)  # fmt: skip
    return loss


if __name__ == "__main__":
    sys.exit(main())
