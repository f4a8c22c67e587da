# SPDX-License-Identifier: Apache-2.0
"""Numbers at the edges: a token with outliers, NaN or infinities touches no other token's result,
and every byte of codes times every block scale is exact, in every kernel.

What stands for NaN among the block scales never reaches a kernel: packing refuses it.
"""

from __future__ import annotations

import math

import pytest
import torch
from gemm_cases import make_activations, make_weight
from moe_stress import NUM_COLUMNS, StressLayer, check_pairs, tile_sizes
from stress_cases import (
    GEMMS,
    STRESS,
    VICTIM,
    assert_others_untouched,
    assert_others_untouched_by_experts,
    every_pair,
    is_finite_stress,
    legal_scales,
    run_host,
    stressed,
)

from vllm_nvfp4.kernels import layout
from vllm_nvfp4.kernels.cpu import dispatch as cpu_dispatch
from vllm_nvfp4.kernels.cpu import jit as cpu_jit
from vllm_nvfp4.kernels.cpu import linear as cpu
from vllm_nvfp4.kernels.cuda.configs import QUANTIZE_CONFIGS, GemmConfig, QuantizeConfig
from vllm_nvfp4.kernels.cuda.moe_configs import MOE_CONFIGS, MoeConfig
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.numerics.quantize import (
    quantize_fp8_per_row,
    quantize_int8_per_group,
    quantize_mxfp4,
    quantize_nvfp4,
)
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.testing.host_gemm import DTYPES, run_gemm, run_quantize, shipped
from vllm_nvfp4.testing.metrics import compare_linear

CPU_TYPES = (torch.bfloat16, torch.float16, torch.float32)
BEYOND_FLOAT32 = (253, 254)  # as E8M0: six times the scale


def available_isas() -> list[str]:
    names = []
    for name in cpu_jit.ISA_LEVELS:
        try:
            cpu_jit.detect_cpu(name)
        except ValueError:
            continue
        names.append(name)
    return names


@pytest.fixture(params=available_isas())
def isa(request):
    cpu_dispatch.use_isa(request.param)
    yield request.param
    cpu_dispatch.use_isa(None)


# --- the CUDA kernels' own text, emulated -------------------------------------------------------


@pytest.mark.parametrize("config", GEMMS, ids=lambda c: c.symbol)
def test_a_bad_token_spoils_only_itself_on_the_gpu(config: GemmConfig) -> None:
    weight = make_weight(config, 40, 96)
    packed = layout.pack_weight(weight)
    a = make_activations(config, min(config.block_m, 16) + 2, 96)
    clean = run_host(config, a, packed)
    # Every stress on some configuration of each family, some of them on each.
    names = list(STRESS)[GEMMS.index(config) % 4 :: 4]
    for name in [*names, "all"]:
        bad = stressed(a, name)
        y = run_host(config, bad, packed)
        assert_others_untouched(y, clean, name)
        if is_finite_stress(name):
            bits = 16 if config.stem == "gemm_w4a16" else 8
            found = compare_linear(y, bad, weight, None, bits, config.variant)
            assert found.is_match, f"{name}: {found.report}"


@pytest.mark.parametrize("config", QUANTIZE_CONFIGS, ids=lambda c: c.symbol)
@pytest.mark.parametrize("name", STRESS)
def test_the_quantiser_keeps_tokens_apart(config: QuantizeConfig, name: str) -> None:
    a = torch.randn(4, 2064, generator=torch.Generator().manual_seed(0)).to(DTYPES[config.dtype])
    clean = run_quantize(shipped(config), config, a)
    bad = run_quantize(shipped(config), config, stressed(a, name))
    for before, after in zip(clean, bad, strict=True):
        assert torch.equal(before[[0, 2, 3]].float(), after[[0, 2, 3]].float())
    if is_finite_stress(name):
        is_int8 = config.stem == "quantize_i8"
        quantize = quantize_int8_per_group if is_int8 else quantize_fp8_per_row
        q, scale = quantize(stressed(a, name))
        assert torch.equal(bad[0].float(), q.float())
        assert torch.equal(bad[1], scale if is_int8 else scale[:, 0])


@pytest.mark.parametrize("config", GEMMS, ids=lambda c: c.symbol)
def test_every_code_byte_times_every_block_scale_on_the_gpu(config: GemmConfig) -> None:
    """Row n has scale byte n and all code bytes; a one-hot token picks one code: exact."""
    fmt = FORMATS[config.fmt_name]
    weight = every_pair(fmt, legal_scales(fmt))
    # Each column by one configuration in four, all by the family together.
    tokens = torch.eye(weight.num_cols)[GEMMS.index(config) % 4 :: 4]
    packed = layout.pack_weight(weight)
    if config.stem == "gemm_w4a16":
        y = run_gemm(shipped(config), config, tokens.to(DTYPES[config.dtype]), packed)
    else:
        one = torch.ones(len(tokens))
        q = tokens.to(torch.float8_e4m3fn)
        y = run_gemm(shipped(config), config, q, packed, a_scale=one)
    expected = reference_linear(tokens, weight, variant=config.variant)
    assert torch.equal(y, expected.to(y.dtype))


@pytest.mark.parametrize("config", MOE_CONFIGS, ids=lambda c: c.symbol)
def test_a_bad_token_spoils_only_itself_among_experts_on_the_gpu(config: MoeConfig) -> None:
    """It shares both of its experts with other tokens."""
    layer = StressLayer(config)
    clean = layer(layer.a)
    for name in [*list(STRESS)[MOE_CONFIGS.index(config) % 4 :: 4], "all"]:
        assert_others_untouched_by_experts(layer(stressed(layer.a, name)), clean, name)


