# SPDX-License-Identifier: Apache-2.0
"""Errors of vLLM's as one line each."""

from __future__ import annotations


def message_of(error: BaseException) -> str:
    """An error of vLLM's in one line: pydantic's without its frame, others with their kind."""
    if callable(errors := getattr(error, "errors", None)):
        try:
            parts = [e["msg"].removeprefix("Value error, ") for e in errors()]
        except (TypeError, KeyError):
            parts = []
        if parts:
            return " ".join("; ".join(parts).split())
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
