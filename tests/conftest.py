# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests; read before torch is imported."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support" / "lesser_cpu_site"))
import lesser_cpu
import pytest

lesser_cpu.install()

# The tests run on two processes (see the Makefile). OpenMP threads of both on the same cores wait
# for each other in busy loops, which makes a suite of small tensors several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _variant_of_8_bits_as_it_was():
    """An engine in this process leaves its options' variant in force: not for the next test."""
    yield
    for name in ("cpu.linear", "cuda.devices"):
        if module := sys.modules.get(f"vllm_nvfp4.kernels.{name}"):
            module.use_variant("exact")


def pytest_collection_modifyitems(items):
    """Files with engines first: the last one to run would leave the other process idle."""
    with_engines = {item.path for item in items if item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in with_engines)


def pytest_addoption(parser):
    parser.addoption("--vllm", help="the release that `import vllm` must give; default any")
