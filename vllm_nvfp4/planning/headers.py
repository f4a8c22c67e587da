# SPDX-License-Identifier: Apache-2.0
"""The shape of a model of any family: sizes from its headers, the cache from its configuration.

For families that families.py does not build from config.json. What the model's tensors are is read
from the files; which layers keep keys and values, and which a state, from the keys that
transformers' configurations have for that. What cannot be told is assumed on the safe side and
said in DecoderShape.notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.experts import is_expert
from vllm_nvfp4.checkpoints.inventory import (
    EMBEDDING,
    HEAD,
    LINEAR,
    LayerRecord,
)
from vllm_nvfp4.checkpoints.online import OnlineDialect
from vllm_nvfp4.checkpoints.online_layers import BY_NAMES, AskOnline, without_vllm
from vllm_nvfp4.checkpoints.spec import LayerKind
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.planning.shapes import (
    ATTENTION,
    ATTENTION_PATTERN,
    COLUMNS,
    EXPERTS,
    MLP,
    ROUTER,
    ROWS,
    WHOLE,
    AskVllm,
    DecoderShape,
    Kept,
    Latent,
    Linear,
)

_QUANTISED = ("nvfp4", "mxfp4", "fp8")
# What a letter of hybrid_override_pattern stands for in Nemotron-H: only "*" caches keys.
_PATTERN = {"*": "full_attention", "M": "mamba"}
_BYTES_OF_STATE = 4  # float32, vLLM's choice for most families and its largest
_BYTES_OF_WINDOW = 2
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOICE_KEYS = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token", "top_k_experts")
_HEAD_KEYS = ("num_attention_heads", "decoder_attention_heads")
_CONTEXT_KEYS = ("max_position_embeddings", "max_target_positions", "seq_length")


def shape_from_headers(
    folder: Path,
    config: Mapping[str, Any],
    quant_config: Mapping[str, Any] | None,
    name: str,
    ask: AskVllm | None = None,
    ask_online: AskOnline = without_vllm,
) -> DecoderShape:
    """The shape of the language model of a checkpoint. ask, ask_online: see :func:`find_shape`.

    Raises CheckpointError for files that validate refuses, ValueError for a model without a token
    embedding.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    inventory = validate(folder, config, quant_config)
    notes: list[str] = []
    if is_online := inventory.dialect == OnlineDialect.name:
        online = ask_online(folder, inventory.layers)
        inventory = replace(inventory, layers=online.settle(inventory.layers))
        if online.source.startswith(BY_NAMES):
            notes.append(f"Which layers stay in 16 bits is told by {online.source}.")
    table = _table_of(inventory.layers, text)
    if table is None:
        raise ValueError(f"{name}: no token embedding in its headers; plan needs a language model.")
    own = [x for x in inventory.layers if _is_of_decoder(x, table)]
    linears = _linears([x for x in own if x is not table], text, is_online)
    heads = _first(text, _HEAD_KEYS) or 1
    kept = ask(config) if ask else ()
    # What has to be assumed of the cache matters only where vLLM does not tell.
    assumed: list[str] = []
    kv_heads, head_dim = _head_sizes(text, table.shape[1], assumed)
    windows, states = _kept_by_layer(text, assumed)
    state_bytes = _state_bytes(text, states, assumed)
    if not kept and not states:
        kept = _kept_by_kind(text, windows)
    if not kept:
        notes += assumed
    if outside := sum(x.num_bytes for x in inventory.layers) - sum(x.num_bytes for x in own):
        notes.append(
            f"{outside / 1e9:.2f} GB of tensors outside the language model (towers, extra "
            "prediction layers) are not part of the plan."
        )
    is_quantised = any(x.stored in _QUANTISED for x in linears)
    head = next((x.format for x in inventory.layers if x.part == HEAD), "")
    return DecoderShape(
        name=name,
        hub=name,
        family=str(text.get("model_type")),
        hidden_size=table.shape[1],
        inner_size=_inner_size(text),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=table.shape[0],
        max_context=_first(text, _CONTEXT_KEYS) or 8192,
        windows=windows,
        tie_word_embeddings=inventory.tied_embeddings or not head,
        linears=tuple(linears),
        num_other=_num_other(own),
        num_experts=_first(text, _EXPERT_KEYS),
        num_experts_per_tok=_first(text, _CHOICE_KEYS),
        latent=_latent(text),
        stored=tuple(linears) if is_quantised else (),
        head=head if head in _QUANTISED else "",
        embedding=table.format if table.format in _QUANTISED else "",
        has_vision=bool(config.get("vision_config")),
        state_bytes=state_bytes,
        kept=kept,
        notes=tuple(notes),
    )


