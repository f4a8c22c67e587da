# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a process is started."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block has ended, where Python handles them.

    Around a fork Python calls what modules have registered for it (logging has), and ignores what
    these raise: a KeyboardInterrupt there is lost, and the work goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            handled[number](number, frame)
