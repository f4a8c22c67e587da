# SPDX-License-Identifier: Apache-2.0
"""Every code block of README.md and docs/ works: it is run on the CPU, or, where a comment before
it says why it cannot be, its command lines are read by the programs' own parsers.

MODEL is a tiny 16-bit model here, served once for all blocks that ask a server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import BLOCKS, COMMANDS, KINDS, MARKS, ROOT, Block

from vllm_nvfp4.cli import main
from vllm_nvfp4.serving import launch
from vllm_nvfp4.serving.host import command_line
from vllm_nvfp4.serving.server import Server
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.long

_PORT = "localhost:8000"
_SERVE = ["vllm-nvfp4", "serve", "MODEL"]
# Programs of the system that a block may call; what else it calls is checked below.
_SYSTEM = ("python3", "cd", ".", "git", "rm", "docker")
_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
# A tiny model has room for less than a real one, and its engine is not to be compiled.
_SMALLER = {
    "quantize": ["--samples", "2", "--sample-length", "64"],
    "chat": ["--max-tokens", "8"],
}
_ENGINE = 'quantization="nvfp4", enforce_eager=True, max_model_len=256, max_num_seqs=4'


def ids(value: object) -> str | None:
    return str(value) if isinstance(value, Block) else None


def test_every_block_is_of_a_known_kind_and_mark():
    for block in BLOCKS:
        assert block.kind in KINDS, f"{block}: {block.kind!r}"
        assert set(block.marks) <= set(MARKS), f"{block}: {block.marks}"
    assert all(set(b.marks) & {"docker"} for b in BLOCKS if b.kind == "dockerfile")


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=ids)
def test_every_command_line_is_read_by_its_own_parser(block: Block, words: list[str]):
    parsers = {
        "vllm-nvfp4": read_own,
        "make": read_make,
        "pip": read_pip,
        "python": read_python,
        "curl": read_curl,
        "vllm": lambda words: None,  # all at once, below
    }
    program = words[0]
    if program in parsers:
        parsers[program](words)
    elif program.startswith("benchmarks/"):
        assert os.access(ROOT / program, os.X_OK)
    else:
        assert program in _SYSTEM, words


def read_own(words: list[str]) -> None:
    parser, _ = main.build_parser([words[1]])
    own = words[1 : words.index("--")] if "--" in words else words[1:]
    assert parser.parse_args(own).command == words[1]


def read_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), words
    variables = {word.partition("=")[0] for word in words[2:]}
    assert all(f"$({name})" in makefile for name in variables), words


def read_pip(words: list[str]) -> None:
    from pip._internal.commands import create_command

    create_command(words[1]).parse_args(words[2:])
    text = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra


def read_python(words: list[str]) -> None:
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words
    else:
        assert (ROOT / words[1]).is_file(), words


def read_curl(words: list[str]) -> None:
    assert words[1].startswith(f"http://{_PORT}/")
    if "-d" in words:
        json.loads(words[words.index("-d") + 1])


@pytest.mark.vllm
def test_flags_that_are_vllms_are_read_by_vllm():
    """Of `vllm serve`, of the commands that hand flags on, and of the image's entry point."""
    served = []
    for _, words in COMMANDS:
        if words[:2] == ["vllm", "serve"] or words[:2] == ["vllm-nvfp4", "serve"]:
            served.append(words[2:])
        elif words[:2] == ["docker", "run"]:
            served.append(words[words.index("vllm-nvfp4") + 1 :])
        elif words[0] == "vllm-nvfp4" and "--" in words:
            served.append(["MODEL", *words[words.index("--") + 1 :]])
    assert ["nvidia/Qwen3-8B-NVFP4", "--quantization", "nvfp4"] in served
    launch.check_flags(served, command_line(["MODEL"])[1])


def test_the_dockerfile_installs_what_the_extra_cuda_asks_for():
    """Beside vLLM itself, which the image has, and NVML, which only reads a power meter."""
    [block] = [b for b in BLOCKS if b.kind == "dockerfile"]
    lines = block.text.splitlines()
    assert [line.split()[0] for line in lines] == ["FROM", "COPY", "RUN"]
    found = re.search(r"^cuda = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    asked = {r for r in json.loads(found[1]) if not r.startswith(("vllm", "nvidia-ml-py"))}
    assert asked <= set(shlex.split(lines[2]))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the blocks name: MODEL and BF16, 16-bit; texts.txt."""
    folder = tmp_path_factory.mktemp("place")
    model = write_model(folder / "MODEL", "llama")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": _TEMPLATE})
    )
    (folder / "BF16").symlink_to(model)
    (folder / "texts.txt").write_text("Water boils at a hundred degrees.\n" * 40)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


@pytest.fixture(scope="module")
def server(place) -> Iterator[Server]:
    """`vllm-nvfp4 serve MODEL`, as its block has it, and small."""
    flags = ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(2**27)]
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    with Server([str(place / "MODEL"), *flags], place / "server.log", environ) as running:
        running.wait_ready(sys.stderr)
        yield running


def runs_here(block: Block) -> bool:
    return not block.marks and block.kind in ("sh", "python")


@pytest.mark.vllm
@pytest.mark.parametrize("block", filter(runs_here, BLOCKS), ids=str)
def test_the_block_runs(block: Block, place: Path, monkeypatch, request):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if block.kind == "python":
        run_script(block, place)
        return
    for words in block.commands():
        shutil.rmtree(place / "OUT", ignore_errors=True)
        if _PORT in " ".join(words) or words == _SERVE:
            running = request.getfixturevalue("server")
            words = [word.replace(f"http://{_PORT}", running.url) for word in words]
        run_command(words)


def run_command(words: list[str]) -> None:
    if words[:3] == _SERVE:
        return  # the server that answers the others' questions
    if words[0] == "vllm-nvfp4":
        assert main.main([*words[1:], *_SMALLER.get(words[1], [])]) == 0, words
        return
    flags = ["--fail-with-body", "-sS"] if words[0] == "curl" else []
    done = subprocess.run([words[0], *flags, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout, done.stderr)


def run_script(block: Block, place: Path) -> None:
    """As a file of its own, which vLLM's engine process imports again."""
    script = place / "script.py"
    script.write_text(block.text.replace('quantization="nvfp4"', _ENGINE))
    environ = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    shutil.rmtree(place / "NVFP4", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=place, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
