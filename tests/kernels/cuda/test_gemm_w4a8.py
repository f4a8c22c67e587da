# SPDX-License-Identifier: Apache-2.0
"""The W4A8 kernel's own text on the emulated GPU, with Ada's FP8 accumulator, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from gemm_cases import (
    DISTRIBUTIONS,
    check_the_order_of_the_splits,
    configs_of,
    make_activations,
    make_weight,
    odd_shapes,
    run_and_compare,
    smallest,
)

from vllm_nvfp4.kernels.cuda import dispatch
from vllm_nvfp4.kernels.cuda.configs import GemmConfig, imma_stand_in
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import E2M1_VALUES, FORMATS
from vllm_nvfp4.numerics.quantize import quantize_nvfp4
from vllm_nvfp4.numerics.reference import folded_weight, reference_linear
from vllm_nvfp4.numerics.weight import (
    BlockScaledWeight,
    decode_block_scale,
    raise_block_scales,
)
from vllm_nvfp4.testing.host_gemm import DTYPES, build_host, run_gemm, shipped
from vllm_nvfp4.testing.host_kernel import HostKernelError, HostMachine
from vllm_nvfp4.testing.metrics import relative_error
from vllm_nvfp4.testing.subnormals import subnormal_case

CONFIGS = configs_of("gemm_w4a8")
MAX_LOSS = 1e-4  # relative: what "exact" promises beside the rounding of the output
# Sums of a block (and with NVFP4 of four) rounded to 11 bits: 2^-12 each, at random signs.
MAX_LOSS_F16 = 5e-4
# Against the folded weights: eight truncations at 2^-13 of the chain's largest term.
MAX_LOSS_FOLDED = 1e-3
MAX_LOSSES = {"exact": MAX_LOSS, "f16_partials": MAX_LOSS_F16, "folded": MAX_LOSS_FOLDED}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.symbol)
def test_odd_shapes_match_float64(config: GemmConfig) -> None:
    for m, n, k, splits in odd_shapes(config):
        weight = make_weight(config, n, k)
        a = make_activations(config, m, k)
        bias = make_activations(config, 1, n, seed=2)[0] if n % 8 else None
        _, loss = run_and_compare(shipped(config), config, a, weight, bias, splits)
        assert loss <= MAX_LOSSES[config.variant], (
            f"{config.symbol} M={m} N={n} K={k} splits={splits}: {loss}"
        )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt_name", FORMATS)
@pytest.mark.parametrize("variant", MAX_LOSSES)
def test_data_of_every_kind(fmt_name: str, dtype: str, distribution: str, variant: str) -> None:
    if fmt_name == "mxfp4" and variant == "folded":
        assert dispatch.reachable(fmt_name, dtype, 8, variant)[0].variant == "exact"
        return
    config = smallest("gemm_w4a8", fmt_name, dtype, variant)
    weight = make_weight(config, 64, 2048)
    a = make_activations(config, 5, 2048, distribution)
    _, loss = run_and_compare(shipped(config), config, a, weight, splits=2)
    assert loss <= MAX_LOSSES[variant]


def test_folding_costs_two_percent_of_a_weight() -> None:
    """Beside the 9 % that NVFP4 itself costs Gaussian weights."""
    config = smallest("gemm_w4a8", "nvfp4", "bf16", "folded")
    weight = make_weight(config, 256, 2048)
    exact = weight.dequantize(torch.float64)
    assert 0.015 < relative_error(folded_weight(weight), exact) < 0.025


def test_raised_scales_keep_small_rows_from_the_subnormals() -> None:
    """Rows of a weight up to ten thousand times apart: what folding costs each; and the smallest
    product, which is zero in E4M3 as it is stored."""
    torch.manual_seed(0)
    dense = torch.distributions.StudentT(4.0).sample((256, 1024))
    weight = quantize_nvfp4(dense * torch.logspace(-4, 0, 256)[:, None])
    exact = weight.dequantize(torch.float64)
    raised = raise_block_scales(weight)
    assert torch.equal(raised.dequantize(torch.float64), exact)
    worst = [
        float(((folded_weight(w) - exact).norm(dim=1) / exact.norm(dim=1)).max())
        for w in (weight, raised)
    ]
    assert worst[1] < 0.04
    assert worst[0] > 0.08
    config = smallest("gemm_w4a8", "nvfp4", "bf16", "folded")
    scale = torch.full((16, 4), 2.0**-6).to(torch.float8_e4m3fn)
    codes = pack_codes(torch.ones(16, 64, dtype=torch.uint8))  # 0.5 times 2^-6: 2^-10 when folded
    small = BlockScaledWeight(codes, scale, torch.ones(16), FORMATS["nvfp4"])
    one_hot, ones = torch.eye(64)[:1].to(torch.float8_e4m3fn), torch.ones(1)
    for w, expected in ((small, 0.0), (raise_block_scales(small), 2.0**-7)):
        y = run_gemm(shipped(config), config, one_hot, pack_weight(w), a_scale=ones)
        assert (y == expected).all()
    zeros = BlockScaledWeight(codes * 0, (scale.float() * 0).to(scale.dtype), torch.ones(16), w.fmt)
    assert torch.equal(raise_block_scales(zeros).global_scale, zeros.global_scale)


def positive_weight(n: int, k: int) -> BlockScaledWeight:
    """Codes of one sign and block scales of 1: a chain over K would need no scaling at all."""
    torch.manual_seed(3)
    codes = torch.randint(1, 8, (n, k), dtype=torch.uint8)
    scale = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
    return BlockScaledWeight(pack_codes(codes), scale, torch.full((n,), 0.01), FORMATS["nvfp4"])


def test_positive_data_has_no_bias_and_a_chain_would_be_caught() -> None:
    """Ada's FP8 accumulator truncates to 13 fractional bits: chained over K it loses percents."""
    config = smallest("gemm_w4a8", "nvfp4", "fp16")
    weight = positive_weight(32, 4096)
    a = make_activations(config, 4, 4096, "all_positive")
    y, loss = run_and_compare(shipped(config), config, a, weight)
    assert loss <= MAX_LOSS
    reference = reference_linear(a, weight, activation_bits=8)
    assert abs(float((y.double() / reference - 1).mean())) < MAX_LOSS

    chain = (
        "        float sum[4];\n"
        "        BlockSum<Config::kPartial>::run(sum, a, tokens);\n"
        "        accumulate(c[r][i], scale[half], sum);\n",
        "        ptx::mma_m16n8k16_e4m3_f32(c[r][i], a, tokens, c[r][i]);\n",
    )
    chained = build_host([config], edits=[chain])
    y, loss = run_and_compare(chained, config, a, weight)
    assert loss > MAX_LOSS
    assert float((y.double() / reference - 1).mean()) < -0.02
    # It is the accumulator and not the edit: with an exact one the chain is right.
    exact = HostMachine(accumulator="exact")
    _, loss = run_and_compare(chained, config, a, weight, machine=exact)
    assert loss <= MAX_LOSS


