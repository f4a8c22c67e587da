# SPDX-License-Identifier: Apache-2.0
"""The layer around the CUDA kernels of routed experts, executed: vLLM's modular kernel, the ops and
``cuda_moe`` as on a GPU, the kernels themselves on the emulated one.
"""

from types import SimpleNamespace

import pytest
import torch
from serving_cases import PROMPT
from torch.nn.functional import pad
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)

from vllm_nvfp4.compat import versions
from vllm_nvfp4.layers.experts_kernel import NvFp4Experts
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.engine import ask_engine, engine
from vllm_nvfp4.testing.host_device import emulated_experts
from vllm_nvfp4.testing.metrics import relative_error
from vllm_nvfp4.testing.moe_cases import Experts, compare_moe, random_experts, route

NUM_EXPERTS, HIDDEN, INNER, CHOICES = 6, 64, 96, 2
OAI = ExpertActivation("swigluoai_uninterleave", 7.0, 1.702, 1.0)


@pytest.mark.vllm
def test_an_engine_on_the_emulated_gpu_gives_what_the_cpu_kernels_give(tmp_path):
    folder = extract_fixture("moe_modelopt/nvfp4-qwen3", tmp_path)
    options = {"dtype": "bfloat16", "additional_config": {"nvfp4": {"kv_cache": "keep"}}}
    with engine(folder, **options) as llm:
        expected = ask_engine(llm, PROMPT[:5], 2)
    with emulated_experts() as launched, engine(folder, **options) as llm:
        launched.clear()
        found = ask_engine(llm, PROMPT[:5], 2)
    # Two layers, of the prompt and of one new token: route, w13, w2, combine.
    assert len(launched) == 2 * 2 * 4
    assert [("moe_w4a16" in name) for name in launched] == 4 * [False, True, True, False]
    assert (found.logprobs - expected.logprobs).abs().max() < 0.05
    assert (found.logprobs - expected.logprobs).abs().mean() < 0.01


def a_layer(w13: Experts, w2: Experts, fmt_name: str) -> SimpleNamespace:
    """What the method leaves on vLLM's layer."""
    layer = SimpleNamespace(
        nvfp4_intermediate_size=INNER, nvfp4_format=fmt_name, w13_bias=w13.bias, w2_bias=w2.bias
    )
    for stem, experts in (("w13", w13), ("w2", w2)):
        setattr(layer, f"{stem}_weight", experts.stack.codes)
        setattr(layer, f"{stem}_weight_block_scale", experts.stack.block_scale)
        setattr(layer, f"{stem}_weight_global_scale", experts.stack.global_scale)
    layer.moe_config = FusedMoEConfig(
        NUM_EXPERTS, CHOICES, HIDDEN, INNER, len(w13.weights), NUM_EXPERTS, MoEActivation.SILU,
        "cpu", RoutingMethodType.Default, FusedMoEParallelConfig.make_no_parallel(),
        torch.bfloat16,
    )  # fmt: skip
    return layer


class Call:
    """One layer with its tokens, through vLLM's modular kernel."""

    def __init__(self, num_tokens, fmt_name="nvfp4", dtype=torch.bfloat16, here=NUM_EXPERTS):
        generator = torch.Generator().manual_seed(num_tokens)
        self.w13 = random_experts(here, 2 * INNER, HIDDEN, fmt_name, bias=dtype)
        self.w2 = random_experts(here, HIDDEN, INNER, fmt_name, bias=dtype, seed=1)
        self.layer = a_layer(self.w13, self.w2, fmt_name)
        self.a = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
        scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
        self.weights, self.ids = scores.topk(CHOICES, dim=-1)
        self.map = None
        if here < NUM_EXPERTS:  # every second one, from the second on
            self.map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
            self.map[1 : 2 * here : 2] = torch.arange(here, dtype=torch.int32)

    def run(self, act=OAI, bits=16, on_input=False, lora=None):
        experts = NvFp4Experts(self.layer, act, False, bits)
        experts._lora_context = lora
        mover = versions.make_prepare_finalize(self.layer, experts.quant_config)
        with emulated_experts() as launched:
            y = versions.make_moe_kernel(mover, experts).apply(
                hidden_states=self.a, w1=self.layer.w13_weight, w2=self.layer.w2_weight,
                topk_weights=self.weights, topk_ids=self.ids, activation=MoEActivation.SILU,
                global_num_experts=NUM_EXPERTS, expert_map=self.map,
                apply_router_weight_on_input=on_input,
            )  # fmt: skip
        return y, launched

    def compare(self, y, act=OAI, weights=None):
        local = self.ids if self.map is None else route(self.ids, self.map, len(self.w13.weights))
        weights = self.weights if weights is None else weights
        return compare_moe(y, self.a, self.w13, self.w2, weights, local, act)


