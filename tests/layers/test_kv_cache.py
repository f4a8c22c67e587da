# SPDX-License-Identifier: Apache-2.0
"""The FP8 KV cache: what is written is the nearest E4M3 number."""

import pytest
import torch

from vllm_nvfp4.compat import kv_cache
from vllm_nvfp4.layers.kv_cache import nearest_e4m3
from vllm_nvfp4.numerics.quantize import to_e4m3
from vllm_nvfp4.testing.engine import has_fp8_kv_cache

pytestmark = pytest.mark.cpu_path


def written(x, scale):
    """x [T, 1, 64] as vLLM's kernel stores it, decoded and without its scale, in any order."""
    from vllm import _custom_ops

    cache = torch.zeros(-(-len(x) // 128), 1, 256, 64, dtype=torch.uint8)
    key_cache, value_cache = cache.chunk(2, dim=2)
    scales = {"k_scale": scale, "v_scale": scale, "kv_cache_dtype": "fp8"}
    _custom_ops.cpu_attn_reshape_and_cache(
        x, x, key_cache, value_cache, torch.arange(len(x)), "vec", **scales
    )
    return value_cache.reshape(-1).view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 0.0084, 3.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_writes_the_nearest_number_after_rounding(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    # From below the least subnormal to beyond the largest number.
    x = torch.randn(256, 1, 64, generator=generator) * scale
    x *= 2.0 ** torch.randint(-12, 9, (256, 1, 1), generator=generator)
    x = x.to(dtype)
    if not has_fp8_kv_cache():
        with pytest.raises(RuntimeError, match="Unsupported CPU attention"):
            written(x, scale)
        return
    expected = to_e4m3(x.float() / scale).float().flatten().sort().values
    found = written(nearest_e4m3(x, scale), scale).sort().values
    assert found.isfinite().all()
    # Zeros have a sign that sorting does not see.
    assert torch.equal(found, expected)


def test_the_probe_says_what_the_kernel_does():
    x = torch.linspace(1, 400, 128 * 64, dtype=torch.float32).bfloat16().view(128, 1, 64)
    nearest = to_e4m3(x.float()).float().flatten().sort().values
    if not has_fp8_kv_cache():
        with pytest.raises(RuntimeError, match="Unsupported CPU attention"):
            kv_cache.fp8_write_truncates()
        return
    is_exact = torch.equal(written(x, 1.0).sort().values, nearest)
    assert kv_cache.fp8_write_truncates() != is_exact


@pytest.mark.parametrize("size", [32, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_what_a_cpu_can_hold_is_what_vllm_says(size, dtype):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

    assert {"fp8", "fp8_e4m3", "fp8_e5m2"} < set(CPUAttentionBackend.supported_kv_cache_dtypes)
    try:
        _get_attn_isa(torch.bfloat16, 128, size, dtype)
        expected = True
    except NotImplementedError:
        expected = False
    assert (kv_cache.obstacle(dtype, size) is None) is expected
    assert has_fp8_kv_cache() is (kv_cache.obstacle("fp8", 64) is None)


@pytest.mark.parametrize("dtype", ["nvfp4", "int8_per_token_head", "fp8_inc"])
def test_other_types_are_not_for_a_cpu(dtype):
    assert kv_cache.obstacle(dtype, 128) == f"vLLM's CPU backend has no KV cache of type {dtype}"


def test_latents_are_not_in_fp8_on_a_cpu():
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    assert not CPUMLABackend.supports_kv_cache_dtype("fp8")
    assert "latent attention (MLA)" in kv_cache.obstacle("fp8", 128, is_latent=True)
    assert kv_cache.obstacle("auto", 128, is_latent=True) is None
