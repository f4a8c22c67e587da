# SPDX-License-Identifier: Apache-2.0
"""The way from source to machine code: compile, cache, package. Risks: stale, corrupt, racing."""

import hashlib
import logging
import multiprocessing
import os
from dataclasses import dataclass

import pytest
from cache_storm import ARCH, KERNELS, storm

from vllm_nvfp4.kernels.cuda import cubins, nvrtc

ELF = b"\x7fELF"


@dataclass(frozen=True)
class Kernel:
    """A kernel of three lines; the delivery code sees of a real one only these attributes."""

    symbol: str = "add_one"
    body: str = "x[threadIdx.x] += 1;"
    threads: int = 32
    smem_bytes: int = 0
    min_arch: int = 80

    @property
    def source(self) -> str:
        return (
            f'#include <cuda_bf16.h>\nextern "C" __global__ void {self.symbol}(float* x) '
            f"{{ {self.body} }}\n"
        )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no cubins in the package."""
    monkeypatch.setenv(cubins.CACHE_DIR_ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(cubins, "packaged_dir", lambda: tmp_path / "packaged")
    cubins._manifest.cache_clear()
    cubins._warn_uncached.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """The symbols compiled so far."""
    seen = []
    compile_cubin = nvrtc.compile_cubin

    def recording(config, arch):
        seen.append(config.symbol)
        return compile_cubin(config, arch)

    monkeypatch.setattr(nvrtc, "compile_cubin", recording)
    return seen


@pytest.fixture
def log():
    """The messages logged, as a list that a test may clear."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = cubins.logger.level
    cubins.logger.addHandler(handler)
    cubins.logger.setLevel(logging.INFO)
    yield messages
    cubins.logger.removeHandler(handler)
    cubins.logger.setLevel(level)


def cache_files(cache):
    return sorted(cache.rglob("*.cubin"))


# --- NVRTC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", cubins.BUILD_ARCHS)
def test_compiles_without_a_gpu(arch):
    image = nvrtc.compile_cubin(Kernel(), arch)
    assert image.startswith(ELF)
    assert b"add_one" in image


def test_below_the_kernels_architecture():
    with pytest.raises(nvrtc.CompileError, match=r"add_one: asked for sm_86.* needs sm_89"):
        nvrtc.compile_cubin(Kernel(min_arch=89), 86)


def test_a_compiler_error_names_kernel_and_line():
    with pytest.raises(nvrtc.CompileError, match=r'broken: NVRTC[\s\S]*"nope" is undefined'):
        nvrtc.compile_cubin(Kernel("broken", "nope();"), 89)


@pytest.mark.parametrize("version", [None, (12, 6)])
def test_no_or_old_nvrtc_says_what_to_install(version, monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: version)
    with pytest.raises(nvrtc.CompileError, match=r"needs NVRTC 13\.0.*pip install"):
        nvrtc.compile_cubin(Kernel(), 89)


def test_included_files_are_found_recursively(tmp_path):
    (tmp_path / "a.cuh").write_text('#pragma once\n#include "b.cuh"\n#include "host/c.h"\n')
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "c.h").write_text("")  # the emulator's; not in a wheel
    (tmp_path / "b.cuh").write_text('#include <cuda_fp16.h>\n#include "a.cuh"\n')
    found = nvrtc.included_files('  #  include "a.cuh"\nint x;', tmp_path)
    assert list(found) == ["a.cuh", "b.cuh"]


# --- the cache -----------------------------------------------------------------------------------


def test_second_time_comes_from_the_cache(cache, compilations):
    first = cubins.get_cubin(Kernel(), 89)
    second = cubins.get_cubin(Kernel(), 89)
    assert first == second
    assert first.startswith(ELF)
    assert compilations == ["add_one"]


