# SPDX-License-Identifier: Apache-2.0
"""What fits: the memory of one configuration on a card, the longest context, the most sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.planning import kv
from vllm_nvfp4.planning.model import (
    Roofline,
    Weights,
    cards_that_can_share,
    decode,
    prefill,
    weights_of,
)
from vllm_nvfp4.planning.shapes import DecoderShape

# vLLM's defaults: gpu_memory_utilization, and tokens of one step on cards below 70 GiB.
UTILIZATION = 0.92
STEP_TOKENS = 2048
# Estimate: CUDA context, captured graphs, workspaces, rotary tables.
OVERHEAD_BYTES = 1_000_000_000
CARD_COUNTS = (1, 2, 4, 8)
# Sequences beyond this gain nothing that a plan could tell.
MOST_SEQUENCES = 4096


@dataclass(frozen=True)
class Setup:
    """One configuration. ``attention`` is the format of attention's layers, empty for ``fmt``."""

    fmt: str = "nvfp4"
    lm_head: str = "keep"
    embedding: str = "keep"
    attention: str = ""
    kv_bits: int = 8
    cards: int = 1


@dataclass(frozen=True)
class Load:
    """What is asked for: ``concurrency`` sequences of ``context`` tokens, prompt included."""

    context: int
    concurrency: int


@dataclass(frozen=True)
class Fit:
    """Bytes on each card.

    kv:        of all sequences, as vLLM allocates it
    overhead:  estimated: activations and logits of a step, graphs, CUDA context
    budget:    what vLLM may use
    """

    setup: Setup
    weights: Weights
    kv: int
    overhead: int
    budget: int

    @property
    def total(self) -> int:
        return self.weights.total + self.kv + self.overhead

    @property
    def is_fit(self) -> bool:
        return self.total <= self.budget


def budget_of(gpu: Gpu) -> int:
    """UTILIZATION of the memory that CUDA reports, or of the nominal GB where that is unknown."""
    memory = gpu.cuda_gib * 2**30 or gpu.memory_gb * 1e9
    return int(memory * UTILIZATION)


def activation_bytes(shape: DecoderShape, concurrency: int, cards: int = 1) -> int:
    """Estimate: gate, up and their product, two hidden states of a step, and float32 logits."""
    step = 2 * STEP_TOKENS * (3 * shape.inner_size // cards + 2 * shape.hidden_size)
    return step + 4 * concurrency * shape.vocab_size


def fit(shape: DecoderShape, setup: Setup, load: Load, gpu: Gpu) -> Fit:
    """The memory of one card under this load."""
    weights = weights_of(
        shape, setup.fmt, setup.lm_head, setup.embedding, setup.cards, setup.attention
    )
    sequence = kv.sequence_bytes(
        shape, load.context, setup.kv_bits, STEP_TOKENS * kv.STEPS_IN_FLIGHT, setup.cards
    )
    overhead = OVERHEAD_BYTES + activation_bytes(shape, load.concurrency, setup.cards)
    return Fit(setup, weights, load.concurrency * sequence, overhead, budget_of(gpu))


def longest_context(shape: DecoderShape, setup: Setup, load: Load, gpu: Gpu) -> int:
    """Tokens that each of ``load.concurrency`` sequences can have; 0 if none."""
    return _most(
        shape.max_context,
        lambda n: fit(shape, setup, replace(load, context=n), gpu).is_fit,
    )


def most_sequences(shape: DecoderShape, setup: Setup, load: Load, gpu: Gpu) -> int:
    """Sequences of ``load.context`` tokens that fit at once, up to MOST_SEQUENCES; 0 if none."""
    return _most(
        MOST_SEQUENCES,
        lambda n: fit(shape, setup, replace(load, concurrency=n), gpu).is_fit,
    )


def _most(limit: int, is_possible: Callable[[int], bool]) -> int:
    """The largest n in 1..limit that is possible, for what gets harder with n; 0 if none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_possible(middle) else (low, middle - 1)
    return low


def cards_needed(shape: DecoderShape, setup: Setup, load: Load, gpu: Gpu) -> int | None:
    """The fewest of 1, 2, 4 or 8 cards that hold it; None if 8 do not."""
    for cards in CARD_COUNTS:
        if cards_that_can_share(shape, cards, setup.fmt) and (
            fit(shape, replace(setup, cards=cards), load, gpu).is_fit
        ):
            return cards
    return None


def rooflines(
    shape: DecoderShape, found: Fit, load: Load, prompt: int, gpu: Gpu
) -> tuple[Roofline, Roofline]:
    """(decoding with every sequence at its full context, prefill of one prompt)."""
    setup = found.setup
    common = (shape, found.weights, setup.fmt, setup.kv_bits)
    return (
        decode(*common, load.context, load.concurrency, gpu, setup.cards),
        prefill(*common, prompt, STEP_TOKENS, gpu, setup.cards),
    )
