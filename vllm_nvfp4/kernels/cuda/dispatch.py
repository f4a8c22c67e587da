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
from vllm_nvfp4.kernels.cuda import configs, cost
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig
from vllm_nvfp4.kernels.cuda.variants import check_variant, stem_8, variant_of
from vllm_nvfp4.numerics.formats import FORMATS

ACTIVATIONS = ("auto", "16", "8")

# A product with more output tiles than this never splits K: it fills any GPU, and semaphores can
# then be allocated once.
MAX_SPLIT_TILES = 16384

# The M that a kernel for any M is chosen by: decoding a full batch.
INVARIANT_TOKENS = 64

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
    config = min(candidates, key=lambda c: (cost.estimate_us(gpu, c, m, n, k), c.symbol))
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
        config, cost.activation_bits_of(config), (tiles, num_splits, 1), num_splits,
        configs.partials_bytes(config, m, n, num_splits),
        configs.semaphore_bytes(config, m, n),
        cost.estimate_us(gpu, config, m, n, k),
    )  # fmt: skip


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
        if gpu.arch < cost.FIRST_FP8_ARCH and resolve_variant(gpu, variant) != "int8":
            raise ValueError(
                f"activation=8, a8_variant={variant}: {gpu.name} (sm_{gpu.arch}) has no FP8 tensor "
                f"cores; they come with sm_{cost.FIRST_FP8_ARCH}. Use a8_variant=auto or int8, or "
                "activation=auto or 16"
            )
        return 8
    return 8 if m >= activation_switch(gpu, n, k, fmt_name, variant, quantized_rows) else 16


@functools.lru_cache(maxsize=4096)
def activation_switch(
    gpu: Gpu, n: int, k: int, fmt_name: str, variant: str = "exact", quantized_rows: float = 1.0
) -> float:
    """The M from which 8-bit activations are faster; infinity where they never are, and on a GPU
    without FP8 where they gain little."""
    variant = variant_of(fmt_name, resolve_variant(gpu, variant))
    if variant != "int8" and not cost.has_fp8(gpu):
        return math.inf
    if not cost.has_fp8(gpu) and cost.gain_on_paper(gpu, fmt_name) < MIN_GAIN:
        return math.inf
    memory_us = n * k * FORMATS[fmt_name].bits_per_weight / 8 / cost.dram_bytes_per_us(gpu)
    us16_per_m = 2 * n * k / cost.tensor_flops_per_us(gpu, 16, variant)
    us8_per_m = n * k * cost.us_per_weight_8(gpu, fmt_name, variant)
    return _crossing(gpu, k, memory_us, us16_per_m, us8_per_m, quantized_rows)


def paper_tflops(gpu: Gpu, fmt_name: str, variant: str = "auto") -> float:
    """As :func:`cost.paper_tflops_8`, with the activations that many tokens take unasked: 8 bits
    where they gain, else 16."""
    if activation_switch(gpu, 8192, 8192, fmt_name, variant) == math.inf:
        return gpu.bf16_tflops
    return max(gpu.bf16_tflops, cost.paper_tflops_8(gpu, fmt_name, resolve_variant(gpu, variant)))


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
    if gpu.arch < cost.FIRST_FP8_ARCH:
        return "int8"
    if not cost.has_fp8(gpu):
        return "exact"
    return min(("exact", "int8"), key=lambda v: cost.us_per_weight_8(gpu, "nvfp4", v))


@functools.lru_cache(maxsize=4096)
def fp8_activation_switch(gpu: Gpu, n: int, k: int) -> float:
    """The M from which a weight in FP8 is multiplied faster with FP8 activations, by torch's
    library product, than with 16-bit ones; infinity where they never are."""
    if gpu.arch < cost.FIRST_FP8_ARCH or not gpu.fp8_f32_tflops:
        return math.inf
    memory_us = n * k / cost.dram_bytes_per_us(gpu)
    us16_per_m = 2 * n * k / cost.tensor_flops_per_us(gpu, 16, "exact")
    # The library uses the card's own instructions, on Hopper wgmma.
    us8_per_m = 2 * n * k / (gpu.fp8_f32_tflops * 1e6 * cost.TENSOR_SHARE)
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
    quantize_per_m = quantized_rows * (cost.quantize_us(gpu, 1, k) - cost.LAUNCH_US)
    # Where the 8-bit product is still bound by memory: us16 * M = memory + launch + quantize * M.
    if us16_per_m > quantize_per_m:
        crossing = (memory_us + cost.LAUNCH_US) / (us16_per_m - quantize_per_m)
        if us8_per_m * crossing <= memory_us:
            return crossing
    # Where it is bound by the tensor cores: us16 * M = us8 * M + launch + quantize * M.
    gain = us16_per_m - us8_per_m - quantize_per_m
    return cost.LAUNCH_US / gain if gain > 0 else math.inf


def reachable(
    fmt_name: str, dtype: str, activation_bits: int, variant: str = "exact"
) -> tuple[GemmConfig, ...]:
    """Every configuration that :func:`choose` may return for these: what a load has to prepare."""
    variant = variant_of(fmt_name, variant)
    wanted = (stem_8(variant), variant) if activation_bits == 8 else ("gemm_w4a16", "exact")
    return tuple(
        c
        for c in GEMM_CONFIGS
        if (c.stem, c.variant, c.fmt_name, c.dtype) == (*wanted, fmt_name, dtype)
    )


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
