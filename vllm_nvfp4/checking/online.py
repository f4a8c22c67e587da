# SPDX-License-Identifier: Apache-2.0
"""What becomes of each matrix of a 16-bit checkpoint in vLLM's model, by where it is loaded into.

Stored tensors and vLLM's layers have different names; the load itself says which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_nvfp4.checking.load import Loaded
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.online import LEFT_OUT
from vllm_nvfp4.checkpoints.online_layers import (
    BY_VLLM,
    NO_LINEAR_LAYER,
    PLAIN_TABLES,
    TABLES,
    OnlineLayers,
    layer_key,
)
from vllm_nvfp4.compat import versions


def online_layers(loaded: Loaded, headers: Mapping[str, TensorHeader]) -> OnlineLayers:
    """What a load found about every stored tensor of two or more dimensions."""
    quantised: set[str] = set()
    kept: dict[str, str] = {}
    places = loaded.places()
    for name, header in headers.items():
        if len(header.shape) < 2:
            continue
        if (why := _why_kept(*places.get(name, (None, "")))) is None:
            quantised.add(layer_key(name))
        else:
            kept[layer_key(name)] = why
    return OnlineLayers(BY_VLLM, frozenset(quantised), kept)


def _why_kept(module: Any, leaf: str) -> str | None:
    if module is None:
        return "not loaded"
    if "bias" in leaf:
        return NO_LINEAR_LAYER
    if isinstance(module, VocabParallelEmbedding):
        return TABLES if getattr(module, "nvfp4_is_asked", False) else PLAIN_TABLES
    is_linear = isinstance(module, LinearBase) or versions.is_moe_layer(module)
    method = getattr(module, "quant_method", None)
    if is_linear and getattr(method, "uses_meta_device", False):
        return None
    return getattr(method, "nvfp4_why_kept", LEFT_OUT if is_linear else NO_LINEAR_LAYER)
