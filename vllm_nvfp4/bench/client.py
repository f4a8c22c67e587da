# SPDX-License-Identifier: Apache-2.0
"""vLLM's own ``vllm bench serve`` as a child that is imported once and measures many times.

The child runs this module: a line of JSON in, a line of JSON out. What vLLM prints goes to its log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from vllm_nvfp4.serving.server import first_error
from vllm_nvfp4.testing import machine

_STOP_SECONDS = 10.0
# Larger than the caches of any CPU, so that reading it is reading memory.
_BANDWIDTH_BYTES = 1 << 30
_BANDWIDTH_PASSES = 5


class ClientError(OSError):
    """The benchmark could not be run; the message says why and where its log is."""


class Client:
    """The child, as a context manager.

    log:     the file that receives what vLLM's benchmark prints
    environ: its environment, as of a vLLM server
    """

    def __init__(self, log: Path, environ: Mapping[str, str]) -> None:
        self.log = log
        self._environ = environ
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Client:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            # A session of its own: Ctrl-C reaches the command alone, which then ends this.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                env=dict(self._environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # The end of its input ends an idle child; one that measures is killed with what it began.
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(0 if error else _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout:
            process.stdout.close()

    def serve(self, flags: Sequence[str]) -> tuple[dict[str, Any], float]:
        """``vllm bench serve FLAGS``: (its result as vLLM would save it, when it ended).

        The time is that of ``time.monotonic``; the load began ``result["duration"]`` before it.
        Raises ClientError where vLLM's benchmark fails or requests did.
        """
        answer = self._ask({"do": "serve", "flags": list(flags)})
        result = answer["result"]
        if result.get("failed") or not result.get("completed"):
            raise ClientError(
                f"{result.get('failed', 0)} of {result['num_prompts']} requests failed; "
                f"the server's log and {self.log} say why"
            )
        return result, answer["ended"]

    def memory_bandwidth(self) -> float:
        """Bytes per second that all of this machine's cores read from memory, GB/s."""
        return self._ask({"do": "bandwidth"})["gbps"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            why = first_error(self.log.read_text(errors="replace"))
            raise ClientError(f"vLLM's benchmark ended: {why}\n  (log: {self.log})")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(f"vLLM's benchmark: {answer['error']} (log: {self.log})")
        return answer


def _serve(flags: list[str]) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    result = serve.main(parser.parse_args(flags))
    ended = time.monotonic()
    # Lists have a value per request or token: their percentiles are kept. Strings name what was
    # asked for, and more digits than six are noise.
    kept = {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in result.items()
        if isinstance(value, (int, float))
    }
    return {"result": kept, "ended": ended}


def _bandwidth() -> dict[str, Any]:
    """Each core reads its part of a buffer beyond the caches; the best of some passes.

    gbps = sum over cores of bytes / seconds of CPU time: time in which others had the core does not
    count, so that a busy machine has no lower limit than an idle one.
    """
    import torch

    cores = machine.num_cores()
    parts = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.int32).chunk(cores)

    def read(part: torch.Tensor) -> float:
        torch.set_num_threads(1)
        begin = time.thread_time()
        part.max()
        return part.nbytes / (time.thread_time() - begin)

    with ThreadPoolExecutor(cores) as pool:
        passes = [sum(pool.map(read, parts)) for _ in range(_BANDWIDTH_PASSES)]
    return {"gbps": max(passes) / 1e9}


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        return _bandwidth() if question["do"] == "bandwidth" else _serve(question["flags"])
    except SystemExit:
        return {"error": f"it does not take {' '.join(question.get('flags', []))}"}
    except Exception as error:  # whatever it is, the parent decides what becomes of the run
        return {"error": f"{type(error).__name__}: {error}"}


def _child(questions: TextIO) -> None:
    # File descriptor 1 becomes the log, so that no print of vLLM gets between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in questions:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _child(sys.stdin)
