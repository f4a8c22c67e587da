# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts through real vLLM engines, against transformers with the same experts.

The checkpoints are those of ModelOpt and llm-compressor for tiny Qwen3-MoE and Qwen2-MoE models
(the latter with a shared expert); see tests/fixtures/make_fixtures.py.
"""

import pytest
import torch
from packaging.version import Version
from serving_cases import (
    EXPERT_FIXTURES,
    KEEP_KV,
    NUM_TOKENS,
    PROMPT,
    TWO_RANKS,
    compare,
    layer_of,
    rounded,
)

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.compat import versions
from vllm_nvfp4.testing.checkpoints import (
    edit_tensors,
    extract_fixture,
    give_shards_their_own_scale,
)
from vllm_nvfp4.testing.engine import ask_engine, ask_reference, engine, plain_model
from vllm_nvfp4.testing.tiny_models import write_model

EXPERTS = {"enable_expert_parallel": True}


@pytest.mark.vllm
@pytest.mark.parametrize("name", EXPERT_FIXTURES)
def test_every_dialect_gives_the_tokens_of_its_dequantised_experts(name, tmp_path):
    compare(extract_fixture(name, tmp_path), atol=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("name", [EXPERT_FIXTURES[0], EXPERT_FIXTURES[2]])
def test_w1_and_w3_keep_their_own_global_scale(name, tmp_path):
    compare(give_shards_their_own_scale(extract_fixture(name, tmp_path)), atol=1e-4)


@pytest.mark.vllm
def test_compiled_by_torch(tmp_path):
    compare(extract_fixture(EXPERT_FIXTURES[0], tmp_path), atol=1e-4, enforce_eager=False)


@pytest.mark.vllm
def test_a_vllm_whose_modular_kernel_runs_on_gpus_only(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "vllm_version", lambda: Version("0.28"))
    compare(extract_fixture(EXPERT_FIXTURES[2], tmp_path), atol=1e-4)


@pytest.mark.vllm
def test_any_order_of_the_experts_gives_the_same_tokens(tmp_path, monkeypatch):
    """As vLLM moves experts between ranks to balance their load: a row of every parameter that
    ``get_expert_weights`` names, and the numbers that the router chooses with it."""

    def moved(router, order):
        select, place = router.select_experts, order.argsort()

        def select_moved(*args, **kwargs):
            weights, ids = select(*args, **kwargs)
            return weights, place[ids.long()].to(ids.dtype)

        return select_moved

    folder = give_shards_their_own_scale(extract_fixture(EXPERT_FIXTURES[0], tmp_path))
    with engine(folder, dtype="float32", additional_config=KEEP_KV) as llm:
        expected = ask_engine(llm, PROMPT, NUM_TOKENS)
        order = torch.tensor([2, 0, 3, 1])
        for i in range(2):
            mlp = layer_of(llm, f"model.layers.{i}.mlp")
            routed = mlp.experts.routed_experts
            assert routed.quant_method.supports_eplb
            rows = list(routed.get_expert_weights())
            assert len(rows) == 6  # codes and two kinds of scales, of w13 and of w2
            for weight in rows:
                assert weight.shape[0] == 4
                weight.copy_(weight[order])
            runner = layer_of(llm, f"model.layers.{i}.mlp.experts")
            monkeypatch.setattr(runner.router, "select_experts", moved(runner.router, order))
        llm.reset_prefix_cache()
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    assert (answer.logprobs - expected.logprobs).abs().max() < 1e-4


@pytest.mark.vllm
def test_experts_that_this_package_wrote(tmp_path):
    write_nvfp4(write_model(tmp_path / "bf16", "qwen3_moe"), tmp_path / "nvfp4")
    inventory = validate(tmp_path / "nvfp4", *read_config(tmp_path / "nvfp4"))
    assert sum(r.format == "nvfp4" and ".experts." in r.name for r in inventory.layers) == 24
    compare(tmp_path / "nvfp4", atol=1e-4)


@pytest.fixture
def one_core_per_rank(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.vllm
@pytest.mark.usefixtures("one_core_per_rank")
def test_two_ranks_give_the_same_tokens(tmp_path):
    """The other checkpoints: tests/trust/test_scale_out.py."""
    compare(extract_fixture(EXPERT_FIXTURES[3], tmp_path), atol=1e-4, **TWO_RANKS)


def quantise_like_online(model, fmt):
    """Round every layer but lm_head and the routers, each half of a stacked w13 on its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_up_proj" in name and parameter.dim() == 3:
                for expert in parameter:
                    for half in expert.chunk(2):
                        half.copy_(rounded(half, fmt))
            elif parameter.dim() == 3:
                for expert in parameter:
                    expert.copy_(rounded(expert, fmt))
            elif name.endswith("_proj.weight"):
                parameter.copy_(rounded(parameter, fmt))
    return model


@pytest.mark.vllm
@pytest.mark.usefixtures("one_core_per_rank")
@pytest.mark.parametrize(
    ("family", "fmt", "options"),
    [
        ("qwen3_moe", "nvfp4", {}),
        ("qwen2_moe", "mxfp4", {}),
        ("mixtral", "nvfp4", {}),
        ("qwen3_moe", "nvfp4", TWO_RANKS | EXPERTS),
    ],
)
def test_16_bit_experts_are_quantised_while_they_load(family, fmt, options, tmp_path):
    folder = write_model(tmp_path / family, family)
    reference = quantise_like_online(plain_model(folder, torch.float32), fmt)
    expected = ask_reference(reference, PROMPT, NUM_TOKENS)
    extra = {"nvfp4": {"kv_cache": "keep", "online_format": fmt}}
    with engine(folder, dtype="float32", additional_config=extra, **options) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    assert (answer.logprobs - expected.logprobs).abs().max() < 1e-4


def stack_experts(tensors):
    """As transformers names them in memory: one tensor for all experts of a layer."""
    for layer in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        parts = {
            part: [tensors.pop(f"{layer}.{e}.{part}.weight") for e in range(4)]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
        tensors[f"{layer}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{layer}.down_proj"] = torch.stack(parts["down_proj"])


@pytest.mark.vllm
def test_16_bit_experts_stacked_in_one_tensor(tmp_path):
    folder = edit_tensors(write_model(tmp_path / "qwen3", "qwen3_moe"), stack_experts)
    reference = quantise_like_online(plain_model(folder, torch.float32), "nvfp4")
    expected = ask_reference(reference, PROMPT, NUM_TOKENS)
    with engine(folder, dtype="float32", additional_config=KEEP_KV) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    assert (answer.logprobs - expected.logprobs).abs().max() < 1e-4
