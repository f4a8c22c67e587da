# SPDX-License-Identifier: Apache-2.0
"""The road of a GPU's worker, inside an environment with vLLM for CUDA and no GPU.

    python -m rehearsal.walk OUT [--short]

Walks every step to its end, or to where it asks for a device, and writes one JSON line for each to
OUT: {"step", "outcome", "seconds", "detail"}. The outcome is "ok", "needs a device" or "failed".
Started by scripts/rehearse.py, with the stand-ins of the driver before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rehearsal import stage

# What torch, CUDA, NVML and vLLM say where a step wants a device.
_WANTS_A_DEVICE = (
    "no CUDA device",
    "no CUDA-capable device",
    "No CUDA GPUs are available",
    "Found no NVIDIA driver",
    "driver version is insufficient",
    "CUDA driver initialization failed",
    "is out of bounds for 0 devices",  # the worker of vLLM 0.32 counts them first
)


class Walk:
    """Writes what became of each step as it ends."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.is_whole = True

    @contextlib.contextmanager
    def step(self, name: str, may_want_a_device: bool = False) -> Iterator[dict[str, Any]]:
        """``with walk.step("name") as row: row["detail"] = "..."``; an exception ends the step
        alone. One that asks for a device is no failure where the step may."""
        row: dict[str, Any] = {"step": name, "outcome": "ok", "detail": ""}
        start = time.perf_counter()
        try:
            yield row
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            wants = any(words in message for words in _WANTS_A_DEVICE)
            row["outcome"] = "needs a device" if may_want_a_device and wants else "failed"
            row["detail"] = " ".join(message.split())[:300]
            if row["outcome"] == "failed":
                self.is_whole = False
                traceback.print_exc()
        row["seconds"] = round(time.perf_counter() - start, 1)
        with self._out.open("a") as out:
            out.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--short", action="store_true", help="what depends on the card alone")
    args = parser.parse_args()
    walk = Walk(args.out)
    with stage.figures_of_the_card():
        _walk(walk, args.short)
    return 0 if walk.is_whole else 1


def _walk(walk: Walk, is_short: bool) -> None:
    with walk.step("import vLLM") as row:
        from rehearsal import steps

        row["detail"] = steps.import_vllm()
    with walk.step("register") as row:
        row["detail"] = steps.register()
    if not is_short:
        with walk.step("names of vLLM") as row:
            row["detail"] = steps.names_of_vllm()
        with walk.step("command line") as row:
            row["detail"] = steps.command_line()
    with walk.step("attention") as row:
        row["detail"] = steps.attention()
    with tempfile.TemporaryDirectory() as folder:
        if not is_short:
            with walk.step("architectures") as row:
                row["detail"] = steps.architectures(Path(folder, "architectures"))
        for name in steps.SHORT if is_short else steps.checkpoints():
            with walk.step(f"load {name}") as row:
                row["detail"] = steps.load(name, Path(folder))
        if not is_short:
            _rest(walk, steps, Path(folder))


def _rest(walk: Walk, steps: Any, folder: Path) -> None:
    for dtype in steps.CACHES:
        with walk.step(f"KV cache in {dtype}") as row:
            row["detail"] = steps.kv_cache(dtype, folder)
    with walk.step("LoRA") as row:
        row["detail"] = steps.lora(folder / "lora")
    for name in steps.GRAPHS:
        with walk.step(f"graph of {name}") as row:
            row["detail"] = steps.graph(name, folder / "graph")
    with walk.step("kernels of csrc/") as row:
        row["detail"] = steps.kernels()
    with walk.step("worker", may_want_a_device=True) as row:
        row["detail"] = steps.worker(folder / "worker")


if __name__ == "__main__":
    raise SystemExit(main())
