# SPDX-License-Identifier: Apache-2.0
"""What needs no kernel of csrc/ to reach the memory's speed, in Triton: products with FP8 weights
and 16-bit activations (lm_head, the FP8 layers of mixed checkpoints) and rows of an embedding.

Runs on any GPU from sm_80 on: the weight's bytes are widened with integer operations, since Triton
knows E4M3 only from sm_89 on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nvfp4.kernels.cuda.dispatch import INVARIANT_TOKENS
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.options import is_batch_invariant


@triton.jit
def _widen_e4m3(byte, dtype: tl.constexpr):
    """E4M3 bits -> dtype, exactly. Placing exponent and mantissa at FP16's gives value * 2^-8
    (their biases are 7 and 15), subnormals included; NaN is not kept (a load refuses it)."""
    wide = byte.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return (half.to(tl.float32) * 256.0).to(dtype)


@triton.jit(do_not_specialize=["m"])  # else a first batch of 1 compiles again
def _fp8_linear_kernel(
    a_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, m, n, k, a_stride, w_stride, y_stride,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of y = (a @ w^T) * scale + bias."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + rows[:, None].to(tl.int64) * a_stride + offsets[None, :]
    w_tile = w_ptr + cols[None, :].to(tl.int64) * w_stride + offsets[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        in_k = offsets < k - start
        a = tl.load(a_tile + start, mask=(rows < m)[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_tile + start, mask=(cols < n)[None, :] & in_k[:, None], other=0)
        acc = tl.dot(a, _widen_e4m3(w, a.dtype), acc)
    acc *= tl.load(scale_ptr + cols, mask=cols < n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + rows[:, None].to(tl.int64) * y_stride + cols[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (cols < n)[None, :])


_FP8_TILE_TOKENS = (16, 32, 64, 128)


def fp8_tile(m: int) -> dict[str, int]:
    """The tile and launch options of the FP8 product for M tokens."""
    block_m = next((size for size in _FP8_TILE_TOKENS if m <= size), _FP8_TILE_TOKENS[-1])
    return {
        "BLOCK_M": block_m,
        # Few tokens: narrow tiles, so that a layer of 4,096 rows still fills the GPU.
        "BLOCK_N": 32 if block_m == 16 else 128,
        "BLOCK_K": 128 if block_m <= 32 else 64,
        "num_warps": 8 if block_m == 128 else 4,
        "num_stages": 4,
    }


def fp8_linear(
    a: torch.Tensor, weight: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """y[m, n] = row_scale[n] * sum_k a[m, k] * weight[n, k] + bias[n], sums in float32.

    a: [M, K] bf16 or fp16; weight: [N, K] float8_e4m3fn, row-major; row_scale: [N] float32;
    bias: [N] or None. Returns [M, N] of a's dtype.
    """
    (m, k), n = a.shape, weight.shape[0]
    if weight.shape[1] != k or weight.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"fp8_linear: the weight is {weight.dtype} {list(weight.shape)}; needs float8_e4m3fn "
            f"[N, {k}]"
        )
    if m == 0:
        return torch.empty((m, n), dtype=a.dtype, device=a.device)
    # Triton compiles again for another alignment of a pointer, and for a stride that is a multiple
    # of 16 where another was not: every input looks as warm_up_fp8's.
    if a.stride(1) != 1 or a.data_ptr() % 16 or (a.stride(0) % 16 > 0) != (k % 16 > 0):
        a = a.clone(memory_format=torch.contiguous_format)
    tile = fp8_tile(INVARIANT_TOKENS if is_batch_invariant() else m)
    return _launch_fp8(a, weight, row_scale, bias, tile)


def _launch_fp8(
    a: torch.Tensor, weight: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None,
    tile: dict[str, int],
) -> torch.Tensor:  # fmt: skip
    (m, k), n = a.shape, weight.shape[0]
    y = torch.empty((m, n), dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(m, tile["BLOCK_M"]))
    _fp8_linear_kernel[grid](
        a, weight.view(torch.uint8), row_scale, bias if bias is not None else row_scale, y,
        m, n, k, a.stride(0) if m > 1 else k, weight.stride(0), n, HAS_BIAS=bias is not None,
        **tile,
    )  # fmt: skip
    return y


def warm_up_fp8(
    weight: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Compile every tile that :func:`fp8_linear` may take for a layer, with and without its bias.

    Arguments as there; dtype: of the activations. One token is multiplied by each.
    """
    a = torch.zeros(1, weight.shape[1], dtype=dtype, device=weight.device)
    sizes = [INVARIANT_TOKENS] if is_batch_invariant() else _FP8_TILE_TOKENS
    for m in sizes:
        for added in {id(bias): bias, id(None): None}.values():
            _launch_fp8(a, weight, row_scale, added, fp8_tile(m))


