# SPDX-License-Identifier: Apache-2.0
"""The KV cache as vLLM allocates it: whole blocks, in groups of layers that share block tables.

Follows vLLM's v1/kv_cache_interface.py (pages and blocks per sequence) and
v1/core/kv_cache_utils.py (groups of a model with more than one kind of attention).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from vllm_nvfp4.planning.shapes import DecoderShape

# vLLM's defaults: tokens in a block on a GPU, and steps in flight with asynchronous scheduling.
BLOCK_SIZE = 16
STEPS_IN_FLIGHT = 2
# An NVFP4 cache has an E4M3 scale for each block of a head's elements.
_NVFP4_BLOCK = 16
# What FlashInfer's attention has, but for 64, at which vLLM refuses an NVFP4 cache.
_NVFP4_HEAD_SIZES = (128, 256, 512)


def token_bytes(shape: DecoderShape, bits: int, cards: int = 1) -> int:
    """Bytes of one token in one layer on one card.

    2 * heads * head_dim * bits / 8, or (rank + rope) * bits / 8 with latent attention. A card has
    at least one key-value head; a latent is on every card.

    bits: 16, 8, or 4 for NVFP4, whose scales make it 4.5
    """
    if shape.latent:
        return (shape.latent.rank + shape.latent.rope) * bits // 8
    heads = max(shape.num_key_value_heads // cards, 1)
    scales = shape.head_dim // _NVFP4_BLOCK if bits == 4 else 0
    return 2 * heads * (shape.head_dim * bits // 8 + scales)


def nvfp4_obstacle(shape: DecoderShape) -> str | None:
    """Why vLLM refuses ``--kv-cache-dtype nvfp4`` for the model, or None.

    From 0.32 on it has one through FlashInfer, on compute capability 8.x, 9.x and 12.x for heads
    of 128, 256 or 512 elements, without attention sinks (v1/attention/backends/flashinfer.py).
    """
    if shape.latent:
        return "it has latent attention"
    if shape.family == "gpt_oss":
        return "it has attention sinks"
    if shape.head_dim not in _NVFP4_HEAD_SIZES:
        sizes = ", ".join(map(str, _NVFP4_HEAD_SIZES))
        return f"its attention heads have {shape.head_dim} elements, not one of {sizes}"
    return None


def groups_of(shape: DecoderShape) -> tuple[int, dict[int, int]]:
    """(layers in a group, {window: groups}).

    Layers of one kind are one group. With several kinds every group has as many layers as the
    rarest kind, or as the commonest where that is less than half as many again; the last group of
    a kind is padded.
    """
    kinds = Counter(shape.windows)
    if not kinds:
        return 0, {}
    size = _group_size(kinds.values())
    return size, {window: math.ceil(count / size) for window, count in kinds.items()}


def _group_size(counts: Collection[int]) -> int:
    size = min(counts)
    return max(counts) if max(counts) < 1.5 * size else size


def blocks_per_sequence(
    shape: DecoderShape, context: int, step_tokens: int, block_size: int = BLOCK_SIZE
) -> int:
    """Blocks that a sequence of ``context`` tokens takes in all groups.

    A sliding group keeps its window and the tokens of the steps in flight (``step_tokens``), and
    one block more, since a window need not begin at a block's edge.
    """
    total = 0
    for window, groups in groups_of(shape)[1].items():
        if window:
            tokens = min(window - 1 + step_tokens, context)
            total += groups * (math.ceil(tokens / block_size) + 1)
        else:
            total += groups * math.ceil(context / block_size)
    return total


def sequence_bytes(
    shape: DecoderShape, context: int, bits: int, step_tokens: int, cards: int = 1,
    block_size: int = BLOCK_SIZE,
) -> int:  # fmt: skip
    """Bytes on one card that vLLM sets aside for one sequence of ``context`` tokens.

    blocks_per_sequence * layers in a group * block_size * token_bytes, and the state of the layers
    that have one, which is cut over the cards. Of layers that vLLM described: :func:`_kept_bytes`.
    """
    if shape.kept:
        return _kept_bytes(shape, context, bits, step_tokens, cards, block_size)
    block = groups_of(shape)[0] * block_size * token_bytes(shape, bits, cards)
    cached = blocks_per_sequence(shape, context, step_tokens, block_size) * block
    return cached + math.ceil(shape.state_bytes / cards)


def read_bytes(shape: DecoderShape, context: int, bits: int, cards: int = 1) -> int:
    """Bytes that one step of a sequence of ``context`` tokens reads on all cards, of states also
    what it writes."""
    one = token_bytes(shape, bits, cards)
    if not shape.kept:
        attended = sum(min(context, w) if w else context for w in shape.windows)
        return attended * cards * one + 2 * shape.state_bytes
    share = cards * one / token_bytes(shape, 16)
    attended = sum(
        x.token_bytes * (min(context, x.window) if x.window else context) for x in shape.kept
    )
    return math.ceil(attended * share) + 2 * sum(x.state_bytes for x in shape.kept)


def written_bytes(shape: DecoderShape, tokens: int, bits: int, cards: int = 1) -> int:
    """Bytes of keys and values that ``tokens`` tokens of one sequence write on all cards."""
    one = token_bytes(shape, bits, cards)
    if not shape.kept:
        return tokens * shape.num_layers * cards * one
    share = cards * one / token_bytes(shape, 16)
    return math.ceil(tokens * share * sum(x.token_bytes for x in shape.kept))


def _kept_bytes(
    shape: DecoderShape, context: int, bits: int, step_tokens: int, cards: int, block_size: int
) -> int:
    """:func:`sequence_bytes` of layers that differ in what they keep.

    All groups share one pool, so that all pages have one size: layers that keep less of a token
    have more tokens in a block, and with states a block has as many tokens as fill a state's page.
    Groups are made as in :func:`groups_of`, a state takes one block.
    """
    share = token_bytes(shape, bits, cards) / token_bytes(shape, 16)
    kinds = Counter(
        (x.window, math.ceil(x.token_bytes * share), math.ceil(x.state_bytes / cards))
        for x in shape.kept
    )
    largest = max(token for _, token, _ in kinds)
    if not largest:  # nothing but states
        return sum(count * state for (_, _, state), count in kinds.items())
    needed = math.ceil(max(state for *_, state in kinds) / largest)
    block_size *= max(math.ceil(needed / block_size), 1)
    size = _group_size(kinds.values())
    blocks = 0
    for (window, token, _), count in kinds.items():
        of_one = 1
        if token:
            tokens = min(window - 1 + step_tokens, context) if window else context
            of_one = math.ceil(tokens / (block_size * largest // token)) + bool(window)
        blocks += math.ceil(count / size) * of_one
    return blocks * size * block_size * largest
