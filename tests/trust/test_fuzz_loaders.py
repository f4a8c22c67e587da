# SPDX-License-Identifier: Apache-2.0
"""20,000 hostile and broken checkpoints, over every dialect: see tests/support/fuzz_worker.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from fuzz_mutations import choose
from fuzz_pool import Pool
from fuzz_strategies import headers, quantization_configs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.trust

NUM_MUTATED, NUM_DRAWN = 17_000, 1_500
LONG = settings(
    max_examples=NUM_DRAWN, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(min(os.cpu_count() or 1, 8)) as pool:
        yield pool


def test_mutated_files(pool: Pool, count: Callable[..., None]) -> None:
    seeds = pool.seeds
    faults = pool.run((seeds[n % len(seeds)], choose(n), n) for n in range(NUM_MUTATED))
    count(cases=NUM_MUTATED, seeds=len(seeds), **pool.counts)
    assert faults == []
    assert pool.counts.total() == NUM_MUTATED
    assert min(pool.counts["accepted"], pool.counts["refused"]) > NUM_MUTATED // 10


def test_drawn_configurations(pool: Pool, count: Callable[..., None]) -> None:
    @LONG
    @given(st.sampled_from(pool.seeds), quantization_configs())
    def check(seed: str, entries: dict) -> None:
        outcome = pool.run_one((seed, entries))
        assert outcome.kind != "fault", outcome.text

    check()
    count(cases=pool.counts.total(), **pool.counts)


def test_drawn_headers(pool: Pool, count: Callable[..., None]) -> None:
    @LONG
    @given(headers())
    def check(entries: dict) -> None:
        outcome = pool.run_one(("16-bit modelopt/nvfp4-qwen3", entries))
        assert outcome.kind != "fault", outcome.text

    check()
    count(cases=pool.counts.total(), **pool.counts)
