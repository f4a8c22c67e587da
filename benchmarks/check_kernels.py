#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run every CUDA kernel on a GPU and compare with float64; no pytest needed.

    python benchmarks/check_kernels.py            # every configuration, all shapes
    python benchmarks/check_kernels.py --small    # two small shapes: for compute-sanitizer

Exit status: 0 all match, 1 a mismatch, 3 no CUDA GPU.
"""

from __future__ import annotations

import argparse
import sys

from common import EXIT_NO_GPU, require_gpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two small shapes per configuration")
    parser.add_argument("--only", default="", help="only kernels whose symbol contains this")
    args = parser.parse_args()
    if not require_gpu("check_kernels"):
        return EXIT_NO_GPU

    import torch

    from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS
    from vllm_nvfp4.kernels.cuda.moe_configs import MOE_CONFIGS, MoeConfig
    from vllm_nvfp4.testing import kernel_cases, moe_checks

    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    arch = major * 10 + minor
    shapes = kernel_cases.SMALL_SHAPES if args.small else kernel_cases.SHAPES
    num_checked, failed, left_out = 0, [], 0
    moe_shapes = moe_checks.SMALL_SHAPES if args.small else moe_checks.SHAPES
    for config in (*GEMM_CONFIGS, *MOE_CONFIGS):
        if args.only not in config.symbol:
            continue
        if config.min_arch > arch:
            left_out += 1
            continue
        outcomes = []
        is_moe = isinstance(config, MoeConfig)
        check = moe_checks.check_moe_case if is_moe else kernel_cases.check_case
        for case in (
            moe_checks.moe_cases_of(config, moe_shapes)
            if is_moe
            else kernel_cases.kernel_cases_of(config, shapes)
        ):
            outcome = check(case, device)
            num_checked += 1
            outcomes.append(outcome)
            if not outcome.is_match:
                failed.append(case)
                print(f"MISMATCH {case}\n{outcome.report}", flush=True)
        worst = max(o.worst for o in outcomes)
        print(f"{config.symbol:70s} worst {worst:.3f} x tolerance", flush=True)
    print(f"{num_checked} products, {len(failed)} mismatches; {left_out} kernels need a newer GPU")
    return 1 if failed or not num_checked else 0


if __name__ == "__main__":
    sys.exit(main())