def _number(text: Mapping[str, Any], key: str) -> int:
    """A positive whole number of the configuration; of one per layer the largest; else 0."""
    value = text.get(key)
    if isinstance(value, list):
        value = max((v for v in value if isinstance(v, int)), default=0)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _first(text: Mapping[str, Any], keys: Sequence[str]) -> int:
    return next((n for key in keys if (n := _number(text, key))), 0)


def _table_of(layers: Sequence[LayerRecord], text: Mapping[str, Any]) -> LayerRecord | None:
    """The token embedding, known by its name, or by the vocabulary and the hidden size."""
    size = (_number(text, "vocab_size"), _number(text, "hidden_size"))
    named = [x for x in layers if x.part == EMBEDDING and len(x.shape) == 2]
    named.sort(key=lambda x: x.shape[0] != size[0])  # tables of positions may stand before it
    return next(iter(named or [x for x in layers if x.part == LINEAR and x.shape == size]), None)


def _head_sizes(text: Mapping[str, Any], hidden: int, notes: list[str]) -> tuple[int, int]:
    """(key-value heads, elements of each) of the layers whose keys and values are the largest."""
    heads = _first(text, _HEAD_KEYS) or 1
    kv = _number(text, "num_key_value_heads") or heads
    sizes = {(kv, _number(text, "head_dim") or max(hidden // heads, 1))}
    if dim := _number(text, "global_head_dim"):
        sizes.add((_number(text, "num_global_key_value_heads") or kv, dim))
    own = text.get("per_layer_config")
    for layer in own.values() if isinstance(own, dict) else ():
        if isinstance(layer, dict) and (dim := _number(layer, "head_dim")):
            sizes.add((_number(layer, "num_key_value_heads") or kv, dim))
    if len(sizes) > 1:
        notes.append(
            "The KV cache of every layer is counted as that of the layers with the largest."
        )
    return max(sizes, key=lambda size: size[0] * size[1])


def _is_of_decoder(layer: LayerRecord, table: LayerRecord) -> bool:
    """Whether a layer stands beside or below the token embedding, or is the output's matrix."""
    parent = table.name.rpartition(".")[0]
    return layer.part == HEAD or not parent or layer.name.startswith(f"{parent}.")


def _linears(
    layers: Sequence[LayerRecord], text: Mapping[str, Any], is_online: bool
) -> list[Linear]:
    """Layers of one kind, shape and format once, with their number; further tables too.

    is_online: in 16 bits, and settled: those that are not to be quantised while loading stay
    """
    hidden, experts = _number(text, "hidden_size"), _first(text, _EXPERT_KEYS)
    found: Counter[tuple[str, int, int, str, str, str, bool]] = Counter()
    for layer in layers:
        if layer.part not in (LINEAR, EMBEDDING) or len(layer.shape) < 2:
            continue
        *leading, n, k = layer.shape
        copies = 1
        for size in leading:
            copies *= size
        kind, cut = MLP, COLUMNS if n == hidden != k else ROWS
        if is_expert(layer.name) or (leading and leading[0] == experts):
            kind = EXPERTS
        elif experts and n == experts and layer.spec.kind is not LayerKind.ONLINE:
            kind, cut = ROUTER, WHOLE
        elif fnmatch(f"x.{layer.name}", ATTENTION_PATTERN):
            kind = ATTENTION
        stored = layer.format if layer.format in _QUANTISED else "bf16"
        is_kept = is_online and layer.spec.kind is not LayerKind.ONLINE
        found[(layer.name.rpartition(".")[2], n, k, kind, cut, stored, is_kept)] += copies
    return [
        Linear(name, (n,), k, count, kind, cut, stored, is_kept=is_kept)
        for (name, n, k, kind, cut, stored, is_kept), count in found.items()
    ]


def _num_other(layers: Sequence[LayerRecord]) -> int:
    """16-bit elements of everything that is no product: norms, biases, convolutions."""
    rest = sum(x.num_bytes for x in layers if x.part not in (LINEAR, HEAD, EMBEDDING))
    biases = sum(x.bias_bytes for x in layers if x.part == LINEAR)
    return (rest + biases) // 2


def _inner_size(text: Mapping[str, Any]) -> int:
    """The widest inner size that one token goes through."""
    chosen = _first(text, _CHOICE_KEYS) * _number(text, "moe_intermediate_size")
    return max(_number(text, "intermediate_size"), chosen, _number(text, "hidden_size"))


def _kept_by_layer(text: Mapping[str, Any], notes: list[str]) -> tuple[tuple[int, ...], list[str]]:
    """(the window of each layer with keys and values, 0 for all; the kinds of the others)."""
    kinds = text.get("layer_types") or text.get("layers_block_type")
    if not kinds and isinstance(text.get("hybrid_override_pattern"), str):
        kinds = [_PATTERN.get(letter, "mlp") for letter in text["hybrid_override_pattern"]]
    count, window = _number(text, "num_hidden_layers"), _number(text, "sliding_window")
    if not isinstance(kinds, list) or not kinds:
        if window and text.get("use_sliding_window") is not False:
            notes.append("Which layers have a sliding window is not in config.json: none counted.")
        return (0,) * count, []
    windows, states = [], []
    for kind in map(str, kinds):
        if kind in ("mlp", "moe"):
            continue
        if "linear" in kind or kind in ("mamba", "mamba2", "conv", "recurrent"):
            states.append(kind)
        else:
            is_short = ("sliding" in kind or "local" in kind) and window
            windows.append(window if is_short else 0)
    return tuple(windows), states


def _kept_by_kind(text: Mapping[str, Any], windows: Sequence[int]) -> tuple[Kept, ...]:
    """What each layer keeps where those that see everything have heads of their own size, as in
    Gemma 4: 2 * heads * elements * 2 bytes of a token. Empty where all are alike.

    windows: of each layer, 0 for all
    """
    wide = _number(text, "global_head_dim")
    narrow, kv = _number(text, "head_dim"), _number(text, "num_key_value_heads")
    if not wide or not narrow or not kv or len(set(windows)) != 2:
        return ()
    wide_kv = _number(text, "num_global_key_value_heads") or kv
    return tuple(
        Kept(window, 4 * (kv * narrow if window else wide_kv * wide), 0) for window in windows
    )


def _latent(text: Mapping[str, Any]) -> Latent | None:
    keys = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    sizes = [_number(text, key) for key in keys]
    return Latent(*sizes) if all(sizes) else None


def _state_bytes(text: Mapping[str, Any], states: Sequence[str], notes: list[str]) -> int:
    """Bytes of one sequence in layers with a state, float32, and the inputs of their convolution.

    Gated delta net: heads * key size * value size, kernel - 1 of all channels.
    Mamba-2: heads * head size * state size, kernel - 1 of channels and 2 groups of states.
    """
    if not states:
        return 0
    if heads := _number(text, "linear_num_value_heads"):
        key, value = _number(text, "linear_key_head_dim"), _number(text, "linear_value_head_dim")
        state = heads * key * value
        channels = 2 * _number(text, "linear_num_key_heads") * key + heads * value
        kernel = _number(text, "linear_conv_kernel_dim")
    else:
        heads = _first(text, ("mamba_num_heads", "mamba_n_heads"))
        size = _first(text, ("mamba_head_dim", "mamba_d_head"))
        per_head = _first(text, ("ssm_state_size", "mamba_d_state"))
        groups = _first(text, ("n_groups", "mamba_n_groups")) or 1
        state = heads * size * per_head
        channels = heads * size + 2 * groups * per_head
        kernel = _first(text, ("conv_kernel", "mamba_d_conv"))
    if not state:
        notes.append(f"The state of {len(states)} layers ({states[0]}) is not counted.")
        return 0
    return len(states) * (_BYTES_OF_STATE * state + _BYTES_OF_WINDOW * (kernel - 1) * channels)