def test_cache_is_owner_only(cache):
    cubins.get_cubin(Kernel(), 89)
    for path in [cache, *cache.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_no_temporary_files_stay(cache):
    cubins.get_cubin(Kernel(), 89)
    assert {p.suffix for p in (cache / "sm_89").iterdir()} == {".cubin", ".lock"}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_corrupt_entry_is_rebuilt_with_one_line(damage, cache, compilations, log):
    image = cubins.get_cubin(Kernel(), 89)
    (path,) = cache_files(cache)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    other = nvrtc.compile_cubin(Kernel("other"), 89)
    path.write_bytes(
        {
            "truncated": path.read_bytes()[:-7],
            "flipped": bytes(content),
            "empty": b"",
            "foreign": other,  # a good cubin, but not one that this cache wrote
        }[damage]
    )
    compilations.clear()
    log.clear()
    assert cubins.get_cubin(Kernel(), 89) == image
    assert compilations == ["add_one"]
    assert [line for line in log if "corrupt;" in line] == [
        f"{path}: corrupt; compiling add_one again"
    ]
    assert cubins.get_cubin(Kernel(), 89) == image
    assert compilations == ["add_one"]


def test_everything_that_matters_is_in_the_key(cache, compilations, monkeypatch):
    cubins.get_cubin(Kernel(), 89)
    cubins.get_cubin(Kernel(body="x[threadIdx.x] += 2;"), 89)
    cubins.get_cubin(Kernel(), 90)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "nvrtc_version", lambda: (13, 99))
        cubins.get_cubin(Kernel(), 89)
    with monkeypatch.context() as patch:
        options = nvrtc.compile_options
        patch.setattr(nvrtc, "compile_options", lambda arch: options(arch) | {"lineinfo": True})
        cubins.get_cubin(Kernel(), 89)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "included_files", lambda source: {"ptx.cuh": "changed"})
        cubins.get_cubin(Kernel(), 89)
    assert len(compilations) == 6
    assert len(cache_files(cache)) == 6


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("name", ["", "sm_89"])
def test_a_folder_that_others_can_write_is_not_used(cache, compilations, log, mode, name):
    image = cubins.get_cubin(Kernel(), 89)
    (cache / name).chmod(mode)
    log.clear()
    assert cubins.get_cubin(Kernel(), 89) == cubins.get_cubin(Kernel(), 89) == image
    assert len(compilations) == 3
    (line,) = [line for line in log if "not used" in line]
    assert f"others may write to it (mode {mode:o}, needs 700)" in line
    assert cubins.CACHE_DIR_ENV in line


def test_a_folder_of_another_user_is_not_used(cache, compilations, log, monkeypatch):
    cubins.get_cubin(Kernel(), 89)
    user = cache.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: user + 1)
    cubins.get_cubin(Kernel(), 89)
    assert len(compilations) == 2
    assert [line for line in log if f"it belongs to user {user}, this process runs as" in line]


@pytest.mark.parametrize("kind", ["writable by others", "a link"])
def test_an_entry_that_others_can_write_is_rebuilt(cache, compilations, kind):
    image = cubins.get_cubin(Kernel(), 89)
    (path,) = cache_files(cache)
    if kind == "a link":
        path.rename(cache / "elsewhere")
        path.symlink_to(cache / "elsewhere")
    else:
        path.chmod(0o666)
    assert cubins.get_cubin(Kernel(), 89) == image
    assert len(compilations) == 2
    assert path.lstat().st_mode == 0o100600


