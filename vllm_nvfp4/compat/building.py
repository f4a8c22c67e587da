# SPDX-License-Identifier: Apache-2.0
"""What a config asks of vLLM while a model is built, in the process that builds it."""

from __future__ import annotations

from vllm_nvfp4.compat import attention, model_weights, tower_marks


def install(name: str) -> None:
    """For the quantization method ``name``. A worker's process gets a config that was made in
    another, so this is called wherever one arrives."""
    model_weights.install()
    tower_marks.install()
    attention.install(name)
