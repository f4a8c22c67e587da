# SPDX-License-Identifier: Apache-2.0
"""gpu_check.sh: how it reports its steps, that a call of it fits the time it is for, and that its
programs run to their end on the emulated GPU and fail where something is wrong."""

import importlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from vllm_nvfp4.kernels.cuda.devices import Device
from vllm_nvfp4.testing import first_checks, host_driver, kernel_cases
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STEPS = (
    "env", "install", "first", "kernels", "sanitizer", "gemm", "moe", "launch", "tiles",
    "checkpoint", "serving", "features",
)  # fmt: skip
_MIB = 1 << 20

# Stands in for the interpreter: says there is a GPU (or not), and ends each script with the status
# that the test wants.
FAKE_PYTHON = """#!/bin/bash
case "$1" in
  -) echo "$FAKE_GPU" ;;
  -c) [ "$2" = "import vllm" ] ;;
  *) name=$(basename "$1" .py); [ "$1" = -m ] && name=$2
     echo "$name ran"; [ -z "$FLOOD" ] || head -c 3000000 /dev/zero | tr '\\0' x
     var=STATUS_$name; exit ${!var:-0} ;;
esac
"""


@pytest.fixture
def gpu_check(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def run(*arguments, gpu="89 geforce-rtx-4090", script=None, **statuses):
        environment = os.environ | {"PYTHON": str(fake), "FAKE_GPU": gpu}
        environment |= {f"STATUS_{name}": str(status) for name, status in statuses.items()}
        for name in ("out", "work"):
            if f"--{name}" not in arguments:
                arguments += (f"--{name}", str(tmp_path / name))
        done = subprocess.run(
            ["bash", str(script or BENCHMARKS / "gpu_check.sh"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def table(stdout):
    """{step: state} of the summary."""
    lines = stdout[stdout.index("step  ") :].splitlines()[1:]
    rows = [line for line in lines if " s  " in line]
    return {row[:23].strip(): row[23:34].strip() for row in rows}


def test_dry_run_prints_a_command_for_every_step_and_runs_none(gpu_check, tmp_path):
    status, stdout, _ = gpu_check("--dry-run", "--bundle", "/bundle", gpu="")
    assert status == 0
    for step in STEPS:
        assert f"[{step}" in stdout
    assert "timeout" in stdout
    assert "[bundle]" in stdout
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_steps_are_not_run(gpu_check):
    status, stdout, _ = gpu_check("--steps", "kernels,gemm,launch", gpu="")
    assert status == 3
    assert table(stdout) == dict.fromkeys(("kernels", "gemm", "launch"), "not run")
    assert stdout.count("no CUDA GPU") == 6  # once as it happens, once in the table


def test_a_failed_step_does_not_stop_the_rest(gpu_check, tmp_path):
    status, stdout, _ = gpu_check(
        "--steps", "env,kernels,gemm,launch,checkpoint",
        check_kernels=1, bench_gemm=124, bench_launch=3,
    )  # fmt: skip
    assert status == 1
    assert table(stdout) == {
        "env": "passed",
        "kernels": "failed",
        "gemm": "timed out",
        "launch": "not run",
        "checkpoint": "passed",
    }
    assert "2 passed, 2 failed, 1 not run" in stdout
    assert (tmp_path / "out" / "summary.txt").read_text().count("\n") == 8
    assert (tmp_path / "out" / "kernels.log").read_text() == "check_kernels ran\n"


def test_all_passed(gpu_check):
    status, stdout, _ = gpu_check("--quick", "--steps", "env,install,kernels,gemm,launch")
    assert status == 0
    assert set(table(stdout).values()) == {"passed"}


def test_hopper_gets_the_stand_in_and_ada_does_not(gpu_check):
    for gpu, has_stand_in in (("90 h200", True), ("89 geforce-rtx-4090", False)):
        _, stdout, _ = gpu_check("--dry-run", "--steps", "gemm", gpu=gpu)
        assert ("--stand-in" in stdout) == has_stand_in


def test_serving_passes_flags_to_both_servers(gpu_check, tmp_path):
    checkpoint = tmp_path / "work" / "Qwen3-8B-random"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors.index.json").touch()
    _, stdout, _ = gpu_check(
        "--dry-run", "--steps", "serving", "--engine-arg", "attention_backend=TRITON_ATTN"
    )
    assert "vllm_nvfp4.cli.main bench" in stdout
    assert "-- --attention_backend=TRITON_ATTN" in stdout


def test_serving_says_what_it_lacks(gpu_check):
    status, stdout, _ = gpu_check("--steps", "serving")
    assert status == 3
    assert "the step checkpoint writes it" in stdout


@pytest.mark.parametrize(("status", "state"), [(0, "passed"), (1, "failed"), (3, "not run")])
def test_features_run_where_vllm_is(gpu_check, status, state):
    _, stdout, _ = gpu_check("--quick", "--steps", "features", check_features=status)
    assert table(stdout) == {"features": state}
    assert "check_features.py --only Prefix\\ caching --only Sleep\\ and\\ wake" in stdout
    _, stdout, _ = gpu_check("--steps", "features", gpu="")
    assert table(stdout) == {"features": "not run"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "unknown option --fast"),
        (["--steps", "env,speed"], "unknown step 'speed'; known: env,install"),
        (["--bundle", "/nowhere"], "no unpack.sh"),
        (["--model"], "--model needs a value"),
    ],
)
def test_gpu_check_refuses(gpu_check, arguments, message):
    status, _, stderr = gpu_check("--out", "o", "--work", "w", *arguments)
    assert status == 2
    assert message in stderr


# --- what a call of ten minutes takes ------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["--quick"], ["--call", "1"], ["--call", "2"], ["--call", "3"],
    ["--call", "1", "--bundle", "/b"], ["--call", "2", "--bundle", "/b"],
    ["--call", "3", "--bundle", "/b"],
], ids=" ".join)  # fmt: skip
def test_a_call_fits_ten_minutes_whatever_its_steps_take(gpu_check, arguments):
    _, stdout, _ = gpu_check("--dry-run", *arguments)
    seconds = [int(found) for found in re.findall(r"timeout (\d+)", stdout)]
    assert len(seconds) >= 5
    assert sum(seconds) <= 590


