# SPDX-License-Identifier: Apache-2.0
"""README.md says nothing that is not there: commands, flags, paths, imports, options."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_nvfp4.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.splitlines()
    if line.strip() and not line.lstrip().startswith(("export ", "#"))
]
# Written in backquotes in running text: `make demo`, `csrc/`, `python -m ...`.
QUOTED = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S))
# Things in backquotes that look like paths of this repository, and are files of a checkpoint.
_CHECKPOINT_FILES = {"config.json", "hf_quant_config.json"}


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands_of(program: str) -> list[list[str]]:
    quoted = [shlex.split(text) for text in QUOTED if text.startswith(f"{program} ")]
    return [command for command in [*COMMANDS, *quoted] if command[0] == program]


def test_the_two_commands_are_there():
    assert {"demo", "test"} <= {command[1] for command in commands_of("make")} & make_targets()


@pytest.mark.parametrize("command", commands_of("make"), ids=" ".join)
def test_make_targets_exist(command: list[str]):
    assert command[1] in make_targets()
    variables = {word.partition("=")[0] for word in command[2:]}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"$({name})" in makefile for name in variables)


@pytest.mark.parametrize("command", commands_of("vllm-nvfp4"), ids=" ".join)
def test_subcommands_parse(command: list[str]):
    parser, _ = main.build_parser([command[1]])
    own = command[1 : command.index("--")] if "--" in command else command[1:]
    assert parser.parse_args(own).command == command[1]


def test_every_subcommand_is_shown():
    assert {command[1] for command in commands_of("vllm-nvfp4")} >= set(main.command_names())


def test_flags_of_subcommands_exist():
    """Flags that comments beside a command mention."""
    for line in re.findall(r"^vllm-nvfp4 (\w+) .*# (.*--.*)$", README, re.MULTILINE):
        result = subprocess.run(
            [sys.executable, "-m", "vllm_nvfp4.cli.main", line[0], "--help"],
            capture_output=True,
            text=True,
        )
        for flag in re.findall(r"--[\w-]+", line[1]):
            assert flag in result.stdout, (line, flag)


def test_the_other_programs_are_known():
    programs = {command[0] for command in COMMANDS}
    assert programs == {"make", "pip", "vllm", "vllm-nvfp4"}
    for command in commands_of("vllm"):
        assert command in (
            ["vllm", "serve", "MODEL", "--quantization", "nvfp4"],
            ["vllm", "serve"],
        )


def test_extras_exist():
    text = (ROOT / "pyproject.toml").read_text()
    for command in commands_of("pip"):
        for extra in re.findall(r"\[(\w+)\]", " ".join(command)):
            assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra


def looks_like_path(text: str) -> bool:
    return text not in _CHECKPOINT_FILES and bool(
        re.fullmatch(r"\.?[\w.-]+(/[\w.-]*)+|[\w.-]+\.(py|sh|md|toml|yaml|in|txt)|LICENSE", text)
    )


PATHS = [text for text in QUOTED if looks_like_path(text)]


@pytest.mark.parametrize("path", [*PATHS, *re.findall(r"tests/\w+\.py", README)])
def test_paths_exist(path: str):
    assert (ROOT / path).exists()


def test_paths_are_found_in_the_text():
    assert {"LICENSE", "csrc/", ".ci/run", "requirements/pins.in", "scripts/lock.sh"} <= set(PATHS)


def test_modules_of_commands_exist():
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert modules
    for module in modules:
        importlib.import_module(module)


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_python_imports_exist(code: str):
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        if node.module == "vllm":  # importing the engine takes longer than all of this file
            assert importlib.util.find_spec("vllm")
            continue
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("script", ["readme_options.py", "readme_quality.py", "readme_bench.py"])
def test_tables_are_current(script):
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_source_file_names_its_licence():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    kinds = (".py", ".sh", ".cuh", ".cu", ".h", ".cpp", ".c", ".toml", ".yaml", ".in")
    missing = [
        name
        for name in tracked.splitlines()
        if name.endswith(kinds)
        and (ROOT / name).is_file()
        and "SPDX-License-Identifier: Apache-2.0" not in (ROOT / name).read_text()[:400]
    ]
    assert missing == []
