# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: pack a weight, multiply with it, look rows up in it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import torch

from vllm_nvfp4.kernels.cpu_act import round_name, write_round
from vllm_nvfp4.kernels.cpu_emit import ARGS
from vllm_nvfp4.kernels.cpu_fp4 import Fp4Spec, write_fp4
from vllm_nvfp4.kernels.cpu_fp8 import STEP, Fp8Spec, write_fp8
from vllm_nvfp4.kernels.cpu_jit import Cpu, compile_function, host_cpu, thread_pool
from vllm_nvfp4.layout import PackedWeight
from vllm_nvfp4.layout_cpu import ROWS, pack_weight, unpack_rows, unpack_weight
from vllm_nvfp4.numerics.formats import BlockFormat

__all__ = [
    "fp8_linear",
    "gather_fp8_rows",
    "gather_rows",
    "linear",
    "pack_weight",
    "unpack_weight",
    "warm_up",
    "warm_up_fp8",
]

_OUT = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_ArgBlock = ctypes.c_int64 * len(ARGS)
# The default type is not float32 while vLLM builds a model: name the type.
_ONE = torch.ones(1, dtype=torch.float32)

# Tokens that may go through a weight together, by what fits the registers: the BF16 dot product
# has 32 registers of AVX-512 and needs two a token, plain f32 may have half as many half as wide.
_TILES_BF16 = (1, 2, 3, 4, 6, 8, 10, 12)
_TILES_F32_AVX512 = (1, 2, 3, 4, 6, 8)
_TILES_F32 = (1, 2, 3, 4)
_TILES_FP8 = (1, 2, 3, 4)
_TILES_FP8_PANEL = (6,)
_TILES_PANEL = (8, 12, 16)
# Decoding the codes for one more pass costs about as much as this many tokens' products.
_DECODE_COST = 3
# From this many tokens on sixteen rows are decoded to a panel first ...
_PANEL_TOKENS = 40
_FP8_PANEL_TOKENS = 12
# ... or, without the BF16 dot product, a tile of rows is decoded for torch's own matrix product.
_MATMUL_TOKENS = 48
_MATMUL_SCRATCH_BYTES = 8 << 20
# Fewer codes than this are done by one thread: waking the others takes longer.
_SERIAL_CODES = 16384


@functools.cache
def _compile(spec: Fp4Spec | Fp8Spec, cpu: Cpu) -> int:
    text = write_fp4(spec, cpu) if isinstance(spec, Fp4Spec) else write_fp8(spec, cpu)
    return compile_function(spec.name, text, cpu)


