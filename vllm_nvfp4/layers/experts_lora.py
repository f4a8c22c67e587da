# SPDX-License-Identifier: Apache-2.0
"""LoRA on routed experts: the products apart, with what the adapters add between them.

vLLM has the adapters' own products for GPUs only; on the CPU they are formed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_nvfp4.layers.weights import experts_of
from vllm_nvfp4.numerics.activation import ExpertActivation


@dataclass(frozen=True)
class AdaptedExperts:
    """The experts of one layer and the adapters on them.

    activation:      with gate rows before up rows
    is_interleaved:  whether adapters have these rows in turns, as gpt-oss's own file
    activation_bits: as the ops take them
    context:         vLLM's adapters for the layer
    add_w13, add_w2: vLLM's products of the adapters on GPUs
    """

    layer: Any
    activation: ExpertActivation
    is_interleaved: bool
    activation_bits: int
    context: Any
    add_w13: Callable[..., Any]
    add_w2: Callable[..., Any]


def check(context: Any, device: torch.device, num_data_parallel: int) -> None:
    """Raise ValueError for adapters that only vLLM's products for GPUs can be told of."""
    if device.type != "cpu":
        return
    if num_data_parallel > 1:
        raise ValueError(
            f"LoRA on routed experts on the CPU with --data-parallel-size {num_data_parallel}: "
            "vLLM's LoRA for CPUs does not say which adapter a token of another rank has; use "
            "--tensor-parallel-size, or run without --enable-lora"
        )
    if context.fully_sharded:
        raise ValueError(
            "LoRA on routed experts on the CPU with --fully-sharded-loras: adapters are multiplied "
            "whole there; leave the option out"
        )


