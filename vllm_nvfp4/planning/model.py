# SPDX-License-Identifier: Apache-2.0
"""Bytes and roofline of one configuration: a decoder in one weight format on one card or more."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_nvfp4.checkpoints.inventory import EMBEDDING, HEAD, LINEAR, OTHER
from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels.cuda.dispatch import paper_tflops
from vllm_nvfp4.planning import kv
from vllm_nvfp4.planning.shapes import (
    ATTENTION,
    COLUMNS,
    EXPERTS,
    ROUTER,
    ROWS,
    DecoderShape,
    Linear,
)

FORMATS = ("bf16", "fp8", "int4", "mxfp4", "nvfp4")
# Every layer in the format that a quantised checkpoint has it in.
AS_STORED = "checkpoint"
EMBEDDING_FORMATS = ("keep", "fp8", "nvfp4")
# Order of the kernels' tiles: N and K of a 4-bit weight are padded to these (see layout.py).
_TILE_N, _TILE_K = 16, 64
# vLLM pads the vocabulary to a multiple of this.
VOCAB_PADDING = 64


def held_bytes(n: int, k: int, fmt: str, group: int = 128) -> int:
    """Bytes of an [n, k] weight as the loader holds it on the GPU, scales included.

    nvfp4, mxfp4: codes and block scales padded to tiles of 16 x 64, and a float32 per row;
    fp8: one byte per weight, a float32 per row; int4: a 16-bit scale for ``group`` columns.
    """
    if fmt == "bf16":
        return 2 * n * k
    if fmt == "fp8":
        return n * k + 4 * n
    if fmt == "int4":
        return n * k // 2 + 2 * n * math.ceil(k / group)
    padded = math.ceil(n / _TILE_N) * _TILE_N * math.ceil(k / _TILE_K) * _TILE_K
    return padded // 2 + padded // (16 if fmt == "nvfp4" else 32) + 4 * n


def stored_bytes(rows: tuple[int, ...], k: int, fmt: str, group: int = 128) -> int:
    """Bytes of a layer's tensors in a weight-only checkpoint, one set for each shard.

    bf16: safetensors; fp8: compressed-tensors float-quantized, a 16-bit scale per row;
    int4: compressed-tensors pack-quantized, a 16-bit scale for ``group`` columns, two int64;
    mxfp4: compressed-tensors mxfp4-pack-quantized; nvfp4: ModelOpt, a float32 per shard.
    """
    n = sum(rows)
    if fmt == "bf16":
        return 2 * n * k
    if fmt == "fp8":
        return n * k + 2 * n
    if fmt == "int4":
        return n * k // 2 + 2 * n * math.ceil(k / group) + 16 * len(rows)
    if fmt == "mxfp4":
        return n * k // 2 + n * k // 32
    return n * k // 2 + n * k // 16 + 4 * len(rows)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights in the memory of one card of ``cards``, by part.

    linear:       linear layers and experts
    lm_head:      0 where it is the embedding (tied)
    other:        norms, biases, and the 16-bit copies that latent attention decodes with
    experts:      those of ``linear`` that only some tokens need
    not_decoded:  those of ``linear`` that decoding does not read
    """

    linear: int
    lm_head: int
    embedding: int
    other: int
    experts: int = 0
    not_decoded: int = 0
    cards: int = 1

    @property
    def total(self) -> int:
        return self.linear + self.lm_head + self.embedding + self.other


def weights_of(
    shape: DecoderShape, fmt: str, lm_head: str = "keep", embedding: str = "keep",
    cards: int = 1, attention: str = "",
) -> Weights:  # fmt: skip
    """Bytes held on each of ``cards`` for linear layers in ``fmt``, or AS_STORED.

    lm_head, embedding: keep, fp8 or nvfp4; a tied weight is one copy, whose format either sets
    attention:          the format of the attention's linear layers; empty for ``fmt``
    """
    if shape.tie_word_embeddings:
        embedding = embedding if embedding != "keep" else lm_head
    if fmt == AS_STORED:
        lm_head, embedding = shape.head or lm_head, shape.embedding or embedding
    vocab = math.ceil(shape.vocab_size / VOCAB_PADDING) * VOCAB_PADDING // cards
    head_bytes, embedding_bytes = (
        held_bytes(vocab, shape.hidden_size, "bf16" if f == "keep" else f)
        for f in (lm_head, embedding)
    )
    layers = {
        x: x.count * _on_one_card(x, shape, _format(x, fmt, attention), cards)
        for x in (shape.stored if fmt == AS_STORED else shape.linears)
    }
    other = 2 * shape.num_other
    up = sum(size for x, size in layers.items() if x.name == "kv_b_proj")
    if up:
        # vLLM keeps kv_b_proj a second time in 16 bits, cut per head, for decoding.
        other += sum(2 * x.num_weights for x in shape.linears if x.name == "kv_b_proj") // cards
    return Weights(
        linear=sum(layers.values()),
        lm_head=0 if shape.tie_word_embeddings else head_bytes,
        embedding=embedding_bytes,
        other=other,
        experts=sum(size for x, size in layers.items() if x.kind == EXPERTS),
        not_decoded=up,
        cards=cards,
    )


