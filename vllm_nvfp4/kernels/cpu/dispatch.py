# SPDX-License-Identifier: Apache-2.0
"""Which CPU kernel answers a call: tiles of tokens by measurement, compiled once each."""

from __future__ import annotations

import functools

import torch

from vllm_nvfp4.kernels.cpu.activations import round_name, write_round
from vllm_nvfp4.kernels.cpu.fp4 import Fp4Spec, write_fp4
from vllm_nvfp4.kernels.cpu.fp8 import Fp8Spec, write_fp8
from vllm_nvfp4.kernels.cpu.int8 import (
    Int8Spec,
    quantize_name,
    write_int8,
    write_quantize,
)
from vllm_nvfp4.kernels.cpu.jit import Cpu, compile_function, force_isa, host_cpu, thread_pool
from vllm_nvfp4.numerics.formats import BlockFormat

OUT_NAME = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}

# Tokens that may go through a weight together, by what fits the registers: the BF16 dot product
# has 32 registers of AVX-512 and needs two a token, plain f32 may have half as many half as wide.
_TILES_BF16 = (1, 2, 3, 4, 6, 8, 10, 12)
_TILES_F32_AVX512 = (1, 2, 3, 4, 6, 8)
_TILES_F32 = (1, 2, 3, 4)
_TILES_FP8 = (1, 2, 3, 4)
_TILES_INT8_AVX512 = (1, 2, 4, 8, 12)
_TILES_INT8 = (1, 2, 4)
# Tiles that sum as one token does: in two chains.
_TILES_INVARIANT = (1, 2, 3, 4)
_TILES_FP8_PANEL = (6,)
_TILES_PANEL = (8, 12, 16)
# Decoding the codes for one more pass costs about as much as this many tokens' products.
_DECODE_COST = 3
# From this many tokens on sixteen rows are decoded to a panel first.
_PANEL_TOKENS = 40
_FP8_PANEL_TOKENS = 12
# From this many tokens on, without the BF16 dot product or beside faster hardware for it, a tile of
# rows is decoded for torch's own matrix product.
_MATMUL_TOKENS = 48


@functools.cache
def compile_kernel(spec: Fp4Spec | Fp8Spec | Int8Spec, cpu: Cpu) -> int:
    """The address of a kernel, compiled on first use."""
    if isinstance(spec, Fp4Spec):
        text = write_fp4(spec, cpu)
    else:
        text = write_int8(spec, cpu) if isinstance(spec, Int8Spec) else write_fp8(spec, cpu)
    return compile_function(spec.name, text, cpu)


