# SPDX-License-Identifier: Apache-2.0
"""vLLM's sleep takes the memory away in which a model was loaded; products are right after it."""

from __future__ import annotations

import pytest
import torch

from vllm_nvfp4.kernels.cuda import dispatch
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.driver import Driver
from vllm_nvfp4.testing import kernel_cases
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu

DEVICE = torch.device("cuda", 0)
M, N, K = 3, 48, 4096


def put_back(target, source):
    """Load a weight again into the memory that it had, as reload_weights does."""
    for name in ("codes", "block_scale", "global_scale"):
        getattr(target, name).copy_(getattr(source, name))


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_a_product_that_splits_k_is_the_same_after_waking(level, fmt):
    with emulated_gpu() as gpu:
        with gpu.memory_pool("weights"):
            weight = kernel_cases.random_weight(N, K, fmt, DEVICE)
            packed = cuda.pack_weight(weight)
        a = torch.randn(M, K, device=DEVICE).bfloat16()
        expected = [cuda.linear(a, packed, None, bits) for bits in (16, 8)]
        loaded = cuda.prepare(DEVICE, fmt, (torch.bfloat16,))
        assert loaded.choose(M, N, K, fmt, "bf16", "16").num_splits > 1
        kept = cuda.pack_weight(kernel_cases.random_weight(N, K, fmt, DEVICE))
        gpu.sleep(level)
        gpu.wake_up()
        if level == 2:
            assert not torch.equal(packed.codes, kept.codes)  # it was really taken away
            put_back(packed, kept)
        for bits, y in zip((16, 8), expected, strict=True):
            assert torch.equal(cuda.linear(a, packed, None, bits), y)
        assert loaded.used_semaphores() == 0


def test_semaphores_in_the_models_memory_would_not_survive(monkeypatch):
    """The fault that the other test is there to catch: the same with memory of torch's."""
    memory = []

    def in_torchs_memory(self, num_bytes):
        memory.append(torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE))
        return memory[-1].data_ptr()

    monkeypatch.setattr(Driver, "zeros", in_torchs_memory)
    with emulated_gpu() as gpu:
        with gpu.memory_pool("weights"):
            packed = cuda.pack_weight(kernel_cases.random_weight(N, K, "nvfp4", DEVICE))
        a = torch.randn(M, K, device=DEVICE).bfloat16()
        expected = cuda.linear(a, packed, None, 16)
        kept = cuda.pack_weight(kernel_cases.random_weight(N, K, "nvfp4", DEVICE))
        gpu.sleep(2)
        gpu.wake_up()
        put_back(packed, kept)
        assert not torch.equal(cuda.linear(a, packed, None, 16), expected)
    assert memory[0].numel() >= 4 * dispatch.MAX_SPLIT_TILES
