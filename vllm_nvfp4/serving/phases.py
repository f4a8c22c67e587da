# SPDX-License-Identifier: Apache-2.0
"""What a starting vLLM server is doing, told from its log."""

from __future__ import annotations

import re

IMPORTING = "importing vLLM"
# A phase and the lines of vLLM's log that begin it. The last line that begins one decides.
_BEGINS = (
    ("downloading", r"Fetching \d+ files|Downloading |Time spent downloading weights"),
    ("starting the engine", r"Initializing a V1 LLM engine"),
    ("loading the weights", r"Starting to load model|Loading safetensors checkpoint shards"),
    (
        "compiling, first start only",
        r"Dynamo bytecode transform|Compiling a graph for|Compiling model again"
        r"|Warming up model for the compilation",
    ),
    ("loading compiled code", r"Directly load (the compiled graph|AOT compilation)"),
    ("preparing the KV cache", r"Available KV cache memory|GPU KV cache size|KV cache size:"),
    ("capturing CUDA graphs", r"Capturing CUDA graphs?\b"),
    ("opening the port", r"Starting vLLM server on|Application startup|Available routes are"),
)
_PERCENT = re.compile(r"\b(\d{1,3})%")


def phase_of(log: str) -> str:
    """The phase that a log has reached, with the percentage where a bar shows one."""
    begun = [
        (max(match.start() for match in found), name)
        for name, pattern in _BEGINS
        if (found := list(re.finditer(pattern, log)))
    ]
    if not begun:
        return IMPORTING
    start, name = max(begun)
    shown = _PERCENT.findall(log[start:].rsplit("\n", 1)[-1] or log[start:])
    return f"{name}, {shown[-1]} %" if shown and "," not in name else name
