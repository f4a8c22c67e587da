# SPDX-License-Identifier: Apache-2.0
"""The quantization config of attention layers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from vllm_nvfp4.compat import versions


def install(name: str) -> None:
    """Give attention the engine's config, of the method ``name``, where a model leaves it out.

    Some of vLLM's model classes (Jamba's, LFM2's, Zamba2's) hand it to their projections alone:
    the KV cache would stay in 16 bits without a word, and a file's k/v scales find no layer. A
    class that passes None means it: a draft in 16 bits.
    """
    from vllm.config import get_current_vllm_config_or_none

    attention: Any
    for attention in versions.attention_classes():
        init = attention.__init__
        if hasattr(init, "nvfp4_gives"):
            continue
        parameters = inspect.signature(init)

        @functools.wraps(init)
        def init_with_config(
            self: Any, *args: Any, _init: Any = init, _parameters: Any = parameters, **kwargs: Any
        ) -> None:
            given = _parameters.bind_partial(self, *args, **kwargs).arguments
            config: Any = get_current_vllm_config_or_none()
            config = config and config.quant_config
            is_left_out = "quant_config" not in given and given.get("cache_config") is not None
            if is_left_out and config is not None and config.get_name() == name:
                kwargs["quant_config"] = config
            _init(self, *args, **kwargs)

        init_with_config.nvfp4_gives = True  # type: ignore[attr-defined]
        attention.__init__ = init_with_config
