# SPDX-License-Identifier: Apache-2.0
"""Where a kernel's machine code comes from: the wheel, else the cache on disk, else NVRTC.

:func:`prepare` is called while weights load and returns the cubins; nothing compiles after that.

The wheel:  vllm_nvfp4/cubins/sm_<arch>/<symbol>.cubin and manifest.json, written by
            :func:`build` when the wheel is built.
The cache:  <cache>/sm_<arch>/<key>.cubin, each file an ELF image followed by a trailer with its
            hash; the key covers source, included files, options, compiler version, architecture.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_nvfp4.kernels.cuda import nvrtc
from vllm_nvfp4.kernels.cuda.nvrtc import CompileError, KernelSource
from vllm_nvfp4.kernels.cuda.private_dir import is_private, make_private

# Under vLLM's logger, so that its handlers print it.
logger = logging.getLogger(f"vllm.{__name__}")

CACHE_DIR_ENV = "VLLM_NVFP4_CACHE_DIR"
BUILD_ARCHS = (80, 86, 89, 90, 120)

_TRAILER_MAGIC = b"vllm-nvfp4 sha256:"
_TRAILER_BYTES = len(_TRAILER_MAGIC) + 32
_TEMPORARY = ".tmp-"
_LEFTOVER_SECONDS = 3600.0  # writing takes milliseconds
_COMPILE_THREADS = 8
_COMPILE_SECONDS = 0.5  # one kernel, on one core; for the log line


def prepare(configs: Sequence[KernelSource], arch: int) -> dict[str, bytes]:
    """The cubin of every configuration for one architecture: {symbol: image}.

    arch: compute capability times ten
    Raises CompileError: nothing packaged and no compiler. A cache folder that others may write to,
    or that can't be written, is not used, and one log line says so.
    """
    unique = {config.symbol: config for config in configs}
    found = {symbol: _at_hand(config, arch) for symbol, config in unique.items()}
    missing = [unique[symbol] for symbol, image in found.items() if image is None]
    if missing:
        logger.info(
            "compiling %d kernels for sm_%d, about %d s; they are kept in %s",
            len(missing), arch, math.ceil(len(missing) * _COMPILE_SECONDS), cache_dir(),
        )  # fmt: skip
        with ThreadPoolExecutor(_COMPILE_THREADS) as pool:
            images = pool.map(functools.partial(_compile_and_keep, arch=arch), missing)
            found.update(zip((c.symbol for c in missing), images, strict=True))
    return {symbol: image for symbol, image in found.items() if image is not None}


def get_cubin(config: KernelSource, arch: int) -> bytes:
    """One kernel's cubin: packaged, cached or compiled now (and then cached)."""
    return prepare([config], arch)[config.symbol]


def _at_hand(config: KernelSource, arch: int) -> bytes | None:
    """The cubin if the wheel or the cache has it."""
    image = _packaged(config, arch)
    if image is None and (path := _cache_path(config, arch)) is not None:
        image = _read_cached(path)
    return image


def _compile_and_keep(config: KernelSource, arch: int) -> bytes:
    path = _cache_path(config, arch)
    if path is None:
        return nvrtc.compile_cubin(config, arch)  # without a compiler: says what to install
    # One process compiles, the others wait for it and read. Without a lock (a file system that
    # has none) they would all compile, and the atomic rename would still keep the file whole.
    with _locked(path.with_suffix(".lock")):
        image = _read_cached(path)
        if image is None:
            if path.exists():
                logger.warning("%s: corrupt; compiling %s again", path, config.symbol)
            image = nvrtc.compile_cubin(config, arch)
            _write_atomically(path, image + _trailer(image))
    return image


