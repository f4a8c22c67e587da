# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver API, as little of it as a launch needs, through ctypes.

Why not cuda.bindings: one launch costs 1 to 2 us here, since all arguments are packed into two
buffers that stay allocated, and ``cuLaunchKernelEx`` takes four pointers to them. Nothing is loaded
before :func:`driver` is called, and importing this file touches no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

# CUfunction_attribute and CUdevice_attribute values used here (cuda.h).
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_DEVICE_ATTRIBUTES = {
    "num_sms": 16,
    "clock_khz": 13,
    "memory_clock_khz": 36,
    "memory_bus_bits": 37,
    "l2_bytes": 38,
    "arch_major": 75,
    "arch_minor": 76,
}
_INVALID_CONTEXT = 201
# The kernels' machine code is of CUDA 13, which this driver and newer ones load.
OLDEST_CUDA, OLDEST_DRIVER = 13000, 580

# CUlaunchConfig: grid, block, dynamic shared memory, stream, attributes, number of attributes.
_LAUNCH_CONFIG = struct.Struct("7I4xQQI4x")
# The "extra" array of cuLaunchKernel: {1 (buffer), pointer, 2 (size), pointer to size, 0 (end)}.
_EXTRA_BUFFER, _EXTRA_SIZE = 1, 2
_MAX_PARAM_BYTES = 512


class DriverError(RuntimeError):
    """A driver call failed: which one, the driver's name for the error, and for what."""


@dataclass(frozen=True)
class Function:
    """A loaded kernel. handle: CUfunction; context: the CUcontext it was loaded in."""

    symbol: str
    handle: int
    context: int
    threads: int
    smem_bytes: int


