# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a product: pure functions of the GPU's figures, the shape and the options.

Two steps. The roofline alone chooses the activation bits, so that the choice is monotone in M:
below the switch always 16 bits, from it on always 8. A cost model then ranks the tiles.
No torch, no CUDA: the same answers on any machine.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels.cuda import configs
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig
from vllm_nvfp4.numerics.formats import FORMATS

ACTIVATIONS = ("auto", "16", "8")
# Of the 8-bit kernel: "f16_partials" rounds sums of blocks to f16 (at most 5e-4 relative) and runs
# at the f16 accumulator's rate, twice the other on GeForce cards. "folded" rounds each weight times
# its block scale to e4m3 (2 to 4 % of a row) and spends half of the issue slots, which are what
# limits the exact one where FP8 MMA runs at its full rate: L40S, L4, RTX 6000 Ada. "int8" has
# activations in INT8 with a scale per token and 64 columns, which are finer, and needs no FP8
# tensor cores. "auto" is the faster one of "exact" and "int8" (resolve_variant).
VARIANTS = ("auto", "exact", "int8", "f16_partials", "folded")

# A product with more output tiles than this never splits K: it fills any GPU, and semaphores can
# then be allocated once.
MAX_SPLIT_TILES = 16384

# The M that a kernel for any M is chosen by: decoding a full batch.
INVARIANT_TOKENS = 64

# The share of the table's tensor rate that mma.sync reaches. Hopper's figures are for wgmma.
_MMA_SYNC_SHARE = {90: 0.62}
# FP8 mma.sync is one instruction from sm_89 on, but on sm_90 the compiler emulates it: six
# conversions and two FP16 MMAs of K=8 for each m16n8k16. 8-bit activations gain nothing there, nor
# on the other architectures whose FP8 is wgmma's or tcgen05's.
_FIRST_FP8_ARCH = 89
_EMULATED_FP8_ARCHS = frozenset({90, 100, 101, 103, 110})

