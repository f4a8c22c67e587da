# SPDX-License-Identifier: Apache-2.0
"""A layer that loading did not fill ends the load with the tensor's name, whatever memory held."""

import pytest
import torch
from serving_cases import KEEP_KV, PROMPT, TWO_RANKS

from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.config import NvFp4Config
from vllm_nvfp4.layers.filling import check_filled, counted
from vllm_nvfp4.testing.checkpoints import edit_tensors, extract_fixture
from vllm_nvfp4.testing.engine import ask_engine, ask_reference, engine

MODELOPT = "modelopt/nvfp4-kv8-llama"


def parameter(shape):
    made = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
    made.nvfp4_is_expected = True
    return made


def layer_with(made):
    layer = torch.nn.Module()
    layer.register_parameter("weight", made)
    return layer


def test_what_is_written_is_counted_once():
    made = parameter((4, 8))

    def write(param, rows):
        param.data[rows].copy_(torch.ones(2, 8))

    load = counted(write)
    load(made, slice(0, 2))
    load(made, slice(0, 2))  # the same shard again does not stand for the other
    with pytest.raises(CheckpointError, match=r"a\.b\.weight: found 16 of 32 elements"):
        check_filled(layer_with(made), "a.b")
    load(made, slice(2, 4))
    check_filled(layer_with(made), "a.b")


def test_a_loader_that_fills_the_rest_counts():
    made = parameter((4, 8))

    def write(param, loaded):
        param.data[:3].copy_(loaded)
        param.data[3:].fill_(0)

    counted(write)(made, torch.ones(3, 8))
    check_filled(layer_with(made), "a")


def test_a_loader_that_writes_elsewhere_does_not():
    made = parameter((4, 8))
    counted(lambda param, loaded: loaded.copy_(param))(made, torch.ones(4, 8))
    with pytest.raises(CheckpointError, match="found 0 of 32"):
        check_filled(layer_with(made), "a")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "gone", "named"),
    [
        (MODELOPT, "model.layers.1.self_attn.k_proj.weight", r"layers\.1\.self_attn\.qkv_proj\.w"),
        (MODELOPT, "model.layers.0.mlp.down_proj.weight", r"model\.layers\.0\.mlp\.down_proj\.w"),
        (
            "moe_modelopt/nvfp4-qwen3",
            "model.layers.1.mlp.experts.2.up_proj.weight",
            r"layers\.1\.mlp\.experts\.2\..*up_proj: weight",
        ),
    ],
)
def test_codes_that_no_file_holds(name, gone, named, tmp_path, monkeypatch):
    """Past the check of the headers, as where they are out of reach."""
    folder = edit_tensors(extract_fixture(name, tmp_path), lambda tensors: tensors.pop(gone))
    for index in folder.glob("*.index.json"):
        index.unlink()
    monkeypatch.setattr(NvFp4Config, "maybe_update_config", lambda *args, **kwargs: None)
    with pytest.raises(CheckpointError, match=named), engine(folder):
        pass


@pytest.mark.vllm
def test_a_model_that_replaces_a_loader(tmp_path, monkeypatch):
    """Mamba-2 with one group, over two ranks: it cuts in_proj by a loader of its own."""
    from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 32}
    config = GraniteMoeHybridConfig(
        vocab_size=288,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["mamba", "attention"],
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_d_conv=4,
        **sizes,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=128,
        position_embedding_type="nope",
        attention_multiplier=0.18,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                size = 1 if "embed" in name else weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path)
    expected = ask_reference(model.float(), PROMPT, 1).logprobs
    errors = []
    for options in ({}, TWO_RANKS):
        with engine(
            tmp_path,
            dtype="float32",
            additional_config=KEEP_KV,
            skip_tokenizer_init=True,
            **options,
        ) as llm:
            answer = ask_engine(llm, PROMPT, 1).logprobs
        errors.append((answer - expected).square().mean().sqrt().item())
    # One rank has a global scale for each part of in_proj, two have one for all of it: they round
    # alike well, and memory of any content would not.
    assert errors[1] < 1.5 * errors[0] < 1.0
