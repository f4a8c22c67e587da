# SPDX-License-Identifier: Apache-2.0
"""The ops of routed experts, beside those of ops.py."""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_nvfp4.kernels import ops
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.numerics.formats import FORMATS

ops.LIBRARY.define(
    "moe(Tensor a, Tensor[] w13, Tensor[] w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, int intermediate_size, str fmt, str activation, float[] swiglu, "
    "bool is_weight_on_input, int activation_bits, "
    "Tensor? w13_bias=None, Tensor? w2_bias=None) -> Tensor"
)
ops.LIBRARY.define(
    "moe_into(Tensor(a!) y, Tensor a, Tensor[] w13, Tensor[] w2, Tensor topk_weights, "
    "Tensor topk_ids, Tensor? expert_map, int intermediate_size, str fmt, str activation, "
    "float[] swiglu, bool is_weight_on_input, int activation_bits, "
    "Tensor? w13_bias=None, Tensor? w2_bias=None) -> ()"
)
ops.LIBRARY.define(
    "moe_rows(Tensor a, Tensor[] weight, Tensor topk_ids, Tensor? expert_map, int num_rows, "
    "str fmt, int activation_bits, Tensor? bias=None) -> Tensor"
)


def experts_backend(device_type: str) -> ModuleType:
    """The kernel module of a device for routed experts."""
    return ops.backend(device_type, "moe")


def warm_up_experts(device: torch.device, fmt: str, activation_bits: int) -> None:
    """Have the kernels of routed experts of a format ready, at load time."""
    if device.type == "cuda":
        experts_backend("cuda").prepare_moe(device, fmt)
    else:
        ops.warm_up(device, fmt, activation_bits)


def moe(
    a: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    fmt: str,
    activation: str,
    swiglu: list[float],
    is_weight_on_input: bool,
    activation_bits: int,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m] = sum_j topk_weights[m, j] * (w2[e] act(w13[e] a[m] + w13_bias[e]) + w2_bias[e]),
    e = topk_ids[m, j]

    a:            [M, H] bf16 or fp16 (float32 on the CPU)
    w13, w2:      codes, block_scale and global_scale of PackedWeight, each with a leading dimension
                  of local experts: [2 I, H] per expert (gate rows before up rows; [I, H] for an
                  activation without a gate), and [H, I]
    topk_weights: [M, k] float; topk_ids: [M, k] integer, numbers of all ranks' experts
    expert_map:   [all experts] integer, number on this rank or -1; None where all are here
    intermediate_size: I on this rank
    activation, swiglu: name and (limit, alpha, beta), see numerics.activation
    is_weight_on_input: topk_weights multiply a instead of the expert's output
    activation_bits: as in :func:`ops.linear`
    w13_bias, w2_bias: [E, rows of the weight] of a's dtype, or None
    y:            [M, H] of a's dtype, contiguous, to write into, or None for a new tensor
    Returns y; sums are formed in float32.
    """
    act = ExpertActivation(activation, *swiglu)
    rows, hidden_size = intermediate_size * (2 if act.is_gated else 1), a.shape[1]
    first = PackedWeight(w13[0], w13[1], w13[2], rows, hidden_size, FORMATS[fmt])
    second = PackedWeight(w2[0], w2[1], w2[2], hidden_size, intermediate_size, FORMATS[fmt])
    found: torch.Tensor = experts_backend(a.device.type).moe(
        a, first, second, (topk_weights, topk_ids, expert_map), act, is_weight_on_input,
        activation_bits, (w13_bias, w2_bias), y,
    )  # fmt: skip
    return found


def moe_into(y: torch.Tensor, *arguments) -> None:
    """:func:`moe` into y [M, H]; torch leaves out biases that are None."""
    operands = [*arguments[:12], *[*arguments[12:], None, None][:2], y]
    moe(*operands)


def moe_rows(
    a: torch.Tensor,
    weight: list[torch.Tensor],
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_rows: int,
    fmt: str,
    activation_bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m, j] = w[e] a[m] + bias[e],  e = topk_ids[m, j]: one product of :func:`moe` alone.

    a:      [M, K], or [M, k, K] where each choice has a row of its own
    weight: codes, block_scale and global_scale of PackedWeight, with a leading dimension of local
            experts, of [num_rows, K] each
    The other operands are those of :func:`moe`. Returns [M, k, num_rows] of a's dtype; 0 where
    another rank has the expert.
    """
    num_tokens, num_choices = topk_ids.shape
    stack = PackedWeight(weight[0], weight[1], weight[2], num_rows, a.shape[-1], FORMATS[fmt])
    rows, per_row = a.reshape(-1, a.shape[-1]), 1 if a.dim() == 3 else num_choices
    choices = (topk_ids, expert_map)
    y = experts_backend(a.device.type).rows(rows, stack, choices, per_row, activation_bits, bias)
    return y.view(num_tokens, num_choices, num_rows)


def _fake_moe(a, *others):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _fake_moe_into(y, *others):
    return None


def _fake_moe_rows(a, weight, topk_ids, expert_map, num_rows, *others):
    return a.new_empty(*topk_ids.shape, num_rows)


for _name, _implementation, _fake in (
    ("moe", moe, _fake_moe),
    ("moe_into", moe_into, _fake_moe_into),
    ("moe_rows", moe_rows, _fake_moe_rows),
):
    ops.register(_name, _implementation, _fake)
