# SPDX-License-Identifier: Apache-2.0
"""Calls a compiled kernel: its arguments, and the threads that share it."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from vllm_nvfp4.kernels.cpu.emit import ARGS
from vllm_nvfp4.kernels.cpu.jit import thread_pool
from vllm_nvfp4.kernels.cpu.layout import ROWS

_ArgBlock = ctypes.c_int64 * len(ARGS)
# The default type is not float32 while vLLM builds a model: name the type.
ONE = torch.ones(1, dtype=torch.float32, device="cpu")  # imported under any default device
# Fewer codes than this are done by one thread: waking the others takes longer.
_SERIAL_CODES = 16384
_SPREAD_TOKENS = 6


class Shape(NamedTuple):
    """num_tokens, num_rows, num_cols of a kernel's arguments; parts: what threads can share."""

    m: int
    n: int
    k: int
    parts: int


def product_shape(m: int, n: int, k: int) -> Shape:
    return Shape(m, n, k, -(-n // ROWS))


def spread_rows(a: torch.Tensor) -> torch.Tensor:
    """The same rows, with a cache line between them where they would share cache sets.

    A first-level cache keeps eight lines that are a multiple of 4096 bytes apart, and a tile of
    tokens reads more rows than that side by side.
    """
    m, k = a.shape
    if m < _SPREAD_TOKENS or k * a.element_size() % 2048:
        return a
    wide = a.new_empty(m, k + 64 // a.element_size())
    wide[:, :k] = a
    return wide[:, :k]


def run(
    function: int,
    shape: Shape,
    weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    a: torch.Tensor,
    y: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scratch_bytes: int = 0,
) -> None:
    """Run a kernel. weight: (codes, block_scale, multiplier of each row)."""
    m, n, k, parts = shape
    if bias is not None:
        bias = bias.to(y.dtype).contiguous()
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8) if scratch_bytes else None
    threads = min(torch.get_num_threads(), parts) if m * n * k > _SERIAL_CODES else 1
    pool = thread_pool()
    codes, block_scale, global_scale = weight
    args = _ArgBlock(
        pool.get_thread_num,
        pool.get_num_threads,
        codes.data_ptr(),
        block_scale.data_ptr(),
        global_scale.data_ptr(),
        a.data_ptr(),
        a.stride(0) * a.element_size(),
        ONE.data_ptr() if a_scale is None else a_scale.data_ptr(),
        0 if a_scale is None else 4,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        n,
        k,
        0 if scratch is None else scratch.data_ptr(),
    )
    pool.run(function, args, threads)
