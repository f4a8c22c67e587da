# SPDX-License-Identifier: Apache-2.0
"""A hook that vLLM does not have: what a model is handed of the files goes through its
quantization config first.

vLLM's own hook, get_checkpoint_weight_mapper, renames; it cannot take a tensor apart, and models
with a loader of their own pass it by.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any


def install() -> None:
    """Have each model built from now on load ``quant_config.prepare_weights(weights)``."""
    from vllm.model_executor.model_loader import base_loader

    loader: Any = base_loader
    initialize = loader.initialize_model
    if hasattr(initialize, "nvfp4_prepares"):
        return

    @functools.wraps(initialize)
    def initialize_model(*args: Any, **kwargs: Any) -> Any:
        model = initialize(*args, **kwargs)
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        prepare = getattr(vllm_config.quant_config, "prepare_weights", None)
        if prepare is not None:
            _wrap(model, prepare)
        return model

    initialize_model.nvfp4_prepares = True  # type: ignore[attr-defined]
    loader.initialize_model = initialize_model


def _wrap(model: Any, prepare: Any) -> None:
    load = model.load_weights

    @functools.wraps(load)
    def load_weights(weights: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        return load(prepare(weights), *args, **kwargs)

    model.load_weights = load_weights
