# SPDX-License-Identifier: Apache-2.0
"""Processes that run fuzz cases: one that dies or hangs costs its case alone, and is replaced."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple

import fuzz_worker
from fuzz_files import Files

# A case takes about 10 ms. On a machine that does other work too it may wait for its turn.
HANG_SECONDS = 60.0


class Outcome(NamedTuple):
    """What a case ended as: "accepted", "refused" or "fault", and the text for it."""

    kind: str
    text: str


class Worker:
    """One process, started at its first case."""

    def __init__(self, plant: str = "") -> None:
        self._plant = plant
        self._process: Any = None
        self._connection: Connection | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.seeds: dict[str, Files] = {}

    def start(self) -> None:
        # A fork of one process that has imported what takes seconds, and nothing of pytest's.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "vllm_nvfp4.checkpoints.validate"])
        self._connection, theirs = context.Pipe()
        self._scratch = tempfile.TemporaryDirectory(prefix="vllm-nvfp4-fuzz-")
        self._process = context.Process(
            target=fuzz_worker.serve, args=(theirs, self._scratch.name, self._plant), daemon=True
        )
        self._process.start()
        theirs.close()
        self.seeds = self._connection.recv()

    def send(self, case: Any) -> Connection:
        if self._connection is None:
            self.start()
        assert self._connection is not None
        self._connection.send(case)
        return self._connection

    def receive(self) -> Outcome:
        assert self._connection is not None
        if not self._connection.poll(HANG_SECONDS):
            self.stop()
            return Outcome("fault", f"no answer in {HANG_SECONDS:.0f} s")
        try:
            return Outcome(*self._connection.recv())
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            self.stop()
            return Outcome("fault", f"the interpreter died with {code}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        if self._scratch is not None:
            self._scratch.cleanup()
        self._process = self._connection = self._scratch = None


class Pool:
    """``with Pool(2) as pool``: several workers, and the counts of what they found.

    plant: a fault of the loader to plant, see fuzz_worker
    """

    def __init__(self, size: int, plant: str = "") -> None:
        self.workers = [Worker(plant) for _ in range(size)]
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Pool:
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.stop()

    @property
    def seeds(self) -> list[str]:
        return sorted(self.workers[0].seeds)

    def read_seed(self, name: str) -> Files:
        return self.workers[0].seeds[name]

    def run_one(self, case: Any) -> Outcome:
        self.workers[0].send(case)
        return self._note(self.workers[0].receive())

    def run(self, cases: Iterable[Any]) -> list[tuple[Any, Outcome]]:
        """Every case whose outcome is a fault, with it."""
        pending = iter(cases)
        busy: dict[Connection, tuple[Worker, Any]] = {}
        faults = []
        idle = list(self.workers)
        while True:
            while idle and (case := next(pending, None)) is not None:
                worker = idle.pop()
                busy[worker.send(case)] = worker, case
            if not busy:
                return faults
            ready = wait(list(busy), HANG_SECONDS) or list(busy)
            for connection in ready:
                worker, case = busy.pop(connection)  # type: ignore[call-overload]
                outcome = self._note(worker.receive())
                if outcome.kind == "fault":
                    faults.append((case, outcome))
                idle.append(worker)

    def _note(self, outcome: Outcome) -> Outcome:
        self.counts[outcome.kind] += 1
        return outcome