def apply(
    experts: AdaptedExperts,
    a: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """y[m] = sum_j topk_weights[m, j] (w2[e] + B2[e] A2[e]) act((w13[e] + B13[e] A13[e]) a[m])

    e = topk_ids[m, j] where this rank has it, A and B those of token m's adapter, if it has one.
    a: [M, H]; topk_weights, topk_ids: [M, k]. Returns [M, H] of a's dtype; the sum over j is formed
    in float32. What the activation makes is rounded to a's dtype.
    """
    layer, act = experts.layer, experts.activation
    inner, hidden = layer.nvfp4_intermediate_size, a.shape[1]
    rows = inner * (2 if act.is_gated else 1)
    who = (topk_ids, expert_map)
    adapters = Adapters(experts, topk_weights, topk_ids, expert_map, (rows, hidden, inner))

    def product(x: torch.Tensor, stem: str, num_rows: int) -> torch.Tensor:
        bias = getattr(layer, f"{stem}_bias", None)
        return torch.ops.vllm_nvfp4.moe_rows(
            x, experts_of(layer, stem), *who, num_rows, layer.nvfp4_format,
            experts.activation_bits, bias,
        )  # fmt: skip

    h = product(a, "w13", rows)
    adapters.add_w13(h, a)
    h = act(h.float()).to(a.dtype)
    y = product(h, "w2", hidden)
    weighted = y.float() * topk_weights.float()[..., None]
    return (weighted + adapters.weighted_w2(y, h)).sum(1).to(a.dtype)


class Adapters:
    """The adapters' products in one forward pass of a layer. shape: rows of w13, H, I."""

    context: Any

    def __init__(
        self,
        experts: AdaptedExperts,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        shape: tuple[int, int, int],
    ) -> None:
        self.experts = experts
        self.context = experts.context
        self.topk_weights, self.topk_ids, self.expert_map = topk_weights, topk_ids, expert_map
        num_experts, (rows, hidden, inner) = len(experts_of(experts.layer, "w13")[0]), shape
        # vLLM's tuning reads the shapes alone, of plain weights.
        self.w13_w2: dict[str, Any] = {
            "w1": torch.empty(num_experts, rows, hidden, device="meta"),
            "w2": torch.empty(num_experts, hidden, inner, device="meta"),
        }
        self.routing: tuple[Any, ...] = (None,) * 4

    def add_w13(self, h: torch.Tensor, a: torch.Tensor) -> None:
        """h [M, k, rows] += B13 A13 a"""
        context = self.context
        delta = torch.zeros_like(h)
        if h.device.type == "cpu":
            stacks = context.w13_lora_a_stacked, context.w13_lora_b_stacked
            add_products(delta, a, stacks, self._token_adapters(), self._local_ids())
        else:
            self.routing = self.experts.add_w13(
                context, y=delta, x=a, topk_ids=self.topk_ids, topk_weights=self.topk_weights,
                expert_map=self.expert_map, num_tokens=len(a), top_k_num=h.shape[1], **self.w13_w2,
            )  # fmt: skip
        if self._is_in_turns(h):
            delta = torch.cat([delta[..., ::2], delta[..., 1::2]], -1)
        h += delta

    def weighted_w2(self, y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """topk_weights B2 A2 h [M, k, H], of h [M, k, I], in y's shape; vLLM's product for GPUs
        multiplies by the weights itself."""
        context = self.context
        delta = torch.zeros_like(y)
        if y.device.type == "cpu":
            stacks = context.w2_lora_a_stacked, context.w2_lora_b_stacked
            add_products(delta, h, stacks, self._token_adapters(), self._local_ids())
            return delta.float() * self.topk_weights.float()[..., None]
        names = ("sorted_token_ids_lora", "expert_ids_lora", "num_tokens_post_padded_lora",
                 "token_lora_mapping")  # fmt: skip
        self.experts.add_w2(
            context, y=delta, x=h.flatten(0, 1), topk_weights=self.topk_weights, num_tokens=len(y),
            top_k_num=y.shape[1], **dict(zip(names, self.routing, strict=True)), **self.w13_w2,
        )  # fmt: skip
        return delta.float()

    def _is_in_turns(self, h: torch.Tensor) -> bool:
        """Whether gate and up rows of what the adapters add take turns: those of gpt-oss's file
        do; of two halves vLLM's helper for GPUs puts the rows so."""
        is_one_slice = self.context.w13_num_slices == 1
        return self.experts.is_interleaved and (is_one_slice or h.device.type != "cpu")

    def _token_adapters(self) -> torch.Tensor:
        """[M] number of each token's adapter, or -1."""
        adapters: torch.Tensor = self.context.punica_wrapper.token_lora_indices
        return adapters[: len(self.topk_ids)]

    def _local_ids(self) -> torch.Tensor:
        ids = self.topk_ids.long()
        return ids if self.expert_map is None else self.expert_map[ids]


def add_products(
    y: torch.Tensor,
    x: torch.Tensor,
    stacks: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
    adapters: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """y[m, j, slice s] += B_s[l, e] A_s[l, e] x[m(, j)],  l = adapters[m], e = ids[m, j]

    y:        [M, k, N], N the rows of all slices
    x:        [M, K], or [M, k, K]
    stacks:   A [L, E or 1, r, K] and B [L, E or 1, N / slices, r] of each slice
    adapters: [M], -1 for none;  ids: [M, k], -1 for another rank's
    """
    num_choices = ids.shape[1]
    a_stacks, b_stacks = stacks
    pairs = torch.stack([adapters[:, None].expand_as(ids), ids], -1).flatten(0, 1)
    rows, flat = y.flatten(0, 1), x.flatten(0, -2)
    for adapter, expert in pairs.unique(dim=0).tolist():
        if adapter < 0 or expert < 0:
            continue
        choice = (pairs == pairs.new_tensor([adapter, expert])).all(1).nonzero()[:, 0]
        inputs = flat[choice if x.dim() == 3 else choice // num_choices].float()
        parts = [
            inputs @ _of(a, adapter, expert).float().T @ _of(b, adapter, expert).float().T
            for a, b in zip(a_stacks, b_stacks, strict=True)
        ]
        rows[choice] += torch.cat(parts, -1).to(y.dtype)
    y.copy_(rows.view_as(y))


def _of(stack: torch.Tensor, adapter: int, expert: int) -> torch.Tensor:
    """One expert's matrix; a stack of one serves all experts."""
    return stack[adapter, expert if stack.shape[1] > 1 else 0]
