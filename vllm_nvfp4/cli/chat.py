# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 chat MODEL``: talk to a model, on a running server or one started for it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vllm_nvfp4.cli._arguments import number, whole
from vllm_nvfp4.serving import arguments
from vllm_nvfp4.serving.server import Server

TAKES_AFTER_DASHES = True
_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model. Without --url a server is started, and stopped at the end.",
        epilog="Flags after -- go to vLLM: vllm-nvfp4 chat MODEL -- --max-model-len 4096",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a folder or a hub name; with --url the server's first model unless it is given",
    )
    parser.add_argument("--url", help="a running server, such as http://localhost:8000")
    parser.add_argument("--prompt", help="ask this one question, print the answer and end")
    parser.add_argument("--system", help="system message of the conversation")
    parser.add_argument("--max-tokens", type=whole(), help="longest answer, in tokens")
    parser.add_argument(
        "--temperature",
        type=number(),
        help="0 for the likeliest word each time (default: the model's own)",
    )


class Conversation:
    """The messages so far. An answer that was stopped or failed leaves no trace of its question."""

    def __init__(self, client: Any, model: str, system: str | None, **sampling: Any) -> None:
        self.client, self.model = client, model
        self.sampling = {name: value for name, value in sampling.items() if value is not None}
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece."""
        messages = [*self.messages, {"role": "user", "content": question}]
        stream = self.client.chat.completions.create(
            model=self.model, messages=messages, stream=True, **self.sampling
        )
        answer = ""
        with contextlib.closing(stream):
            for event in stream:
                if event.choices and (piece := event.choices[0].delta.content):
                    answer += piece
                    yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def _print_answer(conversation: Conversation, question: str, out: TextIO) -> None:
    for piece in conversation.ask(question):
        print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)


def talk(conversation: Conversation, out: TextIO) -> None:
    """Read questions and print answers until /quit or the end of the input."""
    from openai import OpenAIError

    print(f"{conversation.model}: {_HELP}", file=out)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print(file=out)
            continue
        if question in ("/quit", "/exit"):
            return
        if question == "/reset":
            conversation.reset()
            print("(forgotten)", file=out)
        elif question.startswith("/"):
            print(_HELP, file=out)
        elif question:
            try:
                _print_answer(conversation, question, out)
            except KeyboardInterrupt:
                print("\n(stopped)", file=out)
            except OpenAIError as error:
                print(f"(the server refused: {error})", file=out)


def _converse(args: argparse.Namespace, url: str) -> int:
    from openai import OpenAI, OpenAIError

    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    # vLLM asks for no key; OPENAI_API_KEY must not travel to a server that is not OpenAI's.
    client = OpenAI(base_url=base, api_key="none", max_retries=0)
    try:
        served = [model.id for model in client.models.list()]
        model = args.model if args.url and args.model else served[0]
        if model not in served:
            raise ValueError(f"{url} does not serve {model}; it serves {', '.join(served)}")
        conversation = Conversation(
            client, model, args.system, max_tokens=args.max_tokens, temperature=args.temperature
        )
        if args.prompt is not None:
            _print_answer(conversation, args.prompt, sys.stdout)
        else:
            # Line editing and a history of the questions for input().
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401
            talk(conversation, sys.stdout)
    except OpenAIError as error:
        raise OSError(f"{url}: {error}; is a vLLM server running there?") from error
    return 0


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong before a server is started or asked."""
    from importlib.util import find_spec
    from urllib.parse import urlsplit

    if find_spec("openai") is None:
        raise ValueError("talking to a server needs the package openai: pip install openai")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty; give a question in quotes")
    if not args.url:
        return
    address = urlsplit(args.url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"--url {args.url}: needs an address such as http://localhost:8000")


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.url:
        if args.after_dashes:
            raise ValueError("flags after -- are for a server that chat starts; --url names one")
        return _converse(args, args.url)
    if not args.model:
        raise ValueError("give a MODEL (folder or name), or --url of a running server")
    arguments.check([args.model, *args.after_dashes], with_port=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = Path(tempfile.mkdtemp(prefix="vllm-nvfp4-chat-")) / "server.log"
    with Server([args.model, *args.after_dashes], log) as server:
        for note in server.notes:
            print(f"vllm-nvfp4: {note}", file=sys.stderr)
        server.wait_ready(out=sys.stderr)
        status = _converse(args, server.url)
    log.unlink()
    log.parent.rmdir()
    return status
