# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels of csrc/ with g++ and run them on the CPU, with every access checked.

csrc/host/README.md describes the emulator and its limits. Needs GCC 12 or later
and addr2line (binutils).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch

from vllm_nvfp4.kernels.cuda.private_dir import make_private

# Plain loads and stores call __tsan_*; alignment, array bounds and shifts call __ubsan_*. The
# runtime defines both, so no sanitizer library is linked.
_CHECKS = (
    "-fsanitize=thread,alignment,bounds,shift",
    "--param=tsan-instrument-func-entry-exit=0",
    "--param=tsan-distinguish-volatile=1",
)
# a*b+c rounds twice unless the source says fma, on every CPU alike. Loops stay loops: a memcpy
# that the compiler makes of one would go unchecked.
_UNCHANGED = ("-ffp-contract=off", "-fno-tree-loop-distribute-patterns")
# Uninitialised locals hold 0xFE bytes, large negative numbers, rather than by chance zeros.
_LOCALS = ("-ftrivial-auto-var-init=pattern",)
_COMMON = (
    "-std=c++17",
    "-g1",
    "-gdwarf-4",  # addr2line misreads the file table that g++ writes as version 5
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-gnu-unique",
)
_KERNEL_FLAGS = (*_COMMON, "-O2", *_UNCHANGED, *_LOCALS, "-DVNVFP4_HOST=1", *_CHECKS)
_RUNTIME_FLAGS = (*_COMMON, "-O2", "-ftree-vectorize", "-ffp-contract=off")

_MIN_GCC = 12

_EMULATOR_HEADERS = ("ptx_host.h", "cuda_host.h", "cuda_half.h", "kernel_entry.h")

_FP8_ACCUMULATORS = ("ada", "exact")
_HALF_ACCUMULATORS = ("exact", "ada")

_MAX_CACHE_AGE = 14 * 24 * 3600  # seconds since the last use

# A launch owns the process's crash handlers while it runs.
_launch_lock = threading.Lock()


class HostKernelError(RuntimeError):
    """A kernel did what a GPU would punish with a wrong result, a hang or a crash."""


class HostCompileError(RuntimeError):
    """g++ refused a kernel source; the message is the compiler's."""


