# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: pack a weight, multiply with it, look rows up in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_nvfp4.kernels.cpu.call import Shape, product_shape, run, spread_rows
from vllm_nvfp4.kernels.cpu.dispatch import (
    OUT_NAME,
    fp4_bf16_dot,
    fp4_kernel,
    fp8_bf16_dot,
    fp8_kernel,
    int8_kernel,
    int8_quantizer,
    operand_type,
    uses_matmul,
    warm_up,
    warm_up_fp8,
)
from vllm_nvfp4.kernels.cpu.fp8 import panel_bytes
from vllm_nvfp4.kernels.cpu.int8 import row_layout
from vllm_nvfp4.kernels.cpu.jit import host_cpu
from vllm_nvfp4.kernels.cpu.layout import ROWS, pack_weight, unpack_weight
from vllm_nvfp4.kernels.cpu.rows import (
    dequantize_fp8,
    dequantize_rows,
    gather_fp8_rows,
    gather_rows,
    round_per_token,
)
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.formats import INT8_GROUP
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row as quantize
from vllm_nvfp4.options import is_batch_invariant

__all__ = [
    "a8_variant",
    "fp8_linear",
    "gather_fp8_rows",
    "gather_rows",
    "linear",
    "linear_a8",
    "pack_weight",
    "quantize",
    "resolve_variant",
    "unpack_weight",
    "use_variant",
    "warm_up",
    "warm_up_fp8",
]

_MATMUL_SCRATCH_BYTES = 8 << 20
_INT8_SOURCE = {torch.int8: "i8"}
_variant = "exact"


def use_variant(variant: str) -> None:
    """Take this variant of 8-bit activations from now on, as :func:`resolve_variant` has it."""
    global _variant
    _variant = resolve_variant(variant)


def resolve_variant(variant: str) -> str:
    """What an option means here: "int8", or "exact", which is E4M3 whatever the GPU's kernels would
    round. "auto" takes INT8, the faster and finer one, where there are byte tables for it."""
    if variant == "auto":
        variant = "int8" if host_cpu().has_avx2 or host_cpu().has_avx512 else "exact"
    return "int8" if variant == "int8" else "exact"


def a8_variant(device: torch.device | None = None) -> str:
    """The variant in force."""
    return _variant


def linear(
    a: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    activation_bits: int = 16,
    variant: str | None = None,
) -> torch.Tensor:
    """y[m, n] = sum_k A[m, k] * w[n, k] + bias[n], accumulated in f32.

    a:               [M, K] bf16, fp16 or f32; made contiguous if it is not
    bias:            [N] floating point, or None
    activation_bits: 16 takes A = a; 8 takes A = a rounded to E4M3 with one scale per row, or
                     to INT8 with one per row and 64 columns
    variant:         of 8 bits: "int8", or else E4M3; default the one in force
    Returns [M, N] of a's dtype. INT8 gives the same bits on every processor and for any M; for
    the others, on a processor with BF16 tile hardware (AMX), a bf16 result of
    many tokens is rounded before multiplier and bias as well as after them. Raises ValueError for
    a shape or a dtype that does not fit.
    """
    n, k = packed.num_rows, packed.num_cols
    _check(a, n, k, bias)
    if activation_bits not in (8, 16):
        raise ValueError(f"linear: activation_bits={activation_bits}; choose 16 or 8")
    m, out_dtype = a.shape[0], a.dtype
    y = torch.empty(m, n, dtype=out_dtype)
    if m == 0:
        return y
    if activation_bits == 8 and (variant or a8_variant()) == "int8":
        return _int8_product(a.contiguous(), None, packed, bias, y)
    a_type = _operand_type(out_dtype, activation_bits, m)
    if activation_bits == 8:
        rounded, a_scale = round_per_token(a.contiguous(), a_type)
        return _product(rounded, a_scale, packed, bias, y, activation_bits)
    return _product(a.to(a_type).contiguous(), None, packed, bias, y, activation_bits)


