# SPDX-License-Identifier: Apache-2.0
"""The linear layers of real models, as vLLM runs them: q/k/v and gate/up fused."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nvfp4.kernels.cuda.moe_dispatch import MoeShape
from vllm_nvfp4.planning.find import built_in


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder, named as in its config.json.

    intermediate_size: of the dense MLP, or of one expert where num_experts > 0
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """{layer: (N, K)} of the dense linear layers of one decoder layer (not the experts)."""
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        layers = {"qkv_proj": (q + 2 * kv, self.hidden_size), "o_proj": (self.hidden_size, q)}
        if not self.num_experts:
            layers["gate_up_proj"] = (2 * self.intermediate_size, self.hidden_size)
            layers["down_proj"] = (self.hidden_size, self.intermediate_size)
        return layers

    def expert_layers(self) -> dict[str, tuple[int, int]]:
        """{layer: (N, K)} of one expert; empty for a dense model."""
        if not self.num_experts:
            return {}
        return {
            "w13": (2 * self.intermediate_size, self.hidden_size),
            "w2": (self.hidden_size, self.intermediate_size),
        }


def _model_shape(name: str) -> ModelShape:
    """The built-in model of that name; its sources are in planning/models.json."""
    config = built_in()[name]["config"]
    return ModelShape(
        name,
        config["hidden_size"],
        config.get("moe_intermediate_size", config["intermediate_size"]),
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
        config["vocab_size"],
        config["tie_word_embeddings"],
        config.get("num_experts", 0),
        config.get("num_experts_per_tok", 0),
    )


# The models whose layers the benchmarks and the tests of dispatch run through.
MODELS = {
    name: _model_shape(name)
    for name in (
        "Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "Llama-3.1-8B", "Llama-3.1-70B", "Gemma3-27B",
    )
}  # fmt: skip

# A model that a test, or the emulated GPU, can run through.
TINY = ModelShape("tiny", 128, 256, 2, 4, 2, 64, 512)
BENCH_MODELS = MODELS | {TINY.name: TINY}

# Token counts of the GEMM benchmark: decode batches, then prefill chunks.
BENCH_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)

# Layers of routed experts. Source: each model's config.json.
EXPERT_LAYERS = {
    "Qwen3-30B-A3B": MoeShape(128, 8, 2048, 768),
    "Mixtral-8x7B": MoeShape(8, 2, 4096, 14336),
    "gpt-oss-20b": MoeShape(32, 4, 2880, 2880),
    "DeepSeek-V2-Lite": MoeShape(64, 6, 2048, 1408),
}
TINY_EXPERTS = MoeShape(4, 2, 128, 64)
BENCH_EXPERTS = EXPERT_LAYERS | {TINY.name: TINY_EXPERTS}
