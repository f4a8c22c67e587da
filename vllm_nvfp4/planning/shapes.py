# SPDX-License-Identifier: Apache-2.0
"""What a decoder is made of, read from its config.json or built in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.locate import find_folder

_NEEDED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text")


@dataclass(frozen=True)
class DecoderShape:
    """A dense decoder's dimensions, named as in its config.json.

    windows:      per layer, the tokens that its attention reaches back; 0 for all
    num_biases:   elements of the linear layers' biases in one decoder layer
    norm_vectors: norms of hidden_size in one layer; has_qk_norm adds two of head_dim
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    windows: tuple[int, ...]
    tie_word_embeddings: bool
    num_biases: int
    norm_vectors: int
    has_qk_norm: bool

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    def fused_layers(self) -> tuple[tuple[int, int, int], ...]:
        """(N, K, shards) of each linear layer of one decoder layer, as vLLM fuses them."""
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return (q + 2 * kv, hidden, 3), (hidden, q, 1), (2 * inner, hidden, 2), (hidden, inner, 1)

    @property
    def num_linear_weights(self) -> int:
        return self.num_layers * sum(n * k for n, k, _ in self.fused_layers())

    @property
    def num_other(self) -> int:
        """Elements of norms and biases, which stay in 16 bits."""
        qk = 2 * self.head_dim if self.has_qk_norm else 0
        per_layer = self.norm_vectors * self.hidden_size + qk + self.num_biases
        return self.num_layers * per_layer + self.hidden_size


def _config(family: str, dims: tuple[int, ...], context: int, **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size",
    )  # fmt: skip
    values = dict(zip(names, dims, strict=True))
    return {"model_type": family, "max_position_embeddings": context, **values, **more}


_GEMMA3 = {"sliding_window": 1024, "sliding_window_pattern": 6}
# Source: each model's config.json.
BUILT_IN: dict[str, dict[str, Any]] = {
    "Qwen3-8B": _config("qwen3", (4096, 12288, 36, 32, 8, 128, 151936), 40960),
    "Qwen3-14B": _config("qwen3", (5120, 17408, 40, 40, 8, 128, 151936), 40960),
    "Qwen3-32B": _config("qwen3", (5120, 25600, 64, 64, 8, 128, 151936), 40960),
    "Gemma3-12B": _config("gemma3_text", (3840, 15360, 48, 16, 8, 256, 262208), 131072, **_GEMMA3),
    "Gemma3-27B": _config("gemma3_text", (5376, 21504, 62, 32, 16, 128, 262208), 131072, **_GEMMA3),
    "Llama-3.1-8B": _config("llama", (4096, 14336, 32, 32, 8, 128, 128256), 131072),
    "Llama-3.1-70B": _config("llama", (8192, 28672, 80, 64, 8, 128, 128256), 131072),
    "Mistral-24B": _config("mistral", (5120, 32768, 40, 32, 8, 128, 131072), 32768),
}


def find_shape(model: str) -> DecoderShape:
    """The shape of a folder, of a model in the hub cache, or of a built-in name.

    Raises ValueError, or CheckpointError, for what is none of these, and for a config.json that
    lacks a key or describes another kind of model.
    """
    for name, config in BUILT_IN.items():
        if name.lower() == model.lower():
            return shape_of(config, name)
    if model.lower().endswith(".gguf"):
        raise ValueError(f"{model}: a GGUF file; needs a folder with config.json, or {_names()}.")
    if "/" not in model and not Path(model).exists():
        raise ValueError(f"{model}: no such model; needs a folder with config.json, or {_names()}.")
    return shape_of(read_config(find_folder(model))[0], model)


def _names() -> str:
    return "one of " + ", ".join(BUILT_IN)


def shape_of(config: Mapping[str, Any], name: str) -> DecoderShape:
    """The shape that a config.json (or its text_config) describes."""
    text = config.get("text_config") or config
    family = text.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"{name}: config.json says model_type {family!r}; plan knows the dense families "
            f"{', '.join(_FAMILIES)}."
        )
    for key in _NEEDED:
        if not isinstance(text.get(key), int) or text[key] <= 0:
            raise ValueError(
                f"{name}: config.json has {key}={text.get(key)!r}; needs a positive integer."
            )
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    is_gemma = family.startswith("gemma3")
    rows = (heads + 2 * kv_heads) * head_dim
    has_bias = bool(text.get("attention_bias"))
    biases = rows + text["hidden_size"] if has_bias else rows if family == "qwen2" else 0
    biases += 2 * text["intermediate_size"] + text["hidden_size"] if text.get("mlp_bias") else 0
    return DecoderShape(
        name, text["hidden_size"], text["intermediate_size"], heads, kv_heads, head_dim,
        text["vocab_size"], text["max_position_embeddings"], _windows(text, is_gemma),
        bool(text.get("tie_word_embeddings", is_gemma)), biases, 4 if is_gemma else 2,
        is_gemma or family == "qwen3",
    )  # fmt: skip


def _windows(text: Mapping[str, Any], is_gemma: bool) -> tuple[int, ...]:
    count, window = text["num_hidden_layers"], text.get("sliding_window") or 0
    if kinds := text.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if is_gemma:
        pattern = text.get("sliding_window_pattern", 6)
        return tuple(window if (i + 1) % pattern else 0 for i in range(count))
    is_on = text.get("use_sliding_window", text["model_type"] == "mistral")
    return (window if is_on else 0,) * count
