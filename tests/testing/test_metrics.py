# SPDX-License-Identifier: Apache-2.0
"""The judge of the kernels: it lets a right one pass (on the emulated GPU) and no wrong one."""

import dataclasses

import pytest
import torch

from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, QUANTIZE_CONFIGS
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.testing import kernel_cases
from vllm_nvfp4.testing.host_gemm import build_host, run_gemm
from vllm_nvfp4.testing.kernel_cases import DATA, KernelCase, make_operands
from vllm_nvfp4.testing.metrics import compare, compare_linear, relative_error

CPU = torch.device("cpu")
CONFIGS = [
    next(c for c in GEMM_CONFIGS if (c.stem, c.dtype, c.fmt_name) == wanted)
    for wanted in (
        ("gemm_w4a16", "bf16", "nvfp4"),
        ("gemm_w4a16", "fp16", "mxfp4"),
        ("gemm_w4a8", "fp16", "nvfp4"),
    )
]


@pytest.fixture(scope="module")
def emulator():
    return build_host(CONFIGS)


@pytest.mark.parametrize("data", list(DATA))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.symbol)
def test_a_right_kernel_passes_and_a_wrong_code_does_not(emulator, config, data):
    case = KernelCase(config, 5, 40, 512, data)
    a, weight, bias = make_operands(case, CPU)
    bits = 8 if config.stem == "gemm_w4a8" else 16
    operand, a_scale = a, None
    if bits == 8:
        operand, a_scale = quantize_fp8_per_row(a)
        a_scale = a_scale[:, 0].contiguous()
    y = run_gemm(emulator, config, operand, pack_weight(weight), a_scale=a_scale, bias=bias)
    outcome = compare_linear(y, a, weight, bias, bits)
    assert outcome.is_match, outcome.report

    # The largest weight's sign flipped in one row: that row's outputs must stand out.
    dense = weight.dequantize().abs()
    row, column = divmod(int(dense.argmax()), dense.shape[1])
    codes = weight.codes.clone()
    codes[row, column // 2] ^= 0x80 if column % 2 else 0x08
    other = compare_linear(y, a, dataclasses.replace(weight, codes=codes), bias, bits)
    assert not other.is_match
    assert f", {row}]: got" in other.report


def test_rounding_alone_passes():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        weight = kernel_cases.random_weight(48, 256, "nvfp4", CPU)
        a = torch.randn(9, 256).to(dtype)
        assert compare_linear(reference_linear(a, weight).to(dtype), a, weight).is_match


def test_the_report_shows_the_first_mismatches_with_their_indices():
    y = torch.zeros(3, 4).half()
    reference = torch.zeros(3, 4).double()
    reference[1, 2], reference[2, 0] = 1.0, -2.0
    outcome = compare(y, reference, torch.full((3, 4), 0.5))
    assert (outcome.num_wrong, outcome.worst) == (2, 4.0)
    assert outcome.report.splitlines() == [
        "relative error 1.000e+00, worst 4 x tolerance, 2 wrong",
        "  [1, 2]: got 0, expected 1 +- 0.5",
        "  [2, 0]: got 0, expected -2 +- 0.5",
    ]


@pytest.mark.parametrize(
    ("value", "expected", "is_match"),
    [
        (torch.nan, 1.0, False),
        (torch.inf, 1.0, False),
        (torch.inf, 1e6, True),  # beyond fp16: infinity is the right answer
        (-torch.inf, 1e6, False),
        (torch.inf, 65536.0, True),
        (torch.inf, 65504.0, False),
        (65504.0, 1e6, False),
        (-torch.inf, -1e6, True),
    ],
)
def test_infinities(value, expected, is_match):
    outcome = compare(
        torch.tensor([value]).half(), torch.tensor([expected]).double(), torch.tensor([8.0])
    )
    assert outcome.is_match == is_match


def test_empty_and_zero():
    assert compare(torch.zeros(0, 4).half(), torch.zeros(0, 4), torch.ones(0, 4)).is_match
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(ValueError, match=r"y is \[2\], the reference \[3\]"):
        compare(torch.zeros(2), torch.zeros(3), torch.zeros(3))


def test_the_cases_cover_every_configuration_and_every_kind_of_data():
    for config in GEMM_CONFIGS:
        cases = kernel_cases.kernel_cases_of(config)
        assert {case.data for case in cases} == set(DATA)
        assert {case.has_bias for case in cases} == {True, False}
        assert [(c.m, c.n, c.k) for c in cases] == list(kernel_cases.SHAPES)
    assert {c.dtype for c in QUANTIZE_CONFIGS} == {c.dtype for c in GEMM_CONFIGS}


@pytest.mark.parametrize("fmt_name", ["nvfp4", "mxfp4"])
def test_special_weights(fmt_name):
    torch.manual_seed(0)
    weight = kernel_cases.random_weight(64, 4096, fmt_name, CPU)
    y = reference_linear(torch.randn(32, 4096), weight)
    assert 0.2 < y.std() < 5
    extreme = kernel_cases.extreme_weight(fmt_name, 64, CPU)
    values = extreme.dequantize(torch.float64)
    assert values.isfinite().all()
    if fmt_name == "nvfp4":
        assert len(values) == 127
        assert values.max() == 6 * 448
