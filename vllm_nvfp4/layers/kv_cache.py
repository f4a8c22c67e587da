# SPDX-License-Identifier: Apache-2.0
"""The KV cache: FP8 by default where the device can, with the checkpoint's scales if any."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.compat import kv_cache as able
from vllm_nvfp4.compat import versions
from vllm_nvfp4.numerics.quantize import to_e4m3

logger = init_logger(f"vllm.{__name__}")

FP8_SCHEME = {"type": "float", "num_bits": 8, "dynamic": False, "symmetric": True}


# Past the nearest E4M3 number by less than a step of it and by more than BF16's and the division's
# rounding: cut off, it is that number.
_PAST = 1 + 2**-6


class NvFp4KVCacheMethod(BaseKVCacheMethod):
    """Loads k_scale and v_scale, which vLLM's base class does, and has K and V rounded to FP8."""

    def create_weights(self, layer: torch.nn.Module) -> None:
        # Of the model's own type, which is torch's default now, they would lose 16 of 24 bits.
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            super().create_weights(layer)
        finally:
            torch.set_default_dtype(default)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        is_e4m3 = layer.kv_cache_dtype in ("fp8", "fp8_e4m3")
        if is_e4m3 and versions.device_capability() is None and able.fp8_write_truncates():
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


def default_scheme(option: str, size: int | None, is_declared: bool) -> dict[str, Any] | None:
    """The KV cache scheme that stands in for ``--kv-cache-dtype auto``.

    option:      ``kv_cache``
    size:        of an attention head
    is_declared: whether the checkpoint asks for an FP8 KV cache

    None where the cache is not FP8; :func:`settle_dtype` has then said why.
    """
    if option == "keep" and not is_declared:
        return None
    if option != "fp8" and able.obstacle("fp8", size) is not None:
        return None
    logger.info_once("nvfp4: KV cache in FP8 unless --kv-cache-dtype says otherwise")
    return dict(FP8_SCHEME)


def settle_dtype(asked: str, resolved: str, option: str, model_config: Any) -> str:
    """The type of the KV cache that an engine is configured with, one that the device can hold.

    asked:        ``--kv-cache-dtype``
    resolved:     what vLLM makes of it, which knows what ModelOpt's checkpoints declare
    option:       ``kv_cache``
    model_config: vLLM's

    A type that was asked for is returned as it is, or on a CPU that cannot hold it refused with
    ValueError, 16 bits beside a model in float32 among them: on a GPU vLLM may find a backend yet.
    What a checkpoint declares, or the option ``auto`` would choose, gives way to the model's own
    type ("auto") with one line in the log.
    """
    if model_config.is_attention_free:
        return resolved
    if versions.keeps_no_cache(model_config) and asked == "auto":
        return "auto"  # attention of all to all keeps nothing, and vLLM's knows no FP8 for it
    is_wide = model_config.dtype == torch.float32 and asked in ("bfloat16", "float16")
    if is_wide and versions.device_capability() is None:
        # vLLM takes it, and answers differently in every run.
        raise able.refusal(
            f"--kv-cache-dtype {asked}", "no cache in 16 bits beside a model in float32"
        )
    if asked == "auto" and option == "fp8" and not resolved.startswith("fp8"):
        resolved = "auto"
    is_declared = resolved not in ("auto", asked) or declares_fp8(model_config.hf_config)
    wanted = "fp8" if resolved == "auto" and (is_declared or option != "keep") else resolved
    size = able.head_size(model_config.hf_text_config)
    obstacle = able.obstacle(wanted, size, model_config.use_mla)
    # Backends and block sizes are chosen by it before there is a layer that asks for FP8. From
    # capability 10 on vLLM's own config may serve the checkpoint, which decides for itself.
    if resolved == "auto" and (versions.device_capability() or (0, 0)) < (10, 0):
        resolved = wanted
    if obstacle is None:
        return resolved
    if asked != "auto" or option == "fp8":
        if versions.device_capability() is None:
            where = f"--kv-cache-dtype {asked}" if asked != "auto" else "option kv_cache=fp8"
            raise able.refusal(where, obstacle)
        return resolved
    logger.warning(
        "nvfp4: KV cache in %s, not in %s%s: %s",
        str(model_config.dtype).removeprefix("torch."),
        wanted.partition("_")[0].upper(),
        " as the checkpoint asks" if is_declared else "",
        obstacle,
    )
    return "auto"


def declares_fp8(hf_config: Any) -> bool:
    """Whether the checkpoint asks for an FP8 KV cache, with scales or without."""
    quant_config = getattr(hf_config, "quantization_config", None)
    return detect(quant_config).kv_cache.dtype is not None


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