@pytest.mark.parametrize("config", MOE_CONFIGS, ids=lambda c: c.symbol)
def test_every_code_byte_times_every_block_scale_among_experts(config: MoeConfig) -> None:
    """A quarter of the columns for each kernel, all by the four; over each size of tile."""
    columns = torch.arange(NUM_COLUMNS)[MOE_CONFIGS.index(config) % 4 :: 4]
    assert check_pairs(config, columns, tile_sizes(config)) > 0


# --- the CPU kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize("fmt_name", FORMATS)
def test_a_bad_token_spoils_only_itself_on_the_cpu(isa, fmt_name, dtype, activation_bits):
    quantize = quantize_nvfp4 if fmt_name == "nvfp4" else quantize_mxfp4
    weight = quantize(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 0.05)
    packed = cpu.pack_weight(weight)
    for m in (2, 5, 14, 45):
        a = torch.randn(m, 96, generator=torch.Generator().manual_seed(m)).to(dtype)
        clean = cpu.linear(a, packed, None, activation_bits)
        for name in STRESS:
            bad = stressed(a, name)
            y = cpu.linear(bad, packed, None, activation_bits)
            assert_others_untouched(y, clean, name)
            if name == "subnormals" and dtype != torch.float16:  # f32 ones may count as zero
                reference = reference_linear(bad, weight, None, activation_bits)
                assert (y[VICTIM].double() - reference[VICTIM]).abs().max() < 2.0**-126
            elif is_finite_stress(name):
                found = compare_linear(y, bad, weight, None, activation_bits)
                assert found.is_match, f"M={m}, {name}: {found.report}"


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
def test_a_bad_token_spoils_only_itself_in_fp8_layers(isa, dtype):
    q, scale = quantize_fp8_per_row(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)))
    for m in (2, 5, 14, 45):
        a = torch.randn(m, 96, generator=torch.Generator().manual_seed(m)).to(dtype)
        clean = cpu.fp8_linear(a, q, scale[:, 0].contiguous())
        for name in STRESS:
            y = cpu.fp8_linear(stressed(a, name), q, scale[:, 0].contiguous())
            assert_others_untouched(y, clean, name)


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize("fmt_name", FORMATS)
def test_every_code_byte_times_every_block_scale_on_the_cpu(isa, fmt_name, dtype):
    fmt = FORMATS[fmt_name]
    weight = every_pair(fmt, [s for s in legal_scales(fmt) if s not in BEYOND_FLOAT32])
    packed = cpu.pack_weight(weight)
    dense = weight.dequantize(torch.float64)
    for tokens in (torch.eye(512), torch.eye(512)[::37]):
        y = cpu.linear(tokens.to(dtype), packed)
        exact = (tokens.double() @ dense.T).to(dtype)
        # An f32 subnormal (a scale of 2^-127, or its products) may count as zero.
        is_tiny = exact.double().abs() < 2.0**-126
        assert torch.equal(y.masked_fill(is_tiny, 0), exact.masked_fill(is_tiny, 0))
        assert (y[is_tiny].double().abs() <= 2.0**-126).all()


@pytest.mark.parametrize("pack", [layout.pack_weight, cpu.pack_weight], ids=["cuda", "cpu"])
@pytest.mark.parametrize(("fmt_name", "byte"), [("nvfp4", 0x7F), ("nvfp4", 0xFF), ("mxfp4", 0xFF)])
def test_a_nan_among_the_block_scales_reaches_no_kernel(pack, fmt_name, byte):
    with pytest.raises(ValueError, match="NaN"):
        pack(every_pair(FORMATS[fmt_name], [0x38, byte]))


@pytest.mark.parametrize("byte", BEYOND_FLOAT32)
def test_weights_beyond_float32_are_refused_on_the_cpu(byte):
    with pytest.raises(ValueError, match=rf"row 1, block 0 is 2\^{byte - 127}; .* 2\^125 at most"):
        cpu.pack_weight(every_pair(FORMATS["mxfp4"], [127, byte]))


# --- experts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("fmt_name", FORMATS)
def test_a_bad_token_spoils_only_itself_among_experts(isa, fmt_name, bits, on_input):
    """The bad token shares its two experts with the others."""
    import vllm_nvfp4.kernels.moe_ops  # noqa: F401 registers the op

    quantize = quantize_nvfp4 if fmt_name == "nvfp4" else quantize_mxfp4
    generator = torch.Generator().manual_seed(3)
    stacks = []
    for n, k in ((128, 96), (96, 64)):
        dense = [torch.randn(n, k, generator=generator) * k**-0.5 for _ in range(3)]
        packed = [cpu.pack_weight(quantize(d)) for d in dense]
        names = ("codes", "block_scale", "global_scale")
        stacks.append([torch.stack([getattr(p, name) for p in packed]) for name in names])
    a = torch.randn(9, 96, generator=generator).bfloat16()
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]] * 3, dtype=torch.int32)
    weights = torch.rand(9, 2, generator=generator)

    def run(a: torch.Tensor) -> torch.Tensor:
        swiglu = [math.inf, 1.0, 0.0]
        return torch.ops.vllm_nvfp4.moe(
            a, *stacks, weights, ids, None, 64, fmt_name, "silu", swiglu, on_input, bits
        )

    clean = run(a)
    for name in STRESS:
        assert_others_untouched_by_experts(run(stressed(a, name)), clean, name)
