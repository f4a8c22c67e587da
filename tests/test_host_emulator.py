# SPDX-License-Identifier: Apache-2.0
"""The emulator that runs CUDA kernels on a CPU: its instructions, and its verdict on faults."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import pytest
import torch

from vllm_nvfp4.testing.host_kernel import (
    HostCompileError,
    HostKernelError,
    HostMachine,
    HostModule,
    build,
)

SOURCES = Path(__file__).parent / "csrc"
PROBES = SOURCES / "host_probes.cuh"
SAMPLE = SOURCES / "host_sample_gemm.cuh"


class MmaParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "abcd"),
        ("num_steps", ctypes.c_int),
        ("is_chained", ctypes.c_int),
    )


class Buffers(ctypes.Structure):
    _fields_ = (("input", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_int))


class SampleParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "y", "turns")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "depth")),
    )


@functools.cache
def probes() -> HostModule:
    names = re.findall(r"MMA_PROBE\((\w+),", PROBES.read_text())[1:]
    names = [f"probe_{name}" for name in names]
    names += re.findall(
        r"__global__ void (probe_\w+)\(const __grid_constant__ Buffers", PROBES.read_text()
    )
    return build(PROBES, {name: name for name in names})


def run_probe(
    name: str,
    values: torch.Tensor,
    num_out: int,
    n: int = 0,
    block: int = 32,
    grid: int = 1,
    smem_bytes: int = 0,
    seed: int = 0,
) -> torch.Tensor:
    out = torch.zeros(num_out, dtype=torch.int32)
    values = values.contiguous()
    probes().launch(
        name,
        Buffers(values.data_ptr(), out.data_ptr(), n),
        grid=(grid,),
        block=(block,),
        smem_bytes=smem_bytes,
        buffers={"in": values, "out": out},
        outputs={"out"},
        machine=HostMachine(seed=seed),
    )
    return out


def random_words(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(
        torch.int32
    )


# --- mma.sync ------------------------------------------------------------------------------------
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


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, S8, S32 = torch.float8_e4m3fn, torch.int8, torch.int32
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


def random_matrix(dtype: torch.dtype, *shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in (S8, S32):
        return torch.randint(-128, 128, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


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
    """value = significand * 2^exponent with 1 <= |significand| < 2, or less at the smallest exponent."""
    if value == 0:
        return 0, min_exponent
    exponent = max(int(torch.frexp(torch.tensor(value, dtype=torch.float64))[1]) - 1, min_exponent)
    significand = value * 2.0 ** (30 - exponent)
    assert significand == int(significand)
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
    _, exponent = split_float(value, -14) if value == int(value * 2**30) / 2**30 else (0, 0)
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
    assert (error <= 0).all() and (error < 0).any()
    assert (error.abs() <= exact * 2.0**-21).all()


def test_mma_passes_nan_and_infinity_on() -> None:
    a, b = torch.ones(16, 16), torch.ones(16, 8)
    a[2, 3] = float("nan")
    c = torch.zeros(16, 8)
    c[5] = float("inf")
    for accumulator in ("ada", "exact"):
        machine = HostMachine(accumulator=accumulator)
        y = run_mma("mma_m16n8k16_e4m3_f32", a.to(E4M3), b.to(E4M3), c, machine)
        assert y[2].isnan().all() and torch.isposinf(y[5]).all()
        assert torch.equal(y[6], torch.full((8,), 16.0))


# --- other instructions --------------------------------------------------------------------------


def test_ldmatrix() -> None:
    rows = torch.arange(32 * 8, dtype=torch.int16).reshape(4, 8, 8)  # matrix, row, column
    out = run_probe("probe_ldmatrix", rows.view(S32).flatten(), 32 * 14, smem_bytes=512)
    got = out.reshape(32, 14).view(torch.int16).reshape(32, 14, 2)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        plain = [[rows[i, row, column], rows[i, row, column + 1]] for i in range(4)]
        turned = [[rows[i, column, row], rows[i, column + 1, row]] for i in range(4)]
        expected = torch.tensor([*plain[:1], *plain[:2], *plain, *turned[:1], *turned[:2], *turned])
        assert torch.equal(got[lane], expected.to(torch.int16))


def test_shuffles() -> None:
    values = torch.arange(100, 132, dtype=S32)
    got = run_probe("probe_shuffles", values, 32 * 8).reshape(32, 2, 4)
    for i, width in enumerate((32, 8)):
        for lane in range(32):
            first = lane // width * width
            up = lane - 3 if lane - 3 >= first else lane
            down = lane + 3 if lane + 3 < first + width else lane
            assert got[lane, i].tolist() == [
                100 + first + 3,
                100 + up,
                100 + down,
                100 + (lane ^ 3),
            ]


def test_votes_and_reductions() -> None:
    values = random_words(96, seed=5) % 1000
    got = run_probe("probe_votes", values, 96 * 8, block=96).reshape(3, 32, 8)
    for warp in range(3):
        part = values[warp * 32 : warp * 32 + 32]
        odd = part % 2 == 1
        ballot = sum(1 << i for i in range(32) if odd[i])
        expected = torch.tensor(
            [ballot, odd.any(), odd.all(), part.sum(), part.max(), (values % 2 == 1).sum(), 0, 1]
        )
        assert torch.equal(got[warp].long() & 0xFFFFFFFF, (expected & 0xFFFFFFFF).expand(32, 8))


def test_async_copies_land_in_order_and_pad_with_zeros() -> None:
    values = random_words(32 * 16)
    got = run_probe("probe_async_copies", values, 32 * 13, smem_bytes=2048).reshape(32, 13)
    expected = values.reshape(32, 16)[:, :13].clone()
    expected[:, 4:8] = 0
    assert torch.equal(got, expected)


def test_async_copy_read_before_its_group_is_waited_for() -> None:
    with pytest.raises(HostKernelError, match=r"unfinished cp.async.*host_probes.cuh:\d+"):
        run_probe("probe_async_copies", random_words(32 * 16), 32 * 13, n=1, smem_bytes=2048)


def test_bit_manipulation_and_conversions() -> None:
    floats = torch.randn(4000) * 2.0 ** torch.randint(-12, 12, (4000,))
    special = torch.tensor(
        [0.0, -0.0, 448.0, 464.0, 1e9, float("inf"), float("nan"), 2.0**-10, 1e-7]
    )
    words = torch.cat([floats.view(S32), special.view(S32), random_words(4000)])
    count = len(words)
    out = run_probe(
        "probe_conversions", words, count * 6, n=count, block=128, grid=-(-count // 128)
    )
    got = out.reshape(count, 6).long() & 0xFFFFFFFF
    x = words.long() & 0xFFFFFFFF

    both = torch.cat(
        [words.view(torch.uint8).reshape(-1, 4), (~words).view(torch.uint8).reshape(-1, 4)], 1
    )
    sign = torch.where(both >= 128, 255, 0).to(torch.uint8)
    picked = torch.stack([both[:, 6], both[:, 1], sign[:, 7], sign[:, 1]], 1)  # 0x9F16, low first
    assert torch.equal(got[:, 0], picked.contiguous().view(S32).flatten().long() & 0xFFFFFFFF)
    assert torch.equal(got[:, 1], ((x & (x >> 3)) | (x >> 5)))

    codes = words.view(torch.uint8).reshape(-1, 4)[:, :2].contiguous()
    halves = codes.view(E4M3).float()
    assert_same_floats(got[:, 2].to(S32).view(F16).reshape(-1, 2), halves.to(F16))

    value = words.view(F32)
    pair = torch.stack([value, -value], 1)
    saturated = pair.clamp(-448, 448).to(E4M3)
    assert_same_floats(got[:, 3].to(torch.int16).view(E4M3).reshape(-1, 2), saturated)
    assert_same_floats(got[:, 4].to(S32).view(BF16).reshape(-1, 2), pair.to(BF16))
    assert_same_floats(got[:, 5].to(S32).view(F16).reshape(-1, 2), pair.to(F16))


def assert_same_floats(got: torch.Tensor, expected: torch.Tensor) -> None:
    got, expected = got.float(), expected.float()
    is_same = (got.view(S32) == expected.view(S32)) | (got.isnan() & expected.isnan())
    assert is_same.all(), (got[~is_same][:4], expected[~is_same][:4])


def test_half_arithmetic_rounds_once() -> None:
    count = 4096
    generator = torch.Generator().manual_seed(9)
    patterns = torch.randint(0, 2**16, (count, 3), generator=generator).to(torch.int16)
    out = run_probe(
        "probe_half_arithmetic", patterns, count * 6, n=count, block=128, grid=count // 128
    )
    got = out.reshape(count, 6).to(torch.int16)
    for dtype, columns in ((F16, (0, 1, 2)), (BF16, (3, 4, 5))):
        a, b, c = patterns.view(dtype).double().unbind(1)
        # Round-to-odd in double is exact enough here: compare where double is exact.
        for column, exact in zip(columns, (a + b, a * b), strict=False):
            assert_same_floats(got[:, column].view(dtype), exact.to(dtype))
        fused = got[:, columns[2]].view(dtype).double()
        exact = a * b + c
        ok = fused.isfinite() & exact.isfinite()
        ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).smallest_normal)
        assert ((fused - exact).abs()[ok] <= ulp[ok] / 2 * (1 + 1e-9)).all()


# --- barriers, blocks, memory order --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_named_barriers_hand_over(seed: int) -> None:
    values = random_words(5 * 64)
    got = run_probe(
        "probe_named_barriers", values, 5 * 64, n=5, block=128, smem_bytes=256, seed=seed
    )
    assert torch.equal(got.reshape(5, 64), values.reshape(5, 64).flip(1))


def test_named_barrier_without_its_return_is_a_race() -> None:
    with pytest.raises(HostKernelError, match="shared memory race|barrier 1"):
        run_probe("probe_named_barriers", random_words(320), 320, n=-5, block=128, smem_bytes=256)


@pytest.mark.parametrize("seed", range(4))
def test_last_block_sums_the_parts(seed: int) -> None:
    values = random_words(7 * 64) % 1000
    got = run_probe("probe_last_block", values, 9, n=1, block=64, grid=7, seed=seed)
    assert got[1] == values.sum()


def test_missing_fence_before_the_counter_is_a_race() -> None:
    values = random_words(7 * 64) % 1000
    with pytest.raises(HostKernelError, match=r"global memory race.*no release and acquire"):
        run_probe("probe_last_block", values, 9, n=0, block=64, grid=7)


def test_lanes_need_syncwarp_to_exchange() -> None:
    values = random_words(32)
    got = run_probe("probe_warp_exchange", values, 32, n=1, smem_bytes=128)
    assert torch.equal(got, values.reshape(16, 2).flip(1).flatten())
    with pytest.raises(HostKernelError, match=r"shared memory race.*no __syncwarp"):
        run_probe("probe_warp_exchange", values, 32, n=0, smem_bytes=128)


# --- a whole kernel, and planted faults ----------------------------------------------------------


@functools.cache
def sample() -> HostModule:
    faults = re.findall(r"^  (k\w+),$", SAMPLE.read_text(), re.MULTILINE)
    return build(SAMPLE, {fault: f"sample_gemm<{fault}>" for fault in faults})


def run_sample(
    fault: str = "kNone",
    shape: tuple[int, int, int] = (64, 32, 128),
    num_splits: int = 1,
    machine: HostMachine | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the kernel's product and the float64 one."""
    rows, cols, depth = shape
    a = random_matrix(BF16, rows, depth, seed=1)
    b = random_matrix(BF16, cols, depth, seed=2)
    y = torch.zeros(rows, cols)
    grid = (-(-rows // 64), -(-cols // 32), num_splits)
    turns = torch.zeros(grid[0] * grid[1], dtype=S32)
    tensors = {"a": a, "b": b, "y": y, "turns": turns}
    sample().launch(
        fault,
        SampleParams(*(t.data_ptr() for t in tensors.values()), rows, cols, depth),
        grid=grid,
        block=(128,),
        smem_bytes=2 * 96 * 80,
        buffers=tensors,
        outputs={"y", "turns"},
        machine=machine,
    )
    return y, a.double() @ b.double().T


@pytest.mark.parametrize(
    ("shape", "num_splits"),
    [
        ((64, 32, 32), 1),
        ((100, 60, 512), 4),
        ((1, 1, 64), 2),
        ((65, 33, 96), 3),
        ((128, 128, 512), 1),
    ],
)
def test_sample_gemm(shape: tuple[int, int, int], num_splits: int) -> None:
    y, expected = run_sample(shape=shape, num_splits=num_splits)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_result_does_not_depend_on_the_order_of_blocks() -> None:
    results = [
        run_sample(shape=(100, 60, 512), num_splits=8, machine=HostMachine(seed=seed))[0]
        for seed in range(6)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_blocks_that_wait_need_room_for_those_they_wait_for() -> None:
    messages = []
    for seed in range(8):
        try:
            machine = HostMachine(seed=seed, max_resident=1)
            run_sample(shape=(64, 32, 256), num_splits=4, machine=machine)
        except HostKernelError as error:
            messages.append(str(error))
    assert any("cannot start (max_resident is 1)" in message for message in messages)


FAULTS = {
    "kMissingWait": r"unfinished cp.async: a read of 16 bytes at shared offset \d+",
    "kMissingBarrierAfterWait": r"uninitialised|unfinished cp.async|shared memory race",
    "kMissingBarrierBeforeOverwrite": r"shared memory race: a write of 16 bytes.*read by thread",
    "kGlobalOutOfBounds": r"out of bounds: writes 4 bytes .* nearest is 'y' \(8192 bytes\)",
    "kSharedOutOfBounds": r"out of bounds: a write of 4 bytes at shared offset 15360",
    "kMisalignedCopy": r"misaligned: cp.async of 16 bytes from 0x",
    "kReadsUninitialised": r"uninitialised: a read of 4 bytes at shared offset 64",
    "kWritesInput": r"writes 2 bytes at byte \d+ of 'a', which is an input",
    "kDivergentBarrier": r"barrier divergence: this thread is at barrier 0",
    "kBarrierInOneBranch": r"barrier divergence: this thread is at barrier 0",
    "kForgottenWarp": r"deadlock: 32 threads of block \(0,0,0\) warp 0 at barrier 1",
    "kDivergentWarp": r"warp divergence: this lane is at .* while lane \d+ is at",
    "kExitedLane": r"exits while lanes|have exited|deadlock",
    "kNullPointer": r"out of bounds: updates 4 bytes at \(nil\)",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(fault: str, seed: int) -> None:
    with pytest.raises(HostKernelError, match=FAULTS[fault]) as caught:
        run_sample(fault, machine=HostMachine(seed=seed))
    assert str(caught.value).startswith(f"kernel {fault}")
    assert re.search(r"host_sample_gemm.cuh:\d+", str(caught.value))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kRelaxedSemaphore", r"global memory race: reads 4 bytes at byte \d+ of 'y'"),
        ("kNeverReleased", r"deadlock, polled memory no longer changes: .* polling address"),
    ],
)
def test_fault_between_blocks_is_named(fault: str, message: str, seed: int) -> None:
    with pytest.raises(HostKernelError, match=message):
        run_sample(fault, shape=(64, 32, 256), num_splits=4, machine=HostMachine(seed=seed))


def test_wrong_lane_map_gives_a_wrong_product() -> None:
    y, expected = run_sample("kWrongLaneMap")
    assert (y.double() - expected).abs().max() > 1


def test_endless_loop_ends() -> None:
    with pytest.raises(HostKernelError, match=r"time limit of 0\.2 s"):
        run_sample("kEndlessLoop", machine=HostMachine(time_limit=0.2))


def test_machine_works_after_a_fault() -> None:
    with pytest.raises(HostKernelError):
        run_sample("kNullPointer")
    y, expected = run_sample()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


# --- launching -----------------------------------------------------------------------------------


def test_launch_refuses_what_a_gpu_would() -> None:
    y = torch.zeros(32, dtype=S32)
    params = Buffers(y.data_ptr(), y.data_ptr(), 0)
    common = {"buffers": {"y": y}, "outputs": {"y"}}
    with pytest.raises(HostKernelError, match="1 to 1024 threads"):
        probes().launch("probe_shuffles", params, grid=(1,), block=(2048,), **common)
    with pytest.raises(HostKernelError, match="no kernel named nothing"):
        probes().launch("nothing", params, grid=(1,), block=(32,), **common)
    with pytest.raises(HostKernelError, match=r"params struct of 24 bytes, got 8"):
        probes().launch("probe_shuffles", b"12345678", grid=(1,), block=(32,), **common)
    with pytest.raises(ValueError, match="not among the buffers"):
        probes().launch("probe_shuffles", params, grid=(1,), block=(32,), buffers={}, outputs={"y"})


def test_build_is_cached_and_follows_headers(tmp_path: Path) -> None:
    header = tmp_path / "answer.cuh"
    text = '#include "answer.cuh"\n__global__ void k(int* p) { *p = kAnswer; }'
    header.write_text("constexpr int kAnswer = 1;")
    first = build(text, {"k": "k"}, include_dirs=[tmp_path], cache_dir=tmp_path / "cache")
    again = build(text, {"k": "k"}, include_dirs=[tmp_path], cache_dir=tmp_path / "cache")
    assert first.path == again.path
    header.write_text("constexpr int kAnswer = 2;")
    changed = build(text, {"k": "k"}, include_dirs=[tmp_path], cache_dir=tmp_path / "cache")
    assert changed.path != first.path
    y = torch.zeros(1, dtype=S32)
    pointer = y.data_ptr().to_bytes(8, "little")
    changed.launch("k", pointer, grid=(1,), block=(1,), buffers={"y": y}, outputs={"y"})
    assert y.item() == 2


def test_compile_error_is_the_compilers(tmp_path: Path) -> None:
    with pytest.raises(HostCompileError, match="does_not_exist"):
        build("__global__ void k(int) { does_not_exist(); }", {"k": "k"}, cache_dir=tmp_path)
