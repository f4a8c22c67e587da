# SPDX-License-Identifier: Apache-2.0
"""Tiny models of families whose layers are named, stacked or fused in ways of their own, and which
of their tensors of two or more dimensions are no linear layers to quantise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "decoder_sparse_step": 1,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_GDN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "shared_expert_intermediate_size": 4,  # as many rows as there are experts
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "head_dim": 32,
}
_TABLES = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True)
class Family:
    """config: class of transformers' configuration; keys: of it; kept: names, numbers as #, of what
    stays in 16 bits; auto: transformers' class that makes the model"""

    config: str
    keys: dict[str, Any]
    kept: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"


FAMILIES = {
    "qwen3": Family("Qwen3Config", {}, _TABLES),
    "qwen3_moe": Family("Qwen3MoeConfig", _EXPERTS, (*_TABLES, "model.layers.#.mlp.gate")),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeConfig",
        {
            "text_config": SIZES
            | _EXPERTS
            | {
                "head_dim": 32,
                "norm_topk_prob": True,  # in the hub's files; vLLM asks for it
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [6, 5, 5],
                    "rope_theta": 1e4,
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
        (
            "lm_head",
            "model.language_model.embed_tokens",
            "model.language_model.layers.#.mlp.gate",
            "model.visual.blocks.#.attn.proj",
            "model.visual.blocks.#.attn.qkv",
            "model.visual.blocks.#.mlp.linear_fc#",
            "model.visual.deepstack_merger_list.#.linear_fc#",
            "model.visual.merger.linear_fc#",
            "model.visual.patch_embed.proj",
            "model.visual.pos_embed",
        ),
        "AutoModelForImageTextToText",
    ),
    "granite4": Family(
        "GraniteMoeHybridConfig",
        _EXPERTS
        | {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "shared_intermediate_size": 64,
            "intermediate_size": 48,
        },
        (
            *_TABLES,
            "model.layers.#.block_sparse_moe.router.layer",
            "model.layers.#.mamba.conv#d",
        ),
    ),
    "starcoder2": Family("Starcoder2Config", {}, _TABLES),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        _EXPERTS | _GDN,
        (
            *_TABLES,
            "model.layers.#.mlp.gate",
            "model.layers.#.mlp.shared_expert_gate",
            "model.layers.#.mlp.shared_expert.down_proj",  # K of 4
            "model.layers.#.linear_attn.conv#d",
        ),
    ),
    "glm47_flash": Family(
        "Glm4MoeLiteConfig",
        _EXPERTS | _MLA | {"mlp_layer_types": ["dense", "sparse"]},
        (*_TABLES, "model.layers.#.mlp.gate"),
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config", _EXPERTS | _MLA, (*_TABLES, "model.layers.#.mlp.gate")
    ),
    "jamba": Family(
        "JambaConfig",
        _EXPERTS
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
        },
        (
            *_TABLES,
            "model.layers.#.feed_forward.router",
            "model.layers.#.mamba.A_log",
            "model.layers.#.mamba.conv#d",
            "model.layers.#.mamba.dt_proj",
            "model.layers.#.mamba.in_proj",
            "model.layers.#.mamba.out_proj",
            "model.layers.#.mamba.x_proj",
        ),
    ),
    "mamba2": Family(
        "Mamba2Config",
        {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 32},
        ("lm_head", "backbone.embeddings", "backbone.layers.#.mixer.conv#d"),
    ),
    "falcon_h1": Family(  # a table that no checkpoint holds in each mixer
        "FalconH1Config",
        {
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 32,
        },
        ("lm_head", "model.embed_tokens", "model.layers.#.mamba.conv#d"),
    ),
    "gemma3n": Family(
        "Gemma3nTextConfig",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "intermediate_size": [128, 128],
            "vocab_size_per_layer_input": 288,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 16,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (
            "model.altup_projections.#",
            "model.altup_unembed_projections.#",
            "model.embed_tokens",
            "model.embed_tokens_per_layer",
            "model.layers.#.altup.correction_coefs",
            "model.layers.#.altup.prediction_coefs",
            "model.per_layer_model_projection",
        ),
    ),
    "gemma4_moe": Family(
        "Gemma4TextConfig",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 288,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        },
        ("model.embed_tokens", "model.layers.#.router.proj"),
    ),
    "gemma4_e": Family(  # inputs of each layer's own, layers that share keys and values
        "Gemma4TextConfig",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "global_head_dim": 32,
            "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 288,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        (
            "model.embed_tokens",
            "model.embed_tokens_per_layer",
            "model.per_layer_model_projection",
        ),
    ),
    "llama4": Family(
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 32,  # gate and up together as wide as the hidden state
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 1,
            "moe_layers": [0, 1],
            "head_dim": 32,
            "attention_chunk_size": 128,
            "no_rope_layers": [1, 0],
        },
        (*_TABLES, "model.layers.#.feed_forward.router"),
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        _EXPERTS | {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
        (*_TABLES, "model.layers.#.mlp.router"),
    ),
    "whisper": Family(
        "WhisperConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 16,
            "max_source_positions": 64,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            "tie_word_embeddings": True,
        },
        (
            "model.decoder.embed_positions",
            "model.decoder.embed_tokens",
            "model.encoder.conv#",
            "model.encoder.embed_positions",
            *(f"model.encoder.layers.#.self_attn.{n}_proj" for n in ("k", "out", "q", "v")),
            "model.encoder.layers.#.fc#",
        ),
        "AutoModelForSpeechSeq2Seq",
    ),
    "bert": Family(
        "BertConfig",
        {},
        (
            "embeddings.position_embeddings",
            "embeddings.token_type_embeddings",
            "embeddings.word_embeddings",
            "pooler.dense",
        ),
        "AutoModel",
    ),
}


def write_family(folder: Path, name: str, seed: int = 0) -> Path:
    """A checkpoint of random weights in BF16, with the names and stacks that the hub's have."""
    import torch
    import transformers

    family = FAMILIES[name]
    is_nested = "text_config" in family.keys
    keys = family.keys if is_nested else SIZES | family.keys
    config = getattr(transformers, family.config)(**keys)
    torch.manual_seed(seed)
    model = getattr(transformers, family.auto).from_config(config).to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return folder
