#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Print what a measurement depends on: GPU, clocks, driver, versions, commit, tools."""

from __future__ import annotations

import os
import shutil
import sys

from common import header, output_of

from vllm_nvfp4.kernels.cuda.nvrtc import nvrtc_version, version_text


def main() -> int:
    for name, value in header():
        if name != "command":
            print(f"{name}: {value}")
    print(f"nvrtc: {version_text(nvrtc_version())}")
    print(f"cpu cores: {os.cpu_count()}")
    for tool, arguments in (("nvcc", ("--version",)), ("compute-sanitizer", ("--version",))):
        print(f"{tool}: {output_of(tool, *arguments)[-60:] if shutil.which(tool) else 'not found'}")
    smi = output_of(
        "nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader"
    )
    print(f"gpus: {smi or 'none that nvidia-smi sees'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
