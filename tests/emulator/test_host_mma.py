# SPDX-License-Identifier: Apache-2.0
"""mma.sync on the emulator: lane maps against the PTX ISA's tables, accumulators against models."""

from __future__ import annotations

import pytest
import torch
from host_probes import BF16, E4M3, F16, F32, S8, S32, MmaParams, probes, random_matrix

from vllm_nvfp4.testing.host_kernel import HostMachine

# Element i of a lane's fragment, as the PTX ISA's tables for each shape put it. (row, column) for A
# and C, (k, column) for B.

GROUP = torch.arange(32) // 4
IN_GROUP = torch.arange(32) % 4


def a_place_16bit(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    row = GROUP + (8 if i in (2, 3, 6, 7) else 0)
    return row, IN_GROUP * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place_16bit(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return IN_GROUP * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP


def a_place_8bit_k16(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return GROUP + (0 if i < 4 else 8), IN_GROUP * 4 + (i & 3)


def b_place_8bit_k16(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return IN_GROUP * 4 + (i & 3), GROUP


def a_place_8bit_k32(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    row = GROUP + (0 if i < 4 or 8 <= i < 12 else 8)
    return row, IN_GROUP * 4 + (i & 3) + (0 if i < 8 else 16)


def b_place_8bit_k32(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return IN_GROUP * 4 + (i & 3) + (0 if i < 4 else 16), GROUP


def c_place(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return GROUP + (0 if i < 2 else 8), IN_GROUP * 2 + (i & 1)


MMAS = {
    "mma_m16n8k16_bf16_f32": (BF16, F32, 16, a_place_16bit, b_place_16bit),
    "mma_m16n8k16_f16_f32": (F16, F32, 16, a_place_16bit, b_place_16bit),
    "mma_m16n8k16_f16_f16": (F16, F16, 16, a_place_16bit, b_place_16bit),
    "mma_m16n8k16_e4m3_f32": (E4M3, F32, 16, a_place_8bit_k16, b_place_8bit_k16),
    "mma_m16n8k32_e4m3_f32": (E4M3, F32, 32, a_place_8bit_k32, b_place_8bit_k32),
    "mma_m16n8k16_e4m3_f16": (E4M3, F16, 16, a_place_8bit_k16, b_place_8bit_k16),
    "mma_m16n8k32_e4m3_f16": (E4M3, F16, 32, a_place_8bit_k32, b_place_8bit_k32),
    "mma_m16n8k16_s8_s32": (S8, S32, 16, a_place_8bit_k16, b_place_8bit_k16),
    "mma_m16n8k32_s8_s32": (S8, S32, 32, a_place_8bit_k32, b_place_8bit_k32),
}


def to_fragment(matrix: torch.Tensor, place) -> torch.Tensor:
    """[..., rows, columns] -> [..., 32 lanes, registers] int32, by the element table `place`."""
    raw = matrix.contiguous().view(torch.uint8).reshape(*matrix.shape, matrix.element_size())
    per_lane = matrix.shape[-1] * matrix.shape[-2] // 32
    elements = [raw[(..., *place(i), slice(None))] for i in range(per_lane)]
    return torch.cat(elements, dim=-1).contiguous().view(torch.int32)


def from_fragment(registers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    elements = registers.view(dtype)
    matrix = torch.empty(16, 8, dtype=dtype)
    for i in range(4):
        matrix[c_place(i)] = elements[:, i]
    return matrix


def run_mma(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    machine: HostMachine | None = None,
    is_chained: bool = True,
) -> torch.Tensor:
    """d = a @ b + c for a [16, K], b [K, 8], c [16, 8], in steps of the instruction's k."""
    _, _, k, a_place, b_place = MMAS[name]
    num_steps = a.shape[1] // k
    a_steps = to_fragment(a.unflatten(1, (num_steps, k)).transpose(0, 1), a_place)
    b_steps = to_fragment(b.unflatten(0, (num_steps, k)), b_place)
    c_lanes = to_fragment(c, c_place)
    d = torch.zeros_like(c_lanes)
    tensors = {"a": a_steps, "b": b_steps, "c": c_lanes, "d": d}
    probes().launch(
        f"probe_{name}",
        MmaParams(*(t.data_ptr() for t in tensors.values()), num_steps, is_chained),
        grid=(1,),
        block=(32,),
        buffers=tensors,
        outputs={"d"},
        machine=machine or HostMachine(accumulator="exact"),
    )
    return from_fragment(d, c.dtype)


@pytest.mark.parametrize("name", MMAS)
def test_mma_lane_maps(name: str) -> None:
    in_type, out_type, k, _, _ = MMAS[name]
    a = random_matrix(in_type, 16, k, seed=1)
    b = random_matrix(in_type, k, 8, seed=2)
    c = random_matrix(out_type, 16, 8, seed=3)
    expected = a.double() @ b.double() + c.double()
    assert torch.equal(run_mma(name, a, b, c), expected.to(out_type))


@pytest.mark.parametrize("name", MMAS)
def test_mma_places_every_element(name: str) -> None:
    # One-hot rows: each product picks one element, so a swapped pair cannot cancel.
    in_type, out_type, k, _, _ = MMAS[name]
    a = torch.zeros(16, k)
    a[torch.arange(16), torch.arange(16) * 5 % k] = 1
    b = (torch.arange(k * 8) % 13 - 6).reshape(k, 8).float()
    c = torch.zeros(16, 8, dtype=out_type)
    result = run_mma(name, a.to(in_type), b.to(in_type), c)
    assert torch.equal(result.double(), a.double() @ b.double())


def ada_step(products: list[tuple[int, int]], accumulator: tuple[int, int]) -> tuple[int, int]:
    """Sum of significand * 2^exponent terms, each cut at 13 bits below the largest exponent.

    A term is (significand as an integer with 30 fractional bits, exponent). Returns the sum as
    (integer, exponent of its last bit).
    """
    terms = [t for t in [*products, accumulator] if t[0]]
    if not terms:
        return 0, 0
    largest = max(e for _, e in terms)
    total = 0
    for significand, exponent in terms:
        magnitude = abs(significand) >> (30 - 13 + largest - exponent)
        total += magnitude if significand > 0 else -magnitude
    return total, largest - 13


def split_float(value: float, min_exponent: int) -> tuple[int, int]:
    """(significand as an integer with 30 fractional bits, exponent); 1 <= |significand| < 2 above
    the smallest exponent."""
    if value == 0:
        return 0, min_exponent
    exponent = max(int(torch.frexp(torch.tensor(value, dtype=torch.float64))[1]) - 1, min_exponent)
    significand = value * 2.0 ** (30 - exponent)
    return int(significand), exponent


def ada_reference(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The published model of Ada's FP8 MMA, in integers: per 16 of k, see ada_step."""
    result = c.clone()
    is_half = c.dtype == F16
    for m in range(16):
        for n in range(8):
            for first in range(0, a.shape[1], 16):
                products = []
                for k in range(first, first + 16):
                    sa, ea = split_float(a[m, k].item(), -6)
                    sb, eb = split_float(b[k, n].item(), -6)
                    products.append((sa * sb >> 30, ea + eb))
                start = split_float(result[m, n].item(), -14 if is_half else -126)
                total, last = ada_step(products, start)
                value = torch.tensor(float(total) * 2.0**last, dtype=torch.float64)
                if is_half:
                    result[m, n] = round_to_half(value.item())
                else:  # 14 significant bits, cut
                    bits = value.float().view(S32) & ~0x3FF
                    result[m, n] = bits.view(F32)
    return result


def round_to_half(value: float) -> float:
    """Nearest even, straight from double (torch rounds to float in between)."""
    _, exponent = split_float(value, -14)
    step = 2.0 ** (exponent - 10)
    return round(value / step) * step


@pytest.mark.parametrize("spread", [0, 6, 14])
@pytest.mark.parametrize("name", [n for n in MMAS if "e4m3" in n])
def test_ada_fp8_accumulator_is_bit_true(name: str, spread: int) -> None:
    _, out_type, k, _, _ = MMAS[name]
    generator = torch.Generator().manual_seed(spread)

    def scaled(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-spread // 2, spread // 2 + 1, shape, generator=generator)
        return torch.randn(shape, generator=generator) * 2.0**exponents

    a, b = scaled(16, k).to(E4M3), scaled(k, 8).to(E4M3)
    c = (scaled(16, 8) * 8).to(out_type)
    c[0] = 0
    a[1] = torch.zeros(k).to(E4M3)
    expected = ada_reference(a.float(), b.float(), c)
    assert torch.equal(run_mma(name, a, b, c, HostMachine(accumulator="ada")), expected)


def test_chained_fp8_accumulation_is_biased_and_fresh_partials_are_not() -> None:
    depth = 4096
    a = random_matrix(F32, 16, depth, seed=1).abs().to(E4M3)
    b = random_matrix(F32, depth, 8, seed=2).abs().to(E4M3)
    exact = a.double() @ b.double()
    zero = torch.zeros(16, 8)
    machine = HostMachine(accumulator="ada")

    def relative_error(is_chained: bool) -> torch.Tensor:
        y = run_mma("mma_m16n8k16_e4m3_f32", a, b, zero, machine, is_chained)
        return (y.double() - exact) / exact

    chained = relative_error(is_chained=True)
    assert chained.max() < 0  # every output is too small
    assert 0.05 < -chained.mean() < 0.09
    assert relative_error(is_chained=False).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mma_m16n8k16_bf16_f32", "mma_m16n8k16_f16_f32"])
def test_ada_half_accumulator_truncates(name: str) -> None:
    in_type = MMAS[name][0]
    a = random_matrix(in_type, 16, 16, seed=1).abs()
    b = random_matrix(in_type, 16, 8, seed=2).abs()
    c = torch.rand(16, 8, generator=torch.Generator().manual_seed(4))
    exact = a.double() @ b.double() + c.double()
    error = run_mma(name, a, b, c, HostMachine(half_accumulator="ada")).double() - exact
    assert (error <= 0).all()
    assert (error < 0).any()
    assert (error.abs() <= exact * 2.0**-21).all()


@pytest.mark.parametrize("accumulator", ["ada", "exact"])
@pytest.mark.parametrize("sign", [1, -1])
def test_f32_sums_overflow_to_infinity(sign: int, accumulator: str) -> None:
    a, b = torch.zeros(16, 16), torch.ones(16, 8)
    a[0, :2] = sign * 2.0**127  # 2^128 together
    a[1, 0], a[1, 1] = sign * 2.0**127, sign * 2.0**126
    machine = HostMachine(half_accumulator=accumulator)
    y = run_mma("mma_m16n8k16_bf16_f32", a.to(BF16), b.to(BF16), torch.zeros(16, 8), machine)
    assert torch.equal(y[0], torch.full((8,), sign * float("inf")))
    assert torch.equal(y[1], torch.full((8,), sign * 1.5 * 2.0**127))


def test_mma_passes_nan_and_infinity_on() -> None:
    a, b = torch.ones(16, 16), torch.ones(16, 8)
    a[2, 3] = float("nan")
    c = torch.zeros(16, 8)
    c[5] = float("inf")
    for accumulator in ("ada", "exact"):
        machine = HostMachine(accumulator=accumulator)
        y = run_mma("mma_m16n8k16_e4m3_f32", a.to(E4M3), b.to(E4M3), c, machine)
        assert y[2].isnan().all()
        assert torch.isposinf(y[5]).all()
        assert torch.equal(y[6], torch.full((8,), 16.0))
