# SPDX-License-Identifier: Apache-2.0
"""Memory, energy and clocks while a server works: NVML on GPUs, the kernel's own count on a CPU."""

from __future__ import annotations

import bisect
import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

# A GPU that gained less than this since before the server started does not serve.
_IN_USE_BYTES = 100 << 20


@dataclass(frozen=True)
class Reading:
    """What one look at the device found.

    memory_bytes: held by the server
    energy_j:     counted by the GPUs since their driver was loaded; None where none count
    sm_mhz:       clock of the first GPU's SMs; None without one
    """

    memory_bytes: int
    energy_j: float | None = None
    sm_mhz: float | None = None


class Meter(Protocol):
    """memory_label: what ``memory_bytes`` counts; total_bytes: what the device has of it."""

    memory_label: str
    total_bytes: int

    def read(self, pids: Sequence[int]) -> Reading: ...

    def describe(self) -> dict[str, str]: ...


class CpuMeter:
    """Resident memory of the server's processes. A page that several share counts once."""

    memory_label = "resident memory of the server's processes (PSS)"

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self.total_bytes = _kib(proc / "meminfo", "MemTotal:") * 1024

    def read(self, pids: Sequence[int]) -> Reading:
        total = 0
        for pid in pids:
            with contextlib.suppress(OSError):  # the process has ended since it was listed
                total += _kib(self._proc / str(pid) / "smaps_rollup", "Pss:") * 1024
        return Reading(total)

    def describe(self) -> dict[str, str]:
        return {}


def _kib(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return 0


class GpuMeter:
    """GPU memory above what was in use when this was made, energy and clocks, through NVML."""

    memory_label = "GPU memory in use (NVML), above what was in use before the server"

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._before = [nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles]
        self.total_bytes = sum(nvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles)

    def read(self, pids: Sequence[int]) -> Reading:
        gained, energy = 0, []
        for handle, before in zip(self._handles, self._before, strict=True):
            more = self._nvml.nvmlDeviceGetMemoryInfo(handle).used - before
            if more > _IN_USE_BYTES:
                gained += more
                energy.append(self._get("nvmlDeviceGetTotalEnergyConsumption", handle))
        joules = None if not energy or None in energy else sum(energy) / 1e3
        clock = self._get("nvmlDeviceGetClockInfo", self._handles[0], self._nvml.NVML_CLOCK_SM)
        return Reading(gained, joules, clock)

    def describe(self) -> dict[str, str]:
        """Names, driver, power limit and clocks, for the head of the results."""
        nvml, first = self._nvml, self._handles[0]
        rows: dict[str, Any] = {
            "gpu": self.gpu_name,
            "gpus": len(self._handles),
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "compute capability": ".".join(
                map(str, nvml.nvmlDeviceGetCudaComputeCapability(first))
            ),
        }
        limit = self._get("nvmlDeviceGetEnforcedPowerLimit", first)
        rows["power limit W"] = None if limit is None else limit / 1e3
        for name, kind in (("SM", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
            rows[f"{name} clock MHz"] = self._get("nvmlDeviceGetClockInfo", first, kind)
            rows[f"{name} clock MHz at most"] = self._get("nvmlDeviceGetMaxClockInfo", first, kind)
        return {name: "not reported" if v is None else str(v) for name, v in rows.items()}

    @property
    def gpu_name(self) -> str:
        return self._nvml.nvmlDeviceGetName(self._handles[0])

    def _get(self, function: str, *arguments: Any) -> Any:
        """A value that not every GPU reports: None where it does not."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            return None


def find_meter(is_cpu: bool) -> CpuMeter | GpuMeter:
    """The meter of the device that vLLM will serve on.

    is_cpu: the installed vLLM is built for the CPU
    Raises ValueError where NVML does not answer, or CUDA_VISIBLE_DEVICES leaves no GPU.
    """
    if is_cpu:
        return CpuMeter()
    try:
        import pynvml
    except ImportError:
        from vllm.third_party import pynvml
    try:
        pynvml.nvmlInit()
        return GpuMeter(pynvml, _visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES")))
    except pynvml.NVMLError as error:
        raise ValueError(
            f"no NVIDIA GPU to measure on (NVML: {error}); `vllm-nvfp4 doctor` says what is "
            "missing, and how to serve on the CPU"
        ) from error


def _visible(nvml: Any, selection: str | None) -> list[Any]:
    """Handles of the GPUs that CUDA would show, by index or UUID; all where it is not set."""
    if selection is None:
        names = [str(i) for i in range(nvml.nvmlDeviceGetCount())]
    else:
        names = [name.strip() for name in selection.split(",") if name.strip()]
    if not names:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={selection!r} leaves no GPU; unset it or name one")
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]


@dataclass(frozen=True)
class Window:
    """A stretch of time: peak memory, energy spent, median clock."""

    memory_bytes: int
    energy_j: float | None
    sm_mhz: float | None


class Watch:
    """Reads a meter again and again in a thread, as a context manager.

    processes: gives the ids of the server's processes
    """

    def __init__(
        self, meter: Meter, processes: Callable[[], Sequence[int]], period: float = 0.2
    ) -> None:
        self._meter, self._processes, self._period = meter, processes, period
        self._times: list[float] = []
        self._readings: list[Reading] = []
        self._lock = threading.Lock()  # window() looks too: pairs stay whole and in order
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._period):
            self._look()

    def _look(self) -> None:
        with self._lock:
            reading = self._meter.read(self._processes())
            self._readings.append(reading)
            self._times.append(time.monotonic())

    def window(self, begin: float, end: float) -> Window:
        """From ``begin`` to ``end`` of ``time.monotonic``; energy is interpolated at both."""
        self._look()
        with self._lock:
            times, readings = list(self._times), list(self._readings)
        first = max(bisect.bisect_right(times, begin) - 1, 0)
        last = min(bisect.bisect_left(times, end), len(times) - 1)
        inside = readings[first : last + 1]
        clocks = [r.sm_mhz for r in inside if r.sm_mhz is not None]
        energy = None
        if all(r.energy_j is not None for r in inside) and last > first:
            counts = [r.energy_j or 0.0 for r in inside]
            at = times[first : last + 1]
            energy = _interpolate(end, at, counts) - _interpolate(begin, at, counts)
        return Window(
            max(r.memory_bytes for r in inside),
            energy,
            statistics.median(clocks) if clocks else None,
        )


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    import numpy as np

    return float(np.interp(x, xs, ys))
