# SPDX-License-Identifier: Apache-2.0
"""Experts that are stored in one tensor for a whole layer, as a tensor for each expert.

A stack is [experts, N, K], or [experts, K, N] where the model multiplies from the right. Which of
the two is stored is told by the shapes of the pair: the down projection takes as many inputs as
half of gate and up give; by the biases, [experts, N], where both fit. The rows of gate and up stand
one after the other, or take turns.
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
    """One expert's matrix or bias in a stack.

    stored: the stack's name; expert: which; rows: of the matrix, in the stack's; shape: [N, K], or
    [N] of a bias; is_transposed: the stack keeps it as [K, N]
    """

    stored: str
    expert: int
    rows: slice
    shape: tuple[int, ...]
    is_transposed: bool

    def read(self, stack: object) -> torch.Tensor:
        """What has :attr:`shape`; stack: what safetensors' get_slice gives."""
        one = stack[self.expert : self.expert + 1][0]  # type: ignore[index]
        return (one.T if self.is_transposed else one)[self.rows].contiguous()


def split(
    stacks: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    biases: Mapping[str, str],
    is_interleaved: bool = False,
) -> dict[str, Part]:
    """The matrices and biases in the stacks of one layer, by the names that they are written under.

    stacks, biases: the class's leaf of a stack -> stored name; shapes: of stored tensors;
    is_interleaved: the rows of gate and up take turns
    Raises ValueError, with the reason, where they are no experts as known here.
    """
    if unknown := sorted(stacks.keys() - _PARTS.keys()):
        raise ValueError(f"no layout is known for {unknown[0]}")
    if "down_proj" not in stacks or not stacks.keys() & {"gate_up_proj", "up_proj"}:
        raise ValueError("one of up and down projection is missing")
    is_transposed = _is_transposed(stacks, shapes, biases)
    found: dict[str, Part] = {}
    for leaf, stored in stacks.items():
        count, rows, cols = shapes[stored]
        if is_transposed:
            rows, cols = cols, rows
        if leaf in biases and shapes[biases[leaf]] != (count, rows):
            raise ValueError(f"biases {list(shapes[biases[leaf]])} of {count} x {rows} outputs")
        parts = _PARTS[leaf]
        rows //= len(parts)
        for expert in range(count):
            for i, part in enumerate(parts):
                name = f"{_prefix(stored)}.{expert}.{part}"
                piece = slice(i * rows, (i + 1) * rows)
                if is_interleaved:
                    piece = slice(i, None, len(parts))
                found[f"{name}.weight"] = Part(stored, expert, piece, (rows, cols), is_transposed)
                if leaf in biases:
                    found[f"{name}.bias"] = Part(biases[leaf], expert, piece, (rows,), False)
    return found


def _is_transposed(
    stacks: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], biases: Mapping[str, str]
) -> bool:
    up = next(leaf for leaf in ("gate_up_proj", "up_proj") if leaf in stacks)
    _, a, b = shapes[stacks["down_proj"]]
    _, c, d = shapes[stacks[up]]
    share = len(_PARTS[up])
    outputs = shapes[biases[up]][-1] if up in biases else c
    if c == share * b and d == a and outputs == c:
        # Without a gate both orders fit; that of linear layers is taken, as transformers' classes
        # without a gate have it.
        return False
    if d == share * a and c == b:
        return True
    raise ValueError(f"shapes [{c}, {d}] and [{a}, {b}] of an expert do not go together")


def _prefix(stored: str) -> str:
    parent = stored.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith("experts") else f"{parent}.experts"


def biases_of(stacks: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The stored biases beside stacks: the stack's leaf -> name."""
    names = set(names)
    found: dict[str, str] = {}
    for leaf, stored in stacks.items():
        for end in ("_bias", ".bias"):
            if (name := stored.removesuffix(".weight") + end) in names:
                found[leaf] = name
    return found
