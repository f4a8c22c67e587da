# SPDX-License-Identifier: Apache-2.0
"""Experts without a gate on a CPU: vLLM's configuration of experts refuses them there, because its
own have no kernel for them. The plugin's have."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

_REFUSAL = "is_act_and_mul"


def install(methods: Collection[str]) -> None:
    """Let a configuration of ungated experts be made where one of ``methods``, the names of this
    plugin's, was asked for."""
    from vllm.model_executor.layers.fused_moe import config

    moe_config: Any = config.FusedMoEConfig
    finish = moe_config.__post_init__
    if hasattr(finish, "__wrapped__"):
        return

    @functools.wraps(finish)
    def finish_ungated(self: Any) -> None:
        try:
            finish(self)
        except NotImplementedError as error:  # raised last, when all else is set
            if _REFUSAL not in str(error) or not _is_asked_for(methods):
                raise

    moe_config.__post_init__ = finish_ungated


def _is_asked_for(methods: Collection[str]) -> bool:
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    model = vllm_config.model_config if vllm_config is not None else None
    return getattr(model, "quantization", None) in methods
