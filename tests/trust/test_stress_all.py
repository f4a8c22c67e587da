# SPDX-License-Identifier: Apache-2.0
"""Every code byte times every block scale with every token, in every configuration of the kernels;
every stress in every configuration. tests/kernels/cuda/test_stress.py runs a quarter of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gemm_cases import make_activations, make_weight
from moe_stress import NUM_COLUMNS, StressLayer, check_pairs, tile_sizes
from stress_cases import (
    GEMMS,
    STRESS,
    assert_others_untouched,
    assert_others_untouched_by_experts,
    every_pair,
    legal_scales,
    run_host,
    stressed,
)

from vllm_nvfp4.kernels.cuda.moe_configs import MOE_CONFIGS
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.testing.host_gemm import DTYPES, run_gemm, shipped

pytestmark = pytest.mark.trust


def test_every_pair_in_every_kernel(count: Callable[..., None]) -> None:
    num_products = 0
    for config in GEMMS:
        fmt = FORMATS[config.fmt_name]
        weight = every_pair(fmt, legal_scales(fmt))
        packed, tokens = pack_weight(weight), torch.eye(weight.num_cols)
        if config.stem == "gemm_w4a16":
            y = run_gemm(shipped(config), config, tokens.to(DTYPES[config.dtype]), packed)
        else:
            q = tokens.to(torch.float8_e4m3fn)
            y = run_gemm(shipped(config), config, q, packed, a_scale=torch.ones(len(q)))
        expected = reference_linear(tokens, weight, variant=config.variant)
        assert torch.equal(y, expected.to(y.dtype)), config.symbol
        num_products += y.numel()
    count(kernels=len(GEMMS), exact_products=num_products)


def test_every_stress_in_every_kernel(count: Callable[..., None]) -> None:
    for config in GEMMS:
        packed = pack_weight(make_weight(config, 40, 96))
        a = make_activations(config, config.block_m + 2, 96)
        clean = run_host(config, a, packed)
        for name in STRESS:
            assert_others_untouched(run_host(config, stressed(a, name), packed), clean, name)
    count(kernels=len(GEMMS), cases=len(GEMMS) * len(STRESS))


def test_every_pair_in_every_kernel_of_experts(count: Callable[..., None]) -> None:
    """With every size of tile."""
    runs = [(config, size) for config in MOE_CONFIGS for size in tile_sizes(config)]
    columns = torch.arange(NUM_COLUMNS)
    num_products = sum(check_pairs(config, columns, [size]) for config, size in runs)
    count(kernels=len(MOE_CONFIGS), tiles=len(runs), exact_products=num_products)


def test_every_stress_in_every_kernel_of_experts(count: Callable[..., None]) -> None:
    for config in MOE_CONFIGS:
        layer = StressLayer(config)
        clean = layer(layer.a)
        for name in STRESS:
            y = layer(stressed(layer.a, name))
            assert_others_untouched_by_experts(y, clean, name)
    count(kernels=len(MOE_CONFIGS), cases=len(MOE_CONFIGS) * len(STRESS))
