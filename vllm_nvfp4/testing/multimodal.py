# SPDX-License-Identifier: Apache-2.0
"""The rows of ``architectures`` that take pictures, or sound, too."""

from __future__ import annotations

from typing import Any

from vllm_nvfp4.testing.architecture import (
    EXPERTS,
    GDN,
    GEMMA4,
    NO_HEAD_DIM,
    QWEN_MOE_GDN,
    ROUTED,
    SPARSE,
    VOCAB_SIZE,
    Architecture,
    sizes,
)

_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
    "tie_word_embeddings": False,
}
_CLIP = _TOWER | {"model_type": "clip_vision_model"}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model"}
_PIXTRAL = _TOWER | {"model_type": "pixtral", "head_dim": 32}
_LLAMA, _MISTRAL = sizes(model_type="llama"), sizes(model_type="mistral")
_QWEN2 = sizes(**NO_HEAD_DIM, model_type="qwen2")
_IN_HUB = (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")
_GRID = [[56, 112]]


def _rope(sections: list[int], **changes: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "mrope_section": sections,
        "rope_theta": 1e4,
    }
    return {"rope_parameters": rope | changes}


def _vision(
    name: str,
    config: str,
    text: dict[str, Any],
    tower: dict[str, Any],
    models: str = "",
    kind: str = "dense",
    dtype: str = "float32",
    rename: tuple[str, str] | None = None,
    turned: str = "",
    **keys: Any,
) -> Architecture:
    """text, tower: their configurations; keys: beside them."""
    keys |= {"text_config": text, "vision_config": tower}
    auto, kind = "AutoModelForImageTextToText", f"{kind}+vision"
    return Architecture(name, config, keys, kind, models, auto, dtype, "", rename, turned)


_ROPE_VL = _rope([6, 5, 5], mrope_interleaved=True)
_ROPE_2 = _rope([4, 6, 6])
_ROPE_35 = _rope([3, 3, 2], mrope_interleaved=True, partial_rotary_factor=0.5)

_GLM = {**_rope([2, 3, 3], partial_rotary_factor=0.5), "attention_bias": True}
_GLM_TOWER = _QWEN_TOWER | {"patch_size": 14, "image_size": 56}
_GLM_TOKENS: dict[str, Any] = {
    "image_token_id": 300,
    "video_token_id": 301,
    "image_start_token_id": 302,
    "image_end_token_id": 303,
    "video_start_token_id": 304,
    "video_end_token_id": 305,
}

MULTIMODAL = (
    _vision("gemma3-vision", "Gemma3Config",
            sizes(tie_word_embeddings=True, sliding_window=16, query_pre_attn_scalar=32), _TOWER,
            rename=_IN_HUB, mm_tokens_per_image=4, image_token_id=300, boi_token_id=301,
            eoi_token_id=302, image_token_index=300),
    _vision("gemma4-vision", "Gemma4Config", sizes(**GEMMA4),
            {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
             "position_embedding_size": 64, "default_output_length": 70},
            image_token_id=300, boi_token_id=301, eoi_token_id=302, video_token_id=303,
            audio_token_id=304),
    _vision("glm4v", "Glm4vConfig", sizes(**NO_HEAD_DIM, **_GLM), _GLM_TOWER, "GLM-4.1V",
            **_GLM_TOKENS),
    _vision("glm4v-moe", "Glm4vMoeConfig", sizes(**ROUTED, **_GLM, use_qk_norm=False), _GLM_TOWER,
            "GLM-4.5V, 4.6V", "moe", **_GLM_TOKENS),
    _vision("idefics3", "Idefics3Config", _LLAMA, _TOWER, "Idefics3", image_token_id=300),
    _vision("internvl", "InternVLConfig", _QWEN2,
            _TOWER | {"image_size": [56, 56], "patch_size": [14, 14]}, "InternVL3",
            image_token_id=300, tie_word_embeddings=False),
    _vision("llama4", "Llama4Config",
            sizes(num_local_experts=8, num_experts_per_tok=1, intermediate_size=64,
                  intermediate_size_mlp=128, interleave_moe_layer_step=2, moe_layers=[1],
                  attention_chunk_size=128, no_rope_layers=[1, 0]),
            _TOWER | {"intermediate_size": 256, "vision_output_dim": 128,
                      "projector_input_dim": 128, "projector_output_dim": 128},
            "Llama-4-Scout", "moe", image_token_index=300, boi_token_index=301,
            eoi_token_index=302),
    _vision("llava", "LlavaConfig", _LLAMA, _CLIP, "LLaVA-1.5", rename=_IN_HUB,
            image_token_index=300),
    _vision("llava-next", "LlavaNextConfig", _LLAMA, _CLIP, "LLaVA-1.6", rename=_IN_HUB,
            image_token_index=300, image_grid_pinpoints=_GRID),
    _vision("llava-onevision", "LlavaOnevisionConfig", _QWEN2, _SIGLIP, "LLaVA-OneVision",
            rename=_IN_HUB, image_token_index=300, video_token_index=301,
            image_grid_pinpoints=_GRID),
    _vision("mistral3", "Mistral3Config", _MISTRAL, _PIXTRAL,
            "Mistral-Small-3.2-24B, Ministral, Devstral", image_token_index=300),
    _vision("paligemma", "PaliGemmaConfig", sizes(model_type="gemma2", tie_word_embeddings=True),
            _SIGLIP | {"projection_dim": 128}, "PaliGemma-2", rename=_IN_HUB,
            image_token_index=300, projection_dim=128, hidden_size=128),
    _vision("pixtral", "LlavaConfig", _MISTRAL, _PIXTRAL, "Pixtral-12B", image_token_index=300,
            vision_feature_layer=-1, vision_feature_select_strategy="full"),
    _vision("qwen2-vl", "Qwen2VLConfig", sizes(**NO_HEAD_DIM, **_ROPE_2),
            {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
            "Qwen2-VL", **_QWEN_TOKENS),
    _vision("qwen2.5-vl", "Qwen2_5_VLConfig", sizes(**NO_HEAD_DIM, **_ROPE_2),
            _QWEN_TOWER | {"patch_size": 14, "fullatt_block_indexes": [1]}, "Qwen2.5-VL",
            **_QWEN_TOKENS),
    _vision("qwen3-vl", "Qwen3VLConfig", sizes(**_ROPE_VL),
            _QWEN_TOWER | {"deepstack_visual_indexes": [0]}, "Qwen3-VL", **_QWEN_TOKENS),
    _vision("qwen3-vl-moe", "Qwen3VLMoeConfig",
            sizes(**(EXPERTS | {"moe_intermediate_size": 96}), **SPARSE, **_ROPE_VL),
            _QWEN_TOWER | {"deepstack_visual_indexes": [0]}, "Qwen3-VL-MoE", "moe",
            turned=r"experts\.(gate_up|down)_proj$", **_QWEN_TOKENS),
    _vision("qwen3.5", "Qwen3_5Config", sizes(**GDN, **_ROPE_35), _QWEN_TOWER,
            "Qwen3.6-27B, Qwen3.8-27B", "gdn", "bfloat16", **_QWEN_TOKENS),
    _vision("qwen3.5-moe", "Qwen3_5MoeConfig", sizes(**QWEN_MOE_GDN, **_ROPE_35), _QWEN_TOWER,
            "Qwen3.6-35B-A3B", "gdn+moe", "bfloat16", **_QWEN_TOKENS),
    _vision("smolvlm", "SmolVLMConfig", _LLAMA, _TOWER, "SmolVLM2", image_token_id=300),
    Architecture(
        "whisper", "WhisperConfig",
        {"vocab_size": VOCAB_SIZE, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 256,
         "decoder_ffn_dim": 256, "max_source_positions": 50, "max_target_positions": 128,
         "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 300},
        "speech", "whisper-large-v3", "AutoModelForSpeechSeq2Seq",
    ),
)  # fmt: skip
