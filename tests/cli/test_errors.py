# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong: one line, at once, by every command, and never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_nvfp4.checkpoints import hub
from vllm_nvfp4.cli import main
from vllm_nvfp4.compat import flags, packages
from vllm_nvfp4.serving import arguments, launch
from vllm_nvfp4.testing.checkpoints import extract_fixture

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_cpu"
AT_ONCE_SECONDS = 10.0

# Command lines with something wrong, and what the answer has to say. Every command has one.
WRONG = [
    ("serve ./nofolder", "no such folder"),
    ("serve nofolder/", "no such folder"),
    ("serve MODEL --port 99999", "--port 99999"),
    ("serve MODEL --port http", "--port http"),
    ("serve MODEL --config none.yaml", "none.yaml: no such file"),
    ("serve MODEL --ssl-keyfile none.pem", "none.pem: no such file"),
    ("serve MODEL --additional-config {lm_head", "needs JSON"),
    ('serve MODEL --additional-config {"nvfp4":{"lm_tail":1}}', "unknown option 'lm_tail'"),
    ("serve LATIN1", "a folder with config.json"),
    ("chat ./nofolder", "no such folder"),
    ("chat --url localhost:8000", "http://localhost:8000"),
    ("chat MODEL --max-tokens none", "found 'none'"),
    ("chat MODEL --temperature -1", "0 or more"),
    ("quantize ./nofolder -o OUT", "no such folder"),
    ("quantize MODEL -o MODEL", "exists"),
    ("quantize MODEL -o LATIN1/out", "is a file, not a folder"),
    ("quantize MODEL -o OUT --method gptq --calibration none.txt", "none.txt: no such file"),
    ("quantize MODEL -o OUT --method gptq --calibration LATIN1", "needs plain UTF-8 text"),
    ("quantize MODEL -o OUT --method gptq --calibration EMPTY", "is empty"),
    ("quantize MODEL -o OUT --samples few", "found 'few'"),
    ("quality ./nofolder", "no such folder"),
    ("quality MODEL --text none.txt", "none.txt: no such file"),
    ("quality MODEL --text LATIN1", "needs plain UTF-8 text"),
    ("quality MODEL --window-length 7", "8 or more"),
    ("quality MODEL --limit 3", "--limit is about --tasks"),
    ("bench ./nofolder", "no such folder"),
    ("bench MODEL --batches 1,x", "found 'x'"),
    ("bench MODEL --out LATIN1/out", "is a file, not a folder"),
    ("bench MODEL --against other", "unknown"),
    ("plan ./nofolder", "no such folder"),
    ("plan Qwen3-8B --context 16q", "found '16q'"),
    ("plan Qwen3-8B --gpu none", "unknown"),
    ("plan Qwen3-8B --plot LATIN1", "is a file, not a folder"),
    ("inspect ./nofolder", "no such folder"),
    ("inspect LATIN1", "a folder with config.json"),
    ("check ./nofolder", "no such folder"),
    ("check LATIN1", "a folder with config.json"),
    ("report ./nofolder", "bench.json"),
    ("report RESULTS --out LATIN1/page.html", "is a file, not a folder"),
    ("doctor --gpu", "unrecognized arguments"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the command lines name, in an empty working directory without a hub."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n")
    model = extract_fixture("modelopt/w4a16-llama", tmp_path)
    return {
        "MODEL": str(model),
        "OUT": str(tmp_path / "out"),
        "LATIN1": str(tmp_path / "latin1.txt"),
        "EMPTY": str(tmp_path / "empty.txt"),
        "RESULTS": str(RESULTS),
    }


def run_here(line: str, folder: dict[str, str]) -> int:
    words = []
    for word in line.split():
        name, slash, rest = word.partition("/")
        words.append(folder.get(name, name) + slash + rest)
    try:
        return main.main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line for line, _ in WRONG])
def test_one_line_at_once(line: str, said: str, folder, capsys, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *call: pytest.fail("vLLM was started"))
    begin = time.monotonic()
    assert run_here(line, folder) in (1, 2)
    assert time.monotonic() - begin < AT_ONCE_SECONDS
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert errors.startswith("vllm-nvfp4")
    assert errors.count("\n") == 1, errors


def test_every_command_has_a_wrong_line():
    assert {line.split()[0] for line, _ in WRONG} == set(main.command_names())


def test_no_converter_shows_its_own_name():
    """argparse names the function where one raises ValueError: "invalid _positive value"."""
    parser, _ = main.build_parser(main.command_names())
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for name, command in commands.choices.items():
        for action in command._actions:
            if action.type in (None, Path):
                continue
            # int, with its choices, is told apart by those.
            if action.type is int and action.choices:
                continue
            with pytest.raises(argparse.ArgumentTypeError):
                action.type("a word")
            assert action.option_strings, name


