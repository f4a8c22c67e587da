# SPDX-License-Identifier: Apache-2.0
"""INT8 activations on the CPU: numerics' rounding, exact sums of blocks, one result everywhere."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from vllm_nvfp4.kernels.cpu import dispatch as cpu_dispatch
from vllm_nvfp4.kernels.cpu import int8
from vllm_nvfp4.kernels.cpu import jit as cpu_jit
from vllm_nvfp4.kernels.cpu import linear as cpu
from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import E2M1_VALUES, FORMATS, MXFP4, NVFP4, BlockFormat
from vllm_nvfp4.numerics.quantize import quantize_int8_per_group, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.kernel_cases import DATA
from vllm_nvfp4.testing.metrics import compare_linear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Each level of instructions, and AVX-512 and AVX2 without their dot products of bytes.
LEVELS = [*cpu_jit.ISA_LEVELS, "avx512-bytes", "avx2-bytes"]


@pytest.fixture(params=LEVELS)
def isa(request, monkeypatch):
    if not use_level(request.param, monkeypatch):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    monkeypatch.undo()
    cpu_dispatch.use_isa(None)


def use_level(level: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this processor has the level, which is then in force."""
    name, _, lacks = level.partition("-")
    try:
        cpu_dispatch.use_isa(name)
    except ValueError:
        return False
    if lacks:
        lesser = dataclasses.replace(cpu_jit.host_cpu(), has_byte_dot=False)
        monkeypatch.setattr(cpu_dispatch, "host_cpu", lambda: lesser)
    return True