# Microseconds. A kernel inside a CUDA graph costs about this before its first byte arrives.
_LAUNCH_US = 1.5
# Shares of the peak that a well-shaped kernel sustains.
_DRAM_SHARE = 0.9
_TENSOR_SHARE = 0.8
# Bytes per clock and SM that L2 delivers: 5 TB/s on an RTX 4090.
_L2_BYTES_PER_CLOCK = 16
# Issue slots: an SM issues four warp instructions, 128 lanes, per clock.
_LANES_PER_CLOCK = 128
# Lane instructions for each weight: (to unpack it, once for each warp along the tokens; for each
# token, its share of operand loads, the MMA and the scaling of partial sums). Fitted to
# benchmarks/sass_report.py's count of sm_89 machine code, within 5 %.
_INSTRUCTIONS = {
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
# A GPU without FP8 gets 8 bits unasked only where they are so many times faster on paper.
MIN_GAIN = 1.3


@dataclass(frozen=True)
class Choice:
    """How one product runs.

    config:          the kernel
    activation_bits: 16 or 8
    grid:            thread blocks: (output tiles, splits of K, 1)
    num_splits:      into how many parts K is cut
    workspace_bytes, semaphore_bytes: what the launch needs
    estimated_us:    the model's time on this GPU, quantisation of the activations included
    """

    config: GemmConfig
    activation_bits: int
    grid: tuple[int, int, int]
    num_splits: int
    workspace_bytes: int
    semaphore_bytes: int
    estimated_us: float


def choose(
    gpu: Gpu, m: int, n: int, k: int, fmt_name: str, dtype: str,
    activation: str = "auto", variant: str = "exact",
) -> Choice:  # fmt: skip
    """The kernel for y[M, N] = a[M, K] @ w[N, K]^T.

    fmt_name:   "nvfp4" or "mxfp4"
    dtype:      "bf16" or "fp16"
    activation: "auto", "16" or "8"
    variant:    of the 8-bit kernel, one of ``VARIANTS``
    Raises ValueError: a shape, format or option outside what the kernels take, activations in FP8
    on a GPU without it.
    """
    _check(m, n, k, fmt_name, dtype)
    bits = choose_activation_bits(gpu, m, n, k, fmt_name, activation, variant)
    candidates = reachable(fmt_name, dtype, bits, resolve_variant(gpu, variant))
    config = min(candidates, key=lambda c: (estimate_us(gpu, c, m, n, k), c.symbol))
    return launch_geometry(gpu, config, m, n, k)


def choose_invariant(
    gpu: Gpu, m: int, n: int, k: int, fmt_name: str, dtype: str,
    activation: str = "auto", variant: str = "exact",
) -> Choice:  # fmt: skip
    """As :func:`choose`, but the order of sums depends on the weight alone, never on M.

    One configuration for each N and K, the one for ``INVARIANT_TOKENS``, with K unsplit; "auto"
    means 16 bits. A few tokens pay for it with idle SMs where N is small.
    """
    bits = "16" if activation == "auto" else activation
    config = choose(gpu, INVARIANT_TOKENS, n, k, fmt_name, dtype, bits, variant).config
    return launch_geometry(gpu, config, m, n, k, num_splits=1)


def launch_geometry(
    gpu: Gpu, config: GemmConfig, m: int, n: int, k: int, num_splits: int | None = None
) -> Choice:
    """The launch of one given configuration. num_splits: default as ``configs`` chooses."""
    tiles = configs.num_tiles(config, m, n)
    if num_splits is None:
        num_splits = configs.num_splits(config, m, n, k, gpu.num_sms)
    if tiles > MAX_SPLIT_TILES:
        num_splits = 1
    return Choice(
        config, activation_bits_of(config), (tiles, num_splits, 1), num_splits,
        configs.partials_bytes(config, m, n, num_splits),
        configs.semaphore_bytes(config, m, n),
        estimate_us(gpu, config, m, n, k),
    )  # fmt: skip


def activation_bits_of(config: GemmConfig) -> int:
    """16 or 8."""
    return 16 if config.stem == "gemm_w4a16" else 8


def choose_activation_bits(
    gpu: Gpu, m: float, n: int, k: int, fmt_name: str,
    activation: str = "auto", variant: str = "exact", quantized_rows: float = 1.0,
) -> int:  # fmt: skip
    """16 or 8: 8 where the rooflines cross, which is where 16 bits become compute-bound.

    time16(M) = max(weight bytes / DRAM, 2MNK / bf16 rate)
    time8(M)  = max(weight bytes / DRAM, 2MNK / fp8 rate) + quantising M rows of K

    quantized_rows: rows of K that are quantised for each of the M, where experts share tokens
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; needs one of {', '.join(ACTIVATIONS)}")
    if activation == "16":
        return 16
    if activation == "8":
        if gpu.arch < _FIRST_FP8_ARCH and resolve_variant(gpu, variant) != "int8":
            raise ValueError(
                f"activation=8, a8_variant={variant}: {gpu.name} (sm_{gpu.arch}) has no FP8 tensor "
                f"cores; they come with sm_{_FIRST_FP8_ARCH}. Use a8_variant=auto or int8, or "
                "activation=auto or 16"
            )
        return 8
    return 8 if m >= activation_switch(gpu, n, k, fmt_name, variant, quantized_rows) else 16


def has_fp8_mma(arch: int) -> bool:
    """Whether FP8 mma.sync is an instruction there: no compute capability gains without it."""
    return arch >= _FIRST_FP8_ARCH and arch not in _EMULATED_FP8_ARCHS


@functools.lru_cache(maxsize=4096)
def activation_switch(
    gpu: Gpu, n: int, k: int, fmt_name: str, variant: str = "exact", quantized_rows: float = 1.0
) -> float:
    """The M from which 8-bit activations are faster; infinity where they never are, and on a GPU
    without FP8 where they gain little."""
    variant = variant_of(fmt_name, resolve_variant(gpu, variant))
    if variant != "int8" and not _has_fp8(gpu):
        return math.inf
    if not _has_fp8(gpu) and gain_on_paper(gpu, fmt_name) < MIN_GAIN:
        return math.inf
    memory_us = n * k * FORMATS[fmt_name].bits_per_weight / 8 / _dram_bytes_per_us(gpu)
    us16_per_m = 2 * n * k / _tensor_flops_per_us(gpu, 16, variant)
    us8_per_m = n * k * _us_per_weight_8(gpu, fmt_name, variant)
    return _crossing(gpu, k, memory_us, us16_per_m, us8_per_m, quantized_rows)


def _has_fp8(gpu: Gpu) -> bool:
    """Whether 8-bit activations in FP8 can gain anything."""
    return has_fp8_mma(gpu.arch) and gpu.fp8_f32_tflops > 0


def _us_per_weight_8(gpu: Gpu, fmt_name: str, variant: str) -> float:
    """Microseconds for each weight and token of a product with many tokens of 8 bits.

    The scaling of partial sums may take more issue slots than the MMA takes time.
    """
    issue_us = _issue_of_many(gpu, fmt_name, variant) / _lanes_per_us(gpu)
    return max(2 / _tensor_flops_per_us(gpu, 8, variant), issue_us)


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


def paper_tflops(gpu: Gpu, fmt_name: str, variant: str = "auto") -> float:
    """As :func:`paper_tflops_8`, with the activations that many tokens take unasked: 8 bits where
    they gain, else 16."""
    if activation_switch(gpu, 8192, 8192, fmt_name, variant) == math.inf:
        return gpu.bf16_tflops
    return max(gpu.bf16_tflops, paper_tflops_8(gpu, fmt_name, resolve_variant(gpu, variant)))


def gain_on_paper(gpu: Gpu, fmt_name: str) -> float:
    """How many times as fast a product with many tokens is in INT8 as in 16 bits."""
    return paper_tflops_8(gpu, fmt_name, "int8") / gpu.bf16_tflops


def _issue_of_many(gpu: Gpu, fmt_name: str, variant: str) -> float:
    """Lane instructions for each weight and token of a product with many tokens of 8 bits."""
    unpack, per_token = _INSTRUCTIONS[_stem_8(variant), variant, fmt_name]
    return unpack / _MANY_TOKENS + _issue_of_token(gpu, variant, fmt_name, per_token)


def _lanes_per_us(gpu: Gpu) -> float:
    return gpu.num_sms * _LANES_PER_CLOCK * gpu.boost_ghz * 1e3


def _issue_of_token(gpu: Gpu, variant: str, fmt_name: str, per_token: float) -> float:
    """Lane instructions for each weight and token; on a GPU with half as many f32 lanes, what their
    instructions take instead, if that is more."""
    if gpu.arch != _HALF_RATE_FLOAT_ARCH:
        return per_token
    return max(per_token, 2 * _FLOAT_INSTRUCTIONS.get((variant, fmt_name), 0.0))


def gains_from_8_bits(gpu: Gpu, variant: str) -> bool:
    """Whether any batch of a large layer takes 8-bit activations unasked."""
    return activation_switch(gpu, 8192, 8192, "nvfp4", variant) < math.inf


@functools.lru_cache(maxsize=256)
def resolve_variant(gpu: Gpu, variant: str) -> str:
    """What "auto" stands for on a GPU: of the variants that are at least as exact as FP8 with one
    scale per token, or INT8 with one per token and 64 columns, the fastest for NVFP4 on paper.

    "int8" on a GPU without FP8; "exact" where 8 bits in FP8 are emulated: nothing is gained there.
    """
    check_variant(variant)
    if variant != "auto":
        return variant
    if gpu.arch < _FIRST_FP8_ARCH:
        return "int8"
    if not _has_fp8(gpu):
        return "exact"
    return min(("exact", "int8"), key=lambda v: _us_per_weight_8(gpu, "nvfp4", v))


def _stem_8(variant: str) -> str:
    return "gemm_w4i8" if variant == "int8" else "gemm_w4a8"


@functools.lru_cache(maxsize=4096)
def fp8_activation_switch(gpu: Gpu, n: int, k: int) -> float:
    """The M from which a weight in FP8 is multiplied faster with FP8 activations, by torch's
    library product, than with 16-bit ones; infinity where they never are."""
    if gpu.arch < _FIRST_FP8_ARCH or not gpu.fp8_f32_tflops:
        return math.inf
    memory_us = n * k / _dram_bytes_per_us(gpu)
    us16_per_m = 2 * n * k / _tensor_flops_per_us(gpu, 16, "exact")
    # The library uses the card's own instructions, on Hopper wgmma.
    us8_per_m = 2 * n * k / (gpu.fp8_f32_tflops * 1e6 * _TENSOR_SHARE)
    return _crossing(gpu, k, memory_us, us16_per_m, us8_per_m)


def _crossing(
    gpu: Gpu,
    k: int,
    memory_us: float,
    us16_per_m: float,
    us8_per_m: float,
    quantized_rows: float = 1.0,
) -> float:
    """The M from which max(memory, us8 * M) + quantising is less than max(memory, us16 * M)."""
    quantize_per_m = quantized_rows * (_quantize_us(gpu, 1, k) - _LAUNCH_US)
    # Where the 8-bit product is still bound by memory: us16 * M = memory + launch + quantize * M.
    if us16_per_m > quantize_per_m:
        crossing = (memory_us + _LAUNCH_US) / (us16_per_m - quantize_per_m)
        if us8_per_m * crossing <= memory_us:
            return crossing
    # Where it is bound by the tensor cores: us16 * M = us8 * M + launch + quantize * M.
    gain = us16_per_m - us8_per_m - quantize_per_m
    return _LAUNCH_US / gain if gain > 0 else math.inf


def reachable(
    fmt_name: str, dtype: str, activation_bits: int, variant: str = "exact"
) -> tuple[GemmConfig, ...]:
    """Every configuration that :func:`choose` may return for these: what a load has to prepare."""
    variant = variant_of(fmt_name, variant)
    wanted = (_stem_8(variant), variant) if activation_bits == 8 else ("gemm_w4a16", "exact")
    return tuple(
        c
        for c in GEMM_CONFIGS
        if (c.stem, c.variant, c.fmt_name, c.dtype) == (*wanted, fmt_name, dtype)
    )


def check_variant(variant: str) -> None:
    """Raise ValueError for a variant that there is not."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; needs one of {', '.join(VARIANTS)}")