def test_the_three_calls_leave_no_gpu_step_out(gpu_check):
    begun = set()
    for arguments in (["1"], ["2"], ["3"], ["3", "--bundle", "/b"]):
        _, stdout, _ = gpu_check("--dry-run", "--call", *arguments)
        begun |= set(re.findall(r"^\[([\w-]+)\]", stdout, re.MULTILINE))
    checks = {f"sanitizer-{c}" for c in ("memcheck", "synccheck", "racecheck", "initcheck")}
    assert begun == {*STEPS, "bundle", *checks} - {"sanitizer", "features"}


def test_the_plan_and_the_first_page_name_what_comes_first(gpu_check):
    status, stdout, _ = gpu_check("--plan")
    assert status == 0
    order = ["env", "install", "first", "kernels", "sanitizer", "gemm", "launch", "tiles"]
    places = [stdout.index(f" {i}. {step}") for i, step in enumerate(order[:6], 1)]
    assert places == sorted(places)
    assert "FP8 subnormals" in stdout[places[2] : places[3]]
    assert stdout.count("--call") == 4


def test_the_sanitizer_sees_every_tensor_by_itself(gpu_check):
    """Inside a block of torch's caching allocator no access is out of bounds."""
    _, stdout, _ = gpu_check("--dry-run", "--steps", "sanitizer")
    lines = [line for line in stdout.splitlines() if "--tool" in line]
    assert len(lines) == 4
    assert all("env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer" in line for line in lines)


def test_results_come_back_small_and_in_few_files(gpu_check, tmp_path, monkeypatch):
    out = tmp_path / "back"
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("FLOOD", "1")
    status, _, _ = gpu_check("--steps", "env,first,kernels,gemm,moe,launch", "--out", str(out))
    assert status == 0
    assert {path.name for path in out.iterdir()} == {"summary.txt", "results.tar.gz"}
    with tarfile.open(out / "results.tar.gz") as archive:
        sizes = {Path(m.name).name: m.size for m in archive if m.isfile()}
    assert {f"{step}.log" for step in ("env", "first", "kernels")} < set(sizes)
    assert 600_000 < sizes["kernels.log"] < _MIB
    assert sum(sizes.values()) < 16 * _MIB


def test_a_step_that_leaves_no_outcome_has_failed(gpu_check, tmp_path):
    text = (BENCHMARKS / "gpu_check.sh").read_text()
    line = 'run launch "${program[@]}"'
    assert text.count(line) == 1
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    script = folder / "gpu_check.sh"
    script.write_text(text.replace(line, ": " + line))
    status, stdout, _ = gpu_check("--steps", "kernels,launch", script=script)
    assert status == 1
    assert table(stdout)["launch"] == "failed"
    assert "it left no outcome" in stdout


