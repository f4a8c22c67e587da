# SPDX-License-Identifier: Apache-2.0
"""A plan's pictures: the memory of a card, speed against batch, and cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.planning import pictures
from vllm_nvfp4.planning.fit import fit, rooflines
from vllm_nvfp4.planning.pictures import MemoryBar, Series
from vllm_nvfp4.planning.rows import BASIS, Asked, Row

_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def draw(
    folder: Path, asked: Asked, gpu: Gpu, rows: list[Row], same: Row, suffix: str = "png"
) -> list[Path]:
    """Write memory.png, speed.png where something fits, and cost.png where prices are known.

    rows: as the table has them, the recommendation first, all on as many cards
    same: BF16 on as many of these cards as it needs
    suffix: of the files: png, svg or pdf
    Returns their paths.
    """
    load, count = asked.load, rows[0].cards
    name = f"{asked.shape.name} on {count} x {gpu.name}"
    load_words = f"{load.concurrency} x {load.context} tokens"
    bits = rows[0].found.setup.kv_bits
    each = "on each card" if count > 1 else "on the card"
    drawn = [
        pictures.memory_stack(
            folder / f"memory.{suffix}",
            [_bar(row) for row in rows],
            f"{name}: {load_words}, {bits}-bit KV cache",
            f"GB (10⁹ bytes) {each},\ncomputed, not measured",
        )
    ]
    if series := _limits(asked, rows):
        drawn.append(
            pictures.speed_against_batch(
                folder / f"speed.{suffix}",
                series,
                f"{name}: limits of decoding, {load.context} tokens each, as far as it fits",
                f"tokens/s, all sequences, {BASIS}",
            )
        )
    values = {
        f"{row.cards} x {row.gpu.name}, {row.label}": row.dollars_per_million
        for row in (rows[0], same)
        if row.dollars_per_million is not None
    }
    if values:
        drawn.append(
            pictures.bars(
                folder / f"cost.{suffix}",
                {name: value for name, value in values.items() if value is not None},
                f"dollars per million tokens at the limit of decoding,\nwhose speed is an {BASIS}",
                f"{asked.shape.name}: {load_words}",
            )
        )
    return drawn


def _name(row: Row) -> str:
    return f"recommended: {row.label}" if row.is_recommended else row.label


def _bar(row: Row) -> MemoryBar:
    found = row.found
    parts = {
        "linear layers": found.weights.linear + found.weights.other,
        "lm_head": found.weights.lm_head,
        "embedding": found.weights.embedding,
        "KV cache": found.kv,
        "activations, graphs": found.overhead,
    }
    return MemoryBar(_name(row), {k: v for k, v in parts.items() if v}, found.budget)


def _limits(asked: Asked, rows: list[Row]) -> list[Series]:
    """For each format the limit at every batch that these cards hold."""
    found = []
    for row in rows:
        points = []
        for batch in _BATCHES:
            load = replace(asked.load, concurrency=batch)
            one = fit(asked.shape, row.found.setup, load, row.gpu)
            if one.is_fit and "split" not in row.obstacle:
                speed = rooflines(asked.shape, one, load, 1, row.gpu)[0].tokens_per_s
                points.append((batch, speed))
        if points:
            batches, speeds = zip(*points, strict=True)
            found.append(Series(_name(row), batches, speeds))
    return found
