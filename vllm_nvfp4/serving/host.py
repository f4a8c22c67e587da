# SPDX-License-Identifier: Apache-2.0
"""What this machine gives a vLLM server: the defaults that are added to its command line.

What the user gives always wins. Each default that is added says so in one line.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.serving.arguments import read_flags
from vllm_nvfp4.serving.launch import MODULE

# vLLM's default on a CPU is 92 % of all memory, which fails as soon as anything else runs.
_KV_CACHE_SHARE = 4
# What of the user's decides the size of the KV cache on a CPU.
KV_FLAGS = frozenset({"--gpu-memory-utilization", "--kv-cache-memory-bytes"})
KV_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
AOT_VARIABLE = "VLLM_USE_AOT_COMPILE"


@dataclass(frozen=True)
class Host:
    """What the defaults depend on.

    is_cpu:           the installed vLLM is built for the CPU
    available_bytes:  memory that processes can still take
    no_compile:       why torch.compile cannot build C++ kernels here, or None where it can
    """

    is_cpu: bool
    available_bytes: int = 0
    no_compile: str | None = None

    @classmethod
    def this(cls) -> Host:
        if not cpu_metadata.is_cpu_build():
            return cls(is_cpu=False)
        return cls(True, available_memory(), why_no_compile())


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of memory that can be had without swapping; the kernel's own estimate."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo}: no MemAvailable line; Linux 3.14 or newer is needed")


def why_no_compile() -> str | None:
    """torch.compile on a CPU writes C++ that includes Python.h: both have to be there."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on PATH"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python.h is not installed"
    return None


def kv_cache_bytes(host: Host) -> int:
    """The size of the KV cache where nothing else decides it: a share of the free memory."""
    return host.available_bytes // _KV_CACHE_SHARE


def add_defaults(
    args: Sequence[str], host: Host, environ: Mapping[str, str], with_plugin: bool = True
) -> tuple[list[str], list[str]]:
    """vLLM's command line with the defaults added, and one sentence for each of them."""
    given = read_flags(args).keys()
    added: list[str] = []
    notes: list[str] = []
    if with_plugin and "--quantization" not in given:
        added += ["--quantization", "nvfp4"]
        notes.append("--quantization nvfp4: this command's default")
    if not host.is_cpu:
        return [*args, *added], notes
    if not given & KV_FLAGS and not environ.get(KV_VARIABLE):
        size = kv_cache_bytes(host)
        added += ["--kv-cache-memory-bytes", str(size)]
        notes.append(
            f"--kv-cache-memory-bytes {size}: a quarter of the {host.available_bytes / 2**30:.1f} "
            "GiB of memory that is available"
        )
    if host.no_compile and "--enforce-eager" not in given:
        added.append("--enforce-eager")
        notes.append(f"--enforce-eager: {host.no_compile}, so torch.compile cannot run")
    return [*args, *added], notes


def command_line(
    args: Sequence[str], environ: Mapping[str, str] | None = None, with_plugin: bool = True
) -> tuple[list[str], dict[str, str], list[str]]:
    """How to start vLLM's server: command, environment, and what was added to ``args`` and why.

    args:        what follows `vllm serve`
    with_plugin: False for vLLM as it is, to compare with: it then loads no plugin at all
    """
    child_environ = dict(os.environ if environ is None else environ)
    cpu_metadata.apply(child_environ)
    if not with_plugin:
        child_environ["VLLM_PLUGINS"] = ""
    this = Host.this()
    full, notes = add_defaults(args, this, child_environ, with_plugin)
    if this.is_cpu and AOT_VARIABLE not in child_environ:
        # vLLM saves an ahead-of-time artefact for the CPU and cannot load it: every start would
        # compile again. Without it torch's own cache of compiled code is used.
        child_environ[AOT_VARIABLE] = "0"
        notes.append(f"{AOT_VARIABLE}=0: so that later starts reuse what the first one compiled")
    return [sys.executable, "-m", MODULE, "serve", *full], child_environ, notes
