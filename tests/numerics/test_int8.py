# SPDX-License-Identifier: Apache-2.0
"""Activations in INT8 with a scale per row and 64 columns: the rule, its edges, its error."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_nvfp4.numerics.quantize import quantize_int8_per_group, quantize_nvfp4
from vllm_nvfp4.numerics.reference import int8_error_bound, reference_linear, rounded_activations
from vllm_nvfp4.testing.kernel_cases import DATA


def test_half_steps_go_to_the_even_integer() -> None:
    x = torch.zeros(1, 64)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5])
    q, scale = quantize_int8_per_group(x)
    assert q.dtype == torch.int8
    assert scale.tolist() == [[1.0]]
    assert q[0, :7].tolist() == [127, 0, 2, 2, 0, -2, 0]


def test_each_group_has_its_own_scale_and_the_last_may_be_short() -> None:
    x = torch.ones(2, 3, 144)
    x[..., 64:128] *= 1000
    x[1, 2, 128:] = -4
    q, scale = quantize_int8_per_group(x)
    assert q.shape == x.shape
    assert scale.shape == (2, 3, 3)
    assert (q.abs() == 127).all()
    assert (q[1, 2, 128:] == -127).all()
    assert torch.equal(scale[1, 2] * 127, torch.tensor([1.0, 1000.0, 4.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_groups_too_small_for_a_scale_count_as_zeros(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 192, dtype=dtype)
    x[0, 64] = 1e-45 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal * 2.0**-7
    x[0, 128:] = 127 * 2.0**-14
    q, scale = quantize_int8_per_group(x)
    is_tiny = dtype != torch.float16  # fp16's smallest number is far inside float32's range
    assert scale[0, 0] == 1
    assert (scale[0, 1] == 1) == is_tiny
    assert q[0, 64] == (0 if is_tiny else 127)
    assert (q[0, 128:] == 127).all()
    assert scale[0, 2] == 2.0**-14


def test_every_bf16_number_at_the_top_of_its_group() -> None:
    """The largest of a group is 127 steps whatever its size: no quotient rounds beyond it."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    largest = bits.view(torch.bfloat16)
    largest = largest[largest.isfinite()]
    x = largest[:, None] * torch.tensor([1.0, 0.5] + [0.0] * 62, dtype=torch.bfloat16)
    q, scale = quantize_int8_per_group(x)
    is_lost = largest.float().abs() < 127 * 2.0**-126 * (1 - 2.0**-24)
    assert torch.equal(q[:, 0].abs() == 127, ~is_lost)
    assert torch.equal((scale[:, 0] == 1) & (q[:, 0] == 0), is_lost)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_spoils_its_row_and_no_other(bad: float) -> None:
    torch.manual_seed(0)
    a = torch.randn(3, 128)
    a[1, 70] = bad
    weight = quantize_nvfp4(torch.randn(8, 128))
    q, scale = quantize_int8_per_group(a)
    assert q[1, 70] == 0
    assert scale[1, 0].isfinite()
    assert not scale[1, 1].isfinite()
    y = reference_linear(a, weight, None, 8, "int8")
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", DATA)
def test_the_error_stays_below_its_bound_and_is_about_what_is_expected(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    a = DATA[kind]((32, 992), generator).bfloat16()
    # A group's largest number has no error: weights alike, so that none lies on those alone.
    weight = quantize_nvfp4(DATA["gaussian"]((48, 992), generator))
    error = reference_linear(a, weight, None, 8, "int8") - reference_linear(a, weight)
    bound = int8_error_bound(a, weight)
    assert (error.abs() <= bound).all()
    # Independent errors of step / sqrt(3) in each column, a step being half of the scale.
    step = (rounded_activations(a, "int8") - a.double()).abs().amax(1, keepdim=True)
    assert (step <= a.double().abs().amax(1, keepdim=True) * (1 / 254 + 2.0**-23)).all()
    _, scale = quantize_int8_per_group(a)
    steps = scale.double().repeat_interleave(64, 1)[:, : a.shape[1]] / 2
    expected = (steps.square() @ weight.dequantize(torch.float64).square().T / 3).sqrt()
    ratio = error.square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0.7 < ratio < 1.2


def test_a_coarser_group_has_the_larger_error() -> None:
    torch.manual_seed(1)
    a = torch.distributions.StudentT(3.0).sample((16, 512))
    weight = quantize_nvfp4(torch.randn(16, 512))
    q, scale = quantize_int8_per_group(a, 512)  # one scale for a whole row
    y = (q.double() * scale.double()) @ weight.dequantize(torch.float64).T
    coarse = (y - reference_linear(a, weight)).abs()
    fine = (reference_linear(a, weight, None, 8, "int8") - reference_linear(a, weight)).abs()
    assert coarse.mean() > 1.5 * fine.mean()
