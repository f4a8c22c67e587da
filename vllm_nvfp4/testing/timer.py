# SPDX-License-Identifier: Apache-2.0
"""Time GPU work as a model sees it: weights cold in L2, no launch gaps, median of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def num_rotations(bytes_per_call: int, l2_bytes: int, most: int = 64) -> int:
    """How many copies of a call's inputs are needed so that each call finds its own evicted.

    Three times the L2: its replacement is not strictly least-recently-used.
    """
    return max(2, min(most, -(-3 * l2_bytes // max(bytes_per_call, 1)) + 1))


def time_graph(calls: Sequence[Callable[[], object]], seconds: float = 0.2) -> float:
    """Median time of one call in microseconds.

    calls: the same work on different buffers (see :func:`num_rotations`), run in turn. They are
           captured in one CUDA graph, so that the time between two calls is the GPU's own, and the
           graph is replayed for about ``seconds``.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_events(graph.replay, seconds) / len(calls)


def time_events(call: Callable[[], object], seconds: float = 0.2, most: int = 1000) -> float:
    """Median GPU time of ``call`` in microseconds, between CUDA events; two warm-up calls."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    samples: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    deadline = time.monotonic() + seconds
    while len(samples) < 5 or (time.monotonic() < deadline and len(samples) < most):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        samples.append((start, end))
        if len(samples) % 16 == 0:
            end.synchronize()  # keeps the queue short, so that the deadline means GPU time
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in samples)


def time_host(
    call: Callable[[], object], count: int = 2000, is_cpu_time: bool = False, batches: int = 9
) -> float:
    """Median host time of ``call`` in microseconds: what eager mode pays to launch.

    The queue is drained between batches, so that a full one never blocks the launch.
    is_cpu_time: count the process's CPU time, not the clock's
    """
    clock = time.process_time if is_cpu_time else time.perf_counter
    per_batch = max(1, count // batches)
    for _ in range(10):
        call()
    times = []
    for _ in range(batches):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = clock()
        for _ in range(per_batch):
            call()
        times.append((clock() - start) / per_batch * 1e6)
    return statistics.median(times)
