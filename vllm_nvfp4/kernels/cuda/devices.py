# SPDX-License-Identifier: Apache-2.0
"""What is loaded on each GPU: its figures, the kernels, the semaphores; and how to launch.

:func:`prepare` loads while weights load. A launch compiles and loads nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import struct
import threading
from collections.abc import Sequence

import torch

from vllm_nvfp4.gpus import Gpu, estimate_gpu, find_gpu, short_name
from vllm_nvfp4.kernels.cuda import cubins, dispatch, variants
from vllm_nvfp4.kernels.cuda.configs import QUANTIZE_CONFIGS
from vllm_nvfp4.kernels.cuda.dispatch import Choice
from vllm_nvfp4.kernels.cuda.driver import Driver, Function, driver
from vllm_nvfp4.kernels.cuda.nvrtc import KernelSource
from vllm_nvfp4.options import is_batch_invariant

# Under vLLM's logger, so that its handlers print it.
logger = logging.getLogger(f"vllm.{__name__}")

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
QUANTIZERS = {c.dtype: c for c in QUANTIZE_CONFIGS if c.stem == "quantize_a8"}
INT8_QUANTIZERS = {c.dtype: c for c in QUANTIZE_CONFIGS if c.stem == "quantize_i8"}
# Streams that get semaphores of their own; the next one takes the first one's again.
_SEMAPHORE_SETS = 64
_SET_BYTES = 4 * dispatch.MAX_SPLIT_TILES
SEMAPHORE_BYTES = _SEMAPHORE_SETS * _SET_BYTES
_MAX_CHOICES = 65536


class Device:
    """What is loaded on one GPU.

    gpu: its figures, with the SM count that this process sees
    semaphores: address of ``SEMAPHORE_BYTES`` zeros on it, outside of torch's memory
    """

    def __init__(self, gpu: Gpu, driver: Driver, semaphores: int) -> None:
        self.gpu = gpu
        self._driver = driver
        self._functions: dict[str, Function] = {}
        # By identity of the configuration: its symbol is a property that takes 1 us to spell.
        self._functions_by_id: dict[int, tuple[KernelSource, Function]] = {}
        self._lock = threading.Lock()
        self._semaphores = semaphores
        self._semaphores_of_stream: dict[int, int] = {}  # address of each stream's set
        self._choices: dict[tuple[int, int, int, str, str, str], Choice] = {}
        self._variant = "exact"

    def load(self, wanted: Sequence[KernelSource]) -> None:
        """Load kernels that are not loaded yet; the device's context must be current."""
        with self._lock:
            missing = [config for config in wanted if config.symbol not in self._functions]
            images = cubins.prepare(missing, self.gpu.arch)
            for config in missing:
                self._functions[config.symbol] = self._driver.load(
                    images[config.symbol], config.symbol, config.threads, config.smem_bytes
                )

    def choose(self, m: int, n: int, k: int, fmt_name: str, dtype: str, activation: str) -> Choice:
        """:func:`dispatch.choose` for this GPU, or ``choose_invariant``; remembered."""
        key = (m, n, k, fmt_name, dtype, activation)
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= _MAX_CHOICES:
                self._choices.clear()
            choose = dispatch.choose_invariant if is_batch_invariant() else dispatch.choose
            choice = self._choices[key] = choose(self.gpu, *key, self._variant)
        return choice

    @property
    def figures(self) -> tuple[Gpu, str]:
        """What :mod:`dispatch` chooses by: the GPU and the variant of the 8-bit kernel."""
        return self.gpu, self._variant

    def use_variant(self, variant: str) -> None:
        """Take this variant of the 8-bit kernel from now on, "auto" as this GPU has it."""
        self._variant = dispatch.resolve_variant(self.gpu, variant)
        self._choices.clear()

    @property
    def launched(self) -> set[str]:
        """Symbols of the kernels that were launched at least once."""
        return {config.symbol for config, _ in self._functions_by_id.values()}

    def launch(
        self,
        config: KernelSource,
        grid: tuple[int, int, int],
        stream: int,
        layout: struct.Struct,
        params: tuple[int | float, ...],
    ) -> None:
        """Launch a loaded kernel; arguments as in ``Driver.launch``."""
        found = self._functions_by_id.get(id(config)) or self._find(config)
        self._driver.launch(found[1], grid, stream, layout, params)

    def _find(self, config: KernelSource) -> tuple[KernelSource, Function]:
        function = self._functions.get(config.symbol)
        if function is None:
            raise RuntimeError(
                f"{config.symbol} is not loaded on {self.gpu.name}: kernels are loaded while "
                "weights load, never at a launch. Call vllm_nvfp4.kernels.cuda.linear.prepare("
                "device, format, dtypes) with the dtype of the activations first"
            )
        found = self._functions_by_id[id(config)] = (config, function)
        return found

    def semaphores(self, stream: int) -> int:
        """The address of a stream's semaphores: zeros before and after every launch."""
        address = self._semaphores_of_stream.get(stream)
        if address is None:
            with self._lock:
                index = len(self._semaphores_of_stream) % _SEMAPHORE_SETS
                address = self._semaphores + index * _SET_BYTES
                address = self._semaphores_of_stream.setdefault(stream, address)
        return address

    def used_semaphores(self) -> int:
        """How many bytes of the semaphores are not zero: 0 where no launch is under way and every
        one ended as it must. Waits for the GPU; for checks."""
        content = self._driver.read(self._semaphores, SEMAPHORE_BYTES)
        return SEMAPHORE_BYTES - content.count(0)


