# SPDX-License-Identifier: Apache-2.0
"""Compile the CPU kernels for this machine and run them on torch's own OpenMP threads.

LLVM comes with llvmlite, which vLLM installs (numba needs it): no compiler on the user's machine.
A kernel is ``void f(void *args)``, the signature of an OpenMP parallel region, so it is handed to
``GOMP_parallel`` of the library that torch itself runs on: no second thread pool, and the cores
that vLLM bound its threads to are the ones that work.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from vllm_nvfp4.options import Options

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_engines: list[object] = []  # an engine owns the machine code: never drop it


@dataclass(frozen=True)
class Cpu:
    """What the emitters choose by.

    name:     LLVM's name of the processor to compile for
    features: LLVM's feature string
    has_avx512: 512-bit table look-ups over 16-bit and 32-bit lanes
    has_bf16_dot: the AVX-512 BF16 dot product
    has_byte_tables: 512-bit table look-ups over bytes
    has_avx2:   256-bit table look-ups over 32-bit lanes
    has_byte_dot: the dot product of unsigned with signed bytes, as wide as the other two say
    """

    name: str
    features: str
    has_avx512: bool
    has_bf16_dot: bool
    has_byte_tables: bool
    has_avx2: bool
    has_byte_dot: bool


# The levels of instructions that kernels are written for, best first; the option ``cpu_isa``.
ISA_LEVELS = ("avx512_bf16", "avx512", "avx2", "generic")


@functools.cache
def _llvm() -> ModuleType:
    """llvmlite's binding, made safe to look at.

    Its library object answers every attribute, ``__dict__`` included, with a C function. vLLM looks
    into the ``__dict__`` of whatever any module holds each time it builds an engine.
    """
    from llvmlite import binding
    from llvmlite.binding import ffi

    wrapper = type(ffi.lib)
    look_up = wrapper.__getattr__

    def look_up_functions_only(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    wrapper.__getattr__ = look_up_functions_only
    return binding


def detect_cpu(isa: str | None = None) -> Cpu:
    """The processor this runs on, or a lower level of it.

    isa: "avx512_bf16", "avx512", "avx2" or "generic"; default the best there is. A level that the
    machine does not have is refused with ValueError.
    """
    binding = _llvm()

    if isa is not None and isa not in ISA_LEVELS:
        raise ValueError(f"CPU instruction set {isa!r} is unknown; choose from {ISA_LEVELS}")
    features = dict(binding.get_host_cpu_features())
    have = {
        "avx2": all(features.get(f) for f in ("avx2", "fma", "f16c")),
        "avx512": all(features.get(f) for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    }
    have["avx512_bf16"] = have["avx512"] and bool(features.get("avx512bf16"))
    have["generic"] = True
    if isa is None:
        isa = next(level for level in ISA_LEVELS if have[level])
    if not have[isa]:
        raise ValueError(f"this processor has no {isa}; it has {[x for x in have if have[x]]}")
    rank = ISA_LEVELS.index(isa)
    if rank >= 2:  # keep LLVM itself from using wider registers than the level names
        for name in features:
            if name.startswith(("avx512", "evex512")):
                features[name] = False
    flags = ",".join(("+" if on else "-") + name for name, on in sorted(features.items()))
    name = binding.get_host_cpu_name() if rank < 2 else ""
    return Cpu(
        name,
        flags,
        has_avx512=rank <= 1,
        has_bf16_dot=rank == 0,
        has_byte_tables=rank <= 1 and bool(features.get("avx512vbmi")),
        has_avx2=have["avx2"] and rank <= 2,
        has_byte_dot=bool(features.get({2: "avxvnni", 3: ""}.get(rank, "avx512vnni"))),
    )


_forced_isa: str | None = None


@functools.cache
def host_cpu() -> Cpu:
    """:func:`detect_cpu` at the level that was forced, else that of the option ``cpu_isa``."""
    isa = _forced_isa or Options.resolve().cpu_isa
    return detect_cpu(None if isa == "auto" else isa)


def force_isa(isa: str | None) -> None:
    """Make :func:`host_cpu` a lower level than the machine's, for comparison; None undoes it.

    Kernels already chosen stay chosen: call ``cpu_dispatch.use_isa``, which forgets them.
    """
    global _forced_isa
    if isa is not None:
        detect_cpu(isa)
    _forced_isa = isa
    host_cpu.cache_clear()


def compile_function(name: str, ir_text: str, cpu: Cpu) -> int:
    """The address of function ``name`` of an LLVM module. About 20 to 60 ms."""
    binding = _llvm()

    with _lock:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_default_triple()
        machine = target.create_target_machine(cpu=cpu.name, features=cpu.features, opt=3)
        module = binding.parse_assembly(ir_text)
        module.verify()
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _engines.append(engine)
        return engine.get_function_address(name)


@dataclass(frozen=True)
class ThreadPool:
    """How a kernel is spread over threads.

    run:             (function address, argument block, number of threads) -> None
    get_thread_num:  address of ``int f(void)``, for the kernel to call
    get_num_threads: address of ``int f(void)``
    """

    name: str
    run: Callable[[int, ctypes.Array, int], None]
    get_thread_num: int
    get_num_threads: int


def _mapped_openmp_libraries() -> list[str]:
    """Files of OpenMP runtimes in this process."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps}
    except OSError:
        return []
    stems = ("libgomp", "libiomp5", "libomp")
    return sorted(p for p in paths if os.path.basename(p).startswith(stems))


def _openmp_pool(library: ctypes.CDLL, name: str) -> ThreadPool | None:
    try:
        parallel = library.GOMP_parallel
        thread_num, num_threads = library.omp_get_thread_num, library.omp_get_num_threads
    except AttributeError:
        return None
    parallel.restype = None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]

    def run(function: int, args: ctypes.Array, threads: int) -> None:
        parallel(function, args, threads, 0)

    def address(f: object) -> int:
        return ctypes.cast(f, ctypes.c_void_p).value or 0  # type: ignore[arg-type]

    return ThreadPool(name, run, address(thread_num), address(num_threads))


_SERIAL_IR = """
define i32 @thread_num() { ret i32 0 }
define i32 @num_threads() { ret i32 1 }
"""


def _serial_pool() -> ThreadPool:
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def run(function: int, args: ctypes.Array, threads: int) -> None:
        prototype(function)(ctypes.addressof(args))

    cpu = host_cpu()
    return ThreadPool(
        "one thread",
        run,
        compile_function("thread_num", _SERIAL_IR, cpu),
        compile_function("num_threads", _SERIAL_IR, cpu),
    )


@functools.cache
def thread_pool() -> ThreadPool:
    """torch's OpenMP threads; one thread, with a warning, where they cannot be reached.

    A preloaded runtime (vLLM preloads one) stands in the global scope and is what torch's own
    calls resolve to, so it is asked first; without one, torch's private copy is found by its file.
    """
    torch.get_num_threads()  # torch starts its runtime
    pool = _openmp_pool(ctypes.CDLL(None), "OpenMP, global scope")
    for path in _mapped_openmp_libraries():
        pool = pool or _openmp_pool(ctypes.CDLL(path), f"OpenMP, {path}")
    if pool is None:
        logger.warning(
            "vllm-nvfp4: no OpenMP runtime with GOMP_parallel in this process, the CPU kernels "
            "run on one thread"
        )
        pool = _serial_pool()
    logger.debug("vllm-nvfp4: CPU kernels run on %s", pool.name)
    return pool