def variant_of(fmt_name: str, variant: str) -> str:
    """The variant that runs a format: MXFP4's scales leave e4m3's range and are never folded.

    variant: one of ``VARIANTS``, but "auto", which depends on the GPU (:func:`resolve_variant`)
    """
    check_variant(variant)
    return "exact" if (fmt_name, variant) == ("mxfp4", "folded") else variant


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
    dram_us = (weight_bytes + a_bytes + 2 * m * n) / _dram_bytes_per_us(gpu)
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
        / (_tensor_flops_per_us(gpu, bits, config.variant) / gpu.num_sms)
    )
    # The stand-in and other variants of timing only count as the exact kernel.
    variant = config.variant if config.variant in VARIANTS else "exact"
    unpack, per_token = _INSTRUCTIONS[config.stem, variant, config.fmt_name]
    per_token = _issue_of_token(gpu, variant, config.fmt_name, per_token)
    instructions = weights * (unpack * config.warps_m + per_token * config.block_m)
    issue_us = instructions / (_LANES_PER_CLOCK * clocks_per_us)
    parts = (dram_us, l2_us, blocks_per_sm * tensor_us, blocks_per_sm * issue_us)
    quantize_us = _quantize_us(gpu, m, k) if bits == 8 else 0.0
    return _LAUNCH_US + 0.9 * max(parts) + 0.1 * sum(parts) + quantize_us