@dataclass
class _Buffers:
    """One thread's launch arguments. The driver copies them before the call returns."""

    params: ctypes.Array = field(
        default_factory=lambda: (ctypes.c_uint64 * (_MAX_PARAM_BYTES // 8))()
    )
    config: ctypes.Array = field(
        default_factory=lambda: (ctypes.c_uint64 * (_LAUNCH_CONFIG.size // 8))()
    )
    size: ctypes.c_size_t = field(default_factory=ctypes.c_size_t)
    layout: struct.Struct | None = None  # whose size that is
    extra: ctypes.Array = field(default_factory=lambda: (ctypes.c_void_p * 5)())

    def __post_init__(self) -> None:
        self.extra[0] = _EXTRA_BUFFER
        self.extra[1] = ctypes.addressof(self.params)
        self.extra[2] = _EXTRA_SIZE
        self.extra[3] = ctypes.addressof(self.size)
        self.config_address = ctypes.addressof(self.config)
        self.extra_address = ctypes.addressof(self.extra)


class Driver:
    """A loaded libcuda.

    library: its path, or an object with its functions
    Raises DriverError where there is none, or one too old for the kernels' machine code.
    """

    def __init__(self, library: Any = "libcuda.so.1") -> None:
        self._lib = _open(library)
        _refuse_old(self._lib)
        self._launch = self._lib.cuLaunchKernelEx
        self._launch.argtypes = [ctypes.c_void_p] * 4
        self._local = threading.local()
        self._check(self._lib.cuInit(0), "cuInit", "")

    def zeros(self, num_bytes: int) -> int:
        """The address of zeros in memory of the current context, for the life of the process.

        It lies outside of torch's allocators: vLLM takes the memory of a model's tensors away
        when it sleeps, and gives it back with other content.
        """
        address, size = ctypes.c_uint64(), ctypes.c_size_t(num_bytes)
        self._check(
            self._lib.cuMemAlloc_v2(ctypes.byref(address), size), "cuMemAlloc", f"{num_bytes} B"
        )
        self._check(
            self._lib.cuMemsetD8_v2(address, ctypes.c_ubyte(0), size), "cuMemsetD8", num_bytes
        )
        return address.value

    def read(self, address: int, num_bytes: int) -> bytes:
        """What lies there, after all that was launched before; for checks."""
        content = ctypes.create_string_buffer(num_bytes)
        status = self._lib.cuMemcpyDtoH_v2(
            content, ctypes.c_uint64(address), ctypes.c_size_t(num_bytes)
        )
        self._check(status, "cuMemcpyDtoH", f"{num_bytes} B")
        return content.raw

    def device_attributes(self, device_idx: int) -> dict[str, int]:
        """What the driver says of a device: the keys of ``_DEVICE_ATTRIBUTES``."""
        handle = ctypes.c_int()
        self._check(
            self._lib.cuDeviceGet(ctypes.byref(handle), device_idx), "cuDeviceGet", device_idx
        )
        found = {}
        for name, attribute in _DEVICE_ATTRIBUTES.items():
            value = ctypes.c_int()
            status = self._lib.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
            self._check(status, "cuDeviceGetAttribute", name)
            found[name] = value.value
        return found

    def load(self, image: bytes, symbol: str, threads: int, smem_bytes: int) -> Function:
        """Load a cubin into the current context, and allow the kernel its dynamic shared memory.

        The caller makes the device's primary context current first (torch does, when it allocates).
        """
        context, module, function = (ctypes.c_void_p() for _ in range(3))
        lib, byref = self._lib, ctypes.byref
        self._check(lib.cuCtxGetCurrent(byref(context)), "cuCtxGetCurrent", symbol)
        if not context.value:
            raise DriverError(f"{symbol}: no CUDA context is current; allocate on the device first")
        self._check(
            lib.cuModuleLoadData(byref(module), ctypes.c_char_p(image)), "cuModuleLoadData", symbol
        )
        status = lib.cuModuleGetFunction(byref(function), module, symbol.encode())
        self._check(status, "cuModuleGetFunction", symbol)
        if smem_bytes > 0:
            status = lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes)
            self._check(status, "cuFuncSetAttribute", f"{symbol}, {smem_bytes} B shared memory")
        return Function(symbol, function.value or 0, context.value, threads, smem_bytes)

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        stream: int,
        layout: struct.Struct,
        params: tuple[int | float, ...],
    ) -> None:
        """Launch on a stream.

        stream: CUstream as an integer (torch's ``cuda_stream``)
        layout: the kernel's parameters in C order and natural alignment (native mode, "@")
        params: their values; pointers as integers
        """
        try:
            buffers = self._local.buffers
        except AttributeError:
            buffers = self._local.buffers = _Buffers()
        layout.pack_into(buffers.params, 0, *params)
        if buffers.layout is not layout:
            buffers.layout, buffers.size.value = layout, layout.size
        _LAUNCH_CONFIG.pack_into(
            buffers.config, 0, *grid, function.threads, 1, 1, function.smem_bytes, stream, 0, 0
        )
        status = self._launch(buffers.config_address, function.handle, None, buffers.extra_address)
        if status == _INVALID_CONTEXT:
            # A thread that has not used the CUDA runtime yet has no context.
            self._check(
                self._lib.cuCtxSetCurrent(ctypes.c_void_p(function.context)),
                "cuCtxSetCurrent",
                function.symbol,
            )
            status = self._launch(
                buffers.config_address, function.handle, None, buffers.extra_address
            )
        if status:
            self._check(status, "cuLaunchKernelEx", f"{function.symbol}, grid {grid}")

    def _check(self, status: int, call: str, what: object) -> None:
        if status:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorName(status, ctypes.byref(text))
            name = text.value.decode() if text.value else "unknown error"
            raise DriverError(f"{call} failed with {name} ({status}): {what}")


def _open(library: Any) -> Any:
    if not isinstance(library, str):
        return library
    try:
        return ctypes.CDLL(library)
    except OSError as error:
        raise DriverError(
            f"no NVIDIA driver: {library} could not be loaded ({error}). "
            "Install the driver, or in a container pass the GPU through (--gpus all)"
        ) from error


def cuda_version(library: str = "libcuda.so.1") -> str:
    """The newest CUDA that the driver knows, as "13.0"; CUDA is not initialised.

    Raises DriverError where there is no driver, or one too old for the kernels' machine code.
    """
    found = _refuse_old(_open(library))
    return _spelt(found)


def _refuse_old(lib: Any) -> int:
    version = ctypes.c_int()
    status = lib.cuDriverGetVersion(ctypes.byref(version))
    if status:
        raise DriverError(f"cuDriverGetVersion failed with status {status}")
    if version.value < OLDEST_CUDA:
        raise DriverError(
            f"NVIDIA driver: found one for CUDA {_spelt(version.value)}; needed CUDA "
            f"{_spelt(OLDEST_CUDA)}, which the kernels are compiled for. Install driver "
            f"{OLDEST_DRIVER} or newer (in a container: on the host)"
        )
    return version.value


def _spelt(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def driver() -> Driver:
    """The process's driver, loaded on first use."""
    return Driver()