# --- on the emulated GPU -------------------------------------------------------------------------

ONLY = "nvfp4_gemm_w4a8_bf16_m64"


def test_the_programs_run_to_their_end_on_the_emulated_gpu(tmp_path):
    """The same script, programs and loops as on a GPU; compute-sanitizer checks nothing here."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/bash\n[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 2\n'
        '[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 2\nshift 4\nexec "$@"\n'
    )
    tool.chmod(0o755)
    steps = "env,first,kernels,sanitizer,gemm,moe,launch,tiles,checkpoint"
    command = ["bash", BENCHMARKS / "gpu_check.sh", "--emulate", "--quick", "--steps", steps]
    command += ["--only", ONLY, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHON": sys.executable, "PATH": path}
    environment.pop("OUT", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = steps.replace("sanitizer", "sanitizer-memcheck,sanitizer-synccheck").split(",")
    assert table(done.stdout) == dict.fromkeys(names, "passed")
    log = (tmp_path / "out" / "kernels.log").read_text()
    assert log.startswith("FP8 subnormals as MMA inputs")
    rows = (tmp_path / "out" / "gemm.csv").read_text()
    assert rows.count(",yes") == 2 * 2 * 4  # shapes, M and backends


@pytest.fixture
def check_kernels(monkeypatch):
    """run(only) -> the exit status of check_kernels.py on the emulated GPU, in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(only=ONLY):
        arguments = ["check_kernels.py", "--small", "--only", only]
        monkeypatch.setattr(sys, "argv", arguments)
        with emulated_gpu():
            return importlib.import_module("check_kernels").main()

    return run


@pytest.mark.parametrize(
    "only", [ONLY, "nvfp4_gemm_w4i8_bf16_m64", "nvfp4_moe_w4a8_bf16", "nvfp4_moe_w4i8_bf16"]
)
def test_a_sound_run_passes(check_kernels, capsys, only):
    """One kernel of each kind: those of the variant that is not in force are loaded too."""
    assert check_kernels(only) == 0
    assert ", 0 mismatches" in capsys.readouterr().out


def test_a_kernel_that_is_not_loaded_ends_the_run(check_kernels, monkeypatch):
    load = Device.load

    def load_but_one(self, wanted):
        load(self, [config for config in wanted if "f16_partials" not in config.symbol])

    monkeypatch.setattr(Device, "load", load_but_one)
    with pytest.raises(RuntimeError, match="f16_partials is not loaded"):
        check_kernels()


def test_a_reference_off_by_an_ulp_fails_the_run(check_kernels, monkeypatch, capsys):
    exact = first_checks.quantize_fp8_per_row

    def off(x):
        q, scale = exact(x)
        return q, scale.view(scale.dtype).nextafter(scale * 2)

    monkeypatch.setattr(first_checks, "quantize_fp8_per_row", off)
    assert check_kernels() == 1
    assert "MISMATCH quantiser of bf16 activations" in capsys.readouterr().out


def test_a_step_that_is_left_out_fails_the_run(check_kernels, monkeypatch, capsys):
    cases = kernel_cases.kernel_cases_of

    def without_one(config, shapes):
        return [] if config.block_m == 8 else cases(config, shapes)

    monkeypatch.setattr(kernel_cases, "kernel_cases_of", without_one)
    assert check_kernels("nvfp4_gemm_w4a16_bf16_m8n64") == 1
    assert "was never launched" in capsys.readouterr().out


def test_a_semaphore_left_at_1_fails_the_run(check_kernels, monkeypatch, capsys):
    run = host_driver.HostLibcuda._run

    def leave_one(self, symbol, grid, raw):
        run(self, symbol, grid, raw)
        next(iter(self._memory.values()))[400] = 1

    monkeypatch.setattr(host_driver.HostLibcuda, "_run", leave_one)
    assert check_kernels() == 1
    assert "1 bytes of the semaphores are not zero" in capsys.readouterr().out


@pytest.mark.trust
def test_every_kernel_and_a_real_feature_on_the_emulated_gpu(tmp_path):
    """All kernels, as `--emulate` alone has it, and a feature on vLLM's own CPU engine."""
    command = ["bash", BENCHMARKS / "gpu_check.sh", "--emulate", "--steps", "kernels,features"]
    command += ["--out", tmp_path / "out", "--work", tmp_path / "work"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
