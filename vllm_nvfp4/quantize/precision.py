# SPDX-License-Identifier: Apache-2.0
"""NVFP4, FP8 or 16 bits for each layer: the least KL for a number of bits, or the reverse.

The choice minimises sum_g kl[g, format(g)] over fused layers g under
sum_g bits(g, format(g)) <= budget: a multiple-choice knapsack, solved exactly by
dynamic programming over the bits spent above NVFP4. That KL adds up over layers is an assumption;
it holds where each is small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Bits per weight of each format, without FP8's scale of a row.
BITS = {"nvfp4": 4.5, "fp8": 8.0, "bf16": 16.0}
_FP8_SCALE_BITS = 32
# Above this many steps of the budget costs are rounded up to coarser ones.
_MAX_STEPS = 200_000


@dataclass(frozen=True)
class Sensitivity:
    """The weights of one fused layer, how many there are and in how many rows, and the mean KL
    over tokens (in nats) of the model's logits with that layer alone in each format that it may
    have; "bf16" costs none. The routed experts of a layer are one: no kernel of experts reads FP8,
    and engines hold them in one format."""

    names: tuple[str, ...]
    num_weights: int
    num_rows: int
    kl: Mapping[str, float]


def half_bits(group: Sensitivity, name: str) -> int:
    """What the group takes in a format, in half bits: a whole number. NVFP4's one global scale for
    each weight is left out."""
    scales = _FP8_SCALE_BITS * group.num_rows if name == "fp8" else 0
    return round(2 * BITS[name] * group.num_weights) + 2 * scales


def choose_formats(
    groups: Sequence[Sensitivity],
    *,
    target_bits: float | None = None,
    max_kl: float | None = None,
) -> list[str]:
    """A format for each group: the least sum of KL with at most ``target_bits`` per weight on
    average, or the fewest bits with a sum of KL of at most ``max_kl``.

    Exact, unless the budget has over 200,000 steps of the greatest common divisor of what the
    formats cost: then each group may cost up to one step more than it does. Raises ValueError for a
    target below NVFP4's 4.5 bits, or a negative KL.
    """
    if target_bits is not None and not target_bits >= BITS["nvfp4"]:
        raise ValueError(f"{target_bits} bits per weight; NVFP4 alone takes {BITS['nvfp4']}")
    if max_kl is not None and not max_kl >= 0:
        raise ValueError(f"a KL of at most {max_kl}; it needs to be 0 or more")
    extra = [
        {n: half_bits(g, n) - half_bits(g, "nvfp4") for n in BITS if n in g.kl} for g in groups
    ]
    everything = sum(costs["bf16"] for costs in extra)
    budget = everything
    if target_bits is not None:
        total = sum(g.num_weights for g in groups)
        budget = min(everything, math.floor(2 * (target_bits - BITS["nvfp4"]) * total + 1e-6))
    common = math.gcd(*(cost for costs in extra for cost in costs.values()))
    step = max(common, -(-budget // _MAX_STEPS), 1)
    least, taken = _knapsack(groups, extra, step, budget // step)
    spent = len(least) - 1
    if max_kl is not None:
        # 16 bits everywhere cost no KL, and fit the budget.
        spent = int(np.argmax(least <= max_kl))
    formats = []
    for costs, choices in zip(reversed(extra), reversed(taken), strict=True):
        name = list(BITS)[choices[spent]]
        formats.append(name)
        spent -= -(-costs[name] // step)
    return formats[::-1]


def _knapsack(
    groups: Sequence[Sensitivity], extra: Sequence[Mapping[str, int]], step: int, num_steps: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(the least sum of KL for each number of steps, [num_steps + 1] float64; for each group the
    index in BITS that attains it, [num_steps + 1] uint8)."""
    least = np.zeros(num_steps + 1)
    taken = []
    for group, costs in zip(groups, extra, strict=True):
        best = np.full(num_steps + 1, np.inf)
        choice = np.zeros(num_steps + 1, np.uint8)
        for index, name in enumerate(BITS):
            if name not in costs:
                continue
            cost = -(-costs[name] // step)
            if cost > num_steps:
                continue
            found = np.full(num_steps + 1, np.inf)
            found[cost:] = least[: num_steps + 1 - cost] + group.kl[name]
            choice[found < best] = index
            best = np.minimum(best, found)
        least = best
        taken.append(choice)
    return least, taken


def average_bits(groups: Sequence[Sensitivity], formats: Sequence[str]) -> float:
    """Bits per weight over all groups."""
    total = sum(g.num_weights for g in groups)
    return sum(half_bits(g, f) for g, f in zip(groups, formats, strict=True)) / 2 / total