def test_what_killed_processes_left_is_removed(cache):
    cubins.get_cubin(Kernel(), 89)
    old, new = (cache / "sm_89" / f".tmp-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cubins.get_cubin(Kernel("b"), 89)
    assert not old.exists()
    assert new.exists()


def test_an_unwritable_cache_compiles_and_says_so_once(cache, tmp_path, monkeypatch, log):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv(cubins.CACHE_DIR_ENV, str(blocker))
    assert cubins.get_cubin(Kernel(), 89) == cubins.get_cubin(Kernel(), 89)
    assert len([line for line in log if cubins.CACHE_DIR_ENV in line]) == 1


def test_the_option_wins_over_the_environment(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cubins, "_chosen_dir", None)
    cubins.use_cache_dir(str(tmp_path / "chosen"))
    cubins.get_cubin(Kernel(), 89)
    assert cache_files(tmp_path / "chosen")
    assert not cache.exists()


def test_compiling_is_announced_once_and_only_when_it_happens(cache, log):
    kernels = [Kernel(), Kernel("b")]
    cubins.prepare(kernels, 89)
    assert log == [f"compiling 2 kernels for sm_89, about 1 s; they are kept in {cache}"]
    log.clear()
    cubins.prepare(kernels, 89)
    assert log == []


def test_prepare_gives_every_symbol_once(compilations):
    kernels = [Kernel(), Kernel("b"), Kernel()]
    images = cubins.prepare(kernels, 89)
    assert list(images) == ["add_one", "b"]
    assert sorted(compilations) == ["add_one", "b"]
    assert all(symbol.encode() in image for symbol, image in images.items())
    assert cubins.prepare([], 89) == {}


def race(start, results):
    """One of twenty: wait for the start, get the cubin, report its hash and whether it compiled."""
    compiled = []
    compile_cubin = nvrtc.compile_cubin
    nvrtc.compile_cubin = lambda *args: compiled.append(1) or compile_cubin(*args)
    start.wait()
    image = cubins.get_cubin(Kernel(), 89)
    results.put((hashlib.sha256(image).hexdigest(), len(compiled)))


def test_twenty_processes_at_once(cache):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(20), context.Queue()
    racers = [context.Process(target=race, args=(start, results)) for _ in range(20)]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    expected = hashlib.sha256(nvrtc.compile_cubin(Kernel(), 89)).hexdigest()
    assert {image for image, _ in outcomes} == {expected}
    assert sum(compiled for _, compiled in outcomes) == 1
    assert len(cache_files(cache)) == 1


# --- the wheel's cubins --------------------------------------------------------------------------


def test_packaged_cubins_come_first(tmp_path, cache, compilations):
    kernels = [Kernel(), Kernel("needs_ada", min_arch=89)]
    assert cubins.build(kernels, tmp_path / "packaged", (86, 89)) == 3
    compilations.clear()
    images = cubins.prepare(kernels, 89)
    assert compilations == []
    assert not cache.exists()
    assert images["add_one"] == (tmp_path / "packaged/sm_89/add_one.cubin").read_bytes()


def test_packaged_cubins_need_no_compiler(tmp_path, monkeypatch):
    cubins.build([Kernel()], tmp_path / "packaged", (89,))
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: None)
    assert cubins.get_cubin(Kernel(), 89).startswith(ELF)
    with pytest.raises(nvrtc.CompileError, match="found none"):
        cubins.get_cubin(Kernel(), 90)


def test_a_packaged_cubin_of_other_sources_is_not_used(tmp_path, compilations):
    cubins.build([Kernel()], tmp_path / "packaged", (89,))
    compilations.clear()
    cubins.get_cubin(Kernel(body="x[0] = 0;"), 89)
    assert compilations == ["add_one"]


def test_a_damaged_package_is_an_error(tmp_path):
    cubins.build([Kernel()], tmp_path / "packaged", (89,))
    path = tmp_path / "packaged/sm_89/add_one.cubin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        nvrtc.CompileError, match=r"add_one\.cubin: .*manifest.*Install vllm-nvfp4 again"
    ):
        cubins.get_cubin(Kernel(), 89)


def test_building_twice_gives_the_same_bytes(tmp_path):
    trees = []
    for name in ("one", "two"):
        cubins.build([Kernel(), Kernel("b")], tmp_path / name, (89,), jobs=2)
        trees.append(
            {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        )
    assert trees[0] == trees[1]
    assert len(trees[0]) == 3


def test_processes_that_are_killed_at_random(tmp_path, cache):
    """A sample of tests/trust/test_kernel_cache.py."""
    found = storm(tmp_path, num_processes=4, num_kills=10, num_loads=40)
    assert found.wrong == 0
    assert found.loads > 40
    for kernel in KERNELS:
        assert cubins.get_cubin(kernel, ARCH) == nvrtc.compile_cubin(kernel, ARCH)
