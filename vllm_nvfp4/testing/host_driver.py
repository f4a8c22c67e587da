# SPDX-License-Identifier: Apache-2.0
"""libcuda as far as driver.py calls it, over the emulated GPU: what is loaded here can be launched,
and a launch runs to its end before it returns."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from vllm_nvfp4.kernels.cuda.configs import ALL_CONFIGS
from vllm_nvfp4.kernels.cuda.moe_configs import ALL_MOE_CONFIGS, MOE_CONFIGS
from vllm_nvfp4.testing import host_gemm, host_moe

if TYPE_CHECKING:
    from vllm_nvfp4.testing.emulated_gpu import EmulatedGpu

CONFIGS: dict[str, Any] = {c.symbol: c for c in (*ALL_CONFIGS, *ALL_MOE_CONFIGS)}
# cuda.h's; the statuses' names are asked of cuGetErrorName.
_NOT_FOUND, _INVALID_IMAGE, _INVALID_VALUE, _INVALID_DEVICE = 500, 200, 1, 101
_NAMES = {500: b"CUDA_ERROR_NOT_FOUND", 200: b"CUDA_ERROR_INVALID_IMAGE",
          1: b"CUDA_ERROR_INVALID_VALUE", 101: b"CUDA_ERROR_INVALID_DEVICE"}  # fmt: skip
_IMAGE = b"\x7fELF for the emulated GPU: "
_CONTEXT = 0xC0
_LAUNCH_CONFIG = struct.Struct("7I4xQQI4x")
_VERSION = 13000
_ATTRIBUTES = {16: "num_sms", 75: "major", 76: "minor"}


@contextlib.contextmanager
def untracked() -> Iterator[None]:
    """Within it a tensor is what it is: memory of this machine."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def image_of(symbol: str) -> bytes:
    """What stands for a kernel's machine code."""
    return _IMAGE + symbol.encode()


def emulate(symbol: str, grid: tuple[int, ...], raw: bytes, tensors: list[torch.Tensor]) -> None:
    """Run one launch of a shipped kernel.

    raw:     its parameters, as the GPU gets them
    tensors: memory that an address among them may lie in; each its own piece
    """
    config = CONFIGS[symbol]
    words = struct.unpack(f"{len(raw) // 8}Q", raw[: len(raw) // 8 * 8])
    buffers = {}
    for tensor in tensors:
        begin = tensor.data_ptr()
        if any(begin <= word < begin + tensor.numel() for word in words):
            buffers[f"at {begin:x}"] = tensor
    if config in ALL_MOE_CONFIGS:
        module = host_moe.shipped(config.stem, getattr(config, "fmt_name", ""))
    else:
        module = host_gemm.shipped(config)
    module.launch(
        symbol,
        raw,
        # As many blocks as there are tiles at the most: three of them show what many would.
        grid=(min(grid[0], 3), 1, 1) if config in MOE_CONFIGS else grid,
        block=(config.threads, 1, 1),
        smem_bytes=config.smem_bytes,
        buffers=buffers,
        outputs=set(buffers),
    )


class HostLibcuda:
    """The functions of libcuda that :class:`~vllm_nvfp4.kernels.cuda.driver.Driver` calls."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        self.gpu = gpu
        self.cuLaunchKernelEx = functools.partial(self._launch)  # takes attributes, as ctypes' do
        self._modules: list[str] = []
        self._functions: dict[int, str] = {}
        self._memory: dict[int, torch.Tensor] = {}

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = _VERSION
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = _NAMES.get(status, b"CUDA_ERROR_UNKNOWN")
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0 if ordinal == 0 else _INVALID_DEVICE

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        gpu = self.gpu.gpu
        figures = {"num_sms": gpu.num_sms, "major": gpu.arch // 10, "minor": gpu.arch % 10}
        # Clocks and bus: the table of cards has what follows from them.
        value._obj.value = figures.get(_ATTRIBUTES.get(attribute, ""), 0)
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = _CONTEXT
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuModuleLoadData(self, module: Any, image: Any) -> int:
        if not image.value.startswith(_IMAGE):
            return _INVALID_IMAGE
        self._modules.append(image.value.removeprefix(_IMAGE).decode())
        module._obj.value = len(self._modules)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        if self._modules[module.value - 1] != name.decode():
            return _NOT_FOUND
        function._obj.value = 0x1000 + module.value
        self._functions[0x1000 + module.value] = name.decode()
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        symbol = self._functions[function.value]
        return 0 if value == CONFIGS[symbol].smem_bytes else _INVALID_VALUE

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        with untracked():
            memory = torch.full((size.value,), 0xA5, dtype=torch.uint8)
            self._memory[memory.data_ptr()] = memory
            address._obj.value = memory.data_ptr()
        return 0

    def cuMemsetD8_v2(self, address: Any, value: Any, size: Any) -> int:
        self._memory[address.value][: size.value] = value.value
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, address: Any, size: Any) -> int:
        ctypes.memmove(target, address.value, size.value)
        return 0

    def _launch(self, config: int, handle: int, params: None, extra: int) -> int:
        words = (ctypes.c_uint64 * 5).from_address(extra)
        size = ctypes.c_size_t.from_address(words[3]).value
        raw = ctypes.string_at(words[1], size)
        header = _LAUNCH_CONFIG.unpack(ctypes.string_at(config, _LAUNCH_CONFIG.size))
        symbol, grid = self._functions[handle], tuple(header[:3])
        shipped = CONFIGS[symbol]
        if header[3] != shipped.threads or header[6] != shipped.smem_bytes:
            return _INVALID_VALUE
        if self.gpu.capture is not None:
            self.gpu.capture.append(lambda: self._run(symbol, grid, raw))
        else:
            self._run(symbol, grid, raw)
        return 0

    def _run(self, symbol: str, grid: tuple[int, ...], raw: bytes) -> None:
        self.gpu.launches.append((symbol, grid))
        with untracked():
            emulate(symbol, grid, raw, [*self.gpu.buffers(), *self._memory.values()])
