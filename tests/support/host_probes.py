# SPDX-License-Identifier: Apache-2.0
"""The probe kernels of tests/support/csrc/host_probes.cuh, compiled, and what their tests share."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import torch

from vllm_nvfp4.testing.host_kernel import HostMachine, HostModule, build

SOURCES = Path(__file__).parent / "csrc"
PROBES = SOURCES / "host_probes.cuh"

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, S8, S32 = torch.float8_e4m3fn, torch.int8, torch.int32


class MmaParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "abcd"),
        ("num_steps", ctypes.c_int),
        ("is_chained", ctypes.c_int),
    )


class Buffers(ctypes.Structure):
    _fields_ = (("input", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_int))


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


def random_matrix(dtype: torch.dtype, *shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in (S8, S32):
        return torch.randint(-128, 128, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)
