# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL and agreement from per-token scores, with standard errors by block bootstrap.

Neighbouring tokens are not independent: blocks of consecutive tokens are drawn with replacement,
the same ones for both models, so that what the text has in common cancels in a difference.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 8.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_nvfp4.quality.engine import Scores

BLOCK = 128
RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """One line of the report.

    reference, difference: None without a reference
    standard_error:        of the difference, or of ``value`` where there is none
    """

    metric: str
    reference: float | None
    value: float
    difference: float | None
    standard_error: float | None


def text_rows(
    scores: Scores, reference: Scores | None, seed: int = 0, block: int = BLOCK
) -> list[Row]:
    """The rows that a text gives. Without a reference the perplexity alone. block: tokens that are
    drawn together"""
    blocks = _Blocks(scores.nll.shape, seed, block)
    ppl, ppl_draws = _perplexity(blocks, scores.nll)
    if reference is None or scores.kl is None or scores.same is None:
        return [Row("perplexity", None, ppl, None, _deviation(ppl_draws))]
    base, base_draws = _perplexity(blocks, reference.nll)
    rows = [
        Row("perplexity", base, ppl, ppl - base, _deviation(ppl_draws - base_draws)),
        Row(
            "perplexity, %",
            100.0,
            100 * ppl / base,
            100 * (ppl / base - 1),
            _deviation(100 * ppl_draws / base_draws),
        ),
    ]
    kl, kl_draws = blocks.mean(scores.kl)
    tail, tail_draws = blocks.quantile(scores.kl, 0.99)
    same, same_draws = blocks.mean(scores.same)
    return [
        *rows,
        Row("KL, mean", 0.0, kl, kl, _deviation(kl_draws)),
        Row("KL, 99th percentile", 0.0, tail, tail, _deviation(tail_draws)),
        Row("top-1 agreement", 1.0, same, same - 1, _deviation(same_draws)),
    ]


def _perplexity(blocks: _Blocks, nll: np.ndarray) -> tuple[float, np.ndarray]:
    mean, draws = blocks.mean(nll)
    return float(np.exp(mean)), np.exp(draws)


def _deviation(draws: np.ndarray) -> float:
    return float(np.std(draws, ddof=1))


class _Blocks:
    """Blocks of consecutive tokens of each window, and how often each resample has them."""

    def __init__(self, shape: tuple[int, ...], seed: int, block: int) -> None:
        windows, length = shape
        per_window = -(-length // block)
        within = np.minimum(np.arange(length) // block, per_window - 1)
        self._of_token = (np.arange(windows)[:, None] * per_window + within).ravel()
        count = windows * per_window
        self._sizes = np.bincount(self._of_token, minlength=count)
        generator = np.random.default_rng(seed)
        # [RESAMPLES, num_blocks]
        self._weights = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)

    def mean(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """(mean over all tokens, the same of each resample)."""
        sums = np.bincount(self._of_token, values.ravel(), minlength=len(self._sizes))
        draws = (self._weights @ sums) / (self._weights @ self._sizes)
        return float(values.mean()), draws

    def quantile(self, values: np.ndarray, q: float) -> tuple[float, np.ndarray]:
        """(the smallest value that at least a share q do not exceed, the same of each resample)."""
        order = np.argsort(values.ravel(), kind="stable")
        ordered, owner = values.ravel()[order], self._of_token[order]
        draws = []
        for weights in (np.ones(len(self._sizes), dtype=np.int64), *self._weights):
            seen = np.cumsum(weights[owner])
            draws.append(ordered[np.searchsorted(seen, q * seen[-1])])
        return float(draws[0]), np.array(draws[1:])
