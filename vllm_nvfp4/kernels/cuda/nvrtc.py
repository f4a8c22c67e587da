# SPDX-License-Identifier: Apache-2.0
"""Compile a kernel of csrc/ to a cubin with NVRTC. Needs neither a GPU nor a driver.

The compiler comes with torch's CUDA wheels (nvidia-cuda-nvrtc) and is reached through cuda.core;
both are imported on the first compilation, so that a machine without them can import this file.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from vllm_nvfp4.compat.packages import install_hint

# m16n8k16 FP8 MMA is PTX ISA 8.7 (NVRTC 12.8); torch's cu130 wheels bring 13.0.
MIN_NVRTC = (13, 0)

_import_lock = threading.Lock()
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class KernelSource(Protocol):
    """What delivery needs to know about one kernel (a ``configs.KernelConfig`` has all of it).

    symbol:     the extern "C" name of the kernel, unique among all configurations
    source:     the translation unit as text; it may #include "..." files of csrc/
    threads:    threads per block
    smem_bytes: dynamic shared memory per block
    min_arch:   lowest compute capability times ten it compiles for
    """

    @property
    def symbol(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def smem_bytes(self) -> int: ...
    @property
    def min_arch(self) -> int: ...


class CompileError(RuntimeError):
    """A kernel could not be compiled: which one, for what, why, and what to do about it."""


def csrc_dir() -> Path:
    """The folder of the .cuh files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise CompileError(
        f"the kernel sources are missing: found neither {package / 'csrc'} nor "
        f"{package.parent / 'csrc'}. Reinstall vllm-nvfp4"
    )


def included_files(source: str, csrc: Path | None = None) -> dict[str, str]:
    """Every file of csrc/ that ``source`` includes, directly or not: {relative name: text}.

    Conditional includes count as included: this feeds a hash, where too much is harmless. Only
    those of host/ do not, which the emulator alone sees and a wheel does not carry.
    """
    root = csrc or csrc_dir()
    found: dict[str, str] = {}
    pending = list(_INCLUDE.findall(source))
    while pending:
        name = pending.pop()
        path = root / name
        if name in found or name.startswith("host/") or not path.is_file():
            continue
        found[name] = path.read_text()
        pending += _INCLUDE.findall(found[name])
    return dict(sorted(found.items()))


def compile_options(arch: int) -> dict[str, object]:
    """The options of every compilation, as cuda.core names them; part of the cache key."""
    return {"arch": f"sm_{arch}", "std": "c++17"}


@functools.cache
def nvrtc_version() -> tuple[int, int] | None:
    """(major, minor) of the NVRTC that would be used, None where there is none."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        # cuda.bindings raises RuntimeError where the package is there and libnvrtc is not.
        return None
    return (major, minor) if status == nvrtc.nvrtcResult.NVRTC_SUCCESS else None


def version_text(version: tuple[int, int] | None) -> str:
    return "none" if version is None else f"{version[0]}.{version[1]}"


def compile_cubin(config: KernelSource, arch: int) -> bytes:
    """The machine code of one kernel for one architecture.

    arch: compute capability times ten, e.g. 89
    Raises CompileError: no NVRTC, one older than ``MIN_NVRTC``, an architecture below the
    kernel's, or the compiler's own diagnostics.
    """
    if arch < config.min_arch:
        raise CompileError(
            f"{config.symbol}: asked for sm_{arch}, but it needs sm_{config.min_arch} or later"
        )
    version = nvrtc_version()
    if version is None or version < MIN_NVRTC:
        raise CompileError(
            f"{config.symbol}: compiling for sm_{arch} needs NVRTC "
            f"{version_text(MIN_NVRTC)} or later, found {version_text(version)}. "
            f"{install_hint('cuda')}, or install a wheel of vllm-nvfp4 that holds cubins "
            f"for sm_{arch}"
        )
    try:
        # cuda.core swaps its modules while it is imported, so two threads must not do it at once.
        with _import_lock:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise CompileError(
            f"{config.symbol}: compiling for sm_{arch} needs the package cuda-core ({error}). "
            f"{install_hint('cuda')}"
        ) from error
    include_path = [str(csrc_dir()), *map(str, toolkit_headers())]
    options = ProgramOptions(include_path=include_path, **compile_options(arch))
    try:
        return bytes(Program(config.source, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda.core moved its error types between releases
        raise CompileError(f"{config.symbol}: NVRTC failed for sm_{arch}:\n{error}") from error


def toolkit_headers() -> Iterator[Path]:
    """The folder that holds cuda_fp16.h: of the nvidia-cuda-runtime wheel, else of a toolkit."""
    candidates = [
        Path(entry) / "nvidia" / sub / "include"
        for entry in sys.path
        for sub in ("cu13", "cuda_runtime")
    ]
    candidates += [
        Path(os.environ[name]) / "include"
        for name in ("CUDA_HOME", "CUDA_PATH")
        if os.environ.get(name)
    ]
    candidates.append(Path("/usr/local/cuda/include"))
    for folder in candidates:
        if (folder / "cuda_fp16.h").is_file():
            yield folder
            return
