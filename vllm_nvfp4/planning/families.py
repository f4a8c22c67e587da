# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder of a family that is known here, from its config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_nvfp4.checkpoints.spec import (
    Dialect,
    LayerKind,
    LayerSpec,
    Role,
    embedding_spec,
    fused_layer_spec,
)
from vllm_nvfp4.planning.shapes import (
    ATTENTION,
    COLUMNS,
    EXPERTS,
    MLP,
    ROUTER,
    ROWS,
    WHOLE,
    DecoderShape,
    Latent,
    Linear,
)

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text", "qwen3_moe", "mixtral",
    "gpt_oss", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
_NEEDED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
# What Gemma 3's published config.json leave to transformers' Gemma3TextConfig.
_GEMMA_DEFAULTS = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip

_PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_PACKED_MIXTRAL = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def as_stored(shape: DecoderShape, dialect: Dialect) -> DecoderShape:
    """The shape with the format of every layer, as the checkpoint's quantization config says.

    Experts of one layer are stored alike: the first stands for all. Raises CheckpointError where
    shards of a fused layer are not.
    """
    is_mixtral = shape.family == "mixtral"
    block, packed = ("block_sparse_moe", _PACKED_MIXTRAL) if is_mixtral else ("mlp", _PACKED)
    prefix = "language_model.model." if shape.has_vision else "model."
    every = tuple(range(shape.num_layers))
    found: list[Linear] = []
    for linear in shape.linears:
        layers, parent, names = every, "self_attn", _PACKED
        if linear.kind != ATTENTION:
            is_dense = linear.kind == MLP and not linear.name.startswith("shared_experts.")
            layers = tuple(i for i in every if (i in shape.sparse_layers) != is_dense)
            parent, names = block, packed
        name = linear.name.replace("experts.", "experts.0.", linear.kind == EXPERTS)
        specs = [
            fused_layer_spec(dialect, f"{prefix}layers.{i}.{parent}.{name}", names) for i in layers
        ]
        kinds = Counter((_stored_format(spec), extra_bytes(spec, linear.k)) for spec in specs)
        found += [
            replace(linear, count=linear.count * n // len(specs), stored=fmt, extra=extra)
            for (fmt, extra), n in kinds.items()
        ]
    tables = (dialect.layer_spec("lm_head"), embedding_spec(dialect, f"{prefix}embed_tokens"))
    head, embedding = (_stored_format(spec).replace("bf16", "") for spec in tables)
    return replace(
        shape,
        stored=tuple(found),
        head="" if shape.tie_word_embeddings else head,
        embedding=embedding,
    )


def _stored_format(spec: LayerSpec) -> str:
    if spec.kind is LayerKind.MICROSCALED and spec.fmt:
        return spec.fmt.name
    return "fp8" if spec.kind is LayerKind.FP8 else "bf16"


def extra_bytes(spec: LayerSpec, k: int) -> int:
    """float32: a scale for each column (AWQ), and a rotation [g, g] (FP-Quant)."""
    scales = 4 * k if spec.tensor(Role.PRE_SCALE) else 0
    return scales + 4 * spec.hadamard_size**2


def shape_of(config: Mapping[str, Any], name: str) -> DecoderShape:
    """The shape that a config.json (or its text_config) describes."""
    text: Mapping[str, Any] = config.get("text_config") or config
    family = text.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{name}: config.json says model_type {family!r}; plan knows {', '.join(FAMILIES)}."
        )
    is_gemma = family.startswith("gemma3")
    if is_gemma:
        text = _GEMMA_DEFAULTS | dict(text)
    for key in _NEEDED:
        _positive(text, key, name)
    heads = text["num_attention_heads"]
    latent = _latent(text, name) if family.startswith("deepseek") else None
    linears, inner = _mlp_layers(text, name)
    attention = (_latent_layers if latent else _attention_layers)(text)
    experts, per_token = _experts(text)
    return DecoderShape(
        name=name,
        hub=name,
        family=family,
        hidden_size=text["hidden_size"],
        inner_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=_head_dim(text),
        vocab_size=text["vocab_size"],
        max_context=text["max_position_embeddings"],
        windows=_windows(text),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", is_gemma)),
        linears=(*attention, *linears),
        num_other=_num_other(text, linears),
        num_experts=experts,
        num_experts_per_tok=per_token,
        sparse_layers=tuple(i for i in range(text["num_hidden_layers"]) if _is_sparse(text, i)),
        latent=latent,
        has_vision=bool(config.get("vision_config")),
    )


