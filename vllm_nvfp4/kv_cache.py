# SPDX-License-Identifier: Apache-2.0
"""The KV cache: FP8 by default where the device can, with the checkpoint's scales if any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from vllm_nvfp4 import compat

if TYPE_CHECKING:
    from vllm_nvfp4.config import NvFp4Config

logger = init_logger(f"vllm.{__name__}")

FP8_SCHEME = {"type": "float", "num_bits": 8, "dynamic": False, "symmetric": True}


class NvFp4KVCacheMethod(BaseKVCacheMethod):
    """Loads k_scale and v_scale; vLLM's base class does all the work."""


def head_size(text_config: Any) -> int | None:
    """Elements per attention head, or None where the configuration does not say."""
    if size := getattr(text_config, "head_dim", None):
        return size
    hidden = getattr(text_config, "hidden_size", None)
    heads = getattr(text_config, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


def default_scheme(option: str, size: int | None) -> dict[str, Any] | None:
    """The KV cache scheme that stands in for ``--kv-cache-dtype auto``, and one log line why."""
    if option == "keep":
        return None
    obstacle = compat.fp8_kv_cache_obstacle(size)
    if option == "fp8" or obstacle is None:
        logger.info_once("nvfp4: KV cache in FP8 unless --kv-cache-dtype says otherwise")
        return dict(FP8_SCHEME)
    logger.warning_once("nvfp4: KV cache stays in 16 bits: %s", obstacle)
    return None


def kv_cache_method(config: NvFp4Config) -> BaseKVCacheMethod | None:
    """The method that loads k/v scales, or None where there is nothing to load.

    None matters: with a method in place vLLM refuses ``--kv-cache-dtype fp8_e5m2``, which needs no
    scales.
    """
    if config.dialect.kv_cache.dtype is None:
        return None
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None and vllm_config.cache_config.cache_dtype == "fp8_e5m2":
        logger.warning_once("nvfp4: fp8_e5m2 KV cache: the checkpoint's E4M3 scales are not used")
        return None
    return NvFp4KVCacheMethod(config)
