# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the two libraries of NVIDIA's driver, for a machine that has neither.

libcuda.so.1 has every function that the compiled extensions of torch and vLLM link to, and each
answers CUDA_ERROR_NO_DEVICE: the extensions load, and CUDA finds no device. libnvidia-ml.so.1
describes one GPU, by which vLLM takes the machine for one with CUDA. A third, preloaded, answers
for the CUDA runtime that there is one device: torch enters it for tensors that have shapes alone.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_NO_DEVICE = 100
# torch asks it before it enters a device, and not to have a context is an answer.
_CONTEXT_STATE = "cuDevicePrimaryCtxGetState"
# cuda.h spells a function cu + capital letter, and so do these libraries of the toolkit.
_OTHER_LIBRARIES = re.compile(
    r"cu(blas|dnn|sparse|solver|fft|rand|File|pti|tensor(?!Map)|Tensor(?!Map))"
)
# They return a text through a pointer, which callers print.
_TEXTS = ("cuGetErrorName", "cuGetErrorString")


@dataclass(frozen=True)
class Card:
    """One GPU as its driver describes it.

    capability: (major, minor)
    memory:     GiB
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def arch(self) -> str:
        return "{}.{}".format(*self.capability)


CARDS = (
    Card("NVIDIA GeForce RTX 4090", (8, 9), 24),
    Card("NVIDIA H100 80GB HBM3", (9, 0), 80),
    Card("NVIDIA GeForce RTX 3090", (8, 6), 24),
    Card("NVIDIA GeForce RTX 5090", (12, 0), 32),
)


def undefined_symbols(libraries: list[Path]) -> set[str]:
    """The dynamic symbols that the libraries need from others."""
    command = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = (line.split() for line in listing.splitlines())
    return {words[-1].partition("@")[0] for words in lines if len(words) == 2}


def driver_functions(symbols: set[str]) -> list[str]:
    """Those of libcuda among symbols."""
    is_driver = re.compile(r"cu[A-Z]").match
    return sorted(s for s in symbols if is_driver(s) and not _OTHER_LIBRARIES.match(s))


def driver_source(functions: list[str]) -> str:
    """C for a libcuda of these functions without a device."""
    written = {_CONTEXT_STATE, *_TEXTS}
    lines = [f"int {f}(void) {{ return {_NO_DEVICE}; }}" for f in functions if f not in written]
    lines.append(
        f"int {_CONTEXT_STATE}(int device, unsigned *flags, int *is_active) "
        "{ *flags = 0; *is_active = 0; return 0; }"
    )
    lines += [
        f'int {name}(int status, const char **text) {{ *text = "no CUDA device"; return 0; }}'
        for name in _TEXTS
    ]
    return "\n".join(lines) + "\n"


def build_driver(site: Path, folder: Path) -> int:
    """libcuda.so.1 for the extensions of torch and vLLM below ``site``; how many functions it has.

    Needs nm and gcc. Raises CalledProcessError.
    """
    libraries = sorted([*site.glob("vllm/*.so"), *site.glob("torch/lib/*.so")])
    symbols = undefined_symbols(libraries)
    # Triton compiles this against libcuda on the machine that it runs on.
    for source in site.glob("triton/backends/nvidia/*.c"):
        symbols |= set(re.findall(r"\bcu[A-Z]\w*(?=\()", source.read_text()))
    functions = driver_functions(symbols)
    source = folder / "libcuda.c"
    source.write_text(driver_source(functions))
    _compile(source, folder / "libcuda.so.1")
    return len(functions)


_RUNTIME = """
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
"""


def build_runtime(folder: Path) -> Path:
    """The library to preload."""
    source, library = folder / "cudart.c", folder / "cudart.so"
    source.write_text(_RUNTIME)
    _compile(source, library)
    return library


def build_nvml(source: Path, folder: Path) -> None:
    """libnvidia-ml.so.1 from its stand-in, which reads a card from the environment."""
    _compile(source, folder / "libnvidia-ml.so.1")


def card_variables(card: Card) -> dict[str, str]:
    """What the stand-in of NVML reads."""
    return {
        "STUB_NVML_NAME": card.name,
        "STUB_NVML_CAPABILITY": card.arch,
        "STUB_NVML_GIB": str(card.memory),
    }


def _compile(source: Path, library: Path) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
