# SPDX-License-Identifier: Apache-2.0
"""The frame of the kernels' benchmarks: their flags, the GPU, and a table written as it grows."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import EXIT_NO_GPU, copy_bandwidth_gbps, gpu_slug, header, require_gpu


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """The flags that both have; ``out``: where the results go by default."""
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--format", choices=("nvfp4", "mxfp4"), default="nvfp4")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing per measurement")
    parser.add_argument("--budget", type=float, default=0, help="stop after this many seconds")
    parser.add_argument("--out", type=Path, help=f"CSV file; default {out}")


def refuse_unknown(
    parser: argparse.ArgumentParser, what: str, given: Sequence[str], known: Iterable[str]
) -> None:
    if unknown := [name for name in given if name not in known]:
        parser.error(f"unknown {what} {unknown[0]}; known: {', '.join(known)}")


class KernelBench:
    """The GPU side; made only where there is one.

    who:      the benchmark's name, for messages
    backends: name -> backend, of which ``args.backends`` names some
    prepare:  loads this project's kernels on a device for a format and dtypes
    """

    def __init__(
        self,
        who: str,
        args: argparse.Namespace,
        backends: Mapping[str, Any],
        prepare: Callable[..., Any],
    ) -> None:
        import torch

        from vllm_nvfp4.testing.kernel_cases import TORCH_DTYPES

        if unknown := [name for name in args.backends if name not in backends]:
            sys.exit(f"{who}: unknown backend {unknown[0]}; known: {', '.join(backends)}")
        self.args, self.dtype = args, TORCH_DTYPES[args.dtype]
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.loaded = prepare(self.device, args.format, (self.dtype,))
        self.gpu = self.loaded.gpu
        self.copy_gbps = copy_bandwidth_gbps()
        chosen = [backends[name] for name in args.backends]
        self.backends = [b for b in chosen if self.gpu.arch >= 89 or b.activation_bits != 8]
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def figures(
        self, us: float, num_bytes: float, flops: float, activation_bits: int
    ) -> tuple[float, float, float, float]:
        """(TFLOP/s, GB/s, % of the roofline, % of the copy rate)"""
        rate = self.gpu.fp8_f32_tflops if activation_bits == 8 else self.gpu.bf16_tflops
        limit_us = max(num_bytes / (self.gpu.dram_gbps * 1e3), flops / (rate * 1e6))
        gbps = num_bytes / us / 1e3
        return flops / us / 1e6, gbps, 100 * limit_us / us, 100 * gbps / self.copy_gbps


def reason_of(error: Exception) -> str:
    """What stands in the kernel's column of a row that failed."""
    return "failed: " + " ".join(str(error).split())[:160]


def geometric_means(rows: Sequence[Any], ranges: Sequence[tuple[str, range]]) -> list[str]:
    """Lines: each backend's speed against Marlin, over the tokens of each range."""
    lines = []
    for backend in dict.fromkeys(row.backend for row in rows):
        parts = []
        for name, wanted in ranges:
            speeds = [
                row.x_marlin
                for row in rows
                if row.backend == backend and row.m in wanted and row.x_marlin > 0
            ]
            if speeds:
                mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
                parts.append(f"{name}: {mean:.2f}x Marlin (least {min(speeds):.2f}, {len(speeds)})")
        lines.append(f"{backend:20s} {'  '.join(parts) or 'nothing to compare'}")
    return lines


def format_row(row: Any) -> list[object]:
    values = dataclasses.astuple(row)
    return [f"{v:.5g}" if isinstance(v, float) else v for v in values]


def run(
    who: str,
    args: argparse.Namespace,
    make: Callable[[argparse.Namespace], KernelBench],
    row_type: type,
    parts: Callable[[Any], Iterator[tuple[str, Callable[[], list[Any]]]]],
    print_rows: Callable[[list[Any]], None],
    ranges: Sequence[tuple[str, range]],
    suffix: str = "",
) -> int:
    """Measure part after part into a CSV; the exit status.

    parts:  of the benchmark that ``make`` made: (title, what measures it)
    suffix: of the default file's name, after the GPU's
    """
    if not require_gpu(who):
        return EXIT_NO_GPU
    bench = make(args)
    default = Path(__file__).parent / "results" / f"{gpu_slug(bench.gpu.name)}{suffix}.csv"
    out = args.out or default
    out.parent.mkdir(parents=True, exist_ok=True)
    head = [*header(), ("copy_gbps", f"{bench.copy_gbps:.0f}")]
    head += [(f"note {b.name}", b.note) for b in bench.backends if getattr(b, "note", "")]
    for name, value in head:
        print(f"# {name}: {value}")
    started, rows = time.monotonic(), []
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows((f"# {name}", value) for name, value in head)
        writer.writerow(field.name for field in dataclasses.fields(row_type))
        for title, measure in parts(bench):
            if args.budget and time.monotonic() - started > args.budget:
                print(f"# stopped at the budget of {args.budget:.0f} s: {title} and what follows "
                      "were not measured")  # fmt: skip
                writer.writerow(["# stopped at the budget before", title])
                break
            print(f"\n{title}")
            new = measure()
            print_rows(new)
            rows += new
            writer.writerows(format_row(row) for row in new)
            file.flush()
    print("\n".join(["", *geometric_means(rows, ranges), f"\nwritten to {out}"]))
    is_bad = any(
        row.match == "NO" or (row.match == "failed" and row.backend.startswith("ours"))
        for row in rows
    )
    return 1 if is_bad or not rows else 0
