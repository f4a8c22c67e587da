# SPDX-License-Identifier: Apache-2.0
"""A plan's pictures: the memory of a card, speed against batch, and cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.planning import pictures
from vllm_nvfp4.planning.fit import Fit, Setup, fit, rooflines
from vllm_nvfp4.planning.pictures import MemoryBar, Series
from vllm_nvfp4.planning.rows import Asked, Row

_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def draw(
    folder: Path, asked: Asked, gpu: Gpu, base: Setup, rows: list[Row],
    chosen: Row | None, baseline: Row,
) -> list[Path]:  # fmt: skip
    """Write memory.png, speed.png where something fits, and cost.png where prices are known.

    Returns their paths.
    """
    load, name = asked.load, f"{asked.shape.name} on {gpu.name}"
    bars = []
    for row in rows:
        setup = replace(base, fmt=row.found.setup.fmt)
        bars.append(_bar(setup.fmt, fit(asked.shape, setup, load, gpu)))
    if chosen:
        cards = chosen.found.setup.cards
        label = f"recommended:\n{cards} cards, each" if cards > 1 else "recommended"
        bars.append(_bar(label, chosen.found))
    title = f"{load.concurrency} x {load.context} tokens"
    drawn = [
        pictures.memory_stack(
            folder / "memory.png",
            bars,
            f"{name}, one card: {title}, {base.kv_bits}-bit KV cache",
        )
    ]
    if series := _limits(asked, base, rows):
        drawn.append(
            pictures.speed_against_batch(
                folder / "speed.png",
                series,
                f"{name}: limits of decoding, {load.context} tokens each, as far as it fits",
            )
        )
    values = {
        f"{row.cards} x {row.gpu.name}, {row.found.setup.fmt}": row.dollars_per_million
        for row in (chosen, baseline)
        if row and row.dollars_per_million is not None
    }
    if values:
        drawn.append(
            pictures.bars(
                folder / "cost.png",
                {name: value for name, value in values.items() if value is not None},
                "dollars per million tokens at the limit of decoding",
                f"{asked.shape.name}: {title}",
            )
        )
    return drawn


def _bar(label: str, found: Fit) -> MemoryBar:
    parts = {
        "linear layers": found.weights.linear + found.weights.other,
        "lm_head": found.weights.lm_head,
        "embedding": found.weights.embedding,
        "KV cache": found.kv,
        "activations, graphs": found.overhead,
    }
    return MemoryBar(label, {k: v for k, v in parts.items() if v}, found.budget)


def _limits(asked: Asked, base: Setup, rows: list[Row]) -> list[Series]:
    """For each format the limit at every batch that its cards hold."""
    found = []
    for row in rows:
        setup = replace(base, fmt=row.found.setup.fmt, cards=row.cards or 1)
        points = []
        for batch in _BATCHES:
            load = replace(asked.load, concurrency=batch)
            one = fit(asked.shape, setup, load, row.gpu)
            if row.cards and one.is_fit:
                speed = rooflines(asked.shape, one, load, 1, row.gpu)[0].tokens_per_s
                points.append((batch, speed))
        if points:
            batches, speeds = zip(*points, strict=True)
            found.append(Series(f"{setup.cards} x {setup.fmt}", batches, speeds))
    return found