@pytest.mark.parametrize(
    ("num_tokens", "fmt_name", "dtype", "here"),
    [
        (1, "nvfp4", torch.bfloat16, NUM_EXPERTS),
        (20, "mxfp4", torch.float16, NUM_EXPERTS),
        (7, "nvfp4", torch.bfloat16, 3),
    ],
)
def test_the_modular_kernel_around_the_cuda_kernels(num_tokens, fmt_name, dtype, here):
    call = Call(num_tokens, fmt_name, dtype, here)
    y, launched = call.run()
    found = call.compare(y)
    assert found.is_match, found.report
    assert len(launched) == 4


def test_weights_on_the_input_are_multiplied_once():
    call = Call(5)
    call.weights, call.ids = call.weights[:, :1], call.ids[:, :1]
    y, _ = call.run(on_input=True)
    call.a = call.a * call.weights.to(call.a.dtype)
    found = call.compare(y, weights=torch.ones_like(call.weights))
    assert found.is_match, found.report


def test_8_bits():
    call = Call(20)
    exact, _ = call.run(bits=16)
    y, launched = call.run(bits=8)
    assert 1e-3 < relative_error(y, exact) < 2**-4
    assert sum("w4a8" in name for name in launched) == 2


@pytest.mark.parametrize("here", [NUM_EXPERTS, 3])
@pytest.mark.parametrize("bits", [16, 8])
def test_the_products_apart_for_an_adapter(here, bits):
    """One adapter on some tokens, against the same experts with it added to their weights; without
    it the parts give what the whole gives, but for the roundings between them."""
    call = Call(9, here=here)
    generator = torch.Generator().manual_seed(0)

    def stack(*shape):
        return torch.randn(1, here, *shape, generator=generator) * 0.1

    rank, adapters = 4, torch.tensor([0, -1, 0, 0, -1, 0, 0, 0, -1])
    a13, b13 = [stack(rank, HIDDEN) for _ in "gu"], [stack(INNER, rank) for _ in "gu"]
    a2, b2 = [stack(rank, INNER)], [stack(HIDDEN, rank)]
    lora = SimpleNamespace(
        w13_lora_a_stacked=a13, w13_lora_b_stacked=b13, w2_lora_a_stacked=a2, w2_lora_b_stacked=b2,
        w13_num_slices=2, local_num_experts=here,
        punica_wrapper=SimpleNamespace(token_lora_indices=pad(adapters, (0, 3))),
    )  # fmt: skip
    y, launched = call.run(lora=lora, bits=bits)
    assert sum("moe_w4a" in name for name in launched) == 2

    local = call.ids if call.map is None else call.map[call.ids]
    expected = torch.zeros(len(y), HIDDEN, dtype=torch.float64)
    for m, j in ((m, j) for m in range(len(y)) for j in range(CHOICES) if local[m, j] >= 0):
        e, w = int(local[m, j]), [x.weights[int(local[m, j])].dequantize(torch.float64)
                                  for x in (call.w13, call.w2)]  # fmt: skip
        if adapters[m] >= 0:
            w[0] = w[0] + torch.cat(
                [(b[0, e] @ a[0, e]).double() for a, b in zip(a13, b13, strict=True)]
            )
            w[1] = w[1] + (b2[0][0, e] @ a2[0][0, e]).double()
        h = OAI(w[0] @ call.a[m].double() + call.w13.bias[e].double())
        expected[m] += call.weights[m, j].double() * (w[1] @ h + call.w2.bias[e].double())
    assert relative_error(y, expected) < (2**-4 if bits == 8 else 2**-6)
