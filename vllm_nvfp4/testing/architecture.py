# SPDX-License-Identifier: Apache-2.0
"""What a row of ``architectures`` says, and the sizes and parts that several rows have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
DROP = object()


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
    kind: str = "dense"
    models: str = ""
    auto: str = "AutoModelForCausalLM"
    dtype: str = "float32"
    written: str = ""
    rename: tuple[str, str] | None = None
    turned: str = ""


def sizes(**changes: Any) -> dict[str, Any]:
    """A decoder's; a key that is changed to DROP is left out."""
    keys = _SIZES | changes
    return {name: value for name, value in keys.items() if value is not DROP}


NO_HEAD_DIM: dict[str, Any] = {"head_dim": DROP}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GDN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
SLIDING: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
QWEN_MOE_GDN: dict[str, Any] = {
    **GDN,
    **EXPERTS,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 64,
}
GEMMA4: dict[str, Any] = {
    **SLIDING,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "global_head_dim": 64,
}
