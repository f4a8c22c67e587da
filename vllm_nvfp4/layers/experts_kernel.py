# SPDX-License-Identifier: Apache-2.0
"""Routed experts as vLLM's modular kernel: it moves tokens between ranks, this multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.modular_kernel import (
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from vllm_nvfp4.layers import experts_lora
from vllm_nvfp4.layers.weights import experts_of
from vllm_nvfp4.numerics.activation import SUPPORTED, ExpertActivation


class NvFp4Experts(LoRAExpertsMixin, FusedMoEExpertsModular):
    """NVFP4 and MXFP4 experts of one layer.

    layer:           vLLM's layer; its parameters are looked up at each call, as reloading and
                     load balancing replace or move them
    activation:      with gate rows before up rows
    is_interleaved:  whether adapters have these rows in turns, as gpt-oss's own file
    activation_bits: as the ops take them
    """

    def __init__(
        self, layer: Any, activation: ExpertActivation, is_interleaved: bool, activation_bits: int
    ) -> None:
        super().__init__(layer.moe_config, FUSED_MOE_UNQUANTIZED_CONFIG)
        self.layer, self.expert_activation = layer, activation
        self.is_interleaved, self.activation_bits = is_interleaved, activation_bits

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in SUPPORTED

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def set_lora_context(self, ctx: Any) -> None:
        """vLLM's adapters for this layer, from now on. Raises ValueError for what the products on
        the CPU do not know."""
        parallel = self.moe_config.moe_parallel_config
        experts_lora.check(ctx, self.layer.w13_weight.device, parallel.dp_size)
        super().set_lora_context(ctx)

    def _adapted(self) -> experts_lora.AdaptedExperts:
        return experts_lora.AdaptedExperts(
            self.layer,
            self.expert_activation,
            self.is_interleaved,
            self.activation_bits,
            self._lora_context,
            self.apply_w13_lora,
            self.apply_w2_lora,
        )

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """(E, M, rows of w13, H, k); the codes are in kernel order, their shape does not say."""
        rows = self.layer.nvfp4_intermediate_size * (2 if self.expert_activation.is_gated else 1)
        return w1.shape[0], a1.shape[0], rows, a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No workspace of vLLM's, and the finished sum [M, K]."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """:meth:`sums` into ``output``."""
        self.sums(
            hidden_states, topk_weights, topk_ids, expert_map, apply_router_weight_on_input, output
        )

    def sums(
        self,
        a: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        is_weight_in_input: bool,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y[m] = sum_j topk_weights[m, j] * expert topk_ids[m, j] of a[m], over this rank's
        experts; without the weights where they have been multiplied into a.

        a: [M, H]; topk_weights, topk_ids: [M, k]; expert_map as the ops take it. Returns y [M, H],
        a new tensor where there is none to write into.
        """
        y = torch.empty_like(a) if y is None else y
        if is_weight_in_input:
            topk_weights = torch.ones_like(topk_weights)
        if self._lora_context is not None:
            return y.copy_(
                experts_lora.apply(self._adapted(), a, topk_weights, topk_ids, expert_map)
            )
        act, layer = self.expert_activation, self.layer
        torch.ops.vllm_nvfp4.moe_into(
            y,
            a,
            experts_of(layer, "w13"),
            experts_of(layer, "w2"),
            topk_weights,
            topk_ids,
            expert_map,
            layer.nvfp4_intermediate_size,
            layer.nvfp4_format,
            act.name,
            [act.limit, act.alpha, act.beta],
            False,
            self.activation_bits,
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
        )
        return y
