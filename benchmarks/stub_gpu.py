# SPDX-License-Identifier: Apache-2.0
"""An RTX 4090 that runs nothing: the launch path of the CUDA backend, timed without a GPU.

libcuda is tests/support/stub_cuda_driver.c, which records a launch and returns, and tensors are the
CPU's. Left out are therefore the driver's own time for a launch, about 2 us, and what torch's CUDA
allocator takes over its CPU one.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch
from common import ROOT

from vllm_nvfp4.gpus import find_gpu
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.kernels.cuda import cubins, devices, nvrtc
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.devices import SEMAPHORE_BYTES, Device
from vllm_nvfp4.kernels.cuda.driver import Driver

_STREAM, _CONTEXT = 0x57, 0xC0


def install() -> None:
    """Make ``kernels.cuda`` the backend of CPU tensors, on the stub, for this process."""
    library = _compile_stub()
    stub = ctypes.CDLL(library)
    stub.stub_set_context.argtypes = [ctypes.c_size_t]
    stub.stub_set_context(_CONTEXT)
    gpu = find_gpu("RTX 4090")
    if gpu is None:
        raise RuntimeError("gpus.py has no RTX 4090")
    driver = Driver(library)
    cubins.prepare = lambda wanted, arch: {c.symbol: b"\x7fELF" for c in wanted}
    # Opened, with nothing loaded: the program calls prepare, as it does on a GPU.
    opened = Device(gpu, driver, driver.zeros(SEMAPHORE_BYTES))
    devices._devices[None] = opened  # type: ignore[index]  # the index of a CPU tensor's device
    torch.cuda.device = lambda index: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value]
    cuda.current_stream = lambda index: _STREAM
    ops.backend = lambda device_type: cuda  # type: ignore[assignment]


def _compile_stub() -> str:
    library = Path(tempfile.mkdtemp()) / "libcuda_stub.so"
    headers = [f"-I{folder}" for folder in nvrtc.toolkit_headers()]
    source = ROOT / "tests/support/stub_cuda_driver.c"
    command = ["gcc", "-O2", "-shared", "-fPIC", *headers, "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return str(library)
