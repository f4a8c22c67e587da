# SPDX-License-Identifier: Apache-2.0
"""Which KV cache the device's attention can hold, and how vLLM writes it."""

from __future__ import annotations

import functools
from typing import Any

from packaging.version import Version

from vllm_nvfp4.compat import versions

_16_BITS = ("auto", "float16", "bfloat16")
_CPU_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
_LEAST_FP8_CAPABILITY = (8, 9)


def head_size(text_config: Any) -> int | None:
    """Elements per attention head, or None where the configuration does not say.

    Nor does it where heads differ from layer to layer, as Gemma-4's: transformers then raises an
    error of its own, and advice never ends an engine.
    """
    try:
        if size := getattr(text_config, "head_dim", None):
            return size
    except Exception:  # its class depends on the version of transformers
        return None
    hidden = getattr(text_config, "hidden_size", None)
    heads = getattr(text_config, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


def obstacle(dtype: str, head_size: int | None, is_latent: bool = False) -> str | None:
    """Why the device's attention should not be given a KV cache of a type, or None if it may.

    dtype:     as ``--kv-cache-dtype`` names it
    head_size: elements per attention head, None where it is not known
    is_latent: whether the model caches latents (MLA)

    CUDA: FlashInfer and Triton read FP8 in hardware from compute capability 8.9 on; of other types
    vLLM is the judge. CPU: see :func:`cpu_obstacle`.
    """
    capability = versions.device_capability()
    if capability is None:
        return cpu_obstacle(dtype, head_size, is_latent)
    if dtype.startswith("fp8") and capability < _LEAST_FP8_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.9"
    return None


def cpu_obstacle(dtype: str, head_size: int | None, is_latent: bool = False) -> str | None:
    """:func:`obstacle` on a CPU; asks torch and imports nothing of vLLM.

    vLLM's CPU attention (v1/attention/backends/cpu_attn.py and mla/) holds FP8 by AVX-512 or AMX,
    for head sizes that are multiples of 32, and no latents in FP8.
    """
    if dtype in _16_BITS:
        return None
    if dtype not in _CPU_FP8:
        return f"vLLM's CPU backend has no KV cache of type {dtype}"
    if is_latent:
        return "vLLM's CPU backend has no FP8 KV cache for latent attention (MLA)"
    import torch

    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        return "this CPU has neither AVX-512 nor AMX, one of which an FP8 KV cache needs"
    if head_size is None or head_size % 32:
        return f"vLLM's CPU backend needs a head size that is a multiple of 32, found {head_size}"
    return None


def has_nvfp4(arch: int) -> bool:
    """Whether vLLM takes ``--kv-cache-dtype nvfp4`` on a GPU of this architecture, by its code:
    through FlashInfer, from 0.32 on, on 8.x, 9.x and 12.x."""
    return versions.vllm_version() >= Version("0.32") and arch // 10 in (8, 9, 12)


def refusal(where: str, obstacle: str) -> ValueError:
    """The error for a KV cache that was asked for by name, on a CPU that cannot hold it.

    where: the flag or option, with its value
    """
    return ValueError(
        f"{where}: {obstacle}. Leave it out, or give --kv-cache-dtype auto, for a KV cache of the "
        "model's own type."
    )


@functools.cache
def fp8_write_truncates() -> bool:
    """Whether vLLM's CPU backend cuts K and V off to E4M3 where it should round, as 0.32 does.

    It is asked: 1.12 lies between 1 and 1.125, nearer to the latter.
    """
    import torch
    from vllm import _custom_ops

    block, head_size = 128, 64
    token = torch.full((1, 1, head_size), 1.12, dtype=torch.bfloat16)
    cache = torch.zeros(1, 1, 2 * block, head_size, dtype=torch.uint8)
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = torch.zeros(1, dtype=torch.int64)
    _custom_ops.cpu_attn_reshape_and_cache(
        token, token, key_cache, value_cache, slots, "vec", kv_cache_dtype="fp8"
    )
    return cache.view(torch.float8_e4m3fn).float().amax().item() == 1.0
