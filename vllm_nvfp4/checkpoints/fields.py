# SPDX-License-Identifier: Apache-2.0
"""Values of a checkpoint's configuration, by the type they must have."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm_nvfp4.checkpoints.spec import CheckpointError

_CORRECT = "Correct the file, or download it again."
# Real patterns take microseconds a name. One that backtracks without end is stopped.
_MATCH_SECONDS = 0.25
_TOTAL_SECONDS = 5.0
_MAX_PATTERN = 10_000


def as_table(value: object, where: str, key: str) -> Mapping[str, Any]:
    """The value if it is a table; an empty one for null. Raises CheckpointError for another."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise CheckpointError(where, key, _short(value), "a table", _CORRECT)


def as_texts(value: object, where: str, key: str) -> list[str]:
    """The value if it is a list of strings; an empty one for null. CheckpointError for another."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return list(value)
    raise CheckpointError(where, key, _short(value), "a list of layer names", _CORRECT)


def as_text(value: object, where: str, key: str) -> str:
    """The value if it is a string; an empty one for null. Raises CheckpointError for another."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise CheckpointError(where, key, _short(value), "a string", _CORRECT)


def as_count(value: object, where: str, key: str) -> int | None:
    """The value if it is a whole number >= 0; None for null. Raises CheckpointError for another."""
    if value is None or (type(value) is int and value >= 0):
        return value
    raise CheckpointError(where, key, _short(value), "a whole number", _CORRECT)


class Patterns:
    """Regular expressions of a configuration, each matched at a name's start in bounded time.

    The ``regex`` package gives up after a time; Python's own ``re`` does not. where: for messages
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._compiled: dict[str, Any] = {}
        self._seconds = 0.0

    def add(self, pattern: str) -> None:
        """Raises CheckpointError for what is no regular expression."""
        import regex

        if pattern in self._compiled:
            return
        try:
            if len(pattern) > _MAX_PATTERN:
                raise ValueError(f"{len(pattern)} characters")
            self._compiled[pattern] = regex.compile(pattern)
        except (regex.error, ValueError, RecursionError, OverflowError) as error:
            raise CheckpointError(
                self._where, f"re:{pattern}"[:200], error, "a regular expression", _CORRECT
            ) from None

    def matches(self, pattern: str, name: str) -> bool:
        """Raises CheckpointError where it takes too long."""
        self.add(pattern)
        started = time.process_time()
        try:
            found = self._compiled[pattern].match(name, timeout=_MATCH_SECONDS) is not None
        except TimeoutError:
            self._seconds = _TOTAL_SECONDS
            found = False
        self._seconds += time.process_time() - started
        if self._seconds >= _TOTAL_SECONDS:
            raise CheckpointError(
                self._where,
                f"re:{pattern}"[:200],
                "a pattern that backtracks without end",
                f"one that is matched in {_MATCH_SECONDS} s",
                "Write it without nested repetitions.",
            )
        return found


def _short(value: object) -> str:
    """A value of any size, as a message may show it."""
    if isinstance(value, Mapping | list):
        kind = "table" if isinstance(value, Mapping) else "list"
        return f"a {kind} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value if not isinstance(value, str) else value[:80])