def linear_a8(
    q: torch.Tensor,
    a_scale: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y[m, n] = a_scale[m] * sum_k q[m, k] * w[n, k] + bias[n], accumulated in f32.

    :func:`linear` with 8-bit activations, of activations that are quantised already.

    q:       [M, K] float8_e4m3fn, or int8 of numerics' quantize_int8_per_group
    a_scale: [M] or [M, 1] float32; [M, ceil(K / 64)] for int8
    bias:    [N] floating point, or None
    dtype:   of the result: bfloat16, float16 or float32
    Returns [M, N]. Raises ValueError for a shape or a dtype that does not fit.
    """
    n, m = packed.num_rows, q.shape[0]
    if q.dtype == torch.int8:
        return _int8_product_of(q, a_scale, packed, bias, dtype)
    if q.dtype != torch.float8_e4m3fn or q.shape[1:] != (packed.num_cols,) or a_scale.numel() != m:
        raise ValueError(
            f"linear_a8: q is {list(q.shape)} {q.dtype}, a_scale {list(a_scale.shape)}; needs "
            f"[M, {packed.num_cols}] in float8_e4m3fn and [M]"
        )
    y = torch.empty(m, n, dtype=dtype)
    if m == 0:
        return y
    a = dequantize_fp8(q.contiguous().view(torch.uint8), _operand_type(dtype, 8, m))
    return _product(a, a_scale.reshape(-1).contiguous(), packed, bias, y, 8)


def _int8_product_of(
    q: torch.Tensor,
    a_scale: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`linear_a8` of INT8."""
    (m, k), groups = q.shape, -(-packed.num_cols // INT8_GROUP)
    if k != packed.num_cols or a_scale.shape != (m, groups) or a_scale.dtype != torch.float32:
        raise ValueError(
            f"linear_a8: q is {list(q.shape)} {q.dtype}, a_scale {list(a_scale.shape)} "
            f"{a_scale.dtype}; needs [M, {packed.num_cols}] and [M, {groups}] in float32"
        )
    y = torch.empty(m, packed.num_rows, dtype=dtype)
    if m == 0:
        return y
    return _int8_product(q.contiguous(), a_scale.contiguous(), packed, bias, y)


def _int8_product(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> torch.Tensor:
    """y = int8(a) @ w^T + bias. a: contiguous; with a_scale, q already."""
    (m, n), k, fmt = y.shape, packed.num_cols, packed.fmt
    *_, end = row_layout(k, fmt)
    # Whole cache lines, an odd number of them: rows then fall into different cache sets.
    stride = (-(-end // 64) | 1) * 64
    rows = torch.empty(m, stride, dtype=torch.uint8)
    quantizer = int8_quantizer(_INT8_SOURCE.get(a.dtype) or OUT_NAME[a.dtype], fmt)
    no_weight = (a, a, packed.global_scale)  # these words are not read
    run(quantizer, Shape(m, stride, k, m), no_weight, a, rows, a_scale)
    weight = (packed.codes, packed.block_scale, packed.global_scale)
    function = int8_kernel(fmt, m, OUT_NAME[y.dtype])
    run(function, product_shape(m, n, k), weight, rows, y, None, bias)
    return y


def _operand_type(dtype: torch.dtype, activation_bits: int, m: int) -> torch.dtype:
    """As which type M tokens of ``dtype`` meet the weight."""
    bf16_dot = fp4_bf16_dot(dtype, activation_bits)
    by_matmul = uses_matmul(m, dtype, bf16_dot, is_batch_invariant())
    return operand_type(dtype, bf16_dot, by_matmul)


def _product(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation_bits: int,
) -> torch.Tensor:
    """y = (a * a_scale) @ w^T + bias; a: contiguous, of :func:`_operand_type`."""
    (m, n), k = y.shape, packed.num_cols
    bf16_dot = fp4_bf16_dot(y.dtype, activation_bits)
    is_invariant = is_batch_invariant()
    if uses_matmul(m, y.dtype, bf16_dot, is_invariant):

        def dequantize(first: int, last: int) -> torch.Tensor:
            return dequantize_rows(packed, first, last, a.dtype).T

        return _tiled_matmul(a, dequantize, packed.global_scale, a_scale, bias, y)
    function, is_panel = fp4_kernel(packed.fmt, m, OUT_NAME[y.dtype], bf16_dot, is_invariant)
    scratch = torch.get_num_threads() * k * ROWS * 2 if is_panel else 0
    weight = (packed.codes, packed.block_scale, packed.global_scale)
    a = spread_rows(a)
    run(function, product_shape(m, n, k), weight, a, y, a_scale, bias, scratch)
    return y


def fp8_linear(
    a: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m, n] = row_scale[n] * sum_k a[m, k] * weight[n, k] + bias[n], accumulated in f32.

    a:         [M, K] bf16, fp16 or f32; made contiguous if it is not
    weight:    [N, K] float8_e4m3fn or its uint8 bits, contiguous, without NaN
    row_scale: [N] float32; multiplies
    bias:      [N] floating point, or None
    Returns [M, N] of a's dtype. Raises ValueError for a shape or a dtype that does not fit.
    """
    if weight.dim() != 2 or weight.element_size() != 1 or not weight.is_contiguous():
        raise ValueError(
            f"fp8_linear: weight is {list(weight.shape)} {weight.dtype}; needs a contiguous [N, K] "
            "of float8_e4m3fn or uint8"
        )
    n, k = weight.shape
    _check(a, n, k, bias)
    if row_scale.shape != (n,) or row_scale.dtype != torch.float32:
        raise ValueError(
            f"fp8_linear: row_scale is {list(row_scale.shape)} {row_scale.dtype}; needs [{n}] "
            "float32"
        )
    m = a.shape[0]
    y = torch.empty(m, n, dtype=a.dtype)
    if m == 0:
        return y
    bf16_dot = fp8_bf16_dot(a.dtype)
    is_invariant = is_batch_invariant()
    by_matmul = uses_matmul(m, a.dtype, bf16_dot, is_invariant)
    # e4m3 is exact in bf16 and in f32.
    a = a.to(operand_type(a.dtype, bf16_dot, by_matmul)).contiguous()
    if by_matmul:

        def dequantize(first: int, last: int) -> torch.Tensor:
            return dequantize_fp8(weight[first:last], a.dtype)

        return _tiled_matmul(a, dequantize, row_scale, None, bias, y)
    function, is_panel = fp8_kernel(m, OUT_NAME[y.dtype], bf16_dot, is_invariant)
    scratch = torch.get_num_threads() * panel_bytes(k) if is_panel else 0
    weights = (weight, weight, row_scale)
    a = spread_rows(a)
    run(function, product_shape(m, n, k), weights, a, y, None, bias, scratch)
    return y


def _check(a: torch.Tensor, n: int, k: int, bias: torch.Tensor | None) -> None:
    if a.dim() != 2 or a.shape[1] != k or a.dtype not in OUT_NAME:
        raise ValueError(
            f"linear: a is {list(a.shape)} {a.dtype}; needs [M, {k}] in bfloat16, float16 or "
            "float32"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"linear: bias is {list(bias.shape)}; needs [{n}]")


def _tiled_matmul(
    a: torch.Tensor,
    dequantize: Callable[[int, int], torch.Tensor],
    multiplier: torch.Tensor,
    a_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> torch.Tensor:
    """torch's product with a tile of rows after another, so that the decoded tile stays small.

    dequantize: (first, last) -> [last - first, K] of a's dtype, without the row's multiplier
    With bf16 the product is rounded before the multiplier as well as after it.
    """
    n, k = y.shape[1], a.shape[1]
    rows = max(ROWS, _MATMUL_SCRATCH_BYTES // (k * a.element_size()) // ROWS * ROWS)
    for first in range(0, n, rows):
        last = min(first + rows, n)
        part = (a @ dequantize(first, last).T).float() * multiplier[first:last]
        if a_scale is not None:
            part *= a_scale[:, None]
        if bias is not None:
            part += bias[first:last].to(y.dtype).float()
        y[:, first:last] = part
    return y
