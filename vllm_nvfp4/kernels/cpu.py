# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: pack a weight, multiply with it, look rows up in it."""

from __future__ import annotations

import ctypes
import functools

import torch

from vllm_nvfp4.kernels.cpu_emit import ARGS, LinearSpec, write_linear
from vllm_nvfp4.kernels.cpu_jit import Cpu, compile_function, host_cpu, thread_pool
from vllm_nvfp4.layout import PackedWeight
from vllm_nvfp4.layout_cpu import pack_weight, unpack_rows, unpack_weight
from vllm_nvfp4.numerics.formats import BlockFormat
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row

__all__ = ["gather_rows", "linear", "pack_weight", "unpack_weight", "warm_up"]

_OUT = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_ArgBlock = ctypes.c_int64 * len(ARGS)
_ONE = torch.ones(1)
# Tokens that may go through the weight together. Twelve fill the 32 registers of AVX-512.
_TILES = (1, 2, 3, 4, 6, 8, 10, 12)
# Decoding the codes for one more pass costs about as much as this many tokens' products.
_DECODE_COST = 3
# Fewer codes than this are done by one thread: waking the others takes longer.
_SERIAL_CODES = 16384


@functools.cache
def _compiled(spec: LinearSpec, cpu: Cpu) -> int:
    return compile_function(spec.name, write_linear(spec, cpu), cpu)


@functools.lru_cache(maxsize=4096)
def _tile(tokens: int) -> int:
    """The tile with the least work for M = tokens."""
    fitting = [t for t in _TILES if t <= tokens]
    return min(fitting, key=lambda t: (-(-tokens // t) * (t + _DECODE_COST), t))


@functools.lru_cache(maxsize=4096)
def _kernel(fmt: BlockFormat, tokens: int, out: str, bf16_dot: bool) -> int:
    spec = LinearSpec(fmt.scale_type, fmt.block_size, _tile(tokens), out, bf16_dot)
    return _compiled(spec, host_cpu())


def linear(
    a: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    activation_bits: int = 16,
) -> torch.Tensor:
    """y[m, n] = sum_k A[m, k] * w[n, k] + bias[n], accumulated in f32.

    a:               [M, K] bf16, fp16 or f32; made contiguous if it is not
    bias:            [N] floating point, or None
    activation_bits: 16 takes A = a; 8 takes A = a rounded to E4M3 with one scale per row
    Returns [M, N] of a's dtype. Raises ValueError for a shape or a dtype that does not fit.
    """
    m, n, k = _check(a, packed, bias, activation_bits)
    out_dtype = a.dtype
    y = torch.empty(m, n, dtype=out_dtype)
    if m == 0:
        return y
    cpu = host_cpu()
    a_scale, a_scale_stride = _ONE, 0
    bf16_dot = cpu.has_bf16_dot and (out_dtype == torch.bfloat16 or activation_bits == 8)
    if activation_bits == 8:
        a, a_scale = quantize_fp8_per_row(a)
        a_scale_stride = 4
    a = a.to(torch.bfloat16 if bf16_dot else torch.float32).contiguous()
    if bias is not None:
        bias = bias.to(out_dtype).contiguous()
    pool = thread_pool()
    args = _ArgBlock(
        pool.get_thread_num,
        pool.get_num_threads,
        packed.codes.data_ptr(),
        packed.block_scale.data_ptr(),
        packed.global_scale.data_ptr(),
        a.data_ptr(),
        a_scale.data_ptr(),
        a_scale_stride,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        n,
        k,
    )
    threads = torch.get_num_threads() if m * n * k > _SERIAL_CODES else 1
    pool.run(_kernel(packed.fmt, m, _OUT[out_dtype], bf16_dot), args, threads)
    return y


def _check(
    a: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation_bits: int
) -> tuple[int, int, int]:
    n, k = packed.num_rows, packed.num_cols
    if a.dim() != 2 or a.shape[1] != k or a.dtype not in _OUT:
        raise ValueError(
            f"linear: a is {list(a.shape)} {a.dtype}; needs [M, {k}] in bfloat16, float16 or float32"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"linear: bias is {list(bias.shape)}; needs [{n}]")
    if activation_bits not in (8, 16):
        raise ValueError(f"linear: activation_bits={activation_bits}; choose 16 or 8")
    return a.shape[0], n, k


def gather_rows(packed: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight by number, as an embedding looks them up.

    ids: any shape, int32 or int64. Returns [*ids.shape, K], rounded once to ``dtype``.
    """
    rows = unpack_rows(packed, ids.reshape(-1).long()).dequantize(dtype)
    return rows.view(*ids.shape, packed.num_cols)


def warm_up(fmt: BlockFormat, dtype: torch.dtype, activation_bits: int = 16) -> None:
    """Compile what :func:`linear` needs for this format and activation type, at load time."""
    bf16_dot = host_cpu().has_bf16_dot and (dtype == torch.bfloat16 or activation_bits == 8)
    thread_pool()
    for tile in _TILES:
        _kernel(fmt, tile, _OUT[dtype], bf16_dot)
