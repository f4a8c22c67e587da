# SPDX-License-Identifier: Apache-2.0
"""How much of vLLM's log is shown by what asks it something and prints the answer."""

from __future__ import annotations

import logging
import os


def shows_everything() -> bool:
    """Whether the user asked for all that there is to read: VLLM_LOGGING_LEVEL=DEBUG."""
    return os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG"


def log_errors_alone() -> None:
    """Have vLLM log no more than errors, unless VLLM_LOGGING_LEVEL says otherwise: its lines would
    come between those of a command. To be called before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM sets its level in the course of its import; what it warns of before, Python prints where
    # no handler is.
    logging.getLogger("vllm").addHandler(logging.NullHandler())
