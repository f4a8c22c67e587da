# SPDX-License-Identifier: Apache-2.0
"""Processes that share one kernel cache, damage its entries and are killed at random moments."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_nvfp4.kernels.cuda import cubins, nvrtc

ARCH = 89


@dataclass(frozen=True)
class Kernel:
    symbol: str
    threads: int = 32
    smem_bytes: int = 0
    min_arch: int = 80

    @property
    def source(self) -> str:
        return f'extern "C" __global__ void {self.symbol}(float* x) {{ x[threadIdx.x] += 1; }}\n'


KERNELS = [Kernel(f"kernel_{i}") for i in range(3)]


class Damage(NamedTuple):
    """What came of a storm."""

    loads: int
    kills: int
    wrong: int


def _hashes(results: Any) -> None:
    results.put([_hash(nvrtc.compile_cubin(kernel, ARCH)) for kernel in KERNELS])


def _hash(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


def _damage(path: Path, rng: random.Random) -> None:
    """As a disk or another program would: in place, while others may read it."""
    try:
        with open(path, "r+b") as file:
            if rng.random() < 0.5:
                file.truncate(rng.randrange(1000))
            else:
                file.seek(rng.randrange(1000))
                file.write(b"\xa5" * 16)
    except FileNotFoundError:
        return


def _load(seed: int, num_loads: int, expected: list[str], log: str) -> None:
    """Load kernels, damage entries; one byte to the log for each load: right or wrong."""
    rng = random.Random(seed)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for _ in range(num_loads):
        at = rng.randrange(len(KERNELS))
        is_right = _hash(cubins.get_cubin(KERNELS[at], ARCH)) == expected[at]
        os.write(handle, b"+" if is_right else b"-")
        entries = list((cubins.cache_dir() / f"sm_{ARCH}").glob("*.cubin"))
        if entries and rng.random() < 0.3:
            _damage(rng.choice(entries), rng)


def storm(scratch: Path, num_processes: int, num_kills: int, num_loads: int) -> Damage:
    """Run the processes until so many were killed, then let the last ones finish.

    The cache is where VLLM_NVFP4_CACHE_DIR says. Raises RuntimeError for a process that ends with
    an error or that waits for a lock that nobody holds.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    reference = context.Process(target=_hashes, args=(results,))
    reference.start()
    expected = results.get(timeout=120)
    reference.join()
    log = scratch / "loads"
    log.touch()
    rng = random.Random(1)
    running: list[Any] = []
    started = kills = 0
    while kills < num_kills:
        running = [p for p in running if not _has_ended(p)]
        while len(running) < num_processes:
            arguments = (started, num_loads, expected, str(log))
            running.append(context.Process(target=_load, args=arguments))
            running[-1].start()
            started += 1
        time.sleep(rng.random() * 0.1)
        victim = running.pop(rng.randrange(len(running)))
        kills += victim.is_alive()
        victim.kill()
        victim.join()
    for process in running:
        process.join(120)
        if not _has_ended(process):
            process.kill()
            raise RuntimeError("a process waits for the cache without end")
    loads = log.read_bytes()
    return Damage(len(loads), kills, loads.count(b"-"))


def _has_ended(process: Any) -> bool:
    if process.is_alive():
        return False
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a process ended with {process.exitcode}")
    return True