@dataclass(frozen=True)
class HostMachine:
    """The machine that a launch runs on.

    seed:             order of blocks, warps and lanes
    accumulator:      FP8 mma.sync: "ada" (13 fractional bits, truncating, per 16 of k) or "exact"
    half_accumulator: bf16/f16 mma.sync: "exact" (one rounding) or "ada" (24 bits, per 8 of k)
    smem_limit:       bytes of shared memory a block may have; sm_89's by default
    max_resident:     blocks on the machine at once; 0: as many as have to wait for each other
    time_limit:       seconds of CPU time
    """

    seed: int = 0
    accumulator: str = "ada"
    half_accumulator: str = "exact"
    smem_limit: int = 99 * 1024
    max_resident: int = 0
    time_limit: float = 120.0


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("shared_limit", ctypes.c_uint32),
        ("max_resident", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("fp8_accumulator", ctypes.c_uint32),
        ("half_accumulator", ctypes.c_uint32),
        ("time_limit", ctypes.c_double),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("is_writable", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    )


class _Result(ctypes.Structure):
    _fields_ = (
        ("pc", ctypes.c_uint64),
        ("num_resident", ctypes.c_uint32),
        ("line", ctypes.c_int32),
        ("file", ctypes.c_char * 512),
        ("message", ctypes.c_char * 2048),
    )


class HostModule:
    """Kernels of one translation unit, loaded. Made by :func:`build`."""

    _last: ClassVar[HostModule | None] = None  # to launch anything

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def launch(
        self,
        symbol: str,
        params: bytes | ctypes.Structure,
        *,
        grid: Sequence[int],
        block: Sequence[int],
        smem_bytes: int = 0,
        buffers: Mapping[str, torch.Tensor],
        outputs: Collection[str],
        machine: HostMachine | None = None,
    ) -> None:
        """Run kernel<<<grid, block, smem_bytes>>>(params) to its end.

        params:  the kernel's params struct as the GPU launch takes it; an 8-byte word that holds
                 an address inside one of `buffers` reaches that tensor
        buffers: CPU tensors by the name that errors use; all that the kernel may read
        outputs: the names of those it may write

        Raises HostKernelError with kernel, block, thread, address and reason.
        """
        machine = machine or HostMachine()
        config = _launch_config(grid, block, smem_bytes, machine)
        raw = bytes(params)
        table = _buffer_table(buffers, outputs)
        result = _Result()
        with _launch_lock:
            self._take_turn()
            status = self._library.vnvfp4_host_launch(
                symbol.encode(),
                ctypes.byref(config),
                raw,
                ctypes.c_uint64(len(raw)),
                table,
                ctypes.c_uint64(len(table)),
                ctypes.byref(result),
            )
        if status:
            raise HostKernelError(result.message.decode(errors="replace") + self._place(result))

    def _take_turn(self) -> None:
        """Have the module that ran last give back the stacks it keeps for its next launch: two
        mappings for each thread, of which a process may have 65,530 by default."""
        previous, HostModule._last = HostModule._last, self
        if previous is not None and previous is not self:
            previous._library.vnvfp4_host_release()

    def _place(self, result: _Result) -> str:
        if result.file:
            return f" [{result.file.decode()}:{result.line}]"
        if not result.pc:
            return ""
        # The recorded address is a return address: one byte back is inside the call.
        command = ["addr2line", "-e", str(self.path), "-fCis", hex(result.pc - 1)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.split("\n")
        # Pairs of function and file:line, innermost inlined frame first.
        places = [
            f"{lines[i + 1].split(' (')[0]} in {lines[i]}" for i in range(0, len(lines) - 1, 2)
        ]
        kernel_places = [place for place in places if not place.startswith(_EMULATOR_HEADERS)]
        return f" [{' <- '.join(kernel_places or places)}]" if places else ""


def build(
    source: str | Path,
    kernels: Mapping[str, str],
    *,
    defines: Mapping[str, str | int] | None = None,
    include_dirs: Sequence[Path] = (),
    flags: Sequence[str] = (),
    runtime_flags: Sequence[str] = (),
    cache_dir: Path | None = None,
) -> HostModule:
    """Compile a translation unit and return its kernels, from the cache if nothing changed.

    source:  C++ text (usually one #include) or the path of a file
    kernels: launch symbol -> kernel with its template arguments, e.g. {"k": "gemm<Config<16>>"}
    flags:   more compiler flags for the kernels; runtime_flags: for the emulator

    The cache key is the preprocessed source, so every header counts. Raises HostCompileError, also
    where others may write to the cache's folder: what lies there is loaded and run.
    """
    text = source.read_text() if isinstance(source, Path) else source
    entries = "".join(
        f"VNVFP4_HOST_KERNEL({name}, {kernel});\n" for name, kernel in kernels.items()
    )
    # Messages give the text's own lines: of the file, or of "kernel" where there is none.
    name = source if isinstance(source, Path) else "kernel"
    unit = (
        f'#include "host/ptx_host.h"\n#include "host/kernel_entry.h"\n#line 1 "{name}"\n{text}\n'
        f'#line 1 "entries"\n{entries}'
    )
    csrc = csrc_dir()
    folders = [csrc, *include_dirs, *([source.parent] if isinstance(source, Path) else [])]
    options = [*_KERNEL_FLAGS, *flags]
    options += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    options += [f"-I{folder.resolve()}" for folder in folders]
    cache = (cache_dir or _default_cache()).resolve()
    for level in (cache.parent, cache) if cache_dir is None else (cache,):
        if obstacle := make_private(level):
            raise HostCompileError(f"{level} can't hold compiled kernels: {obstacle}")
    runtime = _compile(
        csrc / "host/runtime/runtime.cpp", [*_RUNTIME_FLAGS, *runtime_flags], cache, ".o"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unit.cpp"
        path.write_text(unit)
        return HostModule(_compile(path, options, cache, ".so", link=[str(runtime)]))


def csrc_dir() -> Path:
    """The folder with the kernel sources: csrc/ of the repository, or where the wheel put it."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "host").is_dir():
            return folder
    raise FileNotFoundError(
        f"no csrc/host folder beside {package} or in it: host kernels need the repository's csrc/"
    )


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm_nvfp4" / "host_kernels"


@lru_cache(maxsize=1)
def _compiler() -> tuple[str, str]:
    """(path, version) of g++."""
    path = shutil.which("g++")
    if path is None:
        raise HostCompileError("no g++ on PATH: host kernels need it (Debian: apt-get install g++)")
    command = [path, "-dumpfullversion"]
    version = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    major = version.split(".")[0]
    if not major.isdigit() or int(major) < _MIN_GCC:
        raise HostCompileError(
            f"{path} has version {version or 'of another compiler'}: host kernels need GCC "
            f"{_MIN_GCC} or later for its instrumentation options"
        )
    return path, version


def _run_compiler(arguments: Sequence[str], folder: Path) -> bytes:
    compiler, _ = _compiler()
    done = subprocess.run([compiler, *arguments], capture_output=True, check=False, cwd=folder)
    if done.returncode:
        raise HostCompileError(done.stderr.decode(errors="replace")[-8000:])
    return done.stdout


def _compile(
    path: Path, options: Sequence[str], cache: Path, suffix: str, link: Sequence[str] = ()
) -> Path:
    key = hashlib.sha256(repr((_compiler(), sorted(options), link)).encode())
    # With line markers, since messages give lines; from inside the folder, whose name may change.
    key.update(_run_compiler([*options, "-E", "-fno-working-directory", path.name], path.parent))
    target = cache / f"{path.stem}-{key.hexdigest()[:24]}{suffix}"
    if target.exists():
        os.utime(target)
        return target
    _remove_unused(cache)
    partial = cache / f".{target.name}.{os.getpid()}.{threading.get_ident()}"
    try:
        compiled = Path(f"{partial}.o") if link else partial
        _run_compiler([*options, "-c", path.name, "-o", str(compiled)], path.parent)
        if link:
            command = ["-shared", "-Wl,-Bsymbolic,-z,defs", str(compiled), *link]
            _run_compiler([*command, "-o", str(partial)], path.parent)
        partial.rename(target)
    finally:
        for leftover in (partial, Path(f"{partial}.o")):
            leftover.unlink(missing_ok=True)
    return target


def _remove_unused(cache: Path) -> None:
    for entry in cache.iterdir():
        try:
            if time.time() - entry.stat().st_mtime > _MAX_CACHE_AGE:
                entry.unlink()
        except FileNotFoundError:  # another process was faster
            continue


def _launch_config(
    grid: Sequence[int], block: Sequence[int], smem_bytes: int, machine: HostMachine
) -> _LaunchConfig:
    for name, value, choices in (
        ("accumulator", machine.accumulator, _FP8_ACCUMULATORS),
        ("half_accumulator", machine.half_accumulator, _HALF_ACCUMULATORS),
    ):
        if value not in choices:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    config = _LaunchConfig()
    for field, name, sizes in ((config.grid, "grid", grid), (config.block, "block", block)):
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"{name}: {tuple(sizes)} has {len(sizes)} dimensions, needs 1 to 3")
        for axis in range(3):
            field[axis] = sizes[axis] if axis < len(sizes) else 1
    config.shared_bytes = smem_bytes
    config.shared_limit = machine.smem_limit
    config.max_resident = machine.max_resident
    config.seed = machine.seed
    config.fp8_accumulator = _FP8_ACCUMULATORS.index(machine.accumulator)
    config.half_accumulator = _HALF_ACCUMULATORS.index(machine.half_accumulator)
    config.time_limit = machine.time_limit
    return config


def _buffer_table(
    buffers: Mapping[str, torch.Tensor], outputs: Collection[str]
) -> ctypes.Array[_Buffer]:
    if unknown := set(outputs) - set(buffers):
        raise ValueError(f"outputs {sorted(unknown)} are not among the buffers {sorted(buffers)}")
    table = (_Buffer * len(buffers))()
    for entry, (name, tensor) in zip(table, buffers.items(), strict=True):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"buffer {name!r} is on {tensor.device}; the emulator takes CPU tensors"
            )
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        entry.data = tensor.data_ptr()
        entry.bytes = (last + 1) * tensor.element_size() if tensor.numel() else 0
        entry.is_writable = name in outputs
        entry.name = name.encode()
    _check_overlap(table)
    return table


def _check_overlap(table: ctypes.Array[_Buffer]) -> None:
    entries = sorted((e.data or 0, e.bytes, e.name.decode()) for e in table if e.bytes)
    for (begin, size, name), (other_begin, _, other) in pairwise(entries):
        if other_begin < begin + size:
            raise ValueError(
                f"buffers {name!r} and {other!r} share memory: each is copied to the emulated GPU, "
                "so pass one tensor that covers both"
            )