def _dram_bytes_per_us(gpu: Gpu) -> float:
    return gpu.dram_gbps * 1e3 * _DRAM_SHARE


def _tensor_flops_per_us(gpu: Gpu, activation_bits: int, variant: str) -> float:
    if activation_bits == 8 and variant == "int8":
        return gpu.int8_tops * 1e6 * _TENSOR_SHARE * _MMA_SYNC_SHARE.get(gpu.arch, 1.0)
    # FP8 on a chip that emulates it is only ever asked for by name, and the 16-bit rate is what
    # the emulation can reach at best.
    is_native = gpu.fp8_f32_tflops > 0 and has_fp8_mma(gpu.arch)
    tflops = gpu.bf16_tflops
    if activation_bits == 8 and is_native:
        tflops = gpu.fp8_f16_tflops if variant == "f16_partials" else gpu.fp8_f32_tflops
    return tflops * 1e6 * _TENSOR_SHARE * _MMA_SYNC_SHARE.get(gpu.arch, 1.0)


def _quantize_us(gpu: Gpu, m: int, k: int) -> float:
    # Reads 2 bytes and writes 1 per element; both passes of the maximum hit L2 or registers.
    return _LAUNCH_US + 3 * m * k / _dram_bytes_per_us(gpu)


def _check(m: int, n: int, k: int, fmt_name: str, dtype: str) -> None:
    if fmt_name not in FORMATS:
        raise ValueError(f"format {fmt_name!r}: needs one of {', '.join(FORMATS)}")
    if dtype not in ("bf16", "fp16"):
        raise ValueError(f"activations of {dtype!r}: the kernels take bf16 or fp16")
    block = FORMATS[fmt_name].block_size
    if m < 0 or n < 1 or k < block or k % block:
        raise ValueError(
            f"M={m}, N={n}, K={k}: needs M >= 0, N >= 1 and K a positive multiple of {block}"
        )