def best_tile(tokens: int, tiles: tuple[int, ...], decode_cost: int = _DECODE_COST) -> int:
    """The tile with the least work for M = tokens, none larger than M."""
    fitting = [t for t in tiles if t <= tokens]
    return min(fitting, key=lambda t: (-(-tokens // t) * (t + decode_cost), t))


def fp4_tiles(bf16_dot: bool) -> tuple[int, ...]:
    if bf16_dot:
        return _TILES_BF16
    return _TILES_F32_AVX512 if host_cpu().has_avx512 else _TILES_F32


def fp4_compiled(fmt: BlockFormat, tile: int, out: str, bf16_dot: bool, is_panel: bool) -> int:
    kind = "panel" if is_panel else "fused"
    spec = Fp4Spec(kind, fmt.scale_type, fmt.block_size, tile, out, bf16_dot)
    return compile_kernel(spec, host_cpu())


@functools.lru_cache(maxsize=4096)
def fp4_kernel(
    fmt: BlockFormat, tokens: int, out: str, bf16_dot: bool, is_invariant: bool = False
) -> tuple[int, bool]:
    """(address, whether it needs a panel) of the kernel for M = tokens.

    is_invariant: only kernels that form the same sums for any M
    """
    is_panel = bf16_dot and tokens >= _PANEL_TOKENS and fits_panel(fmt) and not is_invariant
    if is_panel:
        tile = best_tile(tokens, _TILES_PANEL, decode_cost=1)
    elif is_invariant:
        tile = best_tile(tokens, _TILES_INVARIANT)
    else:
        tile = best_tile(tokens, fp4_tiles(bf16_dot))
    return fp4_compiled(fmt, tile, out, bf16_dot, is_panel), is_panel


def fits_panel(fmt: BlockFormat) -> bool:
    """A panel holds code * scale in bf16, whose range the extremes of e8m0 leave."""
    return fmt.scale_type == "e4m3"


def fp8_compiled(tile: int, out: str, bf16_dot: bool, is_panel: bool) -> int:
    kind = "panel" if is_panel else "fused"
    return compile_kernel(Fp8Spec(kind, tile, out, bf16_dot), host_cpu())


@functools.lru_cache(maxsize=4096)
def fp8_kernel(
    tokens: int, out: str, bf16_dot: bool, is_invariant: bool = False
) -> tuple[int, bool]:
    """(address, whether it needs a panel) of the kernel for M = tokens; as :func:`fp4_kernel`."""
    is_panel = bf16_dot and tokens >= _FP8_PANEL_TOKENS and not is_invariant
    tile = best_tile(tokens, _TILES_FP8_PANEL if is_panel else _TILES_FP8)
    return fp8_compiled(tile, out, bf16_dot, is_panel), is_panel


def int8_tiles() -> tuple[int, ...]:
    return _TILES_INT8_AVX512 if host_cpu().has_avx512 else _TILES_INT8


@functools.lru_cache(maxsize=4096)
def int8_kernel(fmt: BlockFormat, tokens: int, out: str) -> int:
    """The kernel for M = tokens of INT8. Every tile forms the same sums."""
    tile = best_tile(tokens, int8_tiles())
    return compile_kernel(Int8Spec(fmt.scale_type, fmt.block_size, tile, out), host_cpu())


@functools.cache
def int8_quantizer(source: str, fmt: BlockFormat) -> int:
    """source: "bf16", "f16", "f32" or "i8", see ``int8``."""
    name, text = quantize_name(source, fmt.block_size), write_quantize(source, fmt.block_size)
    return compile_function(name, text, host_cpu())


def fp4_bf16_dot(dtype: torch.dtype, activation_bits: int) -> bool:
    """Whether four-bit weights meet these activations in the BF16 dot product."""
    return host_cpu().has_bf16_dot and (dtype == torch.bfloat16 or activation_bits == 8)


def fp8_bf16_dot(dtype: torch.dtype) -> bool:
    """Whether FP8 weights meet these activations in the BF16 dot product."""
    cpu = host_cpu()
    return dtype == torch.bfloat16 and cpu.has_bf16_dot and cpu.has_byte_tables


@functools.cache
def round_kernel(source: str, out: str) -> int:
    return compile_function(round_name(source, out), write_round(source, out), host_cpu())


@functools.lru_cache(maxsize=64)
def decode_kernel(kind: str, fmt: BlockFormat, out: str) -> int:
    """kind: "gather" or "dequantize"."""
    return compile_kernel(Fp4Spec(kind, fmt.scale_type, fmt.block_size, 1, out, False), host_cpu())


def fp8_dequantize_kernel(out: str) -> int:
    return compile_kernel(Fp8Spec("dequantize", 1, out, False), host_cpu())


@functools.cache
def has_fast_bf16_matmul() -> bool:
    """Whether torch's BF16 product has tile hardware, several times as fast as a vector unit."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(probe())


def uses_matmul(tokens: int, dtype: torch.dtype, bf16_dot: bool, is_invariant: bool) -> bool:
    """Whether torch's matrix product, on decoded rows, answers for M = tokens.

    dtype: of the result. torch's BF16 product is rounded to BF16, so it makes no other type.
    """
    is_worth_it = not bf16_dot or (dtype == torch.bfloat16 and has_fast_bf16_matmul())
    return tokens >= _MATMUL_TOKENS and is_worth_it and not is_invariant


def operand_type(dtype: torch.dtype, bf16_dot: bool, by_matmul: bool) -> torch.dtype:
    """As which type activations meet the weight, for a result of ``dtype``."""
    by_tiles = by_matmul and dtype == torch.bfloat16 and has_fast_bf16_matmul()
    return torch.bfloat16 if bf16_dot or by_tiles else torch.float32


def use_isa(isa: str | None) -> None:
    """Run every kernel at a lower level of instructions than the machine's, for tests and
    comparisons: one of ``cpu_jit.ISA_LEVELS``; None undoes it. ValueError for one it lacks.
    """
    force_isa(isa)
    for chosen in (
        fp4_kernel,
        fp8_kernel,
        int8_kernel,
        int8_quantizer,
        round_kernel,
        decode_kernel,
    ):
        chosen.cache_clear()


def warm_up(
    fmt: BlockFormat, dtype: torch.dtype, activation_bits: int = 16, variant: str = "exact"
) -> None:
    """Compile what ``linear`` and ``gather_rows`` need for this weight and activation type."""
    thread_pool()
    out = OUT_NAME[dtype]
    if activation_bits == 8 and variant == "int8":
        decode_kernel("gather", fmt, out)
        for source in (out, "i8"):  # i8: of linear_a8, in a compiled graph
            int8_quantizer(source, fmt)
        for tile in int8_tiles():
            int8_kernel(fmt, tile, out)
        return
    bf16_dot = fp4_bf16_dot(dtype, activation_bits)
    decode_kernel("gather", fmt, out)
    tile_type = operand_type(dtype, bf16_dot, by_matmul=True)
    if uses_matmul(_MATMUL_TOKENS, dtype, bf16_dot, is_invariant=False):
        decode_kernel("dequantize", fmt, OUT_NAME[tile_type])
    for tile in fp4_tiles(bf16_dot):
        fp4_compiled(fmt, tile, out, bf16_dot, False)
    for tile in _TILES_PANEL if bf16_dot and fits_panel(fmt) else ():
        fp4_compiled(fmt, tile, out, bf16_dot, True)
    if activation_bits == 8:
        for operand in {OUT_NAME[tile_type], "bf16" if bf16_dot else "f32"}:
            round_kernel(out, operand)
            fp8_dequantize_kernel(operand)  # of linear_a8, in a compiled graph


def warm_up_fp8(dtype: torch.dtype) -> None:
    """Compile what ``fp8_linear`` needs for this activation type, at load time."""
    thread_pool()
    bf16_dot = fp8_bf16_dot(dtype)
    fp8_dequantize_kernel("f32")
    if has_fast_bf16_matmul():
        fp8_dequantize_kernel("bf16")
    for tile in _TILES_FP8:
        fp8_compiled(tile, OUT_NAME[dtype], bf16_dot, False)
    for tile in _TILES_FP8_PANEL if bf16_dot else ():
        fp8_compiled(tile, OUT_NAME[dtype], bf16_dot, True)