_devices: dict[int, Device] = {}
_devices_lock = threading.Lock()


_variant = "exact"


def use_variant(variant: str) -> None:
    """Choose the variant of the 8-bit kernel, one of ``variants.VARIANTS``, before weights load."""
    global _variant
    variants.check_variant(variant)
    with _devices_lock:
        _variant = variant
        for device in _devices.values():
            device.use_variant(variant)


def prepare(
    device: torch.device, fmt_name: str, dtypes: tuple[torch.dtype, ...] | None = None
) -> Device:
    """Load every kernel that a weight of this format can need on a device.

    dtypes: of the activations; default: torch's default dtype while a model loads in bf16 or
            fp16, else both
    """
    if dtypes is None:
        default = torch.get_default_dtype()
        dtypes = (default,) if default in DTYPE_NAMES else tuple(DTYPE_NAMES)
    if _variant != "auto" and variants.variant_of(fmt_name, _variant) != _variant:
        _say_variant(fmt_name, _variant)
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        with _devices_lock:
            loaded = _devices.get(index)
            if loaded is None:
                loaded = _devices[index] = _open_device(index)
                loaded.use_variant(_variant)
        loaded.load(wanted_kernels(loaded.gpu.arch, fmt_name, dtypes, loaded.figures[1]))
    return loaded


@functools.cache
def _say_variant(fmt_name: str, variant: str) -> None:
    logger.info(
        "vllm-nvfp4: a8_variant=%s: %s runs the %s kernel, as its scales leave FP8's range",
        variant, fmt_name.upper(), variants.variant_of(fmt_name, variant),
    )  # fmt: skip


def wanted_kernels(
    arch: int, fmt_name: str, dtypes: tuple[torch.dtype, ...], variant: str = "exact"
) -> list[KernelSource]:
    """Everything that a weight of this format can need on an architecture."""
    wanted: list[KernelSource] = []
    for dtype in dtypes:
        name = DTYPE_NAMES[dtype]
        wanted += dispatch.reachable(fmt_name, name, 16)
        wanted += dispatch.reachable(fmt_name, name, 8, variant)
        # FP8's in any case: of FP8 layers and of experts.
        wanted.append(QUANTIZERS[name])
        if variant == "int8":
            wanted.append(INT8_QUANTIZERS[name])
    return [config for config in wanted if arch >= config.min_arch]


def figures_of(index: int) -> Gpu:
    """The figures of a GPU of this machine."""
    if (loaded := _devices.get(index)) is not None:
        return loaded.gpu
    properties = torch.cuda.get_device_properties(index)
    return describe(properties.name, properties.total_memory, driver().device_attributes(index))


def _open_device(index: int) -> Device:
    # An allocation makes the primary context current, which the driver's calls need.
    torch.empty(1, device=f"cuda:{index}")
    properties = torch.cuda.get_device_properties(index)
    found = driver().device_attributes(index)
    semaphores = driver().zeros(SEMAPHORE_BYTES)
    torch.cuda.synchronize(index)
    return Device(describe(properties.name, properties.total_memory, found), driver(), semaphores)


def describe(name: str, memory_bytes: int, attributes: dict[str, int]) -> Gpu:
    """The figures of a device: the table's, else estimated from what the driver says.

    attributes: of ``Driver.device_attributes``
    """
    arch = attributes["arch_major"] * 10 + attributes["arch_minor"]
    known = find_gpu(short_name(name))
    if known is not None and known.arch == arch:
        return dataclasses.replace(known, num_sms=attributes["num_sms"])
    # Two transfers per clock and bit: double data rate.
    dram_gbps = 2 * attributes["memory_clock_khz"] * attributes["memory_bus_bits"] / 8 / 1e6
    gpu = estimate_gpu(
        name, arch, attributes["num_sms"], attributes["clock_khz"] / 1e6, dram_gbps,
        memory_bytes / 1e9,
    )  # fmt: skip
    logger.info("%s is not in the table of GPUs; dispatch uses estimates: %s", name, gpu)
    return gpu


def loaded_device(index: int, fmt_name: str) -> Device:
    """The device that :func:`prepare` has opened."""
    device = _devices.get(index)
    if device is None:
        raise RuntimeError(
            f"no kernels are loaded on cuda:{index}: the weight was packed for another device. "
            "Call vllm_nvfp4.kernels.cuda.linear.prepare("
            f"torch.device('cuda:{index}'), {fmt_name!r})"
        )
    return device


@functools.cache
def _raw_stream_getter():
    # What torch's own compiled code calls; torch.cuda.current_stream() builds an object each time.
    getter = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return getter or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def current_stream(device_idx: int) -> int:
    """torch's current stream on a device, as a CUstream."""
    return _raw_stream_getter()(device_idx)
