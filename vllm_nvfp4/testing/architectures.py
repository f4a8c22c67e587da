# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights of the architectures that vLLM serves, in the hub's layout.

``tiny_models`` has the few that the tests share; this is the table of `make models`, one entry for
each model class. A configuration of transformers makes the model, so the files have the names and
stacks that the hub's have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors
from vllm_nvfp4.testing.drafts import add_layer_past_the_end, add_mtp, add_nemotron_mtp
from vllm_nvfp4.testing.tiny_models import build_tokenizer

VOCAB_SIZE = 320
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_DROP = object()


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    name:    of the row, and of its folder
    config:  class of transformers' configuration
    keys:    its keyword arguments
    kind:    what is in it: "dense", "moe", "mla", "mamba2", "gdn" or "vision", several joined by +;
             "encoder" alone: it gives embeddings, and has a tokenizer, which vLLM asks for then
    models:  names on the hub that people run
    auto:    transformers' class that makes the model
    dtype:   for both engines; vLLM's kernels of gated delta nets and of MLA on CPUs want
             16 bits
    written: class in the hub's config.json, where transformers' is called otherwise
    rename:  pattern -> replacement, in the tensors' names, where transformers writes others than
             the hub has
    turned:  pattern of the stacks that transformers writes turned against the hub's
    """

    name: str
    config: str
    keys: Mapping[str, Any]
    kind: str
    models: str = ""
    auto: str = "AutoModelForCausalLM"
    dtype: str = "float32"
    written: str = ""
    rename: tuple[str, str] | None = None
    turned: str = ""


def _sizes(**changes: Any) -> dict[str, Any]:
    keys = _SIZES | changes
    return {name: value for name, value in keys.items() if value is not _DROP}


_IMAGE_TEXT = "AutoModelForImageTextToText"
_NO_HEAD_DIM: dict[str, Any] = {"head_dim": _DROP}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
_LOCAL_EXPERTS: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
}
_SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# All experts of each token: in BF16 a router's tie would be settled by rounding.
_ALL_ROUTED: dict[str, Any] = {**_ROUTED, "n_routed_experts": 4, "num_experts_per_tok": 4}
_MLA: dict[str, Any] = {
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": _DROP,
    "num_key_value_heads": 4,
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 32,
}
_NEMOTRON_H: dict[str, Any] = {
    "num_hidden_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 32,
    "n_groups": 2,
    "chunk_size": 32,
    "conv_kernel": 4,
    "mlp_hidden_act": "relu2",
}
_GDN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_SLIDING: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GRANITE: dict[str, Any] = {
    **_NO_HEAD_DIM,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.18,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_GRANITE_HYBRID: dict[str, Any] = {
    **_GRANITE,
    **_MAMBA2,
    "layer_types": ["mamba", "attention"],
    "intermediate_size": 64,
    "shared_intermediate_size": 128,
    "position_embedding_type": "nope",
}
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_IMAGE_TOKENS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
    "tie_word_embeddings": False,
}


def _qwen_tower(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
    }
    return sizes | changes


def _rope(sections: list[int], **changes: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "mrope_section": sections,
        "rope_theta": 1e4,
        "mrope_interleaved": True,
    }
    return {"rope_parameters": rope | changes}


def _qwen_vision(text: dict[str, Any], **tower: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": _qwen_tower(**tower), **_IMAGE_TOKENS}


_ROPE_VL = _rope([6, 5, 5])
_ROPE_35 = _rope([3, 3, 2], partial_rotary_factor=0.5)
_QWEN_MOE_GDN: dict[str, Any] = {
    **_GDN,
    **_EXPERTS,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 64,
}
_GEMMA4: dict[str, Any] = {
    **_SLIDING,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "global_head_dim": 64,
}

_ENCODER: dict[str, Any] = _sizes(**_NO_HEAD_DIM, num_key_value_heads=_DROP, pad_token_id=1)

# In the order of how much users talk of them, then by name.
RANKED = (
    Architecture(
        "qwen3.5", "Qwen3_5Config", _qwen_vision(_sizes(**_GDN, **_ROPE_35)), "gdn+vision",
        "Qwen3.6-27B, Qwen3.8-27B", _IMAGE_TEXT, "bfloat16",
    ),
    Architecture(
        "qwen3.5-moe", "Qwen3_5MoeConfig", _qwen_vision(_sizes(**_QWEN_MOE_GDN, **_ROPE_35)),
        "gdn+moe+vision", "Qwen3.6-35B-A3B", _IMAGE_TEXT, "bfloat16",
    ),
    Architecture(
        "gemma4-moe", "Gemma4TextConfig",
        _sizes(**_GEMMA4, enable_moe_block=True, num_experts=8, top_k_experts=2,
               moe_intermediate_size=64),
        "moe", "Gemma-4-26B-A4B",
    ),
    Architecture(
        "gemma4", "Gemma4TextConfig",
        _sizes(**{**_GEMMA4, "num_hidden_layers": 4, "hidden_size_per_layer_input": 32,
                  "layer_types": _SLIDING["layer_types"] * 2}),
        "dense", "Gemma-4-31B, 12B",
    ),
    Architecture(
        "nemotron-h-moe", "NemotronHConfig",
        _sizes(**_NEMOTRON_H, layers_block_type=["mamba", "moe", "attention", "moe"],
               **(_ROUTED | {"first_k_dense_replace": _DROP}), norm_topk_prob=True,
               moe_shared_expert_intermediate_size=64),
        "mamba2+moe", "Nemotron-3-Nano-30B-A3B, 3.5-Lightning-30B-A3B",
    ),
    Architecture("gpt-oss", "GptOssConfig", _sizes(**_LOCAL_EXPERTS, **_SLIDING), "moe",
                 "gpt-oss-20b (BF16)"),
    Architecture("qwen3-moe", "Qwen3MoeConfig", _sizes(**_EXPERTS, **_SPARSE), "moe",
                 "Qwen3-30B-A3B"),
    Architecture("qwen3", "Qwen3Config", _sizes(), "dense", "Qwen3-8B, 14B, 32B"),
    Architecture(
        "glm4-moe-lite", "Glm4MoeLiteConfig",
        _sizes(**_MLA, **_ALL_ROUTED, mlp_layer_types=["dense", "sparse"]), "mla+moe",
        "GLM-4.7-Flash", dtype="bfloat16",
    ),
    Architecture(
        "mistral3", "Mistral3Config",
        {
            "text_config": _sizes() | {"model_type": "mistral"},
            "vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 32},
            "image_token_index": 300,
        },
        "dense+vision", "Mistral-Small-3.2-24B, Ministral, Devstral", _IMAGE_TEXT,
    ),
    Architecture("llama", "LlamaConfig", _sizes(), "dense", "Llama-3.1-8B, 3.3-70B"),
    Architecture("qwen3-vl", "Qwen3VLConfig",
                 _qwen_vision(_sizes(**_ROPE_VL), deepstack_visual_indexes=[0]), "dense+vision",
                 "Qwen3-VL", _IMAGE_TEXT),
    Architecture(
        "qwen2.5-vl", "Qwen2_5_VLConfig",
        _qwen_vision(_sizes(**_NO_HEAD_DIM, **_rope([4, 6, 6])), patch_size=14,
                     fullatt_block_indexes=[1]),
        "dense+vision", "Qwen2.5-VL", _IMAGE_TEXT,
    ),
    Architecture(
        "qwen3-vl-moe", "Qwen3VLMoeConfig",
        _qwen_vision(_sizes(**(_EXPERTS | {"moe_intermediate_size": 96}), **_SPARSE, **_ROPE_VL),
                     deepstack_visual_indexes=[0]),
        "moe+vision", "Qwen3-VL-MoE", _IMAGE_TEXT,
        turned=r"experts\.(gate_up|down)_proj$",
    ),
    Architecture("granite4-moe", "GraniteMoeHybridConfig",
                 _sizes(**_GRANITE_HYBRID, num_local_experts=8, num_experts_per_tok=2),
                 "mamba2+moe", "Granite-4-H"),
    Architecture("falcon-h1", "FalconH1Config", _sizes(mamba_d_ssm=256, **_MAMBA2), "mamba2",
                 "Falcon-H1"),
    Architecture(
        "lfm2-moe", "Lfm2MoeConfig",
        _sizes(**_NO_HEAD_DIM, layer_types=["conv", "full_attention"], num_dense_layers=1,
               num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
        "moe", "LFM2-8B-A1B",
    ),
    Architecture(
        "hunyuan-moe", "HunYuanMoEV1Config",
        _sizes(num_experts=8, moe_topk=[2, 2], moe_intermediate_size=[64, 64],
               intermediate_size=64, num_shared_expert=[1, 1], use_mixed_mlp_moe=True),
        "moe", "HunYuan-A13B",
    ),
    Architecture(
        "llama4", "Llama4Config",
        {
            "text_config": _sizes(
                num_local_experts=8, num_experts_per_tok=1, intermediate_size=64,
                intermediate_size_mlp=128, interleave_moe_layer_step=2, moe_layers=[1],
                attention_chunk_size=128, no_rope_layers=[1, 0],
            ),
            "vision_config": _TOWER | {
                "intermediate_size": 256, "vision_output_dim": 128, "projector_input_dim": 128,
                "projector_output_dim": 128,
            },
            "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302,
        },
        "moe+vision", "Llama-4-Scout", _IMAGE_TEXT,
    ),
    Architecture(
        "deepseek-v2", "DeepseekV2Config",
        _sizes(**_MLA | {"q_lora_rank": None}, **_ALL_ROUTED, topk_method="greedy",
               norm_topk_prob=False),
        "mla+moe", "DeepSeek-V2-Lite", dtype="bfloat16",
    ),
    Architecture(
        "deepseek-v3", "DeepseekV3Config",
        _sizes(**_MLA, **(_ALL_ROUTED | {"n_group": 2, "topk_group": 2}), topk_method="noaux_tc",
               scoring_func="sigmoid"),
        "mla+moe", "DeepSeek-V3, R1", dtype="bfloat16",
    ),
    Architecture(
        "gemma3n", "Gemma3nTextConfig",
        _sizes(num_hidden_layers=4, tie_word_embeddings=True, sliding_window=16,
               vocab_size_per_layer_input=VOCAB_SIZE, hidden_size_per_layer_input=32,
               altup_num_inputs=2, laurel_rank=16, num_kv_shared_layers=0,
               intermediate_size=[256] * 4, activation_sparsity_pattern=[0.0] * 4,
               layer_types=_SLIDING["layer_types"] * 2),
        "dense", "Gemma-3n",
    ),
    Architecture(
        "jamba", "JambaConfig",
        _sizes(**_NO_HEAD_DIM, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
               expert_layer_period=2, expert_layer_offset=1, num_experts=4,
               num_experts_per_tok=2, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2,
               mamba_dt_rank=16, use_mamba_kernels=False),
        "mamba+moe", "Jamba",
    ),
    Architecture("minimax-m2", "MiniMaxM2Config",
                 _sizes(**_LOCAL_EXPERTS, scoring_func="sigmoid", use_routing_bias=True,
                        rotary_dim=32, use_qk_norm=True), "moe", "MiniMax-M2"),
    Architecture(
        "kimi-linear", "KimiLinearConfig",
        _sizes(**_MLA | {"q_lora_rank": None, "num_hidden_layers": 4}, num_experts=4,
               num_experts_per_tok=4, moe_intermediate_size=64, n_shared_experts=1,
               first_k_dense_replace=1),
        "mla+moe", "Kimi-Linear", dtype="bfloat16",
    ),
)  # fmt: skip

OTHERS = (
    Architecture("bert", "BertConfig", _ENCODER, "encoder", "bge, e5", "AutoModel"),
    Architecture("roberta", "RobertaConfig", _ENCODER, "encoder", "", "AutoModel"),
    Architecture("modernbert", "ModernBertConfig",
                 {**_ENCODER, "cls_token_id": 0, "sep_token_id": 0, "local_attention": 16,
                  "global_attn_every_n_layers": 2}, "encoder", "gte-modernbert", "AutoModel"),
    Architecture("apertus", "ApertusConfig", _sizes(), "dense"),
    Architecture("arcee", "ArceeConfig", _sizes(), "dense"),
    Architecture("cohere", "CohereConfig",
                 _sizes(**_NO_HEAD_DIM, tie_word_embeddings=True, logit_scale=1.0), "dense"),
    Architecture("cohere2", "Cohere2Config",
                 _sizes(**_SLIDING, tie_word_embeddings=True, logit_scale=1.0), "dense"),
    Architecture("dots1", "Dots1Config", _sizes(**_ROUTED), "moe"),
    Architecture("ernie4.5", "Ernie4_5Config", _sizes(), "dense"),
    Architecture(
        "ernie4.5-moe", "Ernie4_5_MoeConfig",
        _sizes(**_NO_HEAD_DIM, moe_num_experts=8, moe_k=2, moe_intermediate_size=64,
               moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1,
               moe_layer_interval=1, use_bias=False), "moe",
    ),
    Architecture("exaone4", "Exaone4Config", _sizes(**_SLIDING, sliding_window_pattern=2),
                 "dense"),
    Architecture(
        "exaone-moe", "ExaoneMoeConfig",
        _sizes(**_SLIDING, **_EXPERTS, num_shared_experts=1, first_k_dense_replace=1, n_group=1,
               topk_group=1, mlp_layer_types=["dense", "sparse"]), "moe",
    ),
    Architecture("flex-olmo", "FlexOlmoConfig",
                 _sizes(**_NO_HEAD_DIM, num_experts=8, num_experts_per_tok=2,
                        intermediate_size=64), "moe"),
    Architecture("gemma", "GemmaConfig", _sizes(tie_word_embeddings=True), "dense"),
    Architecture("gemma2", "Gemma2Config",
                 _sizes(**_SLIDING, tie_word_embeddings=True, query_pre_attn_scalar=32), "dense"),
    Architecture("gemma3", "Gemma3TextConfig",
                 _sizes(**_SLIDING, tie_word_embeddings=True, query_pre_attn_scalar=32), "dense"),
    Architecture(
        "gemma3-vision", "Gemma3Config",
        {
            "text_config": _sizes(tie_word_embeddings=True, sliding_window=16,
                                  query_pre_attn_scalar=32),
            "vision_config": _TOWER,
            "mm_tokens_per_image": 4, "image_token_id": 300, "boi_token_id": 301,
            "eoi_token_id": 302, "image_token_index": 300,
        }, "dense+vision", auto=_IMAGE_TEXT,
        rename=(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
    ),
    Architecture(
        "gemma4-vision", "Gemma4Config",
        {
            "text_config": _sizes(**_GEMMA4),
            "vision_config": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
                "position_embedding_size": 64, "default_output_length": 70,
            },
            "image_token_id": 300, "boi_token_id": 301, "eoi_token_id": 302,
            "video_token_id": 303, "audio_token_id": 304,
        }, "dense+vision", auto=_IMAGE_TEXT,
    ),
    Architecture("glm", "GlmConfig", _sizes(partial_rotary_factor=0.5), "dense"),
    Architecture("glm4", "Glm4Config", _sizes(partial_rotary_factor=0.5), "dense"),
    Architecture("glm4-moe", "Glm4MoeConfig",
                 _sizes(**_ROUTED, partial_rotary_factor=0.5, use_qk_norm=True), "moe"),
    Architecture("gpt2", "GPT2Config",
                 {"vocab_size": VOCAB_SIZE, "n_embd": 128, "n_layer": 2, "n_head": 4,
                  "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}, "dense"),
    Architecture("gpt-bigcode", "GPTBigCodeConfig",
                 {"vocab_size": VOCAB_SIZE, "n_embd": 128, "n_layer": 2, "n_head": 4,
                  "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}, "dense"),
    Architecture("gpt-neox", "GPTNeoXConfig",
                 _sizes(**_NO_HEAD_DIM, num_key_value_heads=_DROP), "dense"),
    Architecture("granite", "GraniteConfig", _sizes(**_GRANITE), "dense"),
    Architecture("granite4", "GraniteMoeHybridConfig",
                 _sizes(**_GRANITE_HYBRID, num_local_experts=0, num_experts_per_tok=0), "mamba2"),
    Architecture("granite-moe", "GraniteMoeConfig", _sizes(**_GRANITE, **_LOCAL_EXPERTS), "moe"),
    Architecture("hunyuan", "HunYuanDenseV1Config", _sizes(), "dense"),
    Architecture("lfm2", "Lfm2Config",
                 _sizes(**_NO_HEAD_DIM, layer_types=["conv", "full_attention"],
                        conv_dim=128, block_dim=128, block_ff_dim=256, block_norm_eps=1e-5,
                        block_multiple_of=64, block_auto_adjust_ff_dim=False),
                 "dense"),
    Architecture(
        "mamba2", "Mamba2Config",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4,
         "head_dim": 64, "state_size": 32, "n_groups": 1, "expand": 2, "conv_kernel": 4,
         "chunk_size": 32, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
         "pad_token_id": 0}, "mamba2",
    ),
    Architecture("mimo-v2", "MiMoV2FlashConfig",
                 _sizes(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
                        hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1], v_head_dim=32,
                        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=32,
                        swa_v_head_dim=32, sliding_window_size=16, layernorm_epsilon=1e-6), "moe"),
    Architecture("ministral3", "Ministral3Config", _sizes(), "dense"),
    Architecture("mistral", "MistralConfig", _sizes(), "dense"),
    Architecture("mixtral", "MixtralConfig", _sizes(**_LOCAL_EXPERTS), "moe"),
    Architecture("nemotron", "NemotronConfig", _sizes(), "dense"),
    Architecture("nemotron-h", "NemotronHConfig",
                 _sizes(**_NEMOTRON_H, layers_block_type=["mamba", "mlp", "attention", "mlp"]),
                 "mamba2"),
    Architecture("olmo2", "Olmo2Config", _sizes(**_NO_HEAD_DIM), "dense"),
    Architecture("olmo3", "Olmo3Config", _sizes(**_NO_HEAD_DIM, **_SLIDING), "dense"),
    Architecture("olmoe", "OlmoeConfig",
                 _sizes(**_NO_HEAD_DIM, num_experts=8, num_experts_per_tok=2,
                        intermediate_size=64), "moe"),
    Architecture("opt", "OPTConfig",
                 {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 2,
                  "ffn_dim": 256, "num_attention_heads": 4, "word_embed_proj_dim": 128,
                  "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
                  "pad_token_id": 0}, "dense"),
    Architecture("phi", "PhiConfig", _sizes(**_NO_HEAD_DIM), "dense"),
    Architecture("phi3", "Phi3Config", _sizes(**_NO_HEAD_DIM), "dense"),
    Architecture("phi-moe", "PhimoeConfig", _sizes(**_NO_HEAD_DIM, **_LOCAL_EXPERTS), "moe",
                 written="PhiMoEForCausalLM"),
    Architecture("qwen2", "Qwen2Config", _sizes(**_NO_HEAD_DIM), "dense"),
    Architecture("qwen2-moe", "Qwen2MoeConfig",
                 _sizes(**_NO_HEAD_DIM, **_EXPERTS, **_SPARSE,
                        shared_expert_intermediate_size=64), "moe"),
    Architecture("qwen3-next", "Qwen3NextConfig",
                 _sizes(**_QWEN_MOE_GDN, **_SPARSE, partial_rotary_factor=0.5), "gdn+moe",
                 dtype="bfloat16"),
    Architecture("seed-oss", "SeedOssConfig", _sizes(), "dense"),
    Architecture("smollm3", "SmolLM3Config", _sizes(**_NO_HEAD_DIM), "dense"),
    Architecture("solar-open", "SolarOpenConfig", _sizes(**_ROUTED), "moe"),
    Architecture("stablelm", "StableLmConfig", _sizes(**_NO_HEAD_DIM), "dense"),
    Architecture("starcoder2", "Starcoder2Config", _sizes(**_NO_HEAD_DIM), "dense"),
    Architecture(
        "whisper", "WhisperConfig",
        {"vocab_size": VOCAB_SIZE, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 256,
         "decoder_ffn_dim": 256, "max_source_positions": 50, "max_target_positions": 128,
         "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 300},
        "speech", "whisper-large-v3", "AutoModelForSpeechSeq2Seq",
    ),
    Architecture(
        "zamba2", "Zamba2Config",
        _sizes(**_NO_HEAD_DIM, num_hidden_layers=4, num_key_value_heads=4,
               layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=32, mamba_d_conv=4,
               mamba_expand=2, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=64,
               chunk_size=32, num_mem_blocks=1, use_shared_attention_adapter=True,
               use_mem_rope=True, adapter_rank=16, attention_head_dim=64,
               attention_hidden_size=256), "mamba2",
        # The hub's files hold the block that two layers share once.
        rename=(r"layers\.3\.shared_transformer\.", "layers.1.shared_transformer."),
    ),
)  # fmt: skip

ARCHITECTURES = {a.name: a for a in RANKED + OTHERS}


@dataclass(frozen=True)
class Draft:
    """How a model gets a head for multi-token prediction.

    settings: edits config.json; add: adds the tensors; method: of vLLM's speculative_config
    """

    settings: Callable[[dict[str, Any]], Any]
    add: Callable[[dict[str, Any]], Any]
    method: str = "mtp"


def _has_mtp(config: dict[str, Any]) -> None:
    config.get("text_config", config)["mtp_num_hidden_layers"] = 1


def _has_layer_past_the_end(config: dict[str, Any]) -> None:
    config["num_nextn_predict_layers"] = 1


def _has_nemotron_head(config: dict[str, Any]) -> None:
    _has_layer_past_the_end(config)
    # vLLM gives the head's first projection this type, whatever the engine's is.
    config["dtype"] = "float32"


_AFTER_LAYER_1 = Draft(_has_layer_past_the_end, partial(add_layer_past_the_end, last=1))
DRAFTS = {
    "qwen3.5": Draft(_has_mtp, partial(add_mtp, layer="model.language_model.layers.3.")),
    "qwen3.5-moe": Draft(_has_mtp, partial(add_mtp, layer="model.language_model.layers.3.")),
    "qwen3-next": Draft(_has_mtp, partial(add_mtp, layer="model.layers.3.")),
    "glm4-moe": _AFTER_LAYER_1,
    "deepseek-v3": _AFTER_LAYER_1,
    "nemotron-h-moe": Draft(
        _has_nemotron_head,
        partial(add_nemotron_mtp, attention="backbone.layers.2.", experts="backbone.layers.3."),
    ),
}
# One of each kind.
_FEATURED: dict[str, tuple[str, ...]] = {
    "qwen3": ("TP 2", "LoRA"),
    "qwen3-moe": ("TP 2", "LoRA"),
    "deepseek-v2": ("TP 2", "LoRA"),
    "nemotron-h-moe": ("TP 2", "LoRA", "MTP"),
    "granite4-moe": ("TP 2", "LoRA"),
    "qwen3-next": ("TP 2", "LoRA", "MTP"),
    "qwen3.5": ("TP 2", "LoRA", "MTP"),
    "qwen3.5-moe": ("MTP",),
    "zamba2": ("TP 2",),
    "glm4-moe": ("MTP",),
    "deepseek-v3": ("MTP",),
}


def features(name: str) -> tuple[str, ...]:
    """What else is tried with an architecture: of sweep_features.FEATURES."""
    is_ranked = any(a.name == name for a in RANKED)
    return (*(("gptq",) if is_ranked else ()), *_FEATURED.get(name, ()))


def write_architecture(folder: Path, architecture: Architecture, seed: int = 0) -> Path:
    """Write the model, BF16, as transformers saves it; returns the folder."""
    import torch
    import transformers

    config = getattr(transformers, architecture.config)(**architecture.keys)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture.auto).from_config(config)
    _draw(model, torch.Generator().manual_seed(seed))
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if architecture.kind == "encoder":
        build_tokenizer().save_pretrained(folder)
    if architecture.written:
        written = [architecture.written]
        edit_json(folder / "config.json", lambda config: config.update(architectures=written))
    if architecture.rename or architecture.turned:
        edit_tensors(folder, lambda tensors: _to_hub(tensors, architecture))
    return folder


def _to_hub(tensors: dict[str, Any], architecture: Architecture) -> None:
    pattern, replacement = architecture.rename or ("$^", "")
    for name in list(tensors):
        tensor = tensors.pop(name)
        if architecture.turned and re.search(architecture.turned, name):
            tensor = tensor.mT
        tensors[re.sub(pattern, replacement, name)] = tensor


def _draw(model: Any, generator: Any) -> None:
    """Random weights that keep activations of order one; what is no matrix stays near its own."""
    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.dim() >= 2 and "conv1d" not in name and "A_log" not in name
            if is_matrix and parameter.numel() > parameter.shape[0]:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias") or "bias" in name.rpartition(".")[2]:
                parameter.copy_(0.05 * noise)
            elif "norm" in name:
                parameter.add_(0.05 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
