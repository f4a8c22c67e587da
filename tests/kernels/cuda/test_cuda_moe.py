# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a CUDA device, against float64. Run by benchmarks/gpu_check.sh (-m gpu)."""

import math

import pytest
import torch

from vllm_nvfp4.kernels import moe_ops
from vllm_nvfp4.kernels.cuda import moe as cuda_moe
from vllm_nvfp4.kernels.cuda.moe_configs import MOE_CONFIGS
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.testing import moe_checks
from vllm_nvfp4.testing.moe_cases import compare_moe, random_experts

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


def arch():
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return major * 10 + minor


@pytest.mark.parametrize("config", MOE_CONFIGS, ids=lambda c: c.symbol)
def test_every_kernel_on_every_shape(config):
    if config.min_arch > arch():
        with pytest.raises(RuntimeError, match="needs sm_89"):
            cuda_moe.prepare_moe(DEVICE, config.fmt_name).load([config])
        return
    for case in moe_checks.moe_cases_of(config):
        outcome = moe_checks.check_moe_case(case, DEVICE)
        assert outcome.is_match, f"{case}\n{outcome.report}"


@pytest.mark.parametrize("num_tokens", [1, 16, 100])
def test_cuda_graph(num_tokens):
    """Captured once, replayed with other tokens and other choices, as vLLM does in decoding."""
    cuda_moe.prepare_moe(DEVICE, "nvfp4", (torch.bfloat16,))
    w13 = random_experts(8, 2 * 96, 256, "nvfp4", device=DEVICE)
    w2 = random_experts(8, 256, 96, "nvfp4", seed=1, device=DEVICE)
    stacks = [[s.codes, s.block_scale, s.global_scale] for s in (w13.stack, w2.stack)]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def tokens():
        a = torch.randn(num_tokens, 256, generator=generator, device=DEVICE).bfloat16()
        scores = torch.rand(num_tokens, 8, generator=generator, device=DEVICE)
        weights, ids = scores.topk(2, dim=-1)
        return a, weights, ids.int()

    def call(a, weights, ids):
        constants = [math.inf, 1.0, 0.0]
        return moe_ops.moe(
            a, *stacks, weights, ids, None, 96, "nvfp4", "silu", constants, False, 16
        )

    inputs = tokens()
    call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(*inputs)
    for _ in range(3):
        for target, source in zip(inputs, tokens(), strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(y.view(torch.int16), call(*inputs).view(torch.int16))
        a, weights, ids = inputs
        outcome = compare_moe(y, a, w13, w2, weights, ids, ExpertActivation("silu"))
        assert outcome.is_match, outcome.report


def test_no_tokens():
    cuda_moe.prepare_moe(DEVICE, "nvfp4", (torch.bfloat16,))
    w13 = random_experts(2, 64, 64, "nvfp4", device=DEVICE).stack
    w2 = random_experts(2, 64, 32, "nvfp4", device=DEVICE).stack
    a = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    none = torch.empty(0, 2, device=DEVICE)
    routing = (none, none.int(), None)
    y = cuda_moe.moe(a, w13, w2, routing, ExpertActivation("silu"), False, 0)
    assert y.shape == (0, 64)