@triton.jit
def _widen_e2m1(code, dtype: tl.constexpr):
    """E2M1 code -> dtype, exactly, as above: FP16's fields give value * 2^-14."""
    wide = code.to(tl.uint16)
    half = (((wide & 8) << 12) | ((wide & 7) << 9)).to(tl.float16, bitcast=True)
    return (half.to(tl.float32) * 16384.0).to(dtype)


@triton.jit
def _widen_e8m0(byte):
    """2^(byte - 127) in float32; byte 0 is 2^-127, a subnormal."""
    wide = byte.to(tl.uint32)
    return tl.where(wide == 0, 0x00400000, wide << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])  # a batch's tokens begin anywhere
def _gather_rows_kernel(
    ids_ptr, codes_ptr, block_scale_ptr, global_scale_ptr, y_ptr, k, tiles_k,
    SCALE_BLOCK: tl.constexpr, IS_E4M3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row; the order of codes and scales is layout.py's."""
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < k
    half, g = row % 16 // 8, row % 8
    tile = row // 16 * tiles_k + column // 64
    t, j, i = column % 16 // 4, column % 64 // 16, column % 4
    byte = tl.load(codes_ptr + tile * 512 + g * 64 + t * 16 + j * 4 + i, mask=inside, other=0)
    code = (byte >> (4 * (1 - half)).to(tl.uint8)) & 0xF
    block = column % 64 // SCALE_BLOCK
    PAIRS: tl.constexpr = 32 // SCALE_BLOCK
    at = tile * (PAIRS * 32) + g * (PAIRS * 4) + block // 2 * 4 + half * 2 + block % 2
    scale_bits = tl.load(block_scale_ptr + at, mask=inside, other=0)
    scale = _widen_e4m3(scale_bits, tl.float32) if IS_E4M3 else _widen_e8m0(scale_bits)
    value = _widen_e2m1(code, tl.float32) * scale * tl.load(global_scale_ptr + row)
    y_at = y_ptr + tl.program_id(0).to(tl.int64) * k + column
    tl.store(y_at, value.to(y_ptr.dtype.element_ty), mask=inside)


def gather_rows(packed: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y[m, k] = w[ids[m], k], dequantised; rounded once to float32 and once to ``dtype``.

    packed: in the CUDA kernels' order; ids: [M] integer, each in [0, N). Returns [M, K].
    """
    m, k = ids.shape[0], packed.num_cols
    y = torch.empty((m, k), dtype=dtype, device=ids.device)
    if m == 0:
        return y
    block = 1024
    _gather_rows_kernel[(m, triton.cdiv(k, block))](
        ids, packed.codes, packed.block_scale, packed.global_scale, y, k, packed.codes.shape[1],
        SCALE_BLOCK=packed.fmt.block_size, IS_E4M3=packed.fmt.scale_type == "e4m3", BLOCK=block,
    )  # fmt: skip
    return y


def warm_up_gather(packed: PackedWeight, dtype: torch.dtype) -> None:
    """Compile :func:`gather_rows` for tokens of either type."""
    for kind in (torch.int32, torch.int64):
        ids = torch.zeros(1, dtype=kind, device=packed.codes.device)
        gather_rows(packed, ids, dtype)
