# SPDX-License-Identifier: Apache-2.0
"""Rows without a product: decoded, looked up, rounded to 8 bits."""

from __future__ import annotations

import torch

from vllm_nvfp4.kernels.cpu.call import ONE, Shape, product_shape, run
from vllm_nvfp4.kernels.cpu.dispatch import (
    OUT_NAME,
    decode_kernel,
    fp8_dequantize_kernel,
    round_kernel,
)
from vllm_nvfp4.kernels.cpu.layout import ROWS
from vllm_nvfp4.kernels.layout import PackedWeight


def round_per_token(a: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """numerics' quantize_fp8_per_row with q as numbers: (q [M, K] of ``dtype``, scale [M] f32)."""
    source, out = OUT_NAME[a.dtype], OUT_NAME[dtype]
    q, scale = torch.empty_like(a, dtype=dtype), torch.empty(a.shape[0], dtype=torch.float32)
    weight = (q, q, scale)  # no weight: these words are not read
    m, k = a.shape
    run(round_kernel(source, out), Shape(m, k, k, m), weight, a, q, scale)
    return q, scale


def dequantize_rows(
    packed: PackedWeight, first: int, last: int, dtype: torch.dtype
) -> torch.Tensor:
    """code * block_scale of rows first..last-1, [K, last - first]. first: a multiple of sixteen.

    bf16 and f32 hold the NVFP4 product exactly. The buffer is sized by whole groups.
    """
    fmt, k = packed.fmt, packed.num_cols
    group, end = first // ROWS, -(-last // ROWS)
    y = torch.empty(k, (end - group) * ROWS, dtype=dtype)
    function = decode_kernel("dequantize", fmt, OUT_NAME[dtype])
    weight = (packed.codes[group:end], packed.block_scale[group:end], packed.global_scale)
    run(function, product_shape(1, y.shape[1], k), weight, ONE, y)
    return y[:, : last - first]


def dequantize_fp8(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 bytes [R, K] as numbers, exactly. torch's own cast goes element by element."""
    n, k = weight.shape
    y = torch.empty(n, k, dtype=dtype)
    function = fp8_dequantize_kernel(OUT_NAME[dtype])
    run(function, product_shape(1, n, k), (weight, weight, ONE), ONE, y)
    return y


def gather_rows(packed: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight by number, as an embedding looks them up.

    ids: any shape, int32 or int64. Returns [*ids.shape, K], rounded once to ``dtype``.
    """
    n, k, fmt = packed.num_rows, packed.num_cols, packed.fmt
    rows = ids.reshape(-1).long().contiguous()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < n:
        raise ValueError(f"gather_rows: ids run {int(rows.min())}..{int(rows.max())} of 0..{n - 1}")
    y = torch.empty(rows.numel(), k, dtype=dtype)
    kernel = decode_kernel("gather", fmt, OUT_NAME[dtype])
    weight = (packed.codes, packed.block_scale, packed.global_scale)
    m = rows.numel()
    run(kernel, Shape(m, n, k, m), weight, rows, y)
    return y.view(*ids.shape, k)


def gather_fp8_rows(
    weight: torch.Tensor, row_scale: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of an FP8 weight by number: row_scale[id] * weight[id].

    weight: [N, K] float8_e4m3fn or its bits; ids: any shape. Returns [*ids.shape, K].
    """
    rows = ids.reshape(-1).long()
    bits = weight.view(torch.uint8)[rows]
    values = dequantize_fp8(bits, torch.float32).mul_(row_scale[rows][:, None])
    return values.to(dtype).view(*ids.shape, weight.shape[1])