def _format(layer: Linear, fmt: str, attention: str) -> str:
    if layer.kind == ROUTER or layer.is_kept or fmt == AS_STORED:
        return layer.stored or "bf16"
    return attention or fmt if layer.kind == ATTENTION else fmt


def _on_one_card(layer: Linear, shape: DecoderShape, fmt: str, cards: int) -> int:
    rows, k = sum(layer.rows), layer.k
    if layer.cut == COLUMNS:
        k //= cards
    elif layer.name == "qkv_proj":
        # Each card has at least one key-value head: fewer heads than cards are repeated.
        kv = max(shape.num_key_value_heads // cards, 1) * shape.head_dim
        rows = layer.rows[0] // cards + 2 * kv
    elif layer.cut == ROWS:
        rows //= cards
    return held_bytes(rows, k, fmt, shape.int4_group) + layer.extra


def checkpoint_parts(shape: DecoderShape, fmt: str) -> dict[str, int]:
    """{part: bytes} of a weight-only checkpoint's tensors, by inventory.py's names of the parts.

    fmt: of the linear layers, or AS_STORED. lm_head and embedding in 16 bits, or as stored. A bias
    is counted with the norms, and no scale of activations or of a KV cache is.
    """
    linear = sum(
        x.count * stored_bytes(x.rows, x.k, _format(x, fmt, ""), shape.int4_group)
        for x in (shape.stored if fmt == AS_STORED else shape.linears)
    )
    stored = (shape.head, shape.embedding) if fmt == AS_STORED else ("", "")
    head, embedding = (
        stored_bytes((shape.vocab_size,), shape.hidden_size, f or "bf16") for f in stored
    )
    return {
        LINEAR: linear,
        HEAD: 0 if shape.tie_word_embeddings else head,
        EMBEDDING: embedding,
        OTHER: 2 * shape.num_other,
    }


def split_obstacle(shape: DecoderShape, cards: int, fmt: str) -> str:
    """Why tensor parallelism cannot cut the model so; empty where it can.

    Each card has whole heads, and of a layer cut by columns whole blocks of K.
    """
    if cards == 1:
        return ""
    heads, kv = shape.num_attention_heads, shape.num_key_value_heads
    if heads % cards:
        return f"{heads} attention heads are no multiple of {cards}"
    if shape.latent is None and kv % cards and cards % kv:
        return f"{kv} key-value heads and {cards} cards do not divide each other"
    blocks = {"nvfp4": 16, "mxfp4": 32, "int4": shape.int4_group}
    for layer in shape.stored if fmt == AS_STORED else shape.linears:
        block = blocks.get(_format(layer, fmt, ""), 1)
        if layer.cut == COLUMNS and layer.k % (cards * block):
            what = f"groups of {block} columns" if block > 1 else "columns"
            return f"the {layer.k} columns of {layer.name} are not {cards} x whole {what}"
    return ""


def cards_that_can_share(shape: DecoderShape, cards: int, fmt: str) -> bool:
    """Whether tensor parallelism can cut the model so."""
    return not split_obstacle(shape, cards, fmt)


@dataclass(frozen=True)
class Roofline:
    """One step: seconds of memory traffic and of arithmetic, and the terms that they come from.

    tokens:         that the step yields
    weight_bytes:   of weights read, on all cards
    kv_bytes:       of keys and values read or written, on all cards
    linear_flops:   of the linear layers, at ``linear_tflops`` of all cards
    other_flops:    of lm_head and attention, at ``other_tflops`` (BF16) of all cards
    gbps:           memory bandwidth of all cards, 10^9 bytes per second
    """

    tokens: int
    weight_bytes: float
    kv_bytes: float
    linear_flops: float
    other_flops: float
    gbps: float
    linear_tflops: float
    other_tflops: float

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def flops(self) -> float:
        return self.linear_flops + self.other_flops

    @property
    def memory_s(self) -> float:
        """seconds = (weight_bytes + kv_bytes) / gbps"""
        return self.num_bytes / (self.gbps * 1e9)

    @property
    def compute_s(self) -> float:
        """seconds = linear_flops / linear_tflops + other_flops / other_tflops"""
        linear = self.linear_flops / (self.linear_tflops * 1e12)
        return linear + self.other_flops / (self.other_tflops * 1e12)

    @property
    def tokens_per_s(self) -> float:
        """tokens / max(memory_s, compute_s)"""
        return self.tokens / max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        """What sets the limit: reading weights, reading the KV cache, or arithmetic."""
        if self.compute_s > self.memory_s:
            return "compute"
        return "weights" if self.weight_bytes >= self.kv_bytes else "KV cache"


def tensor_tflops(gpu: Gpu, fmt: str) -> float:
    """Dense rate of the products in ``fmt``: with the activations that the kernels take unasked on
    the card, or in FP4 where it has that."""
    if fmt in ("bf16", "int4"):
        return gpu.bf16_tflops
    if fmt == "fp8":
        return max(gpu.bf16_tflops, gpu.fp8_f32_tflops)
    return max(paper_tflops(gpu, "mxfp4" if fmt == "mxfp4" else "nvfp4"), gpu.fp4_tflops)


def decode(
    shape: DecoderShape, weights: Weights, fmt: str, kv_bits: int, context: int, batch: int,
    gpu: Gpu, cards: int = 1,
) -> Roofline:  # fmt: skip
    """One token for each of ``batch`` sequences of ``context`` tokens.

    weight_bytes = weights.cards * (linear + head + other), of the experts the share that ``batch``
                   tokens need when each picks at random: 1 - (1 - per_token / experts)^batch
    kv_bytes     = batch * (bytes of the tokens attended in all layers, on all cards, + 2 * those of
                   states, which are read and written)
    linear_flops = 2 * batch * (weights that a token is multiplied with)
    other_flops  = 2 * batch * vocabulary * hidden + batch * attention

    What one card sends another is not counted: it can only make a step slower.
    """
    read = weights.linear - weights.not_decoded + (weights.lm_head or weights.embedding)
    read += weights.other
    if shape.num_experts:
        idle = (1 - shape.num_experts_per_tok / shape.num_experts) ** batch
        read -= int(weights.experts * idle)
    attended = sum(min(context, w) if w else context for w in shape.windows)
    return Roofline(
        batch, weights.cards * read,
        batch * kv.read_bytes(shape, context, kv_bits, cards),
        2.0 * batch * shape.num_active_weights,
        batch * (2.0 * shape.vocab_size * shape.hidden_size
                 + attended * _flops_per_attended(shape, is_decode=True)),
        cards * gpu.dram_gbps, cards * tensor_tflops(gpu, fmt), cards * gpu.bf16_tflops,
    )  # fmt: skip


def prefill(
    shape: DecoderShape, weights: Weights, fmt: str, kv_bits: int, prompt: int, chunk: int,
    gpu: Gpu, cards: int = 1,
) -> Roofline:  # fmt: skip
    """One prompt, in steps of ``chunk`` tokens; every step reads all weights once.

    weight_bytes = weights.cards * (linear + head + other) * ceil(prompt / chunk)
    kv_bytes     = prompt * layers * bytes of a token in one layer, written
    linear_flops = 2 * prompt * (weights that a token is multiplied with)
    other_flops  = 2 * vocabulary * hidden + (sum over layers and positions t of min(t, window))
                   * attention
    """
    read = weights.linear + (weights.lm_head or weights.embedding) + weights.other
    pairs = sum(_causal_pairs(prompt, w) for w in shape.windows)
    return Roofline(
        prompt, weights.cards * read * math.ceil(prompt / chunk),
        kv.written_bytes(shape, prompt, kv_bits, cards),
        2.0 * prompt * shape.num_active_weights,
        2.0 * shape.vocab_size * shape.hidden_size
        + pairs * _flops_per_attended(shape, is_decode=False),
        cards * gpu.dram_gbps, cards * tensor_tflops(gpu, fmt), cards * gpu.bf16_tflops,
    )  # fmt: skip


def _causal_pairs(tokens: int, window: int) -> int:
    """sum over t = 1..tokens of min(t, window)"""
    inside = min(tokens, window) if window else tokens
    return inside * (inside + 1) // 2 + (tokens - inside) * inside


def _flops_per_attended(shape: DecoderShape, is_decode: bool) -> int:
    """FLOP of one query token against one cached token in one layer, scores and values."""
    heads = shape.num_attention_heads
    if shape.latent is None:
        return 4 * heads * shape.head_dim
    latent = shape.latent
    if is_decode:  # against the latent itself
        return 2 * heads * (2 * latent.rank + latent.rope)
    return 2 * heads * (latent.nope + latent.rope + latent.value)