def _best_tile(tokens: int, tiles: tuple[int, ...], decode_cost: int = _DECODE_COST) -> int:
    """The tile with the least work for M = tokens, none larger than M."""
    fitting = [t for t in tiles if t <= tokens]
    return min(fitting, key=lambda t: (-(-tokens // t) * (t + decode_cost), t))


def _fp4_tiles(bf16_dot: bool) -> tuple[int, ...]:
    if bf16_dot:
        return _TILES_BF16
    return _TILES_F32_AVX512 if host_cpu().has_avx512 else _TILES_F32


def _fp4_compiled(fmt: BlockFormat, tile: int, out: str, bf16_dot: bool, is_panel: bool) -> int:
    kind = "panel" if is_panel else "fused"
    spec = Fp4Spec(kind, fmt.scale_type, fmt.block_size, tile, out, bf16_dot)
    return _compile(spec, host_cpu())


@functools.lru_cache(maxsize=4096)
def _fp4_kernel(fmt: BlockFormat, tokens: int, out: str, bf16_dot: bool) -> tuple[int, bool]:
    """(address, whether it needs a panel) of the kernel for M = tokens."""
    is_panel = bf16_dot and tokens >= _PANEL_TOKENS and _fits_panel(fmt)
    if is_panel:
        tile = _best_tile(tokens, _TILES_PANEL, decode_cost=1)
    else:
        tile = _best_tile(tokens, _fp4_tiles(bf16_dot))
    return _fp4_compiled(fmt, tile, out, bf16_dot, is_panel), is_panel


def _fits_panel(fmt: BlockFormat) -> bool:
    """A panel holds code * scale in bf16, whose range the extremes of e8m0 leave."""
    return fmt.scale_type == "e4m3"


def _fp8_compiled(tile: int, out: str, bf16_dot: bool, is_panel: bool) -> int:
    return _compile(Fp8Spec("panel" if is_panel else "fused", tile, out, bf16_dot), host_cpu())


@functools.lru_cache(maxsize=4096)
def _fp8_kernel(tokens: int, out: str, bf16_dot: bool) -> tuple[int, bool]:
    """(address, whether it needs a panel) of the kernel for M = tokens."""
    is_panel = bf16_dot and tokens >= _FP8_PANEL_TOKENS
    tile = _best_tile(tokens, _TILES_FP8_PANEL if is_panel else _TILES_FP8)
    return _fp8_compiled(tile, out, bf16_dot, is_panel), is_panel


def _fp8_bf16_dot(dtype: torch.dtype) -> bool:
    cpu = host_cpu()
    return dtype == torch.bfloat16 and cpu.has_bf16_dot and cpu.has_byte_tables


@functools.cache
def _round_kernel(source: str, out: str) -> int:
    return compile_function(round_name(source, out), write_round(source, out), host_cpu())


@functools.cache
def _has_fast_bf16_matmul() -> bool:
    """Whether torch's BF16 matrix product has tile hardware, several times a vector unit's speed."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(probe()) or os.environ.get("VLLM_NVFP4_CPU_MATMUL") == "1"


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
    n, k = packed.num_rows, packed.num_cols
    _check(a, n, k, bias)
    if activation_bits not in (8, 16):
        raise ValueError(f"linear: activation_bits={activation_bits}; choose 16 or 8")
    m, out_dtype = a.shape[0], a.dtype
    y = torch.empty(m, n, dtype=out_dtype)
    if m == 0:
        return y
    is_bf16 = out_dtype == torch.bfloat16 or activation_bits == 8
    bf16_dot = is_bf16 and host_cpu().has_bf16_dot
    use_bf16 = bf16_dot or (is_bf16 and _has_fast_bf16_matmul() and m >= _MATMUL_TOKENS)
    a_type = torch.bfloat16 if use_bf16 else torch.float32
    a_scale = None
    if activation_bits == 8:
        a, a_scale = _round_per_token(a.contiguous(), a_type)
    else:
        a = a.to(a_type).contiguous()
    if m >= _MATMUL_TOKENS and (not bf16_dot or _has_fast_bf16_matmul()):

        def dequantize(first: int, last: int) -> torch.Tensor:
            return _dequantize_rows(packed, first, last, a.dtype).T

        return _tiled_matmul(a, dequantize, packed.global_scale, a_scale, bias, y)
    function, is_panel = _fp4_kernel(packed.fmt, m, _OUT[out_dtype], bf16_dot)
    scratch = torch.get_num_threads() * k * ROWS if is_panel else 0
    weight = (packed.codes, packed.block_scale, packed.global_scale)
    _run(function, weight, a, a_scale, bias, y, scratch)
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
            f"fp8_linear: row_scale is {list(row_scale.shape)} {row_scale.dtype}; needs [{n}] float32"
        )
    m = a.shape[0]
    y = torch.empty(m, n, dtype=a.dtype)
    if m == 0:
        return y
    bf16_dot = _fp8_bf16_dot(a.dtype)
    is_bf16 = a.dtype == torch.bfloat16
    use_bf16 = bf16_dot or (is_bf16 and _has_fast_bf16_matmul() and m >= _MATMUL_TOKENS)
    # e4m3 is exact in bf16 and in f32.
    a = a.to(torch.bfloat16 if use_bf16 else torch.float32).contiguous()
    if m >= _MATMUL_TOKENS and (not bf16_dot or _has_fast_bf16_matmul()):

        def dequantize(first: int, last: int) -> torch.Tensor:
            return _dequantize_fp8(weight[first:last], a.dtype)

        return _tiled_matmul(a, dequantize, row_scale, None, bias, y)
    function, is_panel = _fp8_kernel(m, _OUT[y.dtype], bf16_dot)
    scratch = torch.get_num_threads() * ROWS * (-(-k // STEP) * STEP) if is_panel else 0
    _run(function, (weight, weight, row_scale), a, None, bias, y, scratch)
    return y


def _check(a: torch.Tensor, n: int, k: int, bias: torch.Tensor | None) -> None:
    if a.dim() != 2 or a.shape[1] != k or a.dtype not in _OUT:
        raise ValueError(
            f"linear: a is {list(a.shape)} {a.dtype}; needs [M, {k}] in bfloat16, float16 or float32"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"linear: bias is {list(bias.shape)}; needs [{n}]")


def _run(
    function: int,
    weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    scratch_words: int,
    num_rows: int | None = None,
) -> None:
    """Run a kernel. weight: (codes, block_scale, multiplier of each row)."""
    m, k = a.shape
    n = num_rows or y.shape[1]
    if bias is not None:
        bias = bias.to(y.dtype).contiguous()
    scratch = torch.empty(scratch_words, dtype=torch.bfloat16) if scratch_words else None
    pool = thread_pool()
    codes, block_scale, global_scale = weight
    args = _ArgBlock(
        pool.get_thread_num,
        pool.get_num_threads,
        codes.data_ptr(),
        block_scale.data_ptr(),
        global_scale.data_ptr(),
        a.data_ptr(),
        _ONE.data_ptr() if a_scale is None else a_scale.data_ptr(),
        0 if a_scale is None else 4,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        n,
        k,
        0 if scratch is None else scratch.data_ptr(),
    )
    pool.run(function, args, torch.get_num_threads() if m * n * k > _SERIAL_CODES else 1)


def _round_per_token(a: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """numerics' quantize_fp8_per_row with q as numbers: (q [M, K] of ``dtype``, scale [M] f32)."""
    source, out = _OUT[a.dtype], _OUT[dtype]
    q, scale = torch.empty_like(a, dtype=dtype), torch.empty(a.shape[0])
    weight = (q, q, scale)  # no weight: these words are not read
    _run(_round_kernel(source, out), weight, a, scale, None, q, 0)
    return q, scale


def _dequantize_rows(
    packed: PackedWeight, first: int, last: int, dtype: torch.dtype
) -> torch.Tensor:
    """code * block_scale of rows first..last-1, [K, last - first]. first: a multiple of sixteen.

    bf16 and f32 hold the NVFP4 product exactly. The buffer is sized by whole groups.
    """
    fmt, k = packed.fmt, packed.num_cols
    group, end = first // ROWS, -(-last // ROWS)
    y = torch.empty(k, (end - group) * ROWS, dtype=dtype)
    spec = Fp4Spec("dequantize", fmt.scale_type, fmt.block_size, 1, _OUT[dtype], False)
    weight = (packed.codes[group:end], packed.block_scale[group:end], packed.global_scale)
    _run(_compile(spec, host_cpu()), weight, _ONE.expand(1, k), None, None, y, 0)
    return y[:, : last - first]


def _dequantize_fp8(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 bytes [R, K] as numbers, exactly. torch's own cast goes element by element."""
    n, k = weight.shape
    y = torch.empty(n, k, dtype=dtype)
    function = _compile(Fp8Spec("dequantize", 1, _OUT[dtype], False), host_cpu())
    _run(function, (weight, weight, _ONE), _ONE.expand(1, k), None, None, y, 0, num_rows=n)
    return y


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


def gather_rows(packed: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight by number, as an embedding looks them up.

    ids: any shape, int32 or int64. Returns [*ids.shape, K], rounded once to ``dtype``.
    """
    rows = unpack_rows(packed, ids.reshape(-1).long()).dequantize(dtype)
    return rows.view(*ids.shape, packed.num_cols)


def gather_fp8_rows(
    weight: torch.Tensor, row_scale: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of an FP8 weight by number: row_scale[id] * weight[id].

    weight: [N, K] float8_e4m3fn or its bits; ids: any shape. Returns [*ids.shape, K].
    """
    ids = ids.long()
    values = weight.view(torch.uint8)[ids].view(torch.float8_e4m3fn).float()
    return (values * row_scale[ids][..., None]).to(dtype)


def warm_up(fmt: BlockFormat, dtype: torch.dtype, activation_bits: int = 16) -> None:
    """Compile what :func:`linear` needs for this format and activation type, at load time."""
    thread_pool()
    out = _OUT[dtype]
    bf16_dot = host_cpu().has_bf16_dot and (dtype == torch.bfloat16 or activation_bits == 8)
    for tile in _fp4_tiles(bf16_dot):
        _fp4_compiled(fmt, tile, out, bf16_dot, False)
    for tile in _TILES_PANEL if bf16_dot and _fits_panel(fmt) else ():
        _fp4_compiled(fmt, tile, out, bf16_dot, True)
    if activation_bits == 8:
        _round_kernel(out, "bf16" if bf16_dot else "f32")


def warm_up_fp8(dtype: torch.dtype) -> None:
    """Compile what :func:`fp8_linear` needs for this activation type, at load time."""
    thread_pool()
    bf16_dot = _fp8_bf16_dot(dtype)
    for tile in _TILES_FP8:
        _fp8_compiled(tile, _OUT[dtype], bf16_dot, False)
    for tile in _TILES_FP8_PANEL if bf16_dot else ():
        _fp8_compiled(tile, _OUT[dtype], bf16_dot, True)
