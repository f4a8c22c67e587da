# SPDX-License-Identifier: Apache-2.0
"""The emulator that runs CUDA kernels on a CPU: its instructions, and its verdict on faults."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import pytest
import torch
from host_probes import (
    BF16,
    E4M3,
    F16,
    F32,
    S32,
    SOURCES,
    Buffers,
    probes,
    random_matrix,
    random_words,
    run_probe,
)

from vllm_nvfp4.testing.host_kernel import (
    HostCompileError,
    HostKernelError,
    HostMachine,
    HostModule,
    build,
)

SAMPLE = SOURCES / "host_sample_gemm.cuh"


class SampleParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "y", "turns")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "depth")),
    )


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
    with pytest.raises(HostKernelError, match=r"shared memory race|barrier 1"):
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
    "kNonCoherentLoad": r"non-coherent: ld.global.nc of 4 bytes at byte \d+ of 'y'",
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
    with pytest.raises(HostKernelError, match="2048 threads in a block: a block has 1 to 1024"):
        probes().launch("probe_shuffles", params, grid=(1,), block=(2048,), **common)
    with pytest.raises(HostKernelError, match="no kernel named nothing"):
        probes().launch("nothing", params, grid=(1,), block=(32,), **common)
    with pytest.raises(HostKernelError, match=r"params struct of 24 bytes, got 8"):
        probes().launch("probe_shuffles", b"12345678", grid=(1,), block=(32,), **common)
    with pytest.raises(HostKernelError, match=r"101377 bytes of dynamic and \d+ of static"):
        probes().launch(
            "probe_shuffles", params, grid=(1,), block=(32,), smem_bytes=101377, **common
        )
    with pytest.raises(ValueError, match="not among the buffers"):
        probes().launch("probe_shuffles", params, grid=(1,), block=(32,), buffers={}, outputs={"y"})


def test_build_is_cached_and_follows_headers(tmp_path: Path) -> None:
    header = tmp_path / "answer.cuh"
    text = """
#include "answer.cuh"
__global__ void k(int* p) {
  const int last = __shfl_sync(~0u, threadIdx.x, 31);
  if (threadIdx.x == 0) *p = last * kAnswer;
}
"""
    header.write_text("constexpr int kAnswer = 1;")
    # In a cache of its own, so that the emulator is compiled too: with the portable fibers.
    compile_again = functools.partial(
        build,
        text,
        {"k": "k"},
        include_dirs=[tmp_path],
        runtime_flags=["-DVNVFP4_HOST_UCONTEXT"],
        cache_dir=tmp_path / "cache",
    )
    first = compile_again()
    assert compile_again().path == first.path
    header.write_text("constexpr int kAnswer = 2;")
    changed = compile_again()
    assert changed.path != first.path
    y = torch.zeros(1, dtype=S32)
    pointer = y.data_ptr().to_bytes(8, "little")
    changed.launch("k", pointer, grid=(1,), block=(32,), buffers={"y": y}, outputs={"y"})
    assert y.item() == 62


def test_compile_error_is_the_compilers() -> None:
    with pytest.raises(HostCompileError, match="does_not_exist"):
        build("__global__ void k(int) { does_not_exist(); }", {"k": "k"})


def test_buffers_that_overlap_are_refused() -> None:
    y = torch.zeros(32, dtype=S32)
    with pytest.raises(ValueError, match="buffers 'y' and 'tail' share memory"):
        probes().launch(
            "probe_shuffles",
            Buffers(y.data_ptr(), y.data_ptr(), 0),
            grid=(1,),
            block=(32,),
            buffers={"y": y, "tail": y[8:]},
            outputs={"y"},
        )
