# SPDX-License-Identifier: Apache-2.0
"""What vLLM does with a model beside running it: compile and reload it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_cases import KEEP_KV, NUM_TOKENS, PROMPT, layer_of, write_with_vocabulary
from stored_forms import store

from vllm_nvfp4.kernels import ops
from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.engine import ask_engine, engine, has_fp8_kv_cache
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm

FLOAT32 = {"dtype": "float32", "additional_config": KEEP_KV}


@pytest.mark.parametrize(("activation", "variant"), [("16", "exact"), ("8", "int8")])
def test_compiled_graph_gives_the_tokens_of_eager_mode(activation, variant, tmp_path, monkeypatch):
    """With 8 bits the compiled graph quantises where the activations are computed (fusion.py)."""
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    # A graph from a cache has been through the pass.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    split = []
    takes_8_bits = ops.takes_8_bits
    monkeypatch.setattr(ops, "takes_8_bits", lambda *a: split.append(takes_8_bits(*a)) or split[-1])
    options = {"kv_cache": "keep", "activation": activation, "a8_variant": variant}
    options = {"nvfp4": options}
    answers = []
    for eager in (True, False):
        with engine(folder, enforce_eager=eager, dtype="float32", additional_config=options) as llm:
            answers.append(ask_engine(llm, PROMPT, NUM_TOKENS))
            layers = llm.llm_engine.model_config.hf_config.num_hidden_layers
    eager, compiled = answers
    assert eager.tokens == compiled.tokens
    assert (eager.logprobs - compiled.logprobs).abs().max() < 1e-4
    # qkv, o, gate_up and down of every layer, each time that vLLM compiles the graph.
    assert all(split)
    assert len(split) % (4 * layers) == 0
    assert bool(split) == (activation == "8")


@pytest.mark.cpu_path
def test_compiled_graph_reads_the_kv_cache_as_eager_mode_does(tmp_path):
    """In BF16 the graph rounds elsewhere: it may err as much as eager mode does, not more."""
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    with engine(folder, **FLOAT32) as llm:
        exact = ask_engine(llm, PROMPT, 1)
    cache = "fp8" if has_fp8_kv_cache() else "auto"
    errors = []
    for eager in (True, False):
        with engine(folder, dtype="bfloat16", enforce_eager=eager) as llm:
            assert layer_of(llm, "model.layers.0.self_attn.attn").kv_cache_dtype == cache
            errors.append((ask_engine(llm, PROMPT, 1).logprobs - exact.logprobs).abs().mean())
    assert errors[1] < 1.25 * errors[0]


def _to_reload(name, folder):
    """A checkpoint of a kind: a fixture, or made."""
    if "/" in name:
        return extract_fixture(name, folder)
    llama = write_model(folder, "llama")
    if name == "vocabulary":
        write_with_vocabulary(llama, folder / "out", "fp8", "nvfp4")
        return folder / "out"
    if name == "widened":
        forms = {"o_proj": "mxfp8", "q_proj": "awq", "down_proj": "fp8block", "v_proj": "bf16"}
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        kept = ("embed", "head", "norm")
        by_leaf = dict.fromkeys(kept, "bf16") | forms
        store(llama, lambda n: next((f for k, f in by_leaf.items() if k in n), "nvfp4"), config)
    return llama


@pytest.mark.parametrize(
    "name",
    [
        *("compressed_tensors/mixed-llama", "fp_quant/nvfp4-llama", "moe_modelopt/nvfp4-qwen3"),
        *("moe_mlx/nvfp4-qwen3", "vocabulary", "widened", "online"),
    ],
)
def test_reloading_other_weights_in_place_gives_their_bits(name, tmp_path):
    folder = _to_reload(name, tmp_path)
    with engine(folder, **FLOAT32) as llm:
        expected = ask_engine(llm, PROMPT, NUM_TOKENS)
    other = shutil.copytree(folder, tmp_path / "other")
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(tensors | _half_of(tensors), file, {"format": "pt"})
    with engine(other, **FLOAT32) as llm:
        assert not torch.equal(ask_engine(llm, PROMPT, NUM_TOKENS).logprobs, expected.logprobs)
        model = layer_of(llm, "")
        pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data.zero_()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
        # Captured graphs hold the addresses.
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    assert answer.tokens == expected.tokens
    assert torch.equal(answer.logprobs, expected.logprobs)


def _half_of(tensors):
    """Those in 16 bits and float32, scales among them, by half."""
    return {n: t / 2 for n, t in tensors.items() if t.is_floating_point() and t.itemsize > 1}
