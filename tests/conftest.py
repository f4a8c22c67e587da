# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests; read before torch is imported."""

import os

# The tests run on two processes (see the Makefile). OpenMP threads of both on the same cores wait
# for each other in busy loops, which makes a suite of small tensors several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--vllm", help="the release that `import vllm` must give; default any")
