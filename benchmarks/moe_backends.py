# SPDX-License-Identifier: Apache-2.0
"""The peers of bench_moe.py, each as: prepare(layer, dtype) -> call(a, weights, ids) -> y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vllm_nvfp4.kernels.cuda import moe as cuda_moe
from vllm_nvfp4.kernels.cuda.moe_dispatch import MoeShape
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.testing.kernel_cases import random_weight
from vllm_nvfp4.testing.moe_cases import Experts

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SILU = ExpertActivation("silu")


class Layer:
    """A layer of experts of random codes and scales, w1 before w3."""

    def __init__(self, shape: MoeShape, fmt_name: str, device: torch.device, seed: int) -> None:
        self.shape = shape
        rows = (2 * shape.intermediate_size, shape.hidden_size)
        sizes = (rows, (shape.hidden_size, shape.intermediate_size))
        self.w13, self.w2 = (
            [random_weight(n, k, fmt_name, device, seed * 1000 + e)
             for e in range(shape.num_experts)]
            for n, k in sizes
        )  # fmt: skip

    def bytes_of_expert(self, weight_bits: float) -> float:
        return 3 * self.shape.intermediate_size * self.shape.hidden_size * weight_bits / 8


def _ours(bits: int) -> Callable[[Layer, torch.dtype], Call]:
    def prepare(layer: Layer, dtype: torch.dtype) -> Call:
        first, second = Experts(layer.w13, None).stack, Experts(layer.w2, None).stack
        cuda_moe.prepare_moe(first.codes.device, first.fmt.name, (dtype,))
        return lambda a, weights, ids: cuda_moe.moe(
            a, first, second, (weights, ids, None), SILU, False, bits
        )

    return prepare


def _marlin(layer: Layer, dtype: torch.dtype) -> Call:
    """vLLM's Marlin, prepared and called as its NVFP4 MoE method does."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
        prepare_nvfp4_moe_layer_for_marlin,
    )
    from vllm.scalar_type import scalar_types

    if layer.w13[0].fmt.name != "nvfp4":
        raise RuntimeError("this comparison with Marlin is for NVFP4")
    shape = layer.shape
    place = SimpleNamespace(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size_per_partition=shape.intermediate_size,
        params_dtype=dtype,
    )
    stacked = []
    for weights in (layer.w13, layer.w2):
        bits = torch.stack([w.block_scale.view(torch.uint8) for w in weights])
        stacked += [
            torch.stack([w.codes for w in weights]),
            bits.view(torch.float8_e4m3fn),
            torch.stack([w.global_scale.max() for w in weights]),
        ]
    w1, scale1, global1, w2, scale2, global2 = prepare_nvfp4_moe_layer_for_marlin(
        place, *stacked, is_act_and_mul=True
    )
    return lambda a, weights, ids: fused_marlin_moe(
        a, w1, w2, None, None, scale1, scale2, topk_weights=weights, topk_ids=ids,
        quant_type_id=scalar_types.float4_e2m1f.id, global_num_experts=shape.num_experts,
        global_scale1=global1, global_scale2=global2,
    )  # fmt: skip


def humming_layer(layer: Layer, dtype: torch.dtype) -> torch.nn.Module:
    """What vLLM's ModelOpt NVFP4 method holds of the layer when it converts it for Humming."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    if layer.w13[0].fmt.name != "nvfp4":
        raise RuntimeError("this comparison with Humming is for NVFP4")
    shape, place = layer.shape, torch.nn.Module()
    place.moe_config = FusedMoEConfig(
        num_experts=shape.num_experts, experts_per_token=shape.num_choices,
        hidden_dim=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts, num_logical_experts=shape.num_experts,
        activation=MoEActivation.SILU, device=layer.w13[0].codes.device, in_dtype=dtype,
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    place.params_dtype, place.layer_name = dtype, "experts"
    for stem, weights, shards in (("w13", layer.w13, 2), ("w2", layer.w2, 1)):
        scales = torch.stack([w.global_scale.max() for w in weights])
        for name, value in (
            ("weight", torch.stack([w.codes for w in weights])),
            ("weight_scale", torch.stack([w.block_scale.view(torch.uint8) for w in weights])
             .view(torch.float8_e4m3fn)),
            ("weight_scale_2", scales[:, None].repeat(1, shards) if shards == 2 else scales),
        ):  # fmt: skip
            parameter = torch.nn.Parameter(value, requires_grad=False)
            place.register_parameter(f"{stem}_{name}", parameter)
    return place


def _humming(layer: Layer, dtype: torch.dtype) -> Call:
    """vLLM's Humming experts in its modular kernel, converted as for ``--moe-backend humming``."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
    from vllm.model_executor.layers.fused_moe.experts.fused_humming_moe import (
        HummingIndexedExperts,
    )
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
    from vllm.model_executor.layers.quantization.utils.humming import (
        convert_to_humming_moe_kernel_format,
        get_humming_moe_quant_config,
    )
    from vllm.v1.worker import workspace

    device = layer.w13[0].codes.device
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(device)
    place: Any = humming_layer(layer, dtype)
    with set_current_vllm_config(VllmConfig()):
        convert_to_humming_moe_kernel_format(
            place, quant_config={"quant_method": "modelopt", "quant_algo": "nvfp4"}
        )
        config = get_humming_moe_quant_config(place)
        mover = maybe_make_prepare_finalize(
            moe=place.moe_config, quant_config=config, allow_new_interface=True
        )
        kernel: Any = FusedMoEKernel(mover, HummingIndexedExperts(place.moe_config, config))
    return lambda a, weights, ids: kernel.apply(
        a, place.w13_weight, place.w2_weight, topk_weights=weights, topk_ids=ids,
        activation=place.moe_config.activation, global_num_experts=layer.shape.num_experts,
        expert_map=None, apply_router_weight_on_input=False,
    )  # fmt: skip


def _triton_bf16(layer: Layer, dtype: torch.dtype) -> Call:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    w1, w2 = (torch.stack([w.dequantize(dtype) for w in ws]) for ws in (layer.w13, layer.w2))
    return lambda a, weights, ids: fused_experts(a, w1, w2, weights, ids)


@dataclass(frozen=True)
class Backend:
    """One way to compute the layer.

    prepare:         makes the call for one layer
    activation_bits: 16 or 8: which tensor rate bounds it; 0: as dispatch chooses
    weight_bits:     bits per weight that it reads; 0: the format's own
    max_error:       relative error against the float64 layer, above which it does not match
    """

    name: str
    prepare: Callable[[Layer, torch.dtype], Call]
    activation_bits: int
    weight_bits: float = 0
    max_error: float = 1e-2


# Against the float64 product of 16-bit activations: E4M3's roundings of both products count.
_A8_ERROR = 6e-2
BACKENDS = {
    b.name: b
    for b in (
        Backend("ours", _ours(0), 0, max_error=_A8_ERROR),
        Backend("ours-w4a16", _ours(16), 16),
        Backend("ours-w4a8", _ours(8), 8, max_error=_A8_ERROR),
        Backend("marlin", _marlin, 16),
        Backend("humming", _humming, 16),
        Backend("triton-bf16", _triton_bf16, 16, 16),
    )
}
