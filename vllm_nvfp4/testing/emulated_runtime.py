# SPDX-License-Identifier: Apache-2.0
"""torch.cuda over the emulated GPU: devices, streams, events, graphs and generators."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from vllm_nvfp4.testing.emulated_gpu import EmulatedGpu

# Of the emulated card: little, so that a program that fills a part of it stays quick.
MEMORY_BYTES = 256 << 20
_L2_BYTES = 1024


class _Stream:
    """A stream: every launch has ended when it returns, so that there is nothing to wait for."""

    _last = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _Stream._last += 1
        self.cuda_stream = _Stream._last

    def wait_stream(self, other: Any) -> None:
        pass

    synchronize = wait_event = record_event = lambda self, *args: None


class _Event:
    def __init__(self, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end.seconds - self.seconds) * 1e3

    def synchronize(self) -> None:
        pass


class _Graph:
    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.memory: list[Any] = []

    def replay(self) -> None:
        for step in self.steps:
            step()


def _generator_class() -> type:
    base: Any = torch.Generator

    class Generator(base):
        """One that says it is of the GPU, as it was asked to be."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu")

        def __init__(self, device: Any = "cpu") -> None:
            self.place = torch.device(device)

        @property
        def device(self) -> torch.device:
            return self.place

    return Generator


class CudaRuntime:
    """What :mod:`torch.cuda` answers on a machine with one emulated GPU."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        self.gpu = gpu
        self.stream = _Stream()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        replaced: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_capability": lambda *args: divmod(self.gpu.gpu.arch, 10),
            "get_device_properties": self.properties,
            "get_device_name": lambda *args: f"NVIDIA {self.gpu.gpu.name}",
            "synchronize": lambda *args: None,
            "empty_cache": lambda: None,
            "mem_get_info": self.memory,
            "is_current_stream_capturing": lambda: self.gpu.capture is not None,
            "device": lambda device: contextlib.nullcontext(),
            "Stream": _Stream,
            "Event": _Event,
            "CUDAGraph": _Graph,
            "current_stream": lambda *args: self.stream,
            "stream": self.on_stream,
            "graph": self.graph,
        }
        with (
            mock.patch.multiple(torch.cuda, **replaced),
            mock.patch.object(torch, "Generator", _generator_class()),
        ):
            yield

    def properties(self, *args: Any) -> SimpleNamespace:
        major, minor = divmod(self.gpu.gpu.arch, 10)
        return SimpleNamespace(
            name=f"NVIDIA {self.gpu.gpu.name}", total_memory=MEMORY_BYTES, major=major,
            minor=minor, multi_processor_count=self.gpu.gpu.num_sms, L2_cache_size=_L2_BYTES,
        )  # fmt: skip

    def memory(self, *args: Any) -> tuple[int, int]:
        return MEMORY_BYTES - self.gpu.live_bytes, MEMORY_BYTES

    @contextlib.contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def graph(self, graph: _Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Launches within it do not run, as on a GPU; other operators do, and again at a replay."""
        before, self.stream = self.stream, _Stream()
        self.gpu.capture, self.gpu.graph_memory = graph.steps, graph.memory
        try:
            yield
        finally:
            self.gpu.capture, self.stream = None, before
