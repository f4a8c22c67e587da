# SPDX-License-Identifier: Apache-2.0
"""Every dialect through a real vLLM engine, against transformers with the dequantised weights."""

import pytest
import torch
from safetensors.torch import load_file
from serving_cases import (
    KEEP_KV,
    NO_FP8,
    NUM_TOKENS,
    PROMPT,
    compare,
    layer_of,
    quantise_like_online,
    rounded,
    warnings_of,
)

from vllm_nvfp4.testing.checkpoints import (
    extract_fixture,
    fixture_names,
    forget_kv_cache,
    give_shards_their_own_scale,
    make_legacy,
    write_dequantized,
)
from vllm_nvfp4.testing.engine import (
    ask_engine,
    ask_reference,
    engine,
    has_fp8_kv_cache,
    plain_model,
    reference_model,
)
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("name", fixture_names())
def test_every_dialect_gives_the_tokens_of_its_dequantised_weights(name, tmp_path):
    # A cache that the checkpoint wants in FP8 would hide the arithmetic of the layers.
    compare(forget_kv_cache(extract_fixture(name, tmp_path)), atol=1e-4)


def test_the_second_name_is_the_same_method(tmp_path):
    compare(extract_fixture("modelopt/w4a16-llama", tmp_path), atol=1e-4, quantization="nvfp4_ada")


@pytest.mark.cpu_path
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_bf16_is_as_exact_as_bf16_of_the_dequantised_weights(family, tmp_path):
    name = "compressed_tensors/nvfp4a16-qwen3" if family == "qwen3" else f"modelopt/w4a16-{family}"
    folder = extract_fixture(name, tmp_path)
    plain = write_dequantized(folder, tmp_path / "plain")
    reference = ask_reference(reference_model(folder, torch.float32), PROMPT, NUM_TOKENS)
    errors = []
    for model, quantization in ((folder, "nvfp4"), (plain, None)):
        options = {"quantization": quantization, "dtype": "bfloat16"}
        with engine(model, additional_config=KEEP_KV, **options) as llm:
            answer = ask_engine(llm, PROMPT, NUM_TOKENS)
        rows = len(PROMPT)  # further on, the two may have taken different words
        errors.append((answer.logprobs - reference.logprobs)[:rows].square().mean().sqrt().item())
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("name", ["modelopt/mixed-llama", "modelopt/w4a16-llama"])
def test_legacy_modelopt_config_file_alone(name, tmp_path):
    compare(make_legacy(extract_fixture(name, tmp_path)), atol=1e-4)


@pytest.mark.parametrize("name", ["modelopt/w4a16-llama", "compressed_tensors/nvfp4a16-qwen3"])
def test_shards_of_a_fused_layer_keep_their_own_global_scale(name, tmp_path):
    compare(give_shards_their_own_scale(extract_fixture(name, tmp_path)), atol=1e-4)


@pytest.mark.cpu_path
@pytest.mark.parametrize("tool", ["modelopt", "compressed_tensors", "quark"])
def test_kv_cache_scales_of_the_checkpoint_reach_the_attention(tool, tmp_path):
    folder = extract_fixture(f"{tool}/nvfp4-kv8-llama", tmp_path)
    stored = load_file(folder / "model.safetensors")
    k_scale, v_scale = (
        next(t.item() for n, t in stored.items() if ".layers.0." in n and n.endswith(names))
        for names in ((f".{x}_scale", f".{x}_proj.output_scale") for x in "kv")
    )
    is_fp8 = has_fp8_kv_cache()
    with warnings_of("layers.kv_cache") as lines, engine(folder, dtype="bfloat16") as llm:
        attention = layer_of(llm, "model.layers.0.self_attn.attn")
        answer = ask_engine(llm, PROMPT, 2)
        if not is_fp8:
            assert attention.kv_cache_dtype == "auto"
            assert (attention._k_scale.item(), attention._v_scale.item()) == (1, 1)
            asked = "nvfp4: KV cache in bfloat16, not in FP8 as the checkpoint asks"
            assert lines == [f"{asked}: {NO_FP8}"]
        else:
            assert lines == []
            assert attention.kv_cache_dtype.startswith("fp8")
            assert attention._k_scale.item() == pytest.approx(k_scale, rel=1e-6)
            assert attention._v_scale.item() == pytest.approx(v_scale, rel=1e-6)
    if not is_fp8:
        # As if the checkpoint had asked for nothing.
        with engine(folder, dtype="bfloat16", kv_cache_dtype="bfloat16") as llm:
            plain = ask_engine(llm, PROMPT, 2)
        assert torch.equal(answer.logprobs, plain.logprobs)


@pytest.mark.cpu_path
def test_fp8_kv_cache_is_the_default_and_the_flag_wins(tmp_path):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    is_fp8 = has_fp8_kv_cache()
    default = "fp8" if is_fp8 else "auto"
    for options, expected in (({}, default), ({"kv_cache_dtype": "bfloat16"}, "bfloat16")):
        with engine(folder, dtype="bfloat16", **options) as llm:
            assert layer_of(llm, "model.layers.0.self_attn.attn").kv_cache_dtype == expected
    asked = [
        *({"kv_cache_dtype": dtype} for dtype in ("fp8", "fp8_e4m3", "fp8_e5m2")),
        {"additional_config": {"nvfp4": {"kv_cache": "fp8"}}},
    ]
    for options in () if is_fp8 else asked:
        error = f"^(--kv-cache-dtype fp8|option kv_cache=fp8).*: {NO_FP8}. Leave it out"
        with pytest.raises(ValueError, match=error), engine(folder, **options):
            pass


@pytest.mark.parametrize(
    ("family", "fmt"),
    [
        ("llama", "nvfp4"),
        ("llama-bias", "nvfp4"),
        ("qwen3", "nvfp4"),
        ("gemma3", "nvfp4"),
        ("qwen3", "mxfp4"),
    ],
)
def test_16_bit_checkpoint_is_quantised_while_it_loads(family, fmt, tmp_path):
    folder = write_model(tmp_path / family, family)
    reference = quantise_like_online(plain_model(folder, torch.float32), fmt)
    expected = ask_reference(reference, PROMPT, NUM_TOKENS)
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
