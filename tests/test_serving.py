# SPDX-License-Identifier: Apache-2.0
"""Every dialect through a real vLLM engine, against transformers with the dequantised weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.testing.checkpoints import (
    edit_json,
    extract_fixture,
    fixture_names,
    give_shards_their_own_scale,
    make_legacy,
)
from vllm_nvfp4.testing.engine import ask_engine, ask_reference, engine, reference_model
from vllm_nvfp4.testing.tiny_models import write_model

PROMPT = [3, 17, 200, 45, 99, 120, 7, 64, 250, 31, 12, 180]
NUM_TOKENS = 12
KEEP_KV = {"nvfp4": {"kv_cache": "keep"}}

pytestmark = pytest.mark.vllm


def compare(folder, atol, **options):
    """Greedy tokens equal, and log-probabilities within ``atol``, in float32 arithmetic."""
    expected = ask_reference(reference_model(folder, torch.float32), PROMPT, NUM_TOKENS)
    options = {"additional_config": KEEP_KV, "dtype": "float32"} | options
    with engine(folder, **options) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    rows = len(PROMPT) - 1 + NUM_TOKENS
    error = (answer.logprobs - expected.logprobs[:rows]).abs().max().item()
    assert error < atol, f"log-probabilities differ by up to {error}"


@pytest.mark.parametrize("name", fixture_names())
def test_every_dialect_gives_the_tokens_of_its_dequantised_weights(name, tmp_path):
    folder = extract_fixture(name, tmp_path)
    # A cache that the checkpoint wants in FP8 would hide the arithmetic of the layers.
    edit_json(folder / "config.json", lambda c: c["quantization_config"].pop("kv_cache_scheme", 0))
    compare(folder, atol=1e-4)


@pytest.mark.parametrize("name", ["modelopt/mixed-llama", "modelopt/w4a16-llama"])
def test_legacy_modelopt_config_file_alone(name, tmp_path):
    compare(make_legacy(extract_fixture(name, tmp_path)), atol=1e-4)


@pytest.mark.parametrize("name", ["modelopt/w4a16-llama", "compressed_tensors/nvfp4a16-qwen3"])
def test_shards_of_a_fused_layer_keep_their_own_global_scale(name, tmp_path):
    compare(give_shards_their_own_scale(extract_fixture(name, tmp_path)), atol=1e-4)


@pytest.mark.parametrize("name", ["modelopt/nvfp4-kv8-llama", "compressed_tensors/nvfp4-kv8-llama"])
def test_kv_cache_scales_of_the_checkpoint_reach_the_attention(name, tmp_path):
    folder = extract_fixture(name, tmp_path)
    stored = load_file(folder / "model.safetensors")
    k_scale, v_scale = (
        next(t.item() for n, t in stored.items() if ".layers.0." in n and n.endswith(f".{leaf}"))
        for leaf in ("k_scale", "v_scale")
    )
    with engine(folder, dtype="bfloat16") as llm:
        attention = layer_of(llm, "model.layers.0.self_attn.attn")
        assert attention.kv_cache_dtype.startswith("fp8")
        # vLLM keeps the loaded scale in the model's type before it widens it again.
        assert attention._k_scale.item() == pytest.approx(k_scale, rel=2**-8)
        assert attention._v_scale.item() == pytest.approx(v_scale, rel=2**-8)
        assert len(ask_engine(llm, PROMPT, 2).tokens) == 2


def test_fp8_kv_cache_is_the_default_and_the_flag_wins(tmp_path):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    for options, expected in (({}, "fp8"), ({"kv_cache_dtype": "bfloat16"}, "bfloat16")):
        with engine(folder, dtype="bfloat16", **options) as llm:
            assert layer_of(llm, "model.layers.0.self_attn.attn").kv_cache_dtype == expected


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_16_bit_checkpoint_is_quantised_while_it_loads(family, fmt, tmp_path):
    folder = write_model(tmp_path / family, family)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    quantise_shards_like_online(reference, fmt)
    expected = ask_reference(reference.eval(), PROMPT, NUM_TOKENS)
    options = {"kv_cache": "keep", "online_format": fmt}
    with engine(folder, dtype="float32", additional_config={"nvfp4": options}) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    assert (answer.logprobs - expected.logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_lm_head_and_embedding_options(family, fmt, tmp_path):
    """gemma3 ties the two: one copy, quantised once, serves both."""
    folder = extract_fixture(f"modelopt/w4a16-{family}", tmp_path)
    reference = reference_model(folder, torch.float32)
    with torch.no_grad():
        for module in {reference.lm_head, reference.get_input_embeddings()}:
            module.weight.copy_(rounded(module.weight, fmt))
            if family == "gemma3":
                break
    expected = ask_reference(reference, PROMPT, NUM_TOKENS)
    options = {"kv_cache": "keep", "lm_head": fmt, "embedding": fmt}
    with engine(folder, dtype="float32", additional_config={"nvfp4": options}) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    assert (answer.logprobs - expected.logprobs).abs().max() < 1e-4


def rounded(weight, fmt):
    if fmt == "fp8":
        quantised, scale = quantize_fp8_per_row(weight)
        return quantised.float() * scale
    if fmt == "mxfp4":
        return quantize_mxfp4(weight).dequantize()
    return quantize_nvfp4(weight, "mse").dequantize()


def quantise_shards_like_online(model, fmt):
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.copy_(rounded(module.weight, fmt))


def layer_of(llm, name):
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model.get_submodule(name)
