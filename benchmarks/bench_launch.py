#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What one product costs the host in eager mode, in microseconds, against torch's own matmul.

    python benchmarks/bench_launch.py --out launch.csv
    python benchmarks/bench_launch.py --stub        # no GPU: a driver that only records

Only eager mode pays it: in a CUDA graph, where vLLM decodes, a launch costs the host nothing.
--stub counts the process's CPU time, so that a busy machine does not matter. Exit status: 0, or 1
where a product with 16-bit activations is above --limit; 3 no CUDA GPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from common import EXIT_NO_GPU, header, require_gpu

from vllm_nvfp4.testing.timer import time_host


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--limit", type=float, default=0, help="fail above this many us; 0: never")
    parser.add_argument("--count", type=int, default=4000, help="calls per measurement")
    parser.add_argument("--stub", action="store_true", help="on a driver that runs nothing")
    args = parser.parse_args()
    if args.stub:
        import stub_gpu

        stub_gpu.install()
    elif not require_gpu("bench_launch"):
        return EXIT_NO_GPU
    with torch.inference_mode():
        rows = [(name, time_host(call, args.count, args.stub)) for name, call in calls(args.stub)]
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
    slow = [name for name, us in rows if name.startswith("linear, 16") and 0 < args.limit < us]
    return 1 if slow else 0


def calls(is_stub: bool):
    """(name, call): small products, so that the GPU is never what the host waits for."""
    import vllm_nvfp4.kernels.cuda.linear as cuda
    from vllm_nvfp4.layers.weights import apply_weight, frozen
    from vllm_nvfp4.testing.kernel_cases import random_weight

    device = torch.device("cpu") if is_stub else torch.device("cuda", torch.cuda.current_device())
    packed = cuda.pack_weight(random_weight(256, 256, "nvfp4", device))
    loaded = cuda.prepare(device, "nvfp4", (torch.bfloat16,))
    a = torch.randn(1, 256, device=device).bfloat16()
    dense = torch.randn(256, 256, device=device).bfloat16()
    layer = torch.nn.Module()
    layer.weight_packed, layer.weight_block_scale = frozen(packed.codes), frozen(packed.block_scale)
    layer.weight_global_scale = frozen(packed.global_scale)
    layer.nvfp4_shape, layer.nvfp4_format = (packed.num_rows, packed.num_cols), packed.fmt.name
    operands = packed.codes, packed.block_scale, packed.global_scale, None
    shape = packed.num_rows, packed.num_cols, packed.fmt.name
    found = [("torch.empty (1 x 256)", lambda: torch.empty(1, 256, device=device))]
    if not is_stub:
        found.append(("torch.mm bf16", lambda: torch.mm(a, dense)))
    for bits, launches in ((16, "one launch"), (8, "two launches")):
        if bits == 8 and loaded.gpu.arch < 89:
            continue
        found += [
            (
                f"linear, {bits}-bit activations, {launches}",
                lambda bits=bits: cuda.linear(a, packed, None, bits),
            ),
            (
                f"linear, {bits}-bit, as vLLM's layer calls it",
                lambda bits=bits: apply_weight(layer, a, None, str(bits)),
            ),
            (
                f"op of a compiled graph, {bits}-bit",
                lambda bits=bits: torch.ops.vllm_nvfp4.linear(a, *operands, *shape, bits),
            ),
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
