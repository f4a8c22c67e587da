#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What one product costs the host in eager mode, in microseconds, against torch's own matmul.

    python benchmarks/bench_launch.py --out launch.csv

Exit status: 0, or 1 where a row of ours is above --limit; 3 no CUDA GPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from common import EXIT_NO_GPU, header, require_gpu

from vllm_nvfp4.testing.timer import time_host


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--limit", type=float, default=0, help="fail above this many us; 0: never")
    parser.add_argument("--count", type=int, default=4000, help="calls per measurement")
    args = parser.parse_args()
    if not require_gpu("bench_launch"):
        return EXIT_NO_GPU
    rows = [(name, time_host(call, args.count)) for name, call in calls()]
    head = header()
    for name, value in head:
        print(f"# {name}: {value}")
    for name, us in rows:
        print(f"{name:44s} {us:6.2f} us")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows((f"# {name}", value) for name, value in head)
            writer.writerow(("call", "host_us"))
            writer.writerows((name, f"{us:.3f}") for name, us in rows)
    slow = [name for name, us in rows if name.startswith("linear") and 0 < args.limit < us]
    return 1 if slow else 0


def calls():
    """(name, call): small products, so that the GPU is never what the host waits for."""
    import torch

    from vllm_nvfp4.kernels import cuda, ops
    from vllm_nvfp4.testing.kernel_cases import random_weight

    device = torch.device("cuda", torch.cuda.current_device())
    packed = cuda.pack_weight(random_weight(256, 256, "nvfp4", device))
    loaded = cuda.prepare(device, "nvfp4", (torch.bfloat16,))
    a = torch.randn(1, 256, device=device).bfloat16()
    dense = torch.randn(256, 256, device=device).bfloat16()
    arguments = (
        a, packed.codes, packed.block_scale, packed.global_scale, None,
        packed.num_rows, packed.num_cols, packed.fmt.name,
    )  # fmt: skip
    found = [
        ("torch.empty (1 x 256)", lambda: torch.empty(1, 256, device=device)),
        ("torch.mm bf16", lambda: torch.mm(a, dense)),
        ("linear, 16-bit activations", lambda: cuda.linear(a, packed, None, 16)),
        ("linear through torch.ops, 16-bit", lambda: ops_call(torch, arguments, 16)),
    ]
    assert ops  # registers torch.ops.vllm_nvfp4
    if loaded.gpu.arch >= 89:
        found += [
            ("linear, 8-bit activations (two launches)", lambda: cuda.linear(a, packed, None, 8)),
            ("linear through torch.ops, 8-bit", lambda: ops_call(torch, arguments, 8)),
        ]
    return found


def ops_call(torch, arguments, bits):
    return torch.ops.vllm_nvfp4.linear(*arguments, bits)


if __name__ == "__main__":
    sys.exit(main())
