# SPDX-License-Identifier: Apache-2.0
"""What every benchmark needs: a GPU or a clear line, and the header of a results file."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This checkout before any installed copy, but after PYTHONPATH: gpu_check.sh puts one there that
# holds cubins.
_installed = [i for i, entry in enumerate(sys.path) if entry.endswith("-packages")]
sys.path.insert(min(_installed, default=len(sys.path)), str(ROOT))

from vllm_nvfp4.testing.machine import cpu_model, output_of, provenance, versions  # noqa: E402

EXIT_NO_GPU = 3


def require_gpu(who: str) -> bool:
    """True where torch sees a CUDA device; else one line on stderr."""
    import torch

    if torch.cuda.is_available():
        return True
    print(f"{who}: no CUDA GPU (torch {torch.__version__}); not run", file=sys.stderr)
    return False


def header() -> list[tuple[str, str]]:
    """(name, value) rows that say on what, with what and how a measurement was made."""
    import torch

    rows = provenance(ROOT)
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        rows["gpu"] = f"{p.name}, {p.multi_processor_count} SMs, sm_{p.major}{p.minor}"
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        clocks = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
        rows[query] = clocks or "nvidia-smi not found"
    else:
        rows["cpu"] = cpu_model()
    rows["cuda"] = str(torch.version.cuda)
    return list((rows | versions()).items())


def write_rows(
    path: Path | None,
    notes: Sequence[tuple[str, str]],
    fields: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    digits: str = ".6g",
) -> list[Mapping[str, Any]]:
    """Print rows and write them to a CSV, each as soon as it is measured; returns them all.

    notes: lines before the table, as :func:`header` has them; digits: how a float is written.
    A field that a row does not have stays empty.
    """
    lines = [f"# {name}: {value}\n" for name, value in notes] + [",".join(fields) + "\n"]
    print("".join(lines), end="", flush=True)
    if path is not None:
        path.write_text("".join(lines))
    found = []
    for row in rows:
        found.append(row)
        cells = [row.get(name, "") for name in fields]
        cells = [f"{cell:{digits}}" if isinstance(cell, float) else cell for cell in cells]
        print(*cells, flush=True)
        if path is not None:
            with path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(cells)
    return found


def copy_bandwidth_gbps() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB, or a 64th of the
    memory, GB/s."""
    import torch

    from vllm_nvfp4.testing.timer import time_events

    num_bytes = min(1 << 30, torch.cuda.get_device_properties(0).total_memory // 64)
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / time_events(lambda: target.copy_(source)) / 1e3


def gpu_slug(name: str) -> str:
    """A file name for a GPU: "NVIDIA GeForce RTX 4090" -> "geforce-rtx-4090"."""
    words = name.lower().replace("nvidia", "").split()
    return "-".join(words) or "gpu"
