# SPDX-License-Identifier: Apache-2.0
"""One line for everything that takes time. Standard library only: the set-up uses it too.

On a terminal the line stays in its place and counts the seconds; without one a line is printed
every ten seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

HEARTBEAT_SECONDS = 10.0
TERMINAL_SECONDS = 0.5
# A fraction says nothing before this: the first piece may have been a small one.
_ETA_SECONDS = 2.0
_MAX_DETAIL = 80


class Step:
    """A piece of work under way.

    detail:   what the progress line says about it; a phase, a file, a layer
    fraction: how much is done, 0 to 1; None where nobody knows. With it the line says how much
              time is left: what it took from the first fraction to this one, times (1 - fraction) /
              (fraction - the first fraction), less what has gone by since this one
    look:     called before each line, to count what nobody reports; sets the two above
    """

    def __init__(self, title: str, out: TextIO) -> None:
        self.title, self.out = title, out
        self.detail = ""
        self.look: Callable[[], None] | None = None
        self._fraction: float | None = None
        self._first = 0.0
        self.started = self.begun = time.monotonic()
        self._first_at = self._changed_at = self.started
        self._lock = threading.Lock()
        self.is_terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._finished = threading.Event()

    @property
    def seconds(self) -> float:
        """Of the part that ``begin`` began last."""
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float | None:
        return self._fraction

    @fraction.setter
    def fraction(self, value: float | None) -> None:
        if value == self._fraction:
            return
        if self._fraction is None:
            self.skip(value or 0.0)
        self._fraction, self._changed_at = value, time.monotonic()

    def skip(self, fraction: float) -> None:
        """Go on from a fraction that took no time: an earlier run did it."""
        self._fraction = self._first = fraction
        self._first_at = self._changed_at = time.monotonic()

    def advance(self, fraction: float, detail: str) -> None:
        self.fraction, self.detail = fraction, detail

    def begin(self, title: str) -> None:
        """Go on with another part of the work, whose time and fraction start anew."""
        self.title, self.detail, self.fraction = title, "", None
        self.started = time.monotonic()

    def say(self, text: str, out: TextIO | None = None) -> None:
        """Print lines without the progress line in their way; in a terminal's columns."""
        out = out or sys.stdout
        if out.isatty():
            text = "\n".join(map(_fill, text.splitlines()))
        with self._lock:
            self._clear()
            print(text, file=out, flush=True)

    def _clear(self) -> None:
        if self.is_terminal:
            print("\r\x1b[2K", end="", file=self.out, flush=True)

    def left(self) -> float | None:
        """Seconds, as said above; None while nothing is known."""
        fraction = self.fraction or 0.0
        done, took = fraction - self._first, self._changed_at - self._first_at
        if done <= 0 or self.seconds < _ETA_SECONDS:
            return None
        return max(took * (1 - fraction) / done - (time.monotonic() - self._changed_at), 0.0)

    def line(self) -> str:
        """The progress line as it is now."""
        parts = [f"{self.title} ... {duration(self.seconds)}"]
        if self.fraction is not None:
            parts.append(f"{self.fraction:.0%}")
            if (left := self.left()) is not None:
                parts.append(f"about {duration(left)} left")
        text = "    " + ", ".join(parts)
        # A detail may come from a log: keep the line a line.
        return text + (f"  {self.detail[:_MAX_DETAIL]}" if self.detail else "")

    def _beat(self) -> None:
        wait = TERMINAL_SECONDS if self.is_terminal else HEARTBEAT_SECONDS
        while not self._finished.wait(wait):
            if self.look:
                self.look()
            with self._lock:
                self._clear()
                width = shutil.get_terminal_size().columns - 1 if self.is_terminal else None
                end = "" if self.is_terminal else "\n"
                print(self.line()[:width], end=end, file=self.out, flush=True)
        self._clear()


def _fill(line: str) -> str:
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(line, columns, subsequent_indent="    ", break_long_words=False)


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes and seconds, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


@contextmanager
def step(title: str, out: TextIO | None = None) -> Iterator[Step]:
    """Announce ``title``, show how it goes while it lasts, and say how long it took."""
    current = Step(title, out or sys.stdout)
    print(f"==> {title}", file=current.out, flush=True)
    beat = threading.Thread(target=current._beat, daemon=True)
    beat.start()
    done = False
    try:
        yield current
        done = True
    finally:
        current._finished.set()
        beat.join()
        if done:
            seconds = time.monotonic() - current.begun
            print(f"    done in {_exact(seconds)}", file=current.out, flush=True)


def _exact(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else duration(seconds)
