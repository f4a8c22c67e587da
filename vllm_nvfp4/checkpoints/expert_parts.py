# SPDX-License-Identifier: Apache-2.0
"""Experts that are stored in one tensor for a whole layer, as a tensor for each expert.

A stack is [experts, N, K], or [experts, K, N] where the model multiplies from the right. Which of
the two is stored is told by the shapes of the pair: the down projection takes as many inputs as
half of gate and up give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

# The leaves of an expert's matrices in transformers' classes, by the stack that they are in.
_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class Part:
    """One expert's matrix in a stack.

    stored: the stack's name; expert: which; rows: of the matrix, in the stack's; shape: [N, K];
    is_transposed: the stack keeps it as [K, N]
    """

    stored: str
    expert: int
    rows: slice
    shape: tuple[int, int]
    is_transposed: bool

    def read(self, stack: object) -> torch.Tensor:
        """The matrix, [N, K]; stack: what safetensors' get_slice gives."""
        one = stack[self.expert : self.expert + 1][0]  # type: ignore[index]
        return (one.T if self.is_transposed else one)[self.rows].contiguous()


def split(stacks: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """The matrices in the stacks of one layer, by the names that they are written under.

    stacks: the class's leaf -> stored name; shapes: of stored tensors
    Raises ValueError, with the reason, where they are no experts as known here.
    """
    if unknown := sorted(stacks.keys() - _PARTS.keys()):
        raise ValueError(f"no layout is known for {unknown[0]}")
    if "down_proj" not in stacks or not stacks.keys() & {"gate_up_proj", "up_proj"}:
        raise ValueError("one of up and down projection is missing")
    is_transposed = _is_transposed(stacks, shapes)
    found: dict[str, Part] = {}
    for leaf, stored in stacks.items():
        count, rows, cols = shapes[stored]
        if is_transposed:
            rows, cols = cols, rows
        parts = _PARTS[leaf]
        rows //= len(parts)
        for expert in range(count):
            for i, part in enumerate(parts):
                name = f"{_prefix(stored)}.{expert}.{part}.weight"
                piece = slice(i * rows, (i + 1) * rows)
                found[name] = Part(stored, expert, piece, (rows, cols), is_transposed)
    return found


def _is_transposed(stacks: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    up = next(leaf for leaf in ("gate_up_proj", "up_proj") if leaf in stacks)
    _, a, b = shapes[stacks["down_proj"]]
    _, c, d = shapes[stacks[up]]
    share = len(_PARTS[up])
    if c == share * b and d == a:
        # Without a gate both orders fit; that of linear layers is taken, as transformers' classes
        # without a gate have it.
        return False
    if d == share * a and c == b:
        return True
    raise ValueError(f"shapes [{c}, {d}] and [{a}, {b}] of an expert do not go together")


def _prefix(stored: str) -> str:
    parent = stored.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith("experts") else f"{parent}.experts"


def has_bias(stacks: Iterable[str], names: Iterable[str]) -> bool:
    """Whether a bias is stored beside the stacks."""
    names = set(names)
    return any(
        f"{s.removesuffix('.weight')}{end}" in names for s in stacks for end in ("_bias", ".bias")
    )
