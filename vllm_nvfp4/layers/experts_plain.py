# SPDX-License-Identifier: Apache-2.0
"""16-bit experts without a gate on a CPU, for which vLLM has no kernel: torch's products.

They are widened experts, and those that a checkpoint keeps in 16 bits: few, as a draft's. Each
expert takes its tokens one after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.platforms import current_platform

from vllm_nvfp4.numerics.activation import ExpertActivation

logger = init_logger(f"vllm.{__name__}")


def plain_experts_method(layer: Any) -> FusedMoEMethodBase | None:
    """The method for experts in 16 bits; None for vLLM's own. Raises NotImplementedError for biases
    where vLLM has none."""
    if not current_platform.is_cpu() or layer.moe_config.is_act_and_mul:
        return None
    if layer.moe_config.has_bias:
        raise NotImplementedError("16-bit experts with biases and without a gate, on a CPU")
    return PlainExpertsMethod(layer.moe_config)


class PlainExpertsMethod(FusedMoEMethodBase):
    """y[m] = sum_j topk_weights[m, j] * w2[e] act(w13[e] x[m]), e = topk_ids[m, j], over the
    experts of this rank."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        for stem, shape in (("w13", (inner, hidden_size)), ("w2", (hidden_size, inner))):
            data = torch.zeros((num_experts, *shape), dtype=params_dtype)
            parameter = torch.nn.Parameter(data, requires_grad=False)
            layer.register_parameter(f"{stem}_weight", parameter)
            for key, value in extra_weight_attrs.items():
                setattr(parameter, key, value)

    def process_weights_after_loading(self, layer: Any) -> None:
        self._act = ExpertActivation(self.moe.activation.value)
        logger.info_once(
            "nvfp4: 16-bit experts without a gate: vLLM has no kernel for them on a CPU: torch's "
            "products, expert by expert"
        )

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The routed experts' part, as NvFp4MoEMethod's. x: [M, H]; the others [M, k]"""
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        slots = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        y = torch.zeros(x.shape, dtype=torch.float32)
        for slot in range(len(layer.w13_weight)):
            rows, places = (slots == slot).nonzero(as_tuple=True)
            if len(rows):
                h = self._act(linear(x[rows], layer.w13_weight[slot]))
                out = linear(h, layer.w2_weight[slot])
                y.index_add_(0, rows, out.float() * topk_weights[rows, places, None].float())
        return y.to(x.dtype)
