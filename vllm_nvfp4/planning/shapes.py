# SPDX-License-Identifier: Apache-2.0
"""What a decoder is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Names of the layers that "attention in 16 bits" is about.
ATTENTION_PATTERN = "*.self_attn.*"
ATTENTION, MLP, EXPERTS, ROUTER = "attention", "mlp", "experts", "router"
# How tensor parallelism cuts a layer: its rows, its columns, or not at all.
ROWS, COLUMNS, WHOLE = "rows", "columns", "whole"


@dataclass(frozen=True)
class Linear:
    """One kind of linear layer as vLLM fuses it, and how often the model has it.

    rows:   of each shard that a checkpoint stores on its own; N is their sum
    k:      columns
    count:  layers of this kind, times experts for an expert's
    stored: the format that a quantised checkpoint has it in; empty where it is to be chosen
    extra:  bytes of what a quantised checkpoint applies to the layer's activations
    is_kept: stays in 16 bits while others are quantised; so does every router
    """

    name: str
    rows: tuple[int, ...]
    k: int
    count: int
    kind: str
    cut: str
    stored: str = ""
    extra: int = 0
    is_kept: bool = False

    @property
    def num_weights(self) -> int:
        return self.count * sum(self.rows) * self.k


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: one vector of rank + rope elements per token and layer."""

    rank: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class Kept:
    """What one layer keeps of a sequence.

    window:      tokens that its attention reaches back; 0 for all
    token_bytes: of one token with 16-bit keys and values, on one card; 0 for a state
    state_bytes: of one sequence, whatever its length; 0 for keys and values
    """

    window: int
    token_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's dimensions, named as in its config.json.

    hub:        its name on the Hugging Face Hub, or the folder
    nvfp4:      the hub name of an NVFP4 checkpoint of it; empty where none is known
    family:     model_type
    windows:    per layer with keys and values, the tokens that its attention reaches back; 0 for
                all
    num_other:  elements of norms, biases and attention sinks, which stay in 16 bits
    sparse_layers: the decoder layers with experts
    inner_size: the widest inner size of a layer that one token goes through
    latent:     None where keys and values are cached per head
    stored:     ``linears`` by the format that a quantised checkpoint has them in; else empty
    head, embedding: their formats in a quantised checkpoint; empty for 16 bits
    state_bytes: of one sequence in the layers that keep a state instead of keys and values
    kept:       by layer, where vLLM was asked; it then decides before windows and state_bytes
    notes:      what the plan had to assume, one sentence each
    """

    name: str
    hub: str
    family: str
    hidden_size: int
    inner_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    windows: tuple[int, ...]
    tie_word_embeddings: bool
    linears: tuple[Linear, ...]
    num_other: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    sparse_layers: tuple[int, ...] = ()
    latent: Latent | None = None
    stored: tuple[Linear, ...] = ()
    head: str = ""
    embedding: str = ""
    has_vision: bool = False
    nvfp4: str = ""
    state_bytes: int = 0
    kept: tuple[Kept, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    def num_weights(self, *kinds: str) -> int:
        """Elements of the linear layers of these kinds, of all of them by default."""
        return sum(x.num_weights for x in self.linears if not kinds or x.kind in kinds)

    @property
    def int4_group(self) -> int:
        """Columns that share an INT4 scale: the usual 128, or less where that divides no K."""
        return next((g for g in (128, 64) if all(x.k % g == 0 for x in self.linears)), 32)

    @property
    def num_active_weights(self) -> int:
        """Elements of the linear layers that one token is multiplied with."""
        active = self.num_experts_per_tok / max(self.num_experts, 1)
        return self.num_weights() - int(self.num_weights(EXPERTS) * (1 - active))


# config.json -> what each layer keeps; empty where nothing is known
AskVllm = Callable[[Mapping[str, Any]], tuple[Kept, ...]]