def test_a_port_in_use(folder, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        line = f"serve MODEL --host 127.0.0.1 --port {port}"
        assert run_here(line, folder) == 1
    assert f"--port {port} cannot be used on 127.0.0.1" in capsys.readouterr().err


def test_a_name_without_a_network_is_answered_within_ten_seconds(folder, capsys, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    code = (
        "import sys; from vllm_nvfp4.cli import main\n"
        "sys.exit(main.main(['serve', 'nobody/no-such-model']))"
    )
    # A hub that takes the connection and says nothing.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub_at = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_ENDPOINT": hub_at, "HF_HUB_OFFLINE": "0"},
        )
    assert time.monotonic() - begin < hub.HUB_SECONDS + AT_ONCE_SECONDS / 2
    assert result.returncode == 1
    assert f"{hub_at} (HF_ENDPOINT)" in result.stderr
    assert "hf download nobody/no-such-model" in result.stderr
    assert "Traceback" not in result.stderr


def test_offline_names_the_variable_that_says_so(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_here("serve nobody/no-such-model", folder) == 1
    assert "HF_HUB_OFFLINE=1 forbids" in capsys.readouterr().err


def test_options_name_the_variable_that_they_came_from(folder, capsys, monkeypatch):
    for command in ("serve MODEL", "inspect MODEL"):
        monkeypatch.setenv("VLLM_NVFP4_LM_HEAD", "fp7")
        assert run_here(command, folder) == 1
        assert "VLLM_NVFP4_LM_HEAD is 'fp7'; needs one of" in capsys.readouterr().err
    assert run_here("doctor", folder) == 1
    assert "VLLM_NVFP4_LM_HEAD is 'fp7'" in capsys.readouterr().out


def test_a_folder_nearby_is_offered(folder, capsys):
    Path("Qwen3-8B-NVFP4").mkdir()
    assert run_here("inspect ./Qwen3-8B-NVPF4", folder) == 1
    assert "Did you mean Qwen3-8B-NVFP4?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report", str(RESULTS)], ["plan", "Qwen3-8B", "--plot", "p"]])
def test_a_closed_pipe_ends_quietly_with_the_work_done(command, tmp_path: Path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-m", "vllm_nvfp4.cli.main", *command],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (0, "")
    written = tmp_path / ("report.html" if command[0] == "report" else "p/memory.png")
    assert written.stat().st_size > 1000


def test_install_hints_name_what_an_index_has():
    """Not this project's own extras, which only a clone has."""
    for extra in ("cuda", "cpu", "tasks", "pictures"):
        hint = packages.install_hint(extra)
        assert hint.startswith("pip install '")
        assert "vllm-nvfp4" not in hint
    sources = [p for p in (ROOT / "vllm_nvfp4").rglob("*.py") if p.name != "packages.py"]
    assert not [p for p in sources if "vllm-nvfp4[" in p.read_text()]


def vllm_like_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm")
    serve = parser.add_subparsers(dest="command").add_parser("serve")
    serve.add_argument("model_tag", nargs="?")
    serve.add_argument("--enforce-eager", action="store_true")
    serve.add_argument("--max-model-len", type=int)
    return parser


@pytest.mark.vllm
def test_vllms_own_parser_answers_in_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = [["m", "--enforce-eager"], ["m", "--enforce-eagr"]]
    with pytest.raises(ValueError, match="no flag --enforce-eagr; did you mean --enforce-eager"):
        launch.check_flags(commands, dict(os.environ))
    with pytest.raises(ValueError, match="--max-model-len") as refused:
        launch.check_flags([["m", "--max-model-len", "long"]], dict(os.environ))
    assert len(str(refused.value).splitlines()) == 1
    assert "usage:" not in str(refused.value)
    # From now on the names are known without vLLM.
    monkeypatch.setattr(launch.subprocess, "run", None)
    with pytest.raises(flags.FlagError, match="did you mean --enforce-eager"):
        arguments.check(["m", "--enforce-eagr"])


def test_kept_names_take_what_argparse_takes(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags.check_names(["m", "--nothing-is-kept-yet"])
    flags.keep_flags(vllm_like_parser())
    flags.check_names(["m", "--max_model_len", "5", "--enforce", "--max-model-len.x=3", "-O3"])
    with pytest.raises(flags.FlagError, match="no flag --max-model-length; did you mean --max-mod"):
        flags.check_names(["m", "--max-model-length", "5"])


def test_errors_of_vllm_in_one_line():
    pydantic = pytest.importorskip("pydantic")

    class Config(pydantic.BaseModel):
        size: int

    with pytest.raises(pydantic.ValidationError) as wrong:
        Config(size="x")
    assert launch.message_of(wrong.value).startswith("Input should be a valid integer")
    assert launch.message_of(ValueError("two\nlines")) == "two lines"
    assert launch.message_of(RuntimeError("x")) == "RuntimeError: x"
    assert launch.message_of(AssertionError()) == "AssertionError"


def test_flags_of_a_command_line_and_its_file(tmp_path: Path):
    path = tmp_path / "serve.yaml"
    path.write_text("port: 9\nadditional_config: {nvfp4: {lm_head: fp8}}\n")
    assert arguments.read_flags([]) == {}
    found = arguments.read_flags(["m", "--config", str(path), "--port=7", "-q", "fp8", "--x"])
    assert found["--port"] == "7"
    assert found["--quantization"] == "fp8"
    assert json.loads(found["--additional-config"]) == {"nvfp4": {"lm_head": "fp8"}}
    path.write_text("a: [\n")
    with pytest.raises(ValueError, match="not YAML"):
        arguments.read_flags(["--config", str(path)])
