#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run every CUDA kernel on a GPU and compare with float64; no pytest needed.

    python benchmarks/check_kernels.py            # every configuration, all shapes
    python benchmarks/check_kernels.py --small    # two small shapes: for compute-sanitizer
    python benchmarks/check_kernels.py --first    # what a GPU must show before all else

First comes what a GPU must show before its products mean anything (testing/first_checks.py). A
kernel that was meant to be checked and never ran counts as a mismatch.

Exit status: 0 all match, 1 a mismatch, 3 no CUDA GPU.
"""

from __future__ import annotations

import argparse
import sys

from common import EXIT_NO_GPU, require_gpu


class Checks:
    """Outcomes, printed as they come."""

    def __init__(self) -> None:
        self.num_checked, self.failed = 0, []

    def add(self, name: str, outcome) -> None:
        self.num_checked += 1
        if not outcome.is_match:
            self.failed.append(name)
            print(f"MISMATCH {name}\n{outcome.report}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two small shapes per configuration")
    parser.add_argument("--first", action="store_true", help="what comes first, and no more")
    parser.add_argument("--only", default="", help="only kernels whose symbol contains this")
    args = parser.parse_args()
    if not require_gpu("check_kernels"):
        return EXIT_NO_GPU

    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    checks = Checks()
    first(checks, device, major * 10 + minor, args.only)
    left_out = 0
    if not args.first:
        left_out = products(checks, device, major * 10 + minor, args)
        for symbol in never_launched(device, major * 10 + minor, args.only):
            checks.failed.append(symbol)
            print(f"MISMATCH {symbol} was never launched")
    print(f"{checks.num_checked} checks, {len(checks.failed)} mismatches; "
          f"{left_out} kernels need a newer GPU")  # fmt: skip
    return 1 if checks.failed or not checks.num_checked else 0


def first(checks: Checks, device, arch: int, only: str) -> None:
    """In the order of what the rest rests on."""
    from vllm_nvfp4.testing import first_checks
    from vllm_nvfp4.testing.kernel_cases import TORCH_DTYPES

    eight_bit = [c for c in first_checks.first_configs(arch) if only in c.symbol]
    for config in eight_bit:
        outcome = first_checks.check_subnormals(config, device)
        checks.add(f"FP8 subnormals as MMA inputs, {config.symbol}", outcome)
        print(f"FP8 subnormals as MMA inputs: {config.symbol} {outcome.report}", flush=True)
    for dtype in sorted({config.dtype for config in eight_bit}):
        outcome = first_checks.check_quantizer(TORCH_DTYPES[dtype], device)
        checks.add(f"quantiser of {dtype} activations", outcome)
        print(f"quantiser of {dtype} activations: {outcome.report}", flush=True)
    for name, outcome in first_checks.check_numerics(device).items():
        checks.add(f"the CPU's bits: {name}", outcome)
        print(f"the CPU's bits: {name}: {outcome.report}", flush=True)


def products(checks: Checks, device, arch: int, args) -> int:
    """Every configuration on every shape. Returns how many the GPU is too old for."""
    from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS
    from vllm_nvfp4.kernels.cuda.moe_configs import MOE_CONFIGS, MoeConfig
    from vllm_nvfp4.testing import kernel_cases, moe_checks

    shapes = kernel_cases.SMALL_SHAPES if args.small else kernel_cases.SHAPES
    moe_shapes = moe_checks.SMALL_SHAPES if args.small else moe_checks.SHAPES
    left_out = 0
    for config in (*GEMM_CONFIGS, *MOE_CONFIGS):
        if args.only not in config.symbol:
            continue
        if config.min_arch > arch:
            left_out += 1
            continue
        is_moe = isinstance(config, MoeConfig)
        check = moe_checks.check_moe_case if is_moe else kernel_cases.check_case
        cases = (
            moe_checks.moe_cases_of(config, moe_shapes)
            if is_moe
            else kernel_cases.kernel_cases_of(config, shapes)
        )
        worst = 0.0
        for case in cases:
            outcome = check(case, device)
            checks.add(str(case), outcome)
            worst = max(worst, outcome.worst)
        print(f"{config.symbol:70s} worst {worst:.3f} x tolerance", flush=True)
    return left_out


def never_launched(device, arch: int, only: str) -> list[str]:
    """The kernels that this run was to check, and that it never launched."""
    from vllm_nvfp4.kernels.cuda import linear as cuda
    from vllm_nvfp4.kernels.cuda.configs import ALL_CONFIGS
    from vllm_nvfp4.kernels.cuda.moe_configs import ALL_MOE_CONFIGS

    launched = cuda.prepare(device, "nvfp4").launched
    wanted = [
        c.symbol
        for c in (*ALL_CONFIGS, *ALL_MOE_CONFIGS)
        if only in c.symbol and c.min_arch <= arch
    ]
    return [symbol for symbol in wanted if symbol not in launched]


if __name__ == "__main__":
    sys.exit(main())
