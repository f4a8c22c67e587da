# SPDX-License-Identifier: Apache-2.0
"""Chat against a server of the OpenAI API that answers with what it was asked."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from vllm_nvfp4.cli import chat, main
from vllm_nvfp4.testing.checkpoints import extract_fixture

MODEL = "echo"


class EchoHandler(http.server.BaseHTTPRequestHandler):
    """Streams, word by word, how many messages it got and the last one."""

    requests: list[dict]

    def do_GET(self):
        self._reply(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(request)
        question = request["messages"][-1]["content"]
        if question == "fail":
            self.send_error(400, "refused")
            return
        words = f"{len(request['messages'])} {question}".split(" ")
        pieces = [words[0], *(f" {word}" for word in words[1:])]
        events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
        data = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self._reply(data + "data: [DONE]\n\n", "text/event-stream")

    def _reply(self, text: str, kind: str = "application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def echo():
    """The URL of a running echo server, and the requests it got."""
    requests: list[dict] = []
    handler = type("Handler", (EchoHandler,), {"requests": requests})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def typing(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Have input() return these lines, raise these exceptions, and then the end of the input."""
    left = iter([*lines, EOFError])

    def read(prompt: str = "") -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_one_prompt(echo, capsys):
    url, requests = echo
    args = ["chat", "--url", url, "--prompt", "hello you", "--max-tokens", "7", "--system", "be"]
    assert main.main(args) == 0
    assert capsys.readouterr().out == "2 hello you\n"
    [request] = requests
    assert request["model"] == MODEL
    assert request["max_tokens"] == 7
    assert request["messages"][0] == {"role": "system", "content": "be"}
    assert "temperature" not in request


def test_history_reset_and_quit(echo, monkeypatch, capsys):
    url, requests = echo
    typing(monkeypatch, "one", "two", "", "/help", "/reset", "three", "/quit", "never")
    assert main.main(["chat", MODEL, "--url", f"{url}/v1"]) == 0
    out = capsys.readouterr().out
    assert "1 one\n3 two\n" in out
    assert "1 three\n" in out
    assert "never" not in out
    assert requests[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1 one"},
        {"role": "user", "content": "two"},
    ]


def test_interrupts_and_end_of_input_are_clean(echo, monkeypatch, capsys):
    url, _ = echo
    typing(monkeypatch, KeyboardInterrupt, "one")
    assert main.main(["chat", "--url", url]) == 0
    assert "1 one\n" in capsys.readouterr().out


def test_a_stopped_answer_leaves_no_trace(echo, monkeypatch, capsys):
    url, requests = echo
    whole = chat.Conversation.ask

    def stop_in_the_middle(self, question):
        pieces = whole(self, question)
        yield next(pieces)
        if question == "long":
            pieces.close()
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(chat.Conversation, "ask", stop_in_the_middle)
    typing(monkeypatch, "long", "next")
    assert main.main(["chat", "--url", url]) == 0
    assert "(stopped)" in capsys.readouterr().out
    assert requests[-1]["messages"] == [{"role": "user", "content": "next"}]


def test_a_refusal_does_not_end_the_conversation(echo, monkeypatch, capsys):
    url, requests = echo
    typing(monkeypatch, "fail", "next")
    assert main.main(["chat", "--url", url]) == 0
    assert "(the server refused: " in capsys.readouterr().out
    assert requests[-1]["messages"] == [{"role": "user", "content": "next"}]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chat"], "give a MODEL"),
        (["chat", "m", "--url", "http://127.0.0.1:9"], "is a vLLM server running there?"),
        (["chat", "m", "--url", "http://127.0.0.1:9", "--", "--x"], "flags after --"),
    ],
    ids=str,
)
def test_what_cannot_work_says_so(args, words, capsys):
    assert main.main(args) == 1
    assert words in capsys.readouterr().err


def test_a_model_that_is_not_served_is_named_with_those_that_are(echo, capsys):
    assert main.main(["chat", "other", "--url", echo[0], "--prompt", "x"]) == 1
    assert f"does not serve other; it serves {MODEL}" in capsys.readouterr().err


def test_a_server_started_for_the_chat_gets_the_flags(echo, monkeypatch, capsys, tmp_path):
    started = []

    class FakeServer:
        notes = ("--quantization nvfp4: this command's default",)

        def __init__(self, args, log):
            started.append(args)
            self.url, self.log = echo[0], log
            log.write_text("")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            started.append("stopped")

        def wait_ready(self, out):
            started.append("ready")

    monkeypatch.setattr(chat, "Server", FakeServer)
    folder = str(extract_fixture("modelopt/w4a16-llama", tmp_path))
    args = ["chat", folder, "--prompt", "hi", "--", "--max-model-len", "64"]
    assert main.main(args) == 0
    assert started == [[folder, "--max-model-len", "64"], "ready", "stopped"]
    captured = capsys.readouterr()
    assert captured.out == "1 hi\n"
    assert "default" in captured.err
