# SPDX-License-Identifier: Apache-2.0
"""A small GEMM on the emulator: right without a fault, and each planted fault named."""

from __future__ import annotations

import ctypes
import functools
import re

import pytest
import torch
from host_probes import BF16, S32, SOURCES, random_matrix

from vllm_nvfp4.testing.host_kernel import HostKernelError, HostMachine, HostModule, build

SAMPLE = SOURCES / "host_sample_gemm.cuh"


class SampleParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "y", "turns")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "depth")),
    )


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
    "kMisalignedEmptyCopy": r"misaligned: cp.async of 16 bytes from 0x",
    "kReadsUninitialised": r"uninitialised: a read of 4 bytes at shared offset 64",
    "kWritesInput": r"writes 2 bytes at byte \d+ of 'a', which is an input",
    "kNonCoherentLoad": r"non-coherent: ld.global.nc of 4 bytes at byte \d+ of 'y'",
    "kMisalignedVector": r"misaligned: address 0x\w+4 where the type needs a multiple of 16",
    "kArrayIndex": r"out of bounds: index 129 of an array",
    "kUndefinedShift": r"undefined shift: by 159 bits",
    "kDivergentBarrier": r"barrier divergence: this thread is at barrier 0",
    "kBarrierInOneBranch": r"barrier divergence: this thread is at barrier 0",
    "kForgottenWarp": r"deadlock: 32 threads of block \(0,0,0\) warp 0 at barrier 1",
    "kDivergentWarp": r"warp divergence: this lane is at .* while lane \d+ is at",
    "kExitedLane": r"exits while lanes|have exited|deadlock",
    "kNullPointer": r"out of bounds: reads 4 bytes at \(nil\)",
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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kDivisionByZero", "integer division by zero"),
        ("kStackOverflow", "stack overflow: the thread's local variables need more than 131072"),
    ],
)
def test_crash_is_named(fault: str, message: str) -> None:
    with pytest.raises(HostKernelError, match=rf"kernel {fault}, block \(0,0,0\).*{message}"):
        run_sample(fault)


@pytest.mark.parametrize("fault", ["kWrongLaneMap", "kUninitialisedLocal"])
def test_silent_fault_gives_a_wrong_product(fault: str) -> None:
    y, expected = run_sample(fault)
    assert (y.double() - expected).abs().max() > 1


def test_endless_loop_ends() -> None:
    with pytest.raises(HostKernelError, match=r"time limit of 0\.2 s"):
        run_sample("kEndlessLoop", machine=HostMachine(time_limit=0.2))


def test_machine_works_after_a_fault() -> None:
    with pytest.raises(HostKernelError):
        run_sample("kNullPointer")
    y, expected = run_sample()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
