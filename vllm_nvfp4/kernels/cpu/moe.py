# SPDX-License-Identifier: Apache-2.0
"""Routed experts on the CPU: the tokens of one expert after another through the dense kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm_nvfp4.kernels.cpu.layout import ROWS
from vllm_nvfp4.kernels.cpu.linear import linear
from vllm_nvfp4.kernels.layout import PackedWeight, check_stack
from vllm_nvfp4.numerics.activation import ExpertActivation


def moe(
    a: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    activation: ExpertActivation,
    is_weight_on_input: bool,
    activation_bits: int,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m] = sum_j weight[m, j] * (w2[e] act(w13[e] a[m] + b13[e]) + b2[e]),  e = expert[m, j]

    a:       [M, H] bf16, fp16 or f32
    w13, w2: the packed weights of all local experts, stacked: a leading dimension E on each tensor;
             num_rows and num_cols are those of one expert
    routing: weight [M, k] float; expert [M, k] integer, of all ranks' experts; expert_map [all
             experts] integer, number here or -1, or None where all are here
    is_weight_on_input: the weight multiplies a instead
    activation_bits: 8, or else 16
    biases:  b13 [E, rows of w13] and b2 [E, H] of a's dtype, or None
    y:       [M, H] of a's dtype to write into, or None for a new tensor
    Only experts that a token chose are read. The sum over j is formed in float32, in the order of
    the experts' numbers, so that it does not depend on threads.
    Returns y. Raises ValueError for shapes that do not fit.
    """
    for name, stack in (("w13", w13), ("w2", w2)):
        _check(name, stack)
    weight, expert = routing[0], _local(*routing[1:])
    num_choices, bits = expert.shape[1], activation_bits or 16
    total = torch.zeros(a.shape[0], w2.num_rows, dtype=torch.float32)
    for e, choice in _choices(expert, len(w13.codes)):
        token = choice // num_choices
        factor = weight.flatten()[choice].float()[:, None]
        x = a[token]
        if is_weight_on_input:
            x = (x.float() * factor).to(a.dtype)
        b13, b2 = (None if bias is None else bias[e] for bias in biases)
        h = linear(x, _expert(w13, e), b13, bits)
        h = activation(h.float()).to(a.dtype)
        out = linear(h, _expert(w2, e), b2, bits).float()
        # A token chooses an expert once, so each row of the sum is added to once.
        total.index_add_(0, token, out if is_weight_on_input else out * factor)
    return total.to(a.dtype) if y is None else y.copy_(total)


def rows(
    a: torch.Tensor,
    stack: PackedWeight,
    choices: tuple[torch.Tensor, torch.Tensor | None],
    choices_per_row: int,
    activation_bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[c] = w[e] a[c // choices_per_row] + bias[e],  e = expert[c]; 0 where another rank has e

    choices: expert and expert_map; the others as in :func:`moe`.
    Returns [choices, num_rows] of a's dtype.
    """
    _check("the weight", stack)
    expert, bits = _local(*choices), activation_bits or 16
    y = a.new_zeros(expert.numel(), stack.num_rows)
    for e, choice in _choices(expert, len(stack.codes)):
        b = None if bias is None else bias[e]
        y[choice] = linear(a[choice // choices_per_row], _expert(stack, e), b, bits)
    return y


def _local(expert: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The numbers on this rank, -1 where another has the expert."""
    return expert if expert_map is None else expert_map[expert.long()]


def _choices(expert: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that was chosen, in order, and the numbers of its choices, in order."""
    expert = expert.flatten().long()
    order = expert.argsort(stable=True)  # the choices, sorted by expert; -1 comes first
    counts = torch.bincount(expert + 1, minlength=num_experts + 1).tolist()
    if len(counts) > num_experts + 1:
        raise ValueError(
            f"vllm_nvfp4.moe: expert {len(counts) - 2} was chosen of {num_experts} experts"
        )
    first = counts[0]
    for e, count in enumerate(counts[1:]):
        if count:
            yield e, order[first : first + count]
        first += count


def _check(name: str, stack: PackedWeight) -> None:
    check_stack(name, stack, -(-stack.num_rows // ROWS) * ROWS, stack.num_cols)


def _expert(stack: PackedWeight, e: int) -> PackedWeight:
    return PackedWeight(
        stack.codes[e],
        stack.block_scale[e],
        stack.global_scale[e],
        stack.num_rows,
        stack.num_cols,
        stack.fmt,
    )