@pytest.mark.parametrize(
    ("fmt_name", "variant"),
    [(f, v) for f in FORMATS for v in MAX_LOSSES if (f, v) != ("mxfp4", "folded")],
)
def test_the_largest_numbers_do_not_overflow(fmt_name: str, variant: str) -> None:
    """Activations of 448, codes of 6, NVFP4 scales of 448: f16 sums are at their limit."""
    config = smallest("gemm_w4a8", fmt_name, "fp16", variant)
    fmt = FORMATS[fmt_name]
    n, k = 24, 512
    codes = torch.full((n, k // 2), 0x77, dtype=torch.uint8)
    scale = torch.full((n, k // fmt.block_size), 0x7E, dtype=torch.uint8)
    scale = scale.view(torch.float8_e4m3fn) if fmt.scale_type == "e4m3" else scale
    weight = BlockScaledWeight(codes, scale, torch.full((n,), 2.0**-20), fmt)
    a = torch.full((3, k), 448.0, dtype=torch.float16)
    _, loss = run_and_compare(shipped(config), config, a, weight)
    assert loss <= MAX_LOSSES[variant]


@pytest.mark.parametrize("fmt_name", FORMATS)
def test_every_code_times_every_block_scale(fmt_name: str) -> None:
    config = smallest("gemm_w4a8", fmt_name, "bf16")
    fmt = FORMATS[fmt_name]
    rows = 127 if fmt.scale_type == "e4m3" else 255
    codes = (torch.arange(fmt.block_size, dtype=torch.uint8) % 16).expand(rows, -1)
    scale = torch.arange(rows, dtype=torch.uint8)[:, None]
    scale = scale.view(torch.float8_e4m3fn) if fmt.scale_type == "e4m3" else scale
    weight = BlockScaledWeight(pack_codes(codes), scale, torch.ones(rows), fmt)
    one_hot = torch.eye(fmt.block_size).to(torch.float8_e4m3fn)
    a_scale = torch.ones(fmt.block_size)
    y = run_gemm(shipped(config), config, one_hot, pack_weight(weight), a_scale=a_scale)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    table = torch.cat([values, -values])
    expected = table[codes[0].long()][:, None] * decode_block_scale(scale, fmt, torch.float64).T
    assert torch.equal(y, expected.to(y.dtype))


@pytest.mark.parametrize("config", CONFIGS[::4], ids=lambda c: c.symbol)
def test_the_same_input_gives_the_same_bits(config: GemmConfig) -> None:
    k = 3 * config.block_k + config.fmt.block_size
    weight = make_weight(config, 40, k)
    a = make_activations(config, 9, k)
    results = [
        run_and_compare(
            shipped(config), config, a, weight, splits=4, machine=HostMachine(seed=seed)
        )[0]
        for seed in range(3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("variant", ["exact", "f16_partials"])
@pytest.mark.parametrize("fmt_name", FORMATS)
def test_fp8_subnormals_keep_their_value(fmt_name: str, variant: str) -> None:
    config = smallest("gemm_w4a8", fmt_name, "bf16", variant)
    case = subnormal_case(FORMATS[fmt_name])
    packed = pack_weight(case.weight)
    for accumulator in ("ada", "exact"):
        machine = HostMachine(accumulator=accumulator)
        y = run_gemm(shipped(config), config, case.a, packed, a_scale=case.a_scale, machine=machine)
        assert case.problems(y) == []


def test_a_gpu_without_fp8_subnormals_is_named() -> None:
    """The codes' lowest bit dropped, which is all that 0.5 has; activations likewise."""
    config = smallest("gemm_w4a8", "nvfp4", "bf16")
    case = subnormal_case(FORMATS["nvfp4"])
    packed = pack_weight(case.weight)
    module = build_host([config], edits=[("kMagnitudes = 0x1C1C1C1C", "kMagnitudes = 0x18181818")])
    y = run_gemm(module, config, case.a, packed, a_scale=case.a_scale)
    assert "loses the code 0.5" in " ".join(case.problems(y))
    normal = case.a.float()
    normal[normal < 2.0**-6] = 0
    a = normal.to(torch.float8_e4m3fn)
    y = run_gemm(shipped(config), config, a, packed, a_scale=case.a_scale)
    assert "those below 2^-6 are lost" in " ".join(case.problems(y))
    y[-1, 3] = 31
    assert "a = 2^0, w = 0.5" in case.problems(y)[-1]


def test_splits_are_added_in_their_order() -> None:
    config = smallest("gemm_w4a8", "nvfp4", "bf16")
    check_the_order_of_the_splits(config, splits=9, undo=2.0**6)


def test_the_integer_stand_in_is_not_shipped() -> None:
    stand_in = imma_stand_in(CONFIGS[0])
    assert stand_in not in CONFIGS
    assert stand_in.symbol.endswith("_imma")
    assert "VNVFP4_IMMA_STAND_IN" in stand_in.source
    with pytest.raises(ValueError, match="only gemm_w4a8's exact variant"):
        imma_stand_in(smallest("gemm_w4a16", "nvfp4", "bf16"))


FAULTS = [
    ("wait one stage too late", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    ("activation rows of the wrong block", "lane / 8 * 16;", "lane / 8 % 2 * 16;"),
    ("scales of the two rows swapped", "scale[0][1] = row_g8.x;", "scale[0][1] = row_g.x;"),
    ("nibbles of the rows swapped", "a[0], a[1]);\n#pragma", "a[1], a[0]);\n#pragma"),
    ("mantissa bit lost", "kMagnitudes = 0x1C1C1C1C", "kMagnitudes = 0x18181818"),
    ("accumulator's tokens", "2 * thread_in_group() + i % 2", "2 * thread_in_group() + i / 2"),
    ("one scale for the tile", "(stage, tile_k, pair, scales)", "(stage, tile_k, 0, scales)"),
]


FOLDED_FAULTS = [
    ("scale of the other row", "fold_scale(codes_g8, scale_g8)", "fold_scale(codes_g8, scale_g)"),
    ("operands of the wrong block", "[2 * (block % 2)] =", "[2 - 2 * (block % 2)] ="),
    ("sums of one step only", "[token_tile][i] += sum[r][i]", "[token_tile][i] = sum[r][i]"),
]


@pytest.mark.parametrize(
    ("variant", "what", "text", "replacement"),
    [("exact", *f) for f in FAULTS] + [("folded", *f) for f in FOLDED_FAULTS],
    ids=[f[0] for f in FAULTS + FOLDED_FAULTS],
)
def test_planted_faults_are_noticed(variant: str, what: str, text: str, replacement: str) -> None:
    config = smallest("gemm_w4a8", "nvfp4", "bf16", variant)
    module = build_host([config], edits=[(text, replacement)])
    weight = make_weight(config, 72, 7 * config.block_k + 16)
    a = make_activations(config, 3, weight.num_cols)
    try:
        loss = run_and_compare(module, config, a, weight, splits=2)[1]
    except HostKernelError:
        loss = math.inf
    assert loss > MAX_LOSSES[variant], f"{what} was not noticed"
