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

from vllm_nvfp4.compat import draft_tables


def install() -> None:
    """Have each model built from now on load ``quant_config.prepare_weights(weights, model)``."""
    from vllm.model_executor.model_loader import base_loader

    loader: Any = base_loader
    initialize = loader.initialize_model
    if hasattr(initialize, "nvfp4_prepares"):
        return

    @functools.wraps(initialize)
    def initialize_model(*args: Any, **kwargs: Any) -> Any:
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        if vllm_config.speculative_config is not None:
            draft_tables.install()  # a draft is built, and shares, after its target
        model = initialize(*args, **kwargs)
        config = _config_of(model, vllm_config, kwargs.get("model_config"))
        prepare = getattr(config, "prepare_weights", None)
        if prepare is not None:
            _wrap(model, prepare)
        return model

    initialize_model.nvfp4_prepares = True  # type: ignore[attr-defined]
    loader.initialize_model = initialize_model


def _config_of(model: Any, vllm_config: Any, model_config: Any) -> Any:
    """The quantization config that knows a model's layers and files: the engine's; of a draft, the
    one that it has made for itself, or the engine's where it is in the target's files."""
    engine, target = vllm_config.quant_config, vllm_config.model_config
    if model_config is None or model_config is target:
        return engine
    made = (getattr(part, "quant_config", None) for part in (model, *model.children()))
    own = next((c for c in made if c is not None and c is not engine), None)
    return own or (engine if model_config.model == target.model else None)


def _wrap(model: Any, prepare: Any) -> None:
    load = model.load_weights

    @functools.wraps(load)
    def load_weights(weights: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        return load(prepare(weights, model), *args, **kwargs)

    model.load_weights = load_weights
