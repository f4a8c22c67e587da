# SPDX-License-Identifier: Apache-2.0
"""The FP8 KV cache: what is written is the nearest E4M3 number."""

import pytest
import torch

from vllm_nvfp4.compat import versions
from vllm_nvfp4.layers.kv_cache import nearest_e4m3
from vllm_nvfp4.numerics.quantize import to_e4m3

needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU backend has no FP8 KV cache here"
)


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


@needs_avx512
@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 0.0084, 3.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_writes_the_nearest_number_after_rounding(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    # From below the least subnormal to beyond the largest number.
    x = torch.randn(256, 1, 64, generator=generator) * scale
    x *= 2.0 ** torch.randint(-12, 9, (256, 1, 1), generator=generator)
    x = x.to(dtype)
    expected = to_e4m3(x.float() / scale).float().flatten().sort().values
    found = written(nearest_e4m3(x, scale), scale).sort().values
    assert found.isfinite().all()
    # Zeros have a sign that sorting does not see.
    assert torch.equal(found, expected)


@needs_avx512
def test_the_probe_says_what_the_kernel_does():
    x = torch.linspace(1, 400, 128 * 64, dtype=torch.float32).bfloat16().view(128, 1, 64)
    nearest = to_e4m3(x.float()).float().flatten().sort().values
    is_exact = torch.equal(written(x, 1.0).sort().values, nearest)
    assert versions.fp8_kv_write_truncates() != is_exact
