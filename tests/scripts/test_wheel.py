# SPDX-License-Identifier: Apache-2.0
"""What the wheel holds: pure Python, the kernel sources, cubins where they were asked for."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "sm89_nvfp4_gemm_w4a8_bf16_*"
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
PARTS = ("vllm_nvfp4", "csrc", "pyproject.toml", "setup.py", "LICENSE", "README.md")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the wheel is built from: setuptools writes build/ and *.egg-info beside it."""
    target = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "cubins")
            )
        elif (ROOT / part).is_file():
            shutil.copy(ROOT / part, target)
    return target


def build(source, out, **settings):
    """Build a wheel as an installer does, without a network; returns its path and the log.

    build/ stays from one call to the next, as it does in a checkout.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NVFP4_BUILD")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", *OFFLINE, "-w", str(out), str(source)],
        env=environment | {"SOURCE_DATE_EPOCH": "1700000000"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    (wheel,) = out.glob("*.whl")
    return wheel, log


@pytest.fixture(scope="module")
def wheel_with_cubins(source, tmp_path_factory):
    settings = {"NVFP4_BUILD_CUBINS": "89", "NVFP4_BUILD_KERNELS": KERNEL}
    return build(source, tmp_path_factory.mktemp("with"), **settings)[0]


def test_without_cubins_it_is_pure_python_with_the_kernel_sources(
    source, wheel_with_cubins, tmp_path
):
    wheel, log = build(source, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "csrc").glob("*.cuh"):
        assert f"vllm_nvfp4/csrc/{path.name}" in names
    for path in (ROOT / "vllm_nvfp4").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names, "not listed in pyproject.toml's packages"
    assert not [n for n in names if "cubin" in n.rpartition("/")[2] and not n.endswith(".py")]
    assert not [n for n in names if n.startswith(("tests", "csrc", "benchmarks"))]
    assert log.count("a wheel without cubins (NVFP4_BUILD_CUBINS=1 builds them in)") == 1


def test_cubins_are_in_the_wheel_and_match_its_manifest(wheel_with_cubins):
    assert wheel_with_cubins.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel_with_cubins)
    folder = "vllm_nvfp4/cubins/sm_89"
    manifest = json.loads(archive.read(f"{folder}/manifest.json"))["kernels"]
    found = [n for n in archive.namelist() if n.endswith(".cubin")]
    assert sorted(found) == sorted(f"{folder}/{symbol}.cubin" for symbol in manifest)
    assert manifest
    for symbol, entry in manifest.items():
        image = archive.read(f"{folder}/{symbol}.cubin")
        assert image.startswith(b"\x7fELF")
        assert hashlib.sha256(image).hexdigest() == entry["sha256"]


def test_the_installed_package_uses_its_cubins_without_a_compiler(wheel_with_cubins, tmp_path):
    zipfile.ZipFile(wheel_with_cubins).extractall(tmp_path)
    script = (
        "from vllm_nvfp4.kernels.cuda import configs, cubins, nvrtc\n"
        "nvrtc.nvrtc_version = lambda: None\n"
        "chosen = [c for c in configs.GEMM_CONFIGS"
        " if c.symbol.startswith('sm89_nvfp4_gemm_w4a8_bf16')]\n"
        "print(len(cubins.prepare(chosen, 89)), cubins.packaged_dir())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, folder = done.stdout.split()
    assert int(count) > 0
    assert folder == str(tmp_path / "vllm_nvfp4" / "cubins")


def test_building_again_gives_the_same_file(source, wheel_with_cubins, tmp_path):
    settings = {"NVFP4_BUILD_CUBINS": "89", "NVFP4_BUILD_KERNELS": KERNEL}
    again, _ = build(source, tmp_path, **settings)
    assert again.read_bytes() == wheel_with_cubins.read_bytes()


def test_an_editable_build_compiles_nothing(source, tmp_path):
    script = (
        f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=source,
        env=os.environ | {"NVFP4_BUILD_CUBINS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cubins for" not in done.stdout
    assert not list(source.glob("vllm_nvfp4/cubins"))
    (wheel,) = tmp_path.glob("*.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".cubin")]


def test_a_wrong_setting_is_refused(source):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "build/refused"],
        cwd=source,
        env=os.environ | {"NVFP4_BUILD_CUBINS": "ada"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "NVFP4_BUILD_CUBINS=ada: needs 0, 1 or architectures such as 89,90" in done.stderr