def _positive(text: Mapping[str, Any], key: str, name: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: config.json has {key}={value!r}; needs a positive integer.")
    return value


def _head_dim(text: Mapping[str, Any]) -> int:
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def _latent(text: Mapping[str, Any], name: str) -> Latent:
    keys = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return Latent(*(_positive(text, key, name) for key in keys))


def _attention_layers(text: Mapping[str, Any]) -> tuple[Linear, ...]:
    layers, hidden, dim = text["num_hidden_layers"], text["hidden_size"], _head_dim(text)
    heads = text["num_attention_heads"]
    q, kv = heads * dim, (text.get("num_key_value_heads") or heads) * dim
    return (
        Linear("qkv_proj", (q, kv, kv), hidden, layers, ATTENTION, ROWS),
        Linear("o_proj", (hidden,), q, layers, ATTENTION, COLUMNS),
    )


def _latent_layers(text: Mapping[str, Any]) -> tuple[Linear, ...]:
    layers, hidden, heads = (
        text[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    latent = _latent(text, "config.json")
    q = heads * (latent.nope + latent.rope)
    kv_a, rank = latent.rank + latent.rope, text.get("q_lora_rank")
    down = (
        (
            Linear("fused_qkv_a_proj", (rank, kv_a), hidden, layers, ATTENTION, WHOLE),
            Linear("q_b_proj", (q,), rank, layers, ATTENTION, ROWS),
        )
        if rank
        else (
            Linear("q_proj", (q,), hidden, layers, ATTENTION, ROWS),
            Linear("kv_a_proj_with_mqa", (kv_a,), hidden, layers, ATTENTION, WHOLE),
        )
    )
    kv_b = heads * (latent.nope + latent.value)
    return (
        *down,
        Linear("kv_b_proj", (kv_b,), latent.rank, layers, ATTENTION, ROWS),
        Linear("o_proj", (hidden,), heads * latent.value, layers, ATTENTION, COLUMNS),
    )


def _experts(text: Mapping[str, Any]) -> tuple[int, int]:
    """(experts, of which one token uses); (0, 0) for a dense model."""
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if text.get(key):
            return text[key], text["num_experts_per_tok"]
    return 0, 0


def _is_sparse(text: Mapping[str, Any], layer: int) -> bool:
    if not _experts(text)[0] or layer in (text.get("mlp_only_layers") or ()):
        return False
    if text["model_type"].startswith("deepseek"):
        is_past_dense = layer >= text.get("first_k_dense_replace", 0)
        return is_past_dense and layer % text.get("moe_layer_freq", 1) == 0
    return (layer + 1) % text.get("decoder_sparse_step", 1) == 0


def _mlp_layers(text: Mapping[str, Any], name: str) -> tuple[tuple[Linear, ...], int]:
    """The layers after attention, and the widest inner size that a token goes through."""
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    experts, per_token = _experts(text)
    sparse = sum(_is_sparse(text, i) for i in range(layers))
    found: list[Linear] = []
    widest = 0
    if dense := layers - sparse:
        widest = _positive(text, "intermediate_size", name)
        found += _gated("", widest, hidden, dense, MLP)
    if sparse:
        key = "moe_intermediate_size" if "moe_intermediate_size" in text else "intermediate_size"
        inner = _positive(text, key, name)
        found.append(Linear("gate", (experts,), hidden, sparse, ROUTER, WHOLE))
        found += _gated("experts.", inner, hidden, sparse * experts, EXPERTS)
        shared = text.get("n_shared_experts") or 0
        if shared:
            found += _gated("shared_experts.", shared * inner, hidden, sparse, MLP)
        widest = max(widest, (per_token + shared) * inner)
    return tuple(found), widest


def _gated(prefix: str, inner: int, hidden: int, count: int, kind: str) -> list[Linear]:
    return [
        Linear(f"{prefix}gate_up_proj", (inner, inner), hidden, count, kind, ROWS),
        Linear(f"{prefix}down_proj", (hidden,), inner, count, kind, COLUMNS),
    ]


def _num_other(text: Mapping[str, Any], mlp: tuple[Linear, ...]) -> int:
    """Elements of norms, biases and sinks: per layer, and the last norm."""
    family, hidden = text["model_type"], text["hidden_size"]
    heads, dim = text["num_attention_heads"], _head_dim(text)
    rows = (heads + 2 * (text.get("num_key_value_heads") or heads)) * dim
    per_layer = (4 if family.startswith("gemma3") else 2) * hidden
    if family.startswith(("gemma3", "qwen3")):
        per_layer += 2 * dim
    if family.startswith("deepseek"):
        per_layer += text["kv_lora_rank"] + (text.get("q_lora_rank") or 0)
    elif family == "qwen2":
        per_layer += rows
    elif text.get("attention_bias"):
        per_layer += rows + hidden
    total = text["num_hidden_layers"] * per_layer + hidden
    if text.get("mlp_bias"):
        total += sum(x.count * sum(x.rows) for x in mlp)
    if family == "gpt_oss":  # attention sinks, and biases of router and experts
        total += text["num_hidden_layers"] * heads + sum(x.count * sum(x.rows) for x in mlp)
    if family == "deepseek_v3":  # the router's correction, float32: two elements each
        total += 2 * sum(sum(x.rows) * x.count for x in mlp if x.kind == ROUTER)
    return total


def _windows(text: Mapping[str, Any]) -> tuple[int, ...]:
    count, window = text["num_hidden_layers"], text.get("sliding_window") or 0
    if kinds := text.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    pattern = {"gemma3": 6, "gemma3_text": 6, "gpt_oss": 2}.get(text["model_type"])
    if pattern:
        pattern = text.get("sliding_window_pattern", pattern)
        return tuple(window if (i + 1) % pattern else 0 for i in range(count))
    is_on = text.get("use_sliding_window", text["model_type"] in ("mistral", "mixtral"))
    return (window if is_on else 0,) * count
