# SPDX-License-Identifier: Apache-2.0
"""Bytes and roofline of one configuration: a dense decoder in one weight format on one card."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.planning.shapes import DecoderShape

FORMATS = ("bf16", "fp8", "int4", "mxfp4", "nvfp4")
# vLLM's default gpu_memory_utilization.
UTILIZATION = 0.92
# Estimate: CUDA context, captured graphs and workspaces.
OVERHEAD_BYTES = 1_000_000_000
# Estimate: tokens of one prefill step, vLLM's max_num_batched_tokens on cards below 70 GB.
PREFILL_TOKENS = 2048
# Order of the kernels' tiles: N and K of a 4-bit weight are padded to these (see layout.py).
_TILE_N, _TILE_K = 16, 64


def held_bytes(n: int, k: int, fmt: str) -> int:
    """Bytes of an [n, k] weight as the loader holds it on the GPU, scales included.

    nvfp4, mxfp4: codes and block scales padded to tiles of 16 x 64, and a float32 per row;
    fp8: one byte per weight, a float32 per row; int4: groups of 128, a 16-bit scale each.
    """
    if fmt == "bf16":
        return 2 * n * k
    if fmt == "fp8":
        return n * k + 4 * n
    if fmt == "int4":
        return n * k // 2 + 2 * n * math.ceil(k / 128)
    padded = math.ceil(n / _TILE_N) * _TILE_N * math.ceil(k / _TILE_K) * _TILE_K
    return padded // 2 + padded // (16 if fmt == "nvfp4" else 32) + 4 * n


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights in memory by part. A tied lm_head is 0: it is the embedding."""

    linear: int
    lm_head: int
    embedding: int
    other: int

    @property
    def total(self) -> int:
        return self.linear + self.lm_head + self.embedding + self.other


def weights_of(
    shape: DecoderShape, fmt: str, lm_head: str = "keep", embedding: str = "keep"
) -> Weights:
    """Bytes held for linear layers in ``fmt``; lm_head and embedding are keep, fp8 or nvfp4."""
    if shape.tie_word_embeddings:
        # One copy, whose format either option sets.
        embedding = embedding if embedding != "keep" else lm_head
    sizes = [
        held_bytes(shape.vocab_size, shape.hidden_size, "bf16" if f == "keep" else f)
        for f in (lm_head, embedding)
    ]
    linear = shape.num_layers * sum(held_bytes(n, k, fmt) for n, k, _ in shape.fused_layers())
    return Weights(linear, 0 if shape.tie_word_embeddings else sizes[0], sizes[1],
                   2 * shape.num_other)  # fmt: skip


def stored_nvfp4_bytes(shape: DecoderShape) -> int:
    """Bytes of tensors in a weight-only ModelOpt NVFP4 checkpoint: a float32 scale per shard."""
    per_layer = sum(n * k // 2 + n * k // 16 + 4 * s for n, k, s in shape.fused_layers())
    copies = 1 if shape.tie_word_embeddings else 2
    kept = copies * shape.vocab_size * shape.hidden_size + shape.num_other
    return shape.num_layers * per_layer + 2 * kept


def kv_bytes_per_token(shape: DecoderShape, bits: int, num_layers: int | None = None) -> int:
    """Keys and values of one token in ``num_layers`` layers, all of them by default."""
    layers = shape.num_layers if num_layers is None else num_layers
    return 2 * layers * shape.num_key_value_heads * shape.head_dim * bits // 8


def kv_bytes(shape: DecoderShape, context: int, bits: int) -> int:
    """Keys and values that a sequence needs: a sliding layer keeps its window and no more."""
    tokens = sum(min(context, w) if w else context for w in shape.windows)
    return tokens * kv_bytes_per_token(shape, bits, 1)


def activation_bytes(shape: DecoderShape, concurrency: int) -> int:
    """Estimate: gate, up and their product and two hidden states of a prefill step, and logits."""
    step = 2 * PREFILL_TOKENS * (3 * shape.intermediate_size + 2 * shape.hidden_size)
    return step + 4 * concurrency * shape.vocab_size


@dataclass(frozen=True)
class Roofline:
    """One step: seconds of memory traffic, seconds of arithmetic, and what they come from."""

    tokens: int
    num_bytes: int
    flops: float
    memory_s: float
    compute_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_s >= self.compute_s else "compute"


def tensor_tflops(gpu: Gpu, fmt: str) -> float:
    """Dense rate of the products: FP8 where the format may use it and the card has it."""
    return max(gpu.bf16_tflops, gpu.fp8_f32_tflops if fmt in ("fp8", "nvfp4", "mxfp4") else 0)


def decode(
    shape: DecoderShape, weights: Weights, fmt: str, kv_bits: int, context: int, batch: int,
    gpu: Gpu, cards: int = 1,
) -> Roofline:  # fmt: skip
    """One token for each of ``batch`` sequences of ``context``; traffic and work cut evenly.

    bytes = linear + lm_head + other + batch * kv(context); FLOP = 2 * batch * (weights)
            + 4 * batch * heads * head_dim * (tokens attended over all layers)
    """
    head = weights.lm_head or weights.embedding
    traffic = weights.linear + head + weights.other + batch * kv_bytes(shape, context, kv_bits)
    flops = 2.0 * batch * (shape.num_linear_weights + shape.vocab_size * shape.hidden_size)
    attended = sum(min(context, w) if w else context for w in shape.windows)
    flops += 4.0 * batch * shape.num_attention_heads * shape.head_dim * attended
    rate = tensor_tflops(gpu, fmt) * 1e12
    bandwidth = gpu.dram_gbps * 1e9
    return Roofline(batch, traffic, flops, traffic / bandwidth / cards, flops / rate / cards)