def make_weight(n: int, k: int, fmt: BlockFormat) -> BlockScaledWeight:
    torch.manual_seed(n + k)
    dense = torch.distributions.StudentT(4.0).sample((n, k)) * 0.05
    weight = quantize_nvfp4(dense) if fmt is NVFP4 else quantize_mxfp4(dense)
    factors = torch.linspace(0.5, 1.5, n)
    return dataclasses.replace(weight, global_scale=weight.global_scale * factors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_products_match_float64(fmt: BlockFormat, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for turn, (m, n, k) in enumerate(((1, 17, 32), (3, 40, 96), (15, 33, 1120), (26, 16, 64))):
        kind = list(DATA)[turn]
        weight, a = make_weight(n, k, fmt), DATA[kind]((m, k), generator).to(dtype)
        bias = torch.randn(n).to(dtype)
        y = cpu.linear(a, cpu.pack_weight(weight), bias, 8, "int8")
        outcome = compare_linear(y, a, weight, bias, 8, "int8")
        assert outcome.is_match, outcome.report
        if dtype == torch.float32:
            assert outcome.relative_error < 1e-6


def test_every_code_times_every_activation_is_exact(isa: str) -> None:
    """-128 too, which the rounding never makes; sixteen of them in a block, so that each place and
    the largest sums are seen."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
    for fmt in FORMATS.values():
        codes = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, fmt.block_size)
        scale = torch.full((16, 1), 0x38 if fmt is NVFP4 else 127, dtype=torch.uint8)
        scale = scale.view(torch.float8_e4m3fn) if fmt is NVFP4 else scale
        weight = BlockScaledWeight(pack_codes(codes), scale, torch.ones(16), fmt)
        q = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, fmt.block_size)
        ones = torch.ones(256, 1)
        y = cpu.linear_a8(q, ones, cpu.pack_weight(weight), None, torch.float32)
        assert torch.equal(y, q.float() @ table[codes.long()].T)
        one_hot = 127 * torch.eye(fmt.block_size, dtype=torch.int8)
        rolled = torch.stack([codes[:, 0].roll(i) for i in range(fmt.block_size)], 1)
        weight = dataclasses.replace(weight, codes=pack_codes(rolled))
        packed = cpu.pack_weight(weight)
        y = cpu.linear_a8(one_hot, ones[: fmt.block_size], packed, None, torch.float32)
        assert torch.equal(y, 127 * table[rolled.long()].T)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_the_same_bits_at_every_level_and_for_any_number_of_tokens(
    fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(40, 1120, fmt)
    packed, a = cpu.pack_weight(weight), torch.randn(24, 1120)
    results = {}
    for level in LEVELS:
        with monkeypatch.context() as patch:
            if use_level(level, patch):
                results[level] = cpu.linear(a, packed, None, 8, "int8")
    cpu_dispatch.use_isa(None)
    first = next(iter(results.values()))
    assert len(results) > 1
    assert [name for name, y in results.items() if not torch.equal(y, first)] == []
    for m in (1, 2, 5, 13):
        assert torch.equal(cpu.linear(a[:m], packed, None, 8, "int8"), first[:m])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_numerics_own(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit, at the edges too: what linear rounds is what linear_a8 is given."""
    a = torch.randn(5, 208).to(dtype)
    a[1, :64] = 0
    a[2, 64] = torch.finfo(dtype).tiny
    a[2, 65:128] = 0
    a[3, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5])
    a[3, 6:64] = 0
    a[4] *= 2.0**7
    packed = cpu.pack_weight(make_weight(24, 208, NVFP4))
    q, scale = quantize_int8_per_group(a)
    expected = cpu.linear_a8(q, scale, packed, None, torch.float32)
    assert expected.isfinite().all()
    assert torch.equal(cpu.linear(a, packed, None, 8, "int8"), expected.to(dtype))


def test_a_bad_token_spoils_only_itself(isa: str) -> None:
    packed, a = cpu.pack_weight(make_weight(16, 144, NVFP4)), torch.randn(4, 144)
    a[:3, 130] = torch.tensor([math.nan, math.inf, -math.inf])
    y = cpu.linear(a, packed, None, 8, "int8")
    assert y[:3].isnan().all()
    assert y[3].isfinite().all()


def forget_kernels() -> None:
    cpu_dispatch.use_isa(None)
    cpu_dispatch.compile_kernel.cache_clear()


def test_a_planted_fault_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of the table off by one, and the columns of a word in their plain order."""
    weight = make_weight(16, 64, NVFP4)
    a = torch.randn(4, 64)
    reference = reference_linear(a, weight, None, 8, "int8")
    for name, value in (
        ("_TABLE", [*int8._TABLE[:5], int8._TABLE[5] + 1, *int8._TABLE[6:]]),
        ("_COLUMN_ORDER", tuple(range(8))),
        ("_OFFSET", 11),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(int8, name, value)
            forget_kernels()
            y = cpu.linear(a, cpu.pack_weight(weight), None, 8, "int8")
        forget_kernels()
        assert (y - reference).abs().max() > 1e-3 * reference.abs().max(), name


def test_bad_calls_are_refused() -> None:
    packed = cpu.pack_weight(make_weight(16, 80, NVFP4))
    q, scale = quantize_int8_per_group(torch.randn(3, 80))
    for wrong in ((q[:, :64], scale), (q, scale[:, :1]), (q, scale.double())):
        with pytest.raises(ValueError, match=r"linear_a8: q is .* needs \[M, 80\] and \[M, 2\]"):
            cpu.linear_a8(*wrong, packed, None, torch.float32)
    y = cpu.linear_a8(q[:0], scale[:0], packed, None, torch.bfloat16)
    assert y.shape == (0, 16)
    assert y.dtype == torch.bfloat16


def test_warm_up_compiles_all_that_calls_need(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_dispatch.warm_up(MXFP4, torch.bfloat16, 8, "int8")

    def refuse(*args: object) -> int:
        raise AssertionError("compiled after the warm-up")

    weight = make_weight(16, 96, MXFP4)
    packed = cpu.pack_weight(weight)
    monkeypatch.setattr(cpu_dispatch, "compile_function", refuse)
    for m in (1, 2, 3, 7, 50):
        a = torch.randn(m, 96).bfloat16()
        y = cpu.linear(a, packed, None, 8, "int8")
        q, scale = quantize_int8_per_group(a)
        assert torch.equal(y, cpu.linear_a8(q, scale, packed, None, torch.bfloat16))
