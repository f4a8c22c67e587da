# SPDX-License-Identifier: Apache-2.0
"""Weights, activations and planted faults that the tests of the GEMM kernels share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.quantize import (
    quantize_fp8_per_row,
    quantize_int8_per_group,
    quantize_mxfp4,
    quantize_nvfp4,
)
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.host_gemm import DTYPES, run_gemm, shipped
from vllm_nvfp4.testing.host_kernel import HostMachine, HostModule
from vllm_nvfp4.testing.metrics import UNIT_ROUNDOFF, compare, linear_tolerance

DISTRIBUTIONS = ("gaussian", "heavy_tailed", "outlier_channels", "all_positive")


def configs_of(stem: str) -> list[GemmConfig]:
    return [c for c in GEMM_CONFIGS if c.stem == stem]


def smallest(stem: str, fmt_name: str, dtype: str, variant: str = "exact") -> GemmConfig:
    """The configuration with the smallest tile."""
    wanted = (fmt_name, dtype, variant)
    found = [c for c in configs_of(stem) if (c.fmt_name, c.dtype, c.variant) == wanted]
    return min(found, key=lambda c: c.block_m * c.block_n)


def make_weight(config: GemmConfig, n: int, k: int, seed: int = 0) -> BlockScaledWeight:
    """Student-t rows (block scales that differ) and a multiplier per row that differs."""
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(4.0).sample((n, k)) * 0.05
    quantize = quantize_nvfp4 if config.fmt_name == "nvfp4" else quantize_mxfp4
    packed = quantize(weight)
    factors = torch.linspace(0.5, 1.5, n)
    return BlockScaledWeight(
        packed.codes, packed.block_scale, packed.global_scale * factors, packed.fmt
    )


def make_activations(
    config: GemmConfig, m: int, k: int, distribution: str = "gaussian", seed: int = 1
) -> torch.Tensor:
    torch.manual_seed(seed)
    a = torch.randn(m, k)
    if distribution == "heavy_tailed":
        a = torch.distributions.StudentT(2.5).sample((m, k))
    elif distribution == "outlier_channels":
        a[:, :: max(k // 4, 1)] *= 40
    elif distribution == "all_positive":
        a = a.abs() + 0.5
    return a.to(DTYPES[config.dtype])


def odd_shapes(config: GemmConfig) -> list[tuple[int, int, int, int]]:
    """(M, N, K, splits): below a tile, over its edges by one or a few, K no multiple of 64; and
    more K steps than the kernel holds at once."""
    k = config.fmt.block_size
    steps = 4 * config.block_k + k
    return [
        (1, 40, k, 1),
        (3, 72, 3 * k, 1),
        (config.block_m + 1, config.block_n + 20, 11 * k, 1),
        (min(config.block_m, 33), 21, steps, 3),
        (2, 20, 7 * config.block_k + k, 1),
    ]


def check_the_order_of_the_splits(config: GemmConfig, splits: int, undo: float) -> None:
    """y is the splits' sums, added in their order in f32, rounded once: bit for bit.

    Every other split is large and cancels against a later one, so that another order shows.
    splits: 5, 8, 9, 12, 13 or 16: as many large ones of either sign
    undo:   what the kernel multiplies to a sum (1 / what its codes' conversion left in)
    """
    m, n = config.block_m - 1, 20
    part = make_weight(config, n, config.block_k)
    weight = replace(
        part,
        codes=part.codes.repeat(1, splits),
        block_scale=part.block_scale.repeat(1, splits),
        global_scale=torch.ones(n),
    )
    large = 64 * make_activations(config, m, config.block_k).clamp(-7, 7)
    a = make_activations(config, m, splits * config.block_k) / 32
    for split in range(1, splits, 2):
        a[:, split * config.block_k :][:, : config.block_k] = large if split % 4 == 1 else -large
    scales = {}
    if config.stem == "gemm_w4a8":
        a, scales["a_scale"] = a.to(torch.float8_e4m3fn), torch.ones(m)
    partials = torch.full((splits, 1, config.block_m, config.block_n), torch.nan)
    y = run_gemm(
        shipped(config), config, a, pack_weight(weight), splits=splits, partials=partials, **scales
    )
    parts = partials[:, 0, :m, :n]

    def in_order(order: Iterable[int]) -> torch.Tensor:
        total = torch.zeros(m, n)
        for split in order:
            total += parts[split]
        return (total * undo).to(y.dtype)

    assert torch.equal(y, in_order(range(splits)))
    small_first = sorted(range(splits), key=lambda split: split % 2)
    assert not torch.equal(y, in_order(small_first)), "the data must show the order"


def run_and_compare(
    module: HostModule,
    config: GemmConfig,
    a: torch.Tensor,
    weight: BlockScaledWeight,
    bias: torch.Tensor | None = None,
    splits: int = 1,
    machine: HostMachine | None = None,
) -> tuple[torch.Tensor, float]:
    """(y of 8-bit activations; the largest part of a token's outputs, in rms, that it loses beyond
    their rounding), infinite where an element is further off than the hard limit of what adds it
    (linear_tolerance)."""
    if config.variant == "int8":
        q, a_scale = quantize_int8_per_group(a)
    else:
        q, a_scale = quantize_fp8_per_row(a)
        a_scale = a_scale[:, 0].contiguous()
    y = run_gemm(
        module,
        config,
        q,
        pack_weight(weight),
        a_scale=a_scale,
        bias=bias,
        splits=splits,
        machine=machine,
    )
    reference = reference_linear(a, weight, bias, 8, config.variant)
    found = compare(y, reference, linear_tolerance(a, weight, reference, 8, config.variant))
    rounding = UNIT_ROUNDOFF[a.dtype] * reference.abs()
    excess = ((y.double() - reference).abs() - rounding).clamp(min=0)
    loss = float((excess.norm(dim=1) / reference.norm(dim=1)).nan_to_num(nan=1.0).max())
    return y, loss if found.is_match else math.inf
