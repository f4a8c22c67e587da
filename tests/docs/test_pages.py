# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/ say nothing that is not there: paths, links, modules, options, messages,
tables. Their code blocks are the business of test_blocks.py."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from pages import BLOCKS, COMMANDS, PAGES, ROOT, prose_of, quoted_in

from vllm_nvfp4.cli import main

README = ROOT / "README.md"
MOST_LINES = 150
# Written in backquotes like paths of this repository, and files of a checkpoint, a run or a clone.
_ELSEWHERE = {
    "config.json",
    "hf_quant_config.json",
    "bench.json",
    "report.html",
    "texts.txt",
    "nvidia/Qwen3-8B-NVFP4",
    ".venv/bin/",
}
PARTS = (
    "docs_options.py",
    "docs_quality.py",
    "docs_bench.py",
    "docs_models.py",
    "docs_architectures.py",
)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text()))
    assert linked == {f"docs/{page.name}" for page in PAGES if page.parent == ROOT / "docs"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", prose_of(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for path in filter(looks_like_path, quoted_in(page)):
        assert (ROOT / path).exists(), path


def looks_like_path(text: str) -> bool:
    return text not in _ELSEWHERE and bool(
        re.fullmatch(r"\.?[\w.-]+(/[\w.-]*)+|[\w.-]+\.(py|sh|md|toml|yaml|in|txt)|LICENSE", text)
    )


def test_paths_are_found_in_the_text():
    found = {text for page in PAGES for text in quoted_in(page) if looks_like_path(text)}
    assert {"LICENSE", "csrc/", ".ci/run", "requirements/pins.in", "scripts/lock.sh"} <= found


def commands_in_prose(program: str) -> list[list[str]]:
    texts = [text for page in PAGES for text in quoted_in(page)]
    return [shlex.split(text) for text in texts if text.startswith(f"{program} ")]


def test_commands_in_running_text_parse():
    found = commands_in_prose("vllm-nvfp4")
    assert found
    for words in found:
        if words[1] in main.command_names() and len(words) > 2:
            parser, _ = main.build_parser([words[1]])
            assert parser.parse_args(words[1:]).command == words[1]
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in commands_in_prose("make")} <= targets
    for words in commands_in_prose("python"):
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]), words


def test_every_subcommand_is_shown():
    shown = {words[1] for _, words in COMMANDS if words[0] == "vllm-nvfp4"}
    assert shown >= set(main.command_names())


def test_flags_that_comments_mention_exist():
    """Beside a command: ``vllm-nvfp4 chat MODEL   # without --prompt a conversation``."""
    for block in BLOCKS:
        for command, comment in re.findall(
            r"^vllm-nvfp4 (\w+) .*# (.*--.*)$", block.text, re.MULTILINE
        ):
            parser, _ = main.build_parser([command])
            [commands] = [a for a in parser._actions if isinstance(a.choices, dict)]
            known = commands.choices[command]._option_string_actions
            assert set(re.findall(r"--[\w-]+", comment)) <= set(known), (command, comment)


@pytest.mark.parametrize("script", PARTS)
def test_parts_that_scripts_write_are_current(script: str):
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_part_that_a_script_writes_is_checked():
    named = {
        name for page in PAGES for name in re.findall(r"scripts/(docs_\w+\.py)", prose_of(page))
    }
    # The captures come from runs of minutes.
    assert named == {*PARTS, "docs_commands.py"}


def test_captures_fit_a_terminal_of_80_columns():
    captures = [b for b in BLOCKS if b.page.name == "commands.md"]
    commands = {"doctor", "inspect", "plan", "quantize", "quality", "bench"}
    assert {b.text.split()[2] for b in captures} == commands
    for block in captures:
        _, *printed = block.text.splitlines()
        # A command to copy stays in one line, whatever its length.
        wide = [line for line in printed if len(line) > 80 and not line.startswith("again: ")]
        assert not wide, block


def test_the_picture_is_what_plan_draws(tmp_path):
    """The numbers and labels; strokes depend on matplotlib's release."""
    [command] = [
        words
        for words in commands_in_prose("vllm-nvfp4")
        if "--plot-format" in words and "Qwen3-14B" in words
    ]
    command[command.index("DIR")] = str(tmp_path)
    assert main.main(command[1:]) == 0
    committed = ROOT / "docs" / "pictures" / "memory.svg"
    assert texts_of(tmp_path / "memory.svg") == texts_of(committed)
    # Readable on a dark page too: it brings its own white ground.
    assert 'style="fill: #ffffff"' in committed.read_text()


def texts_of(picture: Path) -> list[str]:
    return re.findall(r">([^<>]+)</(?:text|tspan)>", picture.read_text())


@cache
def messages() -> list[str]:
    """Every string of the package, the set-up and, where it is installed, vLLM; "…" for what is
    put in."""
    found = []
    folders = [ROOT / "vllm_nvfp4", ROOT / "scripts"]
    spec = importlib.util.find_spec("vllm")
    if spec and spec.submodule_search_locations:
        vllm = Path(spec.submodule_search_locations[0])
        folders += [vllm / "v1" / "core", vllm / "v1" / "worker", vllm / "config"]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found.append(str(metadata.PackageNotFoundError("vllm")))
    return found


def failures() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^### `(.*)`$", page, re.MULTILINE)


def test_ten_failures_are_explained():
    assert len(failures()) >= 10


@pytest.mark.parametrize("failure", failures())
def test_a_failure_is_named_by_the_message_that_the_code_has(failure: str):
    pieces = [re.escape(piece.strip()) for piece in failure.split("…") if piece.strip()]
    pattern = re.compile(r"[\s\S]*?".join(pieces))
    assert any(pattern.search(message) for message in messages())


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
