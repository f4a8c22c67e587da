# SPDX-License-Identifier: Apache-2.0
"""What a product costs on paper: a GPU's figures, the instructions of the kernels, a tile's time.

No torch, no CUDA: the same answers on any machine.
"""

from __future__ import annotations

import math

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels.cuda import configs
from vllm_nvfp4.kernels.cuda.configs import GemmConfig
from vllm_nvfp4.kernels.cuda.variants import VARIANTS, stem_8, variant_of

# The share of the table's tensor rate that mma.sync reaches. Hopper's figures are for wgmma.
_MMA_SYNC_SHARE = {90: 0.62}

# FP8 mma.sync is one instruction from sm_89 on, but on sm_90 the compiler emulates it: six
# conversions and two FP16 MMAs of K=8 for each m16n8k16. 8-bit activations gain nothing there, nor
# on the other architectures whose FP8 is wgmma's or tcgen05's.
FIRST_FP8_ARCH = 89
_EMULATED_FP8_ARCHS = frozenset({90, 100, 101, 103, 110})

# Microseconds. A kernel inside a CUDA graph costs about this before its first byte arrives.
LAUNCH_US = 1.5

# Shares of the peak that a well-shaped kernel sustains.
_DRAM_SHARE = 0.9
TENSOR_SHARE = 0.8

# Bytes per clock and SM that L2 delivers: 5 TB/s on an RTX 4090.
_L2_BYTES_PER_CLOCK = 16

# Issue slots: an SM issues four warp instructions, 128 lanes, per clock.
_LANES_PER_CLOCK = 128

# Lane instructions for each weight: (to unpack it, once for each warp along the tokens; for each
# token, its share of operand loads, the MMA and the scaling of partial sums). Fitted to
# benchmarks/sass_report.py's count of sm_89 machine code, within 5 %.
INSTRUCTIONS = {
    ("gemm_w4a16", "exact", "nvfp4"): (3.3, 0.035),
    ("gemm_w4a16", "exact", "mxfp4"): (3.5, 0.065),
    ("gemm_w4a8", "exact", "nvfp4"): (0.9, 0.1),
    ("gemm_w4a8", "exact", "mxfp4"): (0.9, 0.063),
    ("gemm_w4a8", "f16_partials", "nvfp4"): (0.9, 0.099),
    ("gemm_w4a8", "f16_partials", "mxfp4"): (0.9, 0.095),
    ("gemm_w4a8", "folded", "nvfp4"): (3.8, 0.021),
    ("gemm_w4i8", "int8", "nvfp4"): (4.2, 0.167),
    ("gemm_w4i8", "int8", "mxfp4"): (4.4, 0.096),
}

# Those of them, for each token, that add or multiply in f32: sm_80 takes two clocks for each.
_FLOAT_INSTRUCTIONS = {("int8", "nvfp4"): 0.141, ("int8", "mxfp4"): 0.078}
_HALF_RATE_FLOAT_ARCH = 80

# Tokens that share the unpacking of a weight where there are many.
_MANY_TOKENS = 128


def activation_bits_of(config: GemmConfig) -> int:
    """16 or 8."""
    return 16 if config.stem == "gemm_w4a16" else 8


def has_fp8_mma(arch: int) -> bool:
    """Whether FP8 mma.sync is an instruction there: no compute capability gains without it."""
    return arch >= FIRST_FP8_ARCH and arch not in _EMULATED_FP8_ARCHS


def has_fp8(gpu: Gpu) -> bool:
    """Whether 8-bit activations in FP8 can gain anything."""
    return has_fp8_mma(gpu.arch) and gpu.fp8_f32_tflops > 0


def us_per_weight_8(gpu: Gpu, fmt_name: str, variant: str) -> float:
    """Microseconds for each weight and token of a product with many tokens of 8 bits.

    The scaling of partial sums may take more issue slots than the MMA takes time.
    """
    issue_us = _issue_of_many(gpu, fmt_name, variant) / _lanes_per_us(gpu)
    return max(2 / tensor_flops_per_us(gpu, 8, variant), issue_us)


def paper_tflops_8(gpu: Gpu, fmt_name: str, variant: str) -> float:
    """10^12 operations per second of a product with many tokens of 8 bits, if nothing but tensor
    cores and issue slots bounds it and they reach their peaks; 0 where the GPU has no such MMA.

    variant: "exact", "int8", "f16_partials" or "folded"
    """
    variant = variant_of(fmt_name, variant)
    tensor = gpu.int8_tops if variant == "int8" else gpu.fp8_f32_tflops
    if variant == "f16_partials":
        tensor = gpu.fp8_f16_tflops
    issue = 2 * _lanes_per_us(gpu) / 1e6 / _issue_of_many(gpu, fmt_name, variant)
    return min(tensor, issue)


