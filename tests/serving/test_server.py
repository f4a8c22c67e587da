# SPDX-License-Identifier: Apache-2.0
"""The server as a child: waited for, explained when it ends, stopped without leaving a process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from vllm_nvfp4.serving import host, progress
from vllm_nvfp4.serving import server as serving
from vllm_nvfp4.serving.server import Server, ServerError, first_error, group_is_alive
from vllm_nvfp4.testing.tiny_models import write_model

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# A child of the server that a polite signal does not end, as a stuck worker would be.
STUBBORN = """
import signal, subprocess, sys, time
if "child" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("child ready", flush=True)
else:
    subprocess.Popen([sys.executable, __file__, "child"])
time.sleep(600)
"""

FAILING = """
import sys
print("(EngineCore pid=7) INFO 11-24 10:00:00 [core.py:1] loading")
print("(EngineCore pid=7) ERROR 11-24 10:00:01 [core.py:2] Traceback (most recent call last):")
print("(EngineCore pid=7) ERROR 11-24 10:00:01 [core.py:2] ValueError: a.safetensors: truncated")
print("RuntimeError: Engine core initialization failed. See root cause above.")
sys.exit(3)
"""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Make a Server whose command is a script in place of vLLM."""

    def make(code: str) -> Server:
        script = tmp_path / "script.py"
        script.write_text(code)
        monkeypatch.setattr(
            host,
            "command_line",
            lambda args, *_: ([sys.executable, str(script), *args], dict(os.environ), []),
        )
        return Server(["model"], tmp_path / "logs" / "server.log")

    return make


def test_ready_server_answers_and_stops(start):
    out = io.StringIO()
    with start(HEALTHY) as server:
        group = server._process.pid
        server.wait_ready(out)
        assert group_is_alive(group)
    assert not group_is_alive(group)
    assert out.getvalue().startswith("==> Starting the server\n")


def test_a_child_that_ignores_signals_is_ended(start, monkeypatch):
    monkeypatch.setattr(serving, "_STOP_SECONDS", 0.5)
    with start(STUBBORN) as server:
        group = server._process.pid
        while "child ready" not in server.log.read_text():
            time.sleep(0.05)
    assert not group_is_alive(group)


def test_an_exception_stops_the_server(start):
    groups = []

    def interrupted():
        with start(HEALTHY) as server:
            groups.append(server._process.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not group_is_alive(groups[0])


def test_a_server_that_ends_says_why(start):
    with start(FAILING) as server, pytest.raises(ServerError) as ended:
        server.wait_ready(io.StringIO())
    message = str(ended.value)
    assert "status 3" in message
    assert "\n  ValueError: a.safetensors: truncated\n" in message
    assert str(server.log) in message


def test_a_server_that_never_answers_is_given_up(start):
    with start("import time; time.sleep(600)") as server, pytest.raises(TimeoutError, match="0 s"):
        server.wait_ready(io.StringIO(), timeout=0.1)


def test_killed_parent_takes_the_server_along(tmp_path: Path):
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from vllm_nvfp4.serving import server as serving\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "serving.host.command_line = lambda args, *_: (child, dict(os.environ), [])\n"
        "with serving.Server([], Path(sys.argv[1])) as server:\n"
        "    print(server._process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        group = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while group_is_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_is_alive(group)


def test_first_error_keeps_what_pydantic_found():
    log = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, K=4090 is not a multiple of 16\n"
        "    For further information visit a page\n"
        "RuntimeError: later\n"
    )
    assert "K=4090" in first_error(log)
    assert "later" not in first_error(log)


def test_first_error_is_no_warning_that_mentions_one():
    log = "WARNING 11-24 10:00:00 [a.py:1] can cause errors like `OSError: [Errno 24]`\nlast\n"
    assert first_error(log).endswith("last")


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_first_error_is_no_traceback_that_the_server_went_on_after(level):
    prefix = f"(EngineCore pid=7) {level} 11-24 10:00:00 [a.py:1]"
    warned = f"{prefix} Traceback (most recent call last):\n{prefix} ImportError: no flash\n"
    ended = warned.replace(level, "ERROR").replace("ImportError: no flash", "OSError: no memory")
    assert first_error(warned + ended + "RuntimeError: later\n") == "OSError: no memory"
    assert first_error(warned + "ValueError: bare\n") == "ValueError: bare"
    assert first_error(warned + "last\n").endswith("ImportError: no flash\n  last")


def test_progress_line_for_what_takes_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.02)
    out = io.StringIO()
    with progress.step("Working", out) as shown:
        shown.detail = "x" * 200
        while "Working ..." not in out.getvalue():
            time.sleep(0.01)
    first, beat, *_, last = out.getvalue().splitlines()
    assert first == "==> Working"
    assert beat.startswith("    Working ... 0 s")
    assert len(beat) < 120
    assert last.startswith("    done in ")


def test_no_done_after_a_failure():
    out = io.StringIO()
    with pytest.raises(ValueError, match="broken"), progress.step("Working", out):
        raise ValueError("broken")
    assert "done" not in out.getvalue()


@pytest.mark.vllm
def test_vllms_own_server_quantises_answers_and_leaves_nothing(tmp_path: Path):
    folder = write_model(tmp_path / "model", "llama")
    flags = ["--skip-tokenizer-init", "--max-model-len", "64", "--enforce-eager"]
    if host.Host.this().is_cpu:
        flags += ["--kv-cache-memory-bytes", str(2**26)]
    with Server([str(folder), *flags], tmp_path / "log") as server:
        group = server._process.pid
        server.wait_ready(io.StringIO())
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        try:
            answer = client.completions.create(
                model=str(folder),
                prompt=[5, 6, 7],
                max_tokens=4,
                extra_body={"detokenize": False, "return_token_ids": True, "ignore_eos": True},
            )
        except openai.APIError:
            print(server.log.read_text())
            raise
    assert answer.usage.completion_tokens == 4
    log = server.log.read_text()
    assert "nvfp4: 16-bit layers, quantised to nvfp4 while loading" in log
    assert not group_is_alive(group)


AT_THE_FORK = """
import os, pathlib, signal, sys
from vllm_nvfp4.serving.server import Server

signal.signal(signal.SIGINT, signal.default_int_handler)
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
server = Server(["m"], pathlib.Path(sys.argv[1]))
try:
    with server:
        print("goes on")
except KeyboardInterrupt:
    print("interrupted", server.processes())
"""


def test_ctrl_c_at_the_fork_is_not_lost(tmp_path):
    """Python ignores what is raised there; the server that was started is ended."""
    command = [sys.executable, "-c", AT_THE_FORK, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "interrupted []\n", done.stderr
