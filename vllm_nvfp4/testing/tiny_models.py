# SPDX-License-Identifier: Apache-2.0
"""Tiny language models with random weights: the shapes of real families, small enough for a test.

The weights are drawn so that activations stay of order one and the logits are well apart: greedy
decoding then means something.
"""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 288
FAMILIES = ("llama", "qwen3", "gemma3")

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build_model(family: str, seed: int = 0):
    """A transformers causal language model of the family, BF16, on the CPU.

    family: "llama" (untied), "qwen3" (query and key norms, untied) or "gemma3" (tied embedding,
            sliding window). Raises ValueError for another.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed_tokens" not in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif parameter.dim() == 2:
                parameter.normal_(0, 1 if family != "gemma3" else parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _config(family: str):
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    if family == "llama":
        return LlamaConfig(**_COMMON, tie_word_embeddings=False)
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
    raise ValueError(f"family: found {family!r}; needed one of {', '.join(FAMILIES)}")


def build_tokenizer():
    """A byte-level tokenizer without merges: any text is one token per byte, 288 tokens in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<unused{i}>" for i in range(VOCAB_SIZE - len(special) - len(alphabet))]
    vocab = {token: i for i, token in enumerate(special + alphabet + filler)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write model and tokenizer to ``folder`` as a Hugging Face checkpoint; returns the folder."""
    build_model(family, seed).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return Path(folder)
