# SPDX-License-Identifier: Apache-2.0
"""Tiny language models with random weights: the shapes of real families, small enough for a test.

The weights are drawn so that activations stay of order one and the logits are well apart: greedy
decoding then means something.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB_SIZE = 288
FAMILIES = (
    "llama",
    "llama-bias",
    "qwen3",
    "gemma3",
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "gpt_oss",
)

# Two key-value heads and an inner size of 128 let two tensor-parallel ranks share a layer without
# cutting a block of 32; a head of 32 is the least that an FP8 KV cache takes on a CPU.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Four experts, two a token; an expert's inner size of 64 is two blocks of 32 for two ranks.
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


def build_model(family: str, seed: int = 0) -> Any:
    """A transformers causal language model of the family, BF16, on the CPU.

    family: "llama" (untied), "llama-bias" (a bias in each linear layer), "qwen3" (query and key
            norms, untied), "gemma3" (tied embedding, sliding window), "qwen3_moe" (four experts,
            two a token), "qwen2_moe" (the same with a shared expert), "mixtral" (experts named w1,
            w2, w3) or "gpt_oss" (attention sinks; stacked experts with biases). Raises ValueError
            for another.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_config(family)).to(torch.bfloat16).eval()
    model.config.architectures = [type(model).__name__]
    # Drawn here, by name, so that the weights do not depend on transformers' own initialisation.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and "norm" in name:
                parameter.add_(0.1 * noise)  # around the neutral value
            elif parameter.dim() == 1:  # biases, and sinks, which transformers draws too
                parameter.copy_(0.1 * noise)
            elif "embed_tokens" in name and family != "gemma3":
                parameter.copy_(noise)
            else:  # gemma3 multiplies its embedding by sqrt(hidden_size) itself
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def _config(family: str) -> Any:
    from transformers import (
        Gemma3TextConfig,
        GptOssConfig,
        LlamaConfig,
        MixtralConfig,
        Qwen2MoeConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    if family == "llama":
        return LlamaConfig(**_COMMON, tie_word_embeddings=False)
    if family == "llama-bias":
        return LlamaConfig(**_COMMON, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    if family == "qwen3":
        return Qwen3Config(**_COMMON, tie_word_embeddings=False)
    if family == "gemma3":
        return Gemma3TextConfig(
            **_COMMON,
            tie_word_embeddings=True,
            sliding_window=64,
            query_pre_attn_scalar=32,
            layer_types=["sliding_attention", "full_attention"],
        )
    if family == "qwen3_moe":
        return Qwen3MoeConfig(**_COMMON, **_EXPERTS, tie_word_embeddings=False)
    if family == "qwen2_moe":
        # This family's head dimension is hidden_size / num_attention_heads.
        sizes: dict[str, Any] = {"num_attention_heads": 2, "shared_expert_intermediate_size": 128}
        return Qwen2MoeConfig(**(_COMMON | _EXPERTS | sizes), tie_word_embeddings=False)
    if family == "mixtral":
        experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralConfig(**_COMMON, **experts, tie_word_embeddings=False)
    if family == "gpt_oss":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
        layers = ["sliding_attention", "full_attention"]
        return GptOssConfig(**_COMMON, **experts, layer_types=layers, tie_word_embeddings=False)
    raise ValueError(f"family: found {family!r}; needed one of {', '.join(FAMILIES)}")


def build_tokenizer(
    size: int = VOCAB_SIZE, named: Mapping[str, tuple[str, int]] | None = None
) -> Any:
    """A byte-level tokenizer without merges: any text is one token per byte.

    size: tokens in all; named: the tokenizer's attribute -> a token that no text has, its number
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<unused{i}>" for i in range(size - len(special) - len(alphabet))]
    tokens = special + alphabet + filler
    for token, number in (named or {}).values():
        tokens[number] = token
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={name: token for name, (token, _) in (named or {}).items()},
    )


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write model and tokenizer to ``folder`` as a Hugging Face checkpoint; returns the folder."""
    build_model(family, seed).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return Path(folder)
