# SPDX-License-Identifier: Apache-2.0
"""Products of few different numbers of rows: the same values, and memory that does not grow."""

import subprocess
import sys

import pytest
import torch

from vllm_nvfp4.quantize.moments import difference_moment
from vllm_nvfp4.quantize.row_counts import FewRowCounts, row_count

GROWTH = """
import ctypes, sys, torch
from vllm_nvfp4.quantize.row_counts import FewRowCounts
class Info(ctypes.Structure):
    _fields_ = [(f"f{i}", ctypes.c_size_t) for i in range(10)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
weight = torch.ones(256, 256, dtype=torch.bfloat16)
with torch.inference_mode(), FewRowCounts():
    for rows in [*range(1000, 1100), *range(1100, 1400)]:
        if rows == 1100:
            before = libc.mallinfo2().f7  # bytes in use
        torch.nn.functional.linear(torch.ones(rows, 256, dtype=torch.bfloat16), weight)
print((libc.mallinfo2().f7 - before) >> 10)
"""


def test_an_eighth_is_added_at_most():
    counts = [row_count(n) for n in range(1, 20_000)]
    assert all(n <= c < n + max(16, n / 8 + 1) for n, c in enumerate(counts, 1))
    assert len(set(counts)) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 16, 37, 1001])
def test_rows_are_the_same(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (rows, 48))
    for product in (lambda: torch.nn.functional.linear(x, weight), lambda: x @ weight.T):
        expected = product()
        with FewRowCounts():
            found = product()
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)
    if rows:
        expected = (x.float().T @ x.float()) / rows
        torch.testing.assert_close(
            difference_moment(x, torch.zeros_like(x), x), expected, rtol=0.02, atol=0.02
        )


def test_what_is_kept_of_300_numbers_of_rows_is_little():
    """KiB; without it 180,000 on a CPU with AMX."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8_000
