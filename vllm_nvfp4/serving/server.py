# SPDX-License-Identifier: Apache-2.0
"""A vLLM server as a child: started, waited for, stopped with every process it made."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from vllm_nvfp4.serving import host, interrupts
from vllm_nvfp4.serving.launch import PREFIX, USAGE_STATUS
from vllm_nvfp4.serving.phases import phase_of
from vllm_nvfp4.serving.progress import step

_STOP_SECONDS = 20.0
_KILL_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_LOG_PREFIX = re.compile(r"^(\(\w+[^)]*\) )?(?P<level>[A-Z]+) [\d-]+ [\d:.]+ (\[[^]]*\] )?")

_EXCEPTION = re.compile(r"([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception): ")


class ServerError(OSError):
    """The server ended before it answered; the message carries its own last words."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    # If this process is killed outright, no handler runs; the kernel then ends the server.
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def group_members(group: int) -> list[int]:
    """The processes of a group that run; one that has ended and waits for its parent does not."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid pgrp ...; the name may hold spaces and brackets.
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def group_is_alive(group: int) -> bool:
    return bool(group_members(group))


def first_error(log: str) -> str:
    """The first exception of a server's log, which later ones only pass on; else its last lines.

    vLLM repeats the level before each line of a message: an exception that it only warns of, and
    then goes on, is not why it ended.
    """
    found = log.splitlines()
    prefixes = [_LOG_PREFIX.match(line) for line in found]
    lines = [_LOG_PREFIX.sub("", line) for line in found]
    for index, (prefix, line) in enumerate(zip(prefixes, lines, strict=True)):
        if (prefix is None or prefix["level"] in ("ERROR", "CRITICAL")) and _EXCEPTION.match(line):
            # Pydantic puts what was wrong on the two lines below.
            more = lines[index + 1 : index + 3] if "validation error" in line else []
            return "\n  ".join([line, *more])
    said = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    return said[-1] if said else "\n  ".join(lines[-5:])


class Server:
    """``vllm serve`` with this project's defaults, as a context manager.

    args:        what follows ``vllm serve``, without host and port
    log:         the file that receives everything the server prints
    environ:     its environment; default this process's
    with_plugin: see :func:`~vllm_nvfp4.serving.host.command_line`
    """

    def __init__(
        self,
        args: Sequence[str],
        log: Path,
        environ: Mapping[str, str] | None = None,
        with_plugin: bool = True,
    ) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command, self.environ, self.notes = host.command_line(
            [*args, "--host", "127.0.0.1", "--port", str(self.port)], environ, with_plugin
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log.open("wb") as out, interrupts.held():
                # A session of its own: Ctrl-C in the terminal reaches this process alone, which
                # then stops the server in order.
                self._process = subprocess.Popen(
                    self.command,
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
        except KeyboardInterrupt:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def processes(self) -> list[int]:
        """The ids of the server's processes; none where it does not run."""
        return group_members(self._process.pid) if self._process else []

    def wait_ready(self, out: TextIO | None = None, timeout: float = 1800.0) -> None:
        """Return once the server answers; until then a progress line names the phase.

        Raises ServerError if it ends first, TimeoutError after ``timeout`` seconds.
        """
        assert self._process is not None
        with step("Starting the server", out or sys.stdout) as progress:
            while not self._answers():
                if self._process.poll() is not None:
                    raise ServerError(self._why_it_ended(self._process.returncode))
                if progress.seconds > timeout:
                    raise TimeoutError(f"the server did not answer in {timeout:.0f} s: {self.log}")
                progress.detail = phase_of(self.log.read_text(errors="replace"))
                time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _why_it_ended(self, status: int) -> str:
        text = self.log.read_text(errors="replace")
        if status == USAGE_STATUS and PREFIX in text:
            return text.rpartition(PREFIX)[2].strip()
        return f"the server ended with status {status}:\n  {first_error(text)}\n  (log: {self.log})"

    def stop(self) -> None:
        """End the server and everything it started; return when nothing of it is left."""
        process, self._process = self._process, None
        if process is None:
            return
        # SIGINT lets vLLM shut its workers down in order; what is stuck then is killed.
        for number, seconds in ((signal.SIGINT, _STOP_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            self._signal(process.pid, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if process.poll() is not None and not group_is_alive(process.pid):
                    return
                time.sleep(0.1)

    @staticmethod
    def _signal(group: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
