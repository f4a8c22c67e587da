# SPDX-License-Identifier: Apache-2.0
"""A lesser processor than the machine's, in this process and in all that it starts.

``NVFP4_TEST_CPU_ISA`` names the highest level of instructions that is left. Whatever asks which
there are is then told of no other: torch (of which vLLM asks, to choose its extension and its
attention), ATen, oneDNN, MKL and Inductor, and LLVM, of which the kernels here ask. This folder on
PYTHONPATH does the same in a new process, through sitecustomize.py.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path

VARIABLE = "NVFP4_TEST_CPU_ISA"
_AMX, _BF16, _AVX512 = ("amx",), ("avx512_bf16", "avx512bf16"), ("avx512", "evex512", "avx10")
# Dot products of bytes in AVX2's registers came after AVX-512's.
_AVX_VNNI = ("avx_vnni", "avxvnni")
# Level -> how the names of the features begin that it has not.
LEVELS = {
    "avx2": (*_AVX512, *_AVX_VNNI, *_AMX),
    # AVX-512 as the first processors had it, and without tiles of matrices.
    "avx512": (*_BF16, "avx512_fp16", "avx512fp16", "avx10", *_AMX),
    "avx512_bf16": ("avx512_fp16", "avx512fp16", "avx10", *_AMX),
}
# Level of a machine, highest first -> a feature that none below has.
MACHINES = {
    "amx": "amx_tile",
    "avx512_bf16": "avx512_bf16",
    "avx512": "avx512f",
    "avx2": "avx2",
}
# What libraries read when they are loaded.
_ENVIRONMENT = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


def machine_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The level of the machine itself, of MACHINES; None below all of them."""
    line = next((x for x in cpuinfo.read_text().splitlines() if x.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return next((level for level, flag in MACHINES.items() if flag in flags), None)


def install() -> None:
    """Take the level that the variable names; nothing where it is not set.

    Raises ValueError for an unknown level, and RuntimeError where torch is loaded already: it has
    looked at the processor by then.
    """
    level = os.environ.get(VARIABLE)
    if not level or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if level not in LEVELS:
        raise ValueError(f"{VARIABLE}={level}: unknown; levels are {', '.join(LEVELS)}")
    if "torch" in sys.modules:
        raise RuntimeError(f"{VARIABLE}={level} comes too late: torch is loaded")
    os.environ.update(_ENVIRONMENT[level])
    here = str(Path(__file__).resolve().parent)
    paths = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x and x != here]
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *paths])
    sys.meta_path.insert(0, _Finder(LEVELS[level]))


class _Finder(MetaPathFinder):
    """Finds nothing by itself: has a module that was just loaded report fewer features."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        self._changes = {"torch": _change_torch, "llvmlite.binding": _change_llvm}
        self._missing = missing

    def find_spec(self, name, path=None, target=None):
        change = self._changes.pop(name, None)
        if change is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                spec.loader = _Loader(spec.loader, change, self._missing)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader, change, missing) -> None:
        self._loader, self._change, self._missing = loader, change, missing

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        self._loader.exec_module(module)
        self._change(module, self._missing)

    def __getattr__(self, name):
        return getattr(self._loader, name)


def _without(missing, features):
    return {k: False if k.startswith(missing) else v for k, v in features.items()}


def _change_torch(torch, missing) -> None:
    """torch.cpu's own questions all come down to these."""
    cpu = torch._C._cpu
    if (ask := getattr(cpu, "_get_cpu_capability", None)) is not None:
        cpu._get_cpu_capability = lambda: _without(missing, ask())
    for name in dir(cpu):  # before torch 2.12, one function each
        if name.removeprefix("_is_").startswith(missing):
            setattr(cpu, name, lambda: False)


def _change_llvm(binding, missing) -> None:
    ask = binding.get_host_cpu_features

    def lesser():
        features = ask()
        features.update(_without(missing, features))
        return features

    binding.get_host_cpu_features = lesser