def gain_on_paper(gpu: Gpu, fmt_name: str) -> float:
    """How many times as fast a product with many tokens is in INT8 as in 16 bits."""
    return paper_tflops_8(gpu, fmt_name, "int8") / gpu.bf16_tflops


def _issue_of_many(gpu: Gpu, fmt_name: str, variant: str) -> float:
    """Lane instructions for each weight and token of a product with many tokens of 8 bits."""
    unpack, per_token = INSTRUCTIONS[stem_8(variant), variant, fmt_name]
    return unpack / _MANY_TOKENS + _issue_of_token(gpu, variant, fmt_name, per_token)


def _lanes_per_us(gpu: Gpu) -> float:
    return gpu.num_sms * _LANES_PER_CLOCK * gpu.boost_ghz * 1e3


def _issue_of_token(gpu: Gpu, variant: str, fmt_name: str, per_token: float) -> float:
    """Lane instructions for each weight and token; on a GPU with half as many f32 lanes, what their
    instructions take instead, if that is more."""
    if gpu.arch != _HALF_RATE_FLOAT_ARCH:
        return per_token
    return max(per_token, 2 * _FLOAT_INSTRUCTIONS.get((variant, fmt_name), 0.0))


def estimate_us(gpu: Gpu, config: GemmConfig, m: int, n: int, k: int) -> float:
    """Model, in microseconds: launch + the slowest of DRAM, L2, tensor cores and issue slots,
    each over the busiest SM, + a tenth of the others, since they never overlap entirely.

    A ranking of tiles, not a prediction: the constants above are shares of a peak.
    """
    if m == 0:
        return 0.0
    bits = activation_bits_of(config)
    tiles_m, tiles_n = math.ceil(m / config.block_m), math.ceil(n / config.block_n)
    blocks, splits, _ = configs.grid(config, m, n, k, gpu.num_sms)
    weight_bytes = n * k * config.fmt.bits_per_weight / 8
    a_bytes = m * k * config.activation_bytes
    partial_bytes = configs.workspace_bytes(config, m, n, k, gpu.num_sms)
    dram_us = (weight_bytes + a_bytes + 2 * m * n) / dram_bytes_per_us(gpu)
    clocks_per_us = gpu.boost_ghz * 1e3
    l2_us = (tiles_m * weight_bytes + tiles_n * a_bytes + 2 * partial_bytes) / (
        gpu.num_sms * _L2_BYTES_PER_CLOCK * clocks_per_us
    )
    # Each SM runs its share of the blocks; a partly filled last wave costs a whole one, of which
    # the occupancy is whatever is left.
    blocks_per_sm = math.ceil(blocks * splits / gpu.num_sms)
    k_per_block = math.ceil(k / splits)
    weights = config.block_n * k_per_block
    tensor_us = (
        2
        * config.block_m
        * weights
        / (tensor_flops_per_us(gpu, bits, config.variant) / gpu.num_sms)
    )
    # The stand-in and other variants of timing only count as the exact kernel.
    variant = config.variant if config.variant in VARIANTS else "exact"
    unpack, per_token = INSTRUCTIONS[config.stem, variant, config.fmt_name]
    per_token = _issue_of_token(gpu, variant, config.fmt_name, per_token)
    instructions = weights * (unpack * config.warps_m + per_token * config.block_m)
    issue_us = instructions / (_LANES_PER_CLOCK * clocks_per_us)
    parts = (dram_us, l2_us, blocks_per_sm * tensor_us, blocks_per_sm * issue_us)
    rounding_us = quantize_us(gpu, m, k) if bits == 8 else 0.0
    return LAUNCH_US + 0.9 * max(parts) + 0.1 * sum(parts) + rounding_us


def dram_bytes_per_us(gpu: Gpu) -> float:
    return gpu.dram_gbps * 1e3 * _DRAM_SHARE


def tensor_flops_per_us(gpu: Gpu, activation_bits: int, variant: str) -> float:
    if activation_bits == 8 and variant == "int8":
        return gpu.int8_tops * 1e6 * TENSOR_SHARE * _MMA_SYNC_SHARE.get(gpu.arch, 1.0)
    # FP8 on a chip that emulates it is only ever asked for by name, and the 16-bit rate is what
    # the emulation can reach at best.
    is_native = gpu.fp8_f32_tflops > 0 and has_fp8_mma(gpu.arch)
    tflops = gpu.bf16_tflops
    if activation_bits == 8 and is_native:
        tflops = gpu.fp8_f16_tflops if variant == "f16_partials" else gpu.fp8_f32_tflops
    return tflops * 1e6 * TENSOR_SHARE * _MMA_SYNC_SHARE.get(gpu.arch, 1.0)


def quantize_us(gpu: Gpu, m: int, k: int) -> float:
    # Reads 2 bytes and writes 1 per element; both passes of the maximum hit L2 or registers.
    return LAUNCH_US + 3 * m * k / dram_bytes_per_us(gpu)
