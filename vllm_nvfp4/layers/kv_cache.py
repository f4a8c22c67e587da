# SPDX-License-Identifier: Apache-2.0
"""The KV cache: FP8 by default where the device can, with the checkpoint's scales if any."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from vllm_nvfp4.compat import versions
from vllm_nvfp4.numerics.quantize import to_e4m3

logger = init_logger(f"vllm.{__name__}")

FP8_SCHEME = {"type": "float", "num_bits": 8, "dynamic": False, "symmetric": True}


# Past the nearest E4M3 number by less than a step of it and by more than BF16's and the division's
# rounding: cut off, it is that number.
_PAST = 1 + 2**-6


class NvFp4KVCacheMethod(BaseKVCacheMethod):
    """Loads k_scale and v_scale, which vLLM's base class does, and has K and V rounded to FP8."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        is_e4m3 = layer.kv_cache_dtype in ("fp8", "fp8_e4m3")
        if is_e4m3 and versions.device_capability() is None and versions.fp8_kv_write_truncates():
            _round_before_writing(layer.impl)


def _round_before_writing(impl: Any) -> None:
    """Cutting off shrinks K and V, by 4 % on average."""
    write = impl.do_kv_cache_update
    if getattr(write, "rounds", False):
        return

    def rounded(layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        key = nearest_e4m3(key, layer._k_scale_float)
        value = nearest_e4m3(value, layer._v_scale_float)
        write(layer, key, value, kv_cache, slot_mapping)

    rounded.rounds = True  # type: ignore[attr-defined]
    impl.do_kv_cache_update = rounded


def nearest_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """What gives round(x / scale) to E4M3 when it is divided by ``scale`` and cut off.

    x: any shape, BF16, FP16 or FP32. Returns the same type.
    """
    return (to_e4m3(x.float() / scale).float() * (scale * _PAST)).to(x.dtype)


def head_size() -> int | None:
    """Elements per attention head as vLLM counts them, or None where it does not say.

    It is asked for its advice alone, so that no configuration that it cannot read ends the engine.
    """
    vllm_config = get_current_vllm_config_or_none()
    try:
        return None if vllm_config is None else int(vllm_config.model_config.get_head_size())
    except Exception as error:  # configurations raise errors of their own classes
        logger.warning_once("nvfp4: the size of an attention head is unknown: %s", error)
        return None


def default_scheme(option: str, size: int | None) -> dict[str, Any] | None:
    """The KV cache scheme that stands in for ``--kv-cache-dtype auto``, and one log line why."""
    if option == "keep":
        return None
    obstacle = versions.fp8_kv_cache_obstacle(size)
    if option == "fp8" or obstacle is None:
        logger.info_once("nvfp4: KV cache in FP8 unless --kv-cache-dtype says otherwise")
        return dict(FP8_SCHEME)
    logger.warning_once("nvfp4: KV cache stays in 16 bits: %s", obstacle)
    return None


def kv_cache_method(config: QuantizationConfig, has_scales: bool) -> BaseKVCacheMethod | None:
    """The method that loads k/v scales, or None where there is nothing to load or to round.

    None matters: with a method in place vLLM refuses ``--kv-cache-dtype fp8_e5m2``, which needs no
    scales.
    """
    if not has_scales and versions.device_capability() is not None:
        return None
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None and vllm_config.cache_config.cache_dtype == "fp8_e5m2":
        if not has_scales:
            return None
        logger.warning_once("nvfp4: fp8_e5m2 KV cache: the checkpoint's E4M3 scales are not used")
        return None
    return NvFp4KVCacheMethod(config)
