# SPDX-License-Identifier: Apache-2.0
"""The emulator that runs CUDA kernels on a CPU: its instructions, and its verdict on faults."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from host_probes import (
    BF16,
    E4M3,
    F16,
    F32,
    S32,
    Buffers,
    probes,
    random_words,
    run_probe,
)

from vllm_nvfp4.testing.host_kernel import HostCompileError, HostKernelError, build

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
    for row, (infinity, one) in enumerate([(0x7C00, 0x3C00), (0x7F80, 0x3F80)]):
        for negative in (0, 0x8000):  # F16's, then BF16's
            word = torch.tensor([infinity | negative, one, one])
            patterns[2 * row + negative // 0x8000] = word.to(torch.int16)
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
        is_special = ~exact.isfinite()
        assert exact.isinf().any()
        assert_same_floats(fused[is_special], exact[is_special])
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


@pytest.mark.parametrize("seed", range(8))
def test_unordered_blocks_race_in_either_order(seed: int) -> None:
    with pytest.raises(HostKernelError, match=r"global memory race.*no release and acquire"):
        run_probe("probe_unordered_blocks", random_words(1), 2, grid=2, seed=seed)


def test_lanes_need_syncwarp_to_exchange() -> None:
    values = random_words(32)
    got = run_probe("probe_warp_exchange", values, 32, n=1, smem_bytes=128)
    assert torch.equal(got, values.reshape(16, 2).flip(1).flatten())
    with pytest.raises(HostKernelError, match=r"shared memory race.*no __syncwarp"):
        run_probe("probe_warp_exchange", values, 32, n=0, smem_bytes=128)


def test_shared_counter_has_to_be_started() -> None:
    values = random_words(1)
    got = run_probe("probe_shared_counter", values, 128, n=10, block=128, smem_bytes=4)
    assert (got == 14).all()
    with pytest.raises(HostKernelError, match="uninitialised: an update of 4 bytes"):
        run_probe("probe_shared_counter", values, 128, n=0, block=128, smem_bytes=4)


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


def test_only_the_module_that_ran_last_keeps_stacks() -> None:
    """A process has 65,530 mappings; a block of 1,024 threads has two for each."""
    y = torch.zeros(1, dtype=S32)
    pointer = y.data_ptr().to_bytes(8, "little")
    counts = []
    for number in range(3):
        text = f"__global__ void k(int* p) {{ if (threadIdx.x == 0) *p = {number}; }}"
        module = build(text, {"k": "k"})
        for size in (1024, 32, 1024):
            module.launch("k", pointer, grid=(1,), block=(size,), buffers={"y": y}, outputs={"y"})
        assert y.item() == number
        counts.append(len(Path("/proc/self/maps").read_text().splitlines()))
    assert max(counts) - counts[0] < 256


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


def test_static_shared_array_in_a_template_is_refused() -> None:
    text = """
template <int kCount>
__global__ void k(int* p) {
  __shared__ int values[kCount];
  values[threadIdx.x] = 1;
  __syncthreads();
  p[threadIdx.x] = values[kCount - 1 - threadIdx.x];
}
"""
    y = torch.zeros(32, dtype=S32)
    pointer = y.data_ptr().to_bytes(8, "little")
    module = build(text, {"k": "k<32>"})
    with pytest.raises(HostKernelError, match=r"use ptx::dynamic_smem\(\) there \[kernel:5 in"):
        module.launch("k", pointer, grid=(1,), block=(32,), buffers={"y": y}, outputs={"y"})
