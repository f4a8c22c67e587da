# SPDX-License-Identifier: Apache-2.0
"""A plan's rows: one configuration on one kind of card, with memory, limits and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_nvfp4.gpus import GPUS, Gpu
from vllm_nvfp4.planning import fit as fitting
from vllm_nvfp4.planning.choose import kv_bits_of
from vllm_nvfp4.planning.costs import Cost, cost_of
from vllm_nvfp4.planning.fit import Fit, Load, Setup
from vllm_nvfp4.planning.model import (
    AS_STORED,
    EMBEDDING_FORMATS,
    FORMATS,
    Roofline,
    checkpoint_parts,
    split_obstacle,
)
from vllm_nvfp4.planning.shapes import DecoderShape


@dataclass(frozen=True)
class Asked:
    """What a plan is about. rent, buy: the user's own prices of one card, dollars."""

    shape: DecoderShape
    load: Load
    prompt: int
    electricity: float
    rent: float | None = None
    buy: float | None = None


# What every speed and cost of a plan is, wherever one is shown.
BASIS = "upper bound, not measured"
# Below this share of spare memory the estimate of activations and graphs may be off by more.
TIGHT = 0.03


@dataclass(frozen=True)
class Row:
    """One configuration on ``cards`` cards of one kind.

    cards:    that it is computed for
    fewest:   the fewest of 1, 2, 4 or 8 that hold it; None if none of these do
    obstacle: why ``cards`` do not do, in a few words; empty where they do
    """

    gpu: Gpu
    cards: int
    fewest: int | None
    obstacle: str
    found: Fit
    longest_context: int
    most_sequences: int
    decode: Roofline
    prefill: Roofline
    cost: Cost | None
    is_recommended: bool = False

    @property
    def label(self) -> str:
        """The format, and what differs from it: "nvfp4, fp8 lm_head"."""
        setup = self.found.setup
        parts = [setup.fmt]
        if setup.attention:
            parts.append(f"{setup.attention} attn")
        if setup.lm_head == setup.embedding != "keep":
            parts.append(f"{setup.lm_head} tables")
        elif setup.lm_head != "keep":
            parts.append(f"{setup.lm_head} lm_head")
        elif setup.embedding != "keep":
            parts.append(f"{setup.embedding} embed")
        return ", ".join(parts)

    @property
    def spare(self) -> float:
        """Share of what vLLM may use that is left; below 0 where it does not fit."""
        return 1 - self.found.total / self.found.budget

    @property
    def is_tight(self) -> bool:
        return not self.obstacle and self.spare < TIGHT

    @property
    def dollars_per_million(self) -> float | None:
        """At the limit of decoding; None without a price or where it does not fit."""
        if self.cost is None or self.obstacle:
            return None
        return self.cost.per_million_tokens(self.decode.tokens_per_s)

    def to_json(self) -> dict[str, Any]:
        setup = asdict(self.found.setup)
        weights = asdict(self.found.weights) | {"total": self.found.weights.total}
        return {
            "gpu": self.gpu.name,
            "setup": setup,
            "label": self.label,
            "recommended": self.is_recommended,
            "cards": self.cards,
            "fewest_cards": self.fewest,
            "obstacle": self.obstacle,
            "spare": round(self.spare, 4),
            "weight_bytes": weights,
            "kv_bytes": self.found.kv,
            "overhead_bytes": self.found.overhead,
            "total_bytes": self.found.total,
            "budget_bytes": self.found.budget,
            "longest_context": self.longest_context,
            "most_sequences": self.most_sequences,
            "decode": _roofline_json(self.decode),
            "prefill": _roofline_json(self.prefill),
            "cost": None if self.cost is None else asdict(self.cost),
            "dollars_per_million_tokens": self.dollars_per_million,
        }


def _roofline_json(step: Roofline) -> dict[str, Any]:
    names = ("memory_s", "compute_s", "tokens_per_s", "bound")
    return asdict(step) | {name: getattr(step, name) for name in names}