def source_key(config: KernelSource, arch: int) -> str:
    """sha256 over all that decides what the code computes: symbol, source, includes, options.

    The compiler's version is left out: a packaged cubin stays valid under another NVRTC.
    """
    content = [
        config.symbol,
        config.source,
        nvrtc.included_files(config.source),
        nvrtc.compile_options(arch),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- the wheel ---------------------------------------------------------------------------------


def packaged_dir() -> Path:
    return Path(__file__).resolve().parents[2] / "cubins"


def build(
    configs: Sequence[KernelSource], out: Path, archs: Sequence[int] = BUILD_ARCHS, jobs: int = 1
) -> int:
    """Compile every configuration for every architecture that can run it into a wheel's folder.

    out: the folder "cubins" of the package being built. Returns the number of cubins written.
    The same sources and compiler give the same bytes.
    """
    version = nvrtc.version_text(nvrtc.nvrtc_version())
    tasks = [(config, arch) for arch in archs for config in configs if arch >= config.min_arch]
    with ThreadPoolExecutor(jobs) as pool:
        images = list(pool.map(lambda task: nvrtc.compile_cubin(*task), tasks))
    manifests: dict[int, dict[str, dict[str, str]]] = {arch: {} for arch in archs}
    for (config, arch), image in zip(tasks, images, strict=True):
        folder = out / f"sm_{arch}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{config.symbol}.cubin").write_bytes(image)
        manifests[arch][config.symbol] = {
            "source": source_key(config, arch),
            "sha256": hashlib.sha256(image).hexdigest(),
        }
    for arch, entries in manifests.items():
        if entries:
            text = json.dumps({"nvrtc": version, "kernels": entries}, indent=1, sort_keys=True)
            (out / f"sm_{arch}" / "manifest.json").write_text(text + "\n")
    return len(tasks)


@functools.cache
def _manifest(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "manifest.json"
    return json.loads(path.read_text())["kernels"] if path.is_file() else {}


def _packaged(config: KernelSource, arch: int) -> bytes | None:
    folder = packaged_dir() / f"sm_{arch}"
    entry = _manifest(folder).get(config.symbol)
    # An entry of other sources is stale, not broken: someone edits csrc/ in an installed package.
    if entry is None or entry["source"] != source_key(config, arch):
        return None
    path = folder / f"{config.symbol}.cubin"
    image = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(image).hexdigest() != entry["sha256"]:
        raise CompileError(
            f"{path}: its content does not match the manifest, so the installation is damaged. "
            "Install vllm-nvfp4 again as it was installed, with --force-reinstall --no-deps"
        )
    return image


# --- the cache ---------------------------------------------------------------------------------


def use_cache_dir(folder: str) -> None:
    """Keep compiled kernels here, whatever the environment says: the option ``cache_dir``."""
    global _chosen_dir
    _chosen_dir = Path(folder).expanduser()


_chosen_dir: Path | None = None


def cache_dir() -> Path:
    """:func:`use_cache_dir`'s, else $VLLM_NVFP4_CACHE_DIR, else $XDG_CACHE_HOME/vllm_nvfp4, else
    ~/.cache/vllm_nvfp4."""
    if _chosen_dir is not None:
        return _chosen_dir
    if chosen := os.environ.get(CACHE_DIR_ENV):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm_nvfp4"


def _cache_path(config: KernelSource, arch: int) -> Path | None:
    """The file of a kernel in the cache; None without a compiler, or a folder to write to."""
    version = nvrtc.nvrtc_version()
    folder = _open_cache_dir(arch) if version is not None else None
    if folder is None or version is None:
        return None
    return folder / f"{_cache_key(config, arch, version)}.cubin"


def _open_cache_dir(arch: int) -> Path | None:
    """The cache folder of one architecture; None (and one log line) where it can't be used."""
    folder = cache_dir() / f"sm_{arch}"
    for path in (folder.parent, folder):
        if obstacle := make_private(path):
            _warn_uncached(path, obstacle)
            return None
    return folder


@functools.cache
def _warn_uncached(folder: Path, reason: str) -> None:
    logger.warning(
        "kernel cache %s is not used: %s; kernels are compiled in every process. "
        "Set %s to a folder of your own",
        folder, reason, CACHE_DIR_ENV,
    )  # fmt: skip


def _cache_key(config: KernelSource, arch: int, version: tuple[int, int]) -> str:
    return hashlib.sha256(f"{source_key(config, arch)} nvrtc {version}".encode()).hexdigest()


def _trailer(image: bytes) -> bytes:
    return _TRAILER_MAGIC + hashlib.sha256(image).digest()


def _read_cached(path: Path) -> bytes | None:
    """The image of a cache file; None if there is none, its hash does not match or it is not this
    user's alone."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            if not is_private(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:  # none, a link, or not readable
        return None
    image = content[:-_TRAILER_BYTES]
    return image if image and content[len(image) :] == _trailer(image) else None


def _write_atomically(path: Path, content: bytes) -> None:
    # mkstemp makes the file 0600; the rename is atomic within one folder.
    _remove_leftovers(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove_leftovers(folder: Path) -> None:
    """What processes that were killed while they wrote have left."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with contextlib.suppress(OSError):  # ENOLCK on some network file systems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
