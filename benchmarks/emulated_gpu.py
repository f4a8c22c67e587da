#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run a program that needs a CUDA GPU on the emulated one (csrc/host/), on any machine.

    python benchmarks/emulated_gpu.py benchmarks/check_kernels.py --small --only mxfp4

The program is told of an RTX 4090; its tensors and kernels are this machine's. Times mean nothing.
The exit status is the program's.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from common import ROOT  # noqa: F401  this checkout before an installed copy

from vllm_nvfp4.testing.emulated_gpu import emulated_gpu


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    program = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(program).resolve().parent))
    with emulated_gpu():
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