def row_of(
    asked: Asked, setup: Setup, gpu: Gpu, is_own_price: bool = True, cards: int | None = None
) -> Row:
    """The row of a configuration on ``cards`` cards, by default the fewest that hold it.

    is_own_price: whether the user's prices are of this card
    """
    fewest = fitting.cards_needed(asked.shape, setup, asked.load, gpu)
    cards = cards or fewest or fitting.CARD_COUNTS[-1]
    setup = replace(setup, cards=cards)
    found = fitting.fit(asked.shape, setup, asked.load, gpu)
    decode, prefill = fitting.rooflines(asked.shape, found, asked.load, asked.prompt, gpu)
    rent, buy = (asked.rent, asked.buy) if is_own_price else (None, None)
    return Row(
        gpu, cards, fewest, _obstacle(asked.shape, found, fewest), found,
        fitting.longest_context(asked.shape, setup, asked.load, gpu),
        fitting.most_sequences(asked.shape, setup, asked.load, gpu),
        decode, prefill, cost_of(gpu, cards, asked.electricity, rent, buy),
    )  # fmt: skip


def _obstacle(shape: DecoderShape, found: Fit, fewest: int | None) -> str:
    cards = found.setup.cards
    if split_obstacle(shape, cards, found.setup.fmt):
        return f"cannot be split over {cards} cards"
    if found.is_fit:
        return ""
    if fewest is None:
        return f"needs more than {fitting.CARD_COUNTS[-1]} cards"
    return f"does not fit; needs {fewest} cards"


def format_rows(asked: Asked, base: Setup, gpu: Gpu, chosen: Setup | None) -> list[Row]:
    """The recommendation first, then every weight format, all on as many cards.

    A quantised checkpoint's own format comes before the others.
    base:   what all formats share
    chosen: the recommended configuration, or None where nothing fits
    """
    formats = (*((AS_STORED,) if asked.shape.stored else ()), *FORMATS)
    cards = chosen.cards if chosen else fitting.CARD_COUNTS[-1]
    setups = [replace(base, fmt=fmt, cards=cards) for fmt in formats]
    first = (
        [replace(row_of(asked, chosen, gpu, cards=cards), is_recommended=True)] if chosen else []
    )
    return first + [row_of(asked, s, gpu, cards=cards) for s in setups if s != chosen]


def option_rows(asked: Asked, gpu: Gpu) -> list[dict[str, Any]]:
    """Bytes and cards for every weight format with every lm_head, embedding and KV option."""
    tied = asked.shape.tie_word_embeddings
    found = []
    for fmt in FORMATS:
        for head in EMBEDDING_FORMATS:
            for embedding in (head,) if tied else EMBEDDING_FORMATS:
                for bits in (8, 16):
                    setup = Setup(fmt, head, embedding, kv_bits=bits)
                    cards = fitting.cards_needed(asked.shape, setup, asked.load, gpu)
                    one = fitting.fit(asked.shape, replace(setup, cards=cards or 1), asked.load,
                                      gpu)  # fmt: skip
                    found.append(
                        {
                            "setup": asdict(one.setup),
                            "cards": cards,
                            "weight_bytes": one.weights.total,
                            "kv_bytes": one.kv,
                            "total_bytes": one.total,
                        }
                    )
    return found


def card_rows(asked: Asked, base: Setup) -> list[Row]:
    """The configuration on every card of gpus.py, with the KV cache that each can."""
    return [
        row_of(asked, replace(base, kv_bits=max(base.kv_bits, kv_bits_of(gpu))), gpu, False)
        for gpu in GPUS
    ]


def checkpoint_sizes(shape: DecoderShape) -> dict[str, int]:
    """Bytes of a checkpoint's tensors on disk in each weight format."""
    return {fmt: sum(checkpoint_parts(shape, fmt).values()) for fmt in FORMATS}
