# SPDX-License-Identifier: Apache-2.0
"""The W4A8 kernel with INT8 activations, its own text on the emulated GPU, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from gemm_cases import (
    DISTRIBUTIONS,
    configs_of,
    make_activations,
    make_weight,
    odd_shapes,
    run_and_compare,
    smallest,
)

from vllm_nvfp4.kernels.cuda import devices, dispatch
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.configs import QUANTIZE_CONFIGS, GemmConfig, QuantizeConfig
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import E2M1_VALUES, FORMATS
from vllm_nvfp4.numerics.quantize import quantize_int8_per_group
from vllm_nvfp4.numerics.weight import BlockScaledWeight, decode_block_scale
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu
from vllm_nvfp4.testing.host_gemm import DTYPES, build_host, run_gemm, run_quantize, shipped
from vllm_nvfp4.testing.host_kernel import HostKernelError, HostMachine
from vllm_nvfp4.testing.metrics import compare_linear

CONFIGS = configs_of("gemm_w4i8")
MAX_LOSS = 1e-6  # relative, in rms over a token's outputs, beside the rounding of the output


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.symbol)
def test_odd_shapes_match_float64(config: GemmConfig) -> None:
    for m, n, k, splits in odd_shapes(config):
        weight = make_weight(config, n, k)
        a = make_activations(config, m, k)
        bias = make_activations(config, 1, n, seed=2)[0] if n % 8 else None
        _, loss = run_and_compare(shipped(config), config, a, weight, bias, splits)
        assert loss <= MAX_LOSS, f"M={m} N={n} K={k} splits={splits}: {loss}"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("fmt_name", FORMATS)
def test_data_of_every_kind(fmt_name: str, distribution: str) -> None:
    config = smallest("gemm_w4i8", fmt_name, "fp16", "int8")
    weight = make_weight(config, 64, 2048)
    a = make_activations(config, 5, 2048, distribution)
    assert run_and_compare(shipped(config), config, a, weight, splits=2)[1] <= MAX_LOSS


@pytest.mark.parametrize("fmt_name", FORMATS)
def test_every_tile_and_two_runs_give_the_same_bits(fmt_name: str) -> None:
    """For one split: the order of the additions is that of the columns whatever the tile."""
    same = [c for c in CONFIGS if (c.fmt_name, c.dtype) == (fmt_name, "bf16")]
    weight, a = make_weight(same[0], 40, 480), make_activations(same[0], 70, 480)
    results = [
        run_and_compare(shipped(config), config, a, weight, machine=HostMachine(seed=seed))[0]
        for seed, config in enumerate([*same, same[0]])
    ]
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("fmt_name", FORMATS)
def test_every_code_times_every_activation_is_exact(fmt_name: str) -> None:
    """-128 too, which the rounding never makes; a whole block of each, so that the largest sums
    are seen, and one of a kind in every place."""
    config, fmt = smallest("gemm_w4i8", fmt_name, "fp16", "int8"), FORMATS[fmt_name]
    block = fmt.block_size
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
    scale = torch.full((16, 1), 0x38 if block == 16 else 127, dtype=torch.uint8)
    scale = scale.view(torch.float8_e4m3fn) if block == 16 else scale
    same = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, block)
    rolled = torch.stack([same[:, 0].roll(i) for i in range(block)], 1)
    every = torch.arange(-128, 128).to(torch.int8)
    places = torch.zeros(256, block, dtype=torch.int8)
    places[range(256), [i % block for i in range(256)]] = every
    for codes, q in ((same, every[:, None].expand(256, block).contiguous()), (rolled, places)):
        # A sum of a block has up to 16 bits; a 64th of it has no more than fp16 in these cases.
        factor = torch.full((16,), 2.0**-6)
        weight = BlockScaledWeight(pack_codes(codes), scale, factor, fmt)
        y = run_gemm(shipped(config), config, q, pack_weight(weight), a_scale=torch.ones(256, 1))
        exact = q.double() @ table[codes.long()].T * 2.0**-6
        assert torch.equal(y, exact.to(y.dtype))


@pytest.mark.parametrize("fmt_name", FORMATS)
def test_every_block_scale(fmt_name: str) -> None:
    config, fmt = smallest("gemm_w4i8", fmt_name, "bf16", "int8"), FORMATS[fmt_name]
    # 127 codes of 0.5 to 6 times a scale beyond 2^110 would leave f32 on the way.
    rows = torch.arange(127 if fmt.scale_type == "e4m3" else 127 + 110, dtype=torch.uint8)
    codes = (torch.arange(fmt.block_size, dtype=torch.uint8) % 16).expand(len(rows), -1)
    scale = rows[:, None].contiguous()
    scale = scale.view(torch.float8_e4m3fn) if fmt.scale_type == "e4m3" else scale
    weight = BlockScaledWeight(pack_codes(codes), scale, torch.ones(len(rows)), fmt)
    one_hot = torch.eye(fmt.block_size, dtype=torch.int8)
    a_scale = torch.ones(fmt.block_size, 1)
    y = run_gemm(shipped(config), config, one_hot, pack_weight(weight), a_scale=a_scale)
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
    expected = table[codes[0].long()][:, None] * decode_block_scale(scale, fmt, torch.float64).T
    assert torch.equal(y, expected.to(y.dtype))


FAULTS = [
    ("wait one stage too late", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    ("signs of the other row", "ptx::prmt(word << 4, 0, kSign", "ptx::prmt(word, 0, kSign"),
    ("block scales of the blocks", "ld_shared_u32(at + pair * 4)", "ld_shared_u32(at)"),
    ("scales of the other token", "a_scale[j % 2], sum[j]", "a_scale[j / 2], sum[j]"),
    ("scales of the other tile", "token_tile % 2 == 0 ? scales_of_two.x", "true ? scales_of_two.x"),
    ("scales of the next group", "is_there ? tile : 0", "is_there ? 1 - tile : 0"),
    ("activations of the wrong block", "lane / 8 * 16);", "lane / 8 % 2 * 16);"),
    ("a block's sum lost", "block == 0 ? sum", "block <= 1 ? sum"),
]


@pytest.mark.parametrize(("what", "text", "replacement"), FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_faults_are_noticed(what: str, text: str, replacement: str) -> None:
    config = smallest("gemm_w4i8", "nvfp4", "bf16", "int8")
    module = build_host([config], edits=[(text, replacement)])
    weight = make_weight(config, 72, 7 * config.block_k + 16)
    a = make_activations(config, 11, weight.num_cols)
    try:
        loss = run_and_compare(module, config, a, weight, splits=2)[1]
    except HostKernelError:
        loss = math.inf
    assert loss > MAX_LOSS, f"{what} was not noticed"


QUANTIZERS = [c for c in QUANTIZE_CONFIGS if c.stem == "quantize_i8"]


@pytest.mark.parametrize("config", QUANTIZERS, ids=lambda c: c.symbol)
def test_the_quantiser_gives_the_bits_of_numerics(config: QuantizeConfig) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[config.dtype]
    edges = torch.zeros(5, 144, dtype=dtype)
    edges[0, 70], edges[1, 70], edges[2, 70] = math.nan, math.inf, torch.finfo(dtype).tiny
    edges[3, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5])
    edges[4] = torch.finfo(dtype).max
    heavy = torch.distributions.StudentT(3.0).sample((3, 2064)) * 3
    bits = torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(dtype)
    every = bits[bits.isfinite()][: 31 * 2048].view(31, 2048)
    for a in (edges, heavy.to(dtype), every, heavy[:, :16].to(dtype)):
        q, scale = run_quantize(shipped(config), config, a)
        expected_q, expected_scale = quantize_int8_per_group(a)
        assert torch.equal(q, expected_q)
        assert torch.equal(scale.nan_to_num(nan=-1.0), expected_scale.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("card", ["RTX 3090", "RTX 4090"])
def test_auto_runs_int8_from_the_options_to_the_kernel(card: str) -> None:
    """A GPU without FP8, and one whose INT8 is faster; quantised here or by a compiled graph."""
    with emulated_gpu(card) as gpu:
        devices.use_variant("auto")
        try:
            place = torch.device("cuda", 0)
            weight = make_weight(CONFIGS[0], 40, 208)
            packed = cuda.pack_weight(
                BlockScaledWeight(
                    weight.codes.cuda(), weight.block_scale.cuda(), weight.global_scale.cuda(),
                    weight.fmt,
                )
            )  # fmt: skip
            cuda.check_activation(place, "8")
            assert cuda.a8_variant(place) == "int8"
            a = make_activations(CONFIGS[0], 9, 208)
            q, scale = quantize_int8_per_group(a)
            y = cuda.linear(a.cuda(), packed, None, 8)
            same = cuda.linear_a8(q.cuda(), scale.cuda(), packed, None, torch.bfloat16)
            q8, ones = torch.zeros(9, 208).to(torch.float8_e4m3fn).cuda(), torch.ones(9).cuda()
            with pytest.raises(ValueError, match="float8_e4m3fn, and the variant in force is"):
                cuda.linear_a8(q8, ones, packed, None, torch.bfloat16)
        finally:
            devices.use_variant("exact")
    assert [name.split("_bf16")[0] for name, _ in gpu.launches[:2]] == [
        "sm89_quantize_i8",
        "sm89_nvfp4_gemm_w4i8",
    ]
    outcome = compare_linear(y.cpu(), a, weight, None, 8, "int8")
    assert outcome.is_match, outcome.report
    assert torch.equal(y.cpu(), same.cpu())


def test_every_configuration_is_reachable() -> None:
    found = {
        c
        for fmt in FORMATS
        for dtype in ("bf16", "fp16")
        for c in dispatch.reachable(fmt, dtype, 8, "int8")
    }
    assert found == set(CONFIGS)
