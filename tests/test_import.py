# SPDX-License-Identifier: Apache-2.0
"""Modules are imported by the call that needs them, so wherever vLLM is at that time: it builds
models under a default device of its own."""

import subprocess
import sys

IMPORT_UNDER_META = """
import importlib, pkgutil, sys
import torch
import vllm_nvfp4

UPPER = ("vllm_nvfp4.cli", "vllm_nvfp4.bench", "vllm_nvfp4.testing")
with torch.device("meta"):
    for module in pkgutil.walk_packages(vllm_nvfp4.__path__, "vllm_nvfp4."):
        if not module.name.startswith(UPPER):
            importlib.import_module(module.name)
for name, module in list(sys.modules.items()):
    if name.startswith("vllm_nvfp4"):
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                print(f"{name}.{key}")
"""


def test_no_constant_takes_the_default_device_of_whoever_imports_it_first():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_UNDER_META], capture_output=True, text=True, check=True
    )
    assert [line for line in result.stdout.splitlines() if line.startswith("vllm_nvfp4")] == []
