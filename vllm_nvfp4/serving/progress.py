# SPDX-License-Identifier: Apache-2.0
"""One line for everything that takes time. Standard library only: the set-up uses it too."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

HEARTBEAT_SECONDS = 5.0


class Step:
    """A piece of work under way: ``detail`` is what the next progress line says about it."""

    def __init__(self, title: str, out: TextIO) -> None:
        self.title, self.out = title, out
        self.detail = ""
        self.started = time.monotonic()
        self._finished = threading.Event()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def _beat(self) -> None:
        while not self._finished.wait(HEARTBEAT_SECONDS):
            # A detail may come from a log: keep the line a line.
            detail = f"  {self.detail[:80]}" if self.detail else ""
            print(f"    {self.title} ... {self.seconds:.0f} s{detail}", file=self.out, flush=True)


@contextmanager
def step(title: str, out: TextIO | None = None) -> Iterator[Step]:
    """Announce ``title``, print a line every five seconds while it lasts, and how long it took."""
    current = Step(title, out or sys.stdout)
    print(f"==> {title}", file=current.out, flush=True)
    beat = threading.Thread(target=current._beat, daemon=True)
    beat.start()
    try:
        yield current
        print(f"    done in {current.seconds:.1f} s", file=current.out, flush=True)
    finally:
        current._finished.set()
        beat.join()
