#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run every feature of vLLM's that docs/features.md lists beside the plugin, on the device at hand.

    python benchmarks/check_features.py                  # all of vllm_nvfp4/testing/features.py
    python benchmarks/check_features.py --only Ray --only "Sleep and wake"

Answers are compared with the plain run of the same small checkpoint: in BF16 on a GPU, where they
may err as far from float32 as vLLM's own BF16 layers do, in float32 on the CPU. What the machine
cannot do (two GPUs; Ray and sleep mode on a CPU) is named.

Exit status: 0 all that ran give the same answers, 1 one does not, 3 nothing ran.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from common import EXIT_NO_GPU

from vllm_nvfp4.testing.features import FEATURES, Feature


def obstacle(feature: Feature, num_gpus: int) -> str:
    """Why the machine cannot run a feature; "" where it can."""
    if num_gpus == 0 and feature.cpu.startswith("refused by vLLM"):
        return "vLLM refuses it on a CPU"
    if 0 < num_gpus < feature.num_gpus:
        return f"takes {feature.num_gpus} GPUs, found {num_gpus}"
    return ""


def parse() -> list[Feature]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [feature.name for feature in FEATURES]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="a feature; repeatable"
    )
    only = parser.parse_args().only
    return [feature for feature in FEATURES if not only or feature.name in only]


def main() -> int:
    features = parse()
    import torch

    from vllm_nvfp4.testing.checkpoints import extract_fixture, write_dequantized
    from vllm_nvfp4.testing.feature_checks import CHECKS, make_setup

    num_gpus = torch.cuda.device_count()
    counts = {"passed": 0, "failed": 0, "not run": 0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = extract_fixture("modelopt/w4a16-llama", Path(scratch))
        plain = write_dequantized(folder, Path(scratch) / "plain")
        dtype = "bfloat16" if num_gpus else "float32"
        setup = make_setup(folder, plain, Path(scratch), dtype)
        print(f"{dtype}, log-probabilities within {setup.tolerance:.3g}", flush=True)
        for feature in features:
            begin, state, note = time.monotonic(), "not run", obstacle(feature, num_gpus)
            if not note:
                state, note = "passed", ""
                try:
                    CHECKS[feature.name](setup)
                except Exception as error:  # vLLM raises anything; the next feature still counts
                    state, note = "failed", f"{type(error).__name__}: {error}"
            counts[state] += 1
            seconds = time.monotonic() - begin
            print(f"{feature.name:28s} {state:8s} {seconds:5.0f} s  {note}", flush=True)
    print(", ".join(f"{number} {state}" for state, number in counts.items()))
    if counts["failed"]:
        return 1
    return 0 if counts["passed"] else EXIT_NO_GPU


if __name__ == "__main__":
    sys.exit(main())
